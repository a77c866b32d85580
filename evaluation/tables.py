"""Tables of text, and the formats they are printed in."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from evaluation.results import (
    AVERAGED,
    COLUMNS,
    SUBSETS,
    Average,
    Evaluated,
    Interval,
    Result,
)
from runtime.cli import printable

ABSENT = "-"
MARK = "*"  # on the paper's figure for a detector whose scores point the wrong way
ZERO_MARK = "°"  # on an interval whose upper end is the rule of three
SELF_MARK = "†"  # on what was calibrated or decided on the very trials it is judged on
MARKS = MARK + ZERO_MARK + SELF_MARK
FIGURE_STARTS = "0123456789+-"


@dataclass(frozen=True)
class Table:
    """Cells of text, ready to print. The first columns name the row; figures align right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)
    n_names: int = 1

    def is_left(self, column: int) -> bool:
        """Whether the column aligns left: it names the row, or has no figure in it."""
        has_figures = any(row[column][:1] in FIGURE_STARTS for row in self.rows)
        return column < self.n_names or not has_figures


def percent(value: float | None, digits: int = 3) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no "-0.000"


# ── What goes into them ──────────────────────────────────────────────────────────────────────────


def eer_table(evaluated: Sequence[Evaluated], subsets: Sequence[str] = SUBSETS) -> Table:
    """One row a model, the columns of the paper's tables plus A1..A3; notes explain the marks."""
    columns = _columns(evaluated, subsets)
    rows, notes = [], []
    for of_model in evaluated:
        rows.append([of_model.name, *(_eer_cell(of_model, column) for column in columns)])
        notes += _notes_on(of_model, subsets)
    averages = [average for of_model in evaluated for average in of_model.averages.values()]
    if any(average.inverted for average in averages):
        notes.append(
            "averages are means of the figures shown, as in the paper: "
            "inverted detectors count as 100 - EER"
        )
    return Table("EER (%)", ["model", *columns], rows, notes)


def _columns(evaluated: Sequence[Evaluated], subsets: Sequence[str]) -> list[str]:
    """The columns of the subsets asked for; of files named one by one, only those there are."""
    present = [subset for of_model in evaluated for subset in of_model.results]
    if all(of_model.model.by_file for of_model in evaluated):
        subsets = [subset for subset in subsets if subset in present]
    columns = [column for column in COLUMNS if set(AVERAGED.get(column, [column])) <= set(subsets)]
    others = [subset for subset in present if subset not in COLUMNS]
    return columns + list(dict.fromkeys(others))


def _eer_cell(of_model: Evaluated, column: str) -> str:
    if column in AVERAGED:
        average = of_model.averages.get(column)
        if average is None:
            return ABSENT
        return percent(average.value) + (MARK if average.inverted else "")
    result = of_model.results.get(column)
    if result is None:
        return ABSENT
    figure = result.eer if of_model.model.by_file else result.eer_paper
    return percent(figure) + (MARK if result.inverted else "")


def _notes_on(of_model: Evaluated, subsets: Sequence[str]) -> list[str]:
    """What a reader must know about a model's results, kind by kind."""
    kinds: list[list[str]] = [[] for _ in range(6)]
    inverted, unequal, without_eer, changed, missing, remarks = kinds
    for subset, result in of_model.results.items():
        where = f"{of_model.name}, {subset}"
        if result.inverted:
            inverted.append(f"{MARK} {where}: {_about_inverted(of_model, result)}")
        if result.unequal:
            unequal.append(f"{where}: {result.unequal}; the EER is the mean of the two")
        if result.note:
            without_eer.append(f"{where}: no EER: {result.note}")
        if result.changed:
            changed.append(
                f"{where}: WARNING: {result.file} was edited or damaged since generate_score.py "
                "wrote it (its SHA-256 is not the one in provenance.json)"
            )
        if result.n_missing:
            missing.append(
                f"{where}: {result.n_missing} trials have no score (see {subset}_missing.txt)"
            )
        remarks += [f"{where}: {remark}" for remark in result.remarks]
    notes = [note for kind in kinds for note in kind]
    absent = [subset for subset in subsets if subset not in of_model.results]
    if absent and not of_model.model.by_file:
        notes.append(f"{of_model.name}: no score file of {', '.join(absent)}")
    return notes


def _about_inverted(of_model: Evaluated, result: Result) -> str:
    if of_model.model.by_file:
        return (
            "the EER is over 50 %: the scores point the wrong way; a higher score must mean more "
            "real. --negate turns them round"
        )
    return (
        f"the EER is {percent(result.eer)} %: the scores point the wrong way; the table prints "
        "100 - EER, as the paper does"
    )


INTERVAL = "95 % interval"  # heads a column of cells such as "0.1 .. 0.2"; CSV makes two of it


def interval_cell(interval: Interval | None) -> str:
    if interval is None:
        return ABSENT
    mark = ZERO_MARK if interval.rule_of_three else ""
    return f"{percent(interval.low)} .. {percent(interval.high)}{mark}"


def interval_notes(intervals: Sequence[Interval]) -> list[str]:
    """What the intervals of a table are: the method, the units, the rule of three."""
    if not intervals:
        return []
    first = intervals[0]
    notes = [
        "interval: 95 %, log odds of the EER +- t x standard error, "
        f"{first.n_resamples} resamples, seed {first.seed}"
    ]
    units = " ".join(interval.unit for interval in intervals)
    if "speaker" in units and "speakers unknown" not in units:
        notes.append("speaker: all trials of a speaker are drawn together")
    if " x attack" in units:
        notes.append("speaker x attack: both are drawn, a trial counts the product of its two")
    if "source utterance" in units:
        notes.append(
            "source utterance: a real clip and its copies (F01_x.wav of x.wav) are drawn together"
        )
    if any(interval.rule_of_three for interval in intervals):
        notes.append(
            f"{ZERO_MARK} the smaller class has no error, from which resampling cannot "
            "extrapolate: the upper end is the rule of three, 3 / clusters of that class "
            "(where all is wrong, the lower end is 100 - that)"
        )
    return notes


def interval_table(evaluated: Sequence[Evaluated]) -> Table:
    """One row a model and subset: the true EER, its interval, and the errors behind it."""
    rows, intervals = [], []
    for of_model in evaluated:
        for result in of_model.with_eer:
            if result.interval:
                rows.append(_interval_row(result))
                intervals.append(result.interval)
        for average in of_model.averages.values():
            if average.interval:
                rows += _average_rows(of_model.name, average)
                intervals.append(average.interval)
    notes = [*interval_notes(intervals), "errors: at the EER's threshold"]
    if any(of_model.averages for of_model in evaluated):
        notes.append(
            "CAVG, AVG: means of the figures as printed above, their subsets drawn together; "
            "pooled: the EER of all their trials at one threshold"
        )
    columns = [
        "model",
        "subset",
        "EER (%)",
        INTERVAL,
        "real rejected",
        "fake accepted",
        "resampled by",
    ]
    return Table("What the EERs are worth", columns, rows, notes, n_names=2)


def _interval_row(result: Result) -> list[str]:
    return [
        result.model,
        result.subset,
        percent(result.eer),
        interval_cell(result.interval),
        f"{result.point.false_rejections}/{len(result.real)}",
        f"{result.point.false_acceptances}/{len(result.fake)}",
        result.interval.unit,
    ]


def _average_rows(model: str, average: Average) -> list[list[str]]:
    mark = MARK if average.inverted else ""
    interval = average.interval
    none = [ABSENT, ABSENT]
    return [
        [
            model,
            average.name,
            percent(average.value) + mark,
            interval_cell(interval),
            *none,
            interval.unit,
        ],
        [model, f"{average.name} pooled", percent(average.pooled), ABSENT, *none, ABSENT],
    ]


# ── How they are printed ─────────────────────────────────────────────────────────────────────────


def render(table: Table, style: str) -> str:
    """The table as text, "table", "markdown", "csv" or "latex", ending in a newline."""
    return {"table": _plain, "markdown": _markdown, "csv": _csv, "latex": _latex}[style](table)


def _plain(table: Table) -> str:
    lines = [[printable(cell) for cell in row] for row in [table.columns, *table.rows]]
    columns = [
        _aligned([line[i] for line in lines], table.is_left(i)) for i in range(len(table.columns))
    ]
    text = [table.title]
    text += ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    text += [f"  {printable(note)}" for note in table.notes]
    return "\n".join(text) + "\n"


def _aligned(cells: Sequence[str], left: bool) -> list[str]:
    """The cells of one column, their figures aligned; marks stand in a column of their own."""
    figures = [cell.rstrip(MARK) for cell in cells]
    width = max(map(len, figures))
    any_marked = figures != list(cells)
    aligned = []
    for cell, figure in zip(cells, figures, strict=True):
        mark = cell[len(figure) :].ljust(1) if any_marked else ""
        aligned.append((figure.ljust(width) if left else figure.rjust(width)) + mark)
    return aligned


def _markdown(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_escaped(printable(cell), "\\|*`<[") for cell in cells) + " |"

    rule = [":--" if table.is_left(i) else "--:" for i in range(len(table.columns))]
    text = [
        f"**{table.title}**",
        "",
        row(table.columns),
        "| " + " | ".join(rule) + " |",
        *map(row, table.rows),
    ]
    if table.notes:
        text += ["", *("- " + _escaped(printable(note), "\\*`<[") for note in table.notes)]
    return "\n".join(text) + "\n"


def _csv(table: Table) -> str:
    """Bare figures, intervals in two columns; a last column names the marked figures of its row."""
    marked = [
        " ".join(
            column for column, cell in zip(table.columns, row, strict=True) if cell.endswith(MARK)
        )
        for row in table.rows
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    extra = ["inverted"] if any(marked) else []
    header = []
    for column in table.columns:
        header += ["95 % low", "95 % high"] if column == INTERVAL else [column]
    writer.writerow([*header, *extra])
    for row, inverted in zip(table.rows, marked, strict=True):
        cells = [printable(cell) for cell in row[: table.n_names]]
        for column, cell in list(zip(table.columns, row, strict=True))[table.n_names :]:
            cells += _bare_cells(column, cell)
        writer.writerow([*cells, *([inverted] if extra else [])])
    return text.getvalue()


def _bare_cells(column: str, cell: str) -> list[str]:
    """A figure without its mark; an interval's two ends."""
    cell = "" if cell == ABSENT else cell.rstrip(MARKS)
    if column != INTERVAL:
        return [cell]
    low, _, high = cell.partition(" .. ")
    return [low, high]


LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "°": r"$^\circ$",
    "†": r"$^\dagger$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def _latex(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return "  " + " & ".join(map(_latex_text, cells)) + r" \\"

    alignment = "".join("l" if table.is_left(i) else "r" for i in range(len(table.columns)))
    text = [
        f"% {table.title}; needs \\usepackage{{booktabs}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"  \toprule",
        row(table.columns),
        r"  \midrule",
        *map(row, table.rows),
        r"  \bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(text + [f"% {printable(note)}" for note in table.notes]) + "\n"


def _latex_text(cell: str) -> str:
    return "".join(LATEX_SPECIAL.get(c, c) for c in printable(cell))


def _escaped(text: str, special: str) -> str:
    return "".join("\\" + c if c in special else c for c in text)
