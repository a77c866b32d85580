"""The evaluation command line. Run: python -m pytest tests/test_evaluate_score.py"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate_score
from eval_metrics import compute_cllr, compute_eer
from evaluation import bootstrap, comparisons, results
from formats import score_files, trial_lists
from formats.score_files import read_scores, write_scores
from runtime.cli import InputError

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT.parent / "shared" / "reference"


def write_subset(folder: Path, file: str, eer: float = 0.1, n: int = 40, seed: int = 0) -> Path:
    """A score file of n real trials and as many fake copies of them, with about that EER."""
    rng = np.random.default_rng(seed)
    distance = (
        -2 * np.sqrt(2) * _inverse_erf(2 * eer - 1)
    )  # between the means of two normal densities
    scores = 1 / (1 + np.exp(-np.concatenate([rng.normal(distance, 1, n), rng.normal(0, 1, n)])))
    names = [f"u{i}.wav" for i in range(n)] + [f"F01_u{i}.wav" for i in range(n)]
    folder.mkdir(parents=True, exist_ok=True)
    write_scores(folder / file, names, scores, ["real"] * n + ["fake"] * n)
    return folder / file


def _inverse_erf(y: float) -> float:
    low, high = -4.0, 4.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle) < y else (low, middle)
    return low


def write_model(folder: Path, eer: float = 0.1, names=results.SUBSETS, n: int = 40) -> Path:
    for seed, name in enumerate(names):
        write_subset(folder, f"{name}_result.txt", eer, n, seed)
    return folder


def run_json(capsys, *argv) -> list[dict]:
    evaluate_score.main([*map(str, argv), "--format", "json"])
    return json.loads(
        capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON")
    )


def ends(record: dict) -> list[float]:
    return [record["interval_low_percent"], record["interval_high_percent"]]


def run_text(capsys, *argv) -> str:
    evaluate_score.main([*map(str, argv)])
    return capsys.readouterr().out


def run_script(*argv, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "evaluate_score.py"), *map(str, argv)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


# ── Finding score files ──────────────────────────────────────────────────────────────────────────


def test_without_arguments_all_in_result_is_evaluated(tmp_path):
    write_subset(tmp_path / "result", "19LA_result.txt")
    write_subset(tmp_path / "result" / "other", "C1_result.txt")
    done = run_script("--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(r["model"], r["subset"]) for r in json.loads(done.stdout)] == [
        ("result", "19LA"),
        ("other", "C1"),
    ]


@pytest.mark.parametrize(
    "file, subset",
    [("L2_result.txt", "A2"), ("19LA.txt", "19LA"), ("IWA_result.txt", "ITW"), ("C3.txt", "C3")],
)
def test_names_of_the_published_results_are_understood(tmp_path, capsys, file, subset):
    write_subset(tmp_path, file)
    assert [r["subset"] for r in run_json(capsys, "--result_folder", tmp_path)] == [subset]


@pytest.mark.parametrize(
    "files", [("L1_result.txt", "A1_result.txt"), ("19LA.txt", "19LA_result.txt")]
)
def test_two_files_of_one_subset_are_refused(tmp_path, files):
    for file in files:
        write_subset(tmp_path, file)
    with pytest.raises(
        InputError, match=f"both .* are scores of {files[1].split('_')[0]}; keep one"
    ):
        evaluate_score.main(["--result_folder", str(tmp_path)])


def test_folders_of_one_name_stay_apart_and_a_folder_given_twice_counts_once(tmp_path, capsys):
    for parent in ("x", "y"):
        write_subset(tmp_path / parent / "model", "C1_result.txt")
    folders = [tmp_path / "x" / "model", tmp_path / "y" / "model", tmp_path / "x"]
    models = {r["model"] for r in run_json(capsys, "--result_folder", *folders)}
    assert models == {str(tmp_path / "x" / "model"), str(tmp_path / "y" / "model")}


def test_a_task_limits_subsets_and_columns(tmp_path, capsys):
    write_model(tmp_path / "m")
    assert [r["subset"] for r in run_json(capsys, "--result_folder", tmp_path, "-t", "ITW")] == [
        "ITW"
    ]
    header = (
        run_text(capsys, "--result_folder", tmp_path, "-t", "codecfake", "--no_ci")
        .splitlines()[1]
        .split()
    )
    assert header == ["model", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "CAVG", "A1", "A2", "A3"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "no such folder; expected score files such as"),
        (lambda folder: folder.mkdir(), "no score file of 19LA, ITW"),
        (lambda folder: folder.write_text("a 0.5 real\n"), "no such folder"),
    ],
)
def test_a_folder_without_scores_is_one_clear_line_and_exit_code_2(tmp_path, make, message):
    make(tmp_path / "result")
    done = run_script(cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: result")
        and message in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert "run `python generate_score.py` first" in done.stderr


@pytest.mark.parametrize(
    "bad_row, message",
    [
        ("u1.wav 0.5", "got 2 column"),
        ("n.wav nan fake", "finite"),
        ("u0.wav 0.5 real", "2 times"),
        ("n.wav 0.5 genuine", "one of real"),
    ],
)
def test_a_bad_score_file_is_one_clear_line_and_exit_code_2(tmp_path, bad_row, message):
    path = write_subset(tmp_path / "result", "C1_result.txt")
    with open(path, "a") as file:
        file.write(bad_row + "\n")
    done = run_script(cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: result/C1_result.txt:81: ")
        and message in done.stderr
        and done.stderr.count("\n") == 1
    )


# ── What is printed ──────────────────────────────────────────────────────────────────────────────


def test_json_holds_the_true_and_the_papers_figure_at_full_precision(tmp_path, capsys):
    write_scores(
        tmp_path / "C1_result.txt",
        list("abcdefg"),
        [1, 2, 3, 0, 2.5, 4, 5],
        ["real"] * 3 + ["fake"] * 4,
    )
    (record,) = run_json(capsys, "--result_folder", tmp_path)
    eer, threshold = compute_eer([1, 2, 3], [0, 2.5, 4, 5])
    assert (
        record["eer_percent"] == 100 * eer > 50
        and record["eer_paper_percent"] == 100 - record["eer_percent"]
    )
    assert (record["inverted"], record["threshold"]) == (True, threshold)
    assert (record["model"], record["subset"], record["n_real"], record["n_fake"]) == (
        tmp_path.name,
        "C1",
        3,
        4,
    )


def test_averages_are_means_and_need_all_their_parts(tmp_path, capsys):
    write_model(tmp_path / "m", eer=0.2)
    figures = {
        r["subset"]: r["eer_paper_percent"] for r in run_json(capsys, "--result_folder", tmp_path)
    }
    row = next(
        csv.DictReader(
            io.StringIO(run_text(capsys, "--result_folder", tmp_path, "--format", "csv"))
        )
    )
    codecs = [figures[f"C{i}"] for i in range(1, 8)]
    assert float(row["CAVG"]) == pytest.approx(np.mean(codecs), abs=6e-4)
    assert float(row["AVG"]) == pytest.approx(
        np.mean([*codecs, figures["19LA"], figures["ITW"]]), abs=6e-4
    )
    (tmp_path / "m" / "C4_result.txt").unlink()
    row = next(
        csv.DictReader(
            io.StringIO(run_text(capsys, "--result_folder", tmp_path, "--format", "csv"))
        )
    )
    assert row["C4"] == row["CAVG"] == row["AVG"] == "" and row["C5"]


def test_csv_names_what_points_the_wrong_way(tmp_path, capsys):
    write_model(tmp_path / "right", eer=0.2)
    write_model(tmp_path / "wrong", eer=0.8)
    right, wrong = csv.DictReader(
        io.StringIO(run_text(capsys, "--result_folder", tmp_path, "--format", "csv"))
    )
    assert right["inverted"] == "" and set(wrong["inverted"].split()) == set(results.COLUMNS)
    assert wrong["C1"] == right["C1"]


def test_inverted_detectors_are_marked_and_explained(tmp_path, capsys):
    write_model(tmp_path / "m", eer=0.2)
    write_subset(tmp_path / "m", "C2_result.txt", eer=0.7, n=200)
    record = next(r for r in run_json(capsys, "--result_folder", tmp_path) if r["subset"] == "C2")
    text = run_text(capsys, "--result_folder", tmp_path, "--no_ci")
    assert f" {record['eer_paper_percent']:.3f}*" in text
    assert f"* m, C2: the EER is {record['eer_percent']:.3f} %" in text
    assert "inverted detectors count as 100 - EER" in text


def test_subsets_without_an_eer_leave_a_dash_and_a_reason(tmp_path, capsys):
    write_subset(tmp_path, "C1_result.txt")
    (tmp_path / "C2_result.txt").write_text("")
    (tmp_path / "A3_result.txt").write_text("v.wav 0.25 fake\n")
    records = {r["subset"]: r for r in run_json(capsys, "--result_folder", tmp_path)}
    for subset in ("C2", "A3"):
        assert (
            records[subset]["eer_percent"]
            is records[subset]["eer_paper_percent"]
            is records[subset]["threshold"]
            is None
        )
    assert "empty" in records["C2"]["note"] and "not distributed" in records["A3"]["note"]
    text = run_text(capsys, "--result_folder", tmp_path)
    header, row = (line.split() for line in text.splitlines()[1:3])
    cells = dict(zip(header, row, strict=True))
    assert cells["C2"] == cells["A3"] == cells["C7"] == cells["CAVG"] == "-" != cells["C1"]
    assert "C2: no EER: the score file is empty" in text
    assert (
        "A3: no EER: only fake trials (1), and an EER needs both classes; "
        "A3's real files are not distributed" in text
    )
    assert "no score file of 19LA, ITW, C3, C4, C5, C6, C7, A1, A2" in text


def test_trials_that_were_not_scored_are_counted_below_the_table(tmp_path, capsys):
    write_subset(tmp_path, "C1_result.txt")
    (tmp_path / "C1_missing.txt").write_text("a.wav absent\nb.wav absent\n")
    assert "C1: 2 trials have no score (see C1_missing.txt)" in run_text(
        capsys, "--result_folder", tmp_path, "--no_ci"
    )
    assert run_json(capsys, "--result_folder", tmp_path)[0]["n_missing"] == 2


def test_markdown_csv_and_latex_hold_the_same_figures(tmp_path, capsys):
    write_model(tmp_path / "a_model", eer=0.2)
    argv = ("--result_folder", tmp_path, "--no_ci", "--format")
    lines = run_text(capsys, *argv, "markdown").splitlines()
    markdown = [
        [cell.strip().replace("\\*", "") for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    rows = list(csv.reader(io.StringIO(run_text(capsys, *argv, "csv"))))
    latex = run_text(capsys, *argv, "latex")
    assert markdown[0] == rows[0] == ["model", *results.COLUMNS]
    assert markdown[2] == rows[1]
    assert r"a\_model & " + " & ".join(rows[1][1:]).replace("*", "") in latex.replace("*", "")
    assert (
        latex.count(r"\\") == 2 and r"\begin{tabular}{l" + "r" * len(results.COLUMNS) + "}" in latex
    )


def test_hostile_folder_names_do_not_drive_the_terminal_or_break_a_table(tmp_path, capsys):
    name = "m\x1b[31m|<b>&"
    write_subset(tmp_path / name, "C1_result.txt")
    for style in evaluate_score.FORMATS:
        assert "\x1b" not in run_text(
            capsys, "--result_folder", tmp_path, "--no_ci", "--format", style
        )
    markdown = run_text(capsys, "--result_folder", tmp_path, "--no_ci", "--format", "markdown")
    assert r"\|\<b>" in markdown


def test_csv_has_interval_ends_in_two_columns(codecfake, capsys):
    argv = (
        "--result_folder",
        codecfake / "result",
        "-d",
        codecfake / "Codecfake",
        "--by",
        "source",
    )
    row = next(csv.DictReader(io.StringIO(run_text(capsys, *argv, "--format", "csv"))))
    record = run_json(capsys, *argv)[0]["by_source"][0]
    assert [float(row["95 % low"]), float(row["95 % high"])] == pytest.approx(
        ends(record), abs=6e-4
    )


def test_csv_of_eers_does_not_resample(tmp_path, capsys, monkeypatch):
    write_model(tmp_path / "m")
    monkeypatch.setattr(bootstrap, "resample_eers", lambda *_: pytest.fail("resampled for nothing"))
    run_text(capsys, "--result_folder", tmp_path, "--format", "csv")


def test_json_holds_what_the_tables_show_and_names_its_units(tmp_path, capsys):
    write_model(tmp_path / "vocoder_mellcnn", eer=0.2)
    records = run_json(capsys, "--result_folder", tmp_path, "--metrics", "--paper")
    by_subset = {record["subset"]: record for record in records}
    for average in ("CAVG", "AVG"):
        record = by_subset[average]
        assert record["paper_percent"] == {"CAVG": 43.910, "AVG": 39.941}[average]
        assert {"eer_paper_percent", "interval_low_percent", "resampled_by"} <= set(record)
    text = run_text(capsys, "--result_folder", tmp_path, "--paper")
    assert "it cannot show that the two agree" in text

    def keys(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key, inner
                yield from keys(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from keys(inner)

    no_unit = {"threshold", "slope", "offset", "min_dcf", "act_dcf", "n_real", "p"}
    for key, value in keys(records):
        if isinstance(value, float):
            assert key.endswith(("_percent", "_bits")) or key in no_unit, key


def test_scores_at_the_end_of_the_floats_are_no_traceback(tmp_path, capsys):
    """The threshold below the lowest float is -inf, which JSON cannot hold."""
    lowest = -sys.float_info.max
    write_scores(_made(tmp_path, "C1"), list("ab"), [lowest, lowest], ["real", "fake"])
    (record,) = run_json(capsys, "--result_folder", tmp_path, "--no_ci", "--metrics")
    assert record["threshold"] is None and record["eer_percent"] == 50


# ── Plots ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "extension, start", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_det_plots_are_written_in_the_format_of_their_extension(tmp_path, capsys, extension, start):
    write_model(tmp_path / "m", names=("C1", "ITW"))
    run_text(
        capsys,
        "--result_folder",
        tmp_path / "m",
        "--no_ci",
        "--plot",
        tmp_path / f"det.{extension}",
    )
    assert (tmp_path / f"det.{extension}").read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["det.jpg", "det", "det.png.exe"])
def test_other_plot_formats_are_refused_before_anything_is_done(tmp_path, name):
    with pytest.raises(InputError, match=r"expected a plot file ending in \.png, \.pdf, \.svg"):
        evaluate_score.main(
            ["--result_folder", str(tmp_path / "absent"), "--plot", str(tmp_path / name)]
        )


def test_a_plot_of_nothing_but_one_class_is_an_empty_frame(tmp_path, capsys):
    (tmp_path / "A3_result.txt").write_text("v.wav 0.25 fake\n")
    run_text(capsys, "--result_folder", tmp_path, "--plot", tmp_path / "det.svg")
    assert (tmp_path / "det.svg").stat().st_size > 0


# ── Published scores ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "model, table, row",
    [
        ("vocoder_mellcnn", "III (trained on 19LA)", "Mel-LCNN"),
        ("cotrain_w2v2aasist_CSAM", "VIII (co-trained)", "W2V2-AASIST(CSAM)"),
    ],
)
def test_published_scores_give_the_papers_figures(capsys, model, table, row):
    if not (REFERENCE / "scores" / model).is_dir():
        pytest.skip(f"needs the published score files in {REFERENCE / 'scores'}")
    paper = json.loads((REFERENCE / "paper_tables.json").read_text())
    expected = dict(zip(paper["columns"], paper[table][row], strict=True))
    expected["ITW"] = expected.pop("IWA")
    records = run_json(capsys, "--result_folder", REFERENCE / "scores" / model, "--no_ci")
    compared = [r for r in records if r["subset"] in expected]
    assert len(compared) >= 8
    for record in compared:
        assert record["eer_paper_percent"] == pytest.approx(
            expected[record["subset"]], abs=0.001
        ), record["subset"]
    assert {r["subset"] for r in compared if r["inverted"]} == (
        {"ITW", "C5"} if model == "vocoder_mellcnn" else set()
    )


# ── What an EER is worth ─────────────────────────────────────────────────────────────────────────


def test_every_eer_has_its_interval_and_error_counts(tmp_path, capsys):
    path = write_subset(tmp_path, "C1_result.txt", eer=0.2, n=100)
    write_subset(tmp_path, "ITW_result.txt", eer=0.2, n=100)
    for record in run_json(capsys, "--result_folder", tmp_path):
        low, high = ends(record)
        assert 0 < low < record["eer_percent"] < high < 50
        assert record["eer_percent"] == 50 * (
            record["false_rejections"] / record["n_real"]
            + record["false_acceptances"] / record["n_fake"]
        )
        assert record["resampled_by"] == (
            "source utterance: speakers unknown, likely too narrow"
            if record["subset"] == "C1"
            else "trial: speakers unknown, likely too narrow; give the corpus with -d"
        )
    text = run_text(capsys, "--result_folder", tmp_path)
    assert (
        "source utterance: a real clip and its copies" in text and "1000 resamples, seed 0" in text
    )
    assert (
        run_text(capsys, "--result_folder", tmp_path, "--seed", 1)
        != text
        == run_text(capsys, "--result_folder", tmp_path)
    )
    assert (
        "interval_low_percent" not in run_json(capsys, "--result_folder", path.parent, "--no_ci")[0]
    )


def test_without_an_error_the_bound_is_the_rule_of_three(tmp_path, capsys):
    names = [f"t{i}" for i in range(400)]
    write_scores(tmp_path / "ITW_result.txt", names, range(400), ["fake"] * 300 + ["real"] * 100)
    (record,) = run_json(capsys, "--result_folder", tmp_path)
    assert (
        record["eer_percent"] == 0
        and ends(record) == [0, 3.0]
        and record["interval_by"] == "rule of three"
    )
    text = run_text(capsys, "--result_folder", tmp_path)
    assert "0.000 .. 3.000°" in text and "rule of three" in text


def test_compare_tells_real_differences_from_chance(tmp_path, capsys):
    for subset, worse in (("C1", 0.3), ("C2", 0.2)):
        write_subset(tmp_path / "a", f"{subset}_result.txt", eer=0.2, n=400, seed=1)
        write_subset(tmp_path / "b", f"{subset}_result.txt", eer=worse, n=400, seed=2)
    c1, c2 = run_json(capsys, "--result_folder", tmp_path, "--compare", "a", "b")
    assert (c1["verdict"], c2["verdict"]) == ("a is better", "not separable")
    assert ends(c1)[0] < c1["difference_percent"] < ends(c1)[1] < 0 < ends(c2)[1]
    assert c1["difference_percent"] == pytest.approx(c1["eer_a_percent"] - c1["eer_b_percent"])
    assert c1["p"] < 0.01 and c1["p_holm"] == 2 * c1["p"] and c2["p"] > 0.05
    text = run_text(capsys, "--compare", tmp_path / "a", tmp_path / "b")
    assert "a is better" in text and "paired bootstrap" in text


def test_compare_pairs_trials_by_name_whatever_their_order(tmp_path, capsys):
    path = write_subset(tmp_path / "a", "C1_result.txt", eer=0.2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "C1_result.txt").write_text(
        "\n".join(reversed(path.read_text().splitlines()))
    )
    (record,) = run_json(capsys, "--compare", tmp_path / "a", tmp_path / "b")
    assert record["difference_percent"] == 0 and ends(record) == [0, 0] and record["p"] == 1


def test_what_cannot_be_compared_is_named_and_the_rest_goes_on(tmp_path, capsys):
    for model in "ab":
        for subset in ("C1", "C2", "C3", "C4"):
            write_subset(tmp_path / model, f"{subset}_result.txt")
    write_subset(tmp_path / "b", "C2_result.txt", n=41)
    (tmp_path / "b" / "C3_result.txt").write_text("")
    path = tmp_path / "b" / "C4_result.txt"
    path.write_text(path.read_text().replace(" real", " fake", 1))
    text = run_text(capsys, "--result_folder", tmp_path, "--compare", "a", "b")
    assert "C2: not compared: different trials: 2 are in one file only (first: F01_u40" in text
    assert "C3: not compared: " in text and "C3_result.txt is empty" in text
    assert "disagree on which of 1 trial(s) are real (first: u0.wav)" in text
    assert [
        r["subset"] for r in run_json(capsys, "--result_folder", tmp_path, "--compare", "a", "b")
    ] == ["C1"]
    path.unlink()
    for subset in ("C1", "C2", "C3"):
        (tmp_path / "b" / f"{subset}_result.txt").write_text("")
    with pytest.raises(InputError, match="a and b cannot be compared on any subset"):
        evaluate_score.main(["--result_folder", str(tmp_path), "--compare", "a", "b"])
    with pytest.raises(InputError, match="nowhere: expected a folder of score files, a score file"):
        evaluate_score.main(["--result_folder", str(tmp_path), "--compare", "a", "nowhere"])


def test_all_pairs_share_one_holm_correction(tmp_path, capsys):
    for seed, model in enumerate("abc"):
        for subset in ("C1", "C2"):
            write_subset(tmp_path / model, f"{subset}_result.txt", eer=0.2 + 0.1 * seed, seed=seed)
    records = run_json(capsys, "--result_folder", tmp_path, "--compare", "a", "b", "c")
    pairs = [(r["model_a"], r["model_b"], r["subset"]) for r in records]
    assert pairs == [(x, y, s) for x, y in ("ab", "ac", "bc") for s in ("C1", "C2")]
    assert [r["p_holm"] for r in records] == bootstrap.holm([r["p"] for r in records])


def test_folders_of_one_name_are_told_apart_when_compared(tmp_path, capsys):
    for parent, eer in (("x", 0.1), ("y", 0.4)):
        write_subset(tmp_path / parent / "try", "C1_result.txt", eer=eer, n=300)
    a, b = tmp_path / "x" / "try", tmp_path / "y" / "try"
    (record,) = run_json(capsys, "--compare", a, b)
    assert record["verdict"] == f"{a} is better"
    with pytest.raises(InputError, match="the same model twice"):
        evaluate_score.main(["--compare", str(a), str(a)])


def test_too_few_resamples_for_the_number_of_tests_are_refused(tmp_path, capsys):
    for model, eer in (("a", 0.1), ("b", 0.5)):
        for k in range(1, 7):
            write_subset(tmp_path / model, f"C{k}_result.txt", eer=eer, n=100, seed=k)
    argv = ["--result_folder", str(tmp_path), "--compare", "a", "b", "--resamples"]
    with pytest.raises(InputError, match="with 200 resamples none of 6 tests .*--resamples 240"):
        evaluate_score.main([*argv, "200"])
    records = run_json(capsys, *argv, "240")
    assert {record["verdict"] for record in records} == {"a is better"}
    assert "< 0.009" in run_text(capsys, *argv, "240")  # 2 / 241, rounded up


def test_the_smallest_p_is_a_bound_and_others_are_figures(tmp_path, capsys):
    write_subset(tmp_path / "a", "C1_result.txt", eer=0.1, n=200)
    write_subset(tmp_path / "b", "C1_result.txt", eer=0.5, n=200, seed=1)
    assert "< 0.002" in run_text(capsys, "--result_folder", tmp_path, "--compare", "a", "b")
    write_subset(tmp_path / "b", "C1_result.txt", eer=0.11, n=200, seed=1)
    assert " <" not in run_text(capsys, "--result_folder", tmp_path, "--compare", "a", "b")


def test_a_few_errors_more_are_no_evidence(tmp_path, capsys):
    """B accepts four fakes more: a sign test of four clusters has p = 2 / 2^4 = 0.125."""
    names = [f"u{i}.wav" for i in range(300)] + [f"F01_u{i}.wav" for i in range(300)]
    words = ["real"] * 300 + ["fake"] * 300
    right = [float(1000 + i) for i in range(300)] + [float(i) for i in range(300)]
    wrong = list(right)
    for i in range(4):
        wrong[i], wrong[300 + i] = right[300 + i], right[i]
    write_scores(_made(tmp_path / "a", "C1"), names, right, words)
    write_scores(_made(tmp_path / "b", "C1"), names, wrong, words)
    (record,) = run_json(capsys, "--result_folder", tmp_path, "--compare", "a", "b")
    assert record["p"] >= 0.125 and record["verdict"] == "not separable"


def test_compare_draws_the_same_units_as_the_intervals(tmp_path, capsys):
    for model in "ab":
        names = [f"p{200 + i}_{k}.wav" for i in range(10) for k in range(8)]
        scores = np.random.default_rng(ord(model)).normal(size=80)
        write_scores(_made(tmp_path / model, "C1"), names, scores, ["real", "fake"] * 40)
    argv = ("--result_folder", tmp_path)
    assert {r["resampled_by"] for r in run_json(capsys, *argv)} == {"speaker"}
    (record,) = run_json(capsys, *argv, "--compare", "a", "b")
    assert record["resampled_by"] == "speaker"
    (record,) = run_json(capsys, *argv, "--compare", "a", "b", "--cluster_by", "trial")
    assert record["resampled_by"] == "trial"


# ── Units of intervals ───────────────────────────────────────────────────────────────────────────


def write_19la(folder: Path, attack_sd: float, seed: int = 0) -> tuple[Path, list[str]]:
    """A 19LA score file of 12 speakers and 6 attacks, and the rows of its protocol."""
    rng = np.random.default_rng(seed)
    effect = rng.normal(0, attack_sd, 6)
    rows, names, scores, words = [], [], [], []
    for i in range(12 * 60):
        speaker, attack = i % 12, (i // 12) % 12
        real = attack >= 6
        name = f"LA_E_{i:07d}"
        rows.append(
            f"LA_{speaker:04d} {name} - " + ("- bonafide" if real else f"A{attack + 7:02d} spoof")
        )
        names.append(name)
        scores.append(rng.normal() + (2.5 if real else effect[attack]))
        words.append("bonafide" if real else "spoof")
    write_scores(_made(folder, "19LA"), names, scores, words)
    return folder, rows


def test_19la_is_drawn_by_speaker_and_attack_and_is_wider_for_it(tmp_path, capsys):
    folder, rows = write_19la(tmp_path / "m", attack_sd=0.7)
    corpus = tmp_path / "LA" / "ASVspoof2019_LA_cm_protocols"
    corpus.mkdir(parents=True)
    (corpus / "ASVspoof2019.LA.cm.eval.trl.txt").write_text("\n".join(rows) + "\n")
    argv = ("--result_folder", folder, "-t", "19LA")
    (unknown,) = run_json(capsys, *argv)
    (both,) = run_json(capsys, *argv, "-d", tmp_path / "LA")
    (trial,) = run_json(capsys, *argv, "-d", tmp_path / "LA", "--cluster_by", "trial")
    assert unknown["resampled_by"].startswith("trial: speakers unknown, likely too narrow")
    assert (both["resampled_by"], trial["resampled_by"]) == ("speaker x attack", "trial")
    assert np.ptp(ends(both)) > 2 * np.ptp(ends(trial))
    # The same from a list of another form, and from what generate_score.py records.
    (tmp_path / "protocol.txt").write_text("\n".join(rows) + "\n")
    (listed,) = run_json(capsys, *argv, "--labels", tmp_path / "protocol.txt")
    assert ends(listed) == ends(both)
    trials = trial_lists.read_labels(tmp_path / "protocol.txt")
    score_files.write_trials(folder / "19LA_result.txt", trials)
    (recorded,) = run_json(capsys, *argv)
    assert ends(recorded) == ends(both) and recorded["resampled_by"] == "speaker x attack"


def test_clusters_of_a_file_are_drawn(tmp_path, capsys):
    path = write_subset(tmp_path / "m", "ITW_result.txt", eer=0.2)
    names = [line.split()[0] for line in path.read_text().splitlines()]
    clusters = tmp_path / "clusters.csv"
    rows = "".join(f"{name},{i % 8}\n" for i, name in enumerate(names))
    clusters.write_text("utt,cluster\n" + rows)
    argv = ("--result_folder", tmp_path / "m", "--cluster_by")
    assert run_json(capsys, *argv, clusters)[0]["resampled_by"] == "cluster"
    with pytest.raises(InputError, match="--cluster_by nonsense: expected speaker, utterance"):
        evaluate_score.main([*map(str, argv), "nonsense"])


@pytest.mark.parametrize(
    "real, fake, expected",
    [
        # 20 real, 200 fake. One fake accepted, no real rejected: up to 3 / 20 all the same.
        (range(1000, 1020), [*range(199), 5000], (None, 15.0)),
        # No error at all: the rule alone.
        (range(1000, 1020), range(200), (0.0, 15.0)),
        # All wrong: its mirror, not 100 .. 100.
        (range(20), range(1000, 1200), (85.0, 100.0)),
    ],
)
def test_what_resampling_cannot_know_the_rule_of_three_does(tmp_path, capsys, real, fake, expected):
    scores = [*map(float, real), *map(float, fake)]
    names = [f"t{i}" for i in range(220)]
    write_scores(_made(tmp_path, "ITW"), names, scores, ["real"] * 20 + ["fake"] * 200)
    (record,) = run_json(capsys, "--result_folder", tmp_path)
    low, high = ends(record)
    assert expected[0] is None or low == pytest.approx(expected[0])
    assert high == pytest.approx(expected[1]) and record["interval_by"] == "rule of three"


def test_the_rule_of_three_counts_clusters(tmp_path, capsys):
    """Seven copies of five sources without an error: 3 / 5, not 3 / 35."""
    names = [f"r{i}.wav" for i in range(100)]
    names += [f"F0{k}_s{i}.wav" for k in range(1, 8) for i in range(5)]
    scores = [float(1000 + i) for i in range(100)] + [float(i) for i in range(35)]
    write_scores(_made(tmp_path, "C1"), names, scores, ["real"] * 100 + ["fake"] * 35)
    (record,) = run_json(capsys, "--result_folder", tmp_path)
    assert ends(record) == pytest.approx([0, 60])
    (record,) = run_json(capsys, "--result_folder", tmp_path, "--cluster_by", "trial")
    assert ends(record) == pytest.approx([0, 300 / 35])


def test_an_eer_without_equal_rates_says_so(tmp_path, capsys):
    # Saturated: 4 of 10 fakes have the score of all reals. FRR 0 with FAR 40 %, or FRR 100 %.
    scores = [1.0] * 10 + [1.0] * 4 + [0.0] * 6
    names = [f"t{i}" for i in range(20)]
    write_scores(_made(tmp_path, "ITW"), names, scores, ["real"] * 10 + ["fake"] * 10)
    (record,) = run_json(capsys, "--result_folder", tmp_path)
    assert record["unequal_rates"] == "no threshold with equal rates: FRR 0 %, FAR 40 %"
    text = run_text(capsys, "--result_folder", tmp_path)
    assert "no threshold with equal rates: FRR 0 %, FAR 40 %" in text
    write_subset(tmp_path, "ITW_result.txt")
    assert "unequal_rates" not in run_json(capsys, "--result_folder", tmp_path)[0]


# ── Averages ─────────────────────────────────────────────────────────────────────────────────────


def test_averages_have_intervals_and_a_pooled_eer(tmp_path, capsys):
    write_model(tmp_path / "m", eer=0.2, n=60)
    records = {r["subset"]: r for r in run_json(capsys, "--result_folder", tmp_path)}
    cavg = records["CAVG"]
    parts = [records[f"C{i}"] for i in range(1, 8)]
    mean = np.mean([part["eer_paper_percent"] for part in parts])
    assert cavg["eer_paper_percent"] == pytest.approx(mean)
    low, high = ends(cavg)
    width = np.mean([np.ptp(ends(part)) for part in parts])
    assert low < mean < high and width / np.sqrt(7) * 0.8 < high - low < width
    text = run_text(capsys, "--result_folder", tmp_path)
    assert "CAVG pooled" in text and "their subsets drawn together" in text
    real, fake = [], []
    for i in range(1, 8):
        trials = read_scores(tmp_path / "m" / f"C{i}_result.txt")
        real, fake = [*real, *trials.real], [*fake, *trials.fake]
    assert cavg["pooled_eer_percent"] == pytest.approx(100 * compute_eer(real, fake)[0])


def test_subsets_of_equal_scores_average_no_narrower_than_each(tmp_path, capsys):
    """The same file seven times: drawn together the mean varies as one does, not by 1 / sqrt(7)."""
    for i in range(1, 8):
        write_subset(tmp_path / "m", f"C{i}_result.txt", eer=0.2, seed=3)
    records = {r["subset"]: r for r in run_json(capsys, "--result_folder", tmp_path)}
    assert ends(records["CAVG"]) == pytest.approx(ends(records["C1"]), abs=1e-6)


def test_an_average_of_parts_without_error_reaches_up_to_their_rule_of_three(tmp_path, capsys):
    names = [f"u{i}.wav" for i in range(50)] + [f"F01_u{i}.wav" for i in range(50)]
    for i in range(1, 8):
        write_scores(
            _made(tmp_path / "m", f"C{i}"),
            names,
            [1.0] * 50 + [0.0] * 50,
            ["real"] * 50 + ["fake"] * 50,
        )
    records = {r["subset"]: r for r in run_json(capsys, "--result_folder", tmp_path)}
    assert ends(records["CAVG"]) == pytest.approx([0, 6.0])  # 3 / 50, all seven from 50 sources
    # 19LA and In-the-Wild share nobody with them: sqrt((7 x 6)^2 + 6^2 + 6^2) / 9.
    for subset in ("19LA", "ITW"):
        scores = [1.0] * 50 + [0.0] * 50
        write_scores(_made(tmp_path / "m", subset), names, scores, ["real"] * 50 + ["fake"] * 50)
    records = {r["subset"]: r for r in run_json(capsys, "--result_folder", tmp_path)}
    assert ends(records["AVG"]) == pytest.approx([0, np.sqrt(42**2 + 2 * 6**2) / 9])


# ── Anyone's scores ──────────────────────────────────────────────────────────────────────────────


def test_any_file_is_evaluated_with_labels_from_a_list(tmp_path, capsys):
    (tmp_path / "theirs.log").write_text("d/a.wav 4\nd/b.wav 1\nd/c.wav 2\nd/e.wav 0\nd/x.wav 9\n")
    (tmp_path / "list.csv").write_text(
        "utt,label,speaker\na,real,s1\nb,fake,s1\nc,real,s2\ne,fake,s2\nf,fake,s3\n"
    )
    argv = ["--scores", tmp_path / "theirs.log", "--labels", tmp_path / "list.csv"]
    (record,) = run_json(capsys, *argv, "--name", "theirs (v2)")
    assert (record["model"], record["subset"]) == ("theirs (v2)", "scores")
    assert (record["eer_percent"], record["n_real"], record["n_fake"]) == (0, 2, 2)
    assert record["resampled_by"] == "speaker"
    remarks = " ".join(record["remarks"])
    assert "4 names differ from the list's only by folder, extension" in remarks
    assert "1 trials have no label and are left out" in remarks
    evaluate_score.main([*map(str, argv), "--no_ci"])
    err = capsys.readouterr().err
    assert "1 missing (in the protocol, not scored): f" in err
    assert "1 extra (scored, not in the protocol): d/x.wav" in err
    with pytest.raises(InputError, match=r"2 mismatch\(es\)"):
        evaluate_score.main([*map(str, argv), "--no_ci", "--strict"])


def test_scores_without_labels_say_where_to_get_them(tmp_path):
    (tmp_path / "s.txt").write_text("a 1\nb 2\n")
    with pytest.raises(
        InputError, match="has no labels; give them with -d CORPUS or --labels FILE"
    ):
        evaluate_score.main(["--scores", str(tmp_path / "s.txt")])


def test_scores_of_19la_with_the_attack_behind_the_name_join_the_corpus(tmp_path, capsys):
    folder, rows = write_19la(tmp_path / "m", attack_sd=0.7)
    corpus = tmp_path / "LA" / "ASVspoof2019_LA_cm_protocols"
    corpus.mkdir(parents=True)
    (corpus / "ASVspoof2019.LA.cm.eval.trl.txt").write_text("\n".join(rows) + "\n")
    trials = read_scores(folder / "19LA_result.txt")
    attack = {row.split()[1]: row.split()[3] for row in rows}
    theirs = tmp_path / "eval_scores.txt"
    theirs.write_text(
        "".join(
            f"{n}_{attack[n]} {s!r}\n"
            for n, s in zip(trials.names, trials.scores.tolist(), strict=True)
        )
    )
    argv = ("-t", "19LA", "-d", tmp_path / "LA", "--no_ci")
    (ours,) = run_json(capsys, "--result_folder", folder, *argv)
    (joined,) = run_json(capsys, "--scores", theirs, *argv)
    assert joined["eer_percent"] == ours["eer_percent"] and joined["n_fake"] == 360


def test_polarity_is_never_guessed(tmp_path, capsys):
    path = write_subset(tmp_path / "m", "C1_result.txt", eer=0.8, n=100)
    other = tmp_path / "their scores.txt"
    other.write_text(path.read_text())
    (record,) = run_json(capsys, "--scores", other, "--no_ci")
    assert record["eer_percent"] > 50
    text = run_text(capsys, "--scores", other, "--no_ci")
    assert f"{record['eer_percent']:.3f}*" in text and "--negate turns them round" in text
    (turned,) = run_json(capsys, "--scores", other, "--no_ci", "--negate")
    assert turned["eer_percent"] == pytest.approx(100 - record["eer_percent"])


def test_files_of_two_systems_stand_in_one_table_and_can_be_compared(tmp_path, capsys):
    for name, eer in (("one.txt", 0.1), ("two.txt", 0.4)):
        write_subset(tmp_path, name, eer=eer, n=200)
    files = (tmp_path / "one.txt", tmp_path / "two.txt")
    lines = run_text(capsys, "--scores", *files, "--no_ci").splitlines()
    assert lines[1].split() == ["model", "scores"]
    assert [line.split()[0] for line in lines[2:4]] == ["one", "two"]
    (record,) = run_json(capsys, "--compare", *files)
    assert record["verdict"] == "one is better"


# ── Metrics, calibration, thresholds ─────────────────────────────────────────────────────────────


def test_probabilities_become_log_odds_and_saturated_ones_are_counted(tmp_path, capsys):
    llrs = np.array([-3.0, 40.0, 2.0, 5.0, -5.0, -2.0, 1.0])
    names, words = list("abcdefg"), ["real"] * 4 + ["fake"] * 3
    (tmp_path / "llr").mkdir(), (tmp_path / "p").mkdir()
    write_scores(tmp_path / "llr" / "C1_result.txt", names, llrs, words)
    write_scores(tmp_path / "p" / "C1_result.txt", names, 1 / (1 + np.exp(-llrs)), words)
    from_llr, from_p = run_json(capsys, "--result_folder", tmp_path, "--metrics")
    assert (from_llr["scores_are"], from_p["scores_are"]) == (
        "log-likelihood ratios",
        "probabilities",
    )
    assert (from_llr["n_saturated"], from_p["n_saturated"]) == (0, 1)
    for metric in ("auc_percent", "min_dcf", "act_dcf", "cllr_bits"):
        assert from_p[metric] == pytest.approx(from_llr[metric], abs=1e-7), metric
    text = run_text(capsys, "--result_folder", tmp_path, "--metrics")
    assert "p: WARNING: scores of exactly 0 or 1, rounded by softmax: C1 1;" in text
    assert "llr: the scores are taken for log-likelihood ratios" in text


def test_calibration_mends_the_costs_and_leaves_what_only_ranks(tmp_path, capsys):
    rng = np.random.default_rng(0)
    names, words = [f"t{i}" for i in range(2000)], ["real"] * 1000 + ["fake"] * 1000
    for file in (
        "ITW_result.txt",
        "dev_result.txt",
    ):  # LLRs of N(2, 4) against N(-2, 4), spoilt: x 3, + 7
        llrs = rng.normal(np.repeat([2, -2], 1000), 2)
        write_scores(tmp_path / file, names, 3 * llrs + 7, words)
    (record,) = run_json(capsys, "--result_folder", tmp_path, "--calibrate", "dev_result.txt")
    fit = record["calibrated"]
    assert fit["slope"] == pytest.approx(1 / 3, rel=0.1) and fit["offset"] == pytest.approx(
        -7 / 3, rel=0.1
    )
    assert fit["cllr_bits"] < 0.6 * record["cllr_bits"] and fit["act_dcf"] < 0.7 * record["act_dcf"]
    assert record["min_dcf"] <= fit["act_dcf"] < 1.1 * record["min_dcf"]


def test_a_threshold_from_development_scores_gives_accuracy_and_error_rates(tmp_path, capsys):
    write_scores(
        tmp_path / "dev.txt", list("abcd"), [1, 3, 0, 2], ["real", "real", "fake", "fake"]
    )  # EER threshold: 1
    write_scores(
        tmp_path / "C1_result.txt", list("abcde"), [2, 1, 5, 0, 1.5], ["real"] * 3 + ["fake"] * 2
    )
    (record,) = run_json(
        capsys, "--result_folder", tmp_path, "--threshold_from", tmp_path / "dev.txt"
    )
    # Called fake: one real of three, one fake of two.
    assert record["decisions"] == pytest.approx(
        {
            "threshold": 1,
            "accuracy_percent": 60,
            "frr_percent": 100 / 3,
            "far_percent": 50,
            "precision_percent": 50,
            "recall_percent": 50,
            "f1_percent": 50,
            "on_itself": False,
        }
    )


def test_the_calibrations_note_says_what_it_multiplies(tmp_path, capsys):
    rng = np.random.default_rng(0)
    names, words = [f"t{i}" for i in range(400)], ["real"] * 200 + ["fake"] * 200
    llrs = rng.normal(np.repeat([2, -2], 200), 2)
    for model, scores in (("llr", llrs), ("p", 1 / (1 + np.exp(-llrs)))):
        for file in ("ITW", "dev"):
            write_scores(_made(tmp_path / model, file), names, scores, words)
    argv = ("--result_folder", tmp_path, "--no_ci", "--calibrate", "dev_result.txt")
    text = run_text(capsys, *argv)
    assert re.search(r"p: cal\.: .*dev_result\.txt: LLR = \S+ x log odds ", text)
    assert re.search(r"llr: cal\.: .*dev_result\.txt: LLR = \S+ x score ", text)
    by_llr, by_p = run_json(capsys, *argv)
    for key in ("slope", "offset", "cllr_bits"):
        assert by_p["calibrated"][key] == pytest.approx(by_llr["calibrated"][key], abs=1e-6)


def test_separated_development_data_are_named(tmp_path, capsys):
    write_subset(tmp_path, "ITW_result.txt")
    write_scores(
        _made(tmp_path, "dev"), list("abcd"), [3, 4, -1, -2], ["real", "real", "fake", "fake"]
    )
    text = run_text(capsys, "--result_folder", tmp_path, "--no_ci", "--calibrate", "dev_result.txt")
    assert "WARNING: a threshold separates the classes of" in text


def test_what_is_judged_on_itself_is_marked(tmp_path, capsys):
    for file in ("C1", "C2"):
        write_subset(tmp_path, f"{file}_result.txt", eer=0.2)
    argv = ("--result_folder", tmp_path, "--no_ci", "--calibrate", "C1_result.txt")
    argv += ("--threshold_from", "C1_result.txt")
    c1, c2 = run_json(capsys, *argv)
    assert c1["calibrated"]["on_itself"] and c1["decisions"]["on_itself"]
    assert not c2["calibrated"]["on_itself"] and not c2["decisions"]["on_itself"]
    text = run_text(capsys, *argv)
    assert "† calibrated on the very trials: optimistic" in text
    assert "† decided at the very trials' EER threshold: optimistic" in text


def test_each_file_of_a_mixed_folder_is_treated_as_what_it_is(tmp_path, capsys):
    llrs = np.array([3.0, 2.0, 5.0, -0.2, -5.0, -2.0, 0.4, -3.0])
    names, words = list("abcdefgh"), ["real"] * 4 + ["fake"] * 4
    probabilities = 1 / (1 + np.exp(-llrs))
    write_scores(_made(tmp_path, "C1"), names, llrs, words)
    write_scores(_made(tmp_path, "C2"), names, probabilities, words)
    # Logit differences that all happen to lie in [0, 1]: only provenance.json can tell.
    write_scores(_made(tmp_path, "C3"), names, probabilities, words)
    (tmp_path / "provenance.json").write_text(
        json.dumps({"made_of": {"C3_result.txt": "logit differences of the weights 0123"}})
    )
    c1, c2, c3 = run_json(capsys, "--result_folder", tmp_path, "--no_ci", "--metrics")
    kinds = [record["scores_are"] for record in (c1, c2, c3)]
    assert kinds == ["log-likelihood ratios", "probabilities", "log-likelihood ratios"]
    assert c1["cllr_bits"] == pytest.approx(c2["cllr_bits"], abs=1e-9)
    assert c3["cllr_bits"] == pytest.approx(
        compute_cllr(probabilities[:4], probabilities[4:]), abs=1e-12
    )
    text = run_text(capsys, "--result_folder", tmp_path, "--no_ci", "--metrics")
    assert "the scores of C2 are taken for probabilities" in text


@pytest.mark.parametrize(
    "threshold, expected",
    [
        (None, (75, 25, 25, 75, 75, 75)),  # at 0.5: one of four wrong on either side
        (0.85, (62.5, 75, 0, 100 * 4 / 7, 100, 100 * 8 / 11)),
    ],
)
def test_accuracy_precision_recall_and_f1_by_hand(tmp_path, capsys, threshold, expected):
    scores = [0.9, 0.8, 0.7, 0.4, 0.6, 0.3, 0.2, 0.1]
    write_scores(_made(tmp_path, "C1"), list("abcdefgh"), scores, ["real"] * 4 + ["fake"] * 4)
    option = ["--metrics"] if threshold is None else ["--threshold", threshold]
    (record,) = run_json(capsys, "--result_folder", tmp_path, "--no_ci", *option)
    keys = ("accuracy", "frr", "far", "precision", "recall", "f1")
    assert [record["decisions"][f"{key}_percent"] for key in keys] == pytest.approx(expected)


def test_a_development_file_belongs_to_one_model(tmp_path):
    for model in "ab":
        write_subset(tmp_path / model, "C1_result.txt")
    dev = write_subset(tmp_path / "elsewhere", "dev.txt")
    with pytest.raises(
        InputError, match="belong to one model: with 2 models, put such a file into each"
    ):
        evaluate_score.main(["--result_folder", str(tmp_path), "--calibrate", "missing.txt"])
    dev.write_text("a 0.5 real\n")
    with pytest.raises(InputError, match="both classes, got 1 real and 0 fake"):
        evaluate_score.main(["--result_folder", str(tmp_path / "a"), "--calibrate", str(dev)])


def test_tdcf_is_named_legacy_and_given_for_19la_only(tmp_path, capsys):
    for file in ("19LA_result.txt", "C1_result.txt"):
        write_subset(tmp_path, file)
    (tmp_path / "asv").write_text(
        "".join(
            f"- {key} {score}\n"
            for key, score in [
                ("target", 2),
                ("target", 3),
                ("nontarget", -1),
                ("nontarget", 0),
                ("spoof", 2),
                ("spoof", 1),
            ]
        )
    )
    records = {
        r["subset"]: r
        for r in run_json(capsys, "--result_folder", tmp_path, "--asv_scores", tmp_path / "asv")
    }
    assert (
        0 < records["19LA"]["min_tdcf_2019_legacy"] <= 1
        and "min_tdcf_2019_legacy" not in records["C1"]
    )
    assert "min t-DCF (legacy 2019)" in run_text(
        capsys, "--result_folder", tmp_path, "--asv_scores", tmp_path / "asv"
    )


# ── The paper's figures ──────────────────────────────────────────────────────────────────────────


def test_the_papers_tables_are_those_of_the_reference():
    if not (REFERENCE / "paper_tables.json").is_file():
        pytest.skip(f"needs {REFERENCE / 'paper_tables.json'}")
    paper = json.loads((REFERENCE / "paper_tables.json").read_text())
    columns = [{"IWA": "ITW"}.get(column, column) for column in paper["columns"]]
    expected = {
        (key.split()[0], row): dict(zip(columns, values, strict=True))
        for key, rows in paper.items()
        if "(" in key
        for row, values in rows.items()
    }
    assert comparisons.published() == expected


@pytest.mark.parametrize(
    "errors, verdict",
    [(2, "equal"), (3, "inside the interval"), (60, "differs: outside the interval")],
)
def test_the_paper_stands_beside_ours_with_a_verdict(tmp_path, capsys, errors, verdict):
    n = 25_000  # 2 errors in 25,000: 0.008 %, as in the paper
    real, fake = np.arange(n) + n - 2 * errors, np.arange(n) + 0.5
    write_scores(
        tmp_path / "C1_result.txt",
        [f"t{i}" for i in range(2 * n)],
        [*real, *fake],
        ["real"] * n + ["fake"] * n,
    )
    argv = ("--result_folder", tmp_path, "--paper", "VIII:W2V2-AASIST(SAM)")
    (record,) = run_json(capsys, *argv)
    assert (record["paper_percent"], record["paper_row"], record["paper_verdict"]) == (
        0.008,
        "VIII:W2V2-AASIST(SAM)",
        verdict,
    )
    assert verdict in run_text(capsys, *argv)


def test_known_faults_of_the_paper_are_marked(tmp_path, capsys):
    write_subset(tmp_path / "codec_w2v2aasist", "C1_result.txt", eer=0.3)
    write_subset(tmp_path / "vocoder_mellcnn", "ITW_result.txt", eer=0.53, n=300)
    text = run_text(capsys, "--result_folder", tmp_path, "--paper")
    assert "the paper's own score file gives 0.008" in text
    assert "the paper's detector is inverted (EER 52.979)" in text


def test_a_model_without_a_published_row_is_told_which_there_are(tmp_path):
    write_subset(tmp_path / "mine", "C1_result.txt")
    for argv, message in (
        (["--paper"], "a model named 'mine'"),
        (["--paper", "IX:X"], "called 'IX:X'"),
    ):
        with pytest.raises(
            InputError,
            match=message + r"; give --paper one of III:Mel-LCNN, .*VIII:W2V2-AASIST\(CSAM\)",
        ):
            evaluate_score.main(["--result_folder", str(tmp_path), *argv])


# ── Against the corpus ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def codecfake(tmp_path) -> Path:
    """Protocols of C1 (trailing blanks as released) and C7 (two codecs), and their scores."""
    label = tmp_path / "Codecfake" / "label"
    label.mkdir(parents=True)
    (label / "C1.txt").write_text(
        "".join(f"u{i}.wav real 0\nF01_u{i}.wav fake 1 \n" for i in range(40))
    )
    (label / "C7.txt").write_text(
        "".join(f"u{i}.wav real 0\nF01_u{i}.wav fake {6 + i % 2}\n" for i in range(40))
    )
    for subset in ("C1", "C7"):
        write_subset(tmp_path / "result", f"{subset}_result.txt", eer=0.2)
    return tmp_path


def test_matching_score_files_pass_the_strict_check(codecfake, capsys):
    evaluate_score.main(
        [
            "--result_folder",
            str(codecfake / "result"),
            "--strict",
            "-d",
            str(codecfake / "Codecfake"),
            "--no_ci",
        ]
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("u0.wav 0.", "v0.wav 0.", "1 missing (in the protocol, not scored): u0.wav"),
        ("u0.wav 0.", "v0.wav 0.", "1 extra (scored, not in the protocol): v0.wav"),
        (" real", " fake", "40 wrong label: u0.wav, u1.wav, u2.wav, .."),
    ],
)
def test_mismatches_are_counted_and_named_and_strict_refuses_them(
    codecfake, capsys, old, new, problem
):
    path = codecfake / "result" / "C1_result.txt"
    path.write_text(path.read_text().replace(old, new, 1 if "u0" in old else -1))
    argv = [
        "--result_folder",
        str(codecfake / "result"),
        "-d",
        str(codecfake / "Codecfake"),
        "--no_ci",
    ]
    evaluate_score.main(argv)
    assert f"warning: {path}: {problem}\n" in capsys.readouterr().err
    with pytest.raises(
        InputError, match=r"mismatch\(es\) between the score files and the protocols"
    ):
        evaluate_score.main([*argv, "--strict"])
    assert f"mismatch: {path}: {problem}\n" in capsys.readouterr().err


def test_strict_counts_duplicated_and_non_finite_scores_too(codecfake, capsys):
    path = codecfake / "result" / "C7_result.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0], lines[1].split()[0] + " nan real"]) + "\n")
    with pytest.raises(InputError):
        evaluate_score.main(
            [
                "--result_folder",
                str(codecfake / "result"),
                "-d",
                str(codecfake / "Codecfake"),
                "--strict",
            ]
        )
    err = capsys.readouterr().err
    assert "2 duplicated: u0.wav, u1.wav" in err and "1 non-finite: u1.wav" in err


def test_by_source_gives_each_codec_its_row_with_pooled_real(codecfake, capsys):
    argv = (
        "--result_folder",
        codecfake / "result",
        "-d",
        codecfake / "Codecfake",
        "--by",
        "source",
    )
    c1, c7 = run_json(capsys, *argv)
    assert [(part["source"], part["n_real"], part["n_fake"]) for part in c1["by_source"]] == [
        ("F01", 40, 40),
        ("all", 40, 40),
    ]
    assert [(part["source"], part["n_real"], part["n_fake"]) for part in c7["by_source"]] == [
        ("F06", 40, 20),
        ("F07", 40, 20),
        ("all", 40, 40),
    ]
    assert c1["by_source"][0]["eer_percent"] == c1["eer_percent"] and ends(
        c1["by_source"][0]
    ) == ends(c1)
    text = run_text(capsys, *argv)
    assert "EER by source" in text and "F06" in text


def test_by_source_has_marks_notes_metrics_and_all_sources_together(codecfake, capsys):
    path = codecfake / "result" / "C7_result.txt"
    rows = [line.split() for line in path.read_text().splitlines()]
    scores = [1.5 if row[0] in ("F01_u1.wav", "F01_u3.wav") else float(row[1]) for row in rows]
    # Codec F07's fakes outscore every real clip.
    scores = [
        2.0 + i if int(row[0].split("u")[1][:-4]) % 2 and row[2] == "fake" else score
        for i, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]
    write_scores(path, [row[0] for row in rows], scores, [row[2] for row in rows])
    argv = (
        "--result_folder",
        codecfake / "result",
        "-d",
        codecfake / "Codecfake",
        "--by",
        "source",
    )
    text = run_text(capsys, *argv, "--metrics")
    assert "100.000*" in text and "C7, F07: the scores point the wrong way" in text
    assert "resampled by" in text and "°" in text
    c7 = next(r for r in run_json(capsys, *argv, "--metrics") if r["subset"] == "C7")
    whole = c7["by_source"][-1]
    assert whole["source"] == "all" and whole["eer_percent"] == c7["eer_percent"]
    assert {"auc_percent", "min_dcf", "act_dcf", "cllr_bits"} <= set(c7["by_source"][0])


def test_by_source_needs_sources(tmp_path):
    write_subset(tmp_path, "C1_result.txt")
    with pytest.raises(InputError, match="no codec or attack of these trials is known"):
        evaluate_score.main(["--result_folder", str(tmp_path), "--by", "source"])


def test_by_source_works_on_19la_and_its_attacks(tmp_path, capsys):
    protocols = tmp_path / "LA" / "ASVspoof2019_LA_cm_protocols"
    protocols.mkdir(parents=True)
    rows = [f"LA_0001 LA_E_{i} - - bonafide" for i in range(20)] + [
        f"LA_0002 LA_E_{i} - A{7 + i % 3:02d} spoof" for i in range(20, 50)
    ]
    (protocols / "ASVspoof2019.LA.cm.eval.trl.txt").write_text("\n".join(rows) + "\n")
    rng = np.random.default_rng(0)
    (tmp_path / "result").mkdir()
    write_scores(
        tmp_path / "result" / "19LA_result.txt",
        [row.split()[1] for row in rows],
        rng.uniform(size=50),
        [row.split()[4] for row in rows],
    )
    (record,) = run_json(
        capsys,
        "--result_folder",
        tmp_path / "result",
        "-t",
        "19LA",
        "-d",
        tmp_path / "LA",
        "--by",
        "source",
        "--strict",
    )
    assert [part["source"] for part in record["by_source"]] == ["A07", "A08", "A09", "all"]
    assert {part["n_real"] for part in record["by_source"]} == {20}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--strict"], "--strict needs -d or --labels"),
        (["-d", "x", "--labels", "y"], "-d and --labels exclude each other"),
        (["--threshold", "1", "--threshold_from", "x"], "exclude each other"),
        (["--no_ci", "--resamples", "50"], "exclude each other"),
        (["--no_ci", "--seed", "1"], "exclude each other"),
        (["--no_ci", "--cluster_by", "trial"], "exclude each other"),
        (["--name", "x"], "--name needs --scores"),
        (["--scores", "a", "b", "--name", "x"], "expected 2 names, one a file"),
        (["--plot_kind", "eer"], "--plot_kind needs --plot"),
        (["--width", "8.5"], "--width needs --plot"),
        (["--subset", "C1"], "--subset needs --plot"),
        (["--subset", "C1", "--plot", "x.png", "--plot_kind", "eer"], "--subset draws DET curves"),
        (["--plot", "x.png", "--width", "1"], "expected 5 to 60 centimetres, got '1'"),
        (["--columns", "colour=red"], "expected KIND=NAME with KIND one of name, score"),
        (["--compare", "a"], "needs two models at least"),
        (["--compare", "a", "b", "--metrics"], "--metrics has to be asked for without it"),
        (["--compare", "a", "b", "--no_ci"], "--no_ci has to be asked for without it"),
        (["--compare", "a", "b", "--export_arena", "x"], "--export_arena has to be asked for"),
        (["--compare", "a", "b", "--plot", "x.png"], "--compare prints its table only"),
        (["--format", "csv", "--metrics", "--paper"], "csv prints one table"),
        (["--resamples", "0"], "expected a whole number of at least 2, got '0'"),
        (["-t", "co-train"], "invalid choice"),
    ],
)
def test_options_that_contradict_each_other_are_refused_by_the_parser(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate_score.main(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err


# ── Files to write ───────────────────────────────────────────────────────────────────────────────


def official_act_dcf(real, fake):
    """ASVspoof 5's evaluation plan, section 5: cost at the Bayes threshold of LLRs, normalised."""
    p_spoof, c_miss, c_fa = 0.05, 1, 10
    threshold = -math.log(c_miss * (1 - p_spoof) / (c_fa * p_spoof))
    miss = sum(s < threshold for s in real) / len(real)
    fa = sum(s >= threshold for s in fake) / len(fake)
    return (c_miss * (1 - p_spoof) * miss + c_fa * p_spoof * fa) / min(
        c_miss * (1 - p_spoof), c_fa * p_spoof
    )


@pytest.mark.parametrize("llr", [False, True])
def test_the_asvspoof5_export_holds_llrs_that_give_our_act_dcf(tmp_path, capsys, llr):
    path = write_subset(tmp_path / "m", "C1_result.txt", n=200)
    if llr:
        rows = [line.split() for line in path.read_text().splitlines()]
        llrs = [8 * float(score) - 4 for _, score, _ in rows]
        write_scores(path, [row[0] for row in rows], llrs, [row[2] for row in rows])
    argv = ["--result_folder", tmp_path / "m", "--no_ci", "--metrics"]
    evaluate_score.main([*map(str, argv), "--export_asvspoof5", str(tmp_path / "out")])
    said = "as they are" if llr else "log odds of the score file's probabilities"
    assert said in capsys.readouterr().err
    (record,) = run_json(capsys, *argv)
    lines = (tmp_path / "out" / "m_C1.tsv").read_text().splitlines()
    assert lines[0] == "filename\tcm-score"
    scores = {name: float(score) for name, score in (line.split("\t") for line in lines[1:])}
    real = [score for name, score in scores.items() if not name.startswith("F")]
    fake = [score for name, score in scores.items() if name.startswith("F")]
    assert 0 < record["act_dcf"] < 1
    assert official_act_dcf(real, fake) == pytest.approx(record["act_dcf"], abs=1e-12)


def arena_rule(real, fake):
    """Rates at score >= threshold, linear interpolation where FRR - FAR first changes sign."""
    thresholds = [*sorted({*real, *fake}), math.inf]
    points = [
        (sum(s < t for s in real) / len(real), sum(s >= t for s in fake) / len(fake))
        for t in thresholds
    ]
    for before, after in zip([None, *points], points, strict=False):
        gap = after[0] - after[1]
        if abs(gap) <= 1e-6:
            return (after[0] + after[1]) / 2
        if gap > 0:
            part = (before[1] - before[0]) / ((before[1] - before[0]) + gap)
            return before[0] + part * (after[0] - before[0])
    raise AssertionError


def test_the_arena_export_has_its_rule_and_no_ties_from_rounding(tmp_path, capsys):
    names = list("abcdefgh")
    # Two saturating probabilities that differ by less than 1e-6, as the Arena prints scores.
    scores = [0.9999999, 0.9999998, 0.3, 0.8, 0.99999985, 0.2, 0.1, 0.05]
    write_scores(_made(tmp_path / "m", "C1"), names, scores, ["real"] * 4 + ["fake"] * 4)
    out = tmp_path / "out"
    run_text(capsys, "--result_folder", tmp_path / "m", "--no_ci", "--export_arena", out)
    rows = [line.split() for line in (out / "scores.txt").read_text().splitlines()]
    written = {name: float(score) for name, score in rows}
    assert list(written) == names and len(set(map("{:.6f}".format, written.values()))) == 8
    text = (out / "result.yaml").read_text()
    fields = dict(line.strip().split(": ", 1) for line in text.splitlines() if ": " in line)
    expected = 100 * arena_rule([written[n] for n in "abcd"], [written[n] for n in "efgh"])
    assert float(fields["eer_percent"]) == pytest.approx(expected, abs=1e-9)
    assert (fields["n_trials"], fields["n_skipped"]) == ("8", "0")
    digest = hashlib.sha256((out / "scores.txt").read_bytes()).hexdigest()
    assert fields["scores_sha256"] == digest


def _made(folder: Path, subset: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{subset}_result.txt"


@pytest.mark.parametrize("kind", ["asvspoof5", "arena"])
def test_our_exports_read_back_with_labels(tmp_path, capsys, kind):
    path = write_subset(tmp_path / "m", "C1_result.txt", eer=0.2)
    (before,) = run_json(capsys, "--result_folder", tmp_path / "m", "--no_ci")
    out = tmp_path / "out"
    run_text(capsys, "--result_folder", tmp_path / "m", "--no_ci", f"--export_{kind}", out)
    labels = tmp_path / "labels.csv"
    rows = [line.split() for line in path.read_text().splitlines()]
    labels.write_text("utt,label\n" + "".join(f"{row[0]},{row[2]}\n" for row in rows))
    file = out / ("m_C1.tsv" if kind == "asvspoof5" else "scores.txt")
    (after,) = run_json(capsys, "--scores", file, "--labels", labels, "--no_ci")
    assert after["eer_percent"] == before["eer_percent"]
    assert (after["n_real"], after["n_fake"]) == (40, 40)


def test_det_points_hold_every_threshold_with_both_rates(tmp_path, capsys):
    write_scores(_made(tmp_path, "C1"), list("abcd"), [1, 3, 0, 2], ["real"] * 2 + ["fake"] * 2)
    out = tmp_path / "det.csv"
    run_text(capsys, "--result_folder", tmp_path, "--no_ci", "--det_points", out)
    rows = list(csv.DictReader(out.open()))
    points = [(r["threshold"], float(r["frr_percent"]), float(r["far_percent"])) for r in rows]
    assert points == [
        ("-inf", 0, 100),
        ("0.0", 0, 50),
        ("1.0", 50, 50),
        ("2.0", 50, 0),
        ("3.0", 100, 0),
    ]


@pytest.mark.parametrize("kind", ["det", "histogram", "eer", "reliability"])
def test_every_kind_of_plot_can_be_drawn(tmp_path, capsys, kind):
    write_model(tmp_path / "m", names=("C1", "ITW"))
    run_text(
        capsys,
        "--result_folder",
        tmp_path / "m",
        "--plot",
        tmp_path / "p.svg",
        "--plot_kind",
        kind,
        "--resamples",
        50,
    )
    text = (tmp_path / "p.svg").read_text()
    assert "<svg" in text and text.count("<path") > 5


def test_a_histogram_is_of_one_model(tmp_path):
    for model in "ab":
        write_subset(tmp_path / model, "C1_result.txt")
    with pytest.raises(InputError, match="histogram draws one model"):
        evaluate_score.main(
            [
                "--result_folder",
                str(tmp_path),
                "--plot",
                str(tmp_path / "p.svg"),
                "--plot_kind",
                "histogram",
                "--no_ci",
            ]
        )
