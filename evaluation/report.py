"""One self-contained HTML page of an evaluation: tables, figures and where they come from."""

from __future__ import annotations

import base64
import io
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evaluation.results import Result, sha256
from evaluation.tables import Table
from runtime import cli, files

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: .5rem 0 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; overflow-wrap: anywhere; }
.lead, .notes { color: #555; } .notes { font-size: .85rem; padding-left: 1.2rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #333; } .name { text-align: left; } tbody tr:hover { background: #f4f7fa; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: end; } figure { margin: 0; max-width: 100%; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .85rem; max-width: 26rem; }
code, .sha td { font-family: ui-monospace, monospace; font-size: .8rem; overflow-wrap: anywhere; white-space: normal; }
.sha td { text-align: left; } dt { font-weight: 600; } dd { margin: 0 0 .4rem; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 9pt; } .wide { overflow: visible; } table, .notes, figcaption { font-size: 7pt; }
  th, td { padding: .1rem .3rem; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def write_report(
    folder: str | Path,
    tables: Sequence[Table],
    figures: Sequence[tuple[str, Figure]],
    results: Sequence[Result],
    command: str,
) -> Path:
    """Write DIR/index.html, whole or not at all, and return its path.

    Args:
        folder: made if absent.
        figures: (caption, figure).
        results: whose score files the page lists with their SHA-256.
        command: the command line that made the page.
    """
    path = Path(folder) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        file.write(_page(tables, figures, results, command))
    return path


def _page(
    tables: Sequence[Table],
    figures: Sequence[tuple[str, Figure]],
    results: Sequence[Result],
    command: str,
) -> str:
    models = ", ".join(dict.fromkeys(result.model for result in results))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>Audio deepfake detection: evaluation</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<h1>Audio deepfake detection: evaluation</h1>",
            f'<p class="lead">{_text(models)}</p>',
            *map(_table, tables),
            "<h2>Figures</h2>",
            '<div class="figures">',
            *(_figure(*captioned) for captioned in figures),
            "</div>",
            _provenance(results, command),
            "</body>",
            "</html>",
            "",
        ]
    )


def _text(text: str) -> str:
    return escape(cli.printable(text))


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="name"' if table.is_left(i) else "" for i in range(len(cells))]
        scope = ' scope="col"' if tag == "th" else ""
        return (
            "<tr>"
            + "".join(
                f"<{tag}{scope}{kind}>{_text(cell)}</{tag}>" for cell, kind in zip(cells, kinds)
            )
            + "</tr>"
        )

    body = "\n".join(row(cells, "td") for cells in table.rows)
    notes = "".join(f"<li>{_text(note)}</li>" for note in table.notes)
    return (
        f'<h2>{_text(table.title)}</h2>\n<div class="wide"><table>\n<thead>{row(table.columns, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n"
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
    )


def _figure(caption: str, figure: Figure) -> str:
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(image, format="svg", metadata={"Date": None}, bbox_inches="tight")
    data = base64.b64encode(image.getvalue()).decode()
    return (
        f'<figure><img alt="{_text(caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _provenance(results: Sequence[Result], command: str) -> str:
    rows = "\n".join(
        f"<tr><td>{_text(str(result.file))}</td><td>{len(result.trials.names)}</td><td>{sha256(result.file)}</td></tr>"
        for result in results
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, matplotlib {matplotlib.__version__}"
    if sklearn := sys.modules.get("sklearn"):
        versions += f", scikit-learn {sklearn.__version__}"
    return (
        f"<h2>Provenance</h2>\n<dl><dt>Command</dt><dd><code>{_text(command)}</code></dd><dt>Made</dt><dd>{made}</dd>"
        f'<dt>Versions</dt><dd>{versions}</dd></dl>\n<div class="wide"><table class="sha">\n<thead><tr>'
        '<th scope="col" class="name">score file</th><th scope="col" class="name">rows</th>'
        f'<th scope="col" class="name">SHA-256</th></tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'
    )
