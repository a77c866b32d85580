"""Lists of trials, ours and other people's: labels, speakers and attacks by name.

A list has a header that names its columns, separated by tabs or commas; or it is the protocol of a
corpus, told by its number of columns. `<subset>_trials.tsv`, which generate_score.py writes beside
its score files, is such a list.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from formats.protocols import FAKE, REAL, UNKNOWN, Trial
from runtime import files
from runtime.cli import InputError

REAL_WORDS = ("real", "bonafide", "bona-fide")
FAKE_WORDS = ("fake", "spoof")
LABEL_OF = {**dict.fromkeys(REAL_WORDS, REAL), **dict.fromkeys(FAKE_WORDS, FAKE)}

# What a column holds -> the names that people give it, in small letters, "_" for "-" and " ".
COLUMN_NAMES = {
    "name": ("utt", "utt_id", "utterance", "file", "filename", "file_name", "path", "trial")
    + ("trial_id", "id", "name"),
    "score": ("score", "cm_score", "llr"),
    "label": ("label", "key", "cm_label", "word"),
    "speaker": ("speaker", "spk", "speaker_id"),
    "attack": ("attack", "attack_type", "source"),
    "cluster": ("cluster", "group"),
}


class Row(NamedTuple):
    """One row of a list: what its columns hold, "" where there is no such column."""

    number: int  # in the file, from 1
    cells: dict[str, str]  # kind of column -> text


def read_labels(path: str | Path) -> list[Trial]:
    """The trials of a list with named columns, or of a corpus's protocol; paths are left empty.

    Understood protocols (blank-separated, without a header): Codecfake, ASVspoof 2019, 2021 and 5.

    Raises:
        InputError: a row that is malformed or whose label is not one of the known words, a trial
            that occurs twice with different labels, or a file of unknown form; names the row.
    """
    rows = read_rows(path, needed=("name", "label"))
    if rows is None:
        rows = list(_protocol_rows(Path(path)))
    trials, labels = [], {}
    for number, cells in rows:
        name = _name(path, number, cells["name"])
        label = label_of(path, number, cells["label"])
        if labels.setdefault(name, label) != label:
            raise InputError(f"{path}:{number}: {name[:60]} is in it as real and as fake")
        source = UNKNOWN if label == REAL else _known(cells.get("attack", ""))
        trials.append(Trial(name, "", label, source, _known(cells.get("speaker", ""))))
    if not trials:
        raise InputError(f"{path}: has no rows")
    return trials


def read_clusters(path: str | Path) -> dict[str, str]:
    """Trial -> cluster, from a list with the columns `utt` and `cluster` (or `speaker`).

    Raises InputError for a list without these columns, an empty cell, or a trial of two clusters.
    """
    rows = read_rows(path, needed=("name",))
    kind = next((k for k in ("cluster", "speaker") if rows and k in rows[0].cells), None)
    if kind is None:
        raise InputError(
            f"{path}: expected a list with a header and the columns `utt` and `cluster`, "
            "separated by tabs or commas"
        )
    clusters: dict[str, str] = {}
    for number, cells in rows:
        name, cluster = _name(path, number, cells["name"]), cells[kind].strip()
        if not cluster:
            raise InputError(f"{path}:{number}: expected a cluster of {name[:60]}, got nothing")
        if clusters.setdefault(name, cluster) != cluster:
            raise InputError(f"{path}:{number}: {name[:60]} is in two clusters")
    return clusters


def read_rows(
    path: str | Path, needed: Sequence[str], columns: dict[str, str] | None = None
) -> list[Row] | None:
    """Rows below a header that names columns; None where the first row is no such header.

    Args:
        needed: kinds of columns that the header has to name.
        columns: kind -> the column's name, where it is none of COLUMN_NAMES.

    Raises:
        InputError: two columns of one kind, a kind that is absent, a row of another length.
    """
    numbered = _numbered_lines(Path(path))
    first = next(numbered, None)
    if first is None:
        return None
    delimiter = "\t" if "\t" in first[1] else ","
    header = _cells(path, first, delimiter)
    kinds = _kinds_of(path, header, columns or {})
    if "name" not in kinds or len(header) < 2:
        if columns:
            raise InputError(f"{path}:1: expected a header with the columns of --columns")
        return None
    for kind in needed:
        if kind not in kinds:
            raise InputError(
                f"{path}:1: expected a column of the {kind} ({', '.join(COLUMN_NAMES[kind])}), "
                f"got {', '.join(header)[:100]}; name it with --columns {kind}=NAME"
            )
    rows = []
    for line in numbered:
        cells = _cells(path, line, delimiter)
        if len(cells) != len(header):
            raise InputError(
                f"{path}:{line[0]}: expected {len(header)} columns as in the header, "
                f"got {len(cells)}: {line[1][:60]!r}"
            )
        rows.append(Row(line[0], {kind: cells[at] for kind, at in kinds.items()}))
    return rows


def label_of(path: str | Path, row: int, word: str) -> int:
    """REAL or FAKE. Raises InputError for a word that is neither; numbers are never guessed."""
    label = LABEL_OF.get(word.strip())
    if label is None:
        raise InputError(
            f"{path}:{row}: expected one of {', '.join(LABEL_OF)} as the label, got {word[:60]!r}"
        )
    return label


def write_trials(path: str | Path, trials: Iterable[Trial]) -> None:
    """Write the list that read_labels() reads back, whole or not at all."""
    with files.atomic_write(path) as file:
        file.write("utt\tlabel\tspeaker\tattack\n")
        for trial in trials:
            word = "real" if trial.label == REAL else "fake"
            file.write(f"{trial.name}\t{word}\t{trial.speaker}\t{trial.source}\n")


def _kinds_of(path: str | Path, header: Sequence[str], given: dict[str, str]) -> dict[str, int]:
    """Kind -> number of its column."""
    kinds = {}
    for kind, names in COLUMN_NAMES.items():
        if kind in given:
            at = [i for i, cell in enumerate(header) if cell == given[kind]]
            if not at:
                raise InputError(
                    f"{path}:1: expected a column {given[kind]!r}, got {', '.join(header)[:100]}"
                )
        else:
            plain = [re.sub("[- ]", "_", cell.strip().lower()) for cell in header]
            at = [i for i, cell in enumerate(plain) if cell in names]
        if len(at) > 1:
            both = " and ".join(header[i] for i in at)
            raise InputError(
                f"{path}:1: {both} could both be the {kind}; name one with --columns {kind}=NAME"
            )
        if at:
            kinds[kind] = at[0]
    return kinds


def _protocol_rows(path: Path) -> Iterator[Row]:
    """Rows of a corpus's protocol, whose columns are told by their number."""
    for number, line in _numbered_lines(path):
        fields = line.split()
        match fields:
            case [name, label] | [name, label, _]:  # Codecfake
                cells = {"name": name, "label": label}
            case [speaker, name, _, attack, label]:  # ASVspoof 2019
                cells = {"name": name, "label": label, "speaker": speaker, "attack": attack}
            case [speaker, name, _, _, attack, label, _, _, *rest] if len(rest) in (0, 5):
                # ASVspoof 2021, stage-1 and full keys
                cells = {"name": name, "label": label, "speaker": speaker, "attack": attack}
            case [speaker, name, _, _, _, _, _, attack, label, _]:  # ASVspoof 5
                cells = {"name": name, "label": label, "speaker": speaker, "attack": attack}
            case _:
                raise InputError(
                    f"{path}:{number}: expected a header that names the columns (utt, label, "
                    "speaker, attack), or a row of a protocol of Codecfake, ASVspoof 2019, 2021 "
                    f"or 5, got {len(fields)} columns: {line[:60]!r}"
                )
        yield Row(number, cells)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with files.open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected a text file in UTF-8") from None


def _cells(path: str | Path, line: tuple[int, str], delimiter: str) -> list[str]:
    if '"' not in line[1]:
        return line[1].split(delimiter)
    # Each line by itself: a stray quote must not swallow the next.
    try:
        return next(csv.reader([line[1]], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{line[0]}: {error}: {line[1][:60]!r}") from None


def _name(path: str | Path, row: int, name: str) -> str:
    name = name.strip()
    if not name or not name.isprintable():
        raise InputError(f"{path}:{row}: expected a trial's name, got {name[:60]!r}")
    return name


def _known(text: str) -> str:
    return " ".join(text.split()) or UNKNOWN


# ── Names that differ only in form ───────────────────────────────────────────────────────────────

EXTENSION = re.compile(r"\.(?:wav|flac)$", re.IGNORECASE)
ATTACK_SUFFIX = re.compile(r"(?<=\d)_(?:A\d\d|-)$")  # LA_E_2834763_A11


def bare_name(name: str) -> str:
    """The name without folders and without .wav or .flac."""
    return EXTENSION.sub("", name.replace("\\", "/").rpartition("/")[2])


class NameIndex:
    """Finds the entry that a name means, also where folders or an extension differ."""

    def __init__(self, names: Iterable[str]):
        self.exact = set(names)
        self.bare: dict[str, str | None] = {}
        for name in self.exact:
            bare = bare_name(name)
            self.bare[bare] = None if bare in self.bare else name  # None: two names, never guessed

    def find(self, name: str) -> str | None:
        """The entry of that name, or the only one whose bare name is the same; else None."""
        if name in self.exact:
            return name
        bare = bare_name(name)
        if bare in self.bare:
            return self.bare[bare]
        return self.bare.get(ATTACK_SUFFIX.sub("", bare))
