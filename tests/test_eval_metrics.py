"""Metrics and score files. Run: python -m pytest tests/test_eval_metrics.py"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_metrics
from eval_metrics import compute_auc, compute_det_curve, compute_eer, count_errors, eer_point
from formats import score_files
from formats.score_files import read_scores, write_scores
from runtime.cli import InputError

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT.parent / "shared" / "reference" / "scores"

few_values = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)  # many ties
any_values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


def official_eer(target, nontarget):
    """The rule word by word, threshold by threshold, in whole numbers: (EER, threshold)."""
    thresholds = [-math.inf, *sorted({*target, *nontarget})]
    n, m = len(target), len(nontarget)

    def errors(threshold):
        return sum(s <= threshold for s in target), sum(s > threshold for s in nontarget)

    best = min(
        thresholds, key=lambda t: abs(errors(t)[0] * m - errors(t)[1] * n)
    )  # min() takes the first
    return (errors(best)[0] / n + errors(best)[1] / m) / 2, best


# ── EER and DET ──────────────────────────────────────────────────────────────────────────────────


@given(few_values | any_values, few_values | any_values)
def test_eer_follows_the_official_rule(target, nontarget):
    eer, threshold = compute_eer(target, nontarget)
    expected, expected_threshold = official_eer(target, nontarget)
    assert eer == pytest.approx(expected, abs=1e-15)
    if math.isfinite(expected_threshold):
        assert threshold == expected_threshold
    else:
        assert threshold < min(target + nontarget)


@pytest.mark.parametrize(
    "target, nontarget, expected",
    [
        ([1.0], [0.0], 0.0),
        ([0.0], [1.0], 1.0),
        ([2, 3, 4, 5], [0, 1, 2.5, 1.5], 0.25),  # one of four on either side
        ([0.5] * 7, [0.5] * 3, 0.5),  # the official code says 1.0
        ([1, 1, 1, 0], [1, 0, 0, 0], 0.25),  # ties are one threshold
    ],
)
def test_eer_of_hand_computed_cases(target, nontarget, expected):
    assert compute_eer(np.array(target, float), np.array(nontarget, float))[0] == pytest.approx(
        expected, abs=1e-15
    )


@given(few_values, few_values)
def test_det_curve_runs_from_all_accepted_to_all_rejected(target, nontarget):
    frr, far, thresholds = compute_det_curve(target, nontarget)
    assert len(frr) == len(far) == len(thresholds) == len({*target, *nontarget}) + 1
    assert (frr[0], far[0], frr[-1], far[-1]) == (0, 1, 1, 0)
    assert thresholds[0] < min(target + nontarget) and thresholds[-1] == max(target + nontarget)
    assert (
        np.all(np.diff(frr) >= 0) and np.all(np.diff(far) <= 0) and np.all(np.diff(thresholds) > 0)
    )
    for i, threshold in enumerate(thresholds):
        assert (frr[i], far[i]) == (
            np.mean(np.array(target) <= threshold),
            np.mean(np.array(nontarget) > threshold),
        )


@given(few_values, few_values)
def test_eer_is_a_point_of_the_det_curve(target, nontarget):
    point = eer_point(count_errors(target, nontarget))
    frr, far, thresholds = compute_det_curve(target, nontarget)
    at = list(thresholds).index(point.threshold)
    assert point.eer == pytest.approx((frr[at] + far[at]) / 2)
    assert point.false_rejections == round(frr[at] * len(target))
    assert point.false_acceptances == round(far[at] * len(nontarget))


@given(few_values, few_values)
def test_increasing_maps_leave_the_eer_unchanged(target, nontarget):
    eer, _ = compute_eer(target, nontarget)
    for increasing in (np.exp, lambda s: 3 * s - 7, np.arctan):
        assert compute_eer(increasing(np.array(target)), increasing(np.array(nontarget)))[0] == eer


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
)
def test_swapping_the_classes_and_negating_leaves_the_eer_unchanged(target, nontarget):
    target, nontarget = np.array(target, float), np.array(nontarget, float)
    frr, far, _ = compute_det_curve(target, nontarget)
    gaps = np.abs(frr - far)
    best = np.unique(np.round((frr + far)[gaps <= gaps.min() + 1e-12], 12))
    if (
        len(best) == 1
    ):  # of two equally good thresholds the rule takes the lower, which negating turns round
        assert compute_eer(-nontarget, -target)[0] == pytest.approx(
            compute_eer(target, nontarget)[0]
        )


@given(any_values, any_values, st.randoms())
def test_the_order_of_trials_does_not_matter(target, nontarget, random):
    expected = compute_eer(target, nontarget)
    random.shuffle(target)
    random.shuffle(nontarget)
    assert compute_eer(target, nontarget) == expected


@pytest.mark.parametrize("bad", [[], [0.1, math.nan], [math.inf], [-math.inf, 0.0]])
def test_empty_classes_and_non_finite_scores_have_no_eer(bad):
    for arguments in (([0.5], bad), (bad, [0.5])):
        with pytest.raises(ValueError, match="expected"):
            compute_eer(*arguments)
        with pytest.raises(ValueError, match="expected"):
            compute_det_curve(*arguments)


# ── Other metrics ────────────────────────────────────────────────────────────────────────────────


@given(few_values, few_values)
def test_auc_is_the_share_of_pairs_in_the_right_order(target, nontarget):
    pairs = [(t > n) + (t == n) / 2 for t in target for n in nontarget]
    assert compute_auc(target, nontarget) == pytest.approx(np.mean(pairs))


def test_auc_equals_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    target, nontarget = np.round(rng.normal(1, 1, 300), 1), np.round(rng.normal(0, 1, 200), 1)
    far, tpr, _ = metrics.roc_curve([1] * 300 + [0] * 200, np.concatenate([target, nontarget]))
    assert compute_auc(target, nontarget) == pytest.approx(metrics.auc(far, tpr), abs=1e-12)


def test_min_dcf_by_hand():
    # Reject one real of four (FRR 0.25, FAR 0), or accept one fake of two (FRR 0, FAR 0.5).
    # (0.95 FRR + 0.5 FAR) / 0.5 = 0.475 or 0.5.
    assert eval_metrics.compute_min_dcf([0, 2, 3, 4], [-1, 1]) == pytest.approx(0.475)
    assert eval_metrics.compute_min_dcf([0], [1]) == pytest.approx(
        1.0
    )  # rejecting nothing costs 0.5 / 0.5


def test_act_dcf_by_hand():
    assert pytest.approx(-math.log(1.9)) == eval_metrics.BAYES_THRESHOLD
    # One real of two below -0.642, one fake of four not: (0.95 * 0.5 + 0.5 * 0.25) / 0.5.
    assert eval_metrics.compute_act_dcf([-0.65, -0.64], [-1, -2, -0.7, 0]) == pytest.approx(1.2)
    at = eval_metrics.BAYES_THRESHOLD
    assert eval_metrics.compute_act_dcf([at], [at]) == pytest.approx(
        1.0
    )  # at the threshold is accepted


def test_cllr_by_hand():
    assert eval_metrics.compute_cllr([0, 0], [0]) == pytest.approx(1.0)
    # log2(1 + 1/3) for the real one at ln 3, log2(1 + 1/7) for the fake one at -ln 7.
    assert eval_metrics.compute_cllr([math.log(3)], [-math.log(7)]) == pytest.approx(
        (math.log2(4 / 3) + math.log2(8 / 7)) / 2
    )
    assert eval_metrics.compute_cllr([-2000.0], [2000.0]) == pytest.approx(
        2000 / math.log(2)
    )  # no overflow


def test_min_tdcf_2019_by_hand(tmp_path):
    # ASV: threshold 1 by the EER's rule (FRR 1/4, FAR 1/4), then misses below 1: 0; false accepts
    # from 1: 1/4; spoofs below 1: 2 of 4. C1 = 0.9405 (1 - 0) - 0.0095 * 10 / 4 = 0.91675,
    # C2 = 10 * 0.05 * (1 - 1/2) = 0.25.
    (tmp_path / "asv.txt").write_text(
        "".join(
            f"- {key} {score}\n"
            for key, scores in {
                "target": (1, 2, 3, 4),
                "nontarget": (2.5, 0, -1, -2),
                "spoof": (0, 0.5, 1, 2),
            }.items()
            for score in scores
        )
    )
    asv = score_files.read_asv_scores(tmp_path / "asv.txt")
    # CM: FRR 0 with FAR 1/4 (0.0625), or FRR 1/2 with FAR 0: the first, over min(C1, C2) = 0.25.
    assert eval_metrics.compute_min_tdcf_2019([1, 3], [0, 0, 0, 2], asv) == pytest.approx(0.25)
    # A CM that cannot tell: accept all, C2 / C2.
    assert eval_metrics.compute_min_tdcf_2019([0], [0], asv) == pytest.approx(1.0)
    # FRR 1/10 at FAR 0: 0.091675 / 0.25.
    assert eval_metrics.compute_min_tdcf_2019([0, *[2] * 9], [1], asv) == pytest.approx(0.3667)


def test_min_tdcf_2019_is_normalised_by_the_cheaper_of_the_two_constant_decisions():
    # ASV threshold -1: misses 2 of 4, accepts 3 of 4 nontargets and all spoofs.
    # C1 = 0.9405 / 2 - 0.095 * 3 / 4 = 0.399 is below C2 = 0.5: rejecting all is the cheaper one,
    # and costs 1.
    asv = score_files.AsvScores(
        np.array([-3, -2, -1, 5.0]), np.array([0, 0.1, 0.2, -5]), np.array([6.0, 7])
    )
    assert eval_metrics.compute_min_tdcf_2019([0], [0], asv) == pytest.approx(1.0)


def test_asv_scores_that_leave_no_tandem_cost_are_refused():
    asv = score_files.AsvScores(
        np.array([0.0, 1]), np.array([0.0, 1]), np.array([-5.0])
    )  # every spoof is missed
    with pytest.raises(InputError, match="tandem cost of zero or less"):
        eval_metrics.compute_min_tdcf_2019([1], [0], asv)


@pytest.mark.parametrize("line", ["- target", "- impostor 1.0", "- target x", "a - target 1.0"])
def test_malformed_asv_scores_are_named(tmp_path, line):
    (tmp_path / "asv.txt").write_text(f"- target 1.0\n{line}\n")
    with pytest.raises(InputError, match=r"asv\.txt:2: expected `source"):
        score_files.read_asv_scores(tmp_path / "asv.txt")


def test_asv_scores_need_all_three_keys(tmp_path):
    (tmp_path / "asv.txt").write_text("- target 1.0\n- nontarget 0.0\n")
    with pytest.raises(InputError, match="spoof trials, got none"):
        score_files.read_asv_scores(tmp_path / "asv.txt")


def test_log_odds_undo_softmax_and_count_what_it_saturated():
    llrs = np.array([-30.0, -1.0, 0.0, 2.0])
    back = eval_metrics.to_log_odds(1 / (1 + np.exp(-llrs)))
    assert back.n_saturated == 0
    np.testing.assert_allclose(back.llrs, llrs, rtol=1e-9)
    beyond_float32 = eval_metrics.to_log_odds(
        [1 - 2.0**-40, 1.0]
    )  # what float64 still tells from 1 is kept
    np.testing.assert_allclose(beyond_float32.llrs, 40 * math.log(2))
    assert beyond_float32.n_saturated == 1
    saturated = eval_metrics.to_log_odds([0.0, 1.0, 1.0, 0.5])
    assert saturated.n_saturated == 3
    np.testing.assert_allclose(
        saturated.llrs, [-149 * math.log(2), 24 * math.log(2), 24 * math.log(2), 0], atol=1e-6
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_log_odds_keep_the_order_and_stay_finite(probabilities):
    llrs = eval_metrics.to_log_odds(probabilities).llrs
    assert np.all(np.isfinite(llrs))
    assert np.all(np.diff(llrs[np.argsort(probabilities)]) >= 0)


def test_errors_at_a_threshold_by_hand():
    """Accepted is what lies above the threshold, not on it."""
    assert eval_metrics.errors_at(0.5, [0.5, 0.6, 0.4], [0.5, 0.6, 0.7, 0.1]) == (2, 2)


@pytest.mark.parametrize(
    "scores, expected", [([0.0, 1.0], True), ([0.5, 1.5], False), ([-0.1, 0.5], False), ([], False)]
)
def test_scores_outside_0_and_1_are_no_probabilities(scores, expected):
    assert eval_metrics.are_probabilities(np.array(scores)) is expected


@given(few_values, few_values, st.integers(-4, 4))
def test_decisions_follow_their_definitions(target, nontarget, threshold):
    found = eval_metrics.decide_at(threshold, target, nontarget)
    tp = sum(s <= threshold for s in nontarget)  # positive: fake
    fp = sum(s <= threshold for s in target)
    fn, tn = len(nontarget) - tp, len(target) - fp
    assert found.accuracy == pytest.approx((tp + tn) / (tp + tn + fp + fn))
    assert found.frr == pytest.approx(fp / (fp + tn)) and found.far == pytest.approx(fn / (tp + fn))
    assert found.recall == pytest.approx(1 - found.far)
    assert found.precision == (pytest.approx(tp / (tp + fp)) if tp + fp else 0)
    assert found.f1 == (pytest.approx(2 * tp / (2 * tp + fp + fn)) if tp else 0)


@pytest.mark.parametrize(
    "target, nontarget, expected",
    [
        ([3, 4], [1, 2], 0),
        ([1, 2], [3, 4], 1),
        # Rates at score >= 2: FRR 1/2, FAR 1/2.
        ([1, 3], [0, 2], 0.5),
        # From (FRR 0, FAR 1/2) at 2 to (1/3, 0) at 3: the lines meet at 1/5 on the segment's scale:
        # FRR = p / 3, FAR = (1 - p) / 2, p = 3/5.
        ([2, 3, 4], [0, 2], 0.2),
        ([0.5] * 7, [0.5] * 3, 0.5),  # a tie of all: half-way from (0, 1) to (1, 0)
    ],
)
def test_the_arenas_eer_by_hand(target, nontarget, expected):
    assert eval_metrics.arena_eer(target, nontarget) == pytest.approx(expected, abs=1e-12)


@given(few_values, few_values)
def test_the_arenas_eer_lies_between_the_rates_where_they_cross(target, nontarget):
    eer = eval_metrics.arena_eer(target, nontarget)
    frr, far, _ = compute_det_curve(target, nontarget)
    after = int(np.argmax(frr >= far))
    before = max(after - 1, 0)
    assert frr[before] - 1e-9 <= eer <= frr[after] + 1e-9
    assert far[after] - 1e-9 <= eer <= far[before] + 1e-9


def test_separated_classes_are_told():
    assert eval_metrics.are_separated([3, 4], [1, 2]) and eval_metrics.are_separated([1], [2])
    assert not eval_metrics.are_separated([2, 4], [1, 2])


def test_calibration_is_the_optimum_of_the_balanced_likelihood():
    """At the optimum the balanced cross entropy has no slope: its gradient is 0 to 1e-6."""
    rng = np.random.default_rng(0)
    llrs, is_real = rng.normal(np.repeat([1.0, -1.0], [30, 300]), 2), np.arange(330) < 30
    fit = eval_metrics.fit_calibration(llrs, is_real)
    weights = np.where(is_real, 1 / 60, 1 / 600)
    residual = weights * (1 / (1 + np.exp(-fit(llrs))) - is_real)
    assert abs(residual.sum()) < 1e-6 and abs((residual * llrs).sum()) < 1e-6


def test_reliability_keeps_empty_bins_empty():
    """Log odds of ln 3 mean 3/4: one real and one fake in that bin, nothing elsewhere."""
    bins = eval_metrics.reliability(np.array([math.log(3)]), np.array([math.log(3)]), 4)
    assert bins.count.tolist() == [0, 0, 0, 2] and np.isnan(bins.observed[:3]).all()
    assert bins.predicted[3] == pytest.approx(0.75) and bins.observed[3] == pytest.approx(0.5)


def test_rule_of_three_bounds_what_no_error_in_n_allows():
    for n in (100, 13228):
        assert (1 - eval_metrics.rule_of_three(n)) ** n == pytest.approx(0.05, rel=0.1)
    assert eval_metrics.rule_of_three(1) == 1


# ── Score files ──────────────────────────────────────────────────────────────────────────────────

names_strategy = st.lists(
    st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=8).filter(
        lambda name: name.split() == [name]
    ),
    max_size=8,
    unique=True,
)


@settings(max_examples=50)
@given(names_strategy, st.data())
def test_scores_survive_a_round_trip_to_the_last_bit(tmp_path_factory, names, data):
    path = tmp_path_factory.mktemp("scores") / "C1_result.txt"
    scores = [data.draw(st.floats(allow_nan=False, allow_infinity=False)) for _ in names]
    words = [
        data.draw(st.sampled_from(["real", "fake", "bonafide", "bona-fide", "spoof"]))
        for _ in names
    ]
    write_scores(path, names, scores, words)
    back = read_scores(path)
    assert list(back.names) == names
    assert back.scores.tolist() == scores and back.scores.dtype == np.float64
    assert back.is_real.tolist() == [word.startswith(("real", "bona")) for word in words]


@pytest.mark.parametrize(
    "names, scores, words, message",
    [
        (["a", "b"], [0.1], ["real", "fake"], "as many names"),
        (["a b"], [0.1], ["real"], "without blanks, got 'a b'"),
        ([""], [0.1], ["real"], "without blanks"),
        (["a"], [math.nan], ["real"], "finite score for 'a', got nan"),
        (["a"], [math.inf], ["real"], "finite"),
        (["a", "a"], [0.1, 0.2], ["real", "real"], "'a' again"),
        (["a"], [0.1], ["genuine"], "one of real.*'genuine'"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, names, scores, words, message):
    path = tmp_path / "C1_result.txt"
    path.write_text("old\n")
    with pytest.raises(InputError, match=message):
        write_scores(path, names, scores, words)
    assert path.read_text() == "old\n" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "a 0.5 real\nb 0.25 fake\n",
        "a 0.5 real\r\nb 0.25 fake\r\n",  # CRLF
        "a 0.5 real \nb\t0.25  fake  \n\n \n",  # trailing blanks and blank lines
        "\n\na 0.5 bonafide\n\nb 0.25 spoof",  # blank lines within, none at the end
        "\ufeffa 0.5 bona-fide\nb 0.25 spoof\n",
    ],
)
def test_harmless_differences_between_editors_are_read(tmp_path, text):
    (tmp_path / "s.txt").write_bytes(text.encode())
    trials = read_scores(tmp_path / "s.txt")
    assert (list(trials.names), trials.scores.tolist(), trials.is_real.tolist()) == (
        ["a", "b"],
        [0.5, 0.25],
        [True, False],
    )


@pytest.mark.parametrize(
    "bad, message",
    [
        ("b 0.5", "got 2 column"),
        ("b 0.5 real 1", "got 4 column"),
        ("b x real", "expected a number as the score, got 'x'"),
        ("b 1_0 real", "expected a number as the score"),
        ("b 0.5 genuine", "expected one of real, .*got 'genuine'"),
        ("b nan real", "expected a finite score, got nan"),
        ("b -inf real", "expected a finite score, got -inf"),
        ("a 0.5 real", "expected each trial once, got 'a' 2 times"),
        ("0.5 real\nc", "got 2 column"),  # three columns only if the line end is ignored
        ("\n0.5 real", "got 2 column"),  # the line end before it is no name
        ("\n\0 0.5 real", "expected"),
        ("b\xff 0.5 real", "expected a name in UTF-8"),
        pytest.param("x" * 10_000_000, "got 1 column", id="10 MB in one line"),
    ],
)
@pytest.mark.parametrize("blank_lines", [0, 2])
def test_malformed_rows_are_named_by_file_and_row(tmp_path, bad, message, blank_lines):
    path = tmp_path / "C1_result.txt"
    path.write_bytes(
        b"\n" * blank_lines + b"a 0.5 real\n" + bad.encode("latin-1") + b"\nd 0.5 fake\n"
    )
    row = blank_lines + 2 + bad.startswith("\n")
    with pytest.raises(InputError, match=message) as error:
        read_scores(path)
    assert str(error.value).startswith(f"{path}:{row}: ")
    assert len(str(error.value)) < 400 + len(str(path)) and "\n" not in str(error.value)


def test_unlabelled_recordings_are_written_but_cannot_be_evaluated(tmp_path):
    write_scores(tmp_path / "audio_result.txt", ["a.mp3"], [0.25], [score_files.UNLABELLED])
    assert (tmp_path / "audio_result.txt").read_text() == "a.mp3 0.25 -\n"
    with pytest.raises(
        InputError, match=r"audio_result\.txt:1: .*got '-' \(a recording without a label"
    ):
        read_scores(tmp_path / "audio_result.txt")


def test_rows_of_three_columns_are_not_made_of_two_lines(tmp_path):
    (tmp_path / "s.txt").write_text("a 0.5\nreal b 0.25 fake\n")
    with pytest.raises(InputError, match=r"s\.txt:1: .*got 2 column"):
        read_scores(tmp_path / "s.txt")


def test_an_empty_file_and_one_class_can_be_read(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    assert len(read_scores(tmp_path / "empty.txt").names) == 0
    (tmp_path / "one.txt").write_text("a 0.5 fake\n")
    assert not read_scores(tmp_path / "one.txt").is_real.any()


def test_published_score_files_are_read_to_their_last_row():
    if not PUBLISHED.is_dir():
        pytest.skip(f"needs the published score files in {PUBLISHED}")
    for path in sorted(PUBLISHED.glob("*/*.txt")):
        assert len(read_scores(path).names) == path.read_bytes().count(b"\n"), path


# ── Importing ────────────────────────────────────────────────────────────────────────────────────


def test_evaluating_never_imports_torch(tmp_path):
    """Neither with a corpus nor with a report."""
    corpus = tmp_path / "ITW"
    corpus.mkdir()
    rows = [f"{i}.wav,s{i % 3},{'spoof' if i % 2 else 'bona-fide'}" for i in range(30)]
    (corpus / "meta.csv").write_text("file,speaker,label\n" + "\n".join(rows) + "\n")
    (tmp_path / "result").mkdir()
    scores = "".join(
        f"{i} {(i * 7 % 11) / 11} {'spoof' if i % 2 else 'bonafide'}\n" for i in range(30)
    )
    (tmp_path / "result" / "ITW_result.txt").write_text(scores)
    script = (
        "import sys, evaluate_score;evaluate_score.main(['--result_folder', 'result', '-t', 'ITW', "
        "'-d', 'ITW', '--report', 'page', '--metrics', '--resamples', '50']);assert 'torch' not in "
        "sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
    )


@pytest.mark.parametrize("module", ["eval_metrics", "evaluate_score"])
def test_importing_brings_no_heavy_library(module):
    """Each of them takes longer to import than the rest of the program to start."""
    script = (
        f"import sys, {module};"
        "heavy = {'torch', 'sklearn', 'matplotlib', 'soundfile', 'scipy', 'jinja2'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
