"""Score files as other programs write them, all told apart by their first row. Never guessed.

name score                            labels come from a list or a corpus
name score word                       generate_score.py's own
name attack word score                ASVspoof 2019's baselines
name - word score                     the same, with blanks in the name
a header, then tabs or commas         ASVspoof 5 and many others; columns by their names
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats import score_files, trial_lists
from formats.protocols import FAKE, REAL, UNKNOWN
from formats.score_files import Scores
from formats.trial_lists import LABEL_OF
from runtime.cli import InputError

FORMS = (
    "`name score`, `name score word`, `name attack word score`, or a header that names the columns "
    f"(utt, score, label), separated by tabs or commas; words: {', '.join(LABEL_OF)}"
)


class ScoreTable(NamedTuple):
    """The rows of a score file, in its order. Names may repeat and scores be non-finite here."""

    names: list[str]
    scores: np.ndarray  # (N,) float64
    labels: np.ndarray | None  # (N,) REAL or FAKE; None where the file has no labels
    speakers: list[str] | None
    attacks: list[str] | None


def read_table(path: str | Path, columns: dict[str, str] | None = None) -> ScoreTable:
    """Read a score file of any known form.

    Args:
        columns: kind of column -> its name in the header, for headers that do not use the names of
            trial_lists.COLUMN_NAMES.

    Raises:
        InputError: a row that does not fit the form of the first, or a form that has more than one
            meaning; names the row and the forms that are understood.
    """
    if not columns and score_files.is_plain(path):
        trials = score_files.read_rows(path)
        labels = np.where(trials.is_real, REAL, FAKE)
        return ScoreTable(list(trials.names), trials.scores, labels, None, None)
    rows = trial_lists.read_rows(path, needed=("name", "score"), columns=columns)
    if rows is not None:
        return _from_header(path, rows)
    return _from_fields(path)


def require_valid(path: str | Path, table: ScoreTable) -> None:
    """Raise InputError for a score that is not finite, or a name that occurs twice."""
    if table.labels is not None and score_files.is_plain(path):
        score_files.require_valid(path, to_scores(table, table.labels))  # names the row
    finite = np.isfinite(table.scores)
    if not finite.all():
        at = int(np.argmin(finite))
        raise InputError(
            f"{path}: expected finite scores, got {table.scores[at]} for {table.names[at][:60]!r}; "
            "score this trial again"
        )
    seen: set[str] = set()
    for name in table.names:
        if name in seen:
            raise InputError(
                f"{path}: expected each trial once, got {name[:60]!r} again; keep one row of it"
            )
        seen.add(name)


def to_scores(table: ScoreTable, labels: np.ndarray) -> Scores:
    speakers, attacks = table.speakers or (), table.attacks or ()
    return Scores(table.names, table.scores, labels == REAL, speakers, attacks)


def _from_header(path: str | Path, rows: list[trial_lists.Row]) -> ScoreTable:
    kinds = rows[0].cells if rows else {}
    labels = None
    if "label" in kinds:
        words = [trial_lists.label_of(path, row.number, row.cells["label"]) for row in rows]
        labels = np.array(words)
    return ScoreTable(
        [row.cells["name"].strip() for row in rows],
        np.array([_number(path, row.number, row.cells["score"]) for row in rows], dtype=np.float64),
        labels,
        [_known(row.cells["speaker"]) for row in rows] if "speaker" in kinds else None,
        [_known(row.cells["attack"]) for row in rows] if "attack" in kinds else None,
    )


def _from_fields(path: str | Path) -> ScoreTable:
    names, scores, labels, attacks = [], [], [], []
    parse = None
    for number, line in score_files.numbered_lines(path):
        fields = line.split()
        if parse is None:
            parse = _form_of(path, number, fields)
        name, score, word, attack = parse(path, number, fields)
        names.append(name)
        scores.append(_number(path, number, score))
        attacks.append(attack)
        if word is not None:
            labels.append(trial_lists.label_of(path, number, word))
    known = any(attack != UNKNOWN for attack in attacks)
    return ScoreTable(
        names,
        np.array(scores, dtype=np.float64),
        np.array(labels) if labels else None,
        None,
        attacks if known else None,
    )


def _form_of(path: str | Path, row: int, fields: list[str]):
    """The function that takes rows like the first one apart."""
    if len(fields) == 2 and _is_number(fields[1]):
        return _name_score
    if len(fields) >= 4 and fields[-2] in LABEL_OF and _is_number(fields[-1]):
        return _name_attack_word_score
    if len(fields) == 3 and _is_number(fields[1]) and fields[2] in LABEL_OF:
        return _name_score_word
    raise _unknown_form(path, row, fields)


def _name_score(path: str | Path, row: int, fields: list[str]):
    if len(fields) != 2:
        raise _unknown_form(path, row, fields, "`name score` as in the first row")
    return fields[0], fields[1], None, UNKNOWN


def _name_score_word(path: str | Path, row: int, fields: list[str]):
    if len(fields) != 3:
        raise _unknown_form(path, row, fields, "`name score word` as in the first row")
    return fields[0], fields[1], fields[2], UNKNOWN


def _name_attack_word_score(path: str | Path, row: int, fields: list[str]):
    if len(fields) < 4:
        raise _unknown_form(path, row, fields, "`name attack word score` as in the first row")
    *name, attack, word, score = fields
    if len(name) > 1 and attack != UNKNOWN:
        expected = "`name - word score`, the form in which names may have blanks"
        raise _unknown_form(path, row, fields, expected)
    return " ".join(name), score, word, attack


def _unknown_form(path: str | Path, row: int, fields: list[str], expected: str = FORMS):
    got = f"{len(fields)} column(s): {' '.join(fields)[:60]!r}"
    why = ""
    if len(fields) == 3 and _is_number(fields[1]) and _is_number(fields[2]):
        why = " (two numbers could be two logits, or a score and a label: never guessed)"
    return InputError(f"{path}:{row}: expected {expected}, got {got}{why}")


def _number(path: str | Path, row: int, text: str) -> float:
    if text.strip().startswith("["):
        raise InputError(f"{path}:{row}: expected one score, got a list: {text[:60]!r}")
    if not _is_number(text):
        raise InputError(f"{path}:{row}: expected a number as the score, got {text[:60]!r}")
    return float(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _known(text: str) -> str:
    return " ".join(text.split()) or UNKNOWN
