"""Numbers from scores: arrays in, numbers out. Plain numpy.

Everywhere a higher score means "more likely real": target trials are the real (bona fide) ones,
nontarget trials the fake (spoofed) ones. Rates are fractions, not percent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from formats.score_files import AsvScores, Scores
from runtime.cli import InputError

# ── Error rates ──────────────────────────────────────────────────────────────────────────────────


class OperatingPoint(NamedTuple):
    """What deciding at one threshold costs. A trial is accepted as real when its score is above it."""

    threshold: float
    false_rejections: int  # real trials taken for fake
    false_acceptances: int  # fake trials taken for real
    eer: float  # mean of the two rates


def compute_eer(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> tuple[float, float]:
    """Equal error rate as the ASVspoof challenges compute it, with equal scores as one threshold.

    Args:
        target_scores: scores of the real trials, (n,).
        nontarget_scores: scores of the fake trials, (m,).

    Returns:
        (eer, threshold): the mean of false rejection and false acceptance rate, a fraction, at the
        threshold where they differ least; the lowest such threshold.

    Raises:
        InputError (a ValueError): a class without trials, or a score that is not finite.
    """
    point = find_eer_point(target_scores, nontarget_scores)
    return point.eer, point.threshold


def find_eer_point(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> OperatingPoint:
    """compute_eer() with the number of errors of either kind at its threshold."""
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    rejected, accepted, thresholds = _count_errors(target, nontarget)
    # |FRR - FAR| times both class sizes: whole numbers, so that equal differences compare as equal.
    at = int(np.argmin(np.abs(rejected * nontarget.size - accepted * target.size)))
    eer = (rejected[at] / target.size + accepted[at] / nontarget.size) / 2
    return OperatingPoint(float(thresholds[at]), int(rejected[at]), int(accepted[at]), float(eer))


def compute_det_curve(
    target_scores: ArrayLike, nontarget_scores: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detection error trade-off: both error rates at every distinct score.

    Returns:
        (frr, far, thresholds), each (distinct scores + 1,), thresholds ascending. The first point lies
        just below the lowest score: FRR 0, FAR 1. The last has FRR 1, FAR 0.

    Raises:
        InputError: as compute_eer().
    """
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    rejected, accepted, thresholds = _count_errors(target, nontarget)
    return rejected / target.size, accepted / nontarget.size, thresholds


def compute_auc(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> float:
    """Area under the ROC curve: how often a real trial outscores a fake one, ties counting half."""
    frr, far, _ = compute_det_curve(target_scores, nontarget_scores)
    return float(np.sum((far[:-1] - far[1:]) * (2 - frr[:-1] - frr[1:])) / 2)


def errors_at(
    threshold: float, target_scores: ArrayLike, nontarget_scores: ArrayLike
) -> tuple[int, int]:
    """(false rejections, false acceptances) when a trial is accepted as real above the threshold."""
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    return int(np.sum(target <= threshold)), int(np.sum(nontarget > threshold))


def rule_of_three(n_trials: int) -> float:
    """Upper end of the one-sided 95 % interval of an error rate when n trials gave no error.

    (1 - p)^n = 0.05 has the solution p = 3 / n, nearly.
    """
    return min(1.0, 3 / n_trials)


def _both_classes(
    target_scores: ArrayLike, nontarget_scores: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """The two as flat float64 arrays, once they are sure to have an EER."""
    arrays = []
    for name, scores in (("target (real)", target_scores), ("nontarget (fake)", nontarget_scores)):
        scores = np.asarray(scores, dtype=np.float64).ravel()
        if not scores.size:
            raise InputError(f"expected scores of both classes, got no {name} score")
        if not np.isfinite(scores).all():
            raise InputError(
                f"expected finite scores, got {np.sum(~np.isfinite(scores))} {name} score(s) that are not"
            )
        arrays.append(scores)
    return arrays[0], arrays[1]


def _count_errors(
    target: np.ndarray, nontarget: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(false rejections, false acceptances, thresholds), each (distinct scores + 1,)."""
    distinct = np.unique(np.concatenate([target, nontarget]))
    rejected = np.searchsorted(np.sort(target), distinct, side="right")
    accepted = nontarget.size - np.searchsorted(np.sort(nontarget), distinct, side="right")
    below_all = np.nextafter(distinct[0], -np.inf)
    return (
        np.concatenate([[0], rejected]),
        np.concatenate([[nontarget.size], accepted]),
        np.concatenate([[below_all], distinct]),
    )


# ── Detection costs ──────────────────────────────────────────────────────────────────────────────

# ASVspoof 5, track 1: the prior and the costs of its detection cost function.
P_SPOOF, C_MISS, C_FA = 0.05, 1.0, 10.0
BAYES_THRESHOLD = -float(np.log(C_MISS * (1 - P_SPOOF) / (C_FA * P_SPOOF)))  # -ln 1.9 = -0.642


def compute_min_dcf(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> float:
    """ASVspoof 5's normalised detection cost at the threshold that makes it least."""
    frr, far, _ = compute_det_curve(target_scores, nontarget_scores)
    return float(_normalised_dcf(frr, far).min())


def compute_act_dcf(target_llrs: ArrayLike, nontarget_llrs: ArrayLike) -> float:
    """ASVspoof 5's normalised detection cost of log-likelihood ratios, decided at the Bayes threshold.

    As in the challenge's evaluation package, a trial exactly at the threshold is accepted here.
    """
    target, nontarget = _both_classes(target_llrs, nontarget_llrs)
    return float(
        _normalised_dcf(np.mean(target < BAYES_THRESHOLD), np.mean(nontarget >= BAYES_THRESHOLD))
    )


def compute_cllr(target_llrs: ArrayLike, nontarget_llrs: ArrayLike) -> float:
    """Cost of log-likelihood ratios, in bits: 0 is perfect, 1 is what "always 0" costs."""
    target, nontarget = _both_classes(target_llrs, nontarget_llrs)
    nats = np.mean(np.logaddexp(0, -target)) + np.mean(np.logaddexp(0, nontarget))
    return float(nats / (2 * np.log(2)))


def _normalised_dcf(frr: ArrayLike, far: ArrayLike) -> np.ndarray:
    miss, fa = C_MISS * (1 - P_SPOOF), C_FA * P_SPOOF
    return (miss * np.asarray(frr) + fa * np.asarray(far)) / min(miss, fa)


# Float32 softmax rounds to 1 what is within 2^-25 of it, and to 0 what is below 2^-150.
HIGHEST_BELOW_ONE = 1 - 2.0**-24
LOWEST_ABOVE_ZERO = 2.0**-149


class LogOdds(NamedTuple):
    llrs: np.ndarray  # (N,) natural logarithms
    n_saturated: int  # probabilities of exactly 0 or 1, moved to the nearest float32 inside


def are_probabilities(scores: np.ndarray) -> bool:
    """Whether a file's scores must be probabilities: all of them lie in [0, 1]."""
    return bool(scores.size) and bool(np.all((scores >= 0) & (scores <= 1)))


def to_log_odds(probabilities: ArrayLike) -> LogOdds:
    """ln(p / (1 - p)): the logit difference that softmax took the probabilities from.

    Softmax saturates: an exact 0 or 1 has infinite log odds. It is moved to the nearest number inside
    that float32 can hold (or to the most extreme one present, so that the order stays) and counted.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    inside = (p > 0) & (p < 1)
    lowest = min(LOWEST_ABOVE_ZERO, p[inside].min(initial=1))
    highest = max(HIGHEST_BELOW_ONE, p[inside].max(initial=0))
    p = np.clip(p, lowest, highest)
    return LogOdds(np.log(p) - np.log1p(-p), int(np.sum(~inside)))


def compute_min_tdcf_2019(
    target_scores: ArrayLike, nontarget_scores: ArrayLike, asv: AsvScores
) -> float:
    """Minimum normalised tandem detection cost in its *legacy* form, that of ASVspoof 2019.

    Kinnunen et al., "t-DCF", Odyssey 2018, eq. (10) and (11), with the 2019 evaluation plan's costs.
    The revised form of ASVspoof 2021 gives other figures.
    """
    p_spoof, c_miss_asv, c_fa_asv, c_miss_cm, c_fa_cm = 0.05, 1, 10, 1, 10
    p_target, p_nontarget = (1 - p_spoof) * 0.99, (1 - p_spoof) * 0.01

    _, asv_threshold = compute_eer(asv.target, asv.nontarget)
    asv_miss = np.mean(asv.target < asv_threshold)
    asv_fa = np.mean(asv.nontarget >= asv_threshold)
    asv_spoof_miss = np.mean(asv.spoof < asv_threshold)

    c1 = p_target * (c_miss_cm - c_miss_asv * asv_miss) - p_nontarget * c_fa_asv * asv_fa
    c2 = c_fa_cm * p_spoof * (1 - asv_spoof_miss)
    if min(c1, c2) <= 0:
        raise InputError(
            "these ASV scores leave a tandem cost of zero or less; the legacy t-DCF is not defined for them"
        )
    frr, far, _ = compute_det_curve(target_scores, nontarget_scores)
    return float((c1 * frr + c2 * far).min() / min(c1, c2))


# ── Calibration ──────────────────────────────────────────────────────────────────────────────────


class Calibration(NamedTuple):
    """The affine map s -> slope * s + offset from log odds to log-likelihood ratios."""

    slope: float
    offset: float

    def __call__(self, llrs: np.ndarray) -> np.ndarray:
        return self.slope * llrs + self.offset


def fit_calibration(dev_llrs: np.ndarray, is_real: np.ndarray) -> Calibration:
    """Logistic regression (scikit-learn) with both classes of equal weight: its log odds are then LLRs.

    Args:
        dev_llrs: (N,) log odds of development trials of both classes.
        is_real: (N,) bool.
    """
    from sklearn.linear_model import LogisticRegression

    centre, scale = np.mean(dev_llrs), np.std(dev_llrs) or 1.0
    # C: nearly unregularised, yet finite where the two classes can be separated.
    model = LogisticRegression(C=1e6, class_weight="balanced", max_iter=1000)
    model.fit(((dev_llrs - centre) / scale)[:, None], is_real)
    slope = model.coef_[0, 0] / scale
    return Calibration(float(slope), float(model.intercept_[0] - slope * centre))


class Reliability(NamedTuple):
    """How often trials said to be real with some probability are real. One entry a bin that has trials."""

    said: np.ndarray  # mean probability of being real
    found: np.ndarray  # share of real trials among them, classes weighted equally
    count: np.ndarray


def reliability(real_llrs: np.ndarray, fake_llrs: np.ndarray, n_bins: int = 10) -> Reliability:
    """Bins of equal width over the probability of being real at even odds, 1 / (1 + exp(-llr)).

    The two classes weigh the same however many trials they have, since an LLR speaks of even odds.
    """
    llrs = np.concatenate([real_llrs, fake_llrs])
    is_real = np.arange(len(llrs)) < len(real_llrs)
    weights = np.where(is_real, 0.5 / len(real_llrs), 0.5 / len(fake_llrs))
    probabilities = 1 / (1 + np.exp(-np.clip(llrs, -700, 700)))
    bins = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    weight = np.bincount(bins, weights, n_bins)
    filled = weight > 0
    said = np.bincount(bins, weights * probabilities, n_bins)[filled] / weight[filled]
    found = np.bincount(bins, weights * is_real, n_bins)[filled] / weight[filled]
    return Reliability(said, found, np.bincount(bins, minlength=n_bins)[filled])


def holds_probabilities(files: list[Scores]) -> bool:
    """Whether a model's score files hold probabilities: not one score of theirs lies outside [0, 1]."""
    return all(are_probabilities(trials.scores) for trials in files if len(trials.scores))


def as_llrs(scores: np.ndarray, probabilities: bool) -> tuple[np.ndarray, int]:
    """(log odds, how many probabilities were saturated); scores that are no probabilities stay as they are."""
    return tuple(to_log_odds(scores)) if probabilities else (scores, 0)
