"""Time of reading, evaluating and resampling one model's twelve score files. Prints Markdown.

    python -m benchmarks.bench_evaluate [folder of score files]

The files have the published sizes and numbers of speakers; with a folder, its files take the place
of the made-up ones of the same subset. numpy.genfromtxt, which the challenges' scripts read scores
with, is timed beside.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from evaluation import results
from formats import score_files
from formats.protocols import FAKE, REAL, Trial

PUBLISHED_SIZES = {  # subset -> (real, fake), as in the published score files
    "19LA": (7355, 63882),
    "ITW": (19963, 11816),
    **{f"C{i}": (13228, 13228) for i in range(1, 7)},
    "C7": (72752, 72753),
    "A1": (4451, 4436),
    "A2": (4451, 4436),
    "A3": (49274, 49838),
}
N_REPEATS = 5


def main() -> None:
    genfromtxt, ours, resampled, n_trials = measure(
        Path(sys.argv[1]) if len(sys.argv) > 1 else None
    )
    print(
        f"Twelve score files, {n_trials:,} trials; Python {platform.python_version()}, "
        f"numpy {np.__version__}, {os.cpu_count()} cores, {platform.machine()}\n"
    )
    print("| task | seconds (median) | n | ratio to genfromtxt |\n| :-- | --: | --: | --: |")
    for name, seconds, repeats in (
        ("numpy.genfromtxt: reading", genfromtxt, N_REPEATS),
        ("here: reading and EERs", ours, N_REPEATS),
        ("here: reading, EERs, intervals of 1,000 resamples", resampled, 3),
    ):
        print(f"| {name} | {seconds:.2f} | {repeats} | {seconds / genfromtxt:.2f} |")


def measure(given: Path | None) -> tuple[float, float, float, int]:
    """Median seconds of genfromtxt, of reading and EERs, and with intervals; number of trials."""
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder), given)
        n_trials = sum(len(score_files.read_scores(path).names) for path in files.values())
        model = results.Model("benchmark", Path(folder), files)
        return (
            timed(lambda: [np.genfromtxt(path, dtype=str) for path in files.values()]),
            timed(lambda: results.evaluate(model, n_resamples=0)),
            timed(lambda: results.evaluate(model, n_resamples=1000), repeats=3),
            n_trials,
        )


def timed(task: Callable[[], object], repeats: int = N_REPEATS) -> float:
    """Median seconds of a task, after one run to warm up."""
    task()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def make_files(folder: Path, given: Path | None) -> dict[str, Path]:
    """Subset -> score file. Codecfake's are named after 327 speakers, fakes as copies of reals.

    Speakers and attacks of 19LA and ITW stand beside the scores, as generate_score.py writes them.
    """
    rng = np.random.default_rng(0)
    files = {}
    for number, (subset, (n_real, n_fake)) in enumerate(PUBLISHED_SIZES.items()):
        own = subset in ("19LA", "ITW")
        copy = "f" if own else f"F{number:02d}_"
        names = [_name(i) for i in range(n_real)] + [f"{copy}{_name(i)}" for i in range(n_fake)]
        logits = np.concatenate([rng.normal(4, 2, n_real), rng.normal(-4, 2, n_fake)])
        files[subset] = folder / f"{subset}_result.txt"
        words = ["real"] * n_real + ["fake"] * n_fake
        score_files.write_scores(files[subset], names, 1 / (1 + np.exp(-logits)), words)
        if own:
            trials = [_trial(subset, i, name, i < n_real) for i, name in enumerate(names)]
            score_files.write_trials(files[subset], trials)
    if given:
        files |= results.find_models([given])[0].files
    return files


def _name(i: int) -> str:
    """VCTK and AISHELL-3 names in turn: 109 and 218 speakers."""
    speaker = i % 327
    if speaker < 109:
        return f"p{200 + speaker}_{i:06d}.wav"
    return f"SSB{speaker:04d}{i:06d}.wav"


def _trial(subset: str, i: int, name: str, real: bool) -> Trial:
    n_speakers = 67 if subset == "19LA" else 54
    attack = f"A{7 + i % 13:02d}" if subset == "19LA" and not real else "-"
    return Trial(name, "", REAL if real else FAKE, attack, f"s{i % n_speakers}")


if __name__ == "__main__":
    main()
