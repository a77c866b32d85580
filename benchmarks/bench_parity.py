"""What cheaper features cost in EER: exact, bfloat16, float16 and 8-bit ones, subset by subset.

Prints Markdown.

    python -m benchmarks.bench_parity [-t TASK] [-d CORPUS] [--model_folder HEAD ...] [--ssl ID|DIR]

Features are computed once in float32 and once with bfloat16 arithmetic; the float32 ones also pass
through the cache's own encoding. A difference inside the 95 % bootstrap interval of the float32 EER
is smaller than what other utterances of the same kind would make. Without --ssl, heads on xls-r-5
get a small wav2vec 2.0 with random weights: their EERs then mean nothing, only the differences do.
Without -d and --model_folder, the reference corpus and the released weights beside the project are
taken.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import dataset
import eval_metrics
import frontends
import model
import preprocess
from dataset import FAKE, REAL, Trial
from evaluation import bootstrap, results
from formats import protocols
from formats.feature_cache import EIGHT_BITS, decode, encode
from formats.score_files import Scores
from runtime import cli, devices
from runtime.cli import InputError

REPO = Path(__file__).resolve().parent.parent
REFERENCE = REPO.parent / "shared" / "reference"
TYPES = ("float32", "bf16 front end", "float16 cache", "8-bit cache")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "-t",
        "--task",
        choices=tuple(protocols.SCORED),
        default="codecfake",
        help="what to score (default: %(default)s)",
    )
    parser.add_argument(
        "-d",
        "--path_to_database",
        type=Path,
        metavar="DIR",
        help="the corpus (default: the reference corpus)",
    )
    parser.add_argument(
        "--model_folder",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="heads (default: the released weights)",
    )
    parser.add_argument(
        "--ssl", metavar="ID|DIR", help="wav2vec 2.0 weights (default: small random ones)"
    )
    cli.add_compute_options(parser, "clips at a time (default: %(default)s)", batch_size=8)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    root = (
        args.path_to_database
        or REFERENCE / "corpus" / {"codecfake": "Codecfake", "19LA": "LA", "ITW": "ITW"}[args.task]
    )
    folders = args.model_folder or sorted((REFERENCE / "checkpoints").glob("*"))
    if not folders or not root.is_dir():
        print(
            "## EER parity\n\nNot measured: the reference corpus and the released weights do not "
            "lie beside the project; name others with -d and --model_folder."
        )
        return
    device = devices.pick_device(args.gpu)
    devices.set_precision("fp32", device)
    heads = {folder.name: model.load_head(folder).to(device) for folder in folders}
    subsets = {
        name: present_trials(args.task, root, part)
        for name, part in protocols.SCORED[args.task].items()
    }
    with tempfile.TemporaryDirectory() as folder:
        ssl = args.ssl or Path(folder) / "ssl"
        if not args.ssl and any(head.feat != "mel" for head in heads.values()):
            save_random_wav2vec2(ssl)
        front_ends = {
            feat: tuple(
                model.load_frontend(feat, str(ssl), precision).to(device)
                for precision in ("fp32", "bf16")
            )
            for feat in {head.feat for head in heads.values()}
        }
    print(
        f"## EER parity\n\nEER (%) on {args.task}, {sum(map(len, subsets.values()))} clips; "
        f"{device}, torch {torch.__version__}; "
        f"interval: {bootstrap.COVERAGE:.0%}, {bootstrap.N_RESAMPLES} resamples\n"
    )
    if not args.ssl and "xls-r-5" in front_ends:
        print(
            "xls-r-5 comes from a small wav2vec 2.0 with RANDOM weights: the EERs themselves mean "
            "nothing.\n"
        )
    print(
        "| head | subset | features | EER | difference | interval of float32 | inside | "
        "log-likelihood ratio moves by at most |\n"
        "| :-- | :-- | :-- | --: | --: | :-: | :-: | --: |"
    )
    for subset, trials in subsets.items():
        llrs = score(args, subset, trials, front_ends, heads, device)
        for head in heads:
            print("\n".join(rows_of(head, subset, trials, llrs[head])), flush=True)


def present_trials(task: str, root: Path, part: str) -> list[Trial]:
    trials = dataset.read_protocol(task, root, part)
    missing = set(protocols.find_missing(trials))
    return [trial for trial in trials if trial not in missing]


FrontEnds = tuple[frontends.FrontEnd, frontends.FrontEnd]  # in float32, in bfloat16


def score(
    args: argparse.Namespace,
    subset: str,
    trials: list[Trial],
    front_ends: dict[str, FrontEnds],
    heads: dict[str, torch.nn.Module],
    device: torch.device,
) -> dict[str, np.ndarray]:
    """Log-likelihood ratios (types, N) of each head."""
    size = args.batch_size
    batches = [
        range(first, min(first + size, len(trials))) for first in range(0, len(trials), size)
    ]
    llrs = {name: np.empty((len(TYPES), len(trials))) for name in heads}
    with tqdm(total=len(trials), unit="clip", desc=subset) as bar:
        for batch in dataset.clip_batches(
            [trial.path for trial in trials], batches, args.num_workers
        ):
            for reason in batch.failures.values():
                raise InputError(reason)
            features = {
                feat: features_of(pair, batch.clips, size, device)
                for feat, pair in front_ends.items()
            }
            for name, head in heads.items():
                exact, *others = features[head.feat]
                llrs[name][:, batch.rows] = llr_of(head, exact, device)
                for number, other in enumerate(others, 1):
                    if not torch.equal(other, exact):  # mel is never computed in bfloat16
                        llrs[name][number, batch.rows] = llr_of(head, other, device)
            bar.update(len(batch.rows))
    return llrs


def features_of(
    front_ends: FrontEnds, clips: torch.Tensor, size: int, device: torch.device
) -> list[torch.Tensor]:
    """Features (B, frames, dim) of clips (B, 64600), one tensor of each of TYPES."""
    exact = preprocess.compute(front_ends[0], clips, size, device)()
    with nullcontext() if devices.has_bf16(device) else RoundedToBf16():
        bf16 = preprocess.compute(front_ends[1], clips, size, device)()
    return [
        torch.from_numpy(exact),
        torch.from_numpy(bf16),
        decode(encode(exact, "float16")),
        decode(encode(exact, EIGHT_BITS[front_ends[0].feat])),
    ]


class RoundedToBf16(torch.overrides.TorchFunctionMode):
    """bfloat16 products as hardware makes them, with float32 sums, on a CPU that would take
    minutes: operands are bfloat16 already, so computing in float32 and rounding the result is the
    same arithmetic."""

    COSTLY = ("addmm", "addmm_", "linear", "layer_norm", "gelu", "scaled_dot_product_attention")

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function.__name__ not in self.COSTLY or args[0].dtype != torch.bfloat16:
            return function(*args, **(kwargs or {}))
        wide = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
        result = function(*wide, **(kwargs or {})).to(torch.bfloat16)
        return args[0].copy_(result) if function.__name__ == "addmm_" else result


@torch.inference_mode()
def llr_of(head: torch.nn.Module, features: torch.Tensor, device: torch.device) -> np.ndarray:
    logits = head(features.to(device).float())[1].double().cpu().numpy()
    return logits[:, REAL] - logits[:, FAKE]


def rows_of(head: str, subset: str, trials: list[Trial], llrs: np.ndarray) -> list[str]:
    """The table's rows of one head and subset, from log-likelihood ratios (types, N)."""
    names, is_real = (
        [trial.name for trial in trials],
        np.array([trial.label == REAL for trial in trials]),
    )
    exact = results.evaluate_trials(
        head, subset, Path(), Scores(names, llrs[0], is_real), bootstrap.N_RESAMPLES, seed=0
    )
    if exact.point is None:
        return [f"| {head} | {subset} | | - | | | | one class only |"]
    low, high = exact.interval.low, exact.interval.high
    rows = []
    for kind, scores in zip(TYPES, llrs, strict=True):
        eer, moved = (
            100 * eval_metrics.compute_eer(scores[is_real], scores[~is_real])[0],
            np.abs(scores - llrs[0]).max(),
        )
        rows.append(
            f"| {head} | {subset} | {kind} | {eer:.3f} | {eer - 100 * exact.point.eer:+.3f} | "
            f"{low:.3f} .. {high:.3f} | {'yes' if low <= eer <= high else 'NO'} | {moved:.4f} |"
        )
    return rows


def save_random_wav2vec2(folder: Path) -> None:
    """A small wav2vec 2.0 of XLS-R's kind with its hidden size; LayerNorms random, as after
    training.
    """
    import transformers

    torch.manual_seed(1)
    network = transformers.Wav2Vec2Model(
        transformers.Wav2Vec2Config(
            hidden_size=1024,
            num_hidden_layers=frontends.ssl.LAYER,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=[16] * 7,
            feat_extract_norm="layer",
            conv_bias=True,
            do_stable_layer_norm=True,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        )
    )
    for name, parameter in network.named_parameters():
        if "layer_norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    network.save_pretrained(folder)


if __name__ == "__main__":
    cli.run(main, if_stopped="run the same command again")
