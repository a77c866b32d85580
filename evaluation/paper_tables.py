"""The published figures, and ours beside them.

EERs in percent from Xie et al., "The Codecfake Dataset and Countermeasures for the Universally
Detection of Deepfake Audio", arXiv 2405.04880, Tables III, IV and VIII. Table III cuts its third
decimal, the others and all averages round it. Where a detector's scores point the wrong way the
paper prints 100 - EER.
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.results import AVERAGED, COLUMNS, Model, Result, average
from evaluation.tables import ABSENT, MARK, Table, percent, signed
from runtime.cli import InputError

PAPER_COLUMNS = ("19LA", "ITW", "C1", "C2", "C3", "C4", "C5", "C6", "C7", "CAVG", "AVG")
TABLES = {
    "III": {  # trained on ASVspoof2019 LA
        "Mel-LCNN": (
            5.084,
            47.021,
            36.127,
            49.304,
            39.234,
            49.160,
            46.991,
            36.967,
            49.584,
            43.910,
            39.941,
        ),
        "W2V2-LCNN": (
            0.625,
            41.385,
            19.481,
            45.260,
            45.010,
            20.683,
            34.321,
            44.390,
            43.717,
            36.123,
            32.764,
        ),
        "W2V2-AASIST": (
            0.122,
            23.713,
            40.142,
            42.908,
            44.564,
            33.580,
            39.197,
            44.889,
            45.804,
            41.583,
            34.991,
        ),
    },
    "IV": {  # trained on Codecfake
        "Mel-LCNN": (
            26.826,
            42.635,
            2.147,
            9.563,
            8.618,
            12.239,
            20.033,
            8.951,
            30.867,
            13.203,
            17.987,
        ),
        "W2V2-LCNN": (4.433, 4.975, 0.030, 0.151, 0.144, 0.113, 0.635, 2.185, 5.178, 1.205, 1.983),
        "W2V2-AASIST": (
            3.806,
            9.606,
            0.167,
            0.008,
            0.023,
            0.015,
            0.038,
            0.106,
            0.884,
            0.177,
            1.628,
        ),
    },
    "VIII": {  # trained on both
        "Mel-LCNN": (
            10.214,
            36.757,
            6.675,
            22.052,
            7.310,
            10.410,
            15.906,
            7.620,
            30.307,
            14.326,
            16.361,
        ),
        "W2V2-LCNN": (
            1.008,
            5.847,
            0.295,
            2.480,
            2.540,
            4.203,
            19.965,
            23.949,
            34.563,
            12.571,
            10.539,
        ),
        "W2V2-AASIST": (
            0.625,
            7.184,
            0.015,
            0.030,
            0.023,
            0.023,
            0.038,
            0.098,
            0.627,
            0.122,
            0.963,
        ),
        "W2V2-AASIST(SAM)": (
            0.231,
            7.483,
            0.008,
            0.008,
            0.000,
            0.000,
            0.015,
            0.038,
            0.696,
            0.109,
            0.942,
        ),
        "W2V2-AASIST(ASAM)": (
            0.314,
            9.994,
            0.015,
            0.030,
            0.015,
            0.008,
            0.023,
            0.060,
            0.711,
            0.123,
            1.241,
        ),
        "W2V2-AASIST(CSAM)": (
            0.313,
            4.689,
            0.008,
            0.023,
            0.008,
            0.008,
            0.030,
            0.030,
            0.431,
            0.077,
            0.616,
        ),
    },
}
RELEASED = {  # folder of the released weights or scores -> (table, row)
    **{
        f"{prefix}_{suffix}": (table, row)
        for prefix, table in (("vocoder", "III"), ("codec", "IV"))
        for suffix, row in (
            ("mellcnn", "Mel-LCNN"),
            ("w2v2lcnn", "W2V2-LCNN"),
            ("w2v2aasist", "W2V2-AASIST"),
        )
    },
    "cotrain_w2v2aasist": ("VIII", "W2V2-AASIST(CSAM)"),
    "cotrain_w2v2aasist_CSAM": ("VIII", "W2V2-AASIST(CSAM)"),
}
INVERTED = {("III", "Mel-LCNN"): ("ITW", "C5"), ("III", "W2V2-AASIST"): ("C2",)}
MISMATCHING = {  # cells that the published score files of the same system contradict
    ("IV", "W2V2-AASIST"): {"C1": 0.008, "C2": 0.023, "C3": 0.015},
}
ROUNDING = 0.001  # percent: the paper's last digit


def published(table: str, row: str) -> dict[str, float]:
    """Column -> EER in percent as printed."""
    return dict(zip(PAPER_COLUMNS, TABLES[table][row]))


def find_row(model: str, wanted: str) -> tuple[str, str]:
    """(table, row) of a model: as `wanted` ("VIII:W2V2-AASIST(CSAM)"), or by its folder's name if that is empty."""
    table, _, row = wanted.partition(":")
    if row in TABLES.get(table, {}):
        return table, row
    if not wanted and model in RELEASED:
        return RELEASED[model]
    rows = ", ".join(f"{table}:{row}" for table, rows in TABLES.items() for row in rows)
    raise InputError(
        f"--paper: no published row {f'called {wanted!r}' if wanted else f'known for a model named {model!r}'}; "
        f"give --paper one of {rows}"
    )


def comparison_table(models: Sequence[Model], results: Sequence[Result], wanted: str) -> Table:
    """Ours and the paper's figure, a row a model and column of the paper. Fills `extra` of the results.

    Raises InputError where a model has no row; see find_row().
    """
    rows, notes = (
        [],
        ["EERs in percent as the paper prints them; the interval is that of the figure here"],
    )
    for model in models:
        row = find_row(model.name, wanted)
        rows += [
            [model.name, *cells]
            for cells in _compare([r for r in results if r.model == model.name], row)
        ]
        notes.append(f"{model.name}: beside arXiv 2405.04880, Table {row[0]}, {row[1]}")
    return Table(
        "Beside the paper",
        ["model", "subset", "here", "paper", "difference", "95 % interval", "verdict"],
        rows,
        notes,
        n_names=2,
    )


def _compare(results: Sequence[Result], row: tuple[str, str]) -> list[list[str]]:
    found = {result.subset: result for result in results if result.point}
    rows, printed = [], published(*row)
    for column in (column for column in COLUMNS if column in printed):
        result = found.get(column)
        ours = average(results, column) if column in AVERAGED else result and result.eer_paper
        if ours is None:
            continue
        verdict = _verdict(ours, printed[column], result, column, row)
        if result:
            result.extra.update(
                paper=printed[column], paper_row=":".join(row), paper_verdict=verdict
            )
        rows.append(
            [
                column,
                percent(ours) + (MARK if result and result.inverted else ""),
                f"{printed[column]:.3f}",
                signed(ours - printed[column]),
                _interval(result),
                verdict,
            ]
        )
    return rows


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
        verdict = (
            "inside the interval" if low <= printed <= high else "differs: outside the interval"
        )
    if column in INVERTED.get(row, ()):
        verdict += f"; the paper's detector is inverted (EER {100 - printed:.3f})"
    if column in MISMATCHING.get(row, {}):
        verdict += f"; the paper's own score file gives {MISMATCHING[row][column]:.3f}"
    return verdict
