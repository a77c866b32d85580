"""Several processes on one job, as `torchrun --nproc_per_node=2 preprocess.py ...` starts them.

The ranks exchange messages through torchrun's key-value store, by polling: a wait can be
interrupted at any moment and last for days, and no threads exist that the forks of the decoding
workers could lose. Only training joins a process group besides. Without torchrun there is one rank
and nothing to join.
"""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from runtime import cli, files
from runtime.cli import InputError

T = TypeVar("T")
POLL = 0.02  # seconds between two looks at the store
CHUNK = 2**22  # bytes; the store drops connections that send twice as much at once
STORE_TIMEOUT = timedelta(minutes=30)
PEER_TIMEOUT = timedelta(seconds=10)  # torchrun's own store is there at once
TIMEOUT = timedelta(days=7)  # the first rank may write for long; torchrun notices a dead rank

_store: dist.Store | None = None
_rank, _size = 0, 1
# Keys in the store are numbered: all ranks ask for the same things in the same order.
_numbers = itertools.count()


# ── Start and end ────────────────────────────────────────────────────────────────────────────────


def run(main: Callable[[], None], if_stopped: str) -> None:
    """cli.run() for a script that torchrun may have started several times.

    Only one of the ranks says what ended them all.
    """

    def on_this_rank() -> None:
        _join()
        main()
        _leave()

    cli.run(on_this_rank, if_stopped)


def _join() -> None:
    global _store, _rank, _size
    size = _world_size()
    if size == 1:
        return
    try:
        _require_first_rank()
        _store, _rank, _size = _interruptibly(
            lambda: next(dist.rendezvous("env://", timeout=PEER_TIMEOUT))
        )
    except ValueError as error:
        raise InputError(
            f"WORLD_SIZE is {size}, which torchrun sets, but not all else that "
            f"it sets is there ({error}); start with torchrun, or unset WORLD_SIZE"
        ) from None
    except RuntimeError:  # torch's own message is of many lines
        raise InputError(
            f"WORLD_SIZE is {size}, but not all {size} processes came within "
            f"{PEER_TIMEOUT.seconds} s; start them with torchrun, or unset WORLD_SIZE"
        ) from None
    _store.set_timeout(STORE_TIMEOUT)
    cli.report_only_if(_is_first_to_end)
    if _rank:
        sys.stdout = open(os.devnull, "w")


def _require_first_rank() -> None:
    """Wait for the rank that keeps the store; torch, waiting for it, prints traces of its own.

    Raises:
        RuntimeError: it does not answer.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if os.environ.get("RANK") == "0" or not host or not port.isdecimal():
        return
    address = host, int(port)
    deadline = time.monotonic() + PEER_TIMEOUT.seconds
    _wait(lambda: _answers(address) or time.monotonic() > deadline)
    if not _answers(address):
        raise RuntimeError(f"{host}:{port} does not answer")


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


def _interruptibly(call: Callable[[], T]) -> T:
    """The value of a call that holds its thread for long; Ctrl-C does not wait for it."""
    outcome: Future = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    _wait(outcome.done)
    return outcome.result()


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) == 0:
        raise InputError(
            f"WORLD_SIZE is {text!r}, expected the number of processes, which torchrun sets; "
            "start with torchrun, or unset WORLD_SIZE"
        )
    return int(text)


def _leave() -> None:
    """The first rank leaves last: where torchrun does not keep the store, it does."""
    if _rank:
        _store.add("left", 1)
    elif _size > 1:
        _wait(lambda: _store.add("left", 0) == _size - 1)


def _is_first_to_end() -> bool:
    try:
        return _store.add("ended", 1) == 1
    except RuntimeError:  # torchrun itself is gone, and no other rank will report
        return True


def _wait(
    ready: Callable[[], bool], meanwhile: Callable[[], Any] = lambda: None, pause: float = POLL
) -> None:
    while not ready():
        cli.stop_if_asked()
        meanwhile()
        time.sleep(pause)


# ── Who does what ────────────────────────────────────────────────────────────────────────────────


def rank() -> int:
    return _rank


def size() -> int:
    return _size


def is_first() -> bool:
    """Whether this is the rank that prints and writes."""
    return _rank == 0


def shard(items: Sequence[T]) -> Sequence[T]:
    """Every N-th of the items, from this rank's on."""
    return items[_rank::_size]


def gpu(index: int | None) -> int | None:
    """What --gpu means for this rank.

    Each process of a machine takes a GPU of its own, or all share the CPU.

    Raises:
        InputError: --gpu names one GPU for several processes, or there are too few.
    """
    on_cpu = index is not None and index < 0
    if _size == 1 or on_cpu or not torch.cuda.is_available():
        return index
    if index is not None:
        raise InputError(
            f"--gpu {index}: names one GPU, but of {_size} processes each takes its own; leave it "
            "out, and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise InputError(
            f"process {local + 1} of this machine finds no GPU left, torch sees {count}; start as "
            "many with --nproc_per_node, or give --gpu -1 to compute on the CPU"
        )
    return local


# ── Messages ─────────────────────────────────────────────────────────────────────────────────────


def barrier(meanwhile: Callable[[], Any] = lambda: None) -> None:
    """Wait until every rank is here; `meanwhile` is called now and then until that."""
    if _size > 1:
        key = f"barrier {next(_numbers)}"
        _store.add(key, 1)
        _wait(lambda: _store.add(key, 0) == _size, meanwhile)


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on each of them."""
    return _exchange(value, to_all=True)


def gather_to_first(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on the first rank; none on the others.

    Where values are large: all of them go through one store.
    """
    return _exchange(value, to_all=False)


def _exchange(value: T, to_all: bool) -> list[T]:
    if _size == 1:
        return [value]
    key, data = f"gather {next(_numbers)}", pickle.dumps(value)
    starts = range(0, len(data), CHUNK)
    for start in starts:
        _store.set(f"{key} {_rank} {start}", data[start : start + CHUNK])
    _store.set(f"{key} {_rank}", str(len(data)))
    barrier()
    sources = range(_size) if to_all or is_first() else ()
    values = [pickle.loads(b"".join(_chunks(f"{key} {other}"))) for other in sources]
    barrier()
    # The store keeps everything in memory, and scores of whole corpora pass through it.
    for start in starts:
        _store.delete_key(f"{key} {_rank} {start}")
    return values


def _chunks(key: str) -> Iterator[bytes]:
    for start in range(0, int(_store.get(key)), CHUNK):
        yield _store.get(f"{key} {start}")


def broadcast(make: Callable[[], T]) -> T:
    """The value of `make()`, which only the first rank calls, on every rank."""
    return gather(make() if is_first() else None)[0]


class SharedCounter:
    """A sum over all ranks. Each adds to it at any time and waits for no other."""

    def __init__(self) -> None:
        self._key = f"counter {next(_numbers)}"
        self._sum = 0

    def add(self, count: int = 0) -> int:
        """Add, and return the new sum."""
        self._sum = self._sum + count if _size == 1 else _store.add(self._key, count)
        return self._sum


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """files.exclusive() for all ranks together.

    The first rank holds the lock from before any of them goes on until all are done.
    """
    with files.exclusive(folder) if is_first() else nullcontext():
        barrier()
        yield
        barrier()


# ── Training ─────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Let tensors on `device` be reduced over the ranks."""
    if _size == 1:
        yield
        return
    barrier()  # unlike what follows, this can be interrupted
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"group {next(_numbers)}", _store),
        rank=_rank,
        world_size=_size,
        timeout=TIMEOUT,
    )
    yield
    dist.destroy_process_group()  # not after an error: the other ranks may be anywhere


def parallel(network: nn.Module) -> nn.Module:
    """The network as a global batch trains it.

    Gradients are averaged over the ranks after each backward pass, and its BatchNorms, replaced in
    place, normalise by the global batch.
    """
    if _size == 1:
        return network
    sync_batchnorms(network)
    return nn.parallel.DistributedDataParallel(
        network, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def mean(x: Tensor) -> Callable[[], float]:
    """Begin to take the mean of each rank's scalar.

    Returns:
        A function that waits for it. On a GPU it does not wait for what is queued afterwards.
    """
    if _size > 1:
        x = x.clone()
        dist.all_reduce(x)
        x = x / _size
    if not x.is_cuda:
        value = float(x)
        return lambda: value
    on_host = torch.empty((), dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    copied.record()

    def wait() -> float:
        if _size == 1:
            copied.synchronize()
        else:  # a rank may be dead, and this wait can be interrupted
            _wait(copied.query, pause=1e-3)
        return float(on_host)

    return wait


def sync_batchnorms(network: nn.Module) -> None:
    """Replace each BatchNorm below `network` by a SyncedBatchNorm of the same tensors."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, _BatchNorm):
                setattr(parent, name, SyncedBatchNorm(norm))


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm over the rows of all ranks, on the CPU as on GPUs; torch's own takes GPUs only.

    In training, (B, C, ...) is normalised by the mean and variance of the global batch; B may be 0
    on some of the ranks. The gradient of weight and bias is this rank's summand, that of x takes in
    the loss of all ranks, as in one process.
    """

    def __init__(self, norm: _BatchNorm):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self._parameters = norm._parameters
        self._buffers = norm._buffers
        self.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions will do."""

    @torch.compiler.disable  # compiled, its gradients are wrong without a word
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = (0, *range(2, x.dim()))
        per_channel = (1, -1, *(1 for _ in x.shape[2:]))
        wide = x.float()

        n_values = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float32)  # a channel
        sums = all_reduce(torch.cat([wide.sum(dims), n_values]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        centred = wide - mean.view(per_channel)
        # A second pass over the rows: the mean square less the squared mean would cancel.
        variance = all_reduce(centred.square().sum(dims)) / count
        out = centred * torch.rsqrt(variance + self.eps).view(per_channel)
        if self.affine:
            out = out * self.weight.view(per_channel) + self.bias.view(per_channel)
        if self.track_running_stats:
            self._update_running_stats(mean.detach(), variance.detach() * (count / (count - 1)))
        return out.to(x.dtype)

    @torch.no_grad()
    def _update_running_stats(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)
