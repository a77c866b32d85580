"""One self-contained HTML page of an evaluation: tables, figures and where they come from."""

from __future__ import annotations

import base64
import io
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evaluation.plots import LEAST_IN_BIN
from evaluation.results import Evaluated, sha256
from evaluation.tables import Table
from runtime import cli, files

TEMPLATE = "report.html"  # in this folder


@dataclass(frozen=True)
class Section:
    """A table and the figures that belong to it, as (caption, figure)."""

    table: Table
    figures: Sequence[tuple[str, Figure]] = ()


def make_sections(
    tables: Sequence[Table],
    evaluated: Sequence[Evaluated],
    draw: Callable[[str, Sequence[Evaluated]], Figure],
) -> list[Section]:
    """The tables, each with its figures.

    Args:
        tables: the first is that of the EERs; others are told by their titles.
        draw: kind of figure and models -> the figure.
    """
    intervals = any(result.interval for of_model in evaluated for result in of_model.with_eer)
    shaded = ", 95 % intervals shaded" if intervals else ""
    figures = {
        tables[0].title: [
            (
                "True EERs (over 50 %: the scores point the wrong way) on a square-root axis",
                draw("eer", evaluated),
            ),
            *(
                (
                    f"{of_model.name}: DET curves on normal deviate axes; a marker on each curve "
                    f"is at the EER's threshold{shaded}",
                    draw("det", [of_model]),
                )
                for of_model in evaluated
            ),
        ],
        "Metrics": [
            (
                f"{of_model.name}: reliability at even odds, and trials a bin; on the diagonal, "
                f"scores mean what they say (bins of {LEAST_IN_BIN} trials and more)",
                draw("reliability", [of_model]),
            )
            for of_model in evaluated
        ],
        "Decisions": [
            (f"{of_model.name}: scores of real and fake trials", draw("histogram", [of_model]))
            for of_model in evaluated
        ],
    }
    return [Section(table, figures.get(table.title, ())) for table in tables]


def write_report(
    folder: str | Path, sections: Sequence[Section], evaluated: Sequence[Evaluated], command: str
) -> Path:
    """Write DIR/index.html, whole or not at all, and return its path.

    Args:
        folder: made if absent.
        evaluated: whose score files the page lists with their SHA-256.
        command: the command line that made the page.
    """
    page = _template().render(
        models=[of_model.name for of_model in evaluated],
        sections=[
            {
                "table": section.table,
                "figures": [
                    {"caption": caption, "svg_base64": _svg_base64(figure)}
                    for caption, figure in section.figures
                ],
            }
            for section in sections
        ],
        command=command,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions=_versions(),
        files=_files(evaluated),
    )
    path = Path(folder) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        file.write(page)
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # folder and trial names come from others
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = cli.printable
    return environment.get_template(TEMPLATE)


def _svg_base64(figure: Figure) -> str:
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return base64.b64encode(image.getvalue()).decode()


def _versions() -> str:
    versions = {
        "Python": platform.python_version(),
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
    }
    if "sklearn" in sys.modules:
        versions["scikit-learn"] = sys.modules["sklearn"].__version__
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _files(evaluated: Sequence[Evaluated]) -> list[dict[str, object]]:
    return [
        {
            "path": str(result.file),
            "n_rows": len(result.trials.names),
            "sha256": sha256(result.file),
        }
        for of_model in evaluated
        for result in of_model.results.values()
    ]
