"""What the whole job costs, on this machine and as an estimate on GPUs: writes SCALE.md beside this
script.

    python -m benchmarks.scale [-o FILE] [--gpu_results results.json] [--front_end CLIPS/S] [...]

Rates of this machine's processor that are not given as options are measured first, in two minutes,
on made-up clips and XLS-R 300M's first five blocks with random weights. Rates of GPUs are those of
estimates.py; those of one card are measured ones where --gpu_results names what gpu.py wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import dataset
import main_train
import model
import preprocess
from benchmarks import common, estimates
from dataset import Trial
from formats.feature_cache import DTYPES, CacheWriter, FeatureCache, row_type
from frontends.ssl import LAYER
from runtime import cli, devices, files
from runtime.cli import InputError

REFERENCE_BYTES = 824_774  # of one of the reference's .pt files
PARTS = {
    "Codecfake train": 740_747,
    "Codecfake dev": 92_596,
    "19LA train": 25_380,
    "19LA dev": 24_844,
}
EPOCHS = 10
SHARED_REAL = 13_228  # real clips that C1..C6 have in common: decoded each time, computed once
SUBSETS = {
    **{f"C{k}": 26_456 for k in range(1, 7)},
    "C7": 145_505,
    "A1": 8_887,
    "A2": 8_887,
    "A3": 49_838,
    "19LA eval": 71_237,
    "ITW": 31_779,
}
BATCH = 8  # clips at a time while measuring
CLIP_BYTES = 4 * dataset.CLIP_SAMPLES  # float32, to a GPU
PRECISIONS = ("fp32", "tf32", "bf16")
FUSED = {"bf16": "bf16 fused"}  # as a corpus of this size is computed
DISKS = (1, 3, 7)  # GB/s: a network disk, an NVMe drive, a fast one
IN_RAM = float("inf")  # a cache that the kernel keeps in memory
ONE_CONSUMER, ONE_A100, ONE_H100 = "RTX 4090", "A100", "H100"


# ── The job ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Job:
    """What is to be done, in clips."""

    name: str
    decoded: int = 0  # audio files read
    front_end: int = 0  # through the front end
    head: int = 0  # through the head, forwards only
    trained: int = 0  # through the head and back
    written: int = 0  # rows into the cache
    read: int = 0  # rows from the cache


def jobs() -> list[Job]:
    train, dev, la_train, la_dev = PARTS.values()
    scored = sum(SUBSETS.values())
    distinct = scored - 5 * SHARED_REAL
    return [
        extraction("Codecfake", train + dev),
        extraction("19LA", la_train + la_dev),
        Job(
            f"training on Codecfake, {EPOCHS} epochs with validation",
            read=EPOCHS * (train + dev),
            trained=EPOCHS * train,
            head=EPOCHS * dev,
        ),
        Job("scoring, all test subsets", decoded=scored, front_end=distinct, head=distinct),
    ]


def extraction(corpus: str, clips: int) -> Job:
    return Job(f"extraction, {corpus} train + dev", decoded=clips, front_end=clips, written=clips)


def online_job() -> Job:
    """Training with the front end in the loop: nothing is written, everything computed again."""
    clips = EPOCHS * (PARTS["Codecfake train"] + PARTS["Codecfake dev"])
    trained = EPOCHS * PARTS["Codecfake train"]
    return Job(
        f"the same training with --online, {EPOCHS} epochs",
        decoded=clips,
        front_end=clips,
        head=clips - trained,
        trained=trained,
    )


# ── Machines ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Machine:
    """How fast it does each thing, a second. All resources of a machine work side by side, but for
    what one processor does.
    """

    name: str
    decode: float  # files, all its decoding workers
    main: float  # clips through the main thread: unpacked, padded, launched
    front_end: float  # clips
    head: float  # clips forwards
    train: float  # clips forwards and back
    write: float  # rows through the writer of each extraction
    read: float  # rows through its reading threads
    copy: float  # bytes to and from the device
    disk: float  # bytes; infinite where the cache lies in memory
    one_processor: bool = False  # decoding, writing and networks share the cores


# Resources that take turns on the cores where there is no GPU.
ON_THE_CORES = ("decoding", "main thread", "front end", "head", "writer", "readers")


def seconds(job: Job, machine: Machine, row_bytes: float, audio_bytes: float) -> dict[str, float]:
    """Time that each resource is busy. Front end and head share the GPU."""
    copied = job.front_end * CLIP_BYTES + (job.written + job.read) * row_bytes
    from_disk = (job.written + job.read) * row_bytes + job.decoded * audio_bytes
    return {
        "decoding": job.decoded / machine.decode,
        "main thread": job.front_end / machine.main,
        "front end": job.front_end / machine.front_end,
        "head": job.head / machine.head + job.trained / machine.train,
        "writer": job.written / machine.write,
        "readers": job.read / machine.read,
        "copies": copied / machine.copy,
        "disk": from_disk / machine.disk,
    }


def hours(busy: dict[str, float], machine: Machine) -> tuple[float, str]:
    """(duration, what limits it)."""
    shared = ON_THE_CORES if machine.one_processor else ("front end", "head")
    together = sum(busy[name] for name in shared)
    alone = {name: value for name, value in busy.items() if name not in shared}
    slowest = max(alone, key=alone.get)
    if alone[slowest] > together:
        return alone[slowest] / 3600, slowest
    return together / 3600, max(shared, key=lambda name: busy[name])


# ── This machine ─────────────────────────────────────────────────────────────────────────────────


def median_rate(work: Callable[[], object], count: int, repeats: int = 3) -> float:
    """Clips a second of a piece of work on `count` clips, after one run to warm up."""
    (taken,) = common.in_turns(work, repeats=repeats)
    return count / taken


def processor_rate(work: Callable[[], object], count: int, repeats: int = 9) -> float:
    """Clips a second of one core, whatever else the machine does meanwhile."""
    work()
    start = time.thread_time()
    for _ in range(repeats):
        work()
    return count * repeats / (time.thread_time() - start)


def measure_front_end(folder: Path) -> float:
    """Clips/s of the first five blocks of XLS-R 300M with random weights, float32."""
    common.save_random_xlsr(folder, layers=LAYER)
    front_end = model.load_frontend("xls-r-5", str(folder))
    clips = torch.randn(BATCH, dataset.CLIP_SAMPLES) * 0.1
    device = torch.device("cpu")
    return median_rate(lambda: preprocess.compute(front_end, clips, BATCH, device)(), BATCH, 1)


def measure_head() -> tuple[float, float]:
    """(clips/s forwards, clips/s trained) of W2V2-AASIST in float32."""
    head = model.build_head("W2VAASIST", "xls-r-5")
    features = torch.randn(BATCH, *dataset.FEATURE_SHAPES["xls-r-5"])
    labels = torch.arange(BATCH) % 2
    optimiser = torch.optim.Adam(head.parameters())
    train = median_rate(
        lambda: main_train.train_step(head.train(), optimiser, features, labels), BATCH
    )
    head.eval()
    with torch.inference_mode():
        return median_rate(lambda: head(features), BATCH), train


def measure_decoding(folder: Path) -> float:
    """Files/s of one worker until they stand in the main process, from the page cache: read,
    digested, stacked, handed over in shared memory.
    """
    paths = common.write_clips(folder, 200)
    batches = [list(range(first, first + BATCH)) for first in range(0, len(paths), BATCH)]
    reading = dataset.clip_batches(paths, batches, num_workers=1)
    next(reading)  # the worker has started
    start = time.perf_counter()
    count = sum(len(batch.rows) for batch in reading)
    return count / (time.perf_counter() - start)


def measure_main_thread() -> float:
    """Clips/s that the main thread pads; launching the kernels of a batch comes to it on a GPU."""
    clips, device = torch.randn(BATCH, dataset.CLIP_SAMPLES), torch.device("cpu")
    return processor_rate(lambda: devices.pad_batch(clips, BATCH, device), BATCH)


def measure_cache(folder: Path, dtype: str) -> tuple[float, float]:
    """(rows/s that extraction's threads write, rows/s that one thread reads and checks).

    Writing ends in the page cache; what the disk does beside it or afterwards is the disk's time.
    """
    shape, count, size = dataset.FEATURE_SHAPES["xls-r-5"], 512, 32
    trials = [Trial(f"{row}", "", 0, "-") for row in range(count)]
    features = np.random.default_rng(0).normal(size=(size, *shape)).astype(np.float32)
    if dtype == "float16":
        features = features.astype(np.float16)  # a GPU does it before its copy
    writer = CacheWriter(folder, trials, {"feat": "xls-r-5"}, shape, dtype)
    with preprocess.Writes(writer) as writes:
        start = time.perf_counter()
        for first in range(0, count, size):
            rows = list(range(first, first + size))
            writes.add(rows, lambda: features, range(size), [])
        writes.wait()
        written = count / (time.perf_counter() - start)
    writer.close()
    cache, order = FeatureCache(folder), np.random.default_rng(1).permutation(count)[:128]
    return written, processor_rate(lambda: cache.read(order), len(order))


# ── Rates and where they come from ───────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rate:
    """A rate of this machine's processor that an option gives, or that is measured."""

    option: str
    text: str


MEASURED = (
    Rate("front_end", "front end in float32, clips/s of all cores"),
    Rate("head", "W2V2-AASIST forwards in float32, clips/s of all cores"),
    Rate("train", "W2V2-AASIST trained, no SAM, float32, clips/s of all cores"),
    Rate("decode", "audio to a clip in the main process, files/s and worker"),
    Rate("pad", "main thread: clips padded, clips/s"),
    Rate("write", "writer of one extraction, rows/s; the disk flushes beside it"),
    Rate("rows", "cached rows read and checked from memory, rows/s and thread"),
)
ASSUMED = (
    ("gpu_cores", 16, "CPU cores beside the GPUs"),
    ("workers", 14, "decoding workers beside a GPU, of these cores"),
    ("readers", 8, "reading threads in training"),
    ("launch_ms", 1.4, "ms of the main thread to launch the front end's kernels for 32 clips"),
    ("pcie", 25.0, "GB/s between memory and GPU (PCIe 4 x16)"),
    ("disk", 1.0, "GB/s of the disk here"),
    ("audio_kb", 130.0, "kB of an audio file: 16-bit WAV of 4 s at 16 kHz"),
    ("step_ms", 11.5, "ms of a training step that several GPUs share, whatever their number"),
)


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        default=Path(__file__).with_name("SCALE.md"),
        help="(default: SCALE.md beside this script)",
    )
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="float16",
        help="type of the cached values (default: %(default)s)",
    )
    add(
        "--gpu_results",
        type=Path,
        metavar="FILE",
        help="results.json of gpu.py: its card's rates are measured ones",
    )
    above_zero = cli.number(above=0)
    for rate in MEASURED:
        text = f"{rate.text} (default: measured)"
        add(f"--{rate.option}", type=above_zero, metavar="X", help=text)
    for name, value, text in ASSUMED:
        text = f"{text} (default: %(default)s)"
        add(f"--{name}", type=above_zero, default=value, metavar="X", help=text)
    return parser


def fill_in(args: argparse.Namespace, folder: Path) -> None:
    """Measure the rates that were not given."""
    measured: dict[str, float] = {}
    if args.front_end is None:
        measured["front_end"] = measure_front_end(folder / "ssl")
    if None in (args.head, args.train):
        measured["head"], measured["train"] = measure_head()
    if args.decode is None:
        measured["decode"] = measure_decoding(folder / "audio")
    if args.pad is None:
        measured["pad"] = measure_main_thread()
    if None in (args.write, args.rows):
        measured["write"], measured["rows"] = measure_cache(folder / "cache", args.dtype)
    for name, value in measured.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def this_machine(args: argparse.Namespace) -> Machine:
    """All of it measured or given; its networks, workers and writer share the cores."""
    cores = os.cpu_count() or 1
    return Machine(
        f"{cores} cores",
        decode=args.decode * cores,
        main=args.pad,
        front_end=args.front_end,
        head=args.head,
        train=args.train,
        write=args.write,
        read=args.rows * cores,
        copy=float("inf"),
        disk=args.disk * 1e9,
        one_processor=True,
    )


def main_thread_rate(args: argparse.Namespace) -> float:
    """Clips/s that the main thread pads and launches the kernels of, 32 at a time."""
    return 1 / (1 / args.pad + args.launch_ms / 1e3 / 32)


@dataclass(frozen=True)
class GPU:
    """A card and, by precision, its rates in clips/s."""

    card: str
    front_end: dict[str, float]
    train: dict[str, float]
    head: dict[str, float]
    measured: bool  # all of them; else estimates


def estimated(card: str) -> GPU:
    about, head = estimates.CARDS[card], estimates.HEADS["W2VAASIST"]
    return GPU(
        card,
        {name: about.front_end[FUSED.get(name, name)] for name in PRECISIONS},
        {name: estimates.training_rate(about, head, name) for name in PRECISIONS},
        {name: estimates.forward_rate(about, head, name) for name in PRECISIONS},
        measured=False,
    )


def read_results(path: Path) -> GPU:
    """The card that gpu.py ran on.

    Raises:
        InputError: not its file, or a figure is missing.
    """
    try:
        results = json.loads(path.read_text())
        trained = {
            name: results["Training steps"][f"W2VAASIST, {name}"]["clips/s"] for name in PRECISIONS
        }
        return GPU(
            results["Machine"]["name"]["value"].removeprefix("NVIDIA "),
            {
                name: results["Front end"][f"{FUSED.get(name, name)}, 32"]["clips/s"]
                for name in PRECISIONS
            },
            trained,
            {name: rate / estimates.FORWARD_SHARE for name, rate in trained.items()},
            measured=True,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: expected results.json of a whole run of benchmarks/gpu.py, got a file "
            f"without {error}; run it again with a larger --budget"
        ) from None


def with_gpu(gpu: GPU, precision: str, disk: float, args: argparse.Namespace) -> Machine:
    """One GPU of this kind beside cores of this machine's kind.

    Args:
        disk: GB/s, infinite where the cache lies in memory.
    """
    return Machine(
        f"1 {gpu.card}, {precision}",
        decode=args.decode * args.workers,
        main=main_thread_rate(args),
        front_end=gpu.front_end[precision],
        head=gpu.head[precision],
        train=gpu.train[precision],
        write=args.write,
        read=args.rows * args.readers,
        copy=args.pcie * 1e9,
        disk=disk * 1e9,
    )


def with_gpus(count: int, one: Machine, args: argparse.Namespace) -> Machine:
    """Several of them on one disk. Extraction and scoring have a process a GPU, each with workers
    and a writer of its own; a training step that they share does not get faster.
    """
    shared_step = estimates.STEP_CLIPS / (args.step_ms / 1e3)
    return replace(
        one,
        name=f"{count} x {one.name}",
        decode=count * one.decode,
        main=count * one.main,
        front_end=count * one.front_end,
        head=count * one.head,
        train=shared_step if count > 1 else one.train,
        write=count * one.write,
        read=count * one.read,
        copy=count * one.copy,
    )


def fastest_without_cache(machine: Machine, row_bytes: float) -> float | None:
    """Clips/s of the front end above which --online trains faster than the cache is read.

    Online, the GPU does both: 1 / (1/F + 1/T). From a cache, training goes at T or at the disk's D
    rows/s: F must be above 1 / (1/D - 1/T). None: the disk does not limit, so the cache wins.
    """
    rows = machine.disk / row_bytes
    if rows >= machine.train:
        return None
    return 1 / (1 / rows - 1 / machine.train)


# ── The report ───────────────────────────────────────────────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    load = os.getloadavg()[0]
    given = {name for name, value in vars(args).items() if value is not None}
    gpus = {card: estimated(card) for card in (ONE_CONSUMER, ONE_A100, ONE_H100)}
    if args.gpu_results:
        gpu = read_results(args.gpu_results)
        gpus[estimates.card_of(gpu.card) or gpu.card] = gpu
    with common.scratch_folder() as folder:
        fill_in(args, folder)
    text = "\n".join(report(args, gpus, given, load)) + "\n"
    with files.atomic_write(args.out) as file:
        file.write(text)
    print(f"{args.out}: written")


def report(
    args: argparse.Namespace, gpus: dict[str, GPU], given: set[str], load: float
) -> list[str]:
    here = this_machine(args)
    return [
        "# What the whole job costs",
        "",
        f"Written by `python -m benchmarks.scale`; {os.cpu_count()} cores, {common.cpu_name()}, "
        f"load average {load:.1f} before, torch {torch.__version__} with "
        f"{torch.get_num_threads()} threads; "
        f"W2V2-AASIST on xls-r-5, cache in {args.dtype}.",
        "",
        "## The whole job, and where its figures come from",
        "",
        *whole_table(args, here, gpus),
        "",
        *notes(args, load),
        "",
        "## Rates",
        "",
        *rates_table(args, given),
        "",
        *gpu_table(gpus.values()),
        "",
        "## Hours and what limits them: this machine, all rates measured or given",
        "",
        *table(("job", here.name), [(job.name, cell(job, here, args)) for job in jobs()]),
        "",
        *(line for gpu in gpus.values() for line in gpu_section(gpu, args)),
        "## Several GPUs",
        "",
        *several_section(gpus[ONE_H100], args),
        "",
        "## Without a cache",
        "",
        *online_section(gpus, args),
        "",
        "## Bytes on the disk, GB",
        "",
        *bytes_table(),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "| :-- |" + " --: |" * (len(head) - 1),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def source_of(gpu: GPU) -> str:
    return "measured" if gpu.measured else "est"


def row_bytes_of(args: argparse.Namespace) -> int:
    return row_type(args.dtype, dataset.FEATURE_SHAPES["xls-r-5"]).itemsize


def duration(job: Job, machine: Machine, args: argparse.Namespace) -> tuple[float, str]:
    return hours(seconds(job, machine, row_bytes_of(args), args.audio_kb * 1e3), machine)


def cell(job: Job, machine: Machine, args: argparse.Namespace) -> str:
    time_, limit = duration(job, machine, args)
    return f"{time_:.3g} h, {limit}"


def whole_job() -> list[Job]:
    """Codecfake's features, a head trained on them, all test subsets scored."""
    codecfake, _, training, scoring = jobs()
    return [codecfake, training, scoring]


def whole_table(args: argparse.Namespace, here: Machine, gpus: dict[str, GPU]) -> list[str]:
    """Hours of extraction, training and scoring one after another."""
    clips = PARTS["Codecfake train"] + PARTS["Codecfake dev"]
    gigabytes = f"{clips * row_bytes_of(args) / 1e9:,.0f} GB"
    lines = [("this machine", "measured", "fp32", here, f"{args.disk:g} GB/s")]
    for gpu in gpus.values():
        for precision in ("fp32", "bf16"):
            machine = with_gpu(gpu, precision, 3, args)
            lines.append((f"1 {gpu.card}", source_of(gpu), precision, machine, "3 GB/s"))
    rows = []
    for name, source, precision, machine, disk in lines:
        times = [duration(job, machine, args)[0] for job in whole_job()]
        cells = [f"{time_:.3g}" for time_ in (*times, sum(times))]
        rows.append((name, source, precision, disk, *cells, gigabytes))
    head = ("machine", "GPU's rates", "precision", "disk", "extraction, h", "training, h",
            "scoring, h", "all, h", "cache")  # fmt: skip
    return table(head, rows)


def notes(args: argparse.Namespace, load: float) -> list[str]:
    """What the table rests on.

    Args:
        load: load average before anything was measured.
    """
    busy = []
    if load > 1:
        busy = [
            f"**This machine was busy (load average {load:.1f} on {os.cpu_count()} cores): the "
            "hours in its own lines are too many. Run the script again when nothing else runs.**",
            "",
        ]
    return [
        *busy,
        f"Codecfake's training and development sets, {EPOCHS} epochs, twelve test subsets. "
        "*est*: by the arithmetic of benchmarks/estimates.py, not measured. Of the machines with a "
        f"GPU, {args.gpu_cores:g} cores with {args.workers:g} decoding workers are assumed to be "
        "as fast as cores here.",
        "",
        "Resources work side by side, so the slowest is the duration; front end and head share a "
        "GPU and add up, and without a GPU all but the disk share the cores. Scoring has the next "
        "batch ready when one is computed. bf16 is computed with fused norms. SAM doubles the "
        "arithmetic of training. Sequential and random access are taken to be equally fast; "
        "start-up and --compile are left out.",
    ]


def rates_table(args: argparse.Namespace, given: set[str]) -> list[str]:
    rows = []
    for rate in MEASURED:
        source = "given" if rate.option in given else "measured here"
        rows.append((rate.text, f"{getattr(args, rate.option):.4g}", source))
    for name, _, text in ASSUMED:
        rows.append((text, f"{getattr(args, name):.4g}", f"assumed (`--{name}`)"))
    return table(("figure", "value", "source"), rows)


def gpu_table(gpus: Sequence[GPU]) -> list[str]:
    """Clips/s of the cards by precision."""
    rows = []
    for gpu in gpus:
        for name, rates in (
            ("front end", gpu.front_end),
            ("W2V2-AASIST trained", gpu.train),
            ("W2V2-AASIST forwards", gpu.head),
        ):
            cells = [f"{rates[precision]:,.0f}" for precision in PRECISIONS]
            rows.append((f"{gpu.card}: {name}, clips/s", *cells, source_of(gpu)))
    return table(("figure", *PRECISIONS, "source"), rows)


def gpu_section(gpu: GPU, args: argparse.Namespace) -> list[str]:
    """Hours of each job by disk and precision."""
    rows = []
    for job in whole_job():
        for disk in (*DISKS, IN_RAM) if job.written or job.read else (1,):
            cells = [cell(job, with_gpu(gpu, name, disk, args), args) for name in PRECISIONS]
            where = "cache in RAM" if disk == IN_RAM else f"disk {disk} GB/s"
            rows.append((f"{job.name}; {where}", *cells))
    title = f"## Hours and what limits them: 1 {gpu.card}, rates of the GPU {source_of(gpu)}"
    return [title, "", *table(("job", *PRECISIONS), rows), ""]


def several_section(gpu: GPU, args: argparse.Namespace) -> list[str]:
    """Eight GPUs, bf16."""
    one = with_gpu(gpu, "bf16", 7, args)
    machines = [one, with_gpus(8, one, args)]
    rows = [(job.name, *(cell(job, machine, args) for machine in machines)) for job in jobs()]
    steps = estimates.STEP_CLIPS / args.step_ms * 1e3
    return [
        *table(("job, one disk of 7 GB/s", *(machine.name for machine in machines)), rows),
        "",
        f"Training does not scale: a shared step of {estimates.STEP_CLIPS} clips is bound by "
        f"launching kernels and reductions, est {args.step_ms:g} ms however many GPUs share it "
        "(968 kernels and 525 of the batch norms that are in step, 350 copies of gradients, 5 us "
        f"each, and 47 reductions of 35 us), {steps:,.0f} clips/s. One head a GPU, each with a "
        "folder of its own, is linear until the disk.",
    ]


def online_section(gpus: dict[str, GPU], args: argparse.Namespace) -> list[str]:
    """From which front end and disk `--online` trains faster than a cache is read."""
    rows = []
    for gpu in gpus.values():
        for precision in PRECISIONS:
            cells = []
            for disk in DISKS:
                machine = with_gpu(gpu, precision, disk, args)
                above = fastest_without_cache(machine, row_bytes_of(args))
                won = above is not None and machine.front_end > above
                need = "cache, always" if above is None else f"above {above:,.0f}/s"
                cells.append(f"**online**: {need}" if won else need)
            front_end = f"{gpu.front_end[precision]:,.0f}"
            rows.append((f"{gpu.card}, {precision}", source_of(gpu), front_end, *cells))
    head = ("GPU", "rates", "front end, clips/s", *(f"disk {disk} GB/s" for disk in DISKS))
    training, online = jobs()[2], online_job()
    h100 = with_gpu(gpus[ONE_H100], "bf16", 1, args)
    times = [duration(job, h100, args)[0] for job in (whole_job()[0], training, online)]
    return [
        "The front end's speed above which `main_train.py --online` trains faster than from a "
        f"cache in {args.dtype}, by disk; bold where this card's is. D rows/s from the disk, T "
        "clips/s of training: 1 / (1/D - 1/T). From memory the cache always wins.",
        "",
        *table(head, rows),
        "",
        f"One {ONE_H100}, bf16, 1 GB/s: extraction {times[0]:.2g} h and training {times[1]:.2g} h "
        f"from a cache, {times[2]:.2g} h online ({EPOCHS} epochs).",
    ]


def bytes_table() -> list[str]:
    rows = []
    for name, clips in (*PARTS.items(), ("all", sum(PARTS.values()))):
        sizes = [f"{size / 1e9:,.1f}" for size in disk_bytes(clips).values()]
        rows.append((f"{name}: {clips:,}", *sizes))
    return table(("clips", "the reference's .pt", *DTYPES), rows)


def disk_bytes(clips: int) -> dict[str, int]:
    """Bytes of so many xls-r-5 features: the reference's, and in each type."""
    sizes = {dtype: row_type(dtype, dataset.FEATURE_SHAPES["xls-r-5"]).itemsize for dtype in DTYPES}
    return {name: clips * size for name, size in ({"reference": REFERENCE_BYTES} | sizes).items()}


if __name__ == "__main__":
    cli.run(main, if_stopped="run the same command again")
