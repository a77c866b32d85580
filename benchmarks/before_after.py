"""What the changes for speed give on this CPU, each beside the plain way it replaced, in one run.

    python -m benchmarks.before_after [--quick]

Prints Markdown: milliseconds of either way, their ratio, and whether the results are equal. The
plain ways stand in plain.py. What the changes give on a GPU is gpu.py's to say.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import dataset
import generate_score
import main_train
import model
from benchmarks import bench_writer, common, plain
from dataset import JoinedFeatures
from runtime import cli, devices


@dataclass(frozen=True)
class Sizes:
    repeats: int
    clips: int  # decoded
    batch: int  # rows of a training batch
    rows: int  # written
    shape: tuple[int, int]  # of a written row


FULL = Sizes(9, 64, 128, 1_024, (201, 1_024))
QUICK = Sizes(1, 4, 4, 320, (5, 8))


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    change: str
    before: float  # ms
    after: float
    unit: str
    equal: str

    def line(self) -> str:
        ratio = self.before / self.after
        return (
            f"| {self.change} | {self.before:.3g} | {self.after:.3g} | ms {self.unit} | "
            f"{ratio:.2f} | {self.equal} |"
        )


def processor_ms(before: Callable, after: Callable, repeats: int) -> tuple[float, float]:
    """Median milliseconds of the processor of two ways, in turns after one run to warm up."""
    first, second = common.in_turns(before, after, repeats=repeats, clock=time.process_time)
    return 1e3 * first, 1e3 * second


# ── Changes ──────────────────────────────────────────────────────────────────────────────────────


def sharpness_steps(folder: Path, sizes: Sizes) -> list[Row]:
    """SAM's and ASAM's way up and back, without the passes between."""
    head = model.build_head("W2VAASIST", "xls-r-5")
    torch.manual_seed(0)
    for parameter in head.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    rows = []
    for name, adaptive in (("SAM", False), ("ASAM", True)):
        sharpness = main_train.Sharpness(0.05, adaptive)
        raised = {}
        for way in (plain, main_train):
            original = way.climb(head, sharpness)
            raised[way] = [parameter.detach().clone() for parameter in head.parameters()]
            way.descend(original)
        same = all(map(torch.equal, *raised.values()))
        before, after = processor_ms(
            lambda sharpness=sharpness: plain.descend(plain.climb(head, sharpness)),
            lambda sharpness=sharpness: main_train.descend(main_train.climb(head, sharpness)),
            sizes.repeats,
        )
        change = f"{name}: all parameters at once, before one by one"
        rows.append(Row(change, before, after, "a step", equality(same)))
    return rows


def equality(same: bool) -> str:
    return "to the bit" if same else "DIFFERENT"


def joined_rows(folder: Path, sizes: Sizes) -> list[Row]:
    """A batch of co-training, from two caches."""
    parts = [common.make_cache(folder / name, 2 * sizes.batch) for name in ("one", "other")]
    features = JoinedFeatures(parts)
    rows = np.random.default_rng(0).permutation(4 * sizes.batch)[: sizes.batch]
    same = torch.equal(plain.read_joined(features, rows), features.read(rows)[0].float())
    before, after = processor_ms(
        lambda: plain.read_joined(features, rows), lambda: features.read(rows), sizes.repeats
    )
    change = "co-training: rows stay float16, before made float32"
    each = 1 / sizes.batch
    return [Row(change, before * each, after * each, "a row", equality(same))]


def decoding(folder: Path, sizes: Sizes) -> list[Row]:
    """What a worker does for extraction, which nobody needs digests for."""
    paths = common.write_clips(folder / "audio", sizes.clips)
    batches = [list(range(len(paths)))]

    def decode(with_digests: bool) -> Tensor:
        (batch,) = dataset.clip_batches(paths, batches, 0, with_digests)
        return batch.clips

    same = torch.equal(decode(True), decode(False))
    before, after = processor_ms(lambda: decode(True), lambda: decode(False), sizes.repeats)
    each = 1 / sizes.clips
    change = "decoding without a digest, before with one"
    return [Row(change, before * each, after * each, "a clip", equality(same))]


def writing(folder: Path, sizes: Sizes) -> list[Row]:
    """The cache's writer, elapsed time, this disk's fdatasync in it."""
    rates = bench_writer.measure(sizes.shape, sizes.rows, min(sizes.repeats, 3))
    before, after = (1e3 / rates[name] for name in ("the plain writer", "the writer"))
    floor = 1e3 / rates["pwrite, CRC-32 and fdatasync alone"]
    change = f"writer (system calls and checksums alone: {floor:.3g} ms)"
    return [Row(change, before, after, "a row", "to the byte (tests/test_feature_cache.py)")]


class SleepingDevice:
    """Stands in for a GPU: computes batch after batch without taking a core."""

    def __init__(self, seconds: float):
        self.seconds = seconds  # of a batch
        self.free_at = 0.0

    def start(self, clips: Tensor) -> Callable[[], np.ndarray]:
        """Queue a batch (B, samples); the function that comes back waits for logits (B, 1, 2)."""
        self.free_at = max(self.free_at, time.perf_counter()) + self.seconds
        ready = self.free_at
        logits = clips[:, None, :2].double().numpy()

        def wait() -> np.ndarray:
            time.sleep(max(0.0, ready - time.perf_counter()))
            return logits

        return wait

    def start_and_wait(self, clips: Tensor) -> Callable[[], np.ndarray]:
        logits = self.start(clips)()
        return lambda: logits


def scoring(folder: Path, sizes: Sizes) -> list[Row]:
    """Decoding while a batch is computed; the device takes as long as decoding does, elapsed."""
    paths = common.write_clips(folder / "scored", sizes.clips)
    head = model.build_head("lcnn", "mel")
    head.info = {}
    args = generate_score.parse(["-t", "ITW", "--gpu", "-1"])
    scorer = generate_score.Scorer(args, {"head": head})
    decoding_time = time.perf_counter()
    list(dataset.clip_batches(paths, [list(range(len(paths)))], 0, with_digests=True))
    decoding_time = time.perf_counter() - decoding_time
    device = SleepingDevice(decoding_time / sizes.clips * scorer.batch_size)

    def score(start: Callable) -> np.ndarray:
        with common.silence(), mock.patch.object(scorer, "start", start):
            return next(scorer.score_files({"bench": paths}, 0)).logits

    same = np.array_equal(score(device.start_and_wait), score(device.start))
    before, after = common.in_turns(
        lambda: score(device.start_and_wait), lambda: score(device.start), repeats=sizes.repeats
    )
    change = "scoring: a batch in flight, before waited for (a device that sleeps; elapsed)"
    each = 1e3 / sizes.clips
    return [Row(change, before * each, after * each, "a clip", equality(same))]


CHANGES = (sharpness_steps, joined_rows, decoding, scoring, writing)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: it shows that all runs")
    sizes = QUICK if parser.parse_args(argv).quick else FULL
    devices.pick_device(-1)
    print(
        f"## Before and after\n\n{common.cpu_name()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads; medians of {sizes.repeats} in turns; time of the processor where not said "
        "otherwise.\n\n| change | before | after | unit | ratio | equal |\n"
        "| :-- | --: | --: | :-- | --: | :-- |"
    )
    with common.scratch_folder() as folder:
        for change in CHANGES:
            for row in change(folder, sizes):
                print(row.line(), flush=True)


if __name__ == "__main__":
    cli.run(main, if_stopped="run the same command again")
