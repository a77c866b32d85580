"""What the benchmarks share: made-up clips, random weights, caches, and ways to take time."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch
from torch import nn

import model
from dataset import SAMPLE_RATE, Trial
from formats.feature_cache import CacheWriter, FeatureCache

SCRATCH = Path(__file__).parents[1] / "data"  # beside real features; /tmp may be memory
CLIP_SECONDS = 5


# ── What is worked on ────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the time of a run, on the disk that holds the data."""
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        yield Path(folder)


def write_clips(folder: Path, count: int) -> list[str]:
    """Noise as 16-bit WAV at 16 kHz, 160 kB a clip; returns the paths."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        path = folder / f"clip_{number:04d}.wav"
        samples = rng.normal(0, 0.1, CLIP_SECONDS * SAMPLE_RATE)
        soundfile.write(path, samples, SAMPLE_RATE, subtype="PCM_16")
        paths.append(str(path))
    return paths


def save_random_xlsr(folder: Path, tiny: bool = False, layers: int = 24) -> None:
    """A wav2vec 2.0 of XLS-R 300M's configuration whose weights are random.

    Args:
        tiny: narrow convolutions and feed-forwards; the hidden size stays 1024, which heads need.
        layers: transformer blocks; the reference computes 24, this program 5.
    """
    import transformers

    sizes = {"num_hidden_layers": layers, "intermediate_size": 4096, "conv_dim": [512] * 7}
    if tiny:
        sizes = {"num_hidden_layers": 6, "intermediate_size": 64, "conv_dim": [16] * 7}
    config = transformers.Wav2Vec2Config(
        hidden_size=1024,
        num_attention_heads=16,
        feat_extract_norm="layer",
        conv_bias=True,
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
        **sizes,
    )
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    transformers.Wav2Vec2Model(config).save_pretrained(folder)


def make_cache(folder: Path, rows: int, dtype: str = "float16") -> FeatureCache:
    """A cache of random features (201, 1024), real and fake in turns."""
    trials = [Trial(f"{row}", "", row % 2, "-") for row in range(rows)]
    writer = CacheWriter(folder, trials, {"feat": "xls-r-5"}, (201, 1024), dtype)
    features = np.random.default_rng(0).normal(size=(1, 201, 1024)).astype(np.float32)
    for row in range(rows):
        writer.write([row], features + np.float32(row / rows))
    writer.close()
    return FeatureCache(folder)


def make_heads(ssl: str, count: int) -> dict[str, nn.Module]:
    """W2V2-AASIST with random weights, as generate_score.py takes heads."""
    heads = {}
    for number in range(count):
        torch.manual_seed(number)
        heads[f"head {number}"] = model.build_head("W2VAASIST", "xls-r-5").eval()
        heads[f"head {number}"].info = {"ssl": ssl}
    return heads


# ── Time ─────────────────────────────────────────────────────────────────────────────────────────


def in_turns(
    *tasks: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Median seconds of each task after one run to warm up; several take turns, so that a machine's
    moods meet them alike.

    Args:
        clock: time.process_time for the processor's time.
    """
    seconds: list[list[float]] = [[] for _ in tasks]
    for task in tasks:
        task()
    for _ in range(repeats):
        for taken, task in zip(seconds, tasks, strict=True):
            start = clock()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(clock() - start)
    return [median(taken) for taken in seconds]


def product_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    (seconds,) = in_turns(partial(torch.matmul, a, b), repeats=5)
    return 2 * size**3 / seconds


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Send a stage's own lines and progress bars nowhere."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


# ── The machine ──────────────────────────────────────────────────────────────────────────────────


def forget(paths: Sequence[Path]) -> None:
    """Have the kernel drop what it holds of these files, so that the disk is read."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(paths: Sequence[Path]) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(2**24):
                pass


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()
