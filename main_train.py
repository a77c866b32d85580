"""Train a head on cached features.

    python main_train.py -t codecfake           # and 19LA, co-train
    python main_train.py -t co-train --CSAM -o models/csam
    python main_train.py -t codecfake -o models/try --continue_training

Reads the caches of preprocess.py (or the reference's .pt folders) under -f and -f1. Writes into -o:

    anti-spoofing_feat_model.pt                        the epoch with the lowest dev loss
    checkpoint/anti-spoofing_feat_model_<epoch>.pt     every epoch
    last_state.pt                                      all that --continue_training needs
    log.jsonl, tensorboard/, settings.json             one record an epoch, curves, provenance
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import dataset
import eval_metrics
import model
from dataset import FAKE, REAL, JoinedFeatures, open_features, read_ahead
from formats import torch_files
from runtime import cli, devices, files, ranks
from runtime.cli import InputError
from runtime.ranks import sync_batchnorms

CLASS_WEIGHTS = (10.0, 1.0)  # real, fake: Codecfake has six fakes a real clip
STATE_FORMAT = "codecfake-state-1"
RECORD = {"epoch", "loss", "dev_loss", "dev_eer", "lr", "seconds"}  # of one epoch, in log.jsonl
SAVE_EVERY = 600  # seconds; what a kill in the middle of an epoch costs at most


# ── Command line ─────────────────────────────────────────────────────────────────────────────────


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "-t",
        "--train_task",
        choices=("19LA", "codecfake", "co-train"),
        required=True,
        help="what to train on",
    )
    parser.add_argument(
        "-m",
        "--model",
        choices=tuple(model.HEADS),
        default="W2VAASIST",
        help="head (default: %(default)s)",
    )
    parser.add_argument(
        "--feat",
        choices=tuple(dataset.FEATURE_SHAPES),
        default="xls-r-5",
        help="front end of the features (default: %(default)s)",
    )
    parser.add_argument(
        "-f",
        "--path_to_features",
        type=Path,
        metavar="DIR",
        default=Path("features/Codecfake"),
        help="Codecfake's features (default: %(default)s)",
    )
    parser.add_argument(
        "-f1",
        "--path_to_features1",
        type=Path,
        metavar="DIR",
        default=Path("features/LA"),
        help="19LA's features (default: %(default)s)",
    )
    parser.add_argument(
        "-d",
        "--path_to_database",
        type=Path,
        metavar="DIR",
        help="hold the features against this corpus's protocols "
        "(for co-train: the folder with Codecfake/ and LA/)",
    )
    parser.add_argument(
        "--ssl",
        metavar="ID|DIR",
        help="refuse features that were not made with these wav2vec 2.0 weights",
    )
    parser.add_argument(
        "-o",
        "--out_fold",
        type=Path,
        metavar="DIR",
        default=Path("models/try"),
        help="output folder (default: %(default)s)",
    )
    parser.add_argument("--num_epochs", type=cli.at_least(1), default=10, metavar="N")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument(
        "--lr_decay",
        type=float,
        default=0.5,
        help="factor on lr every --interval epochs (default: %(default)s)",
    )
    parser.add_argument("--interval", type=cli.at_least(1), default=2, metavar="N")
    parser.add_argument("--beta_1", type=float, default=0.9)
    parser.add_argument("--beta_2", type=float, default=0.999)
    parser.add_argument("--eps", type=float, default=1e-8)
    parser.add_argument("--seed", type=cli.at_least(0), default=688)
    for name, text in (
        ("SAM", "sharpness-aware minimisation"),
        ("ASAM", "its adaptive form"),
        ("CSAM", "SAM with both corpora in every batch; co-train only"),
    ):
        parser.add_argument(
            f"--{name}",
            type=cli.switch,
            nargs="?",
            const=True,
            default=False,
            metavar="True|False",
            help=text,
        )
    parser.add_argument(
        "--rho",
        type=float,
        default=0.05,
        help="radius of SAM's neighbourhood (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=devices.PRECISIONS,
        default="fp32",
        help="arithmetic of the head (default: %(default)s)",
    )
    parser.add_argument(
        "--continue_training",
        type=cli.switch,
        nargs="?",
        const=True,
        default=False,
        metavar="True|False",
        help="go on with the run in --out_fold",
    )
    cli.add_compute_options(
        parser, "clips a step, of all processes together (default: %(default)s)", batch_size=128
    )
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.SAM + args.ASAM + args.CSAM > 1:
        parser.error("--SAM, --ASAM and --CSAM exclude each other")
    if args.CSAM and args.train_task != "co-train":
        parser.error(f"--CSAM mixes the two corpora of -t co-train, got -t {args.train_task}")
    if args.CSAM and args.batch_size < 2:
        parser.error("--CSAM needs a --batch_size of at least 2, one clip of each corpus")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = devices.pick_device(ranks.gpu(args.gpu))
    devices.set_precision(args.precision, device)
    torch.manual_seed(args.seed)
    head = model.build_head(args.model, args.feat).to(device)
    train, dev = open_corpora(args, "train"), open_corpora(args, "dev")
    front_end = dataset.common_front_end([*train.parts, *dev.parts])
    dataset.check_origin(args, front_end, {"train": train, "dev": dev})
    with ranks.exclusive(args.out_fold), ranks.process_group(device):
        run = Run(
            args, head, device, settings_of(args, front_end, train, dev), ssl=train.about.get("ssl")
        )
        run.start()
        cli.echo(
            f"{args.model} on {args.feat}: {len(train.labels)} clips to train, {len(dev.labels)} to choose on, {device} -> {args.out_fold}"
        )
        for epoch in range(run.epoch, args.num_epochs + 1):
            run.train_and_record(epoch, train, dev)
        best = run.best()
        cli.echo(
            f"best epoch {best['epoch']} (dev loss {best['dev_loss']:.4f}): {args.out_fold / model.WEIGHTS}"
        )


# ── Features ─────────────────────────────────────────────────────────────────────────────────────


def open_corpora(args: argparse.Namespace, part: str) -> JoinedFeatures:
    roots = {
        "codecfake": [args.path_to_features],
        "19LA": [args.path_to_features1],
        "co-train": [args.path_to_features, args.path_to_features1],
    }[args.train_task]
    return JoinedFeatures([open_features(root, part, args.feat) for root in roots])


def settings_of(
    args: argparse.Namespace, front_end: dict[str, Any], train: JoinedFeatures, dev: JoinedFeatures
) -> dict[str, Any]:
    """All that shapes the weights. A run is only taken up again with the same."""
    shaping = (
        "train_task",
        "model",
        "feat",
        "batch_size",
        "lr",
        "lr_decay",
        "interval",
        "beta_1",
        "beta_2",
        "eps",
        "seed",
        "SAM",
        "ASAM",
        "CSAM",
        "rho",
        "precision",
    )
    return {
        **{name: getattr(args, name) for name in shaping},
        "front_end": front_end,
        "train_rows": train.sizes,
        "dev_rows": dev.sizes,
        "dtypes": [part.dtype for part in (*train.parts, *dev.parts)],
    }


# ── One step ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sharpness:
    """SAM (Foret et al. 2021, arXiv 2010.01412) or ASAM (Kwon et al. 2021, arXiv 2102.11600)."""

    rho: float
    adaptive: bool


def train_step(
    head: nn.Module,
    optimiser: torch.optim.Optimizer,
    features: Tensor,
    labels: Tensor,
    sharpness: Sharpness | None = None,
    precision: str = "fp32",
    weight: float | None = None,
) -> Tensor:
    """One update of the weights from features (B, frames, dim) and labels (B,).

    Args:
        weight: of the ranks' rows together, where these are one rank's share of a batch.

    Returns:
        The weighted cross entropy of the batch before the update, a scalar without gradient; of a share, what has
        that as its mean over the ranks.
    """
    optimiser.zero_grad()
    loss = batch_loss(head, features, labels, precision, weight)
    loss.backward()
    if sharpness:
        with frozen_batchnorm(head):
            steps = climb(head, sharpness)
            optimiser.zero_grad()
            batch_loss(head, features, labels, precision, weight).backward()
            descend(steps)
    optimiser.step()
    return loss.detach()


def batch_loss(
    head: nn.Module, features: Tensor, labels: Tensor, precision: str, weight: float | None = None
) -> Tensor:
    with devices.autocast(precision, features.device):
        logits = head(features)[1]
    return weighted_cross_entropy(logits, labels, weight)


@lru_cache
def class_weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Copied once: each copy to a GPU would wait for all that it has to compute before."""
    return torch.tensor(CLASS_WEIGHTS, device=device, dtype=dtype)


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weight: float | None = None) -> Tensor:
    """Sum of weighted losses over the sum of weights (paper, section V).

    Args:
        weight: the sum of weights of a batch of which these rows, none perhaps, are one rank's share. The mean
            over the ranks is then the batch's loss, as its gradient is the mean that the ranks take.
    """
    logits = logits.float()
    of_class = class_weights(logits.device, logits.dtype)
    if weight is None:
        return F.cross_entropy(logits, labels, weight=of_class)
    return F.cross_entropy(logits, labels, weight=of_class, reduction="sum") * (
        ranks.size() / weight
    )


@torch.no_grad()
def climb(head: nn.Module, sharpness: Sharpness) -> list[tuple[nn.Parameter, Tensor]]:
    """Move the weights to where the loss is highest nearby; return each with its value before.

    SAM: e = rho g / ||g||; ASAM: e = rho w^2 g / || |w| g ||; one norm over all parameters.
    """
    moving = [p for p in head.parameters() if p.grad is not None]
    scaled = [p.grad * p.abs() if sharpness.adaptive else p.grad for p in moving]
    norm = (
        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in scaled])) + 1e-12
    )
    before = [(p, p.clone()) for p in moving]
    for p in moving:
        p.add_((p.square() if sharpness.adaptive else 1) * p.grad * (sharpness.rho / norm))
    return before


@torch.no_grad()
def descend(before: list[tuple[nn.Parameter, Tensor]]) -> None:
    for p, value in before:
        p.copy_(value)


@contextmanager
def frozen_batchnorm(head: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch but leaves its running statistics alone: SAM's second pass saw moved weights."""
    norms = [m for m in head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


# ── One run ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Progress:
    """Where the epoch under way stands."""

    step: int = 0  # steps of it that are done
    loss: float = 0.0  # sum of batch losses times the weight of each batch
    weight: float = 0.0
    seconds: float = 0.0


@dataclass
class Run:
    """A training run and its folder."""

    args: argparse.Namespace
    head: nn.Module
    device: torch.device
    settings: dict[str, Any]
    ssl: str | None = None  # where the front end's weights came from
    epoch: int = 1  # the epoch under way
    progress: Progress = field(default_factory=Progress)
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        args = self.args
        self.folder = args.out_fold
        if ranks.size() > 1:
            sync_batchnorms(self.head)
        self.network = ranks.parallel(self.head)
        self.optimiser = torch.optim.Adam(
            self.head.parameters(),
            lr=args.lr,
            betas=(args.beta_1, args.beta_2),
            eps=args.eps,
            weight_decay=5e-4,
        )
        self.sharpness = (
            Sharpness(args.rho, args.ASAM) if args.SAM or args.ASAM or args.CSAM else None
        )

    def start(self) -> None:
        """Take up the run that the folder holds, or begin one in an empty folder."""
        used = ranks.broadcast(
            lambda: [name for name in os.listdir(self.folder) if name != ".lock"]
        )
        if used and not self.args.continue_training:
            raise InputError(
                f"{self.folder}: not empty, and a finished run is never overwritten; choose another -o, or go on "
                "with the run in it with --continue_training"
            )
        if "last_state.pt" in used:
            self.load_state()
        elif self.args.continue_training:
            cli.echo(f"note: {self.folder} holds no state to go on from; starting at epoch 1")
        if ranks.is_first():
            (self.folder / "checkpoint").mkdir(exist_ok=True)
            self.record_settings()

    def record_settings(self) -> None:
        about = {
            "settings": self.settings,
            "labels": {"real": REAL, "fake": FAKE},
            "class_weights": CLASS_WEIGHTS,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "device": str(self.device),
            "processes": ranks.size(),
            "versions": versions(),
        }
        with files.atomic_write(self.folder / "settings.json") as file:
            json.dump(about, file, indent=1)

    def train_and_record(self, epoch: int, train: JoinedFeatures, dev: JoinedFeatures) -> None:
        lr = self.args.lr * self.args.lr_decay ** ((epoch - 1) // self.args.interval)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.train_epoch(epoch, train)
        self.require_finite_weights()
        dev_loss, dev_eer = evaluate(self.head, dev, self.args, self.device)
        record = {
            "epoch": epoch,
            "loss": self.progress.loss / self.progress.weight,
            "dev_loss": dev_loss,
            "dev_eer": dev_eer,
            "lr": lr,
            "seconds": round(self.progress.seconds, 2),
        }
        self.history.append(record)
        self.save_epoch(record)
        eer = "-" if dev_eer is None else f"{dev_eer:.3f} %"
        cli.echo(
            f"epoch {epoch}/{self.args.num_epochs}  loss {record['loss']:.4f}  dev loss {dev_loss:.4f}  dev EER {eer}  "
            f"lr {lr:.3g}  {record['seconds']:.1f} s{'  best so far' if self.best() is record else ''}"
        )

    def train_epoch(self, epoch: int, train: JoinedFeatures) -> None:
        """The rest of the epoch under way, from the step that is next."""
        args = self.args
        order = dataset.proportional_batches if args.CSAM else dataset.shuffled_batches
        batches = order(train.sizes, args.batch_size, args.seed, epoch)
        self.head.train()
        began = saved = time.monotonic()
        before = self.progress.seconds
        # A rank without a share of a short last batch reads a row all the same, for its shape.
        shares = [
            rows[:1] if ranks.rank() >= len(rows) else ranks.shard(rows)
            for rows in batches[self.progress.step :]
        ]
        own = (ranks.rank(),) if ranks.rank() else ()  # each rank drops out other units
        with tqdm(
            total=len(batches),
            initial=self.progress.step,
            unit="step",
            desc=f"epoch {epoch}",
            leave=False,
            disable=not ranks.is_first(),
        ) as bar:
            for features, labels in read_ahead(
                train, shares, args.num_workers, pin=self.device.type == "cuda"
            ):
                # The dropout of a step follows from where it stands, so that a resumed run repeats it.
                torch.manual_seed(
                    int(
                        np.random.SeedSequence(
                            (args.seed, epoch, self.progress.step, *own)
                        ).generate_state(1)[0]
                    )
                )
                self.step(features, labels, batches[self.progress.step], train)
                bar.update()
                bar.set_postfix(loss=f"{self.progress.loss / self.progress.weight:.4f}")
                self.progress.seconds = before + time.monotonic() - began
                if ranks.is_first() and time.monotonic() - saved > SAVE_EVERY:
                    self.require_finite_weights()
                    self.save_state()
                    saved = time.monotonic()

    def step(
        self, features: Tensor, labels: Tensor, rows: np.ndarray, train: JoinedFeatures
    ) -> None:
        """One update from this rank's share of the batch of these rows."""
        count = len(ranks.shard(rows))
        weight = float(torch.tensor(CLASS_WEIGHTS)[torch.from_numpy(train.labels[rows])].sum())
        with devices.memory_advice(self.args.batch_size):
            features, labels = (
                features[:count].to(self.device, non_blocking=True).float(),
                labels[:count].to(self.device),
            )
            loss = float(
                ranks.mean(
                    train_step(
                        self.network,
                        self.optimiser,
                        features,
                        labels,
                        self.sharpness,
                        self.args.precision,
                        weight if ranks.size() > 1 else None,
                    )
                )
            )
        if not np.isfinite(loss):
            names = ", ".join(train.name(row) for row in rows[:5])
            raise InputError(
                f"epoch {self.epoch}, step {self.progress.step + 1}: the loss is {loss}; the batch's first clips: {names}. "
                "The last good weights are kept; lower --lr, or look at those features"
            )
        self.progress.step += 1
        self.progress.loss += loss * weight
        self.progress.weight += weight

    def require_finite_weights(self) -> None:
        """Stop before damage is saved: a step of finite loss can still leave weights that are not finite."""
        for name, tensor in self.head.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise InputError(
                    f"epoch {self.epoch}, after step {self.progress.step}: {name} is not finite any more. The last good "
                    "weights are kept; lower --lr"
                )

    def best(self) -> dict[str, Any]:
        return min(self.history, key=lambda record: record["dev_loss"])

    def save_epoch(self, record: dict[str, Any]) -> None:
        """Weights first, state last: killed in between, the epoch is trained again and writes the same bytes."""
        self.epoch, self.progress = record["epoch"] + 1, Progress()
        if not ranks.is_first():
            return
        info = {
            **self.settings,
            "ssl": self.ssl,
            "labels": ["real", "fake"],
            "class_weights": list(CLASS_WEIGHTS),
            "epoch": record["epoch"],
            "dev_loss": record["dev_loss"],
            "dev_eer": record["dev_eer"],
            "device": str(self.device),
            "versions": versions(),
        }
        model.save_head(
            self.folder / "checkpoint" / model.WEIGHTS.replace(".pt", f"_{record['epoch']}.pt"),
            self.head,
            info,
        )
        if self.best() is record:
            model.save_head(self.folder / model.WEIGHTS, self.head, info)
        self.save_state()
        self.write_log()
        with SummaryWriter(str(self.folder / "tensorboard"), purge_step=record["epoch"]) as curves:
            for name in ("loss", "dev_loss", "dev_eer", "lr"):
                if record[name] is not None:
                    curves.add_scalar(name, record[name], record["epoch"])

    def write_log(self) -> None:
        with files.atomic_write(self.folder / "log.jsonl") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.history)

    def save_state(self) -> None:
        state = {
            "format": STATE_FORMAT,
            "settings": self.settings,
            "epoch": self.epoch,
            "progress": vars(self.progress),
            "history": self.history,
            "head": self.head.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        torch_files.save(self.folder / "last_state.pt", state)

    def load_state(self) -> None:
        path = self.folder / "last_state.pt"
        state = read_state(path)
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise InputError(
                    f"{self.folder}: was trained with {name} {state['settings'].get(name)!r}, now it is {value!r}; give "
                    "the same, or choose another -o"
                )
        self.epoch, self.progress, self.history = (
            state["epoch"],
            Progress(**state["progress"]),
            state["history"],
        )
        if not fits(self.head, state["head"], state["optimiser"]):
            raise _bad_state(path)
        self.head.load_state_dict(state["head"])
        # Only what it remembers of each weight: its options are those of the settings, which agree.
        self.optimiser.load_state_dict(
            {
                "state": state["optimiser"]["state"],
                "param_groups": self.optimiser.state_dict()["param_groups"],
            }
        )
        if ranks.is_first():
            self.write_log()  # a kill may have come between the state and the log


def read_state(path: Path) -> dict[str, Any]:
    """The state of a run, each part of the type that save_state() gave it. Raises InputError for anything else."""
    try:
        state = torch_files.load(path)
    except InputError as error:
        raise InputError(
            f"{error}; or remove it, to train again from epoch 1 to the same weights"
        ) from error
    types = {
        "settings": dict,
        "epoch": int,
        "progress": dict,
        "history": list,
        "head": dict,
        "optimiser": dict,
    }
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise InputError(
            f"{path}: expected the state of a training run, found something else; choose another -o"
        )
    if (
        not all(isinstance(state.get(name), kind) for name, kind in types.items())
        or not all(
            torch_files.is_plain(state[name]) for name in ("settings", "progress", "history")
        )
        or state["progress"].keys() != vars(Progress()).keys()
        or not all(isinstance(x, (int, float)) for x in state["progress"].values())
        or not all(
            isinstance(record, dict) and RECORD <= record.keys() for record in state["history"]
        )
    ):
        raise _bad_state(path)
    return state


def fits(head: nn.Module, weights: dict[str, Any], optimiser: dict[str, Any]) -> bool:
    """Whether stored weights, and what Adam remembers of each, have the names and shapes of this head."""
    expected = {name: tensor.shape for name, tensor in head.state_dict().items()}
    found = {name: getattr(tensor, "shape", None) for name, tensor in weights.items()}
    moments = optimiser.get("state")
    parameters = list(head.parameters())
    return (
        found == expected
        and isinstance(moments, dict)
        and all(
            isinstance(number, int)
            and 0 <= number < len(parameters)
            and isinstance(moment, dict)
            and {name: getattr(tensor, "shape", None) for name, tensor in moment.items()}
            == {
                "step": torch.Size(),
                "exp_avg": parameters[number].shape,
                "exp_avg_sq": parameters[number].shape,
            }
            for number, moment in moments.items()
        )
    )


def _bad_state(path: Path) -> InputError:
    return InputError(
        f"{path}: damaged, it is not the state of such a run; remove it to train again from epoch 1 to the same weights"
    )


@torch.inference_mode()
def evaluate(
    head: nn.Module, dev: JoinedFeatures, args: argparse.Namespace, device: torch.device
) -> tuple[float, float | None]:
    """Weighted cross entropy of the whole dev set(s), and their EER in percent (None where a class is absent)."""
    head.eval()
    rows = np.arange(len(dev.labels))
    batches = np.split(rows, range(args.batch_size, len(rows), args.batch_size))
    shares = ranks.shard(batches)  # whole batches: these are what one process computes
    logits = np.zeros((len(rows), 2))
    with (
        tqdm(
            zip(read_ahead(dev, shares, args.num_workers), shares),
            total=len(shares),
            unit="step",
            desc="dev",
            leave=False,
            disable=not ranks.is_first(),
        ) as steps,
        devices.memory_advice(args.batch_size),
        devices.autocast(args.precision, device),
    ):
        for (features, _), share in steps:
            logits[share] = head(features.to(device).float())[1].float().cpu()
    logits = torch.from_numpy(sum(ranks.gather(logits)))  # each row is zero on all ranks but one
    labels = torch.from_numpy(dev.labels)
    loss = F.cross_entropy(logits, labels, weight=torch.tensor(CLASS_WEIGHTS, dtype=torch.float64))
    scores, real = (logits[:, REAL] - logits[:, FAKE]).numpy(), dev.labels == REAL
    eer = (
        100 * eval_metrics.compute_eer(scores[real], scores[~real])[0]
        if 0 < real.sum() < len(real)
        else None
    )
    return float(loss), eer


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    ranks.run(
        main,
        if_stopped="run the same command with --continue_training to go on; finished epochs are kept",
    )
