"""Two figures beside each other: of two models on the same trials, and of a model and the paper."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

import eval_metrics
from eval_metrics import OperatingPoint
from evaluation import bootstrap, results
from evaluation.results import AVERAGED, Evaluated, Figures, Interval, Model, Settings
from evaluation.tables import (
    INTERVAL,
    MARK,
    Table,
    interval_cell,
    interval_notes,
    percent,
    signed,
)
from evaluation.units import Units, find_units
from formats.protocols import UNKNOWN
from formats.score_files import Scores
from runtime.cli import InputError

# ── Models against each other ────────────────────────────────────────────────────────────────────

LEVEL = 1 - bootstrap.COVERAGE


class Skipped(Exception):
    """Why two models cannot be compared on a subset."""


def compare(models: Sequence[Model], settings: Settings, given: bool) -> tuple[Table, list[dict]]:
    """Paired bootstrap of EER(A) - EER(B), for all pairs and subsets: (table, records for JSON).

    Args:
        given: whether settings.n_resamples was asked for; otherwise it is raised to what the number
            of tests needs.

    Raises:
        InputError: no subset can be compared, or too few resamples for the number of tests.
    """
    tasks, notes = [], []
    for a, b in combinations(models, 2):
        for subset in a.files:
            if subset not in b.files:
                continue
            try:
                tasks.append((a, b, subset, *_same_trials(a, b, subset, settings)))
            except Skipped as reason:
                notes.append(f"{a.name} and {b.name}, {subset}: not compared: {reason}")
    if not tasks:
        names = " and ".join(model.name for model in models)
        why = "; ".join(notes) or "no score file of a subset in common"
        raise InputError(f"--compare: {names} cannot be compared on any subset: {why}")
    n_resamples = _enough(len(tasks), settings.n_resamples, given)
    records = [difference(*task, n_resamples, settings) for task in tasks]
    corrected = bootstrap.holm([record["p"] for record in records])
    for record, p_holm in zip(records, corrected, strict=True):
        record["p_holm"] = p_holm
        record["verdict"] = _verdict_on(record)
    return _comparison_table(models, records, notes, n_resamples, settings.seed), records


def _enough(n_tests: int, n_resamples: int, given: bool) -> int:
    """Resamples with which the smallest p, 2 / (B + 1), is significant after Holm's correction."""
    needed = math.ceil(2 * n_tests / LEVEL)
    if n_resamples >= needed:
        return n_resamples
    if given:
        raise InputError(
            f"--compare: with {n_resamples} resamples none of {n_tests} tests can be significant "
            f"after Holm's correction; give --resamples {needed} or more"
        )
    return needed


def _same_trials(
    a: Model, b: Model, subset: str, settings: Settings
) -> tuple[Scores, Scores, Units]:
    """Both models' trials of a subset in one order, and what is drawn of them. Raises Skipped."""
    ours, theirs = (
        results.read_trials(model.files[subset], subset, settings)[0] for model in (a, b)
    )
    for model, trials in ((a, ours), (b, theirs)):
        if not trials.is_real.any() or trials.is_real.all():
            kind = "is empty" if not len(trials.names) else "holds one class only"
            raise Skipped(f"{model.files[subset]} {kind}")
    theirs = _in_order_of(ours, theirs)
    if not any(speaker != UNKNOWN for speaker in ours.speakers):
        ours = ours._replace(speakers=theirs.speakers, attacks=theirs.attacks)
    return ours, theirs, find_units(ours, subset, settings.cluster_by)


def _in_order_of(ours: Scores, theirs: Scores) -> Scores:
    """The second model's trials in the order of the first's. Raises Skipped if they are others."""
    position = {name: i for i, name in enumerate(theirs.names)}
    only = set(ours.names) ^ set(theirs.names)
    if only:
        raise Skipped(
            f"different trials: {len(only)} are in one file only (first: {min(only)[:60]})"
        )
    order = np.array([position[name] for name in ours.names])
    differ = np.flatnonzero(theirs.is_real[order] != ours.is_real)
    if differ.size:
        raise Skipped(
            f"the files disagree on which of {differ.size} trial(s) are real "
            f"(first: {ours.names[differ[0]][:60]})"
        )
    return Scores(
        ours.names,
        theirs.scores[order],
        ours.is_real,
        [theirs.speakers[i] for i in order] if theirs.speakers else (),
        [theirs.attacks[i] for i in order] if theirs.attacks else (),
    )


def difference(
    a: Model,
    b: Model,
    subset: str,
    ours: Scores,
    theirs: Scores,
    units: Units,
    n_resamples: int,
    settings: Settings,
) -> dict[str, object]:
    """The record of one pair and subset."""
    points = [
        eval_metrics.eer_point(eval_metrics.count_errors(trials.real, trials.fake))
        for trials in (ours, theirs)
    ]
    eers = bootstrap.resample_eers(
        [ours.scores, theirs.scores], ours.is_real, units.factors, n_resamples, settings.seed
    )
    observed = points[0].eer - points[1].eer
    widening = bootstrap.widening(units.factors, ours.is_real)
    differences = observed + widening * (eers[:, 0] - eers[:, 1] - observed)
    low, high = bootstrap.percentile_interval(differences)
    least = bootstrap.sign_test_bound(_n_disagreeing(ours, theirs, points, units))
    return {
        "model_a": a.name,
        "model_b": b.name,
        "subset": subset,
        "eer_a_percent": 100 * points[0].eer,
        "eer_b_percent": 100 * points[1].eer,
        "difference_percent": 100 * observed,
        "interval_low_percent": 100 * low,
        "interval_high_percent": 100 * high,
        "p": max(bootstrap.p_value(differences), least),
        "smallest_p": 2 / (n_resamples + 1),
        "resampled_by": units.name,
        "n_resamples": n_resamples,
        "seed": settings.seed,
    }


def _n_disagreeing(
    ours: Scores, theirs: Scores, points: Sequence[OperatingPoint], units: Units
) -> int:
    """Clusters in which the two systems, each at its EER's threshold, make different errors."""
    accepted = [
        trials.scores > point.threshold
        for trials, point in zip((ours, theirs), points, strict=True)
    ]
    differ = accepted[0] != accepted[1]
    return units.n_clusters(differ) if differ.any() else 0


def _verdict_on(record: dict) -> str:
    if record["p_holm"] >= LEVEL:
        return "not separable"
    better = record["model_a"] if record["difference_percent"] < 0 else record["model_b"]
    return f"{better} is better"


def _comparison_table(
    models: Sequence[Model],
    records: Sequence[dict],
    skipped: Sequence[str],
    n_resamples: int,
    seed: int,
) -> Table:
    units = sorted({record["resampled_by"] for record in records})
    notes = [
        "true EERs in percent, difference: A - B",
        f"paired bootstrap: both models on the same {n_resamples} resamples "
        f"(by {' or '.join(units)}), seed {seed}; 95 % interval",
        f"p: two-sided; p (Holm): corrected for {len(records)} tests, the verdict's basis "
        "(below 0.05)",
        *skipped,
    ]
    columns = [
        "A",
        "B",
        "subset",
        "EER A",
        "EER B",
        "difference",
        INTERVAL,
        "p",
        "p (Holm)",
        "verdict",
    ]
    title = " against ".join(model.name for model in models)
    return Table(title, columns, list(map(_row, records)), notes, n_names=3)


def _row(record: dict) -> list[str]:
    low, high = record["interval_low_percent"], record["interval_high_percent"]
    is_bound = record["p"] <= record["smallest_p"] * (1 + 1e-9)
    return [
        record["model_a"],
        record["model_b"],
        record["subset"],
        percent(record["eer_a_percent"]),
        percent(record["eer_b_percent"]),
        signed(record["difference_percent"]),
        f"{signed(low)} .. {signed(high)}",
        p_cell(record["p"], is_bound),
        p_cell(record["p_holm"], is_bound),
        record["verdict"],
    ]


def p_cell(p: float, is_bound: bool) -> str:
    """The p-value. The smallest that the resamples can give is only a bound: "< 0.002"."""
    return f"< {math.ceil(1000 * p) / 1000:.3f}" if is_bound else f"{p:.3f}"


# ── A model and the paper ────────────────────────────────────────────────────────────────────────
#
# EERs in percent from Xie et al., arXiv 2405.04880, Tables III, IV and VIII. Table III cuts its
# third decimal, the others and all averages round it. Where a detector's scores point the wrong way
# the paper prints 100 - EER.

PUBLISHED = Path(__file__).with_name("paper_tables.csv")
ROUNDING = 0.001  # percent: the paper's last digit
RELEASED = {  # folder of the released weights or scores -> (table, row)
    "vocoder_mellcnn": ("III", "Mel-LCNN"),
    "vocoder_w2v2lcnn": ("III", "W2V2-LCNN"),
    "vocoder_w2v2aasist": ("III", "W2V2-AASIST"),
    "codec_mellcnn": ("IV", "Mel-LCNN"),
    "codec_w2v2lcnn": ("IV", "W2V2-LCNN"),
    "codec_w2v2aasist": ("IV", "W2V2-AASIST"),
    "cotrain_w2v2aasist": ("VIII", "W2V2-AASIST(CSAM)"),
    "cotrain_w2v2aasist_CSAM": ("VIII", "W2V2-AASIST(CSAM)"),
}
INVERTED = {("III", "Mel-LCNN"): ("ITW", "C5"), ("III", "W2V2-AASIST"): ("C2",)}
MISMATCHING = {  # cells that the published score files of the same system contradict
    ("IV", "W2V2-AASIST"): {"C1": 0.008, "C2": 0.023, "C3": 0.015},
}


@cache
def published() -> dict[tuple[str, str], dict[str, float]]:
    """(table, row) -> column -> EER in percent as printed."""
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        return {
            (row.pop("table"), row.pop("row")): {c: float(eer) for c, eer in row.items()}
            for row in csv.DictReader(file)
        }


def find_row(model: str, wanted: str) -> tuple[str, str]:
    """(table, row): the one wanted ("VIII:W2V2-AASIST(CSAM)"), or if "" that of the model's name.

    Raises InputError where there is none.
    """
    table, _, name = wanted.partition(":")
    if (table, name) in published():
        return table, name
    if not wanted and model in RELEASED:
        return RELEASED[model]
    what = f"called {wanted!r}" if wanted else f"known for a model named {model!r}"
    rows = ", ".join(map(":".join, published()))
    raise InputError(f"--paper: no published row {what}; give --paper one of {rows}")


def beside_paper(evaluated: Sequence[Evaluated], wanted: str) -> tuple[Table, Figures]:
    """Ours and the paper's figure, a row a model and column of the paper.

    Raises InputError where a model has no row; see find_row().
    """
    rows: list[list[str]] = []
    figures: Figures = {}
    rows_used, intervals = [], []
    for of_model in evaluated:
        row = find_row(of_model.name, wanted)
        for column, printed in published()[row].items():
            ours = _ours(of_model, column)
            if ours is None:
                continue
            verdict = _verdict(ours, printed, column, row)
            rows.append([of_model.name, column, *_cells(ours, printed, verdict)])
            figures[of_model.name, column] = {
                "paper_percent": printed,
                "paper_row": ":".join(row),
                "paper_verdict": verdict,
            }
            intervals += [ours.interval] if ours.interval else []
        rows_used.append(f"{of_model.name}: beside arXiv 2405.04880, Table {row[0]}, {row[1]}")
    notes = [
        "EERs in percent as the paper prints them; the interval is that of the figure here",
        *interval_notes(intervals),
        *([INSIDE] if intervals else []),
        *rows_used,
    ]
    columns = ["model", "subset", "here", "paper", "difference", INTERVAL, "verdict"]
    return Table("Beside the paper", columns, rows, notes, n_names=2), figures


INSIDE = (
    "inside the interval: other speakers and trials could have given the paper's figure with the "
    "weights scored here; the paper scored the same trials, so what differs comes from training "
    "(seed, epoch, data), which the interval does not hold: it cannot show that the two agree"
)


class _Ours(NamedTuple):
    """A figure of ours as the paper prints it."""

    value: float
    interval: Interval | None
    inverted: bool


def _ours(of_model: Evaluated, column: str) -> _Ours | None:
    if column in AVERAGED:
        average = of_model.averages.get(column)
        return average and _Ours(average.value, average.interval, average.inverted)
    result = of_model.results.get(column)
    if result is None or result.eer is None:
        return None
    return _Ours(result.eer_paper, result.interval_paper, result.inverted)


def _cells(ours: _Ours, printed: float, verdict: str) -> list[str]:
    return [
        percent(ours.value) + (MARK if ours.inverted else ""),
        f"{printed:.3f}",
        signed(ours.value - printed),
        interval_cell(ours.interval),
        verdict,
    ]


def _verdict(ours: _Ours, printed: float, column: str, row: tuple[str, str]) -> str:
    verdict = "differs"
    if abs(ours.value - printed) <= ROUNDING:
        verdict = "equal"
    elif ours.interval:
        inside = ours.interval.low <= printed <= ours.interval.high
        verdict = "inside the interval" if inside else "differs: outside the interval"
    if column in INVERTED.get(row, ()):
        verdict += f"; the paper's detector is inverted (EER {100 - printed:.3f})"
    if column in MISMATCHING.get(row, {}):
        verdict += f"; the paper's own score file gives {MISMATCHING[row][column]:.3f}"
    return verdict
