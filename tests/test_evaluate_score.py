"""The evaluation command line. Run: python -m pytest tests/test_evaluate_score.py"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate_score
from eval_metrics import compute_eer
from evaluation import comparisons, results
from formats.score_files import write_scores
from runtime.cli import InputError

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT.parent / "shared" / "reference"


def write_subset(folder: Path, file: str, eer: float = 0.1, n: int = 40, seed: int = 0) -> Path:
    """A score file of n real and n fake trials, the fakes copies of the reals, with about that EER."""
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
    cells = dict(zip(header, row))
    assert cells["C2"] == cells["A3"] == cells["C7"] == cells["CAVG"] == "-" != cells["C1"]
    assert "C2: no EER: the score file is empty" in text
    assert (
        "A3: no EER: only fake trials (1), and an EER needs both classes; A3's real files are not distributed"
        in text
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
    expected = dict(zip(paper["columns"], paper[table][row]))
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


def test_compare_refuses_other_trials_and_other_labels(tmp_path):
    path = write_subset(tmp_path / "a", "C1_result.txt")
    write_subset(tmp_path / "b", "C1_result.txt", n=41)
    with pytest.raises(
        InputError, match=r"different trials: 2 are in one file only \(first: F01_u40.wav\)"
    ):
        evaluate_score.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    (tmp_path / "b" / "C1_result.txt").write_text(path.read_text().replace(" real", " fake", 1))
    with pytest.raises(
        InputError, match=r"disagree on which of 1 trial\(s\) are real \(first: u0.wav\)"
    ):
        evaluate_score.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(
        InputError,
        match="nowhere: expected a folder of score files, a score file, or the name of a model",
    ):
        evaluate_score.main(["--result_folder", str(tmp_path), "--compare", "a", "nowhere"])


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
    """Protocols of C1 (trailing blanks as in the release) and C7 (two codecs), and their score files in `result`."""
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
