"""Why a training step of W2V2-LCNN takes so long, and what other ways of computing it give. Prints
Markdown.

    python -m benchmarks.bench_lcnn [--batch N] [--repeats N] [--quick]

XLS-R's features are an image of 1024 x 201, five times as large as mel's 505 x 80, and the LCNN
computes its first layer on all of it; AASIST projects it to 128 x 201 and pools that by nine first.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import main_train
import model
from benchmarks import common
from dataset import FEATURE_SHAPES
from runtime import cli, devices

CPU = torch.device("cpu")


# ── Other ways ───────────────────────────────────────────────────────────────────────────────────


class _MaxOfHalvesInPlace(model._MaxOfHalves):
    """model.py's maximum of halves, its gradient in the layout of what came in."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (from_first,) = ctx.saved_tensors
        channels = grad.shape[1]
        last = grad.dim() == 4 and grad.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        shape = (grad.shape[0], 2 * channels, *grad.shape[2:])
        out = torch.empty(shape, dtype=grad.dtype, memory_format=layout)
        torch.mul(grad, from_first, out=out[:, :channels])
        torch.sub(grad, out[:, :channels], out=out[:, channels:])
        return out


class _MaxFeatureMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _MaxOfHalvesInPlace.apply(x)


class _FirstLayer(nn.Module):
    """Convolution, maximum of halves and pooling by two, as one convolution of stride 2.

    Each of the four places of a pooling window gets channels of its own, so that the pooling is
    two more maxima of halves and no walk in steps of two: 36 taps for 25.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        places = [(dx, dy) for dx in (0, 1) for dy in (0, 1)]
        taps = [F.pad(self.conv.weight, (dx, 1 - dx, dy, 1 - dy)) for dx, dy in places]
        weight = torch.stack(taps).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
        bias = self.conv.bias.view(2, 1, -1).expand(-1, len(places), -1).flatten()
        x = F.conv2d(x, weight, bias, stride=2, padding=self.conv.padding)
        for _ in range(3):  # halves of the channels, columns, rows
            x = _MaxOfHalvesInPlace.apply(x)
        return x


def with_other_maximum(head: nn.Module) -> nn.Module:
    for module in list(head.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, model.MaxFeatureMap2D):
                setattr(module, name, _MaxFeatureMap())
    return head


def channels_last(head: nn.Module) -> nn.Module:
    return head.to(memory_format=torch.channels_last)


def channels_last_kept(head: nn.Module) -> nn.Module:
    return channels_last(with_other_maximum(head))


def first_layer_in_places(head: nn.Module) -> nn.Module:
    head.conv1 = _FirstLayer(head.conv1[0])
    return head


WAYS: tuple[tuple[str, Callable[[nn.Module], nn.Module], str], ...] = (
    ("as it is", lambda head: head, "fp32"),
    ("first layer with its pooling as one convolution", first_layer_in_places, "fp32"),
    ("gradient of the maximum by a difference", with_other_maximum, "fp32"),
    ("channels last", channels_last, "fp32"),
    ("channels last, the maximum's gradient too", channels_last_kept, "fp32"),
    ("bf16", lambda head: head, "bf16"),
    ("bf16, channels last, the maximum's gradient too", channels_last_kept, "bf16"),
)


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────


def build(name: str, feat: str, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The head without dropout, so that all ways compute the same."""
    torch.manual_seed(0)
    head = model.build_head(name, feat).train()
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return change(head)


def step(head: nn.Module, features: Tensor, labels: Tensor, precision: str) -> Tensor:
    """Forwards and back; returns the loss."""
    head.zero_grad()
    loss = main_train.batch_loss(head, features, labels, precision)
    loss.backward()
    return loss.detach()


def measure(feat: str, batch: int, repeats: int) -> list[str]:
    """Lines of the table: each way in turns, its processor time a clip, and its loss's distance."""
    torch.manual_seed(1)
    features = torch.randn(batch, *FEATURE_SHAPES[feat])
    labels = torch.arange(batch) % 2
    ways = [way for way in WAYS if way[2] == "fp32" or devices.has_bf16(CPU)]
    losses: dict[str, float] = {}

    def task(name: str, head: nn.Module, precision: str) -> Callable[[], None]:
        def run() -> None:
            losses[name] = float(step(head, features, labels, precision))

        return run

    tasks = [task(name, build("lcnn", feat, change), kind) for name, change, kind in ways]
    seconds = common.in_turns(*tasks, repeats=repeats, clock=time.process_time)
    plain = losses[ways[0][0]]
    return [
        f"| {feat} | {name} | {1e3 * taken / batch:.0f} | {seconds[0] / taken:.2f} | "
        f"{abs(losses[name] / plain - 1):.0e} |"
        for (name, _, _), taken in zip(ways, seconds, strict=True)
    ]


def work_of(name: str, feat: str) -> float:
    """GFLOP a clip of a step's products and convolutions."""
    counter = FlopCounterMode(display=False)
    head = build(name, feat, lambda head: head)
    with counter:
        step(head, torch.randn(2, *FEATURE_SHAPES[feat]), torch.arange(2), "fp32")
    return counter.get_total_flops() / 2 / 1e9


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    whole = cli.at_least(1)
    parser.add_argument("--batch", type=whole, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--repeats", type=whole, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--quick", action="store_true", help="2 clips, once")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.repeats = 2, 1
    devices.pick_device(-1)
    print("\n".join(report(args)))


def report(args: argparse.Namespace) -> list[str]:
    """The page."""
    heads = (("lcnn", "xls-r-5"), ("lcnn", "mel"), ("W2VAASIST", "xls-r-5"))
    work = ", ".join(f"{name} on {feat} {work_of(name, feat):.1f}" for name, feat in heads)
    ceiling = common.product_rate(1024, torch.float32, CPU) / 1e9
    return [
        "## W2V2-LCNN",
        "",
        f"{common.cpu_name()}, {torch.get_num_threads()} threads, load average "
        f"{os.getloadavg()[0]:.1f}; batches of {args.batch}, medians of {args.repeats} in turns, "
        f"time of the processor. GFLOP a clip and step: {work}; a product reaches {ceiling:.0f} "
        "GFLOP/s. The first layer's result is 53 MB a clip, which its maximum, its pooling and "
        "their gradients go over.",
        "",
        "| features | way | forwards and back, ms a clip | ratio | loss |",
        "| :-- | :-- | --: | --: | --: |",
        *measure("xls-r-5", args.batch, args.repeats),
        *measure("mel", args.batch, args.repeats),
    ]


if __name__ == "__main__":
    cli.run(main, if_stopped="run the same command again")
