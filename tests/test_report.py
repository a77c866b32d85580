"""The HTML report, as text and in a real browser. Run: python -m pytest tests/test_report.py"""

from __future__ import annotations

import base64
import hashlib
import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import evaluate_score
from formats.score_files import write_scores

NAME = "m<script>alert(1)</script>&\x1b[31m".replace("/", "\u2215")
VOID = {"meta", "img", "br"}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A report on two models: a hostile name, an inverted subset, one of a single class."""
    folder = tmp_path_factory.mktemp("report")
    for model, shift in ((NAME, 30), ("plain", -30)):
        (folder / "result" / model).mkdir(parents=True)
        for subset in ("19LA", "C1", "C2"):
            words = ["real"] * 50 + ["fake"] * 50
            names = [f"u{i}.wav" for i in range(50)] + [f"F01_u{i}.wav" for i in range(50)]
            scores = [
                (i * 37 % 100) + (shift if word == "real" else 0) for i, word in enumerate(words)
            ]
            write_scores(folder / "result" / model / f"{subset}_result.txt", names, scores, words)
    (folder / "result" / "plain" / "A3_result.txt").write_text("v.wav 0.5 fake\n")
    evaluate_score.main(
        [
            "--result_folder",
            str(folder / "result"),
            "--report",
            str(folder / "page"),
            "--resamples",
            "100",
        ]
    )
    return folder / "page" / "index.html"


class Nesting(HTMLParser):
    """Fails on a tag that closes another than the last opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_other_file(page):
    parser = Nesting()
    parser.feed(page.read_text(encoding="utf-8"))
    assert parser.open == []
    assert len(parser.links) == 1 + 3 * 2 and all(
        link.startswith("data:image/svg+xml;base64,") for link in parser.links
    )
    for link in parser.links:
        assert b"<svg" in base64.b64decode(link.split(",")[1])
    assert list(page.parent.iterdir()) == [page]


def test_names_from_the_file_system_are_text_on_the_page(page):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "\x1b" not in text
    assert html.escape(NAME.replace("\x1b", "\\x1b")) in text


def test_tables_and_their_notes_are_on_the_page(page):
    text = html.unescape(re.sub("<[^>]+>", "", page.read_text(encoding="utf-8")))
    for part in (
        "What the EERs are worth",
        "source utterance",
        "minDCF",
        "A3's real files are not distributed",
        "the scores point the wrong way",
        "evaluate_score.py --result_folder",
    ):
        assert part in text, part


def test_every_score_file_is_listed_with_its_sha256(page):
    text = page.read_text(encoding="utf-8")
    files = list((page.parent.parent / "result").glob("*/*.txt"))
    assert len(files) == 7
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text


def figures_of(page: Path) -> dict[str, list[str]]:
    """Section's title -> captions of the figures in it."""
    sections = re.split(r"<h2>(.*?)</h2>", page.read_text(encoding="utf-8"))[1:]
    return {
        title: re.findall("<figcaption>(.*?)</figcaption>", body)
        for title, body in zip(sections[::2], sections[1::2], strict=True)
    }


def test_figures_stand_beside_the_tables_they_belong_to(page):
    figures = figures_of(page)
    eers = figures["EER (%)"]
    assert "True EERs" in eers[0] and all("DET curves" in caption for caption in eers[1:])
    assert len(eers) == 3
    assert all("reliability" in caption for caption in figures["Metrics"])
    assert all("scores of real and fake" in caption for caption in figures["Decisions"])
    assert len(figures["Metrics"]) == len(figures["Decisions"]) == 2


def run_chromium(page: Path, tmp_path: Path, width: int, script: str) -> str:
    """What a script makes of the page in a window of that width."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium (Debian package of that name)")
    # Headless windows have a least width, so the page is put into a frame of the width in question.
    frame = tmp_path / "frame.html"
    source = html.escape(page.read_text(encoding="utf-8"))
    frame.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><iframe style="border:0" width="{width}" '
        f'height="800" srcdoc="{source}"></iframe>'
        f"<script>onload = () => {{ {script} }}</script>",
        encoding="utf-8",
    )
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--virtual-time-budget=5000 --dump-dom"
    )
    done = subprocess.run(
        [chromium, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-500:]
    return title[1]


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_page_fits_its_window_in_a_real_browser(page, tmp_path, width):
    script = """
        const page = frames[0].document, tables = [...page.querySelectorAll("table")];
        const more = [...page.querySelectorAll(".more")].filter(p => p.offsetHeight > 0);
        document.title = JSON.stringify([
            page.documentElement.scrollWidth,
            [...page.images].every(i => i.complete && i.naturalWidth > 0),
            tables.length,
            tables.filter(t => t.getBoundingClientRect().height > 40).length,
            more.length,
        ]);
    """
    title = run_chromium(page, tmp_path, width, script)
    scroll_width, images, n_tables, n_visible, n_more = title.strip("[]").split(",")
    assert int(scroll_width) <= width, f"the page scrolls sideways: {scroll_width} > {width}"
    assert images == "true" and int(n_tables) == int(n_visible) == 5
    assert int(n_more) == (4 if width < 640 else 0)  # a visible sign at each wide table
