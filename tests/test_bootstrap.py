"""Bootstrap intervals and paired tests. Run: python -m pytest tests/test_bootstrap.py"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_metrics import compute_det_curve, compute_eer
from evaluation import bootstrap, results
from evaluation.bootstrap import NO_LEVEL, Factor, Sample
from evaluation.units import find_units
from formats.score_files import Scores


def trials_of(n: int) -> Factor:
    """Each trial is a cluster of its own."""
    return Factor("trial", np.arange(n), np.zeros(n, dtype=int))


def factor_of(codes) -> Factor:
    codes = np.asarray(codes)
    return Factor("cluster", codes, np.zeros(codes.max() + 1, dtype=int))


def draw(factors, is_real, n_resamples, seed):
    """The weights of the trials in each resample, (B, N): products of what is drawn."""
    strata = [bootstrap._strata_of_kinds(factor, is_real) for factor in factors]
    blocks = bootstrap._draw_blocks(strata, len(is_real), n_resamples, seed)
    drawn = [np.concatenate(columns) for columns in zip(*blocks, strict=True)]
    weights = [w[:, factor.codes] for w, factor in zip(drawn, factors, strict=True)]
    return np.prod(weights, axis=0)


def eer_of(weight, scores, is_real):
    repeated, labels = np.repeat(scores, weight), np.repeat(is_real, weight)
    return compute_eer(repeated[labels], repeated[~labels])[0]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 4)), min_size=2, max_size=25
    ),
    st.integers(0, 99),
)
def test_a_resample_has_the_eer_of_the_trials_it_repeats(rows, seed):
    scores, is_real, clusters = (np.array(column) for column in zip(*rows, strict=True))
    if is_real.all() or not is_real.any():
        return
    factor = factor_of(np.unique(clusters, return_inverse=True)[1])
    eers = bootstrap.resample_eers([scores.astype(float)], is_real, [factor], 4, seed)[:, 0]
    for weight, eer in zip(draw([factor], is_real, 4, seed), eers, strict=True):
        if not weight[is_real].any() or not weight[~is_real].any():
            assert np.isnan(eer)
        else:
            assert eer == pytest.approx(eer_of(weight, scores, is_real), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 999))
def test_two_factors_weigh_a_trial_by_the_product_of_both(seed):
    rng = np.random.default_rng(seed)
    is_real, scores = np.arange(60) < 20, rng.integers(0, 9, 60).astype(float)
    speaker = factor_of(np.append(rng.integers(0, 4, 56), np.arange(4)))
    attack_codes = np.where(is_real, NO_LEVEL, np.arange(60) % 3)
    attack = Factor("attack", attack_codes, np.zeros(3, dtype=int))
    eers = bootstrap.resample_eers([scores], is_real, [speaker, attack], 5, seed)[:, 0]
    strata = [bootstrap._strata_of_kinds(factor, is_real) for factor in (speaker, attack)]
    (block,) = bootstrap._draw_blocks(strata, 60, 5, seed)
    for by_speaker, by_attack, eer in zip(*block, eers, strict=True):
        assert by_attack[:3].sum() == 3  # three attacks are drawn with replacement
        of_attack = np.where(is_real, 1, by_attack[attack_codes])
        weight = by_speaker[speaker.codes] * of_attack
        if weight[is_real].any() and weight[~is_real].any():
            assert eer == pytest.approx(eer_of(weight, scores, is_real), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=8),
    st.lists(st.integers(0, 5), min_size=2, max_size=8),
)
def test_det_resamples_hold_the_frr_where_the_far_has_fallen_far_enough(real, fake):
    n = len(real) + len(fake)
    is_real, factor = np.arange(n) < len(real), trials_of(n)
    sample = Sample(np.array(real + fake, float), is_real, [factor.codes])
    goals = np.array([0.05, 0.3, 0.9])
    frrs = bootstrap.resample_det(sample, [factor], goals, 3, seed=7)
    for weight, found in zip(draw([factor], is_real, 3, 7), frrs, strict=True):
        frr, far, _ = compute_det_curve(
            np.repeat(real, weight[: len(real)]), np.repeat(fake, weight[len(real) :])
        )
        assert found == pytest.approx([frr[np.argmax(far <= goal + 1e-12)] for goal in goals])


def test_clusters_are_drawn_whole():
    # Real and fake of a pair are both wrong or both right: drawn together, FRR and FAR are equal
    # and the EER is the share of wrong pairs; drawn apart, it is the mean of two shares.
    n = 60
    wrong = np.arange(n) < 12
    scores = np.concatenate([np.where(wrong, 0.0, 3.0), np.where(wrong, 2.0, -1.0)])
    is_real, pairs = np.arange(2 * n) < n, factor_of(np.tile(np.arange(n), 2))
    together = bootstrap.resample_eers([scores], is_real, [pairs], 500)[:, 0]
    apart = bootstrap.resample_eers([scores], is_real, [trials_of(2 * n)], 500)[:, 0]
    assert np.allclose(together * n, np.round(together * n))
    assert not np.allclose(apart * n, np.round(apart * n))


def test_strata_are_drawn_apart():
    """Of VCTK's and AISHELL-3's speakers, each resample holds as many as there are."""
    names = [f"p{200 + i}_{k}.wav" for i in range(4) for k in range(2)]
    names += [f"SSB000{i}000{k}.wav" for i in range(6) for k in range(2)]
    trials = Scores(names, np.zeros(20), np.arange(20) % 2 == 0)
    (factor,) = find_units(trials, "C1").factors
    strata = bootstrap._strata_of_kinds(factor, trials.is_real)
    assert sorted(map(len, strata)) == [4, 6]
    for weights in bootstrap._draw_blocks([strata], 20, 50, 0):
        for stratum in strata:
            assert (weights[0][:, stratum].sum(axis=1) == len(stratum)).all()


def test_equal_seeds_give_equal_resamples_whatever_other_system_is_there():
    rng = np.random.default_rng(3)
    scores, is_real, factors = rng.normal(size=(2, 90)), np.arange(90) < 30, [trials_of(90)]
    both = bootstrap.resample_eers(list(scores), is_real, factors, 20, seed=5)
    for column in (0, 1):
        alone = bootstrap.resample_eers([scores[column]], is_real, factors, 20, seed=5)
        assert np.array_equal(both[:, column], alone[:, 0])
    other = bootstrap.resample_eers(list(scores), is_real, factors, 20, seed=6)
    assert not np.array_equal(both, other)


# ── Intervals ────────────────────────────────────────────────────────────────────────────────────


def coverage(make, truth, n_runs, unit="speaker", n_resamples=150):
    covered = 0
    for seed in range(n_runs):
        trials = make(np.random.default_rng(seed))
        result = results.evaluate_trials("", "own", None, trials, n_resamples, seed, unit)
        covered += result.interval.low <= 100 * truth <= result.interval.high
    return covered / n_runs


@pytest.mark.parametrize("n_real, n_fake, eer", [(200, 200, 0.1), (400, 400, 0.1)])
def test_intervals_of_trials_cover_the_truth_in_93_to_99_of_100_cases(n_real, n_fake, eer):
    def make(rng):
        shift = -2 * NormalDist().inv_cdf(eer)  # the density beyond shift / 2 is the EER
        scores = np.concatenate([rng.normal(shift, 1, n_real), rng.normal(0, 1, n_fake)])
        names = [f"t{i}" for i in range(len(scores))]
        return Scores(names, scores, np.arange(len(scores)) < n_real)

    assert 0.93 <= coverage(make, eer, 600, "trial") <= 0.99


@pytest.mark.parametrize(
    "n_real, n_fake, eer", [(20, 200, 0.02), (50, 1000, 0.005), (500, 50, 0.01)]
)
def test_intervals_cover_near_zero_with_unequal_classes(n_real, n_fake, eer):
    """Resampling alone covers 0.71, 0.53 and 0.80 there: a class without errors never shows one."""

    def make(rng):
        shift = -2 * NormalDist().inv_cdf(eer)
        scores = np.concatenate([rng.normal(shift, 1, n_real), rng.normal(0, 1, n_fake)])
        names = [f"t{i}" for i in range(len(scores))]
        return Scores(names, scores, np.arange(len(scores)) < n_real)

    assert coverage(make, eer, 200, "trial", 60) >= 0.93


def speakers_and_attacks(rng, n_speakers, n_attacks, effects, distance):
    """Scores of crossed speakers and attacks; over all of them both classes are normal."""
    of_speaker = effects[0] * rng.normal(size=n_speakers)
    of_attack = effects[1] * rng.normal(size=n_attacks)
    real_of = np.repeat(np.arange(n_speakers), 30)
    fake_of = np.repeat(np.arange(n_speakers), 8 * n_attacks)
    attack_of = np.tile(np.arange(n_attacks), 8 * n_speakers)
    real = distance + of_speaker[real_of] + rng.normal(size=len(real_of))
    fake = of_speaker[fake_of] + of_attack[attack_of] + rng.normal(size=len(fake_of))
    scores = np.concatenate([real, fake])
    return Scores(
        [f"t{i}" for i in range(len(scores))],
        scores,
        np.arange(len(scores)) < len(real),
        [f"s{i}" for i in np.concatenate([real_of, fake_of])],
        ["-"] * len(real) + [f"A{i}" for i in attack_of],
    )


@pytest.mark.parametrize(
    "n_speakers, n_attacks, effects, by_trial",
    [(30, 1, (1.2, 0.0), 0.8), (20, 13, (0.4, 0.8), 0.65)],
)
def test_speakers_and_attacks_drawn_cover_where_trials_do_not(
    n_speakers, n_attacks, effects, by_trial
):
    real, fake = np.sqrt(1 + effects[0] ** 2), np.sqrt(1 + effects[0] ** 2 + effects[1] ** 2)
    eer = 0.05
    distance = -NormalDist().inv_cdf(eer) * (real + fake)

    def make(rng):
        return speakers_and_attacks(rng, n_speakers, n_attacks, effects, distance)

    assert coverage(make, eer, 150, "speaker", 100) >= 0.9
    assert coverage(make, eer, 60, "trial", 60) <= by_trial


def test_an_interval_of_one_factor_has_the_standard_error_of_independent_trials():
    """Of many trials and errors, where the percentiles of the resamples are the interval too."""
    rng = np.random.default_rng(1)
    n = 2000
    scores = np.concatenate([rng.normal(2.5, 1, n), rng.normal(0, 1, n)])
    is_real, factor = np.arange(2 * n) < n, trials_of(2 * n)
    sample = Sample(scores, is_real, [factor.codes])
    eer, _ = compute_eer(scores[is_real], scores[~is_real])
    low, high = bootstrap.estimate_interval(eer, sample, [factor], 2000, 0)
    eers = bootstrap.resample_eers([scores], is_real, [factor], 2000, 1)[:, 0]
    expected = np.quantile(eers, [0.025, 0.975])
    assert (low, high) == pytest.approx(expected, abs=0.08 * np.ptp(expected))


def test_few_clusters_widen_an_interval():
    """Five clusters: t with at most 4 degrees of freedom, 2.78 standard errors instead of 1.96."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(2, 1, 100), rng.normal(0, 1, 100)])
    is_real = np.arange(200) < 100
    factor = factor_of(np.tile(np.arange(5), 40))
    sample = Sample(scores, is_real, [factor.codes])
    eer, _ = compute_eer(scores[is_real], scores[~is_real])
    spread = bootstrap.estimate_spread(eer, sample, [factor], 500, 0)
    assert spread.df <= 4 and bootstrap.widening([factor], is_real) > 2.78 / 1.96


def test_clusters_of_unequal_size_count_as_fewer():
    """Kish: (20 + 4 x 5)^2 / (20^2 + 4 x 5^2) = 3.2 of five, less one."""
    factor = factor_of([0] * 20 + [1] * 5 + [2] * 5 + [3] * 5 + [4] * 5)
    is_real = np.arange(40) % 2 == 0
    assert bootstrap._degrees_of_freedom(factor, is_real) == pytest.approx(2.2)


def test_leaving_out_clusters_gives_the_textbook_jackknife():
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(1.5, 1, 60), rng.normal(0, 1, 60)])
    is_real, factor = np.arange(120) < 60, factor_of(np.tile(np.arange(6), 20))

    def log_odds(keep):
        eer, _ = compute_eer(scores[keep & is_real], scores[keep & ~is_real])
        return np.log(eer / (1 - eer))

    whole = log_odds(np.ones(120, dtype=bool))
    left_out = np.array([log_odds(factor.codes != level) for level in range(6)])
    eer, _ = compute_eer(scores[is_real], scores[~is_real])
    found = bootstrap._jackknife(eer, Sample(scores, is_real, []), factor)
    assert found.variance == pytest.approx(5 / 6 * np.sum((left_out - whole) ** 2))


def test_kurtosis_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.array([0.1, 0.2, -0.1, 3.0, 0.0, 0.2, -0.3])
    assert bootstrap._kurtosis(values) == pytest.approx(stats.kurtosis(values, bias=False))
    assert bootstrap._kurtosis(np.array([1.0, 2, 3, 4, 5])) == 0  # flat: never below 0


# ── Percentiles and tests ────────────────────────────────────────────────────────────────────────


def test_the_interval_of_many_distinct_values_is_their_percentiles():
    values = np.random.default_rng(0).normal(size=20_000)
    assert bootstrap.percentile_interval(values) == pytest.approx((-1.96, 1.96), abs=0.05)
    assert bootstrap.percentile_interval(np.full(50, 0.25)) == (0.25, 0.25)


def test_p_values_count_the_resamples_on_the_other_side():
    assert bootstrap.p_value(np.array([1.0] * 98 + [-1.0])) == pytest.approx(2 * 2 / 100)
    assert bootstrap.p_value(np.full(99, -1.0)) == pytest.approx(2 / 100)  # never zero
    assert bootstrap.p_value(np.zeros(99)) == 1


def test_a_sign_test_of_few_clusters_bounds_p():
    """Five clusters, all for one system: 2 / 2^5. None that differ: no evidence at all."""
    assert bootstrap.sign_test_bound(5) == 0.0625
    assert bootstrap.sign_test_bound(1) == bootstrap.sign_test_bound(0) == 1


def test_holm_by_hand():
    assert bootstrap.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert bootstrap.holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_paired_test_of_equal_systems_rejects_at_its_level():
    rng, rejected, n_runs = np.random.default_rng(1), 0, 300
    is_real = np.arange(200) < 100
    for seed in range(n_runs):
        common = rng.normal(size=200) + 2 * is_real
        systems = [common + rng.normal(size=200) * 0.7 for _ in range(2)]
        eers = bootstrap.resample_eers(systems, is_real, [trials_of(200)], 200, seed)
        rejected += bootstrap.p_value(eers[:, 0] - eers[:, 1]) < 0.05
    assert rejected / n_runs <= 0.08


def test_percentiles_agree_with_those_of_confidence_intervals():
    """luferrer/ConfidenceIntervals, where the unit is the same: trials.

    With conditions it also draws the trials within each, which makes its intervals wider.
    """
    package = pytest.importorskip("confidence_intervals", reason="pip install confidence_intervals")
    rng = np.random.default_rng(2)
    is_real = np.arange(2000) % 2 == 0
    scores = 2.5 * is_real + rng.normal(size=2000)

    def metric(labels, samples):
        return compute_eer(samples[labels == 1], samples[labels == 0])[0]

    _, theirs = package.evaluate_with_conf_int(
        scores, metric, is_real.astype(int), num_bootstraps=1000
    )
    eers = bootstrap.resample_eers([scores], is_real, [trials_of(2000)], 1000)[:, 0]
    ours = bootstrap.percentile_interval(eers)
    assert ours == pytest.approx(theirs, abs=0.1 * (theirs[1] - theirs[0]))
