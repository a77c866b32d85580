"""Resampling: how far an EER would move with other speakers, attacks or utterances of that kind.

Clusters of trials are drawn with replacement: the levels of a factor (speakers, attacks, source
utterances, or single trials). With two factors, speaker and attack, each is drawn on its own and a
trial's weight is the product of both (the pigeonhole bootstrap of McCullagh, 2000, and Owen, 2007).
docs/evaluation.md says which unit is drawn where; docs/coverage.md what the intervals cover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from runtime.cli import InputError

N_RESAMPLES = 1000
COVERAGE = 0.95
BLOCK = 2**18  # trials weighted at once: 1 MiB of int32, which a core's cache holds
NO_LEVEL = -1  # code of a trial that a factor does not touch: a real trial has no attack


class Factor(NamedTuple):
    """What is drawn with replacement: L levels, each with its trials."""

    name: str  # "speaker", "attack", "source utterance" or "trial"
    codes: np.ndarray  # (N,) level of each trial, 0 .. L - 1, or NO_LEVEL
    strata: np.ndarray  # (L,) levels of equal number are drawn among themselves

    @property
    def n_levels(self) -> int:
        return len(self.strata)


class Sample(NamedTuple):
    """One system's scores and the level of each of its trials in every factor."""

    scores: np.ndarray  # (N,)
    is_real: np.ndarray  # (N,) bool
    codes: Sequence[np.ndarray]  # per factor (N,)


def resample_eers(
    systems: Sequence[np.ndarray],
    is_real: np.ndarray,
    factors: Sequence[Factor],
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """EER of every resample, by compute_eer()'s rule.

    Args:
        systems: scores of one or more systems on the same trials, each (N,). All systems see the
            same resamples, so that differences between them can be judged pair by pair.
        is_real: (N,) bool. Both classes must be present.
        factors: one, or two whose weights are multiplied.
        n_resamples: B.
        seed: equal seeds give equal resamples.

    Returns:
        (B, len(systems)) fractions; NaN where a resample lacks a class, which two sparse factors
        can give.
    """
    samples = [Sample(scores, is_real, [f.codes for f in factors]) for scores in systems]
    strata = [_strata_of_kinds(factor, is_real) for factor in factors]
    return _resample(samples, strata, n_resamples, seed)


def resample_together(
    samples: Sequence[Sample], strata: Sequence[np.ndarray], n_resamples: int, seed: int
) -> np.ndarray:
    """EERs of samples of different trials whose factors share their levels, drawn together.

    Args:
        samples: whose codes number the levels of all samples in common.
        strata: per factor (L,).

    Returns:
        (B, len(samples)) fractions; NaN where a resample lacks a class.
    """
    return _resample(samples, [_stratum_lists(numbers) for numbers in strata], n_resamples, seed)


def resample_det(
    sample: Sample,
    factors: Sequence[Factor],
    far: np.ndarray,
    n_resamples: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """FRR of every resample where its FAR first falls to each of the given values.

    Returns:
        (B, len(far)) fractions; NaN where a resample lacks a class.
    """
    strata = [_strata_of_kinds(factor, sample.is_real) for factor in factors]
    ranking = _rank(sample)
    blocks = []
    for weights in _draw_blocks(strata, len(sample.scores), n_resamples, seed):
        blocks.append(_frr_at(_cumulate(weights, ranking), ranking, far))
    return np.concatenate(blocks)


def percentile_interval(values: np.ndarray) -> tuple[float, float]:
    """The percentile interval: what lies between holds COVERAGE of the values; NaN is left out.

    EERs of few trials take few values, and whole ones at both ends would hold too much. Hence mid-P
    percentiles: half of the resamples at a value count as below it.
    """
    values = values[~np.isnan(values)]
    distinct, counts = np.unique(values, return_counts=True)
    below = (np.cumsum(counts) - counts / 2) / len(values)
    low, high = np.interp([(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], below, distinct)
    return float(low), float(high)


# ── Intervals ────────────────────────────────────────────────────────────────────────────────────

NO_SPREAD = 1e-9  # a standard error that is rounding only
MOST_JACKKNIFED = 1000  # levels; with more, or with few trials a level, resampling is as good
LEAST_A_LEVEL = 10  # trials, on average
FEW_LEVELS = 50  # with more, the sum of their influences is normal enough


class Spread(NamedTuple):
    """Standard error of the log odds of an EER, and the degrees of freedom of its estimate."""

    se: float
    df: float


def estimate_interval(
    eer: float, sample: Sample, factors: Sequence[Factor], n_resamples: int, seed: int
) -> tuple[float, float]:
    """The COVERAGE interval of an EER; fractions.

    log odds of the EER +- t * standard error: it stays inside [0, 1], and is skewed as EERs are.
    Where nothing varies, both ends are the EER: see results.py for what no error means.
    """
    spread = estimate_spread(eer, sample, factors, n_resamples, seed)
    if spread.se < NO_SPREAD:
        return eer, eer
    from scipy.special import expit, logit, stdtrit

    half_width = stdtrit(spread.df, (1 + COVERAGE) / 2) * spread.se
    centre = logit(_inside(eer, sample))
    low, high = expit(centre - half_width), expit(centre + half_width)
    return min(float(low), eer), max(float(high), eer)


def estimate_spread(
    eer: float, sample: Sample, factors: Sequence[Factor], n_resamples: int, seed: int
) -> Spread:
    """Standard error from the bootstrap, or from leaving out levels one by one if that is larger.

    Few clusters, clusters of very different sizes and single extreme ones make both estimates too
    small on average. Hence the bootstrap's variance is multiplied by G / (G - 1), where G is Kish's
    effective number of levels of the smallest factor, and the degrees of freedom are
    Satterthwaite's. Of fewer than FEW_LEVELS levels, some have most of the influence, and its
    excess kurtosis k makes the variance V less sure: Var(V) / V^2 = 2 / (G - 1) + k / L.
    """
    eers = resample_eers([sample.scores], sample.is_real, factors, n_resamples, seed)[:, 0]
    eers = eers[~np.isnan(eers)]
    if len(eers) < 2:
        raise InputError(
            "the speakers and attacks of these trials are too sparse to be drawn; "
            "draw trials with --cluster_by trial"
        )
    spare = [_degrees_of_freedom(factor, sample.is_real) for factor in factors]
    fewest = min(spare)
    variance = np.var(_log_odds(eers, sample), ddof=1) * (fewest + 1) / fewest
    left_out = [_jackknife(eer, sample, factor) for factor in factors]
    variances = np.array([part.variance for part in left_out])
    if not variances.all():
        return Spread(float(np.sqrt(max(variance, variances.sum()))), fewest)
    unsure = [
        2 / df + part.kurtosis / factor.n_levels
        for df, part, factor in zip(spare, left_out, factors, strict=True)
    ]
    df = 2 * variances.sum() ** 2 / np.sum(variances**2 * unsure)
    return Spread(float(np.sqrt(max(variance, variances.sum()))), max(1.0, float(df)))


def _degrees_of_freedom(factor: Factor, is_real: np.ndarray) -> float:
    """Kish's effective number of levels, (sum of sizes)^2 / sum of squares, less the strata."""
    sizes = np.bincount(factor.codes[factor.codes != NO_LEVEL]).astype(float)
    effective = sizes.sum() ** 2 / np.sum(sizes**2)
    return max(1.0, effective - len(_strata_of_kinds(factor, is_real)))


class _Jackknife(NamedTuple):
    variance: float  # of the log odds; 0 where the factor was not jackknifed
    kurtosis: float  # excess kurtosis of the levels' influence, unbiased, at least 0


def _jackknife(eer: float, sample: Sample, factor: Factor) -> _Jackknife:
    """Each level left out once (delete-one-cluster jackknife, CV3 of MacKinnon et al., 2023)."""
    n = factor.n_levels
    n_trials = int(np.sum(factor.codes != NO_LEVEL))
    if not 4 <= n <= min(MOST_JACKKNIFED, n_trials / LEAST_A_LEVEL):
        return _Jackknife(0.0, 0.0)
    ranking = _rank(sample._replace(codes=[factor.codes]))
    weights = np.ones((n, n + 1), dtype=np.int32)
    np.fill_diagonal(weights, 0)
    rows = max(1, BLOCK // len(sample.scores))
    blocks = [weights[start : start + rows] for start in range(0, n, rows)]
    eers = np.concatenate([_eers(_cumulate([block], ranking), ranking) for block in blocks])
    influence = (_log_odds(np.array([eer]), sample) - _log_odds(eers, sample))[~np.isnan(eers)]
    kurtosis = _kurtosis(influence) if n < FEW_LEVELS else 0.0
    return _Jackknife(float((n - 1) / n * np.sum(influence**2)), kurtosis)


def _kurtosis(values: np.ndarray) -> float:
    """Excess kurtosis without bias for normal values (Joanes and Gill, 1998, G2), at least 0."""
    n, squares = len(values), (values - values.mean()) ** 2
    if n < 4 or not squares.any():
        return 0.0
    biased = np.mean(squares**2) / np.mean(squares) ** 2 - 3
    return max(0.0, float((n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * biased + 6)))


def _inside(eers: np.ndarray | float, sample: Sample) -> np.ndarray:
    """EERs at least half the smallest possible one away from 0 and 1, where log odds end."""
    n_real = int(sample.is_real.sum())
    smallest = 1 / max(n_real, len(sample.is_real) - n_real) / 2
    return np.clip(eers, smallest / 2, 1 - smallest / 2)


def _log_odds(eers: np.ndarray, sample: Sample) -> np.ndarray:
    inside = _inside(eers, sample)
    return np.log(inside) - np.log1p(-inside)


# ── Tests ────────────────────────────────────────────────────────────────────────────────────────


def p_value(differences: np.ndarray) -> float:
    """Two-sided: how often resampling takes a difference to the other side of zero. Never 0."""
    differences = differences[~np.isnan(differences)]
    smaller = min(np.sum(differences <= 0), np.sum(differences >= 0))
    return min(1.0, 2 * (smaller + 1) / (len(differences) + 1))


def widening(factors: Sequence[Factor], is_real: np.ndarray) -> float:
    """By how much resampled differences are too close to the observed one with few clusters.

    sqrt(G / (G - 1)) times t / z, with G Kish's effective number of levels of the smallest factor.
    """
    from scipy.special import stdtrit

    df = min(_degrees_of_freedom(factor, is_real) for factor in factors)
    tail = (1 + COVERAGE) / 2
    return float(np.sqrt((df + 1) / df) * stdtrit(df, tail) / stdtrit(np.inf, tail))


def sign_test_bound(n_clusters: int) -> float:
    """The least two-sided p of a sign test on n clusters in which two systems differ: 2 / 2^n.

    Resampling few clusters promises more than any exact test could: one error more is no evidence.
    """
    return min(1.0, 2.0 ** (1 - n_clusters))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests: adjusted p-values, in the given order."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = highest
    return adjusted


# ── Drawing ──────────────────────────────────────────────────────────────────────────────────────

Strata = list[np.ndarray]  # the levels of each stratum; together all levels of a factor


def _strata_of_kinds(factor: Factor, is_real: np.ndarray) -> Strata:
    """Within the factor's strata, levels with real trials, with fake ones and with both are apart.

    So no resample of one factor lacks a class. A stratum of a single level would never vary: the
    single ones are drawn together.
    """
    touched = factor.codes != NO_LEVEL
    has_real = np.bincount(factor.codes[touched & is_real], minlength=factor.n_levels) > 0
    has_fake = np.bincount(factor.codes[touched & ~is_real], minlength=factor.n_levels) > 0
    return _stratum_lists(4 * factor.strata + has_real + 2 * has_fake)


def _stratum_lists(numbers: np.ndarray) -> Strata:
    order = np.argsort(numbers, kind="stable")
    bounds = np.flatnonzero(np.diff(numbers[order])) + 1
    strata = np.split(order, bounds)
    single = [stratum for stratum in strata if len(stratum) == 1]
    if len(single) < 1 or len(strata) == 1:
        return strata
    larger = [stratum for stratum in strata if len(stratum) > 1]
    if len(single) == 1 and larger:
        single.append(larger.pop())
    return [*larger, np.concatenate(single)]


def _draw_blocks(
    strata: Sequence[Strata], n_trials: int, n_resamples: int, seed: int
) -> Iterator[list[np.ndarray]]:
    """Blocks of resamples: per factor (rows, L + 1), how often each level is drawn.

    The last column is 1, the weight of trials that the factor does not touch: NO_LEVEL indexes it.
    """
    streams = [np.random.default_rng([seed, number]) for number in range(len(strata))]
    rows = max(1, BLOCK // n_trials)
    for start in range(0, n_resamples, rows):
        size = min(rows, n_resamples - start)
        yield [_draw(rng, of_factor, size) for rng, of_factor in zip(streams, strata, strict=True)]


def _draw(rng: np.random.Generator, strata: Strata, rows: int) -> np.ndarray:
    n_levels = sum(map(len, strata))
    weights = np.ones((rows, n_levels + 1), dtype=np.int32)
    row = np.arange(rows)[:, None]
    for levels in strata:
        n = len(levels)
        drawn = rng.integers(n, size=(rows, n), dtype=np.int32) + row * n
        counts = np.bincount(drawn.ravel(), minlength=rows * n)
        weights[:, levels] = counts.reshape(rows, n)
    return weights


# ── Weighted trials ──────────────────────────────────────────────────────────────────────────────


class _Ranking(NamedTuple):
    """One system's trials, each class in the order of its scores. K = distinct scores + 1."""

    real_codes: list[np.ndarray]  # per factor (n_real,)
    fake_codes: list[np.ndarray]  # per factor (n_fake,)
    n_real_below: np.ndarray  # (K,) real trials at or below each threshold
    n_fake_below: np.ndarray  # (K,)


class _Weights(NamedTuple):
    """Cumulative weights of resamples: [:, n] is the weight of the n lowest trials of the class."""

    real: np.ndarray  # (rows, n_real + 1)
    fake: np.ndarray  # (rows, n_fake + 1)

    @property
    def n_real(self) -> np.ndarray:
        """Size of the real class in each resample, (rows, 1)."""
        return self.real[:, -1:].astype(np.int64)

    @property
    def n_fake(self) -> np.ndarray:
        return self.fake[:, -1:].astype(np.int64)


def _resample(
    samples: Sequence[Sample], strata: Sequence[Strata], n_resamples: int, seed: int
) -> np.ndarray:
    rankings = [_rank(sample) for sample in samples]
    largest = max(len(sample.scores) for sample in samples)
    blocks = []
    for weights in _draw_blocks(strata, largest, n_resamples, seed):
        eers = [_eers(_cumulate(weights, ranking), ranking) for ranking in rankings]
        blocks.append(np.stack(eers, axis=1))
    return np.concatenate(blocks)


def _rank(sample: Sample) -> _Ranking:
    thresholds = np.concatenate([[-np.inf], np.unique(sample.scores)])
    sides = []
    for side in (sample.is_real, ~sample.is_real):
        order = np.argsort(sample.scores[side], kind="stable")
        n_below = np.searchsorted(sample.scores[side][order], thresholds, side="right")
        sides.append(([codes[side][order] for codes in sample.codes], n_below))
    (real_codes, n_real_below), (fake_codes, n_fake_below) = sides
    return _Ranking(real_codes, fake_codes, n_real_below, n_fake_below)


def _cumulate(weights: Sequence[np.ndarray], ranking: _Ranking) -> _Weights:
    """Cumulative weights of a system's trials, from those of the levels."""
    sides = []
    for codes in (ranking.real_codes, ranking.fake_codes):
        sums = np.zeros((len(weights[0]), len(codes[0]) + 1), dtype=np.int32)
        _take(weights[0], codes[0], out=sums[:, 1:])
        for of_factor, its_codes in zip(weights[1:], codes[1:], strict=True):
            if (its_codes != NO_LEVEL).any():
                sums[:, 1:] *= _take(of_factor, its_codes)
        sides.append(np.cumsum(sums, axis=1, out=sums))
    return _Weights(*sides)


def _take(weights: np.ndarray, codes: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    # Mode "raise" would take into a copy first; "wrap" sends NO_LEVEL to the last column.
    return np.take(weights, codes, axis=1, out=out, mode="wrap")


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
    """EER of each resample, (rows,). FRR rises, FAR falls: they differ least where they cross."""
    n_real, n_fake = weights.n_real, weights.n_fake

    def excess(below: _Weights) -> np.ndarray:
        """(FRR - FAR) times both class sizes."""
        return below.real * n_fake - (n_fake - below.fake) * n_real

    after = _first(weights, ranking, lambda below: excess(below) >= 0, n_goals=1)
    either_side = _at(weights, ranking, np.concatenate([after - 1, after], axis=1))
    distance = np.abs(excess(either_side))
    with np.errstate(invalid="ignore"):  # 0 / 0: a class is missing
        eers = (either_side.real / n_real + (n_fake - either_side.fake) / n_fake) / 2
    return np.where(distance[:, 0] <= distance[:, 1], eers[:, 0], eers[:, 1])


def _frr_at(weights: _Weights, ranking: _Ranking, far: np.ndarray) -> np.ndarray:
    """FRR where the FAR first falls to each goal, (rows, goals)."""
    n_fake = weights.n_fake
    most = far * n_fake  # fakes accepted at each goal

    def reached(below: _Weights) -> np.ndarray:
        return n_fake - below.fake <= most

    at = _first(weights, ranking, reached, len(far))
    with np.errstate(invalid="ignore"):
        return _at(weights, ranking, at).real / weights.n_real
