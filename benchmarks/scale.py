"""What the whole job costs, on this machine and as an estimate on GPUs: writes SCALE.md beside this
script.

    python -m benchmarks.scale [-o FILE] [--front_end CLIPS/S] [--gpu_tflops ...]

Rates of this machine that are not given as options are measured first, in about a minute, on
made-up clips and the full XLS-R 300M configuration with random weights (its first five blocks, as
everywhere here).
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode

import dataset
import frontends
import main_train
import model
import preprocess
from dataset import Trial
from formats.feature_cache import DTYPES, CacheWriter, FeatureCache, row_type
from runtime import cli, files

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


@dataclass(frozen=True)
class Machine:
    """How fast it is done, a second."""

    name: str
    cores: int
    decode: float  # files, a core
    rows: float  # cached rows read and checked, a core
    front_end: float  # clips, the whole machine; likewise below
    head: float
    train: float
    disk: float  # bytes
    one_processor: bool  # decoding and networks share the cores, so that their times add up


def jobs() -> list[Job]:
    train, dev, la_train, la_dev = PARTS.values()
    scored = sum(SUBSETS.values())
    distinct = scored - 5 * SHARED_REAL
    return [
        *(
            Job(f"extraction, {name}", decoded=n, front_end=n, written=n)
            for name, n in (
                ("Codecfake train + dev", train + dev),
                ("19LA train + dev", la_train + la_dev),
            )
        ),
        Job(
            f"training on Codecfake, {EPOCHS} epochs",
            read=EPOCHS * (train + dev),
            trained=EPOCHS * train,
            head=EPOCHS * dev,
        ),
        Job("scoring, all test subsets", decoded=scored, front_end=distinct, head=distinct),
    ]


def seconds(job: Job, machine: Machine, row_bytes: float, audio_bytes: float) -> dict[str, float]:
    """Time that each resource is busy."""
    return {
        "decode": job.decoded / (machine.decode * machine.cores)
        + job.read / (machine.rows * machine.cores),
        "compute": job.front_end / machine.front_end
        + job.head / machine.head
        + job.trained / machine.train,
        "disk": ((job.written + job.read) * row_bytes + job.decoded * audio_bytes) / machine.disk,
    }


def hours(busy: dict[str, float], machine: Machine) -> tuple[float, str]:
    """(duration, what limits it): resources work side by side, but for decoding and networks on the
    same cores.
    """
    together = (
        busy["decode"] + busy["compute"]
        if machine.one_processor
        else max(busy["decode"], busy["compute"])
    )
    return max(together, busy["disk"]) / 3600, max(busy, key=busy.get)


# ── This machine ──


def median_rate(work: Callable[[], object], count: int, repeats: int = 3) -> float:
    """Clips a second of a piece of work on `count` clips, after one run to warm up."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return count / float(np.median(taken))


def measure_front_end(folder: Path) -> tuple[float, float]:
    """(clips/s, GFLOP a clip) of the first five blocks of XLS-R 300M with random weights."""
    import transformers

    network = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            hidden_size=1024,
            num_hidden_layers=frontends.ssl.LAYER,
            num_attention_heads=16,
            intermediate_size=4096,
            conv_dim=[512] * 7,
            feat_extract_norm="layer",
            conv_bias=True,
            do_stable_layer_norm=True,
        )
    )
    network.save_pretrained(folder)
    front_end, clips = (
        model.load_frontend("xls-r-5", str(folder)),
        torch.randn(BATCH, dataset.CLIP_SAMPLES) * 0.1,
    )
    device = torch.device("cpu")
    in_place = {
        torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * a[0] * a[1] * b[1]
    }  # of shapes; not counted by itself
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter:
        preprocess.compute(front_end, clips, BATCH, device)()
    return median_rate(
        lambda: preprocess.compute(front_end, clips, BATCH, device)(), BATCH, 1
    ), counter.get_total_flops() / BATCH / 1e9


def measure_head() -> tuple[float, float, float]:
    """(clips/s forwards, clips/s trained, GFLOP a clip forwards) of W2V2-AASIST."""
    head = model.build_head("W2VAASIST", "xls-r-5")
    features, labels = (
        torch.randn(BATCH, *dataset.FEATURE_SHAPES["xls-r-5"]),
        torch.arange(BATCH) % 2,
    )
    optimiser = torch.optim.Adam(head.parameters())
    train = median_rate(
        lambda: main_train.train_step(head.train(), optimiser, features, labels), BATCH
    )
    counter = FlopCounterMode(display=False)
    with counter:  # which needs the graph that inference mode leaves out
        head.eval()(features)
    with torch.inference_mode():
        return (
            median_rate(lambda: head(features), BATCH),
            train,
            counter.get_total_flops() / BATCH / 1e9,
        )


def measure_decoding(folder: Path) -> float:
    """16-bit WAV files of 4 s at 16 kHz, clips/s on one core, from the page cache."""
    for number in range(50):
        soundfile.write(
            folder / f"{number}.wav",
            np.random.default_rng(number).normal(0, 0.1, dataset.CLIP_SAMPLES),
            dataset.SAMPLE_RATE,
        )
    return median_rate(
        lambda: [dataset.load_clip(folder / f"{number}.wav") for number in range(50)], 50
    )


def measure_cache(folder: Path, dtype: str) -> float:
    """Rows/s that one thread reads and checks, from the page cache."""
    shape, count = dataset.FEATURE_SHAPES["xls-r-5"], 64
    writer = CacheWriter(
        folder,
        [Trial(f"{row}", "", 0, "-") for row in range(count)],
        {"feat": "xls-r-5"},
        shape,
        dtype,
    )
    writer.write(
        range(count), np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32)
    )
    writer.close()
    cache, order = FeatureCache(folder), np.random.default_rng(1).permutation(count)
    return median_rate(lambda: cache.read(order), count)


# ── The report ──


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        default=Path(__file__).with_name("SCALE.md"),
        help="(default: SCALE.md beside this script)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float16",
        help="type of the cached values (default: %(default)s)",
    )
    for name, text in (
        ("front_end", "clips/s of extraction, the whole machine"),
        ("head", "clips/s of the head forwards"),
        ("train", "clips/s of training"),
        ("decode", "audio files/s and core"),
        ("rows", "cached rows/s and core"),
        ("front_end_gflop", "GFLOP a clip of the front end"),
        ("head_gflop", "GFLOP a clip of the head forwards"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, metavar="X", help=f"{text} (default: measured)"
        )
    for name, value, text in (
        ("gpu_tflops", 400, "peak of one GPU, TFLOP/s, in the precision used"),
        ("front_end_share", 0.3, "of the peak that the front end reaches"),
        ("head_share", 0.02, "of the peak that the head reaches; its operations are small"),
        ("gpu_cores", 8, "CPU cores a GPU"),
        ("disk", 1.0, "GB/s of the disk, here and beside the GPUs, which share it"),
        ("audio_kb", 130, "kB of an audio file"),
    ):
        parser.add_argument(
            f"--{name}",
            type=positive,
            default=value,
            metavar="X",
            help=f"{text} (default: %(default)s)",
        )
    return parser


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    given = {name for name, value in vars(args).items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        fill_in(args, Path(folder))
    cores = os.cpu_count() or 1
    here = Machine(
        "this machine",
        cores,
        args.decode,
        args.rows,
        args.front_end,
        args.head,
        args.train,
        args.disk * 1e9,
        one_processor=True,
    )
    machines = [here, *(on_gpus(count, here, args) for count in (1, 8))]
    with files.atomic_write(args.out) as file:
        file.write(report(args, machines, given))
    print(f"{args.out}: written")


def fill_in(args: argparse.Namespace, folder: Path) -> None:
    """Measure the rates that were not given."""
    measured: dict[str, float] = {}
    if None in (args.front_end, args.front_end_gflop):
        measured["front_end"], measured["front_end_gflop"] = measure_front_end(folder / "ssl")
    if None in (args.head, args.train, args.head_gflop):
        measured["head"], measured["train"], measured["head_gflop"] = measure_head()
    if args.decode is None:
        measured["decode"] = measure_decoding(folder)
    if args.rows is None:
        measured["rows"] = measure_cache(folder / "cache", args.dtype)
    for name, value in measured.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def on_gpus(count: int, here: Machine, args: argparse.Namespace) -> Machine:
    """An estimate: the networks at a share of the GPUs' peak, decoding on their cores, one disk for
    all.
    """
    gflops = count * args.gpu_tflops * 1e3
    return Machine(
        f"{count} GPU{'s' * (count > 1)}",
        int(count * args.gpu_cores),
        here.decode,
        here.rows,
        gflops * args.front_end_share / args.front_end_gflop,
        gflops * args.head_share / args.head_gflop,
        gflops * args.head_share / (3 * args.head_gflop),
        here.disk,
        one_processor=False,
    )


MEASURED = (
    ("front_end", "front end, clips/s"),
    ("head", "head forwards, clips/s"),
    ("train", "head trained (no SAM), clips/s"),
    ("decode", "decoding, files/s and core"),
    ("rows", "cached rows, rows/s and core"),
    ("front_end_gflop", "front end, GFLOP a clip"),
    ("head_gflop", "head forwards, GFLOP a clip (trained: three times)"),
)
ASSUMED = (
    ("gpu_tflops", "GPU's peak, TFLOP/s"),
    ("front_end_share", "share of it that the front end reaches"),
    ("head_share", "share of it that the head reaches"),
    ("gpu_cores", "CPU cores a GPU"),
    ("disk", "disk, GB/s"),
    ("audio_kb", "audio file, kB"),
)


def report(args: argparse.Namespace, machines: Sequence[Machine], given: set[str]) -> str:
    lines = [
        "# What the whole job costs",
        "",
        f"Written by `benchmarks/scale.py`; {os.cpu_count()} cores, {platform.machine()}, torch "
        f"{torch.__version__}, torch threads: {torch.get_num_threads()}; W2V2-AASIST on xls-r-5, "
        f"cache in {args.dtype}.",
        "",
        *rates_table(args, given),
        "",
        f"## Hours and what limits them (**{machines[0].name}: computed from measured rates; GPUs: "
        "an estimate, not measured**)",
        "",
        *hours_table(args, machines),
        "",
        "decode: reading audio and cached rows on the CPU cores; compute: front end and head; "
        "disk: bytes of audio and cache. They work side by side; on this machine decoding and "
        "networks share the cores and add up.",
        "",
        "## Bytes on the disk, GB",
        "",
        *bytes_table(),
    ]
    return "\n".join(lines) + "\n"


def rates_table(args: argparse.Namespace, given: set[str]) -> list[str]:
    lines = ["| figure | value | source |", "| :-- | --: | :-- |"]
    for name, text in MEASURED:
        source = "given" if name in given else "measured"
        lines.append(f"| {text} | {getattr(args, name):.4g} | {source} |")
    for name, text in ASSUMED:
        lines.append(f"| {text} | {getattr(args, name):.4g} | assumed (`--{name}`) |")
    return lines


def hours_table(args: argparse.Namespace, machines: Sequence[Machine]) -> list[str]:
    row_bytes = row_type(args.dtype, dataset.FEATURE_SHAPES["xls-r-5"]).itemsize
    lines = [
        "| job | " + " | ".join(machine.name for machine in machines) + " |",
        "| :-- |" + " --: |" * len(machines),
    ]
    for job in jobs():
        cells = []
        for machine in machines:
            time_, limit = hours(seconds(job, machine, row_bytes, args.audio_kb * 1e3), machine)
            cells.append(f"{time_:.3g} h, {limit}")
        lines.append(f"| {job.name} | {' | '.join(cells)} |")
    return lines


def bytes_table() -> list[str]:
    lines = [
        f"| clips | the reference's .pt | {' | '.join(DTYPES)} |",
        "| :-- | --: |" + " --: |" * len(DTYPES),
    ]
    for name, clips in (*PARTS.items(), ("all", sum(PARTS.values()))):
        sizes = " | ".join(f"{size / 1e9:,.1f}" for size in disk_bytes(clips).values())
        lines.append(f"| {name}: {clips:,} | {sizes} |")
    return lines


def disk_bytes(clips: int) -> dict[str, int]:
    """Bytes of so many xls-r-5 features: the reference's, and in each type."""
    sizes = {dtype: row_type(dtype, dataset.FEATURE_SHAPES["xls-r-5"]).itemsize for dtype in DTYPES}
    return {name: clips * size for name, size in ({"reference": REFERENCE_BYTES} | sizes).items()}


if __name__ == "__main__":
    cli.run(main, if_stopped="run the same command again")
