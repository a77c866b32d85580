"""Time of reading, evaluating and resampling one model's twelve score files. Prints Markdown.

    python -m benchmarks.bench_evaluate [folder of score files]

The files have the published sizes; with a folder, its own files take the place of the made-up ones of
the same subset. numpy.genfromtxt, which the challenges' scripts read scores with, is timed beside.
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
        f"Twelve score files, {n_trials:,} trials; Python {platform.python_version()}, numpy {np.__version__}, "
        f"{os.cpu_count()} cores, {platform.machine()}\n"
    )
    print("| task | seconds (median) | n | ratio to genfromtxt |\n| :-- | --: | --: | --: |")
    for name, seconds, repeats in (
        ("numpy.genfromtxt: reading", genfromtxt, N_REPEATS),
        ("here: reading and EERs", ours, N_REPEATS),
        ("here: reading, EERs, 1,000 resamples", resampled, 3),
    ):
        print(f"| {name} | {seconds:.2f} | {repeats} | {seconds / genfromtxt:.2f} |")


def measure(given: Path | None) -> tuple[float, float, float, int]:
    """Median seconds of genfromtxt, of reading and EERs, of the same with 1,000 resamples; the number of trials."""
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
    """Subset -> score file. Fakes of Codecfake are named as copies of its reals."""
    rng = np.random.default_rng(0)
    files = {}
    for number, (subset, (n_real, n_fake)) in enumerate(PUBLISHED_SIZES.items()):
        copy = "" if subset in ("19LA", "ITW") else f"F{number:02d}_"
        names = [f"p{i:07d}.wav" for i in range(n_real)] + [
            f"{copy or 'f'}p{i:07d}.wav" for i in range(n_fake)
        ]
        logits = np.concatenate([rng.normal(4, 2, n_real), rng.normal(-4, 2, n_fake)])
        files[subset] = folder / f"{subset}_result.txt"
        score_files.write_scores(
            files[subset], names, 1 / (1 + np.exp(-logits)), ["real"] * n_real + ["fake"] * n_fake
        )
    if given:
        files |= results.find_models([given])[0].files
    return files


if __name__ == "__main__":
    main()
