"""How far an EER would move if other utterances of the same kind had been recorded: bootstrap intervals.

Clusters of trials are drawn with replacement. In Codecfake the fake `F01_x.wav` is a copy of the real
`x.wav`: the two share speaker, text and microphone, so they are drawn together. Elsewhere each trial
is a cluster of its own, the plain bootstrap. Clusters with real trials only, with fake ones only and
with both are drawn separately, so that no resample lacks a class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from formats.score_files import Scores

N_RESAMPLES = 1000
COVERAGE = 0.95
BLOCK = 2**18  # trials weighted at once: 1 MiB of int32, which a core's cache holds

COPY_PREFIX = re.compile(r"(?:F\d\d|[LA]\d)_")  # codec F01..F07, audio-language-model set L1..L3


def find_clusters(names: Sequence[str], subset: str) -> tuple[np.ndarray, str]:
    """Which trials stem from one utterance.

    Returns:
        (clusters, unit): (N,) cluster number of each trial from 0, and what a cluster is, in words:
        "source utterance", or "trial" outside Codecfake and where no two trials share a source.
    """
    if subset[0] in "CA":
        numbers: dict[str, int] = {}
        clusters = np.array(
            [numbers.setdefault(COPY_PREFIX.sub("", name, count=1), len(numbers)) for name in names]
        )
        if len(numbers) < len(names):
            return clusters, "source utterance"
    return np.arange(len(names)), "trial"


def resample_eers(
    systems: Sequence[np.ndarray],
    is_real: np.ndarray,
    clusters: np.ndarray,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """EER of every resample, by compute_eer()'s rule.

    Args:
        systems: scores of one or more systems on the same trials, each (N,). All systems see the same
            resamples, so that differences between them can be judged pair by pair.
        is_real: (N,) bool. Both classes must be present.
        clusters: (N,) cluster of each trial, numbered from 0 without gaps.
        n_resamples: B.
        seed: equal seeds give equal resamples.

    Returns:
        (B, len(systems)) fractions.
    """
    rng = np.random.default_rng(seed)
    order, strata = _stratify(is_real, clusters)
    rankings = [_rank(scores, is_real, order[clusters]) for scores in systems]
    eers = np.empty((n_resamples, len(systems)))
    rows = max(1, BLOCK // len(is_real))
    for start in range(0, n_resamples, rows):
        weights = _draw(rng, strata, min(rows, n_resamples - start))
        for column, ranking in enumerate(rankings):
            eers[start : start + rows, column] = _eers(_cumulate(weights, ranking), ranking)
    return eers


def resample_det(
    trials: Scores, clusters: np.ndarray, far: np.ndarray, n_resamples: int = 200, seed: int = 0
) -> np.ndarray:
    """FRR of every resample where its FAR first falls to each of the given values: (B, len(far)) fractions."""
    rng = np.random.default_rng(seed)
    order, strata = _stratify(trials.is_real, clusters)
    ranking = _rank(trials.scores, trials.is_real, order[clusters])
    frr = np.empty((n_resamples, len(far)))
    rows = max(1, BLOCK // len(trials.scores))
    for start in range(0, n_resamples, rows):
        weights = _cumulate(_draw(rng, strata, min(rows, n_resamples - start)), ranking)
        n_fake = weights.n_fake
        most = far * n_fake  # fakes accepted at each goal, (rows, len(far))
        at = _first(weights, ranking, lambda below: n_fake - below.fake <= most, len(far))
        frr[start : start + rows] = _at(weights, ranking, at).real / weights.n_real
    return frr


def interval(values: np.ndarray) -> tuple[float, float]:
    """The percentile interval: what lies between holds COVERAGE of the values.

    EERs of few trials take few values, and whole ones at both ends would hold too much. Hence mid-P
    percentiles: half of the resamples at a value count as below it.
    """
    distinct, counts = np.unique(values, return_counts=True)
    below = (np.cumsum(counts) - counts / 2) / len(values)
    low, high = np.interp([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], below, distinct)
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided: how often resampling takes a difference to the other side of zero. Never exactly 0."""
    smaller = min(np.sum(differences <= 0), np.sum(differences >= 0))
    return min(1.0, 2 * (smaller + 1) / (len(differences) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for looking at several subsets: adjusted p-values, in the given order."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted


# ── Weighted trials ──────────────────────────────────────────────────────────────────────────────


class _Ranking(NamedTuple):
    """One system's trials, each class in the order of its scores. K = distinct scores + 1."""

    real_clusters: np.ndarray  # (n_real,) cluster of each real trial
    fake_clusters: np.ndarray  # (n_fake,)
    n_real_below: np.ndarray  # (K,) real trials at or below each threshold
    n_fake_below: np.ndarray  # (K,)


class _Weights(NamedTuple):
    """Cumulative weights of resamples: [:, n] is the weight of the n lowest trials of the class."""

    real: np.ndarray  # (rows, n_real + 1)
    fake: np.ndarray  # (rows, n_fake + 1)

    @property
    def n_real(self) -> np.ndarray:
        """Size of the real class in each resample, (rows, 1)."""
        return self.real[:, -1:]

    @property
    def n_fake(self) -> np.ndarray:
        return self.fake[:, -1:]


def _stratify(is_real: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(new number of each cluster, such that those of one kind are adjacent; size of each kind)."""
    has_real = np.bincount(clusters, weights=is_real) > 0
    has_fake = np.bincount(clusters, weights=~is_real) > 0
    kind = has_real + 2 * has_fake
    numbers = np.empty(len(kind), dtype=np.int64)
    numbers[np.argsort(kind, kind="stable")] = np.arange(len(kind))
    return numbers, np.unique(kind, return_counts=True)[1]


def _rank(scores: np.ndarray, is_real: np.ndarray, clusters: np.ndarray) -> _Ranking:
    thresholds = np.concatenate([[-np.inf], np.unique(scores)])
    sides = []
    for side in (is_real, ~is_real):
        order = np.argsort(scores[side], kind="stable")
        n_below = np.searchsorted(scores[side][order], thresholds, side="right")
        sides.append((clusters[side][order], n_below))
    (real_clusters, n_real_below), (fake_clusters, n_fake_below) = sides
    return _Ranking(real_clusters, fake_clusters, n_real_below, n_fake_below)


def _draw(rng: np.random.Generator, strata: np.ndarray, rows: int) -> np.ndarray:
    """How often each cluster is drawn in each of some resamples: (rows, clusters)."""
    weights, row = [], np.arange(rows)[:, None]
    for size in strata:
        drawn = rng.integers(size, size=(rows, size), dtype=np.int32) + row * size
        counts = np.bincount(drawn.ravel(), minlength=rows * size)
        weights.append(counts.astype(np.int32).reshape(rows, size))
    return np.concatenate(weights, axis=1)


def _cumulate(weights: np.ndarray, ranking: _Ranking) -> _Weights:
    """Cumulative weights of a system's trials from those of the clusters, (rows, clusters)."""
    sides = []
    for clusters in (ranking.real_clusters, ranking.fake_clusters):
        sums = np.zeros((len(weights), len(clusters) + 1), dtype=np.int32)
        # Any other mode than "clip" would take into a copy first.
        np.take(weights, clusters, axis=1, out=sums[:, 1:], mode="clip")
        sides.append(np.cumsum(sums, axis=1, out=sums))
    return _Weights(*sides)


def _at(weights: _Weights, ranking: _Ranking, thresholds: np.ndarray) -> _Weights:
    """Real and fake weight at or below numbered thresholds, (rows, n): int64, ready to multiply."""
    real = np.take_along_axis(weights.real, ranking.n_real_below[thresholds], axis=1)
    fake = np.take_along_axis(weights.fake, ranking.n_fake_below[thresholds], axis=1)
    return _Weights(real.astype(np.int64), fake.astype(np.int64))


def _first(
    weights: _Weights, ranking: _Ranking, reached: Callable[[_Weights], np.ndarray], n_goals: int
) -> np.ndarray:
    """Number of the first threshold where `reached(weights)` holds: (rows, n_goals). By bisection.

    `reached` takes the weights at or below a threshold. It must not hold at the first threshold,
    which is below all scores, must hold at the last, and stay true once it is.
    """
    below = np.zeros((len(weights.real), n_goals), dtype=np.int64)
    above = np.full_like(below, len(ranking.n_real_below) - 1)
    for _ in range(len(ranking.n_real_below).bit_length()):
        middle = (below + above) // 2
        holds = reached(_at(weights, ranking, middle))
        above = np.where(holds, middle, above)
        below = np.where(holds, below, middle)
    return above


def _eers(weights: _Weights, ranking: _Ranking) -> np.ndarray:
    """EER of each resample, (rows,). FRR rises and FAR falls: they differ least where they cross."""
    n_real = weights.n_real.astype(np.int64)
    n_fake = weights.n_fake.astype(np.int64)

    def excess(below: _Weights) -> np.ndarray:
        """(FRR - FAR) times both class sizes."""
        return below.real * n_fake - (n_fake - below.fake) * n_real

    after = _first(weights, ranking, lambda below: excess(below) >= 0, n_goals=1)
    either_side = _at(weights, ranking, np.concatenate([after - 1, after], axis=1))
    distance = np.abs(excess(either_side))
    eers = (either_side.real / n_real + (n_fake - either_side.fake) / n_fake) / 2
    return np.where(distance[:, 0] <= distance[:, 1], eers[:, 0], eers[:, 1])
