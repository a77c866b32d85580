"""Score a corpus, or a person's own recordings, with trained heads.

    python generate_score.py -t codecfake       # and 19LA, ITW; the head in models/try
    python generate_score.py -t 19LA --model_folder models/a models/b --result_folder result
    python generate_score.py -t audio --path recording.mp3 folder/

Reads protocols and audio under -d, writes `<result_folder>/<subset>_result.txt`, one line a trial:
name, score, label. The score is the probability of bona fide speech, softmax(logits)[real]; higher
is more real. Several models share one pass over the audio, each with a folder of its own.
"""

from __future__ import annotations

from runtime import cli

if __name__ == "__main__":
    cli.end_quietly_if_stopped()  # the imports below take seconds

import argparse
import hashlib
import json
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import dataset
import frontends
import model
from dataset import FAKE, REAL, ClipBatch, Trial
from formats import audio, partial_scores, protocols, score_files, torch_files
from formats.audio import Inspection
from formats.partial_scores import Kept
from frontends import DEFAULT_SSL, FrontEnd
from runtime import devices, ranks
from runtime.cli import InputError
from runtime.files import atomic_write
from runtime.provenance import run_info

RECORDINGS = set(
    ".wav .flac .ogg .oga .opus .mp3 .aif .aiff .au .caf .m4a .mp4 .aac .webm .wma .mka .amr .3gp "
    ".w64 .sph .wv .dat .m4b .mp2 .ac3 .ape .tta .snd .voc .mov .avi .ts".split()
)
KEEP_EVERY = 600  # seconds; what a kill in the middle of a subset costs at most
THRESHOLD = 0.5  # of the verdict on a person's own recordings


# ── Command line ─────────────────────────────────────────────────────────────────────────────────


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "-t",
        "--task",
        choices=("19LA", "ITW", "codecfake", "audio"),
        required=True,
        help="what to score",
    )
    add(
        "-d",
        "--path_to_database",
        type=Path,
        metavar="DIR",
        help="the corpus (default: data/Codecfake, data/LA or data/ITW)",
    )
    add(
        "--path",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE|FOLDER",
        help="recordings of -t audio",
    )
    add(
        "--subset",
        nargs="+",
        action="extend",
        choices=protocols.CODECFAKE_SUBSETS,
        help="only these subsets of -t codecfake",
    )
    add(
        "--model_folder",
        type=Path,
        nargs="+",
        action="extend",
        metavar="DIR",
        help=f"trained or released heads (default: {cli.MODEL_FOLDER})",
    )
    add(
        "--ssl",
        metavar="ID|DIR",
        help="wav2vec 2.0 weights (default: those the head was trained with)",
    )
    add(
        "--skip_missing",
        action="store_true",
        help="go on without audio that is absent or unreadable; it is listed beside the scores",
    )
    _add_output_options(parser.add_argument_group("output"))
    devices.add_options(parser, "arithmetic")
    return parser


def _add_output_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--result_folder",
        type=Path,
        metavar="DIR",
        help=f"where score files go (default: {cli.RESULT_FOLDER}; -t audio writes none unless "
        "given)",
    )
    add(
        "--llr",
        action="store_true",
        help="write the difference of the logits, which does not saturate, instead of the "
        "probability",
    )
    add("--overwrite", action="store_true", help="score subsets again whose score files are there")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = get_parser()
    args = parser.parse_args(argv)
    if (args.task == "audio") != bool(args.path):
        parser.error("-t audio and --path go together")
    if args.subset and args.task != "codecfake":
        parser.error("--subset names subsets of -t codecfake")
    args.path_to_database = args.path_to_database or cli.CORPUS_FOLDERS.get(args.task)
    args.model_folder = args.model_folder or [cli.MODEL_FOLDER]
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    heads = load_heads(args.model_folder)
    if args.task == "audio":
        score_recordings(args, heads)
    else:
        score_corpus(args, heads)


def load_heads(folders: Sequence[Path]) -> dict[str, nn.Module]:
    """Each head under the shortest name that tells its folder from the others'."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise InputError("--model_folder names the same folder twice")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    names = ["_".join(path.parts[-length:]).strip("/") for path in paths]
    return {name: model.load_head(folder) for name, folder in zip(names, folders, strict=True)}


# ── From clips to logits ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Part:
    """What this rank scores of one list of files."""

    label: str  # on the progress bar
    files: Sequence[str]  # the whole list's paths
    rows: range  # the whole list's, among the files of all parts
    batches: list[Sequence[int]]  # rows of this rank


@dataclass
class Scored:
    """What came of one list of N files."""

    logits: np.ndarray  # (N, heads, 2) float64, NaN where a file could not be read
    failures: dict[int, str] = field(default_factory=dict)  # position in the list -> reason
    rates: Counter = field(default_factory=Counter)  # sampling rate in Hz -> number of files
    decoders: list[str] = field(default_factory=list)  # what read each file; empty: unknown yet

    @classmethod
    def nothing(cls, n_files: int, n_heads: int) -> Scored:
        """Of files that are still to be scored."""
        return cls(np.full((n_files, n_heads, 2), np.nan), decoders=[""] * n_files)

    @property
    def known(self) -> np.ndarray:
        """(N,) whether all heads' logits of a file are known."""
        return ~np.isnan(self.logits).any(axis=(1, 2))


Keep = Callable[[str, Scored], None]


class Scorer:
    """Several heads behind as few front ends as they need.

    Logits are computed in batches of one shape, padded with silence, so that a clip's score depends
    neither on the clips beside it nor on an interruption.
    """

    def __init__(self, args: argparse.Namespace, heads: dict[str, nn.Module]):
        self.device = devices.pick_device(ranks.gpu(args.gpu))
        self.precision = args.precision or devices.DEFAULT_PRECISION[self.device.type]
        devices.set_precision(self.precision, self.device)
        self.batch_size = args.batch_size or devices.clips_a_batch(self.device)
        self.heads = [head.to(self.device) for head in heads.values()]
        self.front_ends: dict[tuple[str, str | None], FrontEnd] = {}
        self.front_end_of = [self._front_end(name, head, args.ssl) for name, head in heads.items()]
        # What kept scores are bound to; a digest reads all weights, so each is made once.
        self.made_by = list(map(self._made_by, self.heads, self.front_end_of))

    def gflop_a_clip(self) -> float:
        of_heads = sum(model.GFLOP_A_CLIP[head.name, head.feat] for head in self.heads)
        return of_heads + sum(frontends.GFLOP_A_CLIP[feat] for feat, _ in self.front_ends)

    def _front_end(self, name: str, head: nn.Module, ssl: str | None) -> tuple[str, str | None]:
        """The key of the head's front end, loaded once and held against the head's own record."""
        source = None
        if head.feat != "mel":
            source = ssl or head.info.get("ssl") or DEFAULT_SSL
        key = head.feat, source
        if key not in self.front_ends:
            front_end = self._load_front_end(name, head, source, recorded=not ssl)
            self.front_ends[key] = front_end.to(self.device)
        if source and not head.info.get("front_end"):
            cli.echo(
                f"note: {name}: these weights do not record their front end; nothing can check "
                f"that it was {source}"
            )
        fingerprint = self.front_ends[key].fingerprint()
        for what, trained_on in head.info.get("front_end", {}).items():
            if fingerprint.get(what, trained_on) != trained_on:
                raise InputError(
                    f"{name}: was trained on features with {what} {trained_on}, "
                    f"{source or head.feat} gives {fingerprint[what]}; give the same wav2vec 2.0 "
                    "weights with --ssl"
                )
        return key

    def _load_front_end(
        self, name: str, head: nn.Module, source: str | None, recorded: bool
    ) -> FrontEnd:
        """The front end of a head; where its weights are not found, say who named them."""
        try:
            return frontends.load_frontend(head.feat, source, self.precision)
        except InputError as error:
            if not recorded or source is None:
                raise
            where = f"recorded in {name}" if head.info.get("ssl") else "the default"
            raise InputError(f"{error} (that is {where}; --ssl names another)") from error

    def _made_by(self, head: nn.Module, key: tuple[str, str | None]) -> str:
        """All that decides a head's logits."""
        about = {
            "weights": torch_files.digest(head),
            "front_end": self.front_ends[key].fingerprint(),
            "precision": self.precision,
            "resampler": audio.RESAMPLER,
        }
        return json.dumps(about, sort_keys=True)

    @torch.inference_mode()
    def start(self, clips: Tensor) -> Callable[[], np.ndarray]:
        """Start computing the logits of clips (B, 64600), B up to the batch size.

        Returns:
            A function that waits for them: (B, heads, 2) float64.
        """
        with devices.memory_advice(self.batch_size):
            padded = devices.pad_batch(clips, self.batch_size, self.device)
            features = {key: front_end(padded) for key, front_end in self.front_ends.items()}
            # Heads stay in float32: under bfloat16 autocast their log odds move by up to 0.7.
            logits = [
                head(features[key].float())[1]
                for head, key in zip(self.heads, self.front_end_of, strict=True)
            ]
            stacked = torch.stack(logits, dim=1)
            if self.precision == "fp16":  # a head's maxima may hide an infinity
                for values in features.values():
                    finite = torch.isfinite(values).flatten(1).all(dim=1)
                    stacked = stacked.where(finite[:, None, None], torch.nan)
        return devices.copy_to_host(stacked[: len(clips)].double())

    def score_files(
        self, lists: dict[str, Sequence[str]], num_workers: int, keep: Keep | None = None
    ) -> Iterator[Scored]:
        """Score lists of audio files; the ranks share the files.

        Each distinct clip is computed once: C1..C6, whose real clips are the same files, share
        them. The decoding workers start once for all lists, which takes a second, and read ahead
        across their ends.

        Args:
            lists: paths, under the name on the progress bar.
            keep: is handed the name of a list and this rank's scores of it, every KEEP_EVERY
                seconds and when an error or a signal ends the run.

        Yields:
            A Scored for each list, the same on all ranks.
        """
        paths = [path for files in lists.values() for path in files]
        plan = self._plan(lists, paths)
        batches = [batch for part in plan for batch in part.batches]
        decoded = dataset.clip_batches(paths, batches, num_workers, with_digests=True)
        computed = _Computed(self.start, self.batch_size)
        for part in plan:
            yield gather(self._score_part(part, decoded, computed, keep))

    def _plan(self, lists: dict[str, Sequence[str]], paths: Sequence[str]) -> list[Part]:
        plan, start = [], 0
        for label, files in lists.items():
            rows = range(start, start + len(files))
            shard = self._shard(rows, paths)
            firsts = range(0, len(shard), self.batch_size)
            batches = [shard[first : first + self.batch_size] for first in firsts]
            plan.append(Part(label, files, rows, batches))
            start = rows.stop
        return plan

    def _shard(self, rows: range, paths: Sequence[str]) -> Sequence[int]:
        """This rank's rows: by file name, so that the rank that scored a clip meets it again."""
        if ranks.size() == 1:
            return rows
        return [row for row in rows if _rank_of(paths[row]) == ranks.rank()]

    def _score_part(
        self,
        part: Part,
        decoded: Iterator[ClipBatch],
        computed: _Computed,
        keep: Keep | None,
    ) -> Scored:
        """This rank's rows of one list; the logits of the others are NaN."""
        scored = Scored.nothing(len(part.rows), len(self.heads))
        digests: list[bytes | None] = [None] * len(part.rows)  # of each file's clip
        kept_at = time.monotonic()
        n_finished = ranks.SharedCounter()

        def keep_what_is_known() -> None:
            if keep:
                computed.fill(scored, digests)
                keep(part.label, scored)

        with tqdm(
            total=len(part.rows), unit="clip", desc=part.label, disable=not ranks.is_first()
        ) as bar:
            try:
                for _ in part.batches:
                    batch = next(decoded)
                    self._take(part, batch, scored, digests, computed)
                    bar.update(n_finished.add(len(batch.rows) + len(batch.failures)) - bar.n)
                    if time.monotonic() - kept_at > KEEP_EVERY:
                        keep_what_is_known()
                        kept_at = time.monotonic()
                computed.finish()
            except BaseException:
                keep_what_is_known()
                raise
            ranks.barrier(lambda: bar.update(n_finished.add() - bar.n))
            bar.update(n_finished.add() - bar.n)
        computed.fill(scored, digests)
        for position, digest in enumerate(digests):
            if digest is not None and np.isnan(scored.logits[position]).any():
                scored.failures[position] = self._refusal(part.files[position])
        return scored

    def _take(
        self,
        part: Part,
        batch: ClipBatch,
        scored: Scored,
        digests: list[bytes | None],
        computed: _Computed,
    ) -> None:
        """Note what was decoded, and hand its clips on."""
        scored.rates.update(batch.rates)
        for row, reason in batch.failures.items():
            scored.failures[row - part.rows.start] = reason
            tqdm.write(cli.printable(f"{part.label}: {reason}"), file=sys.stderr)
        for number, row in enumerate(batch.rows):
            position = row - part.rows.start
            scored.decoders[position] = sys.intern(batch.decoders[number])
            digests[position] = batch.digests[number]
            computed.add(batch.digests[number], batch.clips[number])

    def _refusal(self, path: str) -> str:
        """One line about a file whose logits are NaN."""
        advice = "check the file"
        if self.precision == "fp16":
            advice = "fp16 ends at 65504: give --precision bf16 or fp32"
        return f"{path}: not scored, its features or logits are not finite; {advice}"


class _Computed:
    """The logits of every distinct clip; a GPU computes one batch while the next is gathered.

    Args:
        start: Scorer.start().
        batch_size: clips that are computed together.
    """

    def __init__(self, start: Callable[[Tensor], Callable[[], np.ndarray]], batch_size: int):
        self._start, self._batch_size = start, batch_size
        self._logits: dict[bytes, np.ndarray | None] = {}  # None: not computed yet
        self._waiting: dict[bytes, Tensor] = {}
        self._started: tuple[list[bytes], Callable[[], np.ndarray]] | None = None

    def add(self, digest: bytes, clip: Tensor) -> None:
        """Have a clip computed that is not known yet."""
        if digest in self._logits:
            return
        self._logits[digest] = None
        self._waiting[digest] = clip
        if len(self._waiting) == self._batch_size:
            self._start_batch()

    def finish(self) -> None:
        """Compute what waits, and wait for all."""
        if self._waiting:
            self._start_batch()
        self._settle()

    def fill(self, scored: Scored, digests: Sequence[bytes | None]) -> None:
        """Put what is known of each file's clip into its row."""
        for position, digest in enumerate(digests):
            logits = self._logits.get(digest)
            if logits is not None:
                scored.logits[position] = logits

    def _start_batch(self) -> None:
        digests, clips = list(self._waiting), torch.stack(list(self._waiting.values()))
        self._waiting.clear()
        wait = self._start(clips)
        self._settle()  # the batch before, while this one is computed
        self._started = digests, wait

    def _settle(self) -> None:
        if self._started:
            digests, wait = self._started
            self._started = None
            self._logits.update(zip(digests, wait(), strict=True))


def _rank_of(path: str) -> int:
    return zlib.crc32(os.fsencode(os.path.basename(path))) % ranks.size()


def gather(scored: Scored) -> Scored:
    """All ranks' results of one list as one; each file is one rank's, NaN on the others."""
    joined = Scored.nothing(len(scored.logits), scored.logits.shape[1])
    for of_rank in ranks.gather(scored):
        np.copyto(joined.logits, of_rank.logits, where=~np.isnan(of_rank.logits))
        joined.failures |= of_rank.failures
        joined.rates += of_rank.rates
        for position, decoder in enumerate(of_rank.decoders):
            joined.decoders[position] = decoder or joined.decoders[position]
    joined.failures = dict(sorted(joined.failures.items()))
    return joined


def to_scores(logits: np.ndarray, llr: bool) -> np.ndarray:
    """Logits (N, 2) float64 -> (N,): the probability of real, or the log-likelihood ratio."""
    difference = logits[:, REAL] - logits[:, FAKE]
    if llr:
        return difference
    with np.errstate(over="ignore"):  # of log odds below -709 the probability is 0
        return 1 / (1 + np.exp(-difference))


# ── Corpora ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Subset:
    """One score file to be."""

    name: str
    trials: list[Trial]  # those with audio
    absent: list[Trial]

    @property
    def score_file(self) -> str:
        return f"{self.name}_result.txt"


@dataclass(frozen=True)
class Target:
    """A head, and the folder that its score files go to."""

    head: nn.Module
    folder: Path
    contents: str  # what its score files hold, in words that differ where the scores would


def score_corpus(args: argparse.Namespace, heads: dict[str, nn.Module]) -> None:
    result = args.result_folder or cli.RESULT_FOLDER
    targets = [
        Target(head, result / name if len(heads) > 1 else result, describe_contents(head, args.llr))
        for name, head in heads.items()
    ]
    subsets = open_subsets(args)
    for target in targets:
        refuse_other_scores(target, [subset.score_file for subset in subsets], args.overwrite)
    if not args.overwrite:
        finished = ranks.broadcast(lambda: [s.name for s in subsets if is_finished(s, targets)])
        subsets = [subset for subset in subsets if subset.name not in finished]
    if not subsets:
        cli.echo(f"nothing to do: all score files are in {result}; --overwrite scores again")
        return
    cli.how_to_go_on("run the same command again to go on; scores are kept")
    with ranks.exclusive(result):
        scorer = Scorer(args, heads)
        n_clips = sum(len(subset.trials) for subset in subsets)
        names = ", ".join(subset.name for subset in subsets)
        devices.warn_of_cpu(args.gpu, n_clips / ranks.size() * scorer.gflop_a_clip())
        cli.echo(f"{', '.join(heads)}: {n_clips} clips of {names}, {scorer.device} -> {result}")
        kept = {subset.name: read_kept(subset, targets, scorer) for subset in subsets}
        lists = {
            subset.name: [subset.trials[row].path for row in unknown_rows(kept[subset.name])]
            for subset in subsets
        }
        by_name = {subset.name: subset for subset in subsets}

        def keep(name: str, scored: Scored) -> None:
            keep_scores(by_name[name], with_kept(scored, kept[name]), targets, scorer)

        n_unreadable = 0
        scored_lists = scorer.score_files(lists, args.num_workers, keep)
        for subset, scored in zip(subsets, scored_lists, strict=True):
            scored = with_kept(scored, kept[subset.name])
            n_unreadable += finish_subset(args, subset, scored, targets, scorer)
    if n_unreadable:
        raise InputError(
            f"{n_unreadable} files cannot be read, as listed above; mend them and run the same "
            "command again, which keeps all other scores, or add --skip_missing"
        )


def read_kept(subset: Subset, targets: Sequence[Target], scorer: Scorer) -> Scored:
    """What an earlier run kept of all heads; NaN for the other trials."""
    found = Scored.nothing(len(subset.trials), len(targets))
    stores: list[dict[str, Kept]] = []
    for target, made_by in zip(targets, scorer.made_by, strict=True):
        stores.append({})
        for path in partial_scores.partial_paths(target.folder, subset.name):
            stores[-1] |= partial_scores.read_partial(path, made_by)
    if not all(stores):
        return found
    for row, trial in enumerate(subset.trials):
        key = partial_scores.key_of(trial)
        for number, store in enumerate(stores):
            if key in store:
                found.logits[row, number] = store[key].logits
                found.decoders[row] = store[key].decoder
    found.logits[~found.known] = np.nan
    return found


def keep_scores(subset: Subset, scored: Scored, targets: Sequence[Target], scorer: Scorer) -> None:
    """Store what is known of a subset that is not finished, for the next run."""
    rows = np.flatnonzero(scored.known).tolist()
    keys = {row: partial_scores.key_of(subset.trials[row]) for row in rows}
    for number, target in enumerate(targets):
        path = partial_scores.partial_path(target.folder, subset.name, ranks.rank())
        known = {keys[row]: Kept(scored.logits[row, number], scored.decoders[row]) for row in rows}
        partial_scores.write_partial(path, scorer.made_by[number], known)


def unknown_rows(scored: Scored) -> np.ndarray:
    """Trials that are still to be scored."""
    return np.flatnonzero(~scored.known)


def with_kept(scored: Scored, kept: Scored) -> Scored:
    """What was scored of the unknown rows, put beside the rows that were kept."""
    rows = unknown_rows(kept)
    logits = kept.logits.copy()
    logits[rows] = scored.logits
    failures = {int(rows[position]): why for position, why in scored.failures.items()}
    decoders = list(kept.decoders)
    for row, decoder in zip(rows.tolist(), scored.decoders, strict=True):
        decoders[row] = decoder
    return Scored(logits, failures, scored.rates, decoders)


def finish_subset(
    args: argparse.Namespace,
    subset: Subset,
    scored: Scored,
    targets: Sequence[Target],
    scorer: Scorer,
) -> int:
    """Write a subset's score files, or keep its scores where files cannot be read.

    Returns:
        How many files keep it from being finished.
    """
    n_blocking = 0 if args.skip_missing else len(scored.failures)
    if n_blocking:
        cli.echo(
            f"{subset.name}: {n_blocking} files cannot be read, first "
            f"{next(iter(scored.failures.values()))}; the other scores are kept for the next run"
        )
    decoders = Counter(filter(None, scored.decoders))
    for note in (dataset.describe_rates(scored.rates), dataset.describe_decoders(decoders)):
        if note:
            cli.echo(note)
    if not ranks.is_first():
        return n_blocking
    if n_blocking:
        keep_scores(subset, scored, targets, scorer)
        return n_blocking
    for number, target in enumerate(targets):
        about = describe_scores(args, target.head, scorer)
        about["decoders"] = dict(decoders)
        write_subset(args, target, subset, scored.logits[:, number], scored.failures, about)
        for path in partial_scores.partial_paths(target.folder, subset.name):
            path.unlink()
    return 0


def open_subsets(args: argparse.Namespace) -> list[Subset]:
    """Every subset asked for, its audio looked up before anything is computed."""
    subsets = []
    for name, part in protocols.SCORED[args.task].items():
        if args.subset and name not in args.subset:
            continue
        trials = dataset.read_protocol(args.task, args.path_to_database, part)
        names = [trial.name for trial in trials]
        score_files.check_names(f"{args.path_to_database}, {name}", names)
        missing = ranks.broadcast(lambda trials=trials: protocols.find_missing(trials))
        absent = set(missing)
        present = [trial for trial in trials if trial not in absent]
        if missing:
            explain_missing(args, name, trials, present, missing)
        subsets.append(Subset(name, present, missing))
    return subsets


def explain_missing(
    args: argparse.Namespace,
    name: str,
    trials: list[Trial],
    present: list[Trial],
    missing: list[Trial],
) -> None:
    """Say what is absent; stop unless that is expected or allowed."""
    if name == "A3" and lacks_its_real_half(present, missing):
        cli.echo(
            f"A3: its {len(missing)} real files are not distributed (copyright); scoring its "
            f"{len(present)} fakes alone, so it will have no EER"
        )
        return
    line = f"{name}: {protocols.describe_missing(missing, len(trials))}"
    if args.skip_missing and present:
        cli.echo(f"note: {line}; going on without them")
        return
    advice = "give the corpus's folder with -d"
    if args.task == "codecfake":
        advice = "leave the subset out with --subset"
    if present:
        advice += ", or go on without them with --skip_missing"
    raise InputError(f"{line}; fetch them, {advice}")


def lacks_its_real_half(present: list[Trial], missing: list[Trial]) -> bool:
    labels_present = {trial.label for trial in present}
    labels_missing = {trial.label for trial in missing}
    return labels_present == {FAKE} and labels_missing == {REAL}


def describe_contents(head: nn.Module, llr: bool) -> str:
    """What a score file of this head holds, in words that differ where the scores would."""
    kind = "logit differences" if llr else "probabilities"
    return f"{kind} of the weights {torch_files.digest(head)[:16]}"


def refuse_other_scores(target: Target, wanted: Sequence[str], overwrite: bool) -> None:
    """Raise InputError where another model's score files would be taken for these.

    Those that only lie beside them are named.
    """
    folder = target.folder
    score_files.read_checksums(folder)  # damaged, it would be noticed only after hours
    others = {
        file: contents
        for file, contents in score_files.made_of(folder).items()
        if contents != target.contents and (folder / file).exists()
    }
    for file, contents in others.items():
        if file in wanted and not overwrite:
            raise InputError(
                f"{folder / file}: holds {contents}, asked for are {target.contents}; give another "
                "--result_folder, or --overwrite"
            )
    beside = [file for file in others if file not in wanted]
    if beside:
        cli.echo(
            f"note: {folder}: {', '.join(beside)} there hold {others[beside[0]]}, not "
            f"{target.contents} as what is written now"
        )


def is_finished(subset: Subset, targets: Sequence[Target]) -> bool:
    return all((target.folder / subset.score_file).exists() for target in targets)


def write_subset(
    args: argparse.Namespace,
    target: Target,
    subset: Subset,
    logits: np.ndarray,
    failures: dict[int, str],
    about: dict[str, object],
) -> None:
    """Write one head's score file, the list of trials it lacks, and its provenance.

    Args:
        logits: (trials, 2).
        failures: number of a trial -> why it has no score.
        about: for provenance.json.
    """
    folder = target.folder
    folder.mkdir(parents=True, exist_ok=True)
    n_missing = write_missing(folder, subset, failures)
    rows = [row for row in range(len(subset.trials)) if row not in failures]
    trials = [subset.trials[row] for row in rows]
    words = protocols.LABEL_WORDS[args.task]
    path = folder / subset.score_file
    text = score_files.format_scores(
        path,
        [trial.name for trial in trials],
        to_scores(logits[rows], args.llr),
        [words[trial.label] for trial in trials],
    )
    if score_files.made_of(folder).get(path.name, target.contents) != target.contents:
        path.unlink(missing_ok=True)  # a kill must not leave it under the name of these weights
    score_files.write_trials(path, trials)
    # The checksum first: killed in between, there is no score file, and the subset is scored again.
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    score_files.write_provenance(folder, about, target.contents, path.name, sha256)
    with atomic_write(path) as file:
        file.write(text)
    line = f"{path}: {len(rows)} scores"
    if n_missing:
        line += f", {n_missing} trials without one are listed in {subset.name}_missing.txt"
    cli.echo(line)


def write_missing(folder: Path, subset: Subset, failures: dict[int, str]) -> int:
    """List the trials without a score, or remove the list where there are none; return how many."""
    path = folder / f"{subset.name}_missing.txt"
    lines = [f"{trial.name} absent\n" for trial in subset.absent]
    for row, reason in sorted(failures.items()):
        lines.append(f"{subset.trials[row].name} {cli.printable(reason)}\n")
    if lines:
        with atomic_write(path) as file:
            file.writelines(lines)
    else:
        path.unlink(missing_ok=True)
    return len(lines)


def describe_scores(args: argparse.Namespace, head: nn.Module, scorer: Scorer) -> dict[str, object]:
    """What made the scores, for provenance.json."""
    return {
        "head": head.name,
        "feat": head.feat,
        "scores": "logit difference" if args.llr else "softmax(logits)[real]",
        "precision": scorer.precision,
        "resampler": audio.RESAMPLER,
        "model": head.info,
        "run": run_info(scorer.device),
    }


# ── A person's own recordings ────────────────────────────────────────────────────────────────────


def score_recordings(args: argparse.Namespace, heads: dict[str, nn.Module]) -> None:
    """Print one line a recording and model; with --result_folder write a score file as well.

    Raises:
        InputError: some recordings could not be read; the others are scored first.
    """
    paths = find_recordings(args.path)
    scorer = Scorer(args, heads)
    scored = next(scorer.score_files({"audio": paths}, args.num_workers))
    if not ranks.is_first():
        return
    rows = [row for row in range(len(paths)) if row not in scored.failures]
    readable = [paths[row] for row in rows]
    found = [look_at(path) for path in readable]
    judged = [number for number, one in enumerate(found) if not one.nothing_to_judge]
    for number, (name, head) in enumerate(heads.items()):
        logits = scored.logits[rows, number]
        print_verdicts(name, head, readable, to_scores(logits, llr=False), found)
        if args.result_folder:
            folder = args.result_folder / name if len(heads) > 1 else args.result_folder
            paths_judged = [readable[number] for number in judged]
            write_recordings(folder, paths_judged, to_scores(logits[judged], args.llr))
    for reason in scored.failures.values():
        print(cli.printable(f"not scored: {reason}"), file=sys.stderr)
    if scored.failures:
        raise InputError(
            f"{len(scored.failures)} of {len(paths)} recordings were not scored, as listed above"
        )


def find_recordings(given: Sequence[Path]) -> list[str]:
    """The files themselves, and every recording below the folders, in order."""
    paths: list[str] = []
    for path in given:
        if path.is_dir():
            paths += _recordings_below(path)
        elif path.exists():
            paths.append(str(path))
        else:
            raise InputError(f"{path}: no such file or folder")
    return list(dict.fromkeys(paths))


def _recordings_below(folder: Path) -> list[str]:
    """Recordings in a folder and below, linked folders too; what is left out is said."""
    paths: list[str] = []
    left_out: Counter = Counter()
    visited: set[str] = set()
    for place, below, names in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if name != "__MACOSX"]
        if os.path.realpath(place) in visited:  # a link to a folder above leads round and round
            below.clear()
            continue
        visited.add(os.path.realpath(place))
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("._"):
                left_out["._* (a Mac's notes)"] += 1
            elif suffix in RECORDINGS and os.path.isfile(f"{place}/{name}"):
                paths.append(os.path.join(place, name))
            else:
                left_out[suffix or "no suffix"] += 1
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        cli.echo(f"note: {folder}: left out {kinds}")
    if not paths:
        raise InputError(
            f"{folder}: expected recordings in this folder ({', '.join(sorted(RECORDINGS))}), "
            "found none"
        )
    return sorted(paths)


def write_recordings(folder: Path, paths: Sequence[str], scores: np.ndarray) -> None:
    """`audio_result.txt`: paths are percent-encoded, since a score file's names hold no blanks."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [quote(os.fsencode(path)) for path in paths]
    labels = [score_files.UNLABELLED] * len(paths)
    score_files.write_scores(folder / "audio_result.txt", names, scores, labels)
    cli.echo(f"{folder / 'audio_result.txt'}: {len(paths)} scores")


def look_at(path: str) -> Inspection:
    """audio.inspect(); a fault behind the part that is judged becomes a note."""
    try:
        return audio.inspect(path)
    except InputError as error:
        return Inspection(None, None, str(error))


def print_verdicts(
    name: str,
    head: nn.Module,
    paths: Sequence[str],
    scores: np.ndarray,
    found: Sequence[Inspection],
) -> None:
    width = max((len(path) for path in paths), default=0)
    cli.echo(f"{name}: {head.name} on {head.feat}, {describe_training(head.info)}.")
    for path, score, one in zip(paths, scores, found, strict=True):
        cli.echo(f"{path:<{width}}  {describe_verdict(score, one)}")


def describe_verdict(score: float, found: Inspection) -> str:
    """Duration, score and verdict of one recording, or why there is none."""
    duration = f"{'damaged':>10}" if found.seconds is None else f"{found.seconds:8.2f} s"
    if found.nothing_to_judge:
        return f"{duration}  nothing to judge: {found.nothing_to_judge}"
    line = f"{duration}  {score:.6f}  {_verdict(score)}"
    return f"{line}  ({found.note})" if found.note else line


def _verdict(score: float) -> str:
    return "real" if score > THRESHOLD else "fake"


def describe_training(info: dict) -> str:
    """The sentence a verdict has to be read with."""
    about = {
        "19LA": "trained on ASVspoof2019 LA (text-to-speech and voice conversion of 2019)",
        "codecfake": "trained on Codecfake (speech from six neural codecs)",
        "co-train": "trained on Codecfake and ASVspoof2019 LA",
    }
    trained = info.get("trained", "trained on unknown data")
    return (
        f"{about.get(info.get('train_task'), trained)}. The score is its probability of bona fide "
        "speech from the first 4.04 s; on other kinds of fakes, languages or channels it can be "
        "wrong without showing it"
    )


if __name__ == "__main__":
    ranks.run(main, if_stopped="run the same command again")
