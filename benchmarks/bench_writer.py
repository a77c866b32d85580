"""Rows a second that the feature cache's writer takes. Prints Markdown.

    python -m benchmarks.bench_writer [--quick]

Three ways of bringing the same rows of XLS-R features to the same disk, in turns: system calls and
checksums alone, the plain writer (`plain.PlainWriter`), and `preprocess.Writes` with the cast that
`preprocess.compute` makes before it. --quick uses small rows: it shows that all runs, no more.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

import preprocess
from benchmarks import common
from benchmarks.plain import PlainWriter
from dataset import FEATURE_SHAPES, REAL, Trial
from formats.feature_cache import CacheWriter, encode
from preprocess import FLUSH_EVERY

BATCH = 32  # clips, as a small GPU takes them
N_BATCHES = 4  # different ones, 105 MB of float32 together: no cache of a processor holds them
GOAL = 70  # percent of what system calls and checksums alone reach


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small rows, to see that all runs")
    args = parser.parse_args(argv)
    shape = (5, 8) if args.quick else (FEATURE_SHAPES["xls-r-5"][0], 1024)
    n_rows, repeats = (320, 2) if args.quick else (2048, 5)
    rates = measure(shape, n_rows, repeats)
    floor = rates["pwrite, CRC-32 and fdatasync alone"]
    row_bytes = 2 * shape[0] * shape[1]
    print(
        f"{n_rows} rows of {shape[0]} x {shape[1]} float16, a flush every {FLUSH_EVERY}, median of "
        f"{repeats}; {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}. "
        f"Goal: the writer at {GOAL} % of the first line.\n"
    )
    print("| way of writing | rows/s | MB/s | of the first |\n| :-- | --: | --: | --: |")
    for name, rate in rates.items():
        megabytes, ratio = rate * row_bytes / 1e6, 100 * rate / floor
        print(f"| {name} | {rate:,.0f} | {megabytes:,.0f} | {ratio:.0f} % |")


def measure(shape: tuple[int, int], n_rows: int, repeats: int) -> dict[str, float]:
    """Way of writing -> rows/s, the median of `repeats` after one run to warm up."""
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((BATCH, *shape), dtype=np.float32) for _ in range(N_BATCHES)]
    ways = {
        "pwrite, CRC-32 and fdatasync alone": write_alone,
        "the plain writer": write_plainly,
        "the writer": write,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            with common.scratch_folder() as folder:
                seconds[name].append(way(folder, batches, n_rows))
    return {name: n_rows / median(taken[1:]) for name, taken in seconds.items()}


def write_alone(folder: Path, batches: list[np.ndarray], n_rows: int) -> float:
    """Seconds that the rows' bytes take to the disk, with a checksum each and nothing else."""
    encoded = [encode(batch, "float16") for batch in batches]
    row_bytes = encoded[0][0].nbytes
    with open(folder / "rows", "wb") as file:
        file.truncate(n_rows * row_bytes)
        start = time.perf_counter()
        for row in range(n_rows):
            data = encoded[row // BATCH % N_BATCHES][row % BATCH]
            os.pwrite(file.fileno(), data, row * row_bytes)
            zlib.crc32(data)
            if row % FLUSH_EVERY == FLUSH_EVERY - 1:
                os.fdatasync(file.fileno())
        os.fdatasync(file.fileno())
        return time.perf_counter() - start


def write_plainly(folder: Path, batches: list[np.ndarray], n_rows: int) -> float:
    writer = open_writer(PlainWriter, folder, batches, n_rows)
    start = time.perf_counter()
    for first in range(0, n_rows, BATCH):
        values = batches[first // BATCH % N_BATCHES]
        writer.write(range(first, first + BATCH), values[list(range(BATCH))])
        writer.mark_failed([])
        if writer.unmarked() >= FLUSH_EVERY:
            writer.flush()
    writer.close()
    return time.perf_counter() - start


def write(folder: Path, batches: list[np.ndarray], n_rows: int) -> float:
    writer = open_writer(CacheWriter, folder, batches, n_rows)
    start = time.perf_counter()
    with preprocess.Writes(writer) as writes:
        for first in range(0, n_rows, BATCH):
            half = torch.from_numpy(batches[first // BATCH % N_BATCHES]).half().numpy()
            writes.add(list(range(first, first + BATCH)), lambda half=half: half, range(BATCH), [])
    writer.close()
    return time.perf_counter() - start


def open_writer(
    kind: Callable[..., CacheWriter], folder: Path, batches: list[np.ndarray], n_rows: int
) -> CacheWriter:
    trials = [Trial(f"{row}.wav", "", REAL, "-") for row in range(n_rows)]
    return kind(folder, trials, {"feat": "xls-r-5"}, batches[0].shape[1:])


if __name__ == "__main__":
    main()
