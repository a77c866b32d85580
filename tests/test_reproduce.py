"""The page of published scores reproduced, on a generated corpus.

python -m pytest tests/test_reproduce.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_la

import generate_score
import model
from benchmarks import reproduce
from formats import score_files
from runtime.cli import InputError


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus LA/, a head in head/ and its score file, as if published, in theirs/."""
    folder = tmp_path_factory.mktemp("reproduce")
    make_la(folder / "LA", n_real=3)
    torch.manual_seed(0)
    (folder / "head").mkdir()
    head = model.build_head("lcnn", "mel").eval()
    model.save_head(folder / "head" / "anti-spoofing_feat_model.pt", head, {})
    generate_score.main(
        [
            *("-t", "19LA", "-d", str(folder / "LA"), "--model_folder", str(folder / "head")),
            *("--result_folder", str(folder / "theirs"), "--num_workers", "0", "--gpu", "-1"),
        ]
    )
    return folder


def reproduced(folder: Path, published: Path) -> list[str]:
    """The cells of the page's one row."""
    page = folder / "page.md"
    reproduce.main(
        [
            *("-t", "19LA", "-d", str(folder / "LA"), "--model_folder", str(folder / "head")),
            *("--published", str(published), "-o", str(page), "--num_workers", "0", "--gpu", "-1"),
        ]
    )
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| head ")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def write(folder: Path, names: list, scores: np.ndarray, is_real: np.ndarray) -> Path:
    folder.mkdir()
    words = ["bonafide" if real else "spoof" for real in is_real]
    score_files.write_scores(folder / "19LA_result.txt", names, scores, words)
    return folder


def test_own_scores_are_identical(scored: Path) -> None:
    row = dict(zip(reproduce.COLUMNS, reproduced(scored, scored / "theirs"), strict=True))
    assert row["trials"] == "6" and row["absent"] == "0" and row["verdicts flipped"] == "0"
    assert row["EER ours"] == row["EER published"]
    assert float(row["score: max"]) < 1e-9 and row["verdict"] == "IDENTICAL"


def test_absent_trials_are_counted_and_other_scores_named(scored: Path, tmp_path: Path) -> None:
    names, scores, is_real, *_ = score_files.read_scores(scored / "theirs" / "19LA_result.txt")
    more = write(tmp_path / "more", [*names, "X"], np.append(scores, 0.5), np.append(is_real, 1))
    row = dict(zip(reproduce.COLUMNS, reproduced(scored, more), strict=True))
    assert (row["trials"], row["absent"]) == ("6", "1")
    other = write(tmp_path / "other", names, 1 - scores, is_real)
    row = dict(zip(reproduce.COLUMNS, reproduced(scored, other), strict=True))
    assert row["verdicts flipped"] == "6" and row["verdict"].startswith("DIFFERENT")


def test_a_move_of_the_log_odds_beyond_tf32_is_no_longer_identical() -> None:
    scores = np.full(100, 1e-6)
    assert reproduce.judge(0, scores, np.full(100, 0.005)) == "IDENTICAL"
    assert reproduce.judge(0, scores, np.full(100, 0.2)) == "CLOSE"  # as kaiser_best moves them
    assert reproduce.judge(1, scores, np.full(100, 0.005)) == "CLOSE"


def test_sections_written_by_hand_are_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert reproduce.written_by_hand(page) == ""
    page.write_text("# Table\n\nold\n\n## More\n\ntext\n")
    assert reproduce.written_by_hand(page) == "\n## More\n\ntext\n"


def test_published_scores_for_each_model(scored: Path) -> None:
    with pytest.raises(InputError, match="expected one for each of 1 model folders"):
        reproduce.find_published([scored / "head"], [scored / "theirs"] * 2)
