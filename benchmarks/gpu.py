"""Every figure that README and SCALE.md need of a GPU, in one run of less than eight minutes.

    python -m benchmarks.gpu [--budget SECONDS] [-o DIR] [--gpu N] [--quick]

Prints Markdown tables as it goes and writes the same figures to DIR/results.json after each line,
so that a run which is broken off has told what it knew. A line that fails says FAILED and the rest
goes on; what the budget leaves no time for says so. The last table holds the estimates of
estimates.py against what was measured. --quick runs all of it on the CPU with a tiny network.

Audio is noise; XLS-R has its full 300M configuration and random weights: neither changes the speed.
Needs 10 GB of disk in data/. Nothing of the card's settings is changed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import dataset
import generate_score
import main_train
import model
import preprocess
from benchmarks import bench_writer, common, estimates, plain
from dataset import CLIP_SAMPLES, FEATURE_SHAPES, JoinedFeatures, Trial, read_ahead
from formats.feature_cache import FeatureCache
from runtime import cli, devices
from runtime.cli import InputError

STEPS = "Training steps"
EPOCHS = "Training by main_train.py, cache in memory"
EXTRACTION = "Extraction, files to cache"
WRITTEN = "from memory"
LARGE_CORPUS = 1_000_000  # clips: more than what norms are compiled from
NO_GPU = "needs a GPU that torch can use; --quick runs on the CPU"
HEADS = (("W2VAASIST", "xls-r-5"), ("lcnn", "mel"))
TYPES = {  # precision -> (type of the operands, whether products may use TF32)
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
}


# ── A run and its tables ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sizes:
    """How much is done of each thing."""

    files: int  # of audio
    clips: int  # extracted; the files are gone through several times
    few: int  # through the reference's way, which takes one at a time
    rows: int  # of the cache that is trained on
    batches: tuple[int, ...]  # of the front end
    step: int  # clips of a training step
    repeats: int
    disk_bytes: int


FULL = Sizes(2_048, 4_096, 32, 4_096, (32, 128), 128, 8, 2**32)
QUICK = Sizes(4, 4, 2, 8, (2,), 2, 1, 2**20)


@dataclass
class Run:
    """What a run works with, and what it has measured so far."""

    folder: Path
    device: torch.device
    sizes: Sizes
    out: Path  # results.json
    budget: float  # seconds
    began: float = field(default_factory=time.monotonic)
    ends: float = float("inf")  # of the part under way, in seconds since the beginning
    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def gpu(self) -> int:
        """The device as --gpu names it."""
        return self.device.index if self.on_gpu else -1

    @property
    def ssl(self) -> str:
        return str(self.folder / "ssl")

    @property
    def quick(self) -> bool:
        return self.sizes is QUICK

    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.began

    def precisions(self) -> list[str]:
        """Those of --precision that give something of their own on this device."""
        if not self.on_gpu:
            return ["fp32", "bf16"]
        return list(devices.PRECISIONS)

    def table(self, name: str, rows: str, *columns: str) -> Table:
        return Table(self, name, rows, columns)

    def value(self, table: str, row: str, column: str) -> float | None:
        """A measured figure; None where it was not come to, or failed."""
        value = self.results.get(table, {}).get(row, {}).get(column)
        return value if isinstance(value, int | float) else None

    def save(self) -> None:
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))


class Table:
    """A Markdown table that is printed line by line, its figures kept in results.json."""

    def __init__(self, run: Run, name: str, rows: str, columns: Sequence[str]):
        self.run, self.name, self.columns = run, name, columns
        run.results.setdefault(name, {})
        print(f"\n## {name}\n\n| {rows} | {' | '.join(columns)} |")
        print("| :-- |" + " --: |" * len(columns), flush=True)

    def row(self, name: str, measure: Callable[[], Sequence[Any]]) -> None:
        """Measure a line and print it; an error becomes a FAILED line."""
        if self.run.seconds() > self.run.ends:
            self._keep(name, {"left out": "no time left"}, "left out: no time left")
            return
        try:
            figures = dict(zip(self.columns, measure(), strict=True))
        except (Exception, SystemExit) as error:  # an option that a script refuses exits
            line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._keep(name, {"FAILED": line}, f"FAILED: {line}")
            traceback.print_exc(file=sys.stderr)
        else:
            self._keep(name, figures, *(show(value) for value in figures.values()))
        free_memory()

    def _keep(self, name: str, figures: dict[str, Any], *cells: str) -> None:
        self.run.results[self.name][name] = figures
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        self.run.save()


def show(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ── Taking time ──────────────────────────────────────────────────────────────────────────────────


def timed(run: Run, work: Callable[[], Any], warm: int = 3) -> float:
    """Median seconds of a piece of work, on a GPU by its own clock."""
    for _ in range(min(warm, run.sizes.repeats)):
        work()
    return median(_once(run, work) for _ in range(run.sizes.repeats))


def _once(run: Run, work: Callable[[], Any]) -> float:
    if not run.on_gpu:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def wall(run: Run, work: Callable[[], Any]) -> float:
    """Seconds of one call, until the GPU has finished too."""
    synchronise(run)
    start = time.perf_counter()
    work()
    synchronise(run)
    return time.perf_counter() - start


def synchronise(run: Run) -> None:
    if run.on_gpu:
        torch.cuda.synchronize()


def count_kernels(run: Run, work: Callable[[], Any]) -> int:
    """Kernels that a call launches; on the CPU the operators that it calls."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if run.on_gpu else ProfilerActivity.CPU
    device = DeviceType.CUDA if run.on_gpu else DeviceType.CPU
    work()
    with profile(activities=[activity], acc_events=True) as profiler:
        work()
        synchronise(run)
    events = [event for event in profiler.key_averages() if event.device_type == device]
    others = ("Memcpy", "Memset", "Optimizer.")  # copies, and what torch calls a whole step
    return sum(event.count for event in events if not event.key.startswith(others))


def find_waits(run: Run, work: Callable[[], Any]) -> str:
    """Where a call waits for the GPU: `file:line xN`, from torch's own warnings."""
    work()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    places = Counter(f"{Path(wait.filename).name}:{wait.lineno}" for wait in waits)
    return ", ".join(f"{place} x{count}" for place, count in places.most_common()) or "none"


def peak_gigabytes(run: Run, work: Callable[[], Any]) -> float | None:
    """The most that tensors take on the GPU during a call, weights among them."""
    if not run.on_gpu:
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() / 1e9


# ── Parts ────────────────────────────────────────────────────────────────────────────────────────


def machine(run: Run) -> None:
    table = run.table("Machine", "what", "value")
    table.row("software", lambda: [_software()])
    if run.on_gpu:
        for query in ("name", "driver_version", "pcie.link.gen.current", "pcie.link.gen.max",
                      "pcie.link.width.current", "clocks.sm", "clocks.max.sm",
                      "power.limit", "memory.total"):  # fmt: skip
            table.row(query, lambda query=query: [_nvidia_smi(run, query)])
    path = run.folder / "disk"
    table.row("disk: write and fdatasync, GB/s", lambda: [_write_disk(run, path)])
    table.row("disk: cold read, GB/s", lambda: [_read_disk(run, path)])
    path.unlink(missing_ok=True)


def _software() -> str:
    return (
        f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, Python "
        f"{platform.python_version()}, {os.cpu_count()} cores, {common.cpu_name()}"
    )


def _nvidia_smi(run: Run, query: str) -> str:
    uuid = torch.cuda.get_device_properties(run.device).uuid  # --gpu counts the visible ones
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _write_disk(run: Run, path: Path) -> float:
    block = os.urandom(min(2**24, run.sizes.disk_bytes))
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(run.sizes.disk_bytes // len(block)):
            file.write(block)
        os.fdatasync(file.fileno())
    return run.sizes.disk_bytes / (time.perf_counter() - start) / 1e9


def _read_disk(run: Run, path: Path) -> float:
    common.forget([path])
    start = time.perf_counter()
    common.read_through([path])
    return run.sizes.disk_bytes / (time.perf_counter() - start) / 1e9


def ceilings(run: Run) -> None:
    """What the card itself reaches in the shapes of the front end and of large squares."""
    side = 256 if run.quick else 8_192
    shapes = {
        "square": (side, side, side),
        "convolution 1, K=10": (413_696, 512, 10),
        "convolution 1, K=16": (413_696, 512, 16),
        "convolution 2, K=1024": (206_848, 512, 1_024),
        "convolution 2, K=512": (206_848, 512, 512),
        "query, key, value": (6_432, 3_072, 1_024),
        "widen": (6_432, 4_096, 1_024),
        "narrow": (6_432, 1_024, 4_096),
    }
    if run.quick:
        shapes = {"square": shapes["square"]}
    types = {name: TYPES[name] for name in (TYPES if run.on_gpu else ("fp32", "bf16"))}
    table = run.table("Matrix products, TFLOP/s", "shape", *types)
    for name, shape in shapes.items():
        table.row(name, lambda shape=shape: [_product(run, *shape, *t) for t in types.values()])
    torch.backends.cuda.matmul.allow_tf32 = False
    _copies(run)


def _product(run: Run, m: int, n: int, k: int, dtype: torch.dtype, tf32: bool) -> float:
    """TFLOP/s of (m, k) times (k, n)."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    a = torch.randn(m, k, device=run.device, dtype=dtype)
    b = torch.randn(k, n, device=run.device, dtype=dtype)
    out = torch.empty(m, n, device=run.device, dtype=dtype)
    return 2 * m * n * k / timed(run, lambda: torch.mm(a, b, out=out)) / 1e12


def _copies(run: Run) -> None:
    table = run.table("Copies, GB/s", "what", "value")
    count = 2**16 if run.quick else 2**28  # float32 values, 1 GB

    def within() -> float:
        a, b = (torch.empty(count, device=run.device) for _ in range(2))
        return 2 * a.nbytes / timed(run, lambda: b.copy_(a)) / 1e9

    def across(pinned: bool, to_device: bool) -> float:
        host = torch.zeros(count // 4, pin_memory=pinned and run.on_gpu)
        there = torch.empty(count // 4, device=run.device)
        target, source = (there, host) if to_device else (host, there)
        return host.nbytes / timed(run, lambda: target.copy_(source, non_blocking=True)) / 1e9

    table.row("within the device, read and written", lambda: [within()])
    for pinned in (True, False):
        kind = "pinned" if pinned else "pageable"
        table.row(f"{kind} host to device", lambda pinned=pinned: [across(pinned, True)])
        table.row(f"device to {kind} host", lambda pinned=pinned: [across(pinned, False)])


def load_frontend(run: Run, precision: str) -> nn.Module:
    """The front end of one of PRECISIONS; "bf16 fused" has norms and GELUs in one kernel."""
    precision, _, fused = precision.partition(" ")
    devices.set_precision(precision, run.device)
    front_end = model.load_frontend("xls-r-5", run.ssl, precision).to(run.device)
    if fused:
        front_end.expect(LARGE_CORPUS)
    return front_end


def front_ends(run: Run) -> None:
    """Clips that lie on the device, as the program computes them; no copies."""
    few = torch.randn(2, CLIP_SAMPLES, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.inference_mode():
        exact = model.load_frontend("xls-r-5", run.ssl)(few)
    columns = ("clips/s", "host ms a batch", "peak GB", "kernels", "relative error")
    table = run.table("Front end", "precision, clips a batch", *columns)
    fused = [f"{precision} fused" for precision in ("bf16", "tf32") if run.on_gpu]
    for precision in (*run.precisions(), *fused):
        for size in run.sizes.batches:
            case = (precision, size)
            table.row(f"{precision}, {size}", lambda case=case: _front_end(run, *case, few, exact))


@torch.inference_mode()
def _front_end(run: Run, precision: str, size: int, few: Tensor, exact: Tensor) -> list[Any]:
    """The columns of front_ends(); the error is against float32 on the CPU, over two clips."""
    front_end = load_frontend(run, precision)
    error = (front_end(few.to(run.device)).cpu() - exact).norm() / exact.norm()
    clips = torch.randn(size, CLIP_SAMPLES, device=run.device) * 0.1
    seconds = timed(run, lambda: front_end(clips))
    peak = peak_gigabytes(run, lambda: front_end(clips))
    synchronise(run)
    start = time.perf_counter()
    for _ in range(run.sizes.repeats):
        front_end(clips)
    host = (time.perf_counter() - start) / run.sizes.repeats  # launching, nothing waited for
    kernels = count_kernels(run, lambda: front_end(clips))
    return [size / seconds, 1e3 * host, peak, kernels, float(error)]


def extraction(run: Run) -> None:
    """Files to cache through preprocess.py's own loop."""
    columns = ("clips/s", "busy share of the GPU", "GB/s written", "limit",
               "main thread, CPU ms a clip", "its other threads, CPU ms a clip")  # fmt: skip
    table = run.table(EXTRACTION, "precision, clips a batch", *columns)
    pairs = [(precision, run.sizes.batches[0]) for precision in run.precisions()]
    if run.on_gpu:
        pairs += [("bf16", run.sizes.batches[-1]), ("bf16 fused", run.sizes.batches[0])]
    for precision, size in pairs:
        table.row(f"{precision}, {size}", lambda pair=(precision, size): _extraction(run, *pair))
    if run.on_gpu:
        waits = run.table("Waits for the GPU in extraction", "call", "places")
        waits.row("extraction of 256 clips, fp32", lambda: [_waits_of_extraction(run)])
    decoding = run.table("Decoding", "workers", "files/s")
    workers = preprocess.parse([]).num_workers
    decoding.row(str(workers), lambda: [_decoding(run, workers)])


def _extraction(run: Run, precision: str, size: int) -> list[Any]:
    count = run.sizes.clips if precision != "fp32" else min(run.sizes.clips, 2_048)
    extract = extractor(run, precision, size, count)
    cpu, own = time.process_time(), time.thread_time()
    seconds = wall(run, extract)
    cpu, own = time.process_time() - cpu, time.thread_time() - own
    alone = run.value("Front end", f"{precision}, {size}", "clips/s")
    busy = count / seconds / alone if alone and run.on_gpu else None
    written = count * estimates.ROW_BYTES / seconds / 1e9
    disk = run.value("Machine", "disk: write and fdatasync, GB/s", "value")
    limit = _limit(busy, written, disk) if run.on_gpu else None
    each = 1e3 / count
    return [count / seconds, busy, written, limit, own * each, (cpu - own) * each]


def _limit(busy: float | None, written: float, disk: float | None) -> str:
    """What bounds an extraction, by shares of what the GPU and the disk do alone."""
    if busy is not None and busy >= 0.9:
        return "GPU"
    if disk is not None and written >= 0.8 * disk:
        return "disk"
    return "host"


def extractor(run: Run, precision: str, size: int, count: int) -> Callable[[], None]:
    """preprocess.py's extraction of so many clips into a new cache, ready to be called."""
    front_end = load_frontend(run, precision)
    args = preprocess.parse(
        ["--precision", precision.split()[0], "--gpu", str(run.gpu), "--batch_size", str(size)]
    )
    names = [run.paths[number % len(run.paths)] for number in range(count)]
    trials = [Trial(f"{number}.wav", path, number % 2, "-") for number, path in enumerate(names)]

    def extract() -> None:
        folder = run.new_folder() / "xls-r-5"
        writer = preprocess.open_cache(args, folder, trials, front_end)
        with common.silence():
            preprocess.extract(args, "train", writer, front_end, set(), run.device)
        writer.close()
        shutil.rmtree(folder)

    return extract


def _waits_of_extraction(run: Run) -> str:
    return find_waits(run, extractor(run, "fp32", run.sizes.batches[0], 256))


def _decoding(run: Run, workers: int) -> float:
    """Files a second until they stand in the main process, the workers' start left out."""
    size = run.sizes.batches[0]
    batches = np.split(np.arange(len(run.paths)), range(size, len(run.paths), size))
    reading = dataset.clip_batches(run.paths, [batch.tolist() for batch in batches], workers)
    first = len(next(reading).rows)
    start = time.perf_counter()
    count = sum(len(batch.rows) for batch in reading)
    return (count or first) / (time.perf_counter() - start)


def caching(run: Run) -> None:
    """The cache by itself: its writer and the plain one from memory, eight reading threads."""
    ways = ("pwrite, CRC-32 and fdatasync alone", "the plain writer", "the writer")
    writing = run.table("Writing a cache, rows/s", "rows", *ways)
    rows = run.sizes.rows // 2
    shape = (5, 8) if run.quick else (201, 1024)
    # Whole batches; each way once to warm up and once more.
    count = max(rows, bench_writer.BATCH)
    writing.row(WRITTEN, lambda: list(bench_writer.measure(shape, count, 1).values()))
    table = run.table("Cache", "what", "rows/s")
    cache = common.make_cache(run.new_folder() / "xls-r-5", rows)
    shards = sorted(cache.path.glob("features_*.npy"))

    def read() -> float:
        order = dataset.shuffled_batches([rows], run.sizes.step, 0, 1)
        start = time.perf_counter()
        count = sum(len(x) for x, _ in read_ahead(cache, order, 8, run.device))
        return count / (time.perf_counter() - start)

    common.forget(shards)
    table.row("read in random order, cold", lambda: [read()])
    table.row("read in random order, in memory", lambda: [read()])
    shutil.rmtree(cache.path)


def training(run: Run) -> None:
    columns = ("clips/s", "ms a step", "kernels", "peak GB")
    table = run.table(STEPS, "head, precision", *columns)
    precisions = ("fp32", "tf32", "bf16") if run.on_gpu else ("fp32",)
    for name, feat in HEADS:
        for precision in precisions:
            for sam in (False, True):
                row = f"{name}, {precision}" + ", SAM" * sam
                table.row(row, lambda step=(name, feat, precision, sam): _step(run, *step))
    whole = run.table(EPOCHS, "head, precision", "clips/s", "validation clips/s")
    for precision in precisions:
        whole.row(f"W2VAASIST, {precision}", lambda precision=precision: _epochs(run, precision))
    if run.on_gpu:
        waits = run.table("Waits for the GPU in training", "call", "places")
        step = training_step(run, "W2VAASIST", "xls-r-5", "fp32", sam=False)
        waits.row("train_step", lambda: [find_waits(run, step)])
        waits.row("two epochs", lambda: [find_waits(run, lambda: _epochs(run, "fp32"))])


def training_step(
    run: Run, name: str, feat: str, precision: str, sam: bool, wrap: Callable = lambda head: head
) -> Callable[[], Tensor]:
    """A step on features that lie on the device.

    Args:
        wrap: what is done to the head first: torch.compile.
    """
    devices.set_precision(precision, run.device)
    torch.manual_seed(0)
    head = model.build_head(name, feat).to(run.device).train()
    optimiser = main_train.build_optimiser(head, main_train.parse(["-t", "codecfake"]))
    features = torch.randn(run.sizes.step, *FEATURE_SHAPES[feat], device=run.device)
    labels = torch.arange(run.sizes.step, device=run.device) % 2
    sharpness = main_train.Sharpness(0.05, adaptive=False) if sam else None
    network = wrap(head)
    return lambda: main_train.train_step(network, optimiser, features, labels, sharpness, precision)


def _step(
    run: Run, name: str, feat: str, precision: str, sam: bool, wrap: Callable = lambda head: head
) -> list[Any]:
    torch.backends.cudnn.benchmark = run.on_gpu  # as main_train.py sets it
    step = training_step(run, name, feat, precision, sam, wrap)
    seconds = timed(run, step, warm=4)
    kernels = count_kernels(run, step)
    return [run.sizes.step / seconds, 1e3 * seconds, kernels, peak_gigabytes(run, step)]


def _epochs(run: Run, precision: str) -> list[Any]:
    """Clips/s of the second epoch by the script's own log, and of evaluate() alone."""
    features, out = run.folder / "features", run.new_folder() / "run"
    for part, rows in (("train", run.sizes.rows), ("dev", run.sizes.rows // 2)):
        if not (features / part).exists():
            common.make_cache(features / part / "xls-r-5", rows)
    options = ["-t", "codecfake", "-f", str(features), "-o", str(out), "--num_epochs", "2",
               "--batch_size", str(run.sizes.step), "--precision", precision,
               "--gpu", str(run.gpu)]  # fmt: skip
    with common.silence():
        main_train.main(options)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    head = model.load_head(out).to(run.device)
    shutil.rmtree(out)
    dev = JoinedFeatures([FeatureCache(features / "dev" / "xls-r-5")])
    args = main_train.parse(options)
    with common.silence():
        seconds = wall(run, lambda: main_train.evaluate(head, dev, args, run.device, 1))
    trained = max(log[-1]["seconds"], 0.01)  # it is rounded
    return [run.sizes.rows / trained, len(dev.labels) / seconds]


def scoring(run: Run) -> None:
    columns = ("clips/s, files to scores", "clips/s, GPU alone", "busy share of the GPU")
    table = run.table("Scoring", "precision, heads", *columns)
    for precision in run.precisions() if run.on_gpu else ("fp32",):
        for heads in (1, 5):
            table.row(
                f"{precision}, {heads}",
                lambda precision=precision, heads=heads: _scoring(run, precision, heads),
            )
    if run.on_gpu:
        waits = run.table("Waits for the GPU in scoring", "call", "places")
        score = scorer(run, "fp32", 1, run.paths[:256])
        waits.row("scoring of 256 clips, fp32", lambda: [find_waits(run, score)])


def scorer(run: Run, precision: str, heads: int, paths: list[str]) -> Callable[[], None]:
    """generate_score.py's way from files to logits, ready to be called."""
    args = generate_score.parse(
        ["-t", "ITW", "--gpu", str(run.gpu), "--precision", precision,
         "--batch_size", str(run.sizes.batches[0])]
    )  # fmt: skip
    scores = generate_score.Scorer(args, common.make_heads(run.ssl, heads))

    def score() -> None:
        with common.silence():
            next(scores.score_files({"bench": paths}, args.num_workers))

    return score


def _scoring(run: Run, precision: str, heads: int) -> list[Any]:
    seconds = wall(run, scorer(run, precision, heads, run.paths))
    front_end = load_frontend(run, precision)
    networks = [head.to(run.device) for head in common.make_heads(run.ssl, heads).values()]
    size = run.sizes.batches[0]
    clips = torch.randn(size, CLIP_SAMPLES, device=run.device) * 0.1

    @torch.inference_mode()
    def compute() -> list[Tensor]:
        features = front_end(clips).float()
        return [network(features)[1] for network in networks]

    alone = size / timed(run, compute)
    from_files = len(run.paths) / seconds
    return [from_files, alone, from_files / alone if run.on_gpu else None]


def reference(run: Run) -> None:
    """The reference's way of plain.py: one clip at a time, 24 blocks."""
    table = run.table("The reference's way", "what", "clips/s")
    devices.set_precision("published", run.device)  # torch's own switches, which it leaves
    front_end = plain.load_frontend(run.ssl, run.device)
    paths = run.paths[: run.sizes.few]
    head = plain.as_published(common.make_heads(run.ssl, 1)["head 0"]).to(run.device)

    def rate(work: Callable[[], Any], count: int) -> list[float]:
        work()
        return [count / wall(run, work)]

    folder = run.new_folder()
    extract = lambda: plain.extract(front_end, paths, folder, run.device)  # noqa: E731
    table.row("extraction", lambda: rate(extract, len(paths)))
    score = lambda: [plain.score(front_end, head, path, run.device) for path in paths]  # noqa: E731
    table.row("scoring", lambda: rate(score, len(paths)))
    for name, feat in HEADS:
        table.row(
            f"training step, {name}, batch {run.sizes.step}",
            lambda name=name, feat=feat: [_plain_step(run, name, feat)],
        )


def _plain_step(run: Run, name: str, feat: str) -> float:
    head = plain.as_published(model.build_head(name, feat)).to(run.device).train()
    optimiser = torch.optim.Adam(head.parameters(), lr=5e-4, weight_decay=5e-4)
    features = torch.randn(run.sizes.step, *FEATURE_SHAPES[feat], device=run.device)
    labels = torch.arange(run.sizes.step, device=run.device) % 2
    seconds = timed(run, lambda: plain.train_step(head, optimiser, features, labels))
    return run.sizes.step / seconds


def compiled(run: Run) -> None:
    """Heads as main_train.py --compile has them, and W2V2-AASIST replayed as a CUDA graph; last,
    since compiling may take minutes.
    """
    columns = ("clips/s", "ms a step", "kernels", "peak GB")
    table = run.table("Training steps, compiled", "head, precision, mode", *columns)
    # On the CPU the graph is traced alone: a C++ compiler may be absent.
    compiler = main_train.COMPILER if run.on_gpu else "eager"

    def compile_head(head: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        return main_train.CompiledHead(head, run.sizes.step)

    def record_graph(head: nn.Module) -> Callable:
        torch._dynamo.reset()
        return torch.compile(head, mode="reduce-overhead", fullgraph=True, dynamic=False)

    with mock.patch.object(main_train, "COMPILER", compiler):
        for precision in ("bf16", "tf32") if run.on_gpu else ("fp32",):
            for head in HEADS:
                step = (*head, precision, False, compile_head)
                table.row(f"{head[0]}, {precision}", lambda step=step: _step(run, *step))
    if run.on_gpu:
        step = (*HEADS[0], "bf16", False, record_graph)
        table.row("W2VAASIST, bf16, CUDA graph", lambda: _step(run, *step))


# (planned seconds, part), in this order
PARTS: tuple[tuple[float, Callable[[Run], None]], ...] = (
    (20, machine),
    (25, ceilings),
    (120, front_ends),
    (90, extraction),
    (25, caching),
    (70, training),
    (60, scoring),
    (40, reference),
    (90, compiled),
)


# ── Estimates against what was measured ──────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Prediction:
    """A figure of estimates.py and where gpu.py measures it."""

    value: float
    table: str
    row: str
    column: str


# Of every card. Relative errors: operands rounded on a CPU. Writer, main thread: of a CPU core.
EVERYWHERE = (
    Prediction(1.0e-3, "Front end", "tf32, 32", "relative error"),
    Prediction(8.5e-4, "Front end", "published, 32", "relative error"),
    Prediction(1.5e-3, "Front end", "fp16, 32", "relative error"),
    Prediction(1.2e-2, "Front end", "bf16, 32", "relative error"),
    Prediction(104, "Front end", "fp32, 32", "kernels"),
    Prediction(132, "Front end", "bf16, 32", "kernels"),
    Prediction(2_450, "Writing a cache, rows/s", WRITTEN, "the writer"),
    Prediction(0.19, EXTRACTION, "bf16, 32", "main thread, CPU ms a clip"),
    Prediction(0.95, "Scoring", "bf16, 1", "busy share of the GPU"),
    Prediction(13_000, EPOCHS, "W2VAASIST, fp32", "validation clips/s"),
)
WITHIN = 1.25  # up to a quarter more, or as much less, still counts as predicted


def predictions(card: str | None) -> list[Prediction]:
    """All estimates for one card; None: those that hold for all."""
    found = list(EVERYWHERE)
    for name, head in estimates.HEADS.items():
        for sam, kernels in ((False, head.kernels), (True, head.sam_kernels)):
            for precision, count in kernels.items():
                row = f"{name}, {precision}" + ", SAM" * sam
                found.append(Prediction(count, STEPS, row, "kernels"))
                if card:
                    rate = estimates.training_rate(estimates.CARDS[card], head, precision, sam)
                    found.append(Prediction(rate, STEPS, row, "clips/s"))
    if card:
        for kind, rate in estimates.CARDS[card].front_end.items():
            found.append(Prediction(rate, "Front end", f"{kind}, 32", "clips/s"))
    return found


def compare(run: Run) -> None:
    """Print every estimate beside its measurement."""
    card = estimates.card_of(torch.cuda.get_device_name(run.device)) if run.on_gpu else None
    print(f"\nEstimates (est) by the arithmetic of estimates.py, card: {card or 'none of these'}.")
    table = run.table("Estimates", "figure", "est", "measured", "measured / est", "verdict")
    for expected in predictions(card):
        measured = run.value(expected.table, expected.row, expected.column)
        if expected.column == "kernels" and not run.on_gpu:
            continue
        if measured is not None:
            ratio = measured / expected.value
            verdict = "holds" if 1 / WITHIN <= ratio <= WITHIN else "fails"
            words = (expected.table, expected.row, expected.column)
            line = (expected.value, measured, ratio, verdict)
            table.row(": ".join(words), lambda line=line: line)


# ── Command line ─────────────────────────────────────────────────────────────────────────────────


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "--budget",
        type=cli.number(above=0),
        default=460,
        metavar="SECONDS",
        help="after these nothing new is begun (default: %(default)s)",
    )
    add("-o", "--out", type=Path, default=common.SCRATCH, metavar="DIR", help="of results.json")
    add("--gpu", type=cli.at_least(0), default=0, metavar="N", help="index of the GPU")
    add("--quick", action="store_true", help="tiny sizes on the CPU, to see that everything runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if not args.quick and not torch.cuda.is_available():
        raise InputError(NO_GPU)
    device = devices.pick_device(-1 if args.quick else args.gpu)
    args.out.mkdir(parents=True, exist_ok=True)
    with common.scratch_folder() as folder:
        sizes = QUICK if args.quick else FULL
        run = Run(folder, device, sizes, args.out / "results.json", args.budget)
        print(f"# {torch.cuda.get_device_name(device) if run.on_gpu else common.cpu_name()}")
        run.paths += common.write_clips(folder / "audio", sizes.files)
        common.save_random_xlsr(folder / "ssl", tiny=run.quick)
        print(f"\nPrepared in {run.seconds():.0f} s; a budget of {args.budget:.0f} s.")
        for planned, part in PARTS:
            do_part(run, planned, part)
        run.ends = float("inf")
        compare(run)
        print(f"\nThe whole run took {run.seconds():.0f} s; figures in {run.out}.")


def do_part(run: Run, planned: float, part: Callable[[Run], None]) -> None:
    """One part of the run; it may take half as long again as planned, and what fails is said."""
    left = run.budget - run.seconds()
    if left < planned / 2:
        print(f"\n{part.__name__}: left out, {max(left, 0):.0f} s left of the budget", flush=True)
        return
    began = run.seconds()
    run.ends = began + min(1.5 * planned, left)
    torch.backends.cudnn.benchmark = False
    try:
        part(run)
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        print(f"\n{part.__name__} FAILED: {type(error).__name__}: {error}", flush=True)
    took = run.seconds() - began
    run.results.setdefault("Seconds", {})[part.__name__] = {"took": took, "planned": planned}
    run.save()
    free_memory()
    print(f"\n{part.__name__}: {took:.0f} s (planned {planned:.0f})", flush=True)


if __name__ == "__main__":
    cli.run(main, if_stopped="what was measured is in results.json")
