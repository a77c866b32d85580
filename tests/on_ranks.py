"""What test_ranks.py has torchrun start: `on_ranks.py CASE FOLDER [commands as JSON]`."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import generate_score
import main_train
import preprocess
from runtime import ranks
from runtime.ranks import sync_batchnorms

MAINS = {
    "preprocess": preprocess.main,
    "main_train": main_train.main,
    "generate_score": generate_score.main,
}
NORMS = {
    "affine, 4 + 3 rows": (nn.BatchNorm2d(5), (7, 5, 2, 3)),
    "plain, 1 + 0 rows": (nn.BatchNorm2d(5, affine=False), (1, 5, 2, 3)),
    "two dimensions": (nn.BatchNorm1d(5), (9, 5)),
    "far from zero": (nn.BatchNorm1d(5), (64, 5)),
}


def commands(folder: Path, lines: str) -> None:
    for script, arguments in json.loads(lines):
        MAINS[script](arguments)


@contextmanager
def comparable() -> Iterator[None]:
    """No dropout: ranks drop out other units. float64: float32's rounding decides which nodes
    AASIST's pooling keeps.
    """
    with (
        mock.patch.object(torch.nn.functional, "dropout", lambda x, *_: x),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def exactly(folder: Path, lines: str) -> None:
    with comparable():
        commands(folder, lines)


def slow_second_rank(folder: Path, lines: str) -> None:
    """It looks at the index when the first could have written already."""
    real_states = preprocess.CacheWriter.states

    def late(writer: preprocess.CacheWriter) -> object:
        time.sleep(ranks.rank())
        return real_states(writer)

    preprocess.CacheWriter.states, preprocess.FLUSH_EVERY = late, 1
    commands(folder, lines)


def interrupted(folder: Path, lines: str) -> None:
    """Ctrl-C at torchrun when the second rank is at its first batch of the dev part, and the first
    waits for it.
    """
    real_compute = preprocess.compute

    def stop_in_dev(*arguments: object) -> object:
        if ranks.rank() == 1 and any(folder.glob("**/dev/*/cache.json")):
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(60)
        return real_compute(*arguments)

    preprocess.compute = stop_in_dev
    commands(folder, lines)


def norm_inputs(kind: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A layer with weights, its global batch, and the factors that make a loss of its output."""
    layer, shape = copy.deepcopy(NORMS[kind])
    torch.manual_seed(len(kind))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    offset = 1000.0 if kind == "far from zero" else 1.0
    return nn.Sequential(layer), torch.randn(shape) * 3 + offset, torch.randn(shape)


def norm_compiled(folder: Path) -> None:
    norm(folder, backend="aot_eager")


def norm(folder: Path, backend: str | None = None) -> None:
    """This rank's part of a pass over each layer, then of one with the statistics frozen, then of
    one in eval mode.

    Args:
        backend: of torch.compile; None: nothing is compiled.
    """
    with ranks.process_group(torch.device("cpu")):
        for kind in NORMS:
            layer, x, factor = norm_inputs(kind)
            sync_batchnorms(layer)
            network = torch.compile(layer, backend=backend) if backend else layer
            x, factor = ranks.shard(x).requires_grad_(), ranks.shard(factor)
            out = network(x)
            (out * factor).sum().backward()
            with main_train.frozen_batchnorm(layer):
                again = network(x)
            torch.save(
                {
                    "out": out,
                    "again": again,
                    "eval": network.eval()(x),
                    "x": x.grad,
                    "state": layer.state_dict(),
                    "parameters": [p.grad for p in layer.parameters()],
                },
                folder / f"{kind} {ranks.rank()}.pt",
            )


if __name__ == "__main__":
    case = {
        function.__name__: function
        for function in (commands, exactly, slow_second_rank, interrupted, norm, norm_compiled)
    }[sys.argv[1]]
    ranks.run(
        lambda: case(Path(sys.argv[2]), *sys.argv[3:]), if_stopped="run the same command again"
    )
