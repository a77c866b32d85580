"""Corpora as their authors release them: protocols become trials. Plain Python, without torch."""

from __future__ import annotations

import csv
import gc
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from runtime import files
from runtime.cli import InputError

REAL, FAKE = 0, 1  # labels and logit columns; a score is always higher-is-real
CODECFAKE_SUBSETS = ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "A1", "A2", "A3")
PARTS = {
    "codecfake": ("train", "dev", *CODECFAKE_SUBSETS),
    "19LA": ("train", "dev", "eval"),
    "ITW": ("all",),
}
SCORED = {  # task -> {subset as score files name it: part of the corpus}
    "19LA": {"19LA": "eval"},
    "ITW": {"ITW": "all"},
    "codecfake": {subset: subset for subset in CODECFAKE_SUBSETS},
}
LABEL_WORDS = {
    "codecfake": ("real", "fake"),
    "19LA": ("bonafide", "spoof"),
    "ITW": ("bonafide", "spoof"),
}


UNKNOWN = "-"  # a source or speaker that the corpus does not tell


# A NamedTuple: a million of them are read in seconds, frozen dataclasses take three times as long.
class Trial(NamedTuple):
    """One row of a protocol."""

    name: str  # as score files write it: with .wav in Codecfake, without extension elsewhere
    path: str
    label: int  # REAL or FAKE
    source: str  # codec (F01..F07, L1..L3) or attack (A01..A19), UNKNOWN if real
    speaker: str = UNKNOWN


# ── Protocols ────────────────────────────────────────────────────────────────────────────────────


def read_protocol(task: str, root: str | Path, part: str) -> list[Trial]:
    """All rows of one part of a corpus, in the protocol's order.

    Args:
        task: "codecfake", "19LA" or "ITW".
        root: the corpus folder, laid out as its authors release it.
        part: one of PARTS[task].

    Raises:
        InputError: no such corpus there, a row that is not one (names the file and the row), or a
            recording that is both real and fake.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the corpus's folder with -d")
    collecting = gc.isenabled()
    gc.disable()  # a million new tuples would have it look through them all over and over
    try:
        protocol, trials = _READERS[task](root, part)
    finally:
        if collecting:
            gc.enable()
    if not trials:
        raise InputError(f"{protocol}: has no rows")
    # The same row twice only counts twice, in training.
    if len({trial.path for trial in trials}) < len(trials):
        _require_one_label_each(protocol, trials)
    return _located(trials)


def _require_one_label_each(protocol: Path, trials: list[Trial]) -> None:
    labels: dict[str, int] = {}
    for trial in trials:
        if labels.setdefault(trial.path, trial.label) != trial.label:
            raise InputError(
                f"{protocol}: {trial.name} is in it as bona fide and as spoof; "
                "take the wrong row out"
            )


def _codecfake(root: Path, part: str) -> tuple[Path, list[Trial]]:
    """`name.wav real|fake tag`, or the two-column copies without the tag."""
    names = [part, "L" + part[1]] if part[0] == "A" else [part]
    protocol = _first_file(root, [f"label/{name}.txt" for name in names])
    folder = _codecfake_folder(root, part, names)

    trials, words = [], {"real": REAL, "fake": FAKE}
    sources: dict[str, str] = {}
    speakers: dict[str, str] = {}  # one string a speaker, not one a row
    for row, fields in _rows(protocol):
        if len(fields) not in (2, 3):
            raise _bad_row(protocol, row, "`name.wav real|fake tag`", fields)
        name = _plain_name(protocol, row, fields[0])
        tag = fields[2] if len(fields) == 3 else UNKNOWN
        label = _label(protocol, row, fields[1], words)
        if tag not in sources:
            sources[tag] = _codec(protocol, row, tag)
        speaker = codecfake_speaker(name)
        trials.append(
            Trial(
                name,
                f"{folder}/{name}",
                label,
                UNKNOWN if label == REAL else sources[tag],
                speakers.setdefault(speaker, speaker),
            )
        )
    return protocol, trials


def _codecfake_folder(root: Path, part: str, names: Sequence[str]) -> str:
    """The folder of a part's audio; a string, since formatting a million Paths takes a second."""
    if part in ("train", "dev"):
        return str(root / part)
    candidates = [root / above / name for above in ("test", "") for name in names]
    present = [folder for folder in candidates if folder.is_dir()]
    filled = [folder for folder in present if any(os.scandir(folder))]
    return str([*filled, *present, *candidates][0])


def _codec(protocol: Path, row: int, tag: str) -> str:
    if tag.isascii() and tag.isdigit():
        return f"F{int(tag):02d}"
    return _plain_name(protocol, row, tag, "tag")


COPY_PREFIX = re.compile(
    r"(?:F\d\d|[LA]\d)_"
)  # codec F01..F07, or set L1..L3, before a clip's name
VCTK_SPEAKER = re.compile(r"(?:p\d{3}|s5)(?=_)")  # p276_290.wav
AISHELL3_SPEAKER = re.compile(r"SSB\d{4}")  # SSB05440084.wav


def source_utterance(name: str) -> str:
    """The name of the clip that a Codecfake clip is a copy of: x.wav for F01_x.wav and x.wav."""
    return COPY_PREFIX.sub("", name, count=1)


def codecfake_speaker(name: str) -> str:
    """The speaker that a Codecfake clip is named after, UNKNOWN where the name tells none."""
    name = source_utterance(name)
    speaker = AISHELL3_SPEAKER.match(name) or VCTK_SPEAKER.match(name)
    return speaker[0] if speaker else UNKNOWN


def _asvspoof2019(root: Path, part: str) -> tuple[Path, list[Trial]]:
    """`speaker utterance - attack key`."""
    if not (root / "ASVspoof2019_LA_cm_protocols").is_dir() and (root / "LA").is_dir():
        root = root / "LA"  # LA.zip unpacks into a folder LA of its own
    kind = "trn" if part == "train" else "trl"
    protocol = _first_file(
        root, [f"ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{part}.{kind}.txt"]
    )
    folder = str(root / f"ASVspoof2019_LA_{part}" / "flac")

    trials, words = [], {"bonafide": REAL, "spoof": FAKE}
    for row, fields in _rows(protocol):
        if len(fields) != 5:
            raise _bad_row(protocol, row, "`speaker utterance - attack key`", fields)
        name = _plain_name(protocol, row, fields[1])
        label = _label(protocol, row, fields[4], words)
        attack = _plain_name(protocol, row, fields[3], "attack")
        source = UNKNOWN if label == REAL else attack
        trials.append(Trial(name, f"{folder}/{name}.flac", label, source, fields[0]))
    return protocol, trials


def _in_the_wild(root: Path, part: str) -> tuple[Path, list[Trial]]:
    """The released `meta.csv`, or the reference's `label.txt` with its audio in `wav/`."""
    if not (root / "meta.csv").is_file() and (root / "release_in_the_wild").is_dir():
        root = root / "release_in_the_wild"
    protocol = _first_file(root, ["meta.csv", "label.txt"])
    read = _itw_label_txt if protocol.name == "label.txt" else _itw_meta_csv
    return protocol, read(root, protocol, {"bona-fide": REAL, "bonafide": REAL, "spoof": FAKE})


def _itw_label_txt(root: Path, protocol: Path, words: dict[str, int]) -> list[Trial]:
    trials, expected = [], "five columns with the id in the 2nd and the label in the 5th"
    for row, fields in _rows(protocol):
        if len(fields) != 5:
            raise _bad_row(protocol, row, expected, fields)
        name = _plain_name(protocol, row, fields[1])
        label = _label(protocol, row, fields[4], words)
        trials.append(Trial(name, f"{root}/wav/{name}.wav", label, UNKNOWN))
    return trials


def _itw_meta_csv(root: Path, protocol: Path, words: dict[str, int]) -> list[Trial]:
    trials = []
    for row, fields in _csv_rows(protocol):
        if len(fields) != 3:
            raise _bad_row(protocol, row, "`file,speaker,label`", fields)
        file = _plain_name(protocol, row, fields[0].strip())
        label = _label(protocol, row, fields[2].strip(), words)
        speaker = _one_line(fields[1])
        trials.append(Trial(Path(file).stem, f"{root}/{file}", label, UNKNOWN, speaker))
    return trials


_READERS = {"codecfake": _codecfake, "19LA": _asvspoof2019, "ITW": _in_the_wild}


def _one_line(text: str) -> str:
    """The text with single blanks for what separates its words; UNKNOWN if there are none."""
    return " ".join(text.split()) or UNKNOWN


# ── Where the audio lies ─────────────────────────────────────────────────────────────────────────

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".m4a")
MOST_FILES = 2_000_000  # looked through for a file that is absent


def _located(trials: list[Trial]) -> list[Trial]:
    """The trials with the paths of their files, where those lie a folder deeper (real/, fake/, C1/)
    or end otherwise (.wav for .flac, .WAV).

    The first real and the first fake file tell whether any search is needed.
    """
    for label in (REAL, FAKE):
        first = next((trial for trial in trials if trial.label == label), None)
        if first and not os.path.exists(first.path):
            break
    else:
        return trials
    folders = {os.path.dirname(trial.path) for trial in trials}
    below = {folder: _files_below(folder) for folder in folders}
    return [_at_its_place(trial, below[os.path.dirname(trial.path)]) for trial in trials]


def _files_below(folder: str) -> dict[str, str | None]:
    """Name and stem of each audio file in a folder and two levels below -> its path; None: several.

    Names in the folder itself come before all others.
    """
    found: dict[str, str | None] = {}
    for place, inner, names in os.walk(folder):
        depth = place.removeprefix(folder).count("/")
        if depth == 2:
            inner.clear()
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in AUDIO_SUFFIXES:
                continue
            for key in (name, stem):
                is_first = key not in found
                found[key] = f"{place}/{name}" if is_first or depth == 0 else None
    return found


def _at_its_place(trial: Trial, below: dict[str, str | None]) -> Trial:
    name = os.path.basename(trial.path)
    path = below.get(name) or below.get(os.path.splitext(name)[0])
    return trial._replace(path=path) if path else trial


def find_missing(trials: Sequence[Trial]) -> list[Trial]:
    """The trials whose audio file is not there; broken links and empty files are not.

    Lists each folder once instead of asking file by file.
    """
    present: dict[str, set[str]] = {}
    missing = []
    for trial in trials:
        folder, _, file = trial.path.rpartition("/")
        if folder not in present:
            present[folder] = files_with_content(folder)
        if file not in present[folder]:
            missing.append(trial)
    return missing


def files_with_content(folder: str) -> set[str]:
    """Names in a folder whose files are there and not empty; none where there is no folder."""
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if _has_content(entry)}


def _has_content(entry: os.DirEntry) -> bool:
    try:
        return entry.stat().st_size > 0
    except PermissionError:
        raise
    except OSError:  # a link to nothing
        return False


def describe_missing(missing: Sequence[Trial], n_trials: int) -> str:
    """One line: how many of the protocol's files are absent, where, the first names, and where one
    of them lies instead.
    """
    folders = sorted({trial.path.rpartition("/")[0] for trial in missing})
    first = ", ".join(trial.path.rpartition("/")[2] for trial in missing[:3])
    line = (
        f"{len(missing)} of {n_trials} files named by the protocol are not in "
        f"{' or '.join(folders[:3])} (first: {first})"
    )
    elsewhere = _whereabouts(missing[0].path)
    return f"{line}; {elsewhere} is there" if elsewhere else line


def _whereabouts(path: str) -> str | None:
    """Another place in the corpus that holds a file of that name, whatever its ending."""
    folder, name = os.path.split(path)
    stem = os.path.splitext(name)[0]
    root = os.path.dirname(folder)
    if os.path.basename(root) == "test":  # Codecfake's subsets lie in it, or beside it
        root = os.path.dirname(root)
    n_files = 0
    for place, _, names in os.walk(root):
        n_files += len(names)
        if n_files > MOST_FILES:
            return None
        for found in names:
            if os.path.splitext(found)[0] == stem and f"{place}/{found}" != path:
                return f"{place}/{found}"
    return None


def _first_file(root: Path, candidates: list[str]) -> Path:
    for candidate in candidates:
        if (root / candidate).is_file():
            return root / candidate
    raise InputError(
        f"{root}: expected {' or '.join(candidates)} in it, found neither a corpus of that layout "
        "nor that part of it; give the corpus's folder with -d (README, Data)"
    )


LONGEST_ROW = 4_096  # characters; no real protocol comes near it


def _lines(protocol: Path) -> Iterator[tuple[int, str]]:
    """(row number from 1, line) of every row that is not blank.

    Never holds more than LONGEST_ROW of a line.
    """
    row = 0
    with files.open_text(protocol) as file:
        try:
            while line := file.readline(LONGEST_ROW + 1):
                row += 1
                if len(line) > LONGEST_ROW:
                    raise InputError(
                        f"{protocol}:{row}: expected a protocol row, "
                        f"got a line of over {LONGEST_ROW} characters"
                    )
                if line.strip():
                    yield row, line.rstrip("\n")
        except UnicodeDecodeError:
            raise InputError(
                f"{protocol}: not a text file (row {row + 1} or after is not UTF-8)"
            ) from None


def _rows(protocol: Path) -> Iterator[tuple[int, list[str]]]:
    return ((row, line.split()) for row, line in _lines(protocol))


def _csv_rows(protocol: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of `meta.csv` below its header; a first row that is data is kept as data."""
    for row, line in _lines(protocol):
        try:
            # Each line by itself: a stray quote must not swallow the next.
            fields = next(csv.reader([line], strict=True))
        except csv.Error as error:
            raise InputError(
                f"{protocol}:{row}: expected `file,speaker,label`, got {line[:60]!r} ({error})"
            ) from None
        if [field.strip() for field in fields] != ["file", "speaker", "label"]:
            yield row, fields


def _plain_name(protocol: Path, row: int, name: str, what: str = "file name") -> str:
    """The name, once it is sure to stay inside the corpus's folder and to drive no terminal."""
    if not name or "/" in name or "\\" in name or name in (".", "..") or not name.isprintable():
        raise InputError(f"{protocol}:{row}: expected a plain {what}, got {name[:60]!r}")
    return name


def _label(protocol: Path, row: int, word: str, words: dict[str, int]) -> int:
    if word not in words:
        raise InputError(
            f"{protocol}:{row}: expected the label {' or '.join(words)}, got {word[:60]!r}"
        )
    return words[word]


def _bad_row(protocol: Path, row: int, expected: str, fields: list[str]) -> InputError:
    got = f"{len(fields)} columns: {' '.join(fields)[:80]!r}"
    return InputError(f"{protocol}:{row}: expected {expected}, got {got}")
