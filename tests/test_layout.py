"""The layout holds: which files lie at the top, who imports whom, and how wide lines are.

python -m pytest tests/test_layout.py
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("preprocess", "main_train", "generate_score", "evaluate_score")
SHARED = ("dataset", "model", "eval_metrics")
LEVELS = {  # a module imports modules of lower levels, and of its own room
    "runtime": 0,
    "formats": 1,
    "frontends": 2,
    **dict.fromkeys(SHARED, 3),
    "evaluation": 4,
    **dict.fromkeys(SCRIPTS, 5),
    "demo": 5,
}
WITHOUT_TORCH = ("evaluate_score", "eval_metrics", "formats.protocols", "formats.score_files")
WIDEST, LONGEST = 100, 60  # columns of a line, lines of a function


def sources() -> list[Path]:
    rooms = [path for path in ROOT.iterdir() if (path / "__init__.py").exists()]
    rooms += [ROOT / "tests", ROOT / "benchmarks"]
    return sorted({*ROOT.glob("*.py"), *(path for room in rooms for path in room.rglob("*.py"))})


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, at_import: bool = False) -> set[str]:
    """Modules named by import statements; with `at_import`, only those outside functions."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting.extend(ast.iter_child_nodes(node))
    return names


def product() -> dict[str, Path]:
    return {module_of(path): path for path in sources() if module_of(path).split(".")[0] in LEVELS}


def test_seven_python_files_lie_at_the_top() -> None:
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(SCRIPTS + SHARED)


@pytest.mark.parametrize("name, path", sorted(product().items()))
def test_imports_lead_downhill(name: str, path: Path) -> None:
    room = name.split(".")[0]
    for imported in imports_of(path):
        other = imported.split(".")[0]
        if other in LEVELS and other != room:
            assert LEVELS[other] < LEVELS[room], f"{name} imports {imported}"
    if room == "evaluation":
        assert not imports_of(path) & {"model", "dataset"}, f"{name} imports a room of torch"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_the_evaluator_never_reaches_torch(name: str) -> None:
    modules = product()
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module not in modules or module in seen:
            continue
        seen.add(module)
        imported = imports_of(modules[module])
        assert not {each.split(".")[0] for each in imported} & {"torch", "torchaudio"}, module
        waiting.extend(imported)


def test_evaluating_against_a_corpus_loads_no_torch(tmp_path: Path) -> None:
    label = tmp_path / "Codecfake" / "label"
    label.mkdir(parents=True)
    rows = [f"{i}.wav real 0" for i in range(4)] + [f"F01_{i}.wav fake 1" for i in range(4)]
    (label / "C1.txt").write_text("\n".join(rows) + "\n")
    result = tmp_path / "result"
    result.mkdir()
    scores = [f"{row.split()[0]} 0.{9 - n} {row.split()[1]}" for n, row in enumerate(rows)]
    (result / "C1_result.txt").write_text("\n".join(scores) + "\n")
    code = (
        "import sys, evaluate_score\n"
        f"evaluate_score.main(['-t', 'codecfake', '-d', {str(label.parent)!r}, "
        f"'--result_folder', {str(result)!r}])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "C1" in done.stdout


def test_the_pages_link_to_files_that_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "pretrained_model/README.md", *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page.read_text()):
            link = "".join(link)
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_no_line_is_wider_than_100_columns() -> None:
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*sources(), ROOT / "Makefile", ROOT / "pyproject.toml"]
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if len(line) > WIDEST
    ]
    assert not wide, wide


def test_no_function_is_longer_than_60_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        if node.end_lineno - node.lineno >= LONGEST
    ]
    assert not long, long
