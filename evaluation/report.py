"""One self-contained HTML page of an evaluation: tables, figures and where they come from."""

from __future__ import annotations

import base64
import io
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from evaluation.results import Evaluated, sha256
from evaluation.tables import Table
from runtime import cli, files

TEMPLATE = "report.html"  # in this folder


def write_report(
    folder: str | Path,
    tables: Sequence[Table],
    figures: Sequence[tuple[str, Figure]],
    evaluated: Sequence[Evaluated],
    command: str,
) -> Path:
    """Write DIR/index.html, whole or not at all, and return its path.

    Args:
        folder: made if absent.
        figures: (caption, figure).
        evaluated: whose score files the page lists with their SHA-256.
        command: the command line that made the page.
    """
    page = _template().render(
        models=[of_model.name for of_model in evaluated],
        tables=tables,
        figures=[
            {"caption": caption, "svg_base64": _svg_base64(figure)} for caption, figure in figures
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
        figure.savefig(image, format="svg", metadata={"Date": None}, bbox_inches="tight")
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
