"""Train a head on cached features.

    python main_train.py -t codecfake           # and 19LA, co-train
    python main_train.py -t co-train --CSAM -o models/csam
    python main_train.py -t codecfake -o models/try --continue_training
    python main_train.py -t codecfake --online  # from audio, without a cache

Reads the caches of preprocess.py (or the reference's .pt folders) under -f and -f1; with --online
the audio under -d. Writes into -o:

    anti-spoofing_feat_model.pt                        the epoch with the lowest dev loss
    checkpoint/anti-spoofing_feat_model_<epoch>.pt     every epoch
    last_state.pt                                      all that --continue_training needs
    log.jsonl, tensorboard/, settings.json             one record an epoch, curves, provenance
"""

from __future__ import annotations

from runtime import cli

if __name__ == "__main__":
    cli.end_quietly_if_stopped()  # the imports below take seconds

import argparse
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dataset
import eval_metrics
import frontends
import model
from dataset import FAKE, REAL, AudioPart, JoinedFeatures, OnlineFeatures, Trial
from formats import torch_files, training_state
from formats.training_state import Progress, TrainingState
from runtime import devices, ranks
from runtime.cli import InputError
from runtime.files import atomic_write
from runtime.provenance import run_info

CLASS_WEIGHTS = (10.0, 1.0)  # real, fake: Codecfake has six fakes a real clip
WEIGHT_DECAY = 5e-4  # Adam's own: L2 in the gradient
COMPILER = "inductor"  # of torch.compile
STEPS_AHEAD = {"cpu": 0, "cuda": 1}  # that are queued before the loss of a step is looked at
SAVE_EVERY = 600  # seconds; what a kill in the middle of an epoch costs at most
STATE_FILE = "last_state.pt"


# ── Command line ─────────────────────────────────────────────────────────────────────────────────


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "-t",
        "--train_task",
        choices=tuple(dataset.TRAIN_TASKS),
        required=True,
        help="corpora to train on",
    )
    add(
        "-m",
        "--model",
        choices=tuple(model.HEADS),
        default="W2VAASIST",
        help="head (default: %(default)s)",
    )
    add(
        "--feat",
        choices=tuple(dataset.FEATURE_SHAPES),
        default="xls-r-5",
        help="front end of the features (default: %(default)s)",
    )
    cli.add_feature_folders(parser, "features are read from")
    add(
        "-d",
        "--path_to_database",
        type=Path,
        metavar="DIR",
        help="hold the features against this corpus's protocols (for co-train: the folder that "
        "holds Codecfake/ and LA/); with --online where the audio lies (default: data/Codecfake, "
        "data/LA)",
    )
    add(
        "--ssl",
        metavar="ID|DIR",
        help="refuse features that were not made with these wav2vec 2.0 weights; with --online the "
        f"weights to compute with (default: {frontends.DEFAULT_SSL})",
    )
    _add_online_options(parser.add_argument_group("training without a cache"))
    _add_optimiser_options(parser.add_argument_group("optimiser: Adam"))
    _add_sharpness_options(parser.add_argument_group("sharpness-aware minimisation"))
    _add_output_options(parser.add_argument_group("output"))
    devices.add_options(
        parser,
        "arithmetic of the head, with --online also of the front end",
        "clips a step, of all processes together (default: %(default)s)",
        batch_size=128,
    )
    add(
        "--compile",
        action="store_true",
        help="compile the head with torch.compile, which takes about a minute at the first step on "
        "a GPU, many on a CPU: on an H100 a step of W2VAASIST in bf16 should then take 6 to 7 ms "
        "instead of 10 (an estimate); one process only. Weights differ by rounding and by the "
        "dropout drawn",
    )
    return parser


def _add_online_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--online",
        action="store_true",
        help="compute the features from the audio under -d in every epoch, instead of reading a "
        "cache; the same rows, order and numbers as from a float32 cache. Every file is read once "
        "before the first epoch: those that cannot be read are left out",
    )
    cli.add_fault_options(group, None)


def _add_optimiser_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--num_epochs",
        type=cli.at_least(1),
        default=10,
        metavar="N",
        help="epochs in all (default: %(default)s)",
    )
    add(
        "--lr",
        type=cli.number(above=0),
        default=5e-4,
        help="learning rate of the first epoch (default: %(default)s)",
    )
    add(
        "--lr_decay",
        type=cli.number(above=0),
        default=0.5,
        help="factor on lr every --interval epochs (default: %(default)s)",
    )
    add(
        "--interval",
        type=cli.at_least(1),
        default=2,
        metavar="N",
        help="epochs between two decays (default: %(default)s)",
    )
    add(
        "--beta_1",
        type=cli.number(least=0, below=1),
        default=0.9,
        help="decay of the gradient's mean (default: %(default)s)",
    )
    add(
        "--beta_2",
        type=cli.number(least=0, below=1),
        default=0.999,
        help="decay of the gradient's mean square (default: %(default)s)",
    )
    add(
        "--eps",
        type=cli.number(above=0),
        default=1e-8,
        help="added to the root mean square (default: %(default)s)",
    )
    add(
        "--seed",
        type=cli.at_least(0),
        default=688,
        metavar="N",
        help="of weights, order and dropout (default: %(default)s)",
    )


def _add_sharpness_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--SAM", **cli.SWITCH, help="descend from the worst point within --rho (Foret et al. 2021)")
    add(
        "--ASAM",
        **cli.SWITCH,
        help="SAM whose neighbourhood follows the size of each weight (Kwon et al. 2021)",
    )
    add(
        "--CSAM",
        **cli.SWITCH,
        help="SAM with both corpora in every batch; co-train only (Xie et al. 2024)",
    )
    add(
        "--rho",
        type=cli.number(above=0),
        default=0.05,
        help="radius of the neighbourhood (default: %(default)s)",
    )


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "-o",
        "--out_fold",
        type=Path,
        metavar="DIR",
        default=cli.MODEL_FOLDER,
        help="output folder (default: %(default)s)",
    )
    add(
        "--init_from",
        type=Path,
        metavar="FILE|DIR",
        help="begin from the weights of another head of the same kind, in a new --out_fold",
    )
    add("--continue_training", **cli.SWITCH, help="go on with the run in --out_fold")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.SAM + args.ASAM + args.CSAM > 1:
        parser.error("--SAM, --ASAM and --CSAM exclude each other")
    if args.CSAM and args.train_task != "co-train":
        parser.error(f"--CSAM mixes the two corpora of -t co-train, got -t {args.train_task}")
    if args.CSAM and args.batch_size < 2:
        parser.error("--CSAM needs a --batch_size of at least 2, one clip of each corpus")
    if args.online and (args.path_to_features or args.path_to_features1):
        parser.error("--online computes the features from audio; leave -f and -f1 out")
    if not args.online and (args.skip_missing or args.max_failed is not None):
        parser.error("--skip_missing and --max_failed go with --online")
    if args.precision == "fp16":
        parser.error(
            "--precision fp16 is for preprocess.py and generate_score.py: nothing scales "
            "the loss here, small gradients would become 0; give bf16"
        )
    if args.compile and ranks.size() > 1:
        parser.error(
            f"--compile is for one process, here are {ranks.size()}; leave it out, or train one "
            "head a GPU with --gpu"
        )
    if args.max_failed is None:
        args.max_failed = cli.MAX_FAILED
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = devices.pick_device(ranks.gpu(args.gpu))
    args.precision = args.precision or devices.DEFAULT_PRECISION[device.type]
    devices.set_precision(args.precision, device)
    # All batches but the last have one shape.
    torch.backends.cudnn.benchmark = device.type == "cuda"
    torch.manual_seed(args.seed)
    head = model.build_head(args.model, args.feat).to(device)
    require_usable_folder(args.out_fold, args.continue_training)
    train, dev = open_audio(args, device) if args.online else open_corpora(args)
    settings = settings_of(args, train, dev)
    devices.warn_of_cpu(args.gpu, gflop_of_run(args, len(train.labels)))
    if args.init_from:
        settings["init_from"] = load_initial_weights(head, args.init_from)
    with ranks.exclusive(args.out_fold), ranks.process_group(device):
        optimiser = build_optimiser(head, args)
        network = ranks.parallel(head)
        if args.compile:
            network = CompiledHead(head, args.batch_size)
        run = Run(args.out_fold, TrainingState(settings), train.about.get("ssl"), device)
        run.start(args.continue_training, head, optimiser)
        begun = "" if args.continue_training else " with --continue_training"
        cli.how_to_go_on(f"run the same command{begun} to go on; finished epochs are kept")
        cli.echo(describe_data(args, train, dev, device))
        cli.echo(describe_optimiser(args))
        for epoch in range(run.state.epoch, args.num_epochs + 1):
            lr = args.lr * args.lr_decay ** ((epoch - 1) // args.interval)
            set_learning_rate(optimiser, lr)
            trained = train_epoch(run, network, head, optimiser, train, args)
            judged = evaluate(head, dev, args, device, epoch)
            record = {"epoch": epoch, **trained, **judged, "lr": lr}
            run.save_epoch(record, head, optimiser)
            cli.echo(describe_epoch(record, args.num_epochs, run.best))
        cli.echo(
            f"best epoch {run.best['epoch']} (dev loss {run.best['dev_loss']:.4f}): "
            f"{args.out_fold / model.WEIGHTS}"
        )


def gflop_of_run(args: argparse.Namespace, n_clips: int) -> float:
    """What this rank computes in training, validation left out."""
    passes = 6 if sharpness_of(args) else 3  # one forwards, and backwards twice as much
    a_clip = passes * model.GFLOP_A_CLIP[args.model, args.feat]
    if args.online:
        a_clip += frontends.GFLOP_A_CLIP[args.feat]
    return args.num_epochs * n_clips / ranks.size() * a_clip


def describe_data(
    args: argparse.Namespace, train: JoinedFeatures, dev: JoinedFeatures, device: torch.device
) -> str:
    feat = f"{args.feat}, computed as it trains" if args.online else args.feat
    return (
        f"{args.model} on {feat}: {len(train.labels)} clips to train, "
        f"{len(dev.labels)} to choose on, {device} -> {args.out_fold}"
    )


def describe_optimiser(args: argparse.Namespace) -> str:
    """One line: the settings that shape the weights."""
    sharpness = "".join(
        f", {name} with rho {args.rho:g}" for name in ("SAM", "ASAM", "CSAM") if getattr(args, name)
    )
    compiled = ", compiled at the first steps" if args.compile else ""
    return (
        f"Adam: lr {args.lr:g} x {args.lr_decay:g} every {args.interval} epochs, "
        f"betas {args.beta_1:g} {args.beta_2:g}, eps {args.eps:g}, weight decay {WEIGHT_DECAY:g}, "
        f"batch {args.batch_size}, seed {args.seed}, {args.precision}{sharpness}"
        f"{compiled}"
    )


def describe_epoch(record: dict[str, Any], num_epochs: int, best: dict[str, Any]) -> str:
    eer = "-" if record["dev_eer"] is None else f"{record['dev_eer']:.3f} %"
    return (
        f"epoch {record['epoch']}/{num_epochs}  loss {record['loss']:.4f}  "
        f"dev loss {record['dev_loss']:.4f}  dev EER {eer}  lr {record['lr']:.3g}  "
        f"{record['seconds']:.1f} s" + ("  best so far" if best is record else "")
    )


# ── Features ─────────────────────────────────────────────────────────────────────────────────────


def open_corpora(args: argparse.Namespace) -> tuple[JoinedFeatures, JoinedFeatures]:
    """The training and development features of the task, held against --feat, --ssl and -d."""
    tasks = dataset.TRAIN_TASKS[args.train_task]
    parts = {}
    for part in ("train", "dev"):
        stores = [
            dataset.open_features(
                cli.feature_folder(args, task, alone=len(tasks) == 1), part, args.feat
            )
            for task in tasks
        ]
        parts[part] = JoinedFeatures(dataset.in_order(stores, tasks))
        dataset.check_size(parts[part], args.feat)
    front_end = dataset.common_front_end([*parts["train"].parts, *parts["dev"].parts])
    if args.ssl:
        dataset.check_ssl(parts["train"].folder, front_end, args.feat, args.ssl)
    if args.path_to_database:
        for part, features in parts.items():
            dataset.check_protocols(features, args.train_task, args.path_to_database, part)
    return parts["train"], parts["dev"]


def open_audio(
    args: argparse.Namespace, device: torch.device
) -> tuple[OnlineFeatures, OnlineFeatures]:
    """The training and development features of the task, to be computed from audio."""
    tasks = dataset.TRAIN_TASKS[args.train_task]
    keys = [(part, task) for part in ("train", "dev") for task in tasks]
    present = {(part, task): present_trials(args, task, part) for part, task in keys}
    network = frontends.load_frontend(args.feat, args.ssl, args.precision).to(device)
    of_no_trial = AudioPart(corpus_folder(args, tasks[0]), [], network, args.precision)
    dataset.check_size(of_no_trial, args.feat)  # before every file is read
    parts: dict[str, list[AudioPart]] = {"train": [], "dev": []}
    for (part, task), (trials, n_missing) in present.items():
        folder = corpus_folder(args, task)
        trials = readable_trials(args, f"{task} {part}", trials, n_missing)
        parts[part].append(AudioPart(folder, trials, network, args.precision))
    train, dev = (
        OnlineFeatures(parts[part], network, device, args.batch_size) for part in ("train", "dev")
    )
    network.expect(len(train.labels))
    return train, dev


def corpus_folder(args: argparse.Namespace, task: str) -> Path:
    return dataset.corpus_folder(args.path_to_database, args.train_task, task)


def present_trials(args: argparse.Namespace, task: str, part: str) -> tuple[list[Trial], int]:
    """The trials whose files are there, and how many are not, which --skip_missing has to allow."""
    trials = dataset.read_protocol(task, corpus_folder(args, task), part)
    missing = dataset.absent_trials(trials, args.skip_missing)
    if not missing:  # a million trials are not hashed for nothing
        return trials, 0
    return [trial for trial in trials if trial not in missing], len(missing)


def readable_trials(
    args: argparse.Namespace, what: str, trials: list[Trial], n_missing: int
) -> list[Trial]:
    """The trials whose files can be read: those of which preprocess.py would make a row.

    Decodes every file once, each rank its share.

    Raises:
        InputError: more files than --max_failed allows cannot be read.
    """
    paths = [trial.path for trial in trials]
    failures, rates = dataset.read_every_file(paths, args.num_workers, f"reading {what}")
    max_failed = 100 if args.skip_missing else args.max_failed
    n_allowed = int((len(trials) + n_missing) * max_failed / 100)
    first = next(iter(failures.values()), "")
    if len(failures) > n_allowed or len(failures) == len(trials):
        raise InputError(
            f"{len(failures)} of {len(trials)} files of {what} cannot be read, more than "
            f"--max_failed {args.max_failed:g} %; the first: {first}"
        )
    if failures:
        cli.echo(
            f"note: {len(failures)} files of {what} cannot be read and will not be trained on; the "
            f"first: {first}"
        )
    if note := dataset.describe_rates(rates):
        cli.echo(note)
    return [trial for row, trial in enumerate(trials) if row not in failures]


def settings_of(
    args: argparse.Namespace, train: JoinedFeatures, dev: JoinedFeatures
) -> dict[str, Any]:
    """All that shapes the weights. A run is only taken up again with the same."""
    options = ("train_task", "model", "feat", "batch_size", "lr", "lr_decay", "interval", "beta_1",
               "beta_2", "eps", "seed", "SAM", "ASAM", "CSAM", "rho", "precision")  # fmt: skip
    stores = [*train.parts, *dev.parts]
    return {
        **{name: getattr(args, name) for name in options},
        "front_end": dataset.common_front_end(stores),
        "train_rows": train.sizes,
        "dev_rows": dev.sizes,
        "dtypes": [store.dtype for store in stores],
    }


# ── One step ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sharpness:
    """SAM (Foret et al. 2021, arXiv 2010.01412) or ASAM (Kwon et al. 2021, arXiv 2102.11600)."""

    rho: float
    adaptive: bool


def sharpness_of(args: argparse.Namespace) -> Sharpness | None:
    if args.SAM or args.ASAM or args.CSAM:
        return Sharpness(args.rho, adaptive=args.ASAM)
    return None


def build_optimiser(head: nn.Module, args: argparse.Namespace) -> torch.optim.Adam:
    on_gpu = next(head.parameters()).is_cuda
    return torch.optim.Adam(
        head.parameters(),
        args.lr,
        (args.beta_1, args.beta_2),
        args.eps,
        weight_decay=WEIGHT_DECAY,
        fused=on_gpu or None,
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr


def train_step(
    head: nn.Module,
    optimiser: torch.optim.Optimizer,
    features: Tensor,
    labels: Tensor,
    sharpness: Sharpness | None = None,
    precision: str = "fp32",
    total_weight: float | None = None,
) -> Tensor:
    """One update of the weights from features (B, frames, dim) and labels (B,).

    Args:
        total_weight: total class weight of the global batch, where these rows are one rank's shard
            of it.

    Returns:
        The weighted cross entropy of the batch before the update, a scalar without gradient. Of a
        shard, the summand whose mean over the ranks is the global batch's loss.
    """
    optimiser.zero_grad()
    loss = batch_loss(head, features, labels, precision, total_weight)
    loss.backward()
    if sharpness:
        with frozen_batchnorm(head):
            original = climb(head, sharpness)
            optimiser.zero_grad()
            batch_loss(head, features, labels, precision, total_weight).backward()
            descend(original)
    optimiser.step()
    return loss.detach()


def batch_loss(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    precision: str,
    total_weight: float | None = None,
) -> Tensor:
    with devices.autocast(precision, features.device):
        logits = head(features)[1]
    return weighted_cross_entropy(logits, labels, total_weight)


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, total_weight: float | None = None
) -> Tensor:
    """Sum of weighted losses over the sum of weights (Xie et al., section V).

    Args:
        logits: (B, 2).
        labels: (B,), REAL or FAKE.
        total_weight: total class weight of the global batch; this rank may hold none of its rows.
            The mean over the ranks is then the global batch's loss, as its gradient is the mean
            that
            DistributedDataParallel takes.
    """
    logits = logits.float()
    weights = class_weights(logits.device, logits.dtype)
    if total_weight is None:
        return F.cross_entropy(logits, labels, weight=weights)
    return F.cross_entropy(logits, labels, weight=weights, reduction="sum") * (
        ranks.size() / total_weight
    )


@lru_cache
def class_weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copied to a GPU once: each copy would wait for everything that is queued there."""
    return torch.tensor(CLASS_WEIGHTS, device=device, dtype=dtype)


def total_class_weight(labels: np.ndarray) -> float:
    return float(np.asarray(CLASS_WEIGHTS)[labels].sum())


@torch.no_grad()
def climb(head: nn.Module, sharpness: Sharpness) -> list[tuple[nn.Parameter, Tensor]]:
    """Move the weights to where the loss is highest nearby; return each with its original value.

    SAM: e = rho g / ||g||; ASAM: e = rho w^2 g / || |w| g ||; one norm over all parameters. All
    parameters at once: on a GPU one by one takes 1,400 kernels.
    """
    moving = [p for p in head.parameters() if p.grad is not None]
    grads = [p.grad for p in moving]
    scaled = grads
    if sharpness.adaptive:
        scaled = torch._foreach_mul(grads, torch._foreach_abs(moving))
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled))) + 1e-12
    original = [torch.empty_like(p) for p in moving]
    torch._foreach_copy_(original, moving)
    steps = grads
    if sharpness.adaptive:
        steps = torch._foreach_mul(torch._foreach_mul(moving, moving), grads)
    torch._foreach_add_(moving, torch._foreach_mul(steps, sharpness.rho / norm))
    return list(zip(moving, original, strict=True))


@torch.no_grad()
def descend(original: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Put the weights back that climb() moved."""
    moving, values = zip(*original, strict=True)
    torch._foreach_copy_(list(moving), list(values))


@contextmanager
def frozen_batchnorm(head: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch but leaves its running statistics alone.

    SAM's second pass sees moved weights, whose statistics are not the network's.
    """
    norms = [m for m in head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class CompiledHead(nn.Module):
    """A head that torch.compile makes one graph of, for batches of one size.

    Others, as the short last one of an epoch, run as they are: a graph more takes as long to
    compile. The parameters are the head's own.
    """

    def __init__(self, head: nn.Module, batch_size: int):
        super().__init__()
        self.head, self.batch_size = head, batch_size
        self.compiled = torch.compile(head, backend=COMPILER, fullgraph=True, dynamic=False)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        network = self.compiled if len(features) == self.batch_size else self.head
        return network(features)


# ── One epoch ────────────────────────────────────────────────────────────────────────────────────


def train_epoch(
    run: Run,
    network: nn.Module,
    head: nn.Module,
    optimiser: torch.optim.Optimizer,
    train: JoinedFeatures,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Take the steps of the epoch under way that are not done yet.

    Args:
        network: the head, or the head as DistributedDataParallel wraps it.

    Returns:
        {"loss": mean weighted cross entropy of the epoch's clips, "seconds": ...}.
    """
    epoch, progress = run.state.epoch, run.state.progress
    losses = StepLosses(progress, train, epoch, STEPS_AHEAD[run.device.type])
    order = dataset.proportional_batches if args.CSAM else dataset.shuffled_batches
    batches = order(train.sizes, args.batch_size, args.seed, epoch)
    network.train()
    began = time.monotonic() - progress.seconds
    with tqdm(
        total=len(batches),
        initial=progress.step,
        unit="step",
        desc=f"epoch {epoch}",
        leave=False,
        disable=not ranks.is_first(),
    ) as bar:
        reading = read_shards(train, batches[progress.step :], args.num_workers, run.device)
        for step, (features, labels) in enumerate(reading, start=progress.step):
            rows = batches[step]
            seed_step(args.seed, epoch, step)
            with devices.memory_advice(args.batch_size):
                loss = shard_step(network, optimiser, features, labels, train.labels[rows], args)
            losses.add(rows, loss)
            progress.seconds = time.monotonic() - began
            bar.update()
            if progress.step:
                bar.set_postfix(loss=f"{progress.mean_loss:.4f}")
            if run.is_save_due():
                losses.wait()
                run.save(head, optimiser)
    losses.wait()
    progress.seconds = time.monotonic() - began
    require_finite_weights(head, epoch, progress.step)
    return {"loss": progress.mean_loss, "seconds": round(progress.seconds, 2)}


class StepLosses:
    """Adds the loss of each step to the progress of the epoch.

    A loss is looked at when `ahead` further steps are queued, so that a GPU never waits for the
    host. The sums and the order of the steps are the same for every `ahead`.
    """

    def __init__(self, progress: Progress, train: JoinedFeatures, epoch: int, ahead: int):
        self.progress, self.train, self.epoch, self.ahead = progress, train, epoch, ahead
        self._waiting: deque[tuple[np.ndarray, Callable[[], float]]] = deque()

    def add(self, rows: np.ndarray, loss: Callable[[], float]) -> None:
        """The next step took these rows; `loss` waits for its loss."""
        self._waiting.append((rows, loss))
        self.wait(self.ahead)

    def wait(self, ahead: int = 0) -> None:
        """Bring the progress to `ahead` steps before the last one.

        Raises:
            InputError: a loss is not finite.
        """
        while len(self._waiting) > ahead:
            rows, wait_for_loss = self._waiting.popleft()
            loss, names = wait_for_loss(), [self.train.name(row) for row in rows[:5]]
            require_finite_loss(loss, self.epoch, self.progress.step, names)
            weight = total_class_weight(self.train.labels[rows])
            self.progress.step += 1
            self.progress.loss += loss * weight
            self.progress.weight += weight


def read_shards(
    train: JoinedFeatures, batches: Sequence[np.ndarray], num_workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's features and labels of each batch on the device, read ahead."""
    # A rank that has no row of a short last batch reads one all the same, for its shape.
    shards = [rows[:1] if ranks.rank() >= len(rows) else ranks.shard(rows) for rows in batches]
    return dataset.read_ahead(train, shards, num_workers, device)


def shard_step(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    features: Tensor,
    labels: Tensor,
    batch_labels: np.ndarray,
    args: argparse.Namespace,
) -> Callable[[], float]:
    """One update from this rank's shard of a batch.

    Args:
        features, labels: as read_shards() yields them.
        batch_labels: of the global batch.

    Returns:
        A function that waits for the global batch's loss.
    """
    count = len(ranks.shard(batch_labels))
    total_weight = total_class_weight(batch_labels) if ranks.size() > 1 else None
    features, labels = features[:count].float(), labels[:count]
    loss = train_step(
        network, optimiser, features, labels, sharpness_of(args), args.precision, total_weight
    )
    return ranks.mean(loss)


def seed_step(seed: int, epoch: int, step: int) -> None:
    """The dropout of a step follows from where it stands, so that a resumed run repeats it."""
    rank = (ranks.rank(),) if ranks.rank() else ()  # each rank drops other units
    sequence = np.random.SeedSequence((seed, epoch, step, *rank))
    torch.manual_seed(int(sequence.generate_state(1)[0]))


def require_finite_loss(loss: float, epoch: int, step: int, names: Sequence[str]) -> None:
    if not np.isfinite(loss):
        raise InputError(
            f"epoch {epoch}, step {step + 1}: the loss is {loss}; the batch's first clips: "
            f"{', '.join(names)}. The last good weights are kept; lower --lr, or look at those "
            "features"
        )


def require_finite_weights(head: nn.Module, epoch: int, step: int) -> None:
    """Stop before damage is saved: a step of finite loss can still leave weights that are not."""
    for name, tensor in head.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"epoch {epoch}, after step {step}: {name} is not finite any more. The last good "
                "weights are kept; lower --lr"
            )


@torch.inference_mode()
def evaluate(
    head: nn.Module,
    dev: JoinedFeatures,
    args: argparse.Namespace,
    device: torch.device,
    epoch: int,
) -> dict[str, float | None]:
    """Judge the head on the whole development set(s).

    Returns:
        {"dev_loss": weighted cross entropy, "dev_eer": in percent, None where a class is absent}.

    Raises:
        InputError: the head has diverged.
    """
    head.eval()
    rows = np.arange(len(dev.labels))
    batches = np.split(rows, range(args.batch_size, len(rows), args.batch_size))
    shards = ranks.shard(batches)  # whole batches: those that one process computes
    # They stay on the device, which need not wait for the host to take them.
    logits = torch.zeros(len(rows), 2, device=device)
    reading = dataset.read_ahead(dev, shards, args.num_workers, device)
    with devices.memory_advice(args.batch_size):
        for shard, (features, _) in zip(
            shards,
            tqdm(
                reading,
                total=len(shards),
                unit="step",
                desc="dev",
                leave=False,
                disable=not ranks.is_first(),
            ),
            strict=True,
        ):
            with devices.autocast(args.precision, device):
                outputs = head(features.float())[1]
            logits[shard[0] : shard[-1] + 1] = outputs.float()
    # Each row is zero on all ranks but one.
    logits = sum(ranks.gather_to_first(logits.double().cpu().numpy()))
    return ranks.broadcast(lambda: judge(logits, dev.labels, epoch, args.lr))


def judge(logits: np.ndarray, labels: np.ndarray, epoch: int, lr: float) -> dict[str, float | None]:
    """Logits (N, 2) and labels (N,) -> what evaluate() returns."""
    if not np.isfinite(logits).all():
        raise InputError(
            f"epoch {epoch}: the head's outputs on the development set are not finite. The weights "
            f"of the epochs before are kept; lower --lr (now {lr:g})"
        )
    weights = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    loss = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), weight=weights)
    scores = logits[:, REAL] - logits[:, FAKE]
    real, fake = scores[labels == REAL], scores[labels == FAKE]
    eer = None
    if len(real) and len(fake):
        eer = 100 * eval_metrics.compute_eer(real, fake)[0]
    return {"dev_loss": float(loss), "dev_eer": eer}


# ── The run's folder ─────────────────────────────────────────────────────────────────────────────


def files_of_a_run(folder: Path) -> list[str]:
    """What lies in the folder, without the lock and what a killed write left."""
    names = [name for name in os.listdir(folder) if not name.endswith(".part")]
    return sorted(name for name in names if name != ".lock")


def load_initial_weights(head: nn.Module, path: Path) -> str:
    """Copy the weights of another head of the same kind; return their digest.

    Raises:
        InputError: not a head, or one of another kind or front end.
    """
    other = model.load_head(path)
    if (other.name, other.feat) != (head.name, head.feat):
        raise InputError(
            f"--init_from {path}: expected a head {head.name} on {head.feat}, got {other.name} on "
            f"{other.feat}; name its kind with -m and --feat"
        )
    head.load_state_dict(other.state_dict())
    return torch_files.digest(head)


def require_usable_folder(folder: Path, continue_training: bool) -> None:
    """Raise InputError unless the folder is empty, or holds a run that is to be gone on with."""
    used = ranks.broadcast(lambda: files_of_a_run(folder) if folder.is_dir() else [])
    if used and not continue_training:
        go_on = ", or go on with the run in it with --continue_training"
        raise InputError(
            f"{folder}: not empty ({', '.join(used[:3])}), and no run is ever overwritten; choose "
            f"another -o{go_on if STATE_FILE in used else ''}"
        )
    if continue_training and not used:
        raise InputError(
            f"{folder}: is empty, there is no run to go on with; check -o, or leave "
            "--continue_training out to begin one"
        )
    if continue_training and STATE_FILE not in used:
        raise InputError(
            f"{folder}: holds no {STATE_FILE} to go on from, but {', '.join(used[:3])}; choose "
            "another -o; --init_from begins a new run from given weights"
        )


class Run:
    """A training run: its folder, and where it stands."""

    def __init__(self, folder: Path, state: TrainingState, ssl: str | None, device: torch.device):
        self.folder = folder
        self.state = state
        self.ssl = ssl  # where the front end's weights came from
        self.device = device
        self._saved = time.monotonic()

    @property
    def best(self) -> dict[str, Any]:
        """The record of the epoch with the lowest dev loss."""
        return min(self.state.history, key=lambda record: record["dev_loss"])

    def start(
        self, continue_training: bool, head: nn.Module, optimiser: torch.optim.Optimizer
    ) -> None:
        """Take up the run that the folder holds, or begin one in an empty folder."""
        require_usable_folder(self.folder, continue_training)
        if continue_training:
            self._take_up(head, optimiser)
        if ranks.is_first():
            if not continue_training:
                self._save_state(head, optimiser)  # a kill in the first epoch can be gone on from
            (self.folder / "checkpoint").mkdir(exist_ok=True)
            self._write_settings()

    def _take_up(self, head: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        path = self.folder / STATE_FILE
        state = training_state.read_state(path)
        for name, value in self.state.settings.items():
            if state.settings.get(name) != value:
                raise InputError(
                    f"{self.folder}: was trained with {name} {state.settings.get(name)!r}, now it "
                    f"is {value!r}; give the same, or choose another -o"
                )
        training_state.restore(path, state, head, optimiser)
        # Equal, and pickled to the bytes of an unbroken run.
        begun_from = {key: state.settings[key] for key in ("init_from",) if key in state.settings}
        state.settings = self.state.settings | begun_from
        self.state = state
        if ranks.is_first():
            self._write_log()  # a kill may have come between the state and the log

    def is_save_due(self) -> bool:
        """Whether to save in the middle of an epoch: every SAVE_EVERY seconds."""
        return ranks.is_first() and time.monotonic() - self._saved > SAVE_EVERY

    def save(self, head: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Save the state in the middle of an epoch; the progress has to be that of the weights."""
        require_finite_weights(head, self.state.epoch, self.state.progress.step)
        self._save_state(head, optimiser)

    def save_epoch(
        self, record: dict[str, Any], head: nn.Module, optimiser: torch.optim.Optimizer
    ) -> None:
        """Record a finished epoch.

        Weights first, state last: killed in between, the epoch is trained again and writes the same
        bytes.
        """
        epoch = record["epoch"]
        self.state.history.append(record)
        self.state.epoch, self.state.progress = epoch + 1, Progress()
        if not ranks.is_first():
            return
        info = self._checkpoint_info(record)
        checkpoint = model.WEIGHTS.replace(".pt", f"_{epoch}.pt")
        model.save_head(self.folder / "checkpoint" / checkpoint, head, info)
        if self.best is record:
            model.save_head(self.folder / model.WEIGHTS, head, info)
        self._save_state(head, optimiser)
        self._write_log()
        self._write_curves(record)

    def _checkpoint_info(self, record: dict[str, Any]) -> dict[str, Any]:
        return {
            **self.state.settings,
            "ssl": self.ssl,
            "labels": ["real", "fake"],
            "class_weights": list(CLASS_WEIGHTS),
            **{name: record[name] for name in ("epoch", "dev_loss", "dev_eer")},
            "run": run_info(self.device),
        }

    def _save_state(self, head: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.state.head, self.state.optimiser = head.state_dict(), optimiser.state_dict()
        training_state.write_state(self.folder / STATE_FILE, self.state)
        self._saved = time.monotonic()

    def _write_settings(self) -> None:
        about = {
            "settings": self.state.settings,
            "labels": {"real": REAL, "fake": FAKE},
            "class_weights": CLASS_WEIGHTS,
            "processes": ranks.size(),
            "run": run_info(self.device),
        }
        with atomic_write(self.folder / "settings.json") as file:
            json.dump(about, file, indent=1)

    def _write_log(self) -> None:
        with atomic_write(self.folder / "log.jsonl") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.state.history)

    def _write_curves(self, record: dict[str, Any]) -> None:
        """Add the epoch to TensorBoard's curves; log.jsonl has the same figures."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.folder / "tensorboard")
            with SummaryWriter(folder, purge_step=record["epoch"]) as curves:
                for name in ("loss", "dev_loss", "dev_eer", "lr"):
                    if record[name] is not None:
                        curves.add_scalar(name, record[name], record["epoch"])
        except Exception as error:  # a broken installation fails in any way
            cli.echo(f"note: no TensorBoard curves ({type(error).__name__}: {error})")


if __name__ == "__main__":
    ranks.run(
        main,
        if_stopped="nothing was begun; run the same command again",
    )
