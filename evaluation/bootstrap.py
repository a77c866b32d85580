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
BLOCK = 2**18  # trials weighed at once: 2 MiB of int64, which a core's cache holds
FAKE_UNIT = 1 << 32  # cumulative sums count real trials in the low 32 bits, fake ones in the high

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
            eers[start : start + rows, column] = _eers(_cumulate(weights, ranking), ranking.ends)
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
        counts = _cumulate(_draw(rng, strata, min(rows, n_resamples - start)), ranking)
        n_real, n_fake = _unpack(counts[:, -1:])
        at = _first(
            counts, ranking.ends, lambda real, fake: n_fake - fake <= far * n_fake, len(far)
        )
        rejected, _ = _unpack(np.take_along_axis(counts, ranking.ends[at], axis=1))
        frr[start : start + rows] = rejected / n_real
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
    """One system's trials in the order of their scores."""

    clusters: np.ndarray  # (N,) whose weight each trial has
    units: np.ndarray  # (N,) 1 if real, FAKE_UNIT if fake
    ends: np.ndarray  # (distinct scores + 1,) how many trials lie at or below each threshold


def _stratify(is_real: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(new number of each cluster, such that those of one kind are adjacent; size of each kind)."""
    has_real = np.bincount(clusters, weights=is_real) > 0
    has_fake = np.bincount(clusters, weights=~is_real) > 0
    kind = has_real + 2 * has_fake
    numbers = np.empty(len(kind), dtype=np.int64)
    numbers[np.argsort(kind, kind="stable")] = np.arange(len(kind))
    return numbers, np.unique(kind, return_counts=True)[1]


def _rank(scores: np.ndarray, is_real: np.ndarray, clusters: np.ndarray) -> _Ranking:
    order = np.argsort(scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=np.inf)) + 1
    return _Ranking(
        clusters[order], np.where(is_real[order], 1, FAKE_UNIT), np.concatenate([[0], ends])
    )


def _draw(rng: np.random.Generator, strata: np.ndarray, rows: int) -> np.ndarray:
    """How often each cluster is drawn in each of some resamples: (rows, clusters)."""
    weights, row = [], np.arange(rows)[:, None]
    for size in strata:
        drawn = rng.integers(size, size=(rows, size), dtype=np.int32) + row * size
        weights.append(np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size))
    return np.concatenate(weights, axis=1)


def _cumulate(weights: np.ndarray, ranking: _Ranking) -> np.ndarray:
    """(rows, N + 1): the weight of the lowest 0, 1, .. N trials, real and fake packed into one number."""
    counts = np.empty((len(weights), len(ranking.clusters) + 1), dtype=np.int64)
    counts[:, 0] = 0
    np.take(
        weights, ranking.clusters, axis=1, out=counts[:, 1:], mode="clip"
    )  # any other mode takes a copy first
    counts[:, 1:] *= ranking.units
    return np.cumsum(counts, axis=1, out=counts)


def _unpack(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return counts & (FAKE_UNIT - 1), counts >> 32


def _first(counts: np.ndarray, ends: np.ndarray, reached: Callable, n_goals: int = 1) -> np.ndarray:
    """Number of the first threshold where `reached(real, fake)` holds: (rows, n_goals). By bisection.

    `reached` takes the weights at or below a threshold, must not hold at the first threshold, which
    is below all scores, must hold at the last, and stay true once it is.
    """
    below = np.zeros((len(counts), n_goals), dtype=np.int64)
    above = np.full_like(below, len(ends) - 1)
    for _ in range(len(ends).bit_length()):
        middle = (below + above) // 2
        holds = reached(*_unpack(np.take_along_axis(counts, ends[middle], axis=1)))
        above = np.where(holds, middle, above)
        below = np.where(holds, below, middle)
    return above


def _eers(counts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """EER of each row. FRR rises and FAR falls with the threshold: they differ least where they cross."""
    n_real, n_fake = _unpack(counts[:, -1:])
    both = n_real * n_fake

    def excess(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
        """(FRR - FAR) times both class sizes."""
        return real * n_fake + fake * n_real - both

    after = _first(counts, ends, lambda real, fake: excess(real, fake) >= 0)
    real, fake = _unpack(
        np.take_along_axis(counts, ends[np.concatenate([after - 1, after], axis=1)], axis=1)
    )
    distance = np.abs(excess(real, fake))
    eers = (real / n_real + (n_fake - fake) / n_fake) / 2
    return np.where(distance[:, 0] <= distance[:, 1], eers[:, 0], eers[:, 1])
