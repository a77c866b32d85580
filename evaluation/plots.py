"""Figures for papers and for the report: DET curves, EERs, reliability diagrams, histograms.

Each function returns a matplotlib Figure; save() writes it, vector or bitmap, by the file's
extension. A subset has one colour, line style and marker in every figure, and so has a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.special import ndtr, ndtri

import eval_metrics
from evaluation import bootstrap
from evaluation.results import SUBSETS, Evaluated, Result
from runtime.cli import InputError, printable
from runtime.files import atomic_write

EXTENSIONS = (".png", ".pdf", ".svg")
# Rates that get a tick, the more welcome ones first; those that would touch another have none.
TICKS = (0.01, 0.1, 0.001, 0.4, 0.0001, 0.05, 0.2, 0.8, 0.6, 0.9, 0.95, 0.99, 0.02, 0.005, 0.999)
TICK_DISTANCE = 0.25  # inches
# Okabe and Ito's colours, told apart by the colour-blind; yellow is too pale for a line.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X<>hp"
REAL_COLOUR, FAKE_COLOUR, GREY = "#0072b2", "#d55e00", "#777777"
LEAST_IN_BIN = 10  # trials, for a point of a reliability diagram
N_BINS = 10
CM_PER_INCH = 2.54
PANEL_CM = 12.0  # width of a panel where nobody asks for another
MOST_COLUMNS = 3  # of panels
N_BAND_RESAMPLES = 200

Bands = dict[tuple[str, str], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Look:
    """How one subset or model is drawn."""

    colour: str
    line: str
    marker: str


@dataclass(frozen=True)
class Style:
    """The looks of all subsets and models, and the width of a figure."""

    subsets: dict[str, Look]
    models: dict[str, Look]
    width: float | None  # inches; None: PANEL_CM a panel

    @classmethod
    def of(cls, evaluated: Sequence[Evaluated], width_cm: float | None = None) -> Style:
        """Subsets look the same in every evaluation: by their place in SUBSETS, others after."""
        present = [subset for of_model in evaluated for subset in of_model.results]
        subsets = list(dict.fromkeys([*SUBSETS, *present]))
        models = [of_model.name for of_model in evaluated]
        return cls(
            {subset: _look(i) for i, subset in enumerate(subsets)},
            {model: _look(i) for i, model in enumerate(models)},
            None if width_cm is None else width_cm / CM_PER_INCH,
        )


def _look(i: int) -> Look:
    # 7 colours and 4 lines have no common divisor: 28 pairs before one comes again.
    return Look(COLOURS[i % len(COLOURS)], LINES[i % len(LINES)], MARKERS[i % len(MARKERS)])


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure, whole or not at all. Raises InputError as check_extension()."""
    path = Path(path)
    check_extension(path)
    extension = path.suffix.lower()
    metadata = {".png": None, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[extension]
    with (
        matplotlib.rc_context({"svg.hashsalt": "det", "pdf.fonttype": 42}),
        atomic_write(path, "wb") as file,
    ):
        figure.savefig(file, format=extension[1:], dpi=200, metadata=metadata)


def check_extension(path: str | Path) -> None:
    """Raise InputError for an extension not in EXTENSIONS."""
    suffix = Path(path).suffix
    if suffix.lower() not in EXTENSIONS:
        raise InputError(
            f"{path}: expected a plot file ending in {', '.join(EXTENSIONS)}, "
            f"got {suffix or 'no extension'!r}"
        )


# ── DET curves ───────────────────────────────────────────────────────────────────────────────────


def det_plot(
    evaluated: Sequence[Evaluated],
    style: Style,
    bands: Bands | None = None,
    subset: str | None = None,
) -> Figure:
    """DET curves on normal deviate axes: a panel a model and a curve a subset.

    Args:
        bands: (model, subset) -> (FAR, low FRR, high FRR), the 95 % intervals to shade.
        subset: one panel instead, with a curve a model on this subset.
    """
    results = [
        result
        for of_model in evaluated
        for result in of_model.with_eer
        if subset in (None, result.subset)
    ]
    if subset is None:
        panels = {m.name: [r for r in results if r.model == m.name] for m in evaluated}
    else:
        panels = {subset: results}
    figure, all_axes, side = _det_panels(panels, style, bool(bands))
    limits = _det_limits(results)
    for axes, (title, of_panel) in zip(all_axes, panels.items(), strict=True):
        _det_axes(axes, limits, side)
        axes.set_title(printable(title), fontsize=9)
        entries = []
        for result in of_panel:
            look = style.subsets[result.subset] if subset is None else style.models[result.model]
            band = (bands or {}).get((result.model, result.subset))
            label = result.subset if subset is None else result.model
            _draw_det(axes, result, look, limits, band)
            entries.append(_legend_line(look, f"{printable(label)}: {result.eer:.3f} %"))
        _det_legend(axes, entries, of_panel, bands, side)
    return figure


LEFT, RIGHT, TOP, BOTTOM = 0.6, 0.15, 0.3, 0.5  # inches around the square of a DET panel
LEGEND_ROW = 0.165


def _det_panels(
    panels: dict[str, list[Result]], style: Style, with_bands: bool
) -> tuple[Figure, list[Axes], float]:
    """(figure, a square for each panel with room for its legend below, the squares' side)."""
    columns = _n_columns(len(panels), style)
    rows = -(-len(panels) // columns)
    width = style.width or columns * PANEL_CM / CM_PER_INCH
    side = width / columns - LEFT - RIGHT
    entries = max(map(len, panels.values()), default=0) + 1 + with_bands
    legend = LEGEND_ROW * (-(-entries // _legend_columns(panels, side)) + 1)
    height = rows * (TOP + side + BOTTOM + legend)
    figure = Figure(figsize=(width, height))
    all_axes = []
    for i in range(len(panels)):
        row, column = divmod(i, columns)
        left = column * width / columns + LEFT
        bottom = height - row * (height / rows) - TOP - side
        place = (left / width, bottom / height, side / width, side / height)
        all_axes.append(figure.add_axes(place))
    return figure, all_axes, side


def _legend_columns(panels: dict[str, list[Result]], side: float) -> int:
    """Two where the longest name leaves room; a letter of 7 points is some 0.055 inches wide."""
    names = [max(len(r.model), len(r.subset)) for results in panels.values() for r in results]
    one_panel = len(panels) == 1 and len({r.model for r in next(iter(panels.values()))}) > 1
    longest = max(names, default=0) if one_panel else 5
    return 2 if 2 * (0.5 + 0.055 * (longest + 9)) < side + LEFT else 1


def det_bands(evaluated: Sequence[Evaluated], seed: int = 0) -> Bands:
    """Bootstrap intervals of the FRR along each DET curve, for det_plot()."""
    bands: Bands = {}
    tails = [(1 - bootstrap.COVERAGE) / 2, (1 + bootstrap.COVERAGE) / 2]
    for of_model in evaluated:
        for result in of_model.with_eer:
            low = _lowest_rate([result])
            far = ndtr(np.linspace(ndtri(low), -ndtri(low), 80))
            frr = bootstrap.resample_det(
                result.sample, result.units.factors, far, N_BAND_RESAMPLES, seed
            )
            bands[result.model, result.subset] = (far, *np.nanquantile(frr, tails, axis=0))
    return bands


def _draw_det(
    axes: Axes,
    result: Result,
    look: Look,
    limits: tuple[float, float],
    band: tuple[np.ndarray, ...] | None,
) -> None:
    low, high = limits[0] / 4, 1 - limits[0] / 4  # beyond the axes

    def place(rates: np.ndarray) -> np.ndarray:
        return ndtri(np.clip(rates, low, high))

    counts = result.counts
    x, y = place(counts.far), place(counts.frr)
    # Drop what cannot be seen: vector files stay small.
    moves = np.any(np.diff(np.round(np.stack([x, y]) * 1000)), axis=0)
    seen = np.append(True, moves) | np.append(moves, True)
    axes.plot(
        x[seen],
        y[seen],
        drawstyle="steps-pre",
        color=look.colour,
        linestyle=look.line,
        linewidth=1.3,
        gid=f"curve {printable(result.model)} {result.subset}",
    )
    at = int(np.flatnonzero(counts.thresholds == result.point.threshold)[0])
    corner = ndtri(limits)  # where there is no error, the marker stands on the frame
    axes.plot(
        np.clip(x[at], *corner),
        np.clip(y[at], *corner),
        look.marker,
        color=look.colour,
        markeredgecolor="white",
        markersize=6,
        clip_on=False,
        zorder=3,
        gid=f"eer {printable(result.model)} {result.subset}",
    )
    if band is not None:
        far, lowest, highest = map(place, band)
        axes.fill_between(far, lowest, highest, color=look.colour, alpha=0.15, linewidth=0)


def _legend_line(look: Look, label: str) -> Line2D:
    return Line2D(
        [],
        [],
        color=look.colour,
        linestyle=look.line,
        linewidth=1.3,
        marker=look.marker,
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.4,
        label=label,
    )


def _det_legend(
    axes: Axes,
    entries: list[Line2D],
    results: Sequence[Result],
    bands: Bands | None,
    side: float,
) -> None:
    """The curves with their EERs, and what marker and band are, below the axes."""
    if not entries:
        return
    handles = [
        *entries,
        Line2D([], [], linestyle="", marker="o", markersize=4.5, color=GREY, label="at the EER"),
    ]
    if bands:
        units = " or ".join(dict.fromkeys(_short(result.units.name) for result in results))
        label = f"95 % interval by {units}"
        handles.append(Patch(color=GREY, alpha=0.3, linewidth=0, label=label))
    panel = {"": list(results)}
    axes.legend(
        handles=handles,
        fontsize=7,
        loc="upper left",
        bbox_to_anchor=(-LEFT / side, -BOTTOM / side),
        borderaxespad=0,
        ncols=_legend_columns(panel, side),
        frameon=False,
        handlelength=3,
        columnspacing=1,
    )


def _short(unit: str) -> str:
    """The unit without the remark behind it."""
    return unit.partition(":")[0].partition(" (")[0]


def _lowest_rate(results: Sequence[Result]) -> float:
    """Half of one error of the larger class, at most 1 %."""
    sizes = [max(len(result.real), len(result.fake)) for result in results]
    return min(0.01, 0.5 / max(sizes, default=50))


def _det_limits(results: Sequence[Result]) -> tuple[float, float]:
    """The rates that both axes span: from where errors end to well above the highest EER."""
    eers = [result.point.eer for result in results] or [0.1]
    lowest = max(_lowest_rate(results), min(0.01, min(eers) / 20))
    highest = min(0.995, max(0.2, 1 - 0.4 * (1 - max(eers)), 3 * max(eers)))
    if max(eers) < 0.2:
        highest = max(0.05, 4 * max(eers))
    return lowest, min(highest, 0.995)


def _det_axes(axes: Axes, limits: tuple[float, float], side: float) -> None:
    ends = ndtri(limits)
    ticks = _ticks(limits, side)
    labels = [f"{100 * tick:g}" for tick in ticks]
    axes.set(xlim=ends, ylim=ends)
    axes.set_xlabel("false acceptance rate (%)", fontsize=8)
    axes.set_ylabel("false rejection rate (%)", fontsize=8)
    axes.set_xticks(ndtri(ticks), labels, fontsize=7)
    axes.set_yticks(ndtri(ticks), labels, fontsize=7)
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.plot(ends, ends, color=GREY, linewidth=0.7, linestyle=":")


def _ticks(limits: tuple[float, float], side: float) -> list[float]:
    """The ticks between the limits that leave each other room on an axis of `side` inches."""
    low, high = ndtri(limits)
    chosen: list[float] = []
    for tick in TICKS:
        if not limits[0] <= tick <= limits[1]:
            continue
        gaps = np.abs(ndtri(chosen) - ndtri(tick)) * side / (high - low)
        if not len(gaps) or gaps.min() >= TICK_DISTANCE:
            chosen.append(tick)
    return sorted(chosen)


# ── EERs ─────────────────────────────────────────────────────────────────────────────────────────


def eer_points(evaluated: Sequence[Evaluated], style: Style) -> Figure:
    """True EERs with their intervals: a marker a model, in groups of subsets.

    The axis is a square root's, on which 0.01 % and 50 % both show. Where a model has no score file
    of a subset that another model has, or no EER on it, it says so.
    """
    subsets = [subset for subset in style.subsets if any(subset in m.results for m in evaluated)]
    width = style.width or max(5.0, 0.8 * len(subsets) + 1.5)
    height = 3.0 + 0.17 * len(evaluated)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    top = _highest(evaluated)
    step = 0.7 / max(1, len(evaluated))
    for i, of_model in enumerate(evaluated):
        look = style.models[of_model.name]
        at = {subset: n + (i + 0.5) * step - 0.35 for n, subset in enumerate(subsets)}
        _draw_points(axes, of_model, look, at)
    axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
    axes.set_xticks(range(len(subsets)), subsets, fontsize=8 if len(subsets) < 8 else 7)
    axes.set_xlim(-0.6, len(subsets) - 0.4)
    ticks = (0, 0.1, 0.5, 2, 5, 10, 20, 30, 40, 50, 60, 80, 100)
    axes.set_yticks([tick for tick in ticks if tick <= 1.1 * top])
    axes.tick_params(axis="y", labelsize=7)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(ylim=(0, 1.1 * top))
    axes.set_xlabel("test subset", fontsize=8)
    axes.set_ylabel(f"EER (%), square-root axis{_interval_label(evaluated)}", fontsize=8)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    for n in range(1, len(subsets)):
        axes.axvline(n - 0.5, color=GREY, linewidth=0.3, alpha=0.6)
    _outside_legend(figure, [axes], columns=1 if width < 5 else 2)
    return figure


def _draw_points(axes: Axes, of_model: Evaluated, look: Look, at: dict[str, float]) -> None:
    results = of_model.with_eer
    x = [at[result.subset] for result in results]
    eers = [result.eer for result in results]
    ends = [result.interval for result in results]
    bars = None
    if all(ends) and ends:
        bars = [
            [eer - end.low for eer, end in zip(eers, ends, strict=True)],
            [end.high - eer for eer, end in zip(eers, ends, strict=True)],
        ]
        bars = np.maximum(bars, 0)
    axes.errorbar(
        x,
        eers,
        bars,
        fmt=look.marker,
        color=look.colour,
        markersize=4.5,
        capsize=2.5,
        linewidth=1,
        label=printable(of_model.name),
        clip_on=False,
    )
    present = {result.subset for result in results}
    for subset, place in at.items():
        if subset not in present:
            why = "no EER" if subset in of_model.results else "no file"
            axes.text(
                place, 0, f" {why}", rotation=90, ha="center", va="bottom", fontsize=6, color=GREY
            )


def _highest(evaluated: Sequence[Evaluated]) -> float:
    """The highest interval end or EER, at least 1 %."""
    ends = [1.0]
    for of_model in evaluated:
        for result in of_model.with_eer:
            ends.append(result.interval.high if result.interval else result.eer)
    return max(ends)


def _interval_label(evaluated: Sequence[Evaluated]) -> str:
    intervals = [r.interval for of_model in evaluated for r in of_model.with_eer if r.interval]
    if not intervals:
        return ""
    units = " or ".join(dict.fromkeys(_short(interval.unit) for interval in intervals))
    return f"\n95 % interval by {units}"


# ── Reliability ──────────────────────────────────────────────────────────────────────────────────


def reliability_plot(evaluated: Sequence[Evaluated], style: Style) -> Figure:
    """Reliability diagrams, a panel a model and a curve a subset, above their counts.

    On the diagonal, scores mean what they say. Bins of fewer than LEAST_IN_BIN trials are left out,
    since their proportion of real trials is chance; the line breaks there.
    """
    n_columns = _n_columns(len(evaluated), style)
    n_rows = -(-len(evaluated) // n_columns)
    width = style.width or n_columns * PANEL_CM / CM_PER_INCH
    side = width / n_columns
    figure = Figure(figsize=(width, n_rows * side * 1.35 + 0.6), layout="constrained")
    grid = figure.add_gridspec(2 * n_rows, n_columns, height_ratios=[3, 1] * n_rows)
    drawn = []
    for i, of_model in enumerate(evaluated):
        row, column = divmod(i, n_columns)
        axes = figure.add_subplot(grid[2 * row, column])
        counts = figure.add_subplot(grid[2 * row + 1, column], sharex=axes)
        _draw_reliability(axes, counts, of_model, style)
        axes.set_title(printable(of_model.name), fontsize=9)
        drawn.append(axes)
    _outside_legend(figure, drawn, columns=3 if width < 5 else 6)
    return figure


def _draw_reliability(axes: Axes, counts: Axes, of_model: Evaluated, style: Style) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    for result in of_model.with_eer:
        real, fake = (
            eval_metrics.as_llrs(scores, result.probabilities).llrs
            for scores in (result.real, result.fake)
        )
        bins = eval_metrics.reliability(real, fake, N_BINS)
        enough = bins.count >= LEAST_IN_BIN
        look = style.subsets[result.subset]
        axes.plot(
            bins.predicted,
            np.where(enough, bins.observed, np.nan),
            look.line,
            marker=look.marker,
            markersize=3.5,
            linewidth=1,
            color=look.colour,
            label=result.subset,
        )
        edges = np.linspace(0, 1, N_BINS + 1)
        counts.stairs(bins.count, edges, color=look.colour, linestyle=look.line, linewidth=1)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_ylabel("proportion of real trials,\nof equally weighted classes", fontsize=7)
    axes.tick_params(labelsize=7, labelbottom=False)
    axes.grid(linewidth=0.4, alpha=0.5)
    counts.set_yscale("symlog", linthresh=1)
    counts.set_ylim(bottom=0)
    counts.set_xlabel("probability of being real,\nof equally weighted classes", fontsize=7)
    counts.set_ylabel("trials", fontsize=8)
    counts.tick_params(labelsize=7)
    counts.minorticks_off()
    counts.axhline(LEAST_IN_BIN, color=GREY, linewidth=0.6, linestyle=":")


# ── Histograms ───────────────────────────────────────────────────────────────────────────────────


def histograms(evaluated: Sequence[Evaluated], style: Style) -> Figure:
    """Score histograms of both classes with the EER's threshold, a panel a subset, of one model.

    All panels have one range. Probabilities are drawn as log odds, where a saturated softmax does
    not hide everything in two bars.
    """
    results = [result for of_model in evaluated for result in of_model.with_eer]
    figure, panels = _panels(len(results), style, aspect=0.62, sharex=True)
    scores = [_drawn_scores(result) for result in results]
    if not results:
        return figure
    everything = np.concatenate([part for pair in scores for part in pair[:2]])
    # One range for all; the farthest thousandth at either end counts in the outermost bins.
    low, high = np.quantile(everything, [0.001, 0.999])
    bins = np.linspace(low, max(high, low + 1e-9), 61)
    for i, (axes, result, (real, fake, threshold)) in enumerate(
        zip(panels, results, scores, strict=True)
    ):
        for part, name, colour in ((real, "real", REAL_COLOUR), (fake, "fake", FAKE_COLOUR)):
            inside = np.clip(part, bins[0], bins[-1])
            axes.hist(inside, bins, density=True, label=name, color=colour, alpha=0.55)
        axes.axvline(threshold, color="black", linewidth=1, linestyle="--", label="EER threshold")
        axes.set_title(f"{result.subset}: EER {result.eer:.3f} %", fontsize=8)
        axes.tick_params(labelsize=7, labelbottom=True)
        axes.set_xlabel("log odds of being real" if result.probabilities else "score", fontsize=8)
        if i % _n_columns(len(results), style) == 0:
            axes.set_ylabel("density", fontsize=8)
    _outside_legend(figure, panels[:1], columns=3)
    return figure


def _drawn_scores(result: Result) -> tuple[np.ndarray, np.ndarray, float]:
    real, fake, threshold = (
        eval_metrics.as_llrs(scores, result.probabilities).llrs
        for scores in (result.real, result.fake, np.array([result.point.threshold]))
    )
    return real, fake, float(threshold[0])


# ── Layout ───────────────────────────────────────────────────────────────────────────────────────


def _outside_legend(figure: Figure, panels: Sequence[Axes], columns: int) -> None:
    """One legend above all panels."""
    handles = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside upper center",
            ncols=columns,
            fontsize=7,
            frameon=False,
            handlelength=3,
        )


def _n_columns(number: int, style: Style) -> int:
    """As many panels side by side as leave each 6 cm."""
    most = MOST_COLUMNS
    if style.width is not None:
        most = max(1, min(MOST_COLUMNS, int(style.width * CM_PER_INCH // 6)))
    return max(1, min(most, number))


def _panels(
    number: int, style: Style, aspect: float, extra_height: float = 0.3, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure that needs no display, and its panels.

    Args:
        aspect: height over width of a panel.
        extra_height: inches a row for what stands around it.
    """
    columns = _n_columns(number, style)
    rows = max(1, -(-number // columns))
    width = style.width or columns * PANEL_CM / CM_PER_INCH
    height = rows * (aspect * width / columns + extra_height)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex).flat)
    for spare in panels[number:]:
        spare.set_visible(False)
    return figure, panels[:number]
