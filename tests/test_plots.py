"""Figures: what is where. Run: python -m pytest tests/test_plots.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy.special import ndtr, ndtri

from evaluation import plots, results
from evaluation.results import Evaluated, Model
from formats.score_files import Scores


def evaluated(model: str, scores_of: dict[str, tuple], n_resamples: int = 0) -> Evaluated:
    """A model whose subsets have the given (real, fake) scores."""
    found = {}
    for subset, (real, fake) in scores_of.items():
        scores = np.array([*real, *fake], dtype=float)
        names = [f"t{i}" for i in range(len(scores))]
        trials = Scores(names, scores, np.arange(len(scores)) < len(real))
        found[subset] = results.evaluate_trials(model, subset, Path(), trials, n_resamples, 0)
    return Evaluated(Model(model, Path(), {}), found, {})


def overlapping(seed: int, distance: float = 2.0, n: int = 300) -> tuple:
    rng = np.random.default_rng(seed)
    return rng.normal(distance, 1, n), rng.normal(0, 1, n)


def line(axes, gid):
    (found,) = [line for line in axes.lines if line.get_gid() == gid]
    return found


def test_a_subset_looks_the_same_in_every_figure():
    few = evaluated("m", {"C7": overlapping(0)})
    many = evaluated("n", {s: overlapping(i) for i, s in enumerate(("19LA", "C1", "C7"))})
    one, all_of = plots.Style.of([few]), plots.Style.of([many])
    assert one.subsets["C7"] == all_of.subsets["C7"]
    looks = list(all_of.subsets.values())
    assert len({(look.colour, look.line) for look in looks}) == len(looks) == 12
    assert len({look.marker for look in looks}) == 12
    det = plots.det_plot([many], all_of).axes[0]
    reliability = plots.reliability_plot([many], all_of).axes[0]
    for subset in ("19LA", "C1", "C7"):
        drawn = line(det, f"curve n {subset}")
        (other,) = [x for x in reliability.lines if x.get_label() == subset]
        assert to_hex(drawn.get_color()) == to_hex(other.get_color())
        assert drawn.get_linestyle() == other.get_linestyle()


def test_the_marker_of_an_eer_lies_on_its_curve_even_where_rates_differ():
    # FRR 0 with FAR 40 %, or FRR 1: the mean of the two rates, 20 %, is not on the curve.
    model = evaluated("m", {"ITW": ([1.0] * 10, [1.0] * 4 + [0.0] * 6)})
    axes = plots.det_plot([model], plots.Style.of([model])).axes[0]
    curve, marker = line(axes, "curve m ITW"), line(axes, "eer m ITW")
    low, high = axes.get_xlim()
    points = np.clip(np.stack(curve.get_data(), axis=1), low, high)
    at = np.array([marker.get_xdata()[0], marker.get_ydata()[0]])
    assert np.abs(points - at).sum(axis=1).min() < 1e-9
    assert ndtr(at[0]) == pytest.approx(0.4)


@pytest.mark.parametrize("distance", [1.0, 3.0, 5.5])
def test_det_axes_follow_the_data_and_have_a_tick_at_one_percent(distance):
    model = evaluated("m", {"C1": overlapping(0, distance, 3000)})
    axes = plots.det_plot([model], plots.Style.of([model])).axes[0]
    low, high = ndtr(axes.get_xlim())
    eer = model.results["C1"].point.eer
    assert low < max(eer, 1e-3) < high
    assert any(abs(tick - ndtri(0.01)) < 1e-9 for tick in axes.get_xticks())
    if distance == 5.5:
        assert high < 0.3  # a good detector fills the axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"C1: {100 * eer:.3f} %", "at the EER"]


def test_band_and_unit_are_in_the_legend():
    model = evaluated("m", {"C1": overlapping(0)}, n_resamples=20)
    style, bands = plots.Style.of([model]), plots.det_bands([model])
    axes = plots.det_plot([model], style, bands).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[-1] == "95 % interval by trial"
    assert len(axes.collections) == 1


def test_several_models_stand_in_one_panel_for_a_subset():
    models = [
        evaluated(f"model {i}", {"C1": overlapping(i), "C7": overlapping(9)}) for i in range(4)
    ]
    style = plots.Style.of(models)
    (axes,) = plots.det_plot(models, style, None, "C7").axes
    assert axes.get_title() == "C7"
    colours = {to_hex(line(axes, f"curve model {i} C7").get_color()) for i in range(4)}
    assert len(colours) == 4
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels[:4]] == [f"model {i}" for i in range(4)]


@pytest.mark.parametrize("n_models", [1, 4])
@pytest.mark.parametrize("kind", ["det", "eer", "reliability"])
def test_figures_have_the_width_asked_for_and_nothing_leaves_them(n_models, kind):
    subsets = {s: overlapping(i) for i, s in enumerate(results.SUBSETS)}
    models = [evaluated(f"a_rather_long_name_{i}", subsets) for i in range(n_models)]
    style = plots.Style.of(models, 8.5)
    draw = {
        "det": plots.det_plot,
        "eer": plots.eer_points,
        "reliability": plots.reliability_plot,
    }[kind]
    figure = draw(models, style)
    figure.draw_without_rendering()
    assert figure.get_figwidth() == pytest.approx(8.5 / 2.54)
    outer = figure.bbox
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert box.x0 >= outer.x0 - 2 and box.x1 <= outer.x1 + 2, axes.get_title()
        assert box.y0 >= outer.y0 - 2 and box.y1 <= outer.y1 + 2, axes.get_title()


def test_reliability_lines_break_where_bins_are_left_out():
    # Log odds of -3 and 3 only: the bins between hold nothing, and no line crosses them.
    real, fake = [3.0] * 20 + [-3.0] * 20, [-3.0] * 20 + [3.0] * 20
    # and 9 trials at 0, too few for a point
    model = evaluated("m", {"C1": (real + [0.0] * 5, fake + [0.0] * 4)})
    axes, counts = plots.reliability_plot([model], plots.Style.of([model])).axes
    (drawn,) = [x for x in axes.lines if x.get_label() == "C1"]
    y = drawn.get_ydata()
    assert np.isfinite(y).sum() == 2 and np.isnan(y[1:-1]).all()
    (stairs,) = counts.patches
    assert stairs.get_data().values.tolist() == [40, 0, 0, 0, 0, 9, 0, 0, 0, 40]
    assert "of equally weighted classes" in axes.get_ylabel() + counts.get_xlabel()
    assert counts.get_ylabel() == "trials"


def test_an_absent_file_looks_absent():
    both = evaluated("a", {"C1": overlapping(0), "C2": overlapping(1)}, 20)
    one = evaluated("b", {"C1": overlapping(2), "C2": ([], [1.0])}, 20)
    none = evaluated("c", {"C1": overlapping(3)}, 20)
    axes = plots.eer_points([both, one, none], plots.Style.of([both, one, none])).axes[0]
    assert [text.get_text().strip() for text in axes.texts] == ["no EER", "no file"]
    assert "EER (%)" in axes.get_ylabel() and "interval by trial" in axes.get_ylabel()
    # Points with caps: an error bar a model, none of them a bar from zero.
    assert len(axes.containers) == 3 and not axes.patches


def test_histograms_have_a_density_axis_and_one_range():
    model = evaluated("m", {"C1": overlapping(0), "C2": overlapping(1, 8.0)})
    figure = plots.histograms([model], plots.Style.of([model]))
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim()
    assert first.get_ylabel() == "density" and len(first.get_yticks()) > 2
