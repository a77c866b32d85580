"""Numbers from scores: arrays in, numbers out. Plain numpy.

Everywhere a higher score means "more likely real": target trials are the real (bona fide) ones,
nontarget trials the fake (spoofed) ones. Rates are fractions, not percent.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from formats.score_files import AsvScores
from runtime.cli import InputError

# ── Error rates ──────────────────────────────────────────────────────────────────────────────────


class ErrorCounts(NamedTuple):
    """Errors at every threshold. A trial is accepted as real when its score is above the threshold.

    K = distinct scores + 1: the first threshold lies just below the lowest score.
    """

    thresholds: np.ndarray  # (K,) float64, ascending
    rejected: np.ndarray  # (K,) real trials at or below the threshold
    accepted: np.ndarray  # (K,) fake trials above it
    n_real: int
    n_fake: int

    @property
    def frr(self) -> np.ndarray:
        """False rejection rate, (K,): from 0 up to 1."""
        return self.rejected / self.n_real

    @property
    def far(self) -> np.ndarray:
        """False acceptance rate, (K,): from 1 down to 0."""
        return self.accepted / self.n_fake


class OperatingPoint(NamedTuple):
    """The errors at one threshold; a trial is accepted as real when its score is above it."""

    threshold: float
    false_rejections: int  # real trials taken for fake
    false_acceptances: int  # fake trials taken for real
    eer: float  # mean of the two rates


def count_errors(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> ErrorCounts:
    """Count both kinds of errors once; EER, AUC, DCF and the DET curve follow from the counts.

    Args:
        target_scores: scores of the real trials, (n,).
        nontarget_scores: scores of the fake trials, (m,).

    Raises:
        InputError (a ValueError): a class without trials, or a score that is not finite.
    """
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    distinct = np.unique(np.concatenate([target, nontarget]))
    rejected = np.searchsorted(np.sort(target), distinct, side="right")
    accepted = nontarget.size - np.searchsorted(np.sort(nontarget), distinct, side="right")
    below_all = np.nextafter(distinct[0], -np.inf)
    return ErrorCounts(
        thresholds=np.concatenate([[below_all], distinct]),
        rejected=np.concatenate([[0], rejected]),
        accepted=np.concatenate([[nontarget.size], accepted]),
        n_real=target.size,
        n_fake=nontarget.size,
    )


def eer_point(counts: ErrorCounts) -> OperatingPoint:
    """The lowest threshold where |FRR - FAR| is least, its errors, the mean of its two rates."""
    # |FRR - FAR| times both class sizes: integers, so that equal differences compare as equal.
    distance = np.abs(counts.rejected * counts.n_fake - counts.accepted * counts.n_real)
    at = int(np.argmin(distance))
    rejected, accepted = int(counts.rejected[at]), int(counts.accepted[at])
    eer = (rejected / counts.n_real + accepted / counts.n_fake) / 2
    return OperatingPoint(float(counts.thresholds[at]), rejected, accepted, eer)


def auc(counts: ErrorCounts) -> float:
    """Area under the ROC curve: how often a real trial outscores a fake one, ties counting half."""
    frr, far = counts.frr, counts.far
    return float(np.sum((far[:-1] - far[1:]) * (2 - frr[:-1] - frr[1:])) / 2)


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
    point = eer_point(count_errors(target_scores, nontarget_scores))
    return point.eer, point.threshold


def compute_det_curve(
    target_scores: ArrayLike, nontarget_scores: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detection error trade-off: both error rates at every distinct score.

    Returns:
        (frr, far, thresholds), each (distinct scores + 1,), thresholds ascending. The first point
        lies just below the lowest score: FRR 0, FAR 1. The last has FRR 1, FAR 0.

    Raises:
        InputError: as compute_eer().
    """
    counts = count_errors(target_scores, nontarget_scores)
    return counts.frr, counts.far, counts.thresholds


def compute_auc(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> float:
    """auc() of two arrays of scores. Raises InputError as compute_eer()."""
    return auc(count_errors(target_scores, nontarget_scores))


def errors_at(
    threshold: float, target_scores: ArrayLike, nontarget_scores: ArrayLike
) -> tuple[int, int]:
    """(false rejections, false acceptances) when real is what scores above the threshold."""
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    return int(np.sum(target <= threshold)), int(np.sum(nontarget > threshold))


class Decisions(NamedTuple):
    """Rates when deciding at one threshold; fractions. Positive, what is detected, is fake.

    A rate whose denominator is 0 is 0: nothing called fake has precision 0.
    """

    accuracy: float
    frr: float  # of the real trials, how many were called fake
    far: float  # of the fake trials, how many were called real
    precision: float  # of those called fake, how many are
    recall: float  # of the fake trials, how many were called fake: 1 - FAR
    f1: float


def decide_at(threshold: float, target_scores: ArrayLike, nontarget_scores: ArrayLike) -> Decisions:
    """What calling real whatever scores above the threshold gives.

    Raises:
        InputError: as compute_eer().
    """
    n_real, n_fake = np.size(target_scores), np.size(nontarget_scores)
    rejected, accepted = errors_at(threshold, target_scores, nontarget_scores)
    caught = n_fake - accepted
    called_fake = caught + rejected
    precision = caught / called_fake if called_fake else 0.0
    recall = caught / n_fake
    return Decisions(
        accuracy=1 - (rejected + accepted) / (n_real + n_fake),
        frr=rejected / n_real,
        far=accepted / n_fake,
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if caught else 0.0,
    )


def arena_eer(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> float:
    """EER by the rule of the Speech Anti-Spoofing Arena, a fraction.

    Its curve has a point for every distinct score, where a trial is accepted at score >= threshold,
    and one above all scores. The EER lies where FRR - FAR first changes sign, by linear
    interpolation between the two points; a difference within 1e-6 counts as none.

    Raises:
        InputError: as compute_eer().
    """
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    thresholds = np.unique(np.concatenate([target, nontarget]))
    rejected = np.searchsorted(np.sort(target), thresholds, side="left")
    below = np.searchsorted(np.sort(nontarget), thresholds, side="left")
    frr = np.append(rejected / target.size, 1.0)
    far = np.append(1 - below / nontarget.size, 0.0)
    difference = frr - far  # from -1 up to 1
    after = int(np.argmax(difference >= -ARENA_TOLERANCE))
    if abs(difference[after]) <= ARENA_TOLERANCE:
        return float((frr[after] + far[after]) / 2)
    before = after - 1
    part = -difference[before] / (difference[after] - difference[before])
    return float(frr[before] + part * (frr[after] - frr[before]))


ARENA_TOLERANCE = 1e-6


def rule_of_three(n_trials: int) -> float:
    """Upper end of the one-sided 95 % interval of an error rate when n trials gave no error.

    (1 - p)^n = 0.05 has the solution p = 3 / n, nearly.
    """
    return min(1.0, 3 / n_trials)


def _both_classes(
    target_scores: ArrayLike, nontarget_scores: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays flat and float64. Raises InputError where no EER exists."""
    return _one_class("target (real)", target_scores), _one_class(
        "nontarget (fake)", nontarget_scores
    )


def _one_class(name: str, scores: ArrayLike) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64).ravel()
    if not scores.size:
        raise InputError(f"expected scores of both classes, got no {name} score")
    not_finite = np.sum(~np.isfinite(scores))
    if not_finite:
        raise InputError(f"expected finite scores, got {not_finite} {name} score(s) that are not")
    return scores


# ── Detection costs ──────────────────────────────────────────────────────────────────────────────

# ASVspoof 5, track 1: the prior and the costs of its detection cost function.
P_SPOOF, C_MISS, C_FA = 0.05, 1.0, 10.0
BAYES_THRESHOLD = -float(np.log(C_MISS * (1 - P_SPOOF) / (C_FA * P_SPOOF)))  # -ln 1.9 = -0.642


def min_dcf(counts: ErrorCounts) -> float:
    """ASVspoof 5's normalised detection cost at the threshold that makes it least."""
    return float(_normalised_dcf(counts.frr, counts.far).min())


def compute_min_dcf(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> float:
    """min_dcf() of two arrays of scores. Raises InputError as compute_eer()."""
    return min_dcf(count_errors(target_scores, nontarget_scores))


def compute_act_dcf(target_llrs: ArrayLike, nontarget_llrs: ArrayLike) -> float:
    """ASVspoof 5's normalised detection cost of log-likelihood ratios at the Bayes threshold.

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


def as_llrs(scores: ArrayLike, probabilities: bool) -> LogOdds:
    """Log odds of probabilities; other scores as they are, none of them saturated."""
    if probabilities:
        return to_log_odds(scores)
    return LogOdds(np.asarray(scores, dtype=np.float64), 0)


def are_probabilities(scores: np.ndarray) -> bool:
    """Whether scores can be probabilities: there are some, and all lie in [0, 1]."""
    return bool(scores.size) and bool(np.all((scores >= 0) & (scores <= 1)))


def to_log_odds(probabilities: ArrayLike) -> LogOdds:
    """ln(p / (1 - p)): the logit difference that softmax took the probabilities from.

    Softmax saturates: an exact 0 or 1 has infinite log odds. It is moved to the nearest number
    inside that float32 can hold (or to the most extreme one present, so that the order stays) and
    counted.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    inside = (p > 0) & (p < 1)
    lowest = min(LOWEST_ABOVE_ZERO, p[inside].min(initial=1))
    highest = max(HIGHEST_BELOW_ONE, p[inside].max(initial=0))
    p = np.clip(p, lowest, highest)
    return LogOdds(np.log(p) - np.log1p(-p), int(np.sum(~inside)))


def min_tdcf_2019(counts: ErrorCounts, asv: AsvScores) -> float:
    """Minimum normalised tandem detection cost in its *legacy* form, that of ASVspoof 2019.

    Kinnunen et al., "t-DCF", Odyssey 2018, eq. (10) and (11), with the costs of the 2019 evaluation
    plan. The revised form of ASVspoof 2021 gives other figures.

    Raises:
        InputError: ASV scores for which the legacy cost is not positive.
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
            "these ASV scores leave a tandem cost of zero or less; the legacy t-DCF is not "
            "defined for them"
        )
    return float((c1 * counts.frr + c2 * counts.far).min() / min(c1, c2))


def compute_min_tdcf_2019(
    target_scores: ArrayLike, nontarget_scores: ArrayLike, asv: AsvScores
) -> float:
    """min_tdcf_2019() of two arrays of scores. Raises InputError as compute_eer(), too."""
    return min_tdcf_2019(count_errors(target_scores, nontarget_scores), asv)


# ── Calibration ──────────────────────────────────────────────────────────────────────────────────


class Calibration(NamedTuple):
    """The affine map s -> slope * s + offset from log odds to log-likelihood ratios."""

    slope: float
    offset: float

    def __call__(self, llrs: np.ndarray) -> np.ndarray:
        return self.slope * llrs + self.offset


def are_separated(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> bool:
    """Whether a threshold separates the classes: then no finite slope fits best."""
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    return bool(target.min() > nontarget.max() or target.max() < nontarget.min())


def fit_calibration(dev_llrs: np.ndarray, is_real: np.ndarray) -> Calibration:
    """Logistic regression (scikit-learn) with equal class weights: its log odds are then LLRs.

    Args:
        dev_llrs: (N,) log odds of development trials of both classes.
        is_real: (N,) bool.
    """
    from sklearn.linear_model import LogisticRegression

    centre, scale = np.mean(dev_llrs), np.std(dev_llrs) or 1.0
    # C: nearly unregularised, yet finite where the two classes can be separated.
    model = LogisticRegression(C=1e6, class_weight="balanced", max_iter=10_000, tol=1e-10)
    model.fit(((dev_llrs - centre) / scale)[:, None], is_real)
    slope = model.coef_[0, 0] / scale
    return Calibration(float(slope), float(model.intercept_[0] - slope * centre))


class Reliability(NamedTuple):
    """Predicted against observed frequency of real trials, (bins,) each; NaN in empty bins."""

    predicted: np.ndarray  # mean probability of being real, both classes weighted equally
    observed: np.ndarray  # proportion of real trials, likewise
    count: np.ndarray  # trials


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
    with np.errstate(invalid="ignore"):  # 0 / 0 in empty bins
        predicted = np.bincount(bins, weights * probabilities, n_bins) / weight
        observed = np.bincount(bins, weights * is_real, n_bins) / weight
    return Reliability(predicted, observed, np.bincount(bins, minlength=n_bins))
