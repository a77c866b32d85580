"""The same five blocks of XLS-R 300M here and in OpenVINO, on the CPU, in one run. Prints Markdown.

    python -m benchmarks.bench_openvino [--clips N] [--repeats N] [--threads N] [--quick]

Random weights, the same ones in both; noise as audio. OpenVINO is no dependency: without it the
page says so and times this program alone. Install it beside with

    pip install --target /tmp/openvino openvino && PYTHONPATH=/tmp/openvino python -m ...
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

import model
from benchmarks import common
from dataset import CLIP_SAMPLES
from frontends.ssl import LAYER
from runtime import cli, devices

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # ours -> OpenVINO's hint
# Of the features' norm: sums in another order, and operands rounded to 8 bits at other places.
TOLERANCES = {"fp32": 1e-5, "bf16": 3e-2}


def has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


class Blocks(nn.Module):
    """Audio (B, 64600) -> hidden state 5, as transformers computes it."""

    def __init__(self, folder: str):
        super().__init__()
        import transformers

        self.network = transformers.Wav2Vec2Model.from_pretrained(
            folder, num_hidden_layers=LAYER, attn_implementation="sdpa"
        ).eval()
        self.network.encoder.layer_norm = nn.Identity()  # the hidden state before the last norm

    def forward(self, clips: Tensor) -> Tensor:
        mean = clips.mean(dim=1, keepdim=True)
        variance = clips.var(dim=1, keepdim=True, correction=0)
        return self.network((clips - mean) / torch.sqrt(variance + 1e-7)).last_hidden_state


def openvino_features(folder: str, precision: str, clips: Tensor, threads: int) -> Callable:
    """A function that computes the features of these clips with OpenVINO."""
    import openvino

    with torch.inference_mode():
        converted = openvino.convert_model(Blocks(folder), example_input=clips)
    converted.reshape(list(clips.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(converted, "CPU", settings).create_infer_request()
    array = clips.numpy()

    def compute() -> Tensor:
        return torch.from_numpy(next(iter(request.infer([array]).values())))

    return compute


def our_features(folder: str, precision: str, clips: Tensor) -> Callable:
    front_end = model.load_frontend("xls-r-5", folder, precision)

    @torch.inference_mode()
    def compute() -> Tensor:
        return front_end(clips)

    return compute


def timed(ways: dict[str, Callable], repeats: int) -> dict[str, tuple[float, float]]:
    """Median (seconds, seconds of the processor) of each, in turns after one run to warm up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            way()
            taken[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return {
        name: (median(wall for wall, _ in pairs), median(cpu for _, cpu in pairs))
        for name, pairs in taken.items()
    }


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    whole = cli.at_least(1)
    add("--clips", type=whole, default=8, metavar="N", help="at a time (default: %(default)s)")
    add("--repeats", type=whole, default=5, metavar="N", help="(default: %(default)s)")
    cores = os.cpu_count() or 1
    add("--threads", type=whole, default=cores, metavar="N", help="(default: %(default)s)")
    add("--quick", action="store_true", help="a tiny network, to see that everything runs")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.quick:
        args.clips, args.repeats = 1, 1
    devices.pick_device(-1)
    torch.set_num_threads(args.threads)
    with common.scratch_folder() as folder:
        common.save_random_xlsr(folder / "ssl", tiny=args.quick, layers=LAYER + 1)
        lines = compare(str(folder / "ssl"), args)
    print("\n".join(lines))


def compare(folder: str, args: argparse.Namespace) -> list[str]:
    """The page."""
    clips = torch.randn(args.clips, CLIP_SAMPLES, generator=torch.manual_seed(0)) * 0.1
    ways, agree = {}, {}
    exact = our_features(folder, "fp32", clips)()
    for precision, tolerance in TOLERANCES.items():
        if precision == "bf16" and not devices.has_bf16(torch.device("cpu")):
            continue
        ways[f"here, {precision}"] = our_features(folder, precision, clips)
        if has_openvino():
            peer = openvino_features(folder, precision, clips, args.threads)
            ways[f"OpenVINO, {precision}"] = peer
        for name in [name for name in ways if name.endswith(precision)]:
            error = float((ways[name]() - exact).norm() / exact.norm())
            verdict = "within" if error <= tolerance else "OUTSIDE"
            agree[name] = f"{error:.1e}, {verdict} {tolerance:g}"
    seconds = timed(ways, args.repeats)
    lines = [
        "## OpenVINO",
        "",
        f"{common.cpu_name()}, {args.threads} threads, load average {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}, {version()}; {args.clips} clips at a time, medians of "
        f"{args.repeats} in turns. A busy machine changes the processor's time least.",
        "",
        "| five blocks of XLS-R 300M | ms a clip | processor, ms a clip | difference to float32 |",
        "| :-- | --: | --: | :-- |",
    ]
    for name, (wall, cpu) in seconds.items():
        each = 1e3 / args.clips
        lines.append(f"| {name} | {wall * each:.1f} | {cpu * each:.1f} | {agree[name]} |")
    return lines


def version() -> str:
    if not has_openvino():
        return "OpenVINO not installed"
    import openvino

    return f"OpenVINO {openvino.__version__.split('-')[0]}"


if __name__ == "__main__":
    cli.run(main, if_stopped="run the same command again")
