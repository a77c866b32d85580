"""Bootstrap intervals and paired tests. Run: python -m pytest tests/test_bootstrap.py"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_metrics import compute_det_curve, compute_eer
from evaluation import bootstrap
from formats.score_files import Scores


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 4)), min_size=2, max_size=25
    ),
    st.integers(0, 99),
)
def test_a_resample_has_the_eer_of_the_trials_it_repeats(rows, seed):
    scores, is_real, clusters = (np.array(column) for column in zip(*rows))
    if is_real.all() or not is_real.any():
        return
    clusters = np.unique(clusters, return_inverse=True)[1]
    order, strata = bootstrap._stratify(is_real, clusters)
    weights = bootstrap._draw(np.random.default_rng(seed), strata, 4)
    eers = bootstrap.resample_eers([scores.astype(float)], is_real, clusters, 4, seed)[:, 0]
    for weight, eer in zip(weights[:, order[clusters]], eers):
        repeated = np.repeat(scores, weight), np.repeat(is_real, weight)
        assert eer == pytest.approx(
            compute_eer(repeated[0][repeated[1]], repeated[0][~repeated[1]])[0], abs=1e-12
        )


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
)
def test_det_resamples_hold_the_frr_where_the_far_has_fallen_far_enough(real, fake):
    trials = Scores([], np.array(real + fake, float), np.arange(len(real) + len(fake)) < len(real))
    goals = np.array([0.05, 0.3, 0.9])
    weights = bootstrap._draw(np.random.default_rng(7), np.array([len(real), len(fake)]), 3)
    frrs = bootstrap.resample_det(trials, np.arange(len(trials.scores)), goals, 3, seed=7)
    for weight, found in zip(weights, frrs):
        frr, far, _ = compute_det_curve(
            np.repeat(real, weight[: len(real)]), np.repeat(fake, weight[len(real) :])
        )
        assert found == pytest.approx([frr[np.argmax(far <= goal + 1e-12)] for goal in goals])


def test_clusters_are_a_real_clip_with_its_copies_in_codecfake_only():
    names = ["x.wav", "F01_x.wav", "y.wav", "L1_p335_035.wav", "p335_035.wav", "F02_x.wav"]
    clusters, unit = bootstrap.find_clusters(names, "C1")
    assert clusters.tolist() == [0, 0, 1, 2, 2, 0] and unit == "source utterance"
    clusters, unit = bootstrap.find_clusters(names, "19LA")
    assert clusters.tolist() == list(range(6)) and unit == "trial"
    assert bootstrap.find_clusters(["v1.wav", "v2.wav"], "A3")[1] == "trial"


def test_clusters_are_drawn_whole():
    # Real and fake of a pair are both wrong or both right: drawn together, FRR and FAR are equal and
    # the EER is the share of wrong pairs; drawn apart, it is the mean of two shares.
    n = 60
    wrong = np.arange(n) < 12
    scores = np.concatenate([np.where(wrong, 0.0, 3.0), np.where(wrong, 2.0, -1.0)])
    is_real, clusters = np.arange(2 * n) < n, np.tile(np.arange(n), 2)
    together = bootstrap.resample_eers([scores], is_real, clusters, 500)[:, 0]
    apart = bootstrap.resample_eers([scores], is_real, np.arange(2 * n), 500)[:, 0]
    assert np.allclose(together * n, np.round(together * n))
    assert not np.allclose(apart * n, np.round(apart * n))


def test_equal_seeds_give_equal_resamples_whatever_other_system_is_there():
    rng = np.random.default_rng(3)
    scores, is_real = rng.normal(size=(2, 90)), np.arange(90) < 30
    both = bootstrap.resample_eers(list(scores), is_real, np.arange(90), 20, seed=5)
    assert np.array_equal(
        both[:, :1], bootstrap.resample_eers([scores[0]], is_real, np.arange(90), 20, seed=5)
    )
    assert np.array_equal(
        both[:, 1:], bootstrap.resample_eers([scores[1]], is_real, np.arange(90), 20, seed=5)
    )
    assert not np.array_equal(
        both, bootstrap.resample_eers(list(scores), is_real, np.arange(90), 20, seed=6)
    )


@pytest.mark.parametrize("n_pairs, n_real, n_fake", [(0, 200, 200), (400, 0, 0)])
def test_intervals_of_95_percent_cover_the_truth_in_93_to_97_of_100_cases(n_pairs, n_real, n_fake):
    rng = np.random.default_rng(0)
    truth, n_runs = 0.1, 1000
    shift = -2 * NormalDist().inv_cdf(
        truth
    )  # the EER of N(shift, 1) and N(0, 1) is the density beyond shift / 2
    n_real, n_fake = n_real or n_pairs, n_fake or n_pairs
    is_real = np.arange(n_real + n_fake) < n_real
    clusters = np.tile(np.arange(n_pairs), 2) if n_pairs else np.arange(n_real + n_fake)
    covered = 0
    for seed in range(n_runs):
        noise = rng.normal(size=n_real + n_fake)
        if n_pairs:  # half of the variance is the utterance's own
            noise = np.sqrt(0.5) * (noise + np.tile(rng.normal(size=n_pairs), 2))
        scores = noise + shift * is_real
        low, high = bootstrap.interval(
            bootstrap.resample_eers([scores], is_real, clusters, 200, seed)[:, 0]
        )
        covered += low <= truth <= high
    assert 0.93 <= covered / n_runs <= 0.97


def test_the_interval_of_many_distinct_values_is_their_percentiles():
    values = np.random.default_rng(0).normal(size=20_000)
    assert bootstrap.interval(values) == pytest.approx((-1.96, 1.96), abs=0.05)
    assert bootstrap.interval(np.full(50, 0.25)) == (0.25, 0.25)


def test_p_values_count_the_resamples_on_the_other_side():
    assert bootstrap.p_value(np.array([1.0] * 98 + [-1.0])) == pytest.approx(2 * 2 / 100)
    assert bootstrap.p_value(np.full(99, -1.0)) == pytest.approx(2 / 100)  # never zero
    assert bootstrap.p_value(np.zeros(99)) == 1


def test_holm_by_hand():
    assert bootstrap.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert bootstrap.holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_paired_test_of_equal_systems_rejects_at_its_level():
    rng, rejected, n_runs = np.random.default_rng(1), 0, 300
    is_real = np.arange(200) < 100
    for seed in range(n_runs):
        common = rng.normal(size=200) + 2 * is_real
        systems = [common + rng.normal(size=200) * 0.7 for _ in range(2)]
        eers = bootstrap.resample_eers(systems, is_real, np.arange(200), 200, seed)
        rejected += bootstrap.p_value(eers[:, 0] - eers[:, 1]) < 0.05
    assert rejected / n_runs <= 0.08
