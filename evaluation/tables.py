"""Tables of text, and the formats they are printed in."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from evaluation.results import AVERAGED, COLUMNS, SUBSETS, Model, Result, average
from runtime.cli import printable

ABSENT = "-"
MARK = "*"  # on the paper's figure for a detector whose scores point the wrong way


@dataclass(frozen=True)
class Table:
    """Cells of text, ready to print. The first columns name the row; columns of figures align right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default_factory=list)
    n_names: int = 1

    def is_left(self, column: int) -> bool:
        """Whether the column aligns left: it names the row, or has no figure in it."""
        return column < self.n_names or not any(
            row[column][:1] in "0123456789+-" for row in self.rows
        )


def percent(value: float | None, digits: int = 3) -> str:
    return ABSENT if value is None else f"{value:.{digits}f}"


def signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no "-0.000"


# ── What goes into them ──────────────────────────────────────────────────────────────────────────


def eer_table(
    results: Sequence[Result], models: Sequence[Model], subsets: Sequence[str] = SUBSETS
) -> Table:
    """One row a model, columns as in the paper's tables plus A1..A3; the notes explain marks and dashes."""
    columns = [column for column in COLUMNS if set(AVERAGED.get(column, [column])) <= set(subsets)]
    rows, notes = [], []
    for model in models:
        own = [result for result in results if result.model == model.name]
        rows.append([model.name] + [_eer_cell(own, column) for column in columns])
        notes += _notes_on(model.name, own, subsets)
    if any(result.inverted for result in results) and "CAVG" in columns:
        notes.append(
            "averages are means of the figures shown, as in the paper: inverted detectors count as 100 - EER"
        )
    return Table("EER (%)", ["model", *columns], rows, notes)


def _eer_cell(results: Sequence[Result], column: str) -> str:
    if column in AVERAGED:
        inside = any(result.inverted for result in results if result.subset in AVERAGED[column])
        mean = average(results, column)
        return percent(mean) + (MARK if inside and mean is not None else "")
    result = next((result for result in results if result.subset == column), None)
    return percent(result.eer_paper) + (MARK if result.inverted else "") if result else ABSENT


def _notes_on(model: str, results: Sequence[Result], subsets: Sequence[str]) -> list[str]:
    notes = [
        f"{MARK} {model}, {result.subset}: the EER is {percent(result.eer)} %: the scores point the wrong way; the table "
        "prints 100 - EER, as the paper does"
        for result in results
        if result.inverted
    ]
    notes += [
        f"{model}, {result.subset}: no EER: {result.note}" for result in results if result.note
    ]
    notes += [
        f"{model}, {result.subset}: WARNING: {result.file} was edited or damaged since generate_score.py wrote it "
        "(its SHA-256 is not the one in provenance.json)"
        for result in results
        if "changed" in result.extra
    ]
    notes += [
        f"{model}, {result.subset}: {result.extra['n_missing']} trials have no score (see {result.subset}_missing.txt)"
        for result in results
        if "n_missing" in result.extra
    ]
    present = {result.subset for result in results}
    if absent := [subset for subset in subsets if subset not in present]:
        notes.append(f"{model}: no score file of {', '.join(absent)}")
    return notes


def interval_table(results: Sequence[Result], n_resamples: int, seed: int) -> Table:
    """One row a model and subset: the true EER, its interval, and the errors behind it."""
    rows = [
        [
            result.model,
            result.subset,
            percent(result.eer),
            f"{percent(result.interval.low)} .. {percent(result.interval.high)}"
            + ("°" if result.interval.rule_of_three else ""),
            f"{result.point.false_rejections}/{len(result.real)}",
            f"{result.point.false_acceptances}/{len(result.fake)}",
            result.interval.unit,
        ]
        for result in results
        if result.interval
    ]
    notes = [
        f"interval: 95 %, percentile bootstrap, {n_resamples} resamples, seed {seed}; errors: at the EER's threshold"
    ]
    if any(result.interval and result.interval.unit != "trial" for result in results):
        notes.append(
            "source utterance: a real clip and its copies (F01_x.wav of x.wav) are drawn together; "
            "trial: each trial is drawn on its own"
        )
    if any(result.interval and result.interval.rule_of_three for result in results):
        notes.append(
            "° no error seen, which the bootstrap cannot extrapolate from: the upper end is the rule of three, "
            "3 / trials of the smaller class"
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
    return Table("What the EERs are worth", columns, rows, notes, n_names=2)


# ── How they are printed ─────────────────────────────────────────────────────────────────────────


def render(table: Table, style: str) -> str:
    """The table as text, "table", "markdown", "csv" or "latex", ending in a newline."""
    return {"table": _plain, "markdown": _markdown, "csv": _csv, "latex": _latex}[style](table)


def _plain(table: Table) -> str:
    lines = [[printable(cell) for cell in row] for row in [table.columns, *table.rows]]
    widths = [max(len(line[i].rstrip(MARK)) for line in lines) for i in range(len(table.columns))]
    marks = [any(line[i].endswith(MARK) for line in lines) for i in range(len(table.columns))]
    text = [table.title]
    for line in lines:
        cells = [
            _aligned(cell, width, mark, table.is_left(i))
            for i, (cell, width, mark) in enumerate(zip(line, widths, marks))
        ]
        text.append("  ".join(cells).rstrip())
    text += [f"  {printable(note)}" for note in table.notes]
    return "\n".join(text) + "\n"


def _aligned(cell: str, width: int, marked: bool, left: bool) -> str:
    """The cell, its figure aligned; marks stand in a column of their own."""
    figure = cell.rstrip(MARK)
    mark = cell[len(figure) :].ljust(1) if marked else ""
    return (figure.ljust(width) if left else figure.rjust(width)) + mark


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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    marked = [
        " ".join(column for column, cell in zip(table.columns, row) if cell.endswith(MARK))
        for row in table.rows
    ]
    any_marked = any(marked)
    writer.writerow([*table.columns, *["inverted"] * any_marked])
    for row, inverted in zip(table.rows, marked):
        names, figures = row[: table.n_names], row[table.n_names :]
        writer.writerow(
            [
                *map(printable, names),
                *("" if cell == ABSENT else cell.rstrip(MARK) for cell in figures),
                *[inverted] * any_marked,
            ]
        )
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
        return (
            "  "
            + " & ".join(
                "".join(LATEX_SPECIAL.get(c, c) for c in printable(cell)) for cell in cells
            )
            + r" \\"
        )

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


def _escaped(text: str, special: str) -> str:
    return "".join("\\" + c if c in special else c for c in text)
