"""Score files, both ends, and what lies beside them: provenance, lists of trials, ASV scores.

Plain numpy. Score files of other programs: formats/score_forms.py.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from formats import trial_lists
from formats.protocols import Trial
from formats.trial_lists import FAKE_WORDS, REAL_WORDS
from runtime import files
from runtime.cli import InputError

# ── Score files ──────────────────────────────────────────────────────────────────────────────────

UNLABELLED = "-"  # recordings whose label nobody knows: written, but there is nothing to evaluate
IS_REAL = {word.encode(): word in REAL_WORDS for word in REAL_WORDS + FAKE_WORDS}


class Scores(NamedTuple):
    """The trials of one score file, in its order."""

    names: Sequence[str]  # N
    scores: np.ndarray  # (N,) float64, higher = more likely real
    is_real: np.ndarray  # (N,) bool
    speakers: Sequence[str] = ()  # N, or none where nobody told them
    attacks: Sequence[str] = ()

    @property
    def real(self) -> np.ndarray:
        return self.scores[self.is_real]

    @property
    def fake(self) -> np.ndarray:
        return self.scores[~self.is_real]


def read_scores(path: str | Path) -> Scores:
    """Read a score file of rows `name score word`; the words are REAL_WORDS and FAKE_WORDS.

    An empty file and a file of one class are fine here: it is only their EER that does not exist.

    Raises:
        InputError: a malformed row, an unknown word, a score that is not a finite number, a name
            that occurs twice. The message names file and row.
    """
    trials = read_rows(path)
    require_valid(path, trials)
    return trials


def require_valid(path: str | Path, trials: Scores) -> None:
    """Raise InputError for a score that is not finite, or a name that occurs twice."""
    finite = np.isfinite(trials.scores)
    if not finite.all():
        trial = int(np.argmin(finite))
        raise InputError(
            f"{path}:{_row_of(path, trial)}: expected a finite score, got {trials.scores[trial]}; "
            "score this trial again"
        )
    if len(set(trials.names)) < len(trials.names):
        name, count = Counter(trials.names).most_common(1)[0]
        second = trials.names.index(name, trials.names.index(name) + 1)
        raise InputError(
            f"{path}:{_row_of(path, second)}: expected each trial once, got {_shortened(name)} "
            f"{count} times; keep one row of it"
        )


def read_rows(path: str | Path) -> Scores:
    """Like read_scores(), but lets non-finite scores and repeated names through, to be counted."""
    lines = _read(path)
    try:
        return _parse(lines)
    except (ValueError, KeyError):
        return _parse(_whole_rows(path, lines))


ROW_END = b"\0"  # no score file has it as a word of its own


def _parse(lines: bytes) -> Scores:
    """Rows, none of them blank. By columns, which is three times as fast as row by row."""
    lines = lines.rstrip()
    if not lines:
        return Scores([], np.empty(0), np.empty(0, dtype=bool))
    fields = lines.replace(b"\n", b" " + ROW_END + b" ").split() + [ROW_END]
    names, scores, words, ends = fields[0::4], fields[1::4], fields[2::4], fields[3::4]
    if 4 * ends.count(ROW_END) != len(fields) or ROW_END in names:
        raise ValueError("a row without exactly three columns")
    if b"_" in b" ".join(scores):
        raise ValueError("an underscore, which Python allows in numbers")
    values = np.array(list(map(float, scores)))
    is_real = np.array([IS_REAL[word] for word in words])
    return Scores(b"\n".join(names).decode().split("\n"), values, is_real)


def write_scores(
    path: str | Path, names: Sequence[str], scores: Sequence[float], words: Sequence[str]
) -> None:
    """Write a score file that read_scores() reads back to the last bit, whole or not at all.

    Raises InputError as format_scores(), before anything is written.
    """
    text = format_scores(path, names, scores, words)
    with files.atomic_write(path) as file:
        file.write(text)


def format_scores(
    path: str | Path, names: Sequence[str], scores: Sequence[float], words: Sequence[str]
) -> str:
    """What a score file at `path` holds.

    Raises InputError for names as check_names(), for scores that are not finite, for unknown words,
    and for sequences of unequal length.
    """
    if not len(names) == len(scores) == len(words):
        raise InputError(
            f"{path}: expected as many names as scores and words, got {len(names)}, {len(scores)} "
            f"and {len(words)}"
        )
    check_names(path, names)
    lines = []
    for name, score, word in zip(names, map(float, scores), words, strict=True):
        if not np.isfinite(score):
            raise InputError(f"{path}: expected a finite score for {_shortened(name)}, got {score}")
        if word.encode() not in IS_REAL and word != UNLABELLED:
            raise InputError(
                f"{path}: expected {_known_words()} for {_shortened(name)}, got {_shortened(word)}"
            )
        lines.append(f"{name} {score!r} {word}\n")
    return "".join(lines)


def check_names(path: str | Path, names: Sequence[str]) -> None:
    """Raise InputError for a name that no score file can hold: empty, with a blank, or twice."""
    seen = set()
    for name in names:
        if not name or name.split() != [name]:
            raise InputError(
                f"{path}: expected a trial's name without blanks, got {_shortened(name)}"
            )
        if name in seen:
            raise InputError(f"{path}: expected each trial once, got {_shortened(name)} again")
        seen.add(name)


def is_plain(path: str | Path) -> bool:
    """Whether the first row of a file is `name score word`, with any word; an empty file is."""
    first = next(numbered_lines(path), None)
    if first is None:
        return True
    fields = first[1].split()
    if len(fields) != 3:
        return False
    return _is_number(fields[1].encode()) and not _is_number(fields[2].encode())


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(row number from 1, line) of every row that is not blank.

    Raises InputError for a file that is not UTF-8.
    """
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, line.decode()
        except UnicodeDecodeError:
            raise InputError(f"{path}:{number}: expected UTF-8, got {_shortened(line)}") from None


def trials_path(score_file: str | Path) -> Path:
    """Where the speakers and attacks of a score file's trials are: beside it, as a list.

    `C1_trials.tsv` for `C1_result.txt`: .txt files are scores, so the list is none.
    """
    path = Path(score_file)
    return path.with_name(f"{path.stem.removesuffix('_result')}_trials.tsv")


def write_trials(score_file: str | Path, trials: Sequence[Trial]) -> None:
    """Record label, speaker and attack of a score file's trials beside it.

    evaluate_score.py then draws speakers and attacks, and needs no corpus for it.
    """
    trial_lists.write_trials(trials_path(score_file), trials)


def read_trials(score_file: str | Path) -> list[Trial]:
    """What write_trials() recorded; nothing where there is no record.

    Raises InputError for a damaged record.
    """
    path = trials_path(score_file)
    return trial_lists.read_labels(path) if path.is_file() else []


PROVENANCE = "provenance.json"  # beside score files: what made them, and their SHA-256


def read_checksums(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each score file in the folder that generate_score.py wrote.

    Raises InputError where their list is damaged.
    """
    return read_provenance(folder, "sha256")


def read_provenance(folder: str | Path, what: str) -> dict[str, str]:
    """What generate_score.py recorded under this heading of each score file.

    Raises InputError where the record is damaged.
    """
    path = Path(folder) / PROVENANCE
    if not path.is_file():
        return {}
    try:
        recorded = json.loads(path.read_bytes()).get(what, {})
        if all(isinstance(value, str) for value in recorded.values()):
            return recorded
    except (ValueError, AttributeError, RecursionError):
        pass
    raise InputError(
        f"{path}: damaged, or not written by generate_score.py; remove it to take the score files "
        "beside it as they are"
    )


def is_unchanged(path: str | Path, checksums: dict[str, str]) -> bool:
    """Whether a score file is what generate_score.py wrote, as far as its checksum is known."""
    path = Path(path)
    return checksums.get(path.name) in (None, hashlib.sha256(path.read_bytes()).hexdigest())


def made_of(folder: Path) -> dict[str, str]:
    """What each score file in the folder holds, as far as generate_score.py recorded it."""
    return read_provenance(folder, "made_of")


def write_provenance(
    folder: Path, about: dict[str, Any], scores: str, score_file: str, sha256: str
) -> None:
    """What made the scores, and their checksums, which evaluate_score.py holds them against."""
    checksums = read_checksums(folder) | {score_file: sha256}
    about = about | {
        "sha256": checksums,
        "made_of": made_of(folder) | {score_file: scores},
    }
    with files.atomic_write(folder / PROVENANCE) as file:
        json.dump(about, file, indent=1)


def _read(path: str | Path) -> bytes:
    content = Path(path).read_bytes()
    files.refuse_utf16(path, content[:64])
    return content.removeprefix(b"\xef\xbb\xbf")  # a mark that some editors write


def _whole_rows(path: str | Path, lines: bytes) -> bytes:
    """The lines that are not blank. Raises InputError for a row that is not `name score word`."""
    rows = []
    for number, line in enumerate(lines.split(b"\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        if problem := _problem_of(fields):
            raise InputError(
                f"{path}:{number}: {problem}; is this a score file of generate_score.py?"
            )
        rows.append(line)
    return b"\n".join(rows)


def _problem_of(fields: list[bytes]) -> str | None:
    if len(fields) != 3 or ROW_END in fields:
        got = f"{len(fields)} column(s): {_shortened(b' '.join(fields[:4]))}"
        return f"expected `name score word`, got {got}"
    name, score, word = fields
    if not _is_number(score):
        return f"expected a number as the score, got {_shortened(score)}"
    if word not in IS_REAL:
        hint = ""
        if word == UNLABELLED.encode():
            hint = " (a recording without a label, of which there is nothing to evaluate)"
        return f"expected {_known_words()}, got {_shortened(word)}{hint}"
    try:
        name.decode()
    except UnicodeDecodeError:
        return f"expected a name in UTF-8, got {_shortened(name)}"
    return None


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return b"_" not in text


def _row_of(path: str | Path, trial: int) -> int:
    """Row number, from 1, of the trial-th row that is not blank."""
    lines = enumerate(_read(path).split(b"\n"), start=1)
    return [number for number, line in lines if line.strip()][trial]


def _known_words() -> str:
    return "one of " + ", ".join(REAL_WORDS + FAKE_WORDS)


def _shortened(text: str | bytes) -> str:
    text = text[:60].decode(errors="replace") if isinstance(text, bytes) else text
    return repr(text[:60])


# ── Tandem detection cost ────────────────────────────────────────────────────────────────────────


class AsvScores(NamedTuple):
    """Scores of the challenge's speaker verification system, higher = more likely the speaker."""

    target: np.ndarray
    nontarget: np.ndarray
    spoof: np.ndarray


def read_asv_scores(path: str | Path) -> AsvScores:
    """Read the organisers' ASV score file of ASVspoof 2019: rows `source key score`.

    Raises InputError for a malformed row, a score that is not finite, or a key without rows.
    """
    scores: dict[bytes, list[float]] = {b"target": [], b"nontarget": [], b"spoof": []}
    for row, line in enumerate(_read(path).split(b"\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            _, key, score = fields
            scores[key].append(float(score))
        except (ValueError, KeyError):
            raise InputError(
                f"{path}:{row}: expected `source target|nontarget|spoof score`, "
                f"got {_shortened(line)}; is this ASVspoof2019.LA.asv.eval.gi.trl.scores.txt?"
            ) from None
    arrays = {key.decode(): np.array(values) for key, values in scores.items()}
    for key, values in arrays.items():
        if not values.size or not np.isfinite(values).all():
            got = "some that are not" if values.size else "none"
            raise InputError(f"{path}: expected finite scores of {key} trials, got {got}")
    return AsvScores(**arrays)
