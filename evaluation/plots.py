"""Figures for papers and for the report: DET curves, histograms, EER bars, reliability diagrams.

Each function returns a matplotlib Figure; save() writes it, vector or bitmap, by the file's extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import ndtr, ndtri

import eval_metrics
from eval_metrics import compute_det_curve
from evaluation import bootstrap
from evaluation.results import SUBSETS, Result
from runtime.cli import InputError, printable
from runtime.files import atomic_write

EXTENSIONS = (".png", ".pdf", ".svg")
TICKS = (0.0001, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
MOST_COLUMNS = 3  # of panels
LEAST_IN_BIN = 10  # trials, for a point of a reliability diagram
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"  # told apart by the colour-blind too
MARKERS = "osD^vP*X<>hp"

probit, normal_cdf = ndtri, ndtr


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure, whole or not at all. Raises InputError for an extension not in EXTENSIONS."""
    path = Path(path)
    check_extension(path)
    metadata = {".png": None, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[
        path.suffix.lower()
    ]
    with (
        matplotlib.rc_context({"svg.hashsalt": "det", "pdf.fonttype": 42}),
        atomic_write(path, "wb") as file,
    ):
        figure.savefig(
            file, format=path.suffix[1:].lower(), dpi=200, metadata=metadata, bbox_inches="tight"
        )


def check_extension(path: str | Path) -> None:
    if Path(path).suffix.lower() not in EXTENSIONS:
        raise InputError(
            f"{path}: expected a plot file ending in {', '.join(EXTENSIONS)}, got {Path(path).suffix or 'no extension'!r}"
        )


# ── DET curves ───────────────────────────────────────────────────────────────────────────────────


def det_plot(
    results: Sequence[Result], bands: dict[tuple[str, str], tuple[np.ndarray, ...]] | None = None
) -> Figure:
    """DET curves on probit axes, a panel a model and a curve a subset; the EERs are marked.

    Args:
        results: those without an EER are left out.
        bands: (model, subset) -> (FAR, low FRR, high FRR), the 95 % intervals to shade.
    """
    results = [result for result in results if result.point]
    names = list(dict.fromkeys(result.model for result in results))
    figure, panels = _panels(len(names), width=5.2, height=5.2)
    low = _lowest_rate(results)
    colours = _colours([result.subset for result in results])
    for axes, name in zip(panels, names):
        _probit_axes(axes, low)
        for result in (result for result in results if result.model == name):
            _draw_det(
                axes, result, colours[result.subset], low, (bands or {}).get((name, result.subset))
            )
        axes.set_title(printable(name))
        axes.legend(
            title="subset: EER", fontsize=8, title_fontsize=8, loc="upper right", framealpha=0.9
        )
    return figure


def det_bands(
    results: Sequence[Result], n_resamples: int = 200, seed: int = 0
) -> dict[tuple[str, str], tuple[np.ndarray, ...]]:
    """Bootstrap intervals of the FRR along each DET curve, for det_plot()."""
    bands, tails = {}, [(1 - bootstrap.COVERAGE) / 2, (1 + bootstrap.COVERAGE) / 2]
    for result in (result for result in results if result.point):
        low = _lowest_rate([result])
        far = normal_cdf(np.linspace(probit(low), -probit(low), 80))
        clusters, _ = bootstrap.find_clusters(result.trials.names, result.subset)
        frr = bootstrap.resample_det(result.trials, clusters, far, n_resamples, seed)
        bands[result.model, result.subset] = (far, *np.quantile(frr, tails, axis=0))
    return bands


def _draw_det(
    axes: Axes, result: Result, colour: object, low: float, band: tuple[np.ndarray, ...] | None
) -> None:
    frr, far, _ = compute_det_curve(result.real, result.fake)
    x, y = (probit(np.clip(rate, low, 1 - low)) for rate in (far, frr))
    moves = np.any(np.diff(np.round(np.stack([x, y]) * 1000)), axis=0)
    seen = np.append(True, moves) | np.append(
        moves, True
    )  # drop what cannot be seen: small vector files
    axes.plot(
        x[seen],
        y[seen],
        drawstyle="steps-pre",
        color=colour,
        linewidth=1.3,
        label=f"{result.subset}: {result.eer:.3f} %",
    )
    eer = probit(np.clip(result.point.eer, low, 1 - low))
    axes.plot(
        eer, eer, "o", color=colour, markeredgecolor="white", markersize=6, clip_on=False, zorder=3
    )
    if band is not None:
        far, lowest, highest = (probit(np.clip(rate, low, 1 - low)) for rate in band)
        axes.fill_between(far, lowest, highest, color=colour, alpha=0.15, linewidth=0)


def _lowest_rate(results: Sequence[Result]) -> float:
    """The lowest rate of the axes: half of one error, at most 1 %; the curve ends on it where errors do."""
    sizes = [min(len(result.real), len(result.fake)) for result in results]
    return min(0.01, 0.5 / max(sizes, default=50))


def _probit_axes(axes: Axes, low: float) -> None:
    ticks = [tick for tick in TICKS if low < tick < 1 - low]
    limits = probit([low, 0.995 if low < 0.005 else 1 - low])
    labels = [f"{100 * tick:g}" for tick in ticks]
    axes.set(
        xlim=limits,
        ylim=limits,
        xlabel="false acceptance rate (%)",
        ylabel="false rejection rate (%)",
        aspect="equal",
    )
    axes.set_xticks(probit(ticks), labels, fontsize=8)
    axes.set_yticks(probit(ticks), labels, fontsize=8)
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.plot(limits, limits, color=GREY, linewidth=0.7, linestyle=":")


def _colours(subsets: Sequence[str]) -> dict[str, object]:
    palette = matplotlib.colormaps["tab20"].colors
    order = palette[0::2] + palette[1::2]
    return {subset: order[i % len(order)] for i, subset in enumerate(dict.fromkeys(subsets))}


# ── Histograms, bars, reliability ────────────────────────────────────────────────────────────────


def histograms(results: Sequence[Result], columns: int = MOST_COLUMNS) -> Figure:
    """Score histograms of both classes with the EER's threshold, a panel a subset, for one model.

    Probabilities are drawn as log odds, where a saturated softmax does not hide everything in two bars.
    """
    results = [result for result in results if result.point]
    probabilities = eval_metrics.holds_probabilities([result.trials for result in results])
    figure, panels = _panels(len(results), width=3.4, height=2.5, columns=columns)
    for axes, result in zip(panels, results):
        real, fake, threshold = (
            eval_metrics.as_llrs(scores, probabilities)[0]
            for scores in (result.real, result.fake, np.array([result.point.threshold]))
        )
        bins = np.histogram_bin_edges(np.concatenate([real, fake]), bins=60)
        for scores, name, colour in ((real, "real", BLUE), (fake, "fake", ORANGE)):
            axes.hist(scores, bins, density=True, label=name, color=colour, alpha=0.55)
        axes.axvline(
            threshold[0], color="black", linewidth=1, linestyle="--", label="EER threshold"
        )
        axes.set_title(f"{result.subset}: EER {result.eer:.3f} %", fontsize=9)
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
        axes.set_xlabel("log odds of being real" if probabilities else "score", fontsize=8)
    _shared_legend(figure, panels)
    return figure


def eer_bars(results: Sequence[Result]) -> Figure:
    """True EERs with their intervals: groups of subsets, a bar a model. Square-root scale: 0.01 % and 50 % both show."""
    results = [result for result in results if result.point]
    models = list(dict.fromkeys(result.model for result in results))
    subsets = list(dict.fromkeys(sorted((result.subset for result in results), key=SUBSETS.index)))
    figure = Figure(figsize=(max(5, 0.8 * len(subsets) + 1.5), 3.8), layout="constrained")
    axes = figure.subplots()
    colours, width = _colours(models), 0.8 / max(1, len(models))
    for i, model in enumerate(models):
        own = [result for result in results if result.model == model]
        x = [subsets.index(result.subset) + (i + 0.5) * width - 0.4 for result in own]
        axes.bar(
            x,
            [result.eer for result in own],
            width * 0.92,
            color=colours[model],
            label=printable(model),
            alpha=0.8,
        )
        for at, result in zip(x, own):
            if result.interval:
                axes.vlines(
                    at, result.interval.low, result.interval.high, color="black", linewidth=1
                )
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    axes.set_xticks(range(len(subsets)), subsets)
    top = max(
        [1.0, *(result.interval.high if result.interval else result.eer for result in results)]
    )
    axes.set_yticks(
        [tick for tick in (0, 0.1, 0.5, 2, 5, 10, 20, 30, 40, 50, 60, 80, 100) if tick <= 1.1 * top]
    )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(ylim=(0, 1.1 * top), ylabel="EER (%), 95 % interval")
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    if models:
        axes.legend(
            fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False
        )
    return figure


def reliability_plot(results: Sequence[Result]) -> Figure:
    """Reliability diagrams, a panel a model and a curve a subset: on the diagonal, scores mean what they say.

    Bins of fewer than LEAST_IN_BIN trials are left out: their share of real trials is chance.
    """
    results = [result for result in results if result.point]
    models = list(dict.fromkeys(result.model for result in results))
    figure, panels = _panels(len(models), width=4.2, height=4.2)
    colours = _colours([result.subset for result in results])
    for axes, model in zip(panels, models):
        own = [result for result in results if result.model == model]
        probabilities = eval_metrics.holds_probabilities([result.trials for result in own])
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for i, result in enumerate(own):
            real, fake = (
                eval_metrics.as_llrs(scores, probabilities)[0]
                for scores in (result.real, result.fake)
            )
            bins = eval_metrics.reliability(real, fake)
            enough = bins.count >= LEAST_IN_BIN
            axes.plot(
                bins.predicted[enough],
                bins.observed[enough],
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                linewidth=1,
                color=colours[result.subset],
                label=result.subset,
            )
        axes.set(
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
            aspect="equal",
            title=printable(model),
            xlabel="probability of being real, as said",
            ylabel="share of real trials, as found",
        )
        axes.grid(linewidth=0.4, alpha=0.5)
    _shared_legend(figure, panels)
    return figure


def _shared_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())
    }
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper center",
            ncols=6,
            fontsize=8,
            frameon=False,
        )


def _panels(
    number: int, width: float, height: float, columns: int = MOST_COLUMNS
) -> tuple[Figure, list[Axes]]:
    """A figure (inches a panel) that needs no display, and its panels."""
    columns = max(1, min(columns, number))
    rows = max(1, -(-number // columns))
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[number:]:
        spare.set_visible(False)
    return figure, panels[:number]
