"""From scores to log-likelihood ratios: log odds of probabilities, and logistic regression on a dev set."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eval_metrics import Scores, are_probabilities, to_log_odds


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

    said: np.ndarray           # mean probability of being real
    found: np.ndarray          # share of real trials among them, classes weighted equally
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
