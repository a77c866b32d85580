"""Figures for papers and for the report: DET curves, histograms, EER bars, reliability diagrams.

Each function returns a matplotlib Figure; save() writes it, vector or bitmap, by the file's extension.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cli import InputError, printable, replacing
from eval_metrics import compute_det_curve, compute_eer
from evaluation import Result

EXTENSIONS = (".png", ".pdf", ".svg")
TICKS = (0.0001, 0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
SEVERAL = 3                # columns of a figure with one panel a model or subset
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"               # told apart by the colour-blind too
MARKERS = "osD^vP*X<>hp"

probit = np.vectorize(NormalDist().inv_cdf, otypes=[float])


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure, whole or not at all. Raises InputError for an extension not in EXTENSIONS."""
    path = Path(path)
    check_extension(path)
    metadata = {".png": None, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[path.suffix.lower()]
    with matplotlib.rc_context({"svg.hashsalt": "det", "pdf.fonttype": 42}), replacing(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=200, metadata=metadata, bbox_inches="tight")


def check_extension(path: str | Path) -> None:
    if Path(path).suffix.lower() not in EXTENSIONS:
        raise InputError(f"{path}: expected a plot file ending in {', '.join(EXTENSIONS)}, got {Path(path).suffix or 'no extension'!r}")


# ── DET curves ───────────────────────────────────────────────────────────────────────────────────


def det_plot(results: Sequence[Result], bands: dict[tuple[str, str], tuple[np.ndarray, ...]] | None = None) -> Figure:
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
            _draw_det(axes, result, colours[result.subset], low, (bands or {}).get((name, result.subset)))
        axes.set_title(printable(name))
        axes.legend(title="subset: EER", fontsize=8, title_fontsize=8, loc="upper right", framealpha=0.9)
    return figure


def _draw_det(axes: Axes, result: Result, colour: object, low: float, band: tuple[np.ndarray, ...] | None) -> None:
    frr, far, _ = compute_det_curve(result.real, result.fake)
    x, y = (probit(np.clip(rate, low, 1 - low)) for rate in (far, frr))
    seen = np.any(np.diff(np.round(np.stack([x, y]) * 1000), prepend=np.inf), axis=0)      # small vector files
    axes.plot(x[seen], y[seen], color=colour, linewidth=1.3, label=f"{result.subset}: {result.eer:.3f} %")
    eer = probit(np.clip(result.point.eer, low, 1 - low))
    axes.plot(eer, eer, "o", color=colour, markeredgecolor="white", markersize=6, clip_on=False, zorder=3)
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
    axes.set(xlim=limits, ylim=limits, xlabel="false acceptance rate (%)", ylabel="false rejection rate (%)", aspect="equal")
    axes.set_xticks(probit(ticks), labels, fontsize=8)
    axes.set_yticks(probit(ticks), labels, fontsize=8)
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.plot(limits, limits, color=GREY, linewidth=0.7, linestyle=":")


def _colours(subsets: Sequence[str]) -> dict[str, object]:
    palette = matplotlib.colormaps["tab20"].colors
    order = palette[0::2] + palette[1::2]
    return {subset: order[i % len(order)] for i, subset in enumerate(dict.fromkeys(subsets))}


def _panels(number: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure (inches a panel) that needs no display, and its panels."""
    columns = max(1, min(SEVERAL, number))
    rows = max(1, -(-number // columns))
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[number:]:
        spare.set_visible(False)
    return figure, panels[:number]
