"""The evaluation command line. Run: python -m pytest tests/test_evaluate_score.py"""
from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate_score
import evaluation
from cli import InputError
from eval_metrics import compute_eer, write_scores

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT.parent / "shared" / "reference"


def write_subset(folder: Path, file: str, eer: float = 0.1, n: int = 40, seed: int = 0) -> Path:
    """A score file of n real and n fake trials, the fakes copies of the reals, with about that EER."""
    rng = np.random.default_rng(seed)
    distance = -2 * np.sqrt(2) * _inverse_erf(2 * eer - 1)             # between the means of two normal densities
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


def write_model(folder: Path, eer: float = 0.1, names=evaluation.SUBSETS, n: int = 40) -> Path:
    for seed, name in enumerate(names):
        write_subset(folder, f"{name}_result.txt", eer, n, seed)
    return folder


def run_json(capsys, *argv) -> list[dict]:
    evaluate_score.main([*map(str, argv), "--format", "json"])
    return json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def run_text(capsys, *argv) -> str:
    evaluate_score.main([*map(str, argv)])
    return capsys.readouterr().out


def run_script(*argv, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "evaluate_score.py"), *map(str, argv)], cwd=cwd, capture_output=True, text=True)


# ── Finding score files ──────────────────────────────────────────────────────────────────────────


def test_without_arguments_all_in_result_is_evaluated(tmp_path):
    write_subset(tmp_path / "result", "19LA_result.txt")
    write_subset(tmp_path / "result" / "other", "C1_result.txt")
    done = run_script("--format", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(r["model"], r["subset"]) for r in json.loads(done.stdout)] == [("result", "19LA"), ("other", "C1")]


@pytest.mark.parametrize("file, subset", [("L2_result.txt", "A2"), ("19LA.txt", "19LA"), ("IWA_result.txt", "ITW"), ("C3.txt", "C3")])
def test_names_of_the_published_results_are_understood(tmp_path, capsys, file, subset):
    write_subset(tmp_path, file)
    assert [r["subset"] for r in run_json(capsys, "--result_folder", tmp_path)] == [subset]


@pytest.mark.parametrize("files", [("L1_result.txt", "A1_result.txt"), ("19LA.txt", "19LA_result.txt")])
def test_two_files_of_one_subset_are_refused(tmp_path, files):
    for file in files:
        write_subset(tmp_path, file)
    with pytest.raises(InputError, match=f"both .* are scores of {files[1].split('_')[0]}; keep one"):
        evaluate_score.main(["--result_folder", str(tmp_path)])


def test_folders_of_one_name_stay_apart_and_a_folder_given_twice_counts_once(tmp_path, capsys):
    for parent in ("x", "y"):
        write_subset(tmp_path / parent / "model", "C1_result.txt")
    folders = [tmp_path / "x" / "model", tmp_path / "y" / "model", tmp_path / "x"]
    models = {r["model"] for r in run_json(capsys, "--result_folder", *folders)}
    assert models == {str(tmp_path / "x" / "model"), str(tmp_path / "y" / "model")}


def test_a_task_limits_subsets_and_columns(tmp_path, capsys):
    write_model(tmp_path / "m")
    assert [r["subset"] for r in run_json(capsys, "--result_folder", tmp_path, "-t", "ITW")] == ["ITW"]
    header = run_text(capsys, "--result_folder", tmp_path, "-t", "codecfake", "--no_ci").splitlines()[1].split()
    assert header == ["model", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "CAVG", "A1", "A2", "A3"]


@pytest.mark.parametrize("make, message", [
    (lambda folder: None, "no such folder; expected score files such as"),
    (lambda folder: folder.mkdir(), "no score file of 19LA, ITW"),
    (lambda folder: folder.write_text("a 0.5 real\n"), "no such folder"),
])
def test_a_folder_without_scores_is_one_clear_line_and_exit_code_2(tmp_path, make, message):
    make(tmp_path / "result")
    done = run_script(cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: result") and message in done.stderr and done.stderr.count("\n") == 1
    assert "generate_score.py" in done.stderr or "no such folder" in done.stderr


@pytest.mark.parametrize("bad_row, message", [
    ("u1.wav 0.5", "got 2 column"), ("n.wav nan fake", "finite"), ("u0.wav 0.5 real", "2 times"), ("n.wav 0.5 genuine", "one of real")])
def test_a_bad_score_file_is_one_clear_line_and_exit_code_2(tmp_path, bad_row, message):
    path = write_subset(tmp_path / "result", "C1_result.txt")
    with open(path, "a") as file:
        file.write(bad_row + "\n")
    done = run_script(cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: result/C1_result.txt:81: ") and message in done.stderr and done.stderr.count("\n") == 1


# ── What is printed ──────────────────────────────────────────────────────────────────────────────


def test_json_holds_the_true_and_the_papers_figure_at_full_precision(tmp_path, capsys):
    write_scores(tmp_path / "C1_result.txt", list("abcdefg"), [1, 2, 3, 0, 2.5, 4, 5], ["real"] * 3 + ["fake"] * 4)
    (record,) = run_json(capsys, "--result_folder", tmp_path)
    eer, threshold = compute_eer([1, 2, 3], [0, 2.5, 4, 5])
    assert record["eer"] == 100 * eer > 50 and record["eer_paper"] == 100 - record["eer"]
    assert (record["inverted"], record["threshold"]) == (True, threshold)
    assert (record["model"], record["subset"], record["n_real"], record["n_fake"]) == (tmp_path.name, "C1", 3, 4)


def test_averages_are_means_and_need_all_their_parts(tmp_path, capsys):
    write_model(tmp_path / "m", eer=0.2)
    figures = {r["subset"]: r["eer_paper"] for r in run_json(capsys, "--result_folder", tmp_path)}
    row = next(csv.DictReader(io.StringIO(run_text(capsys, "--result_folder", tmp_path, "--format", "csv"))))
    codecs = [figures[f"C{i}"] for i in range(1, 8)]
    assert float(row["CAVG"]) == pytest.approx(np.mean(codecs), abs=6e-4)
    assert float(row["AVG"]) == pytest.approx(np.mean([*codecs, figures["19LA"], figures["ITW"]]), abs=6e-4)
    (tmp_path / "m" / "C4_result.txt").unlink()
    row = next(csv.DictReader(io.StringIO(run_text(capsys, "--result_folder", tmp_path, "--format", "csv"))))
    assert row["C4"] == row["CAVG"] == row["AVG"] == "" and row["C5"]


def test_inverted_detectors_are_marked_and_explained(tmp_path, capsys):
    write_model(tmp_path / "m", eer=0.2)
    write_subset(tmp_path / "m", "C2_result.txt", eer=0.7, n=200)
    record = next(r for r in run_json(capsys, "--result_folder", tmp_path) if r["subset"] == "C2")
    text = run_text(capsys, "--result_folder", tmp_path, "--no_ci")
    assert f" {record['eer_paper']:.3f}*" in text
    assert f"* m, C2: the EER is {record['eer']:.3f} %" in text
    assert "inverted detectors count as 100 - EER" in text


def test_subsets_without_an_eer_leave_a_dash_and_a_reason(tmp_path, capsys):
    write_subset(tmp_path, "C1_result.txt")
    (tmp_path / "C2_result.txt").write_text("")
    (tmp_path / "A3_result.txt").write_text("v.wav 0.25 fake\n")
    records = {r["subset"]: r for r in run_json(capsys, "--result_folder", tmp_path)}
    for subset in ("C2", "A3"):
        assert records[subset]["eer"] is records[subset]["eer_paper"] is records[subset]["threshold"] is None
    assert "empty" in records["C2"]["note"] and "not distributed" in records["A3"]["note"]
    text = run_text(capsys, "--result_folder", tmp_path)
    header, row = (line.split() for line in text.splitlines()[1:3])
    cells = dict(zip(header, row))
    assert cells["C2"] == cells["A3"] == cells["C7"] == cells["CAVG"] == "-" != cells["C1"]
    assert "C2: no EER: the score file is empty" in text
    assert "A3: no EER: only fake trials (1), and an EER needs both classes; A3's real files are not distributed" in text
    assert "no score file of 19LA, ITW, C3, C4, C5, C6, C7, A1, A2" in text


def test_markdown_csv_and_latex_hold_the_same_figures(tmp_path, capsys):
    write_model(tmp_path / "a_model", eer=0.2)
    argv = ("--result_folder", tmp_path, "--no_ci", "--format")
    lines = run_text(capsys, *argv, "markdown").splitlines()
    markdown = [[cell.strip().replace("\\*", "") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = list(csv.reader(io.StringIO(run_text(capsys, *argv, "csv"))))
    latex = run_text(capsys, *argv, "latex")
    assert markdown[0] == rows[0] == ["model", *evaluation.COLUMNS]
    assert markdown[2] == rows[1]
    assert r"a\_model & " + " & ".join(rows[1][1:]).replace("*", "") in latex.replace("*", "")
    assert latex.count(r"\\") == 2 and r"\begin{tabular}{l" + "r" * len(evaluation.COLUMNS) + "}" in latex


def test_hostile_folder_names_do_not_drive_the_terminal_or_break_a_table(tmp_path, capsys):
    name = "m\x1b[31m|<b>&"
    write_subset(tmp_path / name, "C1_result.txt")
    for style in evaluate_score.FORMATS:
        assert "\x1b" not in run_text(capsys, "--result_folder", tmp_path, "--no_ci", "--format", style)
    markdown = run_text(capsys, "--result_folder", tmp_path, "--no_ci", "--format", "markdown")
    assert r"\|\<b>" in markdown


# ── Plots ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("extension, start", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_det_plots_are_written_in_the_format_of_their_extension(tmp_path, capsys, extension, start):
    write_model(tmp_path / "m", names=("C1", "ITW"))
    run_text(capsys, "--result_folder", tmp_path / "m", "--no_ci", "--plot", tmp_path / f"det.{extension}")
    assert (tmp_path / f"det.{extension}").read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["det.jpg", "det", "det.png.exe"])
def test_other_plot_formats_are_refused_before_anything_is_done(tmp_path, name):
    with pytest.raises(InputError, match=r"expected a plot file ending in \.png, \.pdf, \.svg"):
        evaluate_score.main(["--result_folder", str(tmp_path / "absent"), "--plot", str(tmp_path / name)])


def test_a_plot_of_nothing_but_one_class_is_an_empty_frame(tmp_path, capsys):
    (tmp_path / "A3_result.txt").write_text("v.wav 0.25 fake\n")
    run_text(capsys, "--result_folder", tmp_path, "--plot", tmp_path / "det.svg")
    assert (tmp_path / "det.svg").stat().st_size > 0


# ── Published scores ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model, table, row", [
    ("vocoder_mellcnn", "III (trained on 19LA)", "Mel-LCNN"),
    ("cotrain_w2v2aasist_CSAM", "VIII (co-trained)", "W2V2-AASIST(CSAM)"),
])
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
        assert record["eer_paper"] == pytest.approx(expected[record["subset"]], abs=0.001), record["subset"]
    assert {r["subset"] for r in compared if r["inverted"]} == ({"ITW", "C5"} if model == "vocoder_mellcnn" else set())
