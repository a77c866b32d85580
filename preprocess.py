"""Compute the front end's features of a corpus once and cache them on disk.

    python preprocess.py                      # Codecfake, xls-r-5, train and dev
    python preprocess.py -t 19LA --feat mel
    python preprocess.py --check              # is the download whole?
    python preprocess.py --verify             # read a cache back; --repair redoes damaged rows

Reads the protocols and audio under -d, writes `<features>/{train,dev}/<feat>/` (see
formats/feature_cache.py). Stopped at any moment, the same command goes on where it was.
"""

from __future__ import annotations

from runtime import cli

if __name__ == "__main__":
    cli.end_quietly_if_stopped()  # the imports below take seconds

import argparse
import random
import shutil
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dataset
import frontends
from dataset import Trial
from formats import audio, downloads, feature_cache, protocols
from formats.feature_cache import DONE, DTYPES, FAILED, NOT_YET, CacheWriter, FeatureCache
from frontends import DEFAULT_SSL, FrontEnd
from runtime import devices, ranks
from runtime.cli import InputError
from runtime.provenance import run_info

PARTS = ("train", "dev")
CHECK_SAMPLE = 200  # files of a part that --check reads
FLUSH_EVERY = 256  # rows; after a kill, at most twice as many are computed again
WRITING_THREADS = 2  # a checksum takes longer than writing to the page cache
WRITES_IN_FLIGHT = 3  # batches


# ── Command line ─────────────────────────────────────────────────────────────────────────────────


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "-t",
        "--task",
        choices=("codecfake", "19LA", "ITW"),
        default="codecfake",
        help="the corpus; ITW, which is not trained on, with --check only (default: %(default)s)",
    )
    add(
        "-d",
        "--path_to_database",
        type=Path,
        metavar="DIR",
        help="its folder (default: data/Codecfake or data/LA)",
    )
    cli.add_feature_folders(parser, "features go")
    add(
        "--feat",
        choices=tuple(dataset.FEATURE_SHAPES),
        default="xls-r-5",
        help="front end (default: %(default)s)",
    )
    add(
        "--ssl",
        default=DEFAULT_SSL,
        metavar="ID|DIR",
        help="wav2vec 2.0 weights: hub id or local folder (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=tuple(DTYPES),
        default="float16",
        help="stored values: float32 exact; float16 half its bytes; a quarter with 8-bit codes: "
        "affine8 for xls-r-5, sqrt8 for mel (default: %(default)s)",
    )
    add(
        "--any_size",
        action="store_true",
        help="extract hidden states of another size than the heads here take",
    )
    _add_fault_options(parser.add_argument_group("missing and damaged files"))
    devices.add_options(parser, "arithmetic of the front end")
    return parser


def _add_fault_options(group: argparse._ArgumentGroup) -> None:
    cli.add_fault_options(group, cli.MAX_FAILED)
    add = group.add_argument
    add("--verify", action="store_true", help="check every row of an existing cache instead")
    add(
        "--check",
        action="store_true",
        help="look whether the download is whole, and whether there is space; extract nothing",
    )
    add("--all", action="store_true", help="with --check: read every file, not a sample")
    add("--repair", action="store_true", help="with --verify: extract the damaged rows anew")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with `features` the folder that this task writes to."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.check and args.verify:
        parser.error("--check looks at a corpus, --verify at its features; give one of them")
    if args.all and not args.check:
        parser.error("--all goes with --check")
    if args.task == "ITW" and not args.check:
        parser.error("-t ITW has no training part; score it with generate_score.py")
    if args.repair and not args.verify:
        parser.error("--repair goes with --verify")
    eight_bits = feature_cache.EIGHT_BITS[args.feat]
    if args.dtype in feature_cache.EIGHT_BITS.values() and args.dtype != eight_bits:
        parser.error(f"--dtype {args.dtype} does not suit {args.feat}, whose form is {eight_bits}")
    args.path_to_database = args.path_to_database or cli.CORPUS_FOLDERS[args.task]
    if args.task != "ITW":
        args.features = cli.feature_folder(args, args.task, alone=True)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.verify:
        for part in PARTS:
            require_cache(cache_folder(args, part))
    if args.check:
        check_download(args)
    elif args.verify and not args.repair:
        verify_caches(args)
    else:
        extract_corpus(args)


def cache_folder(args: argparse.Namespace, part: str) -> Path:
    return args.features / part / args.feat


# ── Extraction ───────────────────────────────────────────────────────────────────────────────────


def extract_corpus(args: argparse.Namespace) -> None:
    device = devices.pick_device(ranks.gpu(args.gpu))
    args.precision = choose_precision(args, device)
    devices.set_precision(args.precision, device)
    corpus = {part: readable_trials(args, part) for part in PARTS}
    require_space(args, {part: len(trials) for part, (trials, _) in corpus.items()})
    n_clips = sum(len(trials) - len(absent) for trials, absent in corpus.values())
    devices.warn_of_cpu(args.gpu, n_clips / ranks.size() * frontends.GFLOP_A_CLIP[args.feat])
    front_end = frontends.load_frontend(args.feat, args.ssl, args.precision).to(device)
    require_size(args, front_end)
    for part, (trials, _) in corpus.items():  # dev's too, before train takes hours
        if not args.repair:
            refuse_other_cache(args, part, trials, front_end)
    for part, (trials, absent) in corpus.items():
        folder = cache_folder(args, part)
        with ranks.exclusive(folder):
            if ranks.is_first():
                prepare_cache(args, folder, trials, front_end)
            ranks.barrier()
            writer = open_cache(args, folder, trials, front_end, device)
            try:
                extract(args, part, writer, front_end, absent, device)
            finally:
                writer.close()
                if ranks.is_first() and not feature_cache.has_rows(folder):
                    feature_cache.remove(folder)


def require_size(args: argparse.Namespace, front_end: FrontEnd) -> None:
    """Raise InputError where no head here takes the front end's features, unless that is wanted."""
    wanted = dataset.FEATURE_SHAPES[args.feat][1]
    if front_end.dim != wanted and not args.any_size:
        raise InputError(
            f"--ssl {args.ssl}: its hidden states have {front_end.dim} values, the heads here take "
            f"{wanted} (XLS-R 300M); give other weights, or --any_size for a head of your own"
        )


def choose_precision(args: argparse.Namespace, device: torch.device) -> str:
    """--precision as given, else that of a cache which was begun, else the device's default."""
    default = devices.DEFAULT_PRECISION[device.type]
    if args.precision:
        return args.precision
    for part in PARTS:
        folder = cache_folder(args, part)
        recorded = feature_cache.recorded_precision(folder)
        if recorded in devices.PRECISIONS and recorded != default:
            cli.echo(f"{folder}: was begun with --precision {recorded} and goes on with it")
            return recorded
    return default


def readable_trials(args: argparse.Namespace, part: str) -> tuple[list[Trial], set[int]]:
    """The part's trials and the rows whose files are absent, which --skip_missing has to allow."""
    trials = dataset.read_protocol(args.task, args.path_to_database, part)
    missing = dataset.absent_trials(trials, args.skip_missing)
    return trials, {row for row, trial in enumerate(trials) if trial in missing}


def prepare_cache(
    args: argparse.Namespace, folder: Path, trials: list[Trial], front_end: FrontEnd
) -> None:
    """Make the cache if there is none; with --repair, mend its files and forget damaged rows."""
    if args.repair:
        for name in feature_cache.mend_files(folder, trials):
            cli.echo(f"{folder / name}: damaged; made anew")
    writer = open_cache(args, folder, trials, front_end)
    try:
        writer.layout.check_shards(np.arange(len(trials)))
        if not writer.records_resampler():
            require_16_khz(writer)
        if args.repair:
            writer.forget(verify(folder))
    finally:
        writer.close()


def require_16_khz(writer: CacheWriter) -> None:
    """Take over a cache that does not record its resampler if no clip in it went through one.

    Raises:
        InputError: a clip did, and the resampler of that time is not this program's.
    """
    done = np.flatnonzero(writer.states() == DONE)
    for row in tqdm(done, unit="file", desc="sampling rates", disable=not len(done)):
        cli.stop_if_asked()
        path = writer.trials[row].path
        rate = audio.sampling_rate(path)
        if rate not in (None, audio.SAMPLE_RATE):
            raise InputError(
                f"{writer.folder}: was made with an older resampler, and {path} is at {rate} Hz; "
                "move the cache away and run preprocess.py again"
            )
    feature_cache.record_resampler(writer.folder, None)


def open_cache(
    args: argparse.Namespace,
    folder: Path,
    trials: list[Trial],
    front_end: FrontEnd,
    device: torch.device | str = "cpu",
) -> CacheWriter:
    made_by, shape = describe_rows(args, front_end)
    about = {
        "task": args.task,
        "ssl": getattr(front_end, "ssl", None),
        "run": run_info(device),
    }
    return CacheWriter(folder, trials, made_by, shape, args.dtype, about)


def describe_rows(
    args: argparse.Namespace, front_end: FrontEnd
) -> tuple[dict[str, Any], tuple[int, int]]:
    """All that decides the features' values, and their shape (frames, dim)."""
    made_by = front_end.fingerprint() | {"precision": args.precision}
    return made_by, (dataset.FEATURE_SHAPES[args.feat][0], front_end.dim)


def refuse_other_cache(
    args: argparse.Namespace, part: str, trials: list[Trial], front_end: FrontEnd
) -> None:
    """Raise InputError where the part's folder holds features of something else."""
    made_by, shape = describe_rows(args, front_end)
    wanted = feature_cache.describe(trials, made_by, shape, args.dtype, {"task": args.task})
    ranks.broadcast(lambda: feature_cache.holds(cache_folder(args, part), wanted))


@dataclass(frozen=True)
class Plan:
    """What is left to extract of one part of a corpus."""

    batches: list[list[int]]  # this rank's rows, without the absent ones
    done: np.ndarray  # (N,) bool, the rows that the cache holds
    absent: set[int]  # rows that have neither a file nor a feature
    n_todo: int  # rows that all ranks have to do
    n_allowed: int  # failures, absent files among them, after which the run goes on


@dataclass
class Outcome:
    """What extraction came across."""

    failures: dict[int, str]  # row -> one line saying why it has no feature
    rates: Counter  # sampling rate in Hz -> number of files
    decoders: Counter  # what read them -> number of files


def extract(
    args: argparse.Namespace,
    part: str,
    writer: CacheWriter,
    front_end: FrontEnd,
    absent: set[int],
    device: torch.device,
) -> None:
    """Compute and store every row that the cache lacks; the ranks take the batches in turn.

    Args:
        absent: rows whose files are not there.

    Raises:
        InputError: more files than --max_failed allows cannot be read; finished rows are kept.
    """
    size = args.batch_size or devices.clips_a_batch(device)
    max_failed = 100 if args.skip_missing else args.max_failed
    plan = plan_extraction(writer, absent, size, max_failed)
    n_done = len(writer.trials) - plan.n_todo
    cli.echo(
        f"{args.task} {part}: {len(writer.trials)} clips, {n_done} of them done, {device} -> "
        f"{writer.folder}"
    )
    outcome = run_plan(plan, args, part, writer, front_end, size, device)
    finish(writer, outcome)


def plan_extraction(writer: CacheWriter, absent: set[int], size: int, max_failed: float) -> Plan:
    """What this rank has to do.

    Batches stay aligned to the protocol, so that a resumed run computes what an unbroken one does.
    """
    n_trials = len(writer.trials)
    done = writer.states() == DONE
    ranks.barrier()  # a rank that looked after another had written would count other batches
    todo = np.flatnonzero(~done)
    batches = []
    for first in np.unique(todo // size * size).tolist():
        rows = range(first, min(first + size, n_trials))
        batches.append([row for row in rows if row not in absent])
    # What was extracted stays, though its file is gone since.
    absent = {row for row in absent if not done[row]}
    own_batches = [batch for batch in ranks.shard(batches) if batch]
    n_allowed = int(n_trials * max_failed / 100) + len(absent)
    return Plan(own_batches, done, absent, len(todo), n_allowed)


def run_plan(
    plan: Plan,
    args: argparse.Namespace,
    part: str,
    writer: CacheWriter,
    front_end: FrontEnd,
    size: int,
    device: torch.device,
) -> Outcome:
    """Decode, compute and write this rank's batches; threads write while the next is computed."""
    outcome = Outcome({row: "absent" for row in plan.absent}, Counter(), Counter())
    n_finished, n_failed = ranks.SharedCounter(), ranks.SharedCounter()
    n_failed_here = 0
    paths = [trial.path for trial in writer.trials]
    dtype = torch.float16 if writer.layout.dtype == "float16" else torch.float32
    front_end.expect(len(paths))
    hide_bar = not plan.n_todo or not ranks.is_first()
    with (
        tqdm(total=plan.n_todo, unit="clip", desc=part, disable=hide_bar) as bar,
        Writes(writer) as writes,
    ):
        for batch in dataset.clip_batches(paths, plan.batches, args.num_workers):
            features = compute(front_end, batch.clips, size, device, dtype)
            failures = {row: why for row, why in batch.failures.items() if not plan.done[row]}
            outcome.failures |= failures
            outcome.rates.update(batch.rates)
            if failures:
                n_failed_here = n_failed.add(len(failures)) + len(plan.absent)
            if n_failed_here > plan.n_allowed:
                raise too_many_failed(n_failed_here, len(paths), args.max_failed, failures)
            positions = [i for i, row in enumerate(batch.rows) if not plan.done[row]]
            rows = [batch.rows[i] for i in positions]
            decoders = [batch.decoders[i] for i in positions]
            outcome.decoders.update(decoders)
            writer.note_rates(batch.rates)
            writer.note_decoders(rows, decoders)
            writes.add(rows, features, positions, list(failures))
            bar.update(n_finished.add(len(rows) + len(failures)) - bar.n)
        writes.wait()
        writer.mark_failed(sorted(plan.absent))
        writer.flush()
        ranks.barrier(lambda: bar.update(n_finished.add() - bar.n))
        bar.update(n_finished.add() - bar.n)
    return outcome


def too_many_failed(
    count: int, n_trials: int, max_failed: float, failures: dict[int, str]
) -> InputError:
    return InputError(
        f"{count} of {n_trials} files cannot be read, more than --max_failed {max_failed:g} %; the "
        f"last: {next(iter(failures.values()))}"
    )


def compute(
    front_end: FrontEnd,
    clips: Tensor,
    size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], np.ndarray]:
    """Start computing the features of clips (B, 64600).

    Args:
        size: clips are padded to batches of this size; see devices.pad_batch().
        dtype: of the features; a value beyond float16 becomes infinite, which the writer refuses.

    Returns:
        A function that waits for them: (B, frames, dim).
    """
    with devices.memory_advice(size), torch.inference_mode():
        features = front_end(devices.pad_batch(clips, size, device))[: len(clips)]
        return devices.copy_to_host(features.to(dtype))


class Writes:
    """Batches on their way into a cache: threads write while the next batch is computed."""

    def __init__(self, writer: CacheWriter):
        self.writer = writer
        self.threads = ThreadPoolExecutor(WRITING_THREADS)
        self.in_flight: deque[Future] = deque()

    def __enter__(self) -> Writes:
        return self

    def __exit__(self, *error: object) -> None:
        self.threads.shutdown()

    def add(
        self,
        rows: list[int],
        features: Callable[[], np.ndarray],
        positions: Sequence[int],
        failed: list[int],
    ) -> None:
        """Have a thread store() this batch, once fewer than WRITES_IN_FLIGHT are on their way.

        Raises what the batch waited for raised.
        """
        if len(self.in_flight) == WRITES_IN_FLIGHT:
            self.in_flight.popleft().result()
        batch = rows, features, positions, failed
        self.in_flight.append(self.threads.submit(store, self.writer, *batch))

    def wait(self) -> None:
        """Wait until all batches are written; raise what the first of them that failed raised."""
        while self.in_flight:
            self.in_flight.popleft().result()


def store(
    writer: CacheWriter,
    rows: list[int],
    features: Callable[[], np.ndarray],
    positions: Sequence[int],
    failed: list[int],
) -> None:
    """Write the rows whose features stand at these positions of a batch; mark those that failed."""
    values = features()
    if len(positions) < len(values):
        values = values[positions]
    writer.write(rows, values)
    writer.mark_failed(sorted(failed))
    writer.start_flush(FLUSH_EVERY)


def finish(writer: CacheWriter, outcome: Outcome) -> None:
    """Gather what the ranks came across; list it beside the cache and say it."""
    outcomes = ranks.gather_to_first(outcome)
    if not ranks.is_first():
        return
    joined = Outcome({}, Counter(), Counter())
    for of_rank in outcomes:
        joined.failures |= of_rank.failures
        joined.rates += of_rank.rates
        joined.decoders += of_rank.decoders
    writer.write_failures(joined.failures)
    if len(joined.failures) == len(writer.trials):
        raise InputError(
            f"{writer.folder}: none of its {len(writer.trials)} files can be read; the last: "
            f"{list(joined.failures.values())[-1]}"
        )
    report(writer, joined)


def report(writer: CacheWriter, outcome: Outcome) -> None:
    failures = outcome.failures
    for note in (
        dataset.describe_rates(outcome.rates),
        dataset.describe_decoders(outcome.decoders),
    ):
        if note:
            cli.echo(note)
    if failures:
        cli.echo(
            f"note: {len(failures)} files have no features and will not be trained on; "
            f"{writer.folder / 'failed.txt'} lists them"
        )
    layout = writer.layout
    frames, dim = layout.shape
    cli.echo(
        f"{writer.folder}: complete, {layout.rows - len(failures)} rows of {frames} x {dim} "
        f"{layout.dtype}, {layout.rows * layout.row_bytes / 1e9:.2f} GB"
    )


# ── Is the download whole? ──────────────────────────────────────────────────────────────────────


def check_download(args: argparse.Namespace) -> None:
    """Print what lies on the disk of a corpus, and "ready".

    Raises:
        InputError: files are absent or unreadable, or the features would not fit on the disk.
    """
    problems: list[str] = []
    rates: Counter = Counter()
    n_rows: dict[str, int] = {}
    for name in downloads.PUBLISHED[args.task]:
        try:
            part = downloads.inspect_part(args.task, args.path_to_database, name)
        except InputError as error:
            cli.echo(f"{name}: {error}")
            problems.append(f"{name} has no protocol that can be read")
            continue
        n_rows[name] = len(part.trials)
        cli.echo(describe_part(part))
        if part.missing and not part.lacks_only_what_is_not_distributed:
            problems.append(protocols.describe_missing(part.missing, len(part.trials)))
        rates_of_part, unreadable = read_sample(part, args)
        rates += rates_of_part
        for line in unreadable[:3]:
            cli.echo(f"{name}: {line}")
        if unreadable:
            problems.append(f"{len(unreadable)} files of {name} cannot be read")
    cli.echo(describe_release(args.task, rates))
    if args.task != "ITW":
        problems += check_space(args, n_rows)
    if problems:
        raise InputError(
            f"not ready: {'; '.join(problems)}; unpack the archives again (7z x on the last "
            "piece), or make space, then run this again"
        )
    cli.echo("ready")


def describe_part(part: downloads.Part) -> str:
    n_real, n_fake = part.counts
    n_present = len(part.trials) - len(part.missing)
    line = f"{part.name}: {n_real} real and {n_fake} fake rows"
    if (n_real, n_fake) == part.published:
        line += ", as published"
    else:
        line += f" (published: {part.published[0]} and {part.published[1]})"
    line += f"; {n_present} files present, {len(part.missing)} absent, {part.surplus} not named"
    if part.missing and part.lacks_only_what_is_not_distributed:
        line += "; its real files are not distributed (copyright)"
    return line


def read_sample(part: downloads.Part, args: argparse.Namespace) -> tuple[Counter, list[str]]:
    """Sampling rates in Hz -> files, and a line for each unreadable file, of a sample or of all."""
    paths = part.present
    if not args.all and len(paths) > CHECK_SAMPLE:
        paths = random.Random(0).sample(paths, CHECK_SAMPLE)
    failures, rates = dataset.read_every_file(paths, args.num_workers, part.name)
    return rates, list(failures.values())


def describe_release(task: str, rates: Counter) -> str:
    counts = ", ".join(f"{rate} Hz: {count}" for rate, count in sorted(rates.items()))
    line = f"sampling rates of the files read: {counts or 'none'}"
    if task == "codecfake" and rates:
        is_v1 = set(rates) == {audio.SAMPLE_RATE}
        line += "; release V1 (all at 16 kHz)" if is_v1 else "; release V2 (mixed rates)"
    return line


def check_space(args: argparse.Namespace, n_rows: dict[str, int]) -> list[str]:
    """Say what the features need and what is free; a line where it is too little.

    Args:
        n_rows: of each part whose protocol could be read.
    """
    needed, free, folder = space(args, n_rows)
    cli.echo(
        f"features of train and dev ({args.feat}, {args.dtype}): {needed / 1e9:.1f} GB still to "
        f"allocate, {free / 1e9:.1f} GB free under {folder}"
    )
    return [f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free"] if needed > free else []


def require_space(args: argparse.Namespace, n_rows: dict[str, int]) -> None:
    """Raise InputError where the disk has no room for the features of train and dev together."""
    needed, free, folder = space(args, n_rows)
    if needed > free:
        raise InputError(
            f"{folder}: the features of train and dev need {needed / 1e9:.1f} GB more, "
            f"{free / 1e9:.1f} GB are free; free some space, choose another disk with -f (-f1 for "
            f"19LA), or store 8 bits (--dtype {feature_cache.EIGHT_BITS[args.feat]})"
        )


def space(args: argparse.Namespace, n_rows: dict[str, int]) -> tuple[int, int, Path]:
    """Bytes that the features still have to be given, bytes that are free, and where."""
    needed = 0
    row = feature_cache.row_type(args.dtype, dataset.FEATURE_SHAPES[args.feat]).itemsize
    for part in PARTS:
        shards = cache_folder(args, part).glob("features_*.npy")
        allocated = sum(512 * shard.stat().st_blocks for shard in shards)  # they are sparse
        needed += max(0, n_rows.get(part, 0) * row - allocated)
    folder = args.features.absolute()
    while not folder.exists():
        folder = folder.parent
    return needed, shutil.disk_usage(folder).free, folder


# ── Verification ─────────────────────────────────────────────────────────────────────────────────


def require_cache(folder: Path) -> None:
    if not (folder / "cache.json").exists():
        raise InputError(
            f"{folder}: no feature cache to verify; run preprocess.py without --verify first"
        )


def verify_caches(args: argparse.Namespace) -> None:
    """Raise InputError unless every row of both parts is there and undamaged."""
    if not ranks.is_first():
        return
    folders = [cache_folder(args, part) for part in PARTS]
    damaged = [verify(folder) for folder in folders]
    if any(damaged):
        raise InputError(
            "the cache is damaged as listed above; add --repair to extract those rows anew"
        )
    for folder in folders:
        FeatureCache(folder).require_complete()


def verify(folder: Path) -> list[int]:
    """Read every row back; print and return those that are damaged."""
    cache = FeatureCache(folder)
    with tqdm(range(len(cache.states)), unit="row", desc=f"verify {folder.parent.name}") as rows:
        damaged = cache.damaged_rows(rows)
    cache.layout.close()
    for row in damaged:
        cli.echo(f"{folder}: row {row} ({cli.printable(cache.all_names[row])}) is damaged")
    line = f"{folder}: {len(cache.states)} rows, {len(damaged)} damaged"
    for state, what in ((NOT_YET, "not extracted yet"), (FAILED, "failed")):
        count = int((cache.states == state).sum())
        if count:
            line += f", {count} {what}"
    cli.echo(line)
    return damaged


if __name__ == "__main__":
    ranks.run(main, if_stopped="run the same command again to go on; finished rows are kept")
