"""Every stage timed against the reference's way, in one run.

    python -m benchmarks.bench [--quick]

Prints Markdown: seconds of either way (median of n), their ratio, and how far the results lie
apart. Audio is made up, and XLS-R has its full 300M configuration and random weights: neither
changes the speed. --quick uses a tiny network and few clips: it shows that all runs, no more.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
import generate_score
import main_train
import model
import preprocess
from benchmarks import bench_evaluate, bench_openvino, common, plain
from benchmarks.common import silence
from dataset import CLIP_SAMPLES, SAMPLE_RATE, Trial, read_ahead
from runtime import devices

# Multiply-adds of one clip, counted twice as arithmetic is: convolutions, positions, a block (SPEC
# of wav2vec 2.0 at 64,600 samples).
FLOPS = {"convolutions": 20e9, "positions": 3.4e9, "block": 5.1e9}


@dataclass
class Setting:
    """What a run works with."""

    folder: Path
    ssl: str
    device: torch.device
    repeats: int
    clips: int  # through the front ends, our way
    few: int  # of them the reference's way, which takes one at a time and a second or two for each
    rows: int  # of the cache that is read
    batch: int  # of a training step
    paths: list[str]

    @property
    def gpu(self) -> int:
        """The device as --gpu names it."""
        return self.device.index if self.device.type == "cuda" else -1


@dataclass
class Row:
    """A line of the table."""

    stage: str
    target: str
    reference: float  # seconds, or bytes
    ours: float
    unit: str
    difference: str

    def cells(self) -> list[str]:
        return [
            self.stage,
            _number(self.reference),
            _number(self.ours),
            self.unit,
            f"**{self.reference / self.ours:.2f}**",
            self.target,
            self.difference,
        ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, to see that everything runs"
    )
    parser.add_argument("--gpu", type=int, help="index of the GPU, -1 for the CPU")
    args = parser.parse_args(argv)
    device = (
        torch.device("cuda", args.gpu or 0)
        if torch.cuda.is_available() and args.gpu != -1
        else torch.device("cpu")
    )
    settle(device)
    with common.scratch_folder() as folder:
        setting = prepare(folder, device, args.quick)
        ceilings = measure_ceilings(device)
        rows, notes = [], []
        for stage in (
            extraction,
            peer,
            size_on_disk,
            cold_reads,
            training,
            training_from_cache,
            scoring,
            several_models,
            shared_clips,
            evaluation,
        ):
            print(f"{stage.__name__} ...", file=sys.stderr, flush=True)
            found, remarks = stage(setting, ceilings)
            rows += found
            notes += remarks
    print(report(rows, notes, ceilings, setting))


# ── What everything runs on ──────────────────────────────────────────────────────────────────────


def prepare(folder: Path, device: torch.device, quick: bool) -> Setting:
    gpu = device.type == "cuda"
    clips, few = (4, 2) if quick else (2048, 64) if gpu else (64, 16)
    setting = Setting(
        folder,
        str(folder / "ssl"),
        device,
        1 if quick else 3,
        clips,
        few,
        32 if quick else 2048,
        4 if quick else 32,
        [],
    )
    setting.paths += common.write_clips(folder / "audio", clips)
    common.save_random_xlsr(folder / "ssl", quick)
    return setting


def in_its_own_process(function: Callable[..., Any], s: Setting, *arguments: Any) -> Any:
    """For what pick_device() sets for a whole process (glibc's memory), which the reference's way
    must not profit from.
    """
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=settle, initargs=(s.device,)
    ) as pool:
        return pool.submit(function, s, *arguments).result()


def settle(device: torch.device) -> None:
    """Make a GPU the current one, and float32 float32: torch's TF32 would else decide how far the
    two ways lie apart.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    devices.set_precision("fp32", device)


def measure_ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s of a large matrix product in each type."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        size = 8192 if device.type == "cuda" else 2048 if name == "fp32" else 512
        found[name] = common.product_rate(size, dtype, device)
    return found


# ── Stages ───────────────────────────────────────────────────────────────────────────────────────

Found = tuple[list[Row], list[str]]


def extraction(s: Setting, ceilings: dict[str, float]) -> Found:
    """Audio files to features on disk; float32 and, where the device has it, bf16."""
    (s.folder / "pt").mkdir()
    theirs, plain_features = in_its_own_process(_extract_plainly, s)
    rows, notes = [], []
    for precision, target in (("fp32", "3.5"), ("bf16", "10")):
        if precision == "bf16" and not devices.has_bf16(s.device):
            notes.append(
                "bf16: this device has no bfloat16 arithmetic (a matrix product reaches "
                f"{ceilings['bf16'] / 1e9:.1f} GFLOP/s, in float32 {ceilings['fp32'] / 1e9:.0f}), "
                "so nothing is timed in it."
            )
            continue
        ours, features, parts = in_its_own_process(_extract_here, s, precision)
        apart = np.abs(features - plain_features).max() / np.abs(plain_features).max()
        rows.append(
            Row(
                f"extraction xls-r-5, {precision}, a clip",
                target,
                theirs / s.few,
                ours / s.clips,
                "s",
                f"{apart:.1e} of the largest value",
            )
        )
        flops = FLOPS["convolutions"] + FLOPS["positions"] + 5 * FLOPS["block"]
        notes.append(
            f"extraction {precision}: {s.clips / ours:.2f} clips/s; five blocks take "
            f"{flops / 1e9:.0f} GFLOP a clip and the reference's 24 "
            f"{(flops + 19 * FLOPS['block']) / 1e9:.0f}, so equally fast arithmetic alone gives "
            f"{(flops + 19 * FLOPS['block']) / flops:.1f}; "
            f"{100 * flops * s.clips / ours / ceilings[precision]:.0f} % of the matrix products' "
            "ceiling. Time goes to "
            + ", ".join(
                f"{name} {1000 * seconds / s.clips:.1f} ms" for name, seconds in parts.items()
            )
            + " a clip (some of it side by side)."
        )
    return rows, notes


def _extract_plainly(s: Setting) -> tuple[float, np.ndarray]:
    front_end = plain.load_frontend(s.ssl, s.device)
    (seconds,) = common.in_turns(
        lambda: plain.extract(front_end, s.paths[: s.few], s.folder / "pt", s.device),
        repeats=s.repeats,
    )
    return seconds, plain.feature(front_end, s.paths[0], s.device).numpy()


def _extract_here(s: Setting, precision: str) -> tuple[float, np.ndarray, dict[str, float]]:
    device = devices.pick_device(s.gpu)
    devices.set_precision(precision, device)
    args = preprocess.parse(["--gpu", str(s.gpu), "--precision", precision])
    front_end = model.load_frontend("xls-r-5", s.ssl, precision).to(device)
    trials = [Trial(Path(path).name, path, n % 2, "-") for n, path in enumerate(s.paths)]

    def run() -> None:
        writer = preprocess.open_cache(args, _new_folder(s), trials, front_end)
        with silence():
            preprocess.extract(args, "train", writer, front_end, set(), device)
        writer.close()

    (seconds,) = common.in_turns(run, repeats=s.repeats)

    clips = torch.stack([dataset.load_clip(path) for path in s.paths])
    size = 32 if device.type == "cuda" else 8
    computed = front_end(devices.pad_batch(clips[:size], size, device))
    features = np.concatenate(
        [preprocess.compute(front_end, part, size, device)() for part in clips.split(size)]
    )
    writer = preprocess.open_cache(args, _new_folder(s), trials, front_end)
    decode, copy, compute, write = common.in_turns(
        lambda: [dataset.load_clip(path) for path in s.paths],
        lambda: [
            (devices.pad_batch(part, size, device), computed.cpu()) for part in clips.split(size)
        ],
        lambda: [preprocess.compute(front_end, part, size, device)() for part in clips.split(size)],
        lambda: (writer.write(range(len(trials)), features), writer.flush()),
        repeats=s.repeats,
    )
    writer.close()
    return (
        seconds,
        features[:1],
        {
            "decoding": decode,
            "copying": copy,
            "computing, copies and all,": compute,
            "writing": write,
        },
    )


def peer(s: Setting, ceilings: dict[str, float]) -> Found:
    """The five blocks alone, here and in OpenVINO where that is installed; it runs on CPUs."""
    if s.device.type != "cpu" or not bench_openvino.has_openvino():
        return [], ["OpenVINO: not installed, or a GPU computes here; see bench_openvino.py."]
    rows = []
    for precision in bench_openvino.TOLERANCES:
        theirs, ours, error = in_its_own_process(_against_openvino, s, precision)
        stage = f"five blocks, {precision}, a clip (reference: OpenVINO's own program)"
        rows.append(Row(stage, "1", theirs, ours, "s", f"{error:.1e} of float32's norm"))
    return rows, []


def _against_openvino(s: Setting, precision: str) -> tuple[float, float, float]:
    """(OpenVINO's seconds a clip, ours, OpenVINO's relative error against float32)."""
    devices.pick_device(-1)
    clips = torch.randn(min(s.clips, 8), CLIP_SAMPLES, generator=torch.manual_seed(0)) * 0.1
    exact = bench_openvino.our_features(s.ssl, "fp32", clips)()
    ours = bench_openvino.our_features(s.ssl, precision, clips)
    threads = torch.get_num_threads()
    theirs = bench_openvino.openvino_features(s.ssl, precision, clips, threads)
    error = float((theirs() - exact).norm() / exact.norm())
    if error > bench_openvino.TOLERANCES[precision]:
        raise RuntimeError(f"OpenVINO, {precision}: features lie {error:.1e} from ours in float32")
    seconds = common.in_turns(theirs, ours, repeats=s.repeats)
    return seconds[0] / len(clips), seconds[1] / len(clips), error


def _new_folder(s: Setting) -> Path:
    return Path(tempfile.mkdtemp(dir=s.folder)) / "xls-r-5"


def size_on_disk(s: Setting, ceilings: dict[str, float]) -> Found:
    file = next((s.folder / "pt").glob("*.pt"))
    theirs, rows = file.stat().st_size, []
    for dtype, target in (("float16", "2.0"), ("affine8", "3.85")):
        cache = common.make_cache(_new_folder(s), 4, dtype)
        rows.append(
            Row(
                f"bytes a clip, {dtype}",
                target,
                theirs,
                cache.layout.row_bytes,
                "bytes",
                "EER parity, below",
            )
        )
    return rows, []


def cold_reads(s: Setting, ceilings: dict[str, float]) -> Found:
    """Shuffled batches of 128 from a disk whose page cache is empty: pickled files through a
    DataLoader, and the cache.
    """
    theirs = s.folder / "cold"
    theirs.mkdir()
    cache = common.make_cache(_new_folder(s), s.rows)
    for row in range(s.rows):
        features = cache.read(np.array([row]))[0].float()
        torch.save(features, theirs / f"{row:06d}_x_{'fake' if row % 2 else 'real'}.pt")
    files, shards = sorted(theirs.glob("*.pt")), sorted(cache.path.glob("features_*.npy"))
    threads = min(8, os.cpu_count() or 1)
    order = dataset.shuffled_batches([s.rows], 128, 0, 1)
    taken: dict[str, list[float]] = {"reference": [], "ours": [], "in sequence": []}
    for _ in range(s.repeats):
        for name, paths, read in (
            (
                "reference",
                files,
                lambda: sum(len(x) for x, _ in plain.batches(theirs, 128, threads)),
            ),
            (
                "ours",
                shards,
                lambda: sum(len(x) for x, _ in read_ahead(cache, order, max(threads, 8))),
            ),
            ("in sequence", shards, lambda: common.read_through(shards)),
        ):
            common.forget(paths)
            start = time.perf_counter()
            read()
            taken[name].append(time.perf_counter() - start)
    seconds = {name: median(values) for name, values in taken.items()}
    total = sum(path.stat().st_size for path in shards)
    note = (
        f"cold reads: {s.rows / seconds['reference']:,.0f} -> {s.rows / seconds['ours']:,.0f} "
        f"rows/s; {total / seconds['ours'] / 1e9:.2f} GB/s, reading the same files from end to end "
        f"{total / seconds['in sequence'] / 1e9:.2f} GB/s."
    )
    return [
        Row(
            "cold random reads into batches, a row",
            "4",
            seconds["reference"] / s.rows,
            seconds["ours"] / s.rows,
            "s",
            "float16",
        )
    ], [note]


def training(s: Setting, ceilings: dict[str, float]) -> Found:
    rows = []
    for name, feat in (("W2VAASIST", "xls-r-5"), ("lcnn", "mel")):
        theirs, their_losses = in_its_own_process(_train, s, name, feat, "plainly")
        for precision, target in (("fp32", "1.2"), ("bf16", "2")):
            if precision == "bf16" and not devices.has_bf16(s.device):
                continue
            ours, losses = in_its_own_process(_train, s, name, feat, precision)
            apart = max(abs(a - b) for a, b in zip(losses, their_losses, strict=True))
            rows.append(
                Row(
                    f"training step {name}, batch {s.batch}, {precision}, a clip",
                    target if name == "W2VAASIST" else "-",
                    theirs / s.batch,
                    ours / s.batch,
                    "s",
                    f"losses of three steps {apart:.1e}",
                )
            )
    return rows, []


def _train(s: Setting, name: str, feat: str, how: str) -> tuple[float, list[float]]:
    """Seconds of a step, and the losses of the first three without dropout."""
    device = s.device
    if how != "plainly":
        device = devices.pick_device(s.gpu)
        devices.set_precision(how, device)
    torch.manual_seed(0)
    head = model.build_head(name, feat).to(device)
    features = torch.randn(s.batch, *dataset.FEATURE_SHAPES[feat], device=device)
    labels = torch.arange(s.batch, device=device) % 2
    optimiser = torch.optim.Adam(head.parameters(), lr=5e-4, weight_decay=5e-4)
    if how == "plainly":
        head = plain.as_published(head)

        def step() -> Tensor:
            return plain.train_step(head, optimiser, features, labels)
    else:

        def step() -> Tensor:
            return main_train.train_step(head, optimiser, features, labels, precision=how)

    dropout, F.dropout = F.dropout, lambda x, *_, **__: x
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.forward = lambda x: x
    losses = [float(step()) for _ in range(3)]
    F.dropout = dropout
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            del module.forward
    (seconds,) = common.in_turns(step, repeats=s.repeats)
    return seconds, losses


def training_from_cache(s: Setting, ceilings: dict[str, float]) -> Found:
    """W2V2-AASIST over rows of a cache as main_train.py reads them: how much of the time is spent
    waiting for features.
    """
    seconds, waited, clips = in_its_own_process(_train_from_cache, s)
    return [], [
        f"training W2V2-AASIST from a cache, float32: {clips / seconds:.0f} clips/s; waiting for "
        f"features takes {100 * waited / seconds:.1f} % of it."
    ]


def _train_from_cache(s: Setting) -> tuple[float, float, int]:
    device = devices.pick_device(s.gpu)
    head = model.build_head("W2VAASIST", "xls-r-5").to(device)
    optimiser = torch.optim.Adam(head.parameters())
    rows = s.rows if device.type == "cuda" else 8 * s.batch
    cache = common.make_cache(_new_folder(s), rows)
    order = dataset.shuffled_batches([len(cache.labels)], s.batch, 0, 1)
    began, waited = time.perf_counter(), 0.0
    workers = main_train.parse(["-t", "codecfake"]).num_workers
    batches = read_ahead(cache, order, workers, device)
    while True:
        asked = time.perf_counter()
        features, labels = next(batches, (None, None))
        waited += time.perf_counter() - asked
        if features is None:
            break
        float(main_train.train_step(head, optimiser, features.float(), labels))
    return time.perf_counter() - began, waited, len(cache.labels)


def scoring(s: Setting, ceilings: dict[str, float]) -> Found:
    theirs, plain_score = in_its_own_process(_score_plainly, s)
    rows = []
    for precision in ("fp32", "bf16"):
        if precision == "bf16" and not devices.has_bf16(s.device):
            continue
        ours, scores = in_its_own_process(_score_here, s, precision, 1)
        rows.append(
            Row(
                f"scoring, audio to score, {precision}, a clip",
                "8",
                theirs / s.few,
                ours / s.clips,
                "s",
                f"score of a clip {abs(scores[0] - plain_score):.1e}",
            )
        )
    return rows, []


def _score_plainly(s: Setting) -> tuple[float, float]:
    front_end, head = (
        plain.load_frontend(s.ssl, s.device),
        plain.as_published(common.make_heads(s.ssl, 1)["head 0"]).to(s.device),
    )
    (seconds,) = common.in_turns(
        lambda: [plain.score(front_end, head, path, s.device) for path in s.paths[: s.few]],
        repeats=s.repeats,
    )
    return seconds, plain.score(front_end, head, s.paths[0], s.device)


def _score_here(
    s: Setting, precision: str, heads: int, paths: Sequence[str] | None = None
) -> tuple[float, np.ndarray]:
    args = generate_score.parse(["-t", "ITW", "--gpu", str(s.gpu), "--precision", precision])
    with silence():
        scorer = generate_score.Scorer(args, common.make_heads(s.ssl, heads))
    scores: list[np.ndarray] = []

    def run() -> None:
        with silence():
            scored = next(scorer.score_files({"bench": paths or s.paths}, args.num_workers))
            scores[:] = [generate_score.to_scores(scored.logits[:, 0], llr=False)]

    (seconds,) = common.in_turns(run, repeats=s.repeats)
    return seconds, scores[0]


def several_models(s: Setting, ceilings: dict[str, float]) -> Found:
    one, _ = in_its_own_process(_score_here, s, "fp32", 1)
    five, _ = in_its_own_process(_score_here, s, "fp32", 5)
    return [
        Row("scoring with five models, in five passes and in one", "3.1", 5 * one, five, "s", "-")
    ], [
        f"five models in one pass cost {five / one:.2f} times what one costs (target: at most "
        f"{1.3 if s.device.type == 'cuda' else 1.6})."
    ]


def shared_clips(s: Setting, ceilings: dict[str, float]) -> Found:
    """Six subsets with the same real clips: these are scored once instead of six times."""
    half = max(s.clips // 8, 2)
    seconds = in_its_own_process(_score_subsets, s, half)
    return [
        Row(
            f"C1..C6 ({half} shared real clips, {6 * half} fakes), subset by subset and sharing",
            "1.7",
            *seconds,
            "s",
            "equal",
        )
    ], [
        f"C1..C6: {seconds[1] / seconds[0]:.2f} of the time of scoring each subset by itself (7/12 "
        "of the clips)."
    ]


def _score_subsets(s: Setting, half: int) -> tuple[float, float]:
    rng = np.random.default_rng(1)
    subsets = {}
    for subset in range(6):
        fakes = [str(s.folder / "audio" / f"F{subset}_{n}.wav") for n in range(half)]
        for path in fakes:
            soundfile.write(path, rng.normal(0, 0.1, CLIP_SAMPLES), SAMPLE_RATE, subtype="PCM_16")
        subsets[f"C{subset + 1}"] = [*s.paths[:half], *fakes]
    args = generate_score.parse(["-t", "codecfake", "--gpu", str(s.gpu)])
    with silence():
        scorer = generate_score.Scorer(args, common.make_heads(s.ssl, 1))

    def run(*together: dict[str, list[str]]) -> None:
        with silence():
            for parts in together:
                list(scorer.score_files(parts, args.num_workers))

    apart, shared = common.in_turns(
        lambda: run(*({name: paths} for name, paths in subsets.items())),
        lambda: run(subsets),
        repeats=min(s.repeats, 2),
    )
    return apart, shared


def evaluation(s: Setting, ceilings: dict[str, float]) -> Found:
    genfromtxt, ours, resampled, trials = bench_evaluate.measure(None)
    return [
        Row(
            f"evaluating twelve score files, {trials:,} trials (reference: numpy.genfromtxt reads "
            "them)",
            "2",
            genfromtxt,
            ours,
            "s",
            "-",
        )
    ], [f"evaluation with 1,000 bootstrap resamples of all twelve: {resampled:.1f} s."]


# ── The table ────────────────────────────────────────────────────────────────────────────────────


def report(
    rows: Sequence[Row], notes: Sequence[str], ceilings: dict[str, float], s: Setting
) -> str:
    device = torch.cuda.get_device_name(s.device) if s.device.type == "cuda" else common.cpu_name()
    head = [
        "stage",
        "reference's way",
        "here",
        "unit",
        "ratio",
        "target",
        "difference to the plain way",
    ]
    lines = [
        "# Measured",
        "",
        f"`python -m benchmarks.bench` on {device}, {os.cpu_count()} cores; torch "
        f"{torch.__version__}, Python {platform.python_version()}. Medians of {s.repeats}, "
        f"{s.clips} clips of 5 s ({s.few} of them the reference's way), batches of {s.batch} in "
        "training.",
        f"Ceilings in the same run: a matrix product in float32 {ceilings['fp32'] / 1e9:,.0f} "
        f"GFLOP/s, in bfloat16 {ceilings['bf16'] / 1e9:,.0f} GFLOP/s.",
        "",
        f"| {' | '.join(head)} |",
        "| :-- | --: | --: | :-- | --: | --: | :-- |",
    ]
    lines += [f"| {' | '.join(row.cells())} |" for row in rows]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


if __name__ == "__main__":
    main()
