"""Two figures beside each other: of two models on the same trials, and of a model and the paper."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

import eval_metrics
from evaluation import bootstrap
from evaluation.results import AVERAGED, COLUMNS, Evaluated, Figures, Model, Result, average
from evaluation.tables import ABSENT, MARK, Table, percent, signed
from formats import score_files
from formats.score_files import Scores
from runtime.cli import InputError

# ── Two models ───────────────────────────────────────────────────────────────────────────────────


def compare(a: Model, b: Model, n_resamples: int, seed: int) -> tuple[Table, list[dict]]:
    """Paired bootstrap of EER(A) - EER(B) on every subset of both: (table, records for JSON).

    Raises:
        InputError: the files of a subset hold other trials, or no subset has an EER in both.
    """
    records = []
    for subset in a.files:
        if subset in b.files:
            records += _difference(a, b, subset, n_resamples, seed)
    if not records:
        raise InputError(f"--compare: {a.name} and {b.name} have no subset with an EER in common")
    corrected = bootstrap.holm([record["p"] for record in records])
    for record, p_holm in zip(records, corrected, strict=True):
        better = a.name if record["difference"] < 0 else b.name
        separable = p_holm < 1 - bootstrap.COVERAGE
        record["p_holm"] = p_holm
        record["verdict"] = f"{better} is better" if separable else "not separable"
    units = sorted({record["resampled_by"] for record in records})
    notes = [
        f"A: {a.name}; B: {b.name}; true EERs in percent, difference: A - B",
        f"paired bootstrap: both models on the same {n_resamples} resamples "
        f"(by {' or '.join(units)}), seed {seed}; 95 % interval",
        f"p: two-sided; p (Holm): corrected for looking at {len(records)} subsets, "
        "the verdict's basis (below 0.05)",
    ]
    columns = [
        "subset",
        "EER A",
        "EER B",
        "difference",
        "95 % interval",
        "p",
        "p (Holm)",
        "verdict",
    ]
    table = Table(f"{a.name} against {b.name}", columns, list(map(_row, records)), notes)
    return table, records


def _row(record: dict) -> list[str]:
    low, high = record["interval"]
    return [
        record["subset"],
        percent(record["eer_a"]),
        percent(record["eer_b"]),
        signed(record["difference"]),
        f"{signed(low)} .. {signed(high)}",
        f"{record['p']:.3f}",
        f"{record['p_holm']:.3f}",
        record["verdict"],
    ]


def _difference(a: Model, b: Model, subset: str, n_resamples: int, seed: int) -> list[dict]:
    """The record of one subset; none where it has one class only."""
    ours, theirs = (score_files.read_scores(model.files[subset]) for model in (a, b))
    if ours.is_real.all() or not ours.is_real.any():
        return []
    theirs = _in_order_of(ours, theirs, a.files[subset], b.files[subset])
    clusters, unit = bootstrap.find_clusters(ours.names, subset)
    systems = [ours.scores, theirs.scores]
    eers = bootstrap.resample_eers(systems, ours.is_real, clusters, n_resamples, seed)
    differences = 100 * (eers[:, 0] - eers[:, 1])
    eer_a, eer_b = (100 * eval_metrics.compute_eer(x.real, x.fake)[0] for x in (ours, theirs))
    record = {
        "model_a": a.name,
        "model_b": b.name,
        "subset": subset,
        "eer_a": eer_a,
        "eer_b": eer_b,
        "difference": eer_a - eer_b,
        "interval": list(bootstrap.interval(differences)),
        "p": bootstrap.p_value(differences),
        "resampled_by": unit,
    }
    return [record]


def _in_order_of(ours: Scores, theirs: Scores, our_file: Path, their_file: Path) -> Scores:
    """The second model's trials in the order of the first's.

    Raises InputError unless they are the same trials with the same labels.
    """
    position = {name: i for i, name in enumerate(theirs.names)}
    only = set(ours.names) ^ set(theirs.names)
    if only:
        raise InputError(
            f"--compare: {our_file} and {their_file} hold different trials: {len(only)} are in one "
            f"file only (first: {min(only)[:60]}); score both models on the same trials"
        )
    order = np.array([position[name] for name in ours.names])
    differ = np.flatnonzero(theirs.is_real[order] != ours.is_real)
    if differ.size:
        raise InputError(
            f"--compare: {our_file} and {their_file} disagree on which of {differ.size} trial(s) "
            f"are real (first: {ours.names[differ[0]][:60]}); check their third column"
        )
    return Scores(ours.names, theirs.scores[order], ours.is_real)


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
    notes = ["EERs in percent as the paper prints them; the interval is that of the figure here"]
    figures: Figures = {}
    for of_model in evaluated:
        row = find_row(of_model.name, wanted)
        found = _beside_row(of_model, row)
        rows += [[of_model.name, column, *cells] for column, (cells, _) in found.items()]
        for column, (_, record) in found.items():
            figures[of_model.name, column] = record
        notes.append(f"{of_model.name}: beside arXiv 2405.04880, Table {row[0]}, {row[1]}")
    columns = ["model", "subset", "here", "paper", "difference", "95 % interval", "verdict"]
    return Table("Beside the paper", columns, rows, notes, n_names=2), figures


def _beside_row(
    of_model: Evaluated, row: tuple[str, str]
) -> dict[str, tuple[list[str], dict[str, object]]]:
    """Column -> (cells, record) of the columns that both sides have."""
    printed, found = published()[row], {}
    for column in (column for column in COLUMNS if column in printed):
        result = of_model.results.get(column)
        if column in AVERAGED:
            ours = average(of_model, column)
        else:
            ours = result and result.eer_paper
        if ours is None:
            continue
        verdict = _verdict(ours, printed[column], result, column, row)
        cells = [
            percent(ours) + (MARK if result and result.inverted else ""),
            f"{printed[column]:.3f}",
            signed(ours - printed[column]),
            _interval(result),
            verdict,
        ]
        record = {
            "paper": printed[column],
            "paper_row": ":".join(row),
            "paper_verdict": verdict,
        }
        found[column] = cells, record
    return found


def _interval(result: Result | None) -> str:
    if not result or not result.interval:
        return ABSENT
    low, high = _as_printed(result)
    return f"{low:.3f} .. {high:.3f}"


def _as_printed(result: Result) -> tuple[float, float]:
    low, high = result.interval.low, result.interval.high
    return (100 - high, 100 - low) if result.inverted else (low, high)


def _verdict(
    ours: float, printed: float, result: Result | None, column: str, row: tuple[str, str]
) -> str:
    verdict = "differs"
    if abs(ours - printed) <= ROUNDING:
        verdict = "equal"
    elif result and result.interval:
        low, high = _as_printed(result)
        inside = low <= printed <= high
        verdict = "inside the interval" if inside else "differs: outside the interval"
    if column in INVERTED.get(row, ()):
        verdict += f"; the paper's detector is inverted (EER {100 - printed:.3f})"
    if column in MISMATCHING.get(row, {}):
        verdict += f"; the paper's own score file gives {MISMATCHING[row][column]:.3f}"
    return verdict
