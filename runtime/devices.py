"""Where and how exactly networks compute: GPU or CPU, precision, memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import Tensor

from runtime import cli
from runtime.cli import InputError

PRECISIONS = ("fp32", "tf32", "bf16")
# As torch's two allocators say it, CUDA itself, and its libraries (CUBLAS_STATUS_ALLOC_FAILED, ...).
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


# ── Devices and precision ────────────────────────────────────────────────────────────────────────


def pick_device(gpu: int | None) -> torch.device:
    """The GPU with this index; None: the first GPU if there is one, else the CPU; negative: the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        gpu = 0 if count else -1
    if gpu >= count:
        raise InputError(
            f"--gpu {gpu}: expected one of the {count} GPUs torch sees here; leave --gpu out to use what there is"
        )
    if gpu < 0:
        _keep_freed_memory()
        return torch.device("cpu")
    try:
        _start(gpu)
    except RuntimeError as error:  # too old for this torch, full, or another program's alone
        raise InputError(
            f"--gpu {gpu}: torch {torch.__version__} cannot compute on it ({str(error).strip().splitlines()[0]}); choose "
            "another, or the CPU with --gpu -1"
        ) from error
    return torch.device(f"cuda:{gpu}")


def _start(gpu: int) -> None:
    """Make the GPU the one whose streams and events are meant where none is named, and have it compute something."""
    torch.cuda.set_device(gpu)
    torch.ones(1, device="cuda").add_(1).item()


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks: handing each large activation back to the kernel, only to have the next one
    cleared page by page, takes a third of the time of LCNN on a CPU."""
    with suppress(OSError, AttributeError):  # another C library: nothing to set
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def set_precision(precision: str, device: torch.device) -> None:
    """fp32 means float32 everywhere: torch would otherwise use TF32 in convolutions without asking."""
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = precision == "tf32"
    if precision == "bf16" and not has_bf16(device):
        what = "GPU" if device.type == "cuda" else "CPU"
        cli.echo(
            f"note: this {what} has no bfloat16 arithmetic; --precision bf16 will be many times slower than fp32"
        )


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are worth asking for; on a GPU, the current one."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bfloat16 where torch holds it safe, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def pad_batch(clips: Tensor, size: int, device: torch.device) -> Tensor:
    """Clips (B, samples) on the device, followed by silence up to (size, samples).

    One shape throughout, so that what becomes of a clip depends neither on the clips beside it nor on
    how often the run was interrupted. Nobody waits for the copy to a GPU.
    """
    full = torch.zeros(size, clips.shape[1], pin_memory=device.type == "cuda")
    full[: len(clips)] = clips
    return full.to(device, non_blocking=True)


@contextmanager
def memory_advice(batch_size: int) -> Iterator[None]:
    """Turn running out of memory inside the block into a line that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_MEMORY):
            raise
        raise InputError(
            f"out of memory with --batch_size {batch_size}; lower it (for training with a new -o, since it shapes "
            "the weights), or free memory on that device"
        ) from error
