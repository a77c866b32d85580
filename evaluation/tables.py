"""Tables of text, and the formats they are printed in."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from evaluation.results import AVERAGED, COLUMNS, SUBSETS, Evaluated, Result, average
from runtime.cli import printable

ABSENT = "-"
MARK = "*"  # on the paper's figure for a detector whose scores point the wrong way
ZERO_MARK = "°"  # on an interval whose upper end is the rule of three
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
    columns = [column for column in COLUMNS if set(AVERAGED.get(column, [column])) <= set(subsets)]
    rows, notes = [], []
    for of_model in evaluated:
        rows.append([of_model.name, *(_eer_cell(of_model, column) for column in columns)])
        notes += _notes_on(of_model, subsets)
    inverted = any(result.inverted for of_model in evaluated for result in of_model.with_eer)
    if inverted and "CAVG" in columns:
        notes.append(
            "averages are means of the figures shown, as in the paper: "
            "inverted detectors count as 100 - EER"
        )
    return Table("EER (%)", ["model", *columns], rows, notes)


def _eer_cell(of_model: Evaluated, column: str) -> str:
    if column in AVERAGED:
        parts = [of_model.results.get(subset) for subset in AVERAGED[column]]
        mean = average(of_model, column)
        marked = mean is not None and any(part.inverted for part in parts)
        return percent(mean) + (MARK if marked else "")
    result = of_model.results.get(column)
    if result is None:
        return ABSENT
    return percent(result.eer_paper) + (MARK if result.inverted else "")


def _notes_on(of_model: Evaluated, subsets: Sequence[str]) -> list[str]:
    """What a reader must know about a model's results, kind by kind."""
    inverted, without_eer, changed, missing = [], [], [], []
    for subset, result in of_model.results.items():
        where = f"{of_model.name}, {subset}"
        if result.inverted:
            inverted.append(
                f"{MARK} {where}: the EER is {percent(result.eer)} %: the scores point the wrong "
                "way; the table prints 100 - EER, as the paper does"
            )
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
    notes = inverted + without_eer + changed + missing
    absent = [subset for subset in subsets if subset not in of_model.results]
    if absent:
        notes.append(f"{of_model.name}: no score file of {', '.join(absent)}")
    return notes


def interval_table(evaluated: Sequence[Evaluated], n_resamples: int, seed: int) -> Table:
    """One row a model and subset: the true EER, its interval, and the errors behind it."""
    results = [result for of_model in evaluated for result in of_model.with_eer if result.interval]
    notes = [
        f"interval: 95 %, percentile bootstrap, {n_resamples} resamples, seed {seed}; "
        "errors: at the EER's threshold"
    ]
    if any(result.interval.unit != "trial" for result in results):
        notes.append(
            "source utterance: a real clip and its copies (F01_x.wav of x.wav) are drawn together; "
            "trial: each trial is drawn on its own"
        )
    if any(result.interval.rule_of_three for result in results):
        notes.append(
            f"{ZERO_MARK} no error seen, which the bootstrap cannot extrapolate from: the upper "
            "end is the rule of three, 3 / trials of the smaller class"
        )
    columns = [
        "model",
        "subset",
        "EER (%)",
        "95 % interval",
        "real rejected",
        "fake accepted",
        "resampled by",
    ]
    rows = [_interval_row(result) for result in results]
    return Table("What the EERs are worth", columns, rows, notes, n_names=2)


def _interval_row(result: Result) -> list[str]:
    interval = result.interval
    mark = ZERO_MARK if interval.rule_of_three else ""
    return [
        result.model,
        result.subset,
        percent(result.eer),
        f"{percent(interval.low)} .. {percent(interval.high)}{mark}",
        f"{result.point.false_rejections}/{len(result.real)}",
        f"{result.point.false_acceptances}/{len(result.fake)}",
        interval.unit,
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
    """Bare figures; where any is marked, a last column names those of its row."""
    marked = [
        " ".join(
            column for column, cell in zip(table.columns, row, strict=True) if cell.endswith(MARK)
        )
        for row in table.rows
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    extra = ["inverted"] if any(marked) else []
    writer.writerow([*table.columns, *extra])
    for row, inverted in zip(table.rows, marked, strict=True):
        names = [printable(cell) for cell in row[: table.n_names]]
        figures = ["" if cell == ABSENT else cell.rstrip(MARK) for cell in row[table.n_names :]]
        writer.writerow([*names, *figures, *([inverted] if extra else [])])
    return text.getvalue()


LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "°": r"$^\circ$",
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
