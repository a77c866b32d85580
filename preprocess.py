"""Compute the front end's features of a corpus once and cache them on disk.

    python preprocess.py                        # Codecfake, xls-r-5, train and dev
    python preprocess.py -t 19LA --feat mel
    python preprocess.py --verify               # read a cache back; with --repair redo what is damaged

Reads the protocols and audio under -d, writes `<features>/{train,dev}/<feat>/` (see feature_cache.py).
Stopped at any moment, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import dataset
import frontends
import model
from dataset import Trial
from formats import feature_cache, protocols
from formats.feature_cache import DONE, DTYPES, FAILED, NOT_YET, CacheWriter, FeatureCache
from runtime import cli, devices, ranks
from runtime.cli import InputError

FLUSH_EVERY = 256  # rows; at most so many are computed again after a kill


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "-t",
        "--task",
        choices=("codecfake", "19LA"),
        default="codecfake",
        help="the corpus (default: %(default)s)",
    )
    parser.add_argument(
        "-d",
        "--path_to_database",
        type=Path,
        metavar="DIR",
        help="its folder (default: data/Codecfake or data/LA)",
    )
    parser.add_argument(
        "-f",
        "--path_to_features",
        type=Path,
        metavar="DIR",
        help="where Codecfake's features go (default: features/Codecfake)",
    )
    parser.add_argument(
        "-f1",
        "--path_to_features1",
        type=Path,
        metavar="DIR",
        help="where 19LA's features go (default: features/LA)",
    )
    parser.add_argument(
        "--feat",
        choices=tuple(dataset.FEATURE_SHAPES),
        default="xls-r-5",
        help="front end (default: %(default)s)",
    )
    parser.add_argument(
        "--ssl",
        default=frontends.DEFAULT_SSL,
        metavar="ID|DIR",
        help="wav2vec 2.0 weights: hub id or local folder (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float16",
        help="stored values: float32 exact, float16 half its bytes, "
        "sqrt8 a quarter, 8-bit square roots within about 1 %% (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=devices.PRECISIONS,
        default="fp32",
        help="arithmetic of the front end (default: %(default)s)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="check every row of an existing cache instead"
    )
    parser.add_argument(
        "--repair", action="store_true", help="with --verify: extract the damaged rows anew"
    )
    parser.add_argument(
        "--skip_missing",
        action="store_true",
        help="go on without files that the protocol names but that are absent",
    )
    parser.add_argument(
        "--max_failed",
        type=cli.percent,
        default=0.1,
        metavar="PERCENT",
        help="stop when more of the files cannot be read (default: %(default)s %%)",
    )
    cli.add_compute_options(parser, "clips at a time (default: 32 on a GPU, 8 on the CPU)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.verify:
        for part in ("train", "dev"):
            require_cache(args.features / part / args.feat)
        if not args.repair:
            if not ranks.is_first():
                return
            if any([verify(args.features / part / args.feat) for part in ("train", "dev")]):
                raise InputError(
                    "the cache is damaged as listed above; add --repair to extract those rows anew"
                )
            for part in ("train", "dev"):
                FeatureCache(args.features / part / args.feat).require_complete()
            return
    device = devices.pick_device(ranks.gpu(args.gpu))
    devices.set_precision(args.precision, device)
    corpus = {part: readable_trials(args, part) for part in ("train", "dev")}
    front_end = model.load_frontend(args.feat, args.ssl, args.precision).to(device)
    for part, (trials, absent) in corpus.items():
        folder = args.features / part / args.feat
        with ranks.exclusive(folder):
            if ranks.is_first():
                prepare_cache(args, folder, trials, front_end)
            ranks.barrier()
            writer = open_cache(args, folder, trials, front_end)
            try:
                extract(args, part, writer, front_end, absent, device)
            finally:
                writer.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with `features` the folder that this task writes to."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.repair and not args.verify:
        parser.error("--repair goes with --verify")
    if args.task == "19LA" and args.path_to_features and not args.path_to_features1:
        parser.error("-t 19LA writes to -f1; -f is Codecfake's folder")
    if args.task == "codecfake":
        args.path_to_database = args.path_to_database or Path("data/Codecfake")
        args.features = args.path_to_features or Path("features/Codecfake")
    else:
        args.path_to_database = args.path_to_database or Path("data/LA")
        args.features = args.path_to_features1 or Path("features/LA")
    return args


def readable_trials(args: argparse.Namespace, part: str) -> tuple[list[Trial], set[int]]:
    """The part's trials and the rows whose files are absent, which --skip_missing has to allow."""
    trials = dataset.read_protocol(args.task, args.path_to_database, part)
    missing = ranks.broadcast(lambda: protocols.find_missing(trials))
    if missing:
        line = protocols.describe_missing(missing, len(trials))
        if not args.skip_missing or len(missing) == len(trials):
            raise InputError(f"{line}; fetch them, or go on without them with --skip_missing")
        cli.echo(f"note: {line}; going on without them")
    absent = set(missing)
    return trials, {row for row, trial in enumerate(trials) if trial in absent}


def prepare_cache(
    args: argparse.Namespace, folder: Path, trials: list[Trial], front_end: frontends.FrontEnd
) -> None:
    """Make the cache if there is none; with --repair, mend its files and forget its damaged rows."""
    if args.repair:
        for name in feature_cache.mend_files(folder, trials):
            cli.echo(f"{folder / name}: damaged; made anew")
    writer = open_cache(args, folder, trials, front_end)
    try:
        if args.repair:
            writer.forget(verify(folder))
    finally:
        writer.close()


def open_cache(
    args: argparse.Namespace, folder: Path, trials: list[Trial], front_end: frontends.FrontEnd
) -> CacheWriter:
    shape = (dataset.FEATURE_SHAPES[args.feat][0], front_end.dim)
    about = {
        "ssl": getattr(front_end, "ssl", None),
        **{
            package: version(package)
            for package in ("torch", "torchaudio", "transformers", "soundfile")
        },
    }
    return CacheWriter(
        folder,
        trials,
        front_end.fingerprint() | {"precision": args.precision},
        shape,
        args.dtype,
        about,
    )


def extract(
    args: argparse.Namespace,
    part: str,
    writer: CacheWriter,
    front_end: frontends.FrontEnd,
    absent: set[int],
    device: torch.device,
) -> None:
    """Compute and store every row that the cache does not hold yet; the ranks take the batches in turn."""
    trials, done = writer.trials, writer.states() == DONE
    ranks.barrier()  # a rank that looked once another had written would count other batches
    size = args.batch_size or (32 if device.type == "cuda" else 8)
    todo = np.flatnonzero(~done)
    # Batches stay aligned to the protocol, so that a resumed run computes what an uninterrupted one would.
    batches = [
        [row for row in range(first, min(first + size, len(trials))) if row not in absent]
        for first in sorted({row // size * size for row in todo.tolist()})
    ]
    absent = {
        row for row in absent if not done[row]
    }  # what was extracted stays, though its file is gone since
    failures = {row: "absent" for row in absent}
    allowed = int(len(trials) * args.max_failed / 100) + len(absent)
    rates: Counter = Counter()
    n_finished, n_failed = ranks.SharedCounter(), ranks.SharedCounter()
    cli.echo(
        f"{args.task} {part}: {len(trials)} clips, {len(trials) - len(todo)} of them done, {device} -> {writer.folder}"
    )
    with (
        tqdm(
            total=len(todo), unit="clip", disable=not len(todo) or not ranks.is_first(), desc=part
        ) as bar,
        ThreadPoolExecutor(1) as disk,
    ):
        writing: Future | None = None
        for batch in dataset.clip_batches(
            [trial.path for trial in trials],
            [b for b in ranks.shard(batches) if b],
            args.num_workers,
        ):
            features = compute(front_end, batch.clips, size, device)
            failed = {row: reason for row, reason in batch.failures.items() if not done[row]}
            failures |= failed
            if failed and (count := n_failed.add(len(failed)) + len(absent)) > allowed:
                raise InputError(
                    f"{count} of {len(trials)} files cannot be read, more than --max_failed "
                    f"{args.max_failed:g} %; the last: {next(iter(failed.values()))}"
                )
            wanted = [i for i, row in enumerate(batch.rows) if not done[row]]
            if writing:
                writing.result()
            writing = disk.submit(
                store, writer, [batch.rows[i] for i in wanted], features, wanted, list(failed)
            )
            rates += batch.rates
            bar.update(n_finished.add(len(wanted) + len(failed)) - bar.n)
        if writing:
            writing.result()
        writer.mark_failed(sorted(absent))
        writer.flush()
        ranks.barrier(lambda: bar.update(n_finished.add() - bar.n))
        bar.update(n_finished.add() - bar.n)
    found = ranks.gather((failures, rates))
    if ranks.is_first():
        failures = {row: reason for of_rank, _ in found for row, reason in of_rank.items()}
        writer.write_failures(failures)
        report(writer, failures, sum((of_rank for _, of_rank in found), Counter()))


def compute(
    front_end: frontends.FrontEnd, clips: torch.Tensor, size: int, device: torch.device
) -> Callable[[], np.ndarray]:
    """Start computing the features of clips (B, 64600); what is returned waits for them, (B, frames, dim) float32."""
    with devices.memory_advice(size), torch.inference_mode():
        features = front_end(devices.pad_batch(clips, size, device))[: len(clips)]
        if device.type != "cuda":
            return features.numpy
        landed = torch.empty(features.shape, pin_memory=True).copy_(features, non_blocking=True)
        copied = torch.cuda.Event(
            blocking=True
        )  # a waiting thread leaves its core to the decoding processes
        copied.record()

    def wait() -> np.ndarray:
        copied.synchronize()
        return landed.numpy()

    return wait


def store(
    writer: CacheWriter,
    rows: list[int],
    features: Callable[[], np.ndarray],
    which: list[int],
    failed: list[int],
) -> None:
    writer.write(rows, features()[which])
    writer.mark_failed(sorted(failed))
    if writer.unmarked() >= FLUSH_EVERY:
        writer.flush()


def report(writer: CacheWriter, failures: dict[int, str], rates: Counter) -> None:
    if note := dataset.describe_rates(rates):
        cli.echo(note)
    if failures:
        cli.echo(
            f"note: {len(failures)} files have no features and will not be trained on; {writer.folder / 'failed.txt'} lists them"
        )
    layout = writer.layout
    cli.echo(
        f"{writer.folder}: complete, {layout.rows - len(failures)} rows of {layout.shape[0]} x {layout.shape[1]} {layout.dtype}, "
        f"{layout.rows * layout.row_bytes / 1e9:.2f} GB"
    )


def require_cache(folder: Path) -> None:
    if not (folder / "cache.json").exists():
        raise InputError(
            f"{folder}: no feature cache to verify; run preprocess.py without --verify first"
        )


def verify(folder: Path) -> list[int]:
    """Read every row back; print and return those that are damaged."""
    cache = FeatureCache(folder)
    with tqdm(range(len(cache.states)), unit="row", desc=f"verify {folder.parent.name}") as rows:
        damaged = cache.damaged_rows(rows)
    cache.layout.close()
    for row in damaged:
        cli.echo(f"{folder}: row {row} ({cli.printable(cache.all_names[row])}) is damaged")
    counts = {
        what: int((cache.states == state).sum())
        for state, what in ((NOT_YET, "not extracted yet"), (FAILED, "failed"))
    }
    cli.echo(
        f"{folder}: {len(cache.states)} rows, {len(damaged)} damaged"
        + "".join(f", {count} {what}" for what, count in counts.items() if count)
    )
    return damaged


if __name__ == "__main__":
    ranks.run(main, if_stopped="run the same command again to go on; finished rows are kept")
