"""Several processes on one job, as `torchrun --nproc_per_node=2 preprocess.py ...` starts them.

What they tell one another passes through torchrun's key-value store, by polling: a wait can be interrupted
at any moment and last for days, and no threads are left for the forks of the decoding helpers to lose. Only
training joins a process group besides. Without torchrun there is one rank and nothing to join.
"""

from __future__ import annotations

import itertools
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime import cli, files
from runtime.cli import InputError

T = TypeVar("T")
POLL = 0.02  # seconds between two looks at the store
PIECE = 2**22  # bytes; the store drops connections that send twice as much at once
LONGEST = timedelta(
    days=7
)  # the first rank may write for long; that a rank has died is torchrun's to notice
_store: dist.Store | None = None
_rank, _size = 0, 1
_numbers = (
    itertools.count()
)  # names in the store: all ranks ask for the same things in the same order


def run(main: Callable[[], None], if_stopped: str) -> None:
    """cli.run() for a script that torchrun may have started several times: one of the ranks says what ended them all."""

    def joined() -> None:
        _join()
        main()
        _leave()

    cli.run(joined, if_stopped)


def _join() -> None:
    global _store, _rank, _size
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    try:
        _store, _rank, _size = next(dist.rendezvous("env://"))
    except ValueError as error:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, which torchrun sets, but not all else that it sets is there "
            f"({error}); start with torchrun, or unset WORLD_SIZE"
        ) from None
    cli.one_last_word(_is_first_to_end)
    if _rank:
        sys.stdout = open(os.devnull, "w")


def _leave() -> None:
    """The first rank leaves last: where torchrun does not keep the store, it does."""
    if _rank:
        _store.add("left", 1)
    elif _size > 1:
        _wait(lambda: _store.add("left", 0) == _size - 1)


def _is_first_to_end() -> bool:
    try:
        return _store.add("ended", 1) == 1
    except RuntimeError:  # torchrun itself is gone, and nobody else will speak
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


def gpu(asked: int | None) -> int | None:
    """What --gpu means for this rank: each process of a machine takes a GPU of its own, or all the CPU."""
    if _size == 1 or not torch.cuda.is_available() or (asked is not None and asked < 0):
        return asked
    if asked is not None:
        raise InputError(
            f"--gpu {asked}: names one GPU, but of {_size} processes each takes its own; leave it out, and choose GPUs "
            "with CUDA_VISIBLE_DEVICES"
        )
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise InputError(
            f"process {local + 1} of this machine finds no GPU left, torch sees {count}; start as many with "
            "--nproc_per_node, or give --gpu -1 to compute on the CPU"
        )
    return local


# ── What all have to know ────────────────────────────────────────────────────────────────────────


def barrier(meanwhile: Callable[[], Any] = lambda: None) -> None:
    """Go on once every rank is here; `meanwhile` is called now and then until that."""
    if _size > 1:
        name = f"barrier {next(_numbers)}"
        _store.add(name, 1)
        _wait(lambda: _store.add(name, 0) == _size, meanwhile)


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on each of them."""
    if _size == 1:
        return [value]
    name, data = f"gather {next(_numbers)}", pickle.dumps(value)
    starts = range(0, len(data), PIECE)
    for start in starts:
        _store.set(f"{name} {_rank} {start}", data[start : start + PIECE])
    _store.set(f"{name} {_rank}", str(len(data)))
    barrier()
    values = [pickle.loads(b"".join(_pieces(f"{name} {other}"))) for other in range(_size)]
    barrier()
    for (
        start
    ) in starts:  # the store keeps all in memory, and scores of whole corpora pass through it
        _store.delete_key(f"{name} {_rank} {start}")
    return values


def _pieces(name: str) -> Iterator[bytes]:
    for start in range(0, int(_store.get(name)), PIECE):
        yield _store.get(f"{name} {start}")


def broadcast(make: Callable[[], T]) -> T:
    """What `make` gives on the first rank, where alone it is called."""
    return gather(make() if is_first() else None)[0]


class SharedCounter:
    """A sum over all ranks. Each adds to it when it likes and waits for nobody."""

    def __init__(self) -> None:
        self._name, self._sum = f"tally {next(_numbers)}", 0

    def add(self, count: int = 0) -> int:
        """The new sum."""
        self._sum = self._sum + count if _size == 1 else _store.add(self._name, count)
        return self._sum


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """files.exclusive() for all ranks together: the first holds the folder from before any of them goes on to after all are done."""
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
        timeout=LONGEST,
    )
    yield
    dist.destroy_process_group()  # not after an error: the other ranks may be anywhere


def parallel(network: nn.Module) -> nn.Module:
    """The network, its gradients averaged over the ranks after each backward pass."""
    if _size == 1:
        return network
    return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)


def mean(x: Tensor) -> Tensor:
    """The mean of each rank's tensor."""
    if _size == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    if (
        x.is_cuda
    ):  # who waited for the value itself could not be interrupted, and a rank may be gone
        reduced = torch.cuda.Event()
        reduced.record()
        _wait(reduced.query, pause=1e-3)
    return x / _size


def sync_batchnorms(network: nn.Module) -> nn.Module:
    """Put a SyncedBatchNorm in the place of each BatchNorm below `network`; names and values stay."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, _BatchNorm):
                setattr(parent, name, SyncedBatchNorm.like(norm))
    return network


class SyncedBatchNorm(_BatchNorm):
    """Training normalises (B, C, ...) by the mean and variance of all ranks' rows together; B may be 0 on some of them."""

    @classmethod
    def like(cls, norm: _BatchNorm) -> SyncedBatchNorm:
        synced = cls(norm.num_features, norm.eps, norm.momentum, norm.affine).to(
            norm.running_mean.device
        )
        synced.load_state_dict(norm.state_dict())
        for ours, theirs in zip(synced.parameters(), norm.parameters()):
            ours.requires_grad_(theirs.requires_grad)
        return synced.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        out, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return out


class _Normalise(torch.autograd.Function):
    """x (B, C, ...), weight and bias (C,) or None -> the same normalised; mean, biased variance (C,); count () of values a channel.

    As in one process: the gradient of weight and bias is this rank's share, that of x takes in the loss of all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, wide = (0, *range(2, x.dim())), (1, -1, *(1 for _ in x.shape[2:]))
        own_count = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float32)
        sums = torch.cat([x.float().sum(dims), own_count])
        dist.all_reduce(sums)
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = x.float() - mean.view(wide)
        squares = centred.square().sum(
            dims
        )  # a second pass: the mean square less the squared mean cancels
        dist.all_reduce(squares)
        variance = squares / count
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.dims, ctx.wide = dims, wide
        out = centred * inverse.view(wide)
        if weight is not None:
            out = out * weight.view(wide) + bias.view(wide)
        ctx.mark_non_differentiable(mean, variance, count)
        return out.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, *_: None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        dims, wide = ctx.dims, ctx.wide
        grad, normed = grad.float(), (x.float() - mean.view(wide)) * inverse.view(wide)
        own = torch.stack([grad.sum(dims), (grad * normed).sum(dims)])  # (2, C)
        joint = own.clone()
        dist.all_reduce(joint)
        along_one, along_normed = joint / count
        scale = inverse if weight is None else inverse * weight
        of_x = (grad - along_one.view(wide) - normed * along_normed.view(wide)) * scale.view(wide)
        return of_x.to(x.dtype), *((None, None) if weight is None else (own[1], own[0])), None
