"""Where and how exactly networks compute: GPU or CPU, precision, memory."""

from __future__ import annotations

import argparse
import ctypes
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime import cli
from runtime.cli import InputError

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "published")
SIXTEEN_BITS = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of the front end's products
# TF32 is a third of float32's time on a GPU, at the error of torch's own default ("published").
DEFAULT_PRECISION = {"cuda": "tf32", "cpu": "fp32"}
CPU_BATCH = 8  # clips at a time; more gain nothing on a CPU
# A GPU's memory in GB -> clips at a time. By arithmetic 32 take 3 GB and 128 take 10, which gain 4
# to 6 %. The memory of the card counts, not what is free of it: a batch's size rounds its features.
GPU_BATCHES = {0: 8, 6: 32, 40: 128}
BATCH_HELP = f"clips at a time (default: {CPU_BATCH} on the CPU, 8 to 128 by a GPU's memory)"
# What torch's two allocators say, and CUDA's libraries (CUBLAS_STATUS_ALLOC_FAILED, ...).
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


# ── Options ──────────────────────────────────────────────────────────────────────────────────────


def add_options(
    parser: argparse.ArgumentParser,
    arithmetic: str,
    batch_help: str = BATCH_HELP,
    batch_size: int | None = None,
) -> None:
    """cli.add_compute_options() and --precision, which is None where it is not given.

    Args:
        arithmetic: what --precision is said to be.
        batch_size: the default; None: clips_a_batch() of the device.
    """
    default = "{cuda} on a GPU, {cpu} on the CPU".format(**DEFAULT_PRECISION)
    cli.add_compute_options(parser, batch_help, batch_size).add_argument(
        "--precision",
        choices=PRECISIONS,
        help=f"{arithmetic} (default: {default})",
    )


# ── Devices ──────────────────────────────────────────────────────────────────────────────────────


def pick_device(gpu: int | None) -> torch.device:
    """The device to compute on, once it has computed something.

    Args:
        gpu: index of a GPU; None: the first GPU if there is one, else the CPU; negative: the CPU.

    Raises:
        InputError: there is no such GPU, or torch cannot use it.
    """
    count = _count_gpus()
    if gpu is None:
        gpu = 0 if count else -1
    if gpu >= count:
        reason = "" if count else f" ({_why_no_gpu()})"
        raise InputError(
            f"--gpu {gpu}: expected one of the {count} GPUs torch sees here{reason}; leave --gpu "
            "out to use what there is"
        )
    if gpu < 0:
        _keep_freed_memory()
        return torch.device("cpu")
    try:
        _try_gpu(gpu)
    except RuntimeError as error:  # too old for this torch, full, or reserved by another program
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--gpu {gpu}: torch {torch.__version__} cannot compute on it ({reason}); choose "
            "another, or the CPU with --gpu -1"
        ) from error
    return torch.device(f"cuda:{gpu}")


def _count_gpus() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old driver: warn_of_cpu() says that
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _why_no_gpu() -> str:
    """Torch's own reason for seeing no GPU, on one line."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:200]
    return "torch counts none"


def warn_of_cpu(gpu: int | None, gflop: float) -> None:
    """Say in a line that stands out that this machine has a GPU which torch cannot use.

    Args:
        gpu: as the user gave it; a CPU that was asked for needs no warning.
        gflop: of the whole job, multiply and add counted apart.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if gpu is not None or hidden or not _has_nvidia_gpu() or _count_gpus():
        return
    cli.echo(
        f"WARNING: no usable GPU ({_why_no_gpu()}), going on on the CPU, about "
        f"{_cpu_hours(gflop):.2g} h; --gpu -1 silences this"
    )


def _has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or any(Path("/dev").glob("nvidia[0-9]*"))


def _cpu_hours(gflop: float) -> float:
    """How long this CPU takes, by a matrix product that is timed now; networks reach 0.7 of it."""
    size, repeats = 1024, 8
    matrix = torch.ones(size, size)
    matrix @ matrix
    began = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    gflop_per_second = repeats * 2 * size**3 / 1e9 / (time.perf_counter() - began)
    return gflop / (0.7 * gflop_per_second) / 3600


def _try_gpu(gpu: int) -> None:
    """Make the GPU the current one, whose streams and events are the default, and compute there."""
    torch.cuda.set_device(gpu)
    torch.ones(1, device="cuda").add_(1).item()


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks instead of returning them to the kernel.

    Returned and taken again, each large activation is cleared page by page: a third of the time of
    LCNN on a CPU.
    """
    with suppress(OSError, AttributeError):  # another C library: nothing to set
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


# ── Precision ────────────────────────────────────────────────────────────────────────────────────


def set_precision(precision: str, device: torch.device) -> None:
    """Set torch's own switches for one of PRECISIONS.

    fp32 means float32 everywhere: torch would otherwise use TF32 in convolutions without asking.
    published is what it does unasked, and the authors' program did: TF32 in cuDNN's convolutions,
    float32 in matrix products. Products in 16 bits are summed in float32 throughout: in float16
    partial sums would overflow.
    """
    products = torch.backends.cuda.matmul
    products.allow_tf32 = precision == "tf32"
    products.allow_fp16_reduced_precision_reduction = False
    products.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = precision in ("tf32", "published")
    if precision == "published" and device.type == "cpu":
        cli.echo("note: --precision published is a GPU's arithmetic; on the CPU it is fp32")
    if precision in SIXTEEN_BITS and not _has_arithmetic(precision, device):
        what = "GPU" if device.type == "cuda" else "CPU"
        kind = str(SIXTEEN_BITS[precision]).removeprefix("torch.")
        cli.echo(
            f"note: this {what} has no fast {kind} arithmetic; --precision {precision} will be "
            "slower than fp32"
        )


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are worth asking for; on a GPU, the current one."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # AVX-512 alone multiplies bfloat16, too, but slower than it multiplies float32.
    return torch.cpu._is_amx_tile_supported()


def _has_arithmetic(precision: str, device: torch.device) -> bool:
    """has_bf16(), and the same of float16, which all GPUs that torch supports multiply."""
    if precision == "bf16":
        return has_bf16(device)
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """torch.autocast for "fp16" and "bf16", nothing for the others."""
    if precision in SIXTEEN_BITS:
        return torch.autocast(device.type, SIXTEEN_BITS[precision])
    return nullcontext()


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────


def clips_a_batch(device: torch.device) -> int:
    """How many clips a front end takes at a time where the user names no number."""
    if device.type != "cuda":
        return CPU_BATCH
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 1e9
    return max(size for least, size in GPU_BATCHES.items() if gigabytes >= least)


def pad_batch(clips: Tensor, size: int, device: torch.device) -> Tensor:
    """Clips (B, samples) on the device, followed by silence up to (size, samples).

    All batches have one shape, so that a clip's feature depends neither on the clips beside it nor
    on how often the run was interrupted. The copy to a GPU is not waited for.
    """
    padded = torch.zeros(size, clips.shape[1], pin_memory=device.type == "cuda")
    padded[: len(clips)] = clips
    return padded.to(device, non_blocking=True)


def copy_to_host(values: Tensor) -> Callable[[], np.ndarray]:
    """Begin to copy a tensor from its device; the function that comes back waits for the copy.

    The copy runs in a stream of its own, so that the next batch is computed meanwhile.
    """
    if not values.is_cuda:
        return values.numpy
    stream = _copy_stream(values.device)
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        values.record_stream(stream)  # its memory is not given away before it is copied
        copied = torch.cuda.Event(blocking=True)  # a waiting thread leaves its core to the workers
        copied.record(stream)

    def wait() -> np.ndarray:
        copied.synchronize()
        return on_host.numpy()

    return wait


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def memory_advice(batch_size: int) -> Iterator[None]:
    """Turn running out of memory inside the block into a line that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        raise InputError(
            f"out of memory with --batch_size {batch_size}; lower it (for training with a new -o, "
            "since it shapes the weights), or free memory on that device"
        ) from error
