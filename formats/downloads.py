"""Is a corpus whole: its files against its protocols, and its counts against the published ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from formats import protocols
from formats.protocols import REAL, Trial

# (bona fide, spoof) rows, as published: Codecfake by Xie et al. 2024, ASVspoof2019 LA by Wang et
# al. 2020, In-the-Wild by Mueller et al. 2022.
PUBLISHED = {
    "codecfake": {
        "train": (105_821, 634_926),
        "dev": (13_228, 79_368),
        **{f"C{k}": (13_228, 13_228) for k in range(1, 7)},
        "C7": (13_228, 132_277),
        "A1": (4_451, 4_436),
        "A2": (4_451, 4_436),
        "A3": (49_274, 49_838),
    },
    "19LA": {"train": (2_580, 22_800), "dev": (2_548, 22_296), "eval": (7_355, 63_882)},
    "ITW": {"all": (19_963, 11_816)},
}


@dataclass(frozen=True)
class Part:
    """What lies on the disk of one part of a corpus."""

    name: str
    trials: list[Trial]
    missing: list[Trial]
    surplus: int  # files beside them that no row names
    published: tuple[int, int]  # (bona fide, spoof) rows

    @property
    def counts(self) -> tuple[int, int]:
        """(bona fide, spoof) rows of the protocol."""
        n_real = sum(trial.label == REAL for trial in self.trials)
        return n_real, len(self.trials) - n_real

    @property
    def present(self) -> list[str]:
        """Paths of the rows whose files are there."""
        missing = set(self.missing)
        return [trial.path for trial in self.trials if trial not in missing]

    @property
    def lacks_only_what_is_not_distributed(self) -> bool:
        """A3's real half is under copyright."""
        return self.name == "A3" and all(trial.label == REAL for trial in self.missing)


def inspect_part(task: str, root: str | Path, part: str) -> Part:
    """Hold one part's folder against its protocol.

    Raises:
        InputError: no protocol there, or one that cannot be read.
    """
    trials = protocols.read_protocol(task, root, part)
    missing = protocols.find_missing(trials)
    return Part(part, trials, missing, count_surplus(trials), PUBLISHED[task][part])


def count_surplus(trials: Sequence[Trial]) -> int:
    """Files in the trials' folders with the suffixes of the trials that no trial names."""
    named = {trial.path for trial in trials}
    suffixes = {os.path.splitext(path)[1] for path in named}
    folders = {os.path.dirname(path) for path in named}
    surplus = 0
    for folder in folders:
        if os.path.isdir(folder):
            files = [f"{folder}/{name}" for name in os.listdir(folder)]
            surplus += sum(
                path not in named and os.path.splitext(path)[1] in suffixes for path in files
            )
    return surplus
