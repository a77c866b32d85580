"""What is drawn when an EER's interval is estimated: speakers, attacks, utterances or trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.bootstrap import NO_LEVEL, Factor
from formats import protocols
from formats.protocols import UNKNOWN
from formats.score_files import Scores
from runtime.cli import InputError

CHOICES = ("speaker", "utterance", "trial")  # of --cluster_by; anything else is a file
UNKNOWN_SPEAKERS = "trial: speakers unknown, likely too narrow; give the corpus with -d"
# Fewer attacks than this are taken as they are. With A attacks drawn, the interval is as wide as
# t with A - 1 degrees of freedom demands, and says little: 4.3 standard errors for three.
FEWEST_ATTACKS = 5


class Units(NamedTuple):
    """The one or two factors that are drawn, and what tables call them."""

    factors: Sequence[Factor]
    names: Sequence[Sequence[str]]  # per factor (L,): what its levels are called
    name: str  # "speaker x attack", "speaker", "source utterance", ...

    @property
    def codes(self) -> list[np.ndarray]:
        return [factor.codes for factor in self.factors]

    def n_clusters(self, of: np.ndarray) -> int:
        """How many clusters hold the given trials: the least of the factors that touch them.

        Args:
            of: (N,) bool, the trials of a class.
        """
        counts = [len(np.unique(codes[of & (codes != NO_LEVEL)])) for codes in self.codes]
        return min(count for count in counts if count)


def find_units(trials: Scores, subset: str, cluster_by: str | dict[str, str] = "speaker") -> Units:
    """The factors of a subset's trials.

    Args:
        trials: with speakers and attacks where these are known. Codecfake's speakers stand in the
            names of its clips.
        cluster_by: "speaker", with attacks where at least FEWEST_ATTACKS are known; "utterance", a
            Codecfake clip with its copies; "trial"; or trial -> cluster, read from a file.

    Raises:
        InputError: a trial that the given clusters lack.
    """
    if isinstance(cluster_by, dict):
        return _of_file(trials, cluster_by)
    if cluster_by == "trial":
        return _one("trial", trials.names)
    if cluster_by == "utterance":
        return _of_utterances(trials, subset)
    return _of_speakers(trials, subset)


def _of_speakers(trials: Scores, subset: str) -> Units:
    speakers = list(trials.speakers)
    if not any(speaker != UNKNOWN for speaker in speakers) and is_codecfake(subset):
        speakers = [protocols.codecfake_speaker(name) for name in trials.names]
    known = {speaker for speaker in speakers if speaker != UNKNOWN}
    if len(known) < 2:
        return _without_speakers(trials, subset, known)
    n_unknown = speakers.count(UNKNOWN)
    # A clip of unknown speaker is drawn with its copies only.
    levels = [
        speaker if speaker != UNKNOWN else f"utterance {protocols.source_utterance(name)}"
        for speaker, name in zip(speakers, trials.names, strict=True)
    ]
    name = "speaker" if not n_unknown else f"speaker ({n_unknown} trials: utterance)"
    units = _one("speaker", levels, _corpus_of)._replace(name=name)
    attacks = _attacks(trials)
    if attacks is None:
        return units
    return Units(
        [*units.factors, *attacks.factors],
        [*units.names, *attacks.names],
        f"{name} x attack",
    )


def _without_speakers(trials: Scores, subset: str, known: set[str]) -> Units:
    units = _of_utterances(trials, subset)
    if known:
        return units._replace(name=f"{units.name}: all of one speaker, says nothing of others")
    if units.name == "trial":
        return units._replace(name=UNKNOWN_SPEAKERS)
    return units._replace(name=f"{units.name}: speakers unknown, likely too narrow")


def _attacks(trials: Scores) -> Units | None:
    if not trials.attacks:
        return None
    attacks = np.array(trials.attacks, dtype=object)
    attacks[trials.is_real] = UNKNOWN  # L1..L3 stand on Codecfake's real rows too
    names, codes = np.unique(attacks.astype(str), return_inverse=True)
    untouched = names == UNKNOWN
    if len(names) - untouched.sum() < FEWEST_ATTACKS:
        return None
    if (attacks[~trials.is_real] == UNKNOWN).any():
        return None
    numbers = np.cumsum(~untouched) - 1
    numbers[untouched] = NO_LEVEL
    factor = Factor("attack", numbers[codes], np.zeros(int((~untouched).sum()), dtype=np.int64))
    return Units([factor], [names[~untouched].tolist()], "attack")


def _of_utterances(trials: Scores, subset: str) -> Units:
    if is_codecfake(subset):
        sources = [protocols.source_utterance(name) for name in trials.names]
        if len(set(sources)) < len(sources):
            return _one("source utterance", sources)
    return _one("trial", trials.names)


def _of_file(trials: Scores, clusters: dict[str, str]) -> Units:
    lacking = [name for name in trials.names if name not in clusters]
    if lacking:
        raise InputError(
            f"--cluster_by: {len(lacking)} trials are in no cluster (first: {lacking[0][:60]}); "
            "list all trials, or draw speakers"
        )
    return _one("cluster", [clusters[name] for name in trials.names])


def _one(kind: str, levels: Sequence[str], stratum_of: Callable[[str], int] | None = None) -> Units:
    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(level, len(numbers)) for level in levels], dtype=np.int64)
    strata = np.zeros(len(numbers), dtype=np.int64)
    if stratum_of:
        strata = np.array([stratum_of(level) for level in numbers], dtype=np.int64)
    return Units([Factor(kind, codes, strata)], [list(numbers)], kind)


def _corpus_of(speaker: str) -> int:
    """AISHELL-3's speakers are drawn among themselves, and so are VCTK's."""
    return 1 if protocols.AISHELL3_SPEAKER.fullmatch(speaker) else 0


def is_codecfake(subset: str) -> bool:
    return subset in protocols.CODECFAKE_SUBSETS


def corpus_of_subset(subset: str) -> str:
    """Subsets of equal corpus share their speakers: a name means the same person in both."""
    return "codecfake" if is_codecfake(subset) else subset


def join_units(units: Sequence[Units], subsets: Sequence[str]) -> tuple[list[list], list]:
    """One numbering of the levels of several subsets, so that they can be drawn together.

    A subset without a second factor gets one that touches none of its trials.

    Returns:
        (codes per subset and factor, strata per factor), as bootstrap.resample_together() takes.
    """
    n_factors = max(len(of_subset.factors) for of_subset in units)
    codes: list[list[np.ndarray]] = [[] for _ in units]
    strata: list[np.ndarray] = []
    for k in range(n_factors):
        numbers: dict[tuple, int] = {}
        level_strata: list[int] = []
        for number, (of_subset, subset) in enumerate(zip(units, subsets, strict=True)):
            if k >= len(of_subset.factors):
                n = len(of_subset.factors[0].codes)
                codes[number].append(np.full(n, NO_LEVEL, dtype=np.int64))
                continue
            factor, corpus = of_subset.factors[k], corpus_of_subset(subset)
            keys = [(corpus, factor.name, level) for level in of_subset.names[k]]
            renumbered = np.empty(len(keys) + 1, dtype=np.int64)
            renumbered[NO_LEVEL] = NO_LEVEL
            for level, key in enumerate(keys):
                if key not in numbers:
                    numbers[key] = len(numbers)
                    level_strata.append(_stratum(corpus, factor, level))
                renumbered[level] = numbers[key]
            codes[number].append(renumbered[factor.codes])
        strata.append(np.array(level_strata, dtype=np.int64))
    return codes, strata


def _stratum(corpus: str, factor: Factor, level: int) -> int:
    """Corpora are drawn apart, and a factor's strata within them."""
    corpora = ("codecfake", "19LA", "ITW")
    number = corpora.index(corpus) if corpus in corpora else len(corpora)
    return 4 * number + int(factor.strata[level])


def share_levels(units: Sequence[Units], subsets: Sequence[str]) -> np.ndarray:
    """(S, S) bool: which subsets have a level in common, so that their errors may go together."""
    levels = [
        {(corpus_of_subset(subset), level) for names in of_subset.names for level in names}
        for of_subset, subset in zip(units, subsets, strict=True)
    ]
    return np.array([[bool(a & b) for b in levels] for a in levels])
