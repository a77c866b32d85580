"""Score a corpus, or a person's own recordings, with trained heads.

    python generate_score.py -t codecfake       # and 19LA, ITW; the head in models/try
    python generate_score.py -t 19LA --model_folder models/a models/b --result_folder result
    python generate_score.py -t audio --path recording.mp3 folder/

Reads protocols and audio under -d, writes `<result_folder>/<subset>_result.txt`, one line a trial: name,
score, label. The score is the probability of bona fide speech, softmax(logits)[real]; higher is more
real. Several models share one pass over the audio, each with a folder of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from urllib.parse import quote

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

import dataset
import frontends
import model
from dataset import FAKE, REAL, Trial
from formats import protocols, score_files, torch_files
from runtime import cli, devices, files, ranks
from runtime.cli import InputError

CORPUS_FOLDERS = {
    "19LA": Path("data/LA"),
    "ITW": Path("data/ITW"),
    "codecfake": Path("data/Codecfake"),
}
RECORDINGS = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf"}
THRESHOLD = 0.5  # of the verdict on a person's own recordings


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "-t", "--task", choices=(*CORPUS_FOLDERS, "audio"), required=True, help="what to score"
    )
    parser.add_argument(
        "-d",
        "--path_to_database",
        type=Path,
        metavar="DIR",
        help="the corpus (default: data/Codecfake, data/LA or data/ITW)",
    )
    parser.add_argument(
        "--path", type=Path, nargs="+", metavar="FILE|FOLDER", help="recordings of -t audio"
    )
    parser.add_argument(
        "--subset",
        nargs="+",
        choices=protocols.CODECFAKE_SUBSETS,
        help="only these subsets of -t codecfake",
    )
    parser.add_argument(
        "--model_folder",
        type=Path,
        nargs="+",
        default=[Path("models/try")],
        metavar="DIR",
        help="trained or released heads (default: models/try)",
    )
    parser.add_argument(
        "--result_folder",
        type=Path,
        metavar="DIR",
        help="where score files go (default: result; -t audio writes none unless given)",
    )
    parser.add_argument(
        "--ssl",
        metavar="ID|DIR",
        help="wav2vec 2.0 weights (default: those the head was trained with)",
    )
    parser.add_argument(
        "--precision",
        choices=devices.PRECISIONS,
        default="fp32",
        help="arithmetic (default: %(default)s)",
    )
    parser.add_argument(
        "--llr",
        action="store_true",
        help="write the difference of the logits, which does not saturate, instead of the probability",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="score subsets again whose score files are there"
    )
    parser.add_argument(
        "--skip_missing",
        action="store_true",
        help="go on without audio that is absent or unreadable; it is listed beside the scores",
    )
    cli.add_compute_options(parser, "clips at a time (default: 32 on a GPU, 8 on the CPU)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    heads = load_heads(args.model_folder)
    if args.task == "audio":
        score_recordings(args, heads)
    else:
        score_corpus(args, heads)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = get_parser()
    args = parser.parse_args(argv)
    if (args.task == "audio") != bool(args.path):
        parser.error("-t audio and --path go together")
    if args.subset and args.task != "codecfake":
        parser.error("--subset names subsets of -t codecfake")
    args.path_to_database = args.path_to_database or CORPUS_FOLDERS.get(args.task)
    return args


def load_heads(folders: Sequence[Path]) -> dict[str, torch.nn.Module]:
    """Each head under the shortest name that tells its folder from the others'."""
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise InputError("--model_folder names the same folder twice")
    length = next(
        n
        for n in range(1, max(len(path.parts) for path in resolved) + 1)
        if len({path.parts[-n:] for path in resolved}) == len(resolved)
    )
    return {
        "_".join(path.parts[-length:]).strip("/"): model.load_head(folder)
        for path, folder in zip(resolved, folders)
    }


# ── From clips to logits ─────────────────────────────────────────────────────────────────────────


Scored = tuple[np.ndarray, dict[int, str], Counter]  # as score_files() yields it


class Scorer:
    """Several heads behind as few front ends as they need.

    Logits are computed in batches of one shape, filled up with silence, so that a clip's score depends
    neither on the clips beside it nor on an interruption.
    """

    def __init__(self, args: argparse.Namespace, heads: dict[str, torch.nn.Module]):
        self.device = devices.pick_device(ranks.gpu(args.gpu))
        self.precision = args.precision
        devices.set_precision(args.precision, self.device)
        self.batch_size = args.batch_size or (32 if self.device.type == "cuda" else 8)
        self.heads = [head.to(self.device) for head in heads.values()]
        self.front_ends: dict[tuple[str, str | None], frontends.FrontEnd] = {}
        self.front_end_of = [self._front_end(name, head, args.ssl) for name, head in heads.items()]

    def _front_end(
        self, name: str, head: torch.nn.Module, ssl: str | None
    ) -> tuple[str, str | None]:
        """The key of the head's front end, loaded once and held against what the head was trained on."""
        source = (
            None if head.feat == "mel" else ssl or head.info.get("ssl") or frontends.DEFAULT_SSL
        )
        key = head.feat, source
        if key not in self.front_ends:
            self.front_ends[key] = model.load_frontend(head.feat, source, self.precision).to(
                self.device
            )
        made = self.front_ends[key].fingerprint()
        for what, trained_on in head.info.get("front_end", {}).items():
            if what in made and made[what] != trained_on:
                raise InputError(
                    f"{name}: was trained on features with {what} {trained_on}, {source or head.feat} gives "
                    f"{made[what]}; give the same wav2vec 2.0 weights with --ssl"
                )
        return key

    @torch.inference_mode()
    def logits(self, clips: Tensor) -> np.ndarray:
        """Clips (B, 64600), B up to the batch size -> logits (B, heads, 2) float64."""
        with devices.memory_advice(self.batch_size):
            full = devices.pad_batch(clips, self.batch_size, self.device)
            features = {key: front_end(full) for key, front_end in self.front_ends.items()}
            with devices.autocast(self.precision, self.device):
                found = [
                    head(features[key])[1].float()
                    for head, key in zip(self.heads, self.front_end_of)
                ]
        return torch.stack(found, dim=1)[: len(clips)].double().cpu().numpy()

    def score_files(self, parts: dict[str, Sequence[str]], num_workers: int) -> Iterator[Scored]:
        """Logits of audio files, part by part; the ranks share the files.

        Each distinct clip is computed once: C1..C6, whose real clips are the same files, share them. The decoding
        processes start once for all parts, which takes a second, and read ahead across their ends.

        Args:
            parts: paths, under the name on the progress bar.

        Yields:
            Of each part logits (N, heads, 2), NaN for files that could not be read; the reasons; sampling rates counted.
        """
        known: dict[bytes, np.ndarray] = {}
        paths = [path for files in parts.values() for path in files]
        ends = accumulate(map(len, parts.values()))
        places = [range(end - len(files), end) for end, files in zip(ends, parts.values())]
        batches = [self._own_batches(paths, place) for place in places]
        reading = dataset.clip_batches(paths, list(chain.from_iterable(batches)), num_workers)
        for label, place, its_batches in zip(parts, places, batches):
            yield self._score_part(label, place, islice(reading, len(its_batches)), known)

    def _own_batches(self, paths: Sequence[str], place: range) -> list[Sequence[int]]:
        own: Sequence[int] = place
        # By name, not by position: so a clip of several subsets is always the same rank's, which knows its logits.
        if ranks.size() > 1:
            own = [
                row
                for row in place
                if zlib.crc32(os.fsencode(os.path.basename(paths[row]))) % ranks.size()
                == ranks.rank()
            ]
        return [
            own[first : first + self.batch_size] for first in range(0, len(own), self.batch_size)
        ]

    def _score_part(
        self,
        label: str,
        place: range,
        batches: Iterable[dataset.ClipBatch],
        known: dict[bytes, np.ndarray],
    ) -> Scored:
        digests: list[bytes | None] = [None] * len(place)
        failures: dict[int, str] = {}
        rates: Counter = Counter()
        waiting: dict[bytes, Tensor] = {}
        finished = ranks.SharedCounter()
        with tqdm(total=len(place), unit="clip", desc=label, disable=not ranks.is_first()) as bar:
            for batch in batches:
                failures |= {row - place.start: reason for row, reason in batch.failures.items()}
                rates += batch.rates
                for row, clip, digest in zip(batch.rows, batch.clips, batch.digests):
                    digests[row - place.start] = digest
                    if digest not in known:
                        waiting[digest] = clip
                    if len(waiting) == self.batch_size:
                        self._compute(waiting, known)
                bar.update(finished.add(len(batch.rows) + len(batch.failures)) - bar.n)
            self._compute(waiting, known)
            ranks.barrier(lambda: bar.update(finished.add() - bar.n))
            bar.update(finished.add() - bar.n)
        logits = np.full((len(place), len(self.heads), 2), np.nan)
        for row, digest in enumerate(digests):
            if digest is not None:
                logits[row] = known[digest]
        return self._join(logits, failures, rates)

    def _join(self, own: np.ndarray, failures: dict[int, str], rates: Counter) -> Scored:
        """What score_files() yields, from what each rank found; logits are NaN where the file was another's."""
        logits = own.copy()
        all_failures: dict[int, str] = {}
        all_rates: Counter = Counter()
        for values, failed, rated in ranks.gather((own, failures, rates)):
            np.copyto(logits, values, where=~np.isnan(values))
            all_failures |= failed
            all_rates += rated
        return logits, dict(sorted(all_failures.items())), all_rates

    def _compute(self, waiting: dict[bytes, Tensor], known: dict[bytes, np.ndarray]) -> None:
        if waiting:
            known.update(zip(waiting, self.logits(torch.stack(list(waiting.values())))))
            waiting.clear()


def to_scores(logits: np.ndarray, llr: bool) -> np.ndarray:
    """Logits (N, 2) float64 -> (N,): the probability of real, or the log likelihood ratio."""
    difference = logits[:, REAL] - logits[:, FAKE]
    return difference if llr else 1 / (1 + np.exp(-difference))


# ── Corpora ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Subset:
    """One score file to be."""

    name: str
    trials: list[Trial]  # those with audio
    absent: list[Trial]


def score_corpus(args: argparse.Namespace, heads: dict[str, torch.nn.Module]) -> None:
    result = args.result_folder = args.result_folder or Path("result")
    folders = [result / name if len(heads) > 1 else result for name in heads]
    subsets = open_subsets(args)
    scores = [scores_of(head, args) for head in heads.values()]
    for folder, of_head in zip(folders, scores):
        require_same_scores(
            folder, of_head, [f"{subset.name}_result.txt" for subset in subsets], args.overwrite
        )
    done = ranks.broadcast(
        lambda: {
            subset.name
            for subset in subsets
            if not args.overwrite and finished(subset.name, folders)
        }
    )
    subsets = [subset for subset in subsets if subset.name not in done]
    if not subsets:
        cli.echo(f"nothing to do: all score files are in {result}; --overwrite scores again")
        return
    with ranks.exclusive(result):
        score_subsets(args, heads, subsets, folders, scores)


def score_subsets(
    args: argparse.Namespace,
    heads: dict[str, torch.nn.Module],
    subsets: Sequence[Subset],
    folders: Sequence[Path],
    scores: Sequence[str],
) -> None:
    scorer = Scorer(args, heads)
    cli.echo(
        f"{', '.join(heads)}: {sum(len(subset.trials) for subset in subsets)} clips of {', '.join(subset.name for subset in subsets)}, "
        f"{scorer.device} -> {args.result_folder}"
    )
    scored = scorer.score_files(
        {subset.name: [trial.path for trial in subset.trials] for subset in subsets},
        args.num_workers,
    )
    for subset, (logits, failures, rates) in zip(subsets, scored):
        if failures and not args.skip_missing:
            raise InputError(
                f"{subset.name}: {len(failures)} files cannot be read, first {next(iter(failures.values()))}; "
                "or go on without them with --skip_missing"
            )
        if note := dataset.describe_rates(rates):
            cli.echo(note)
        if ranks.is_first():
            for number, (folder, head, of_head) in enumerate(zip(folders, heads.values(), scores)):
                write_subset(args, folder, subset, logits[:, number], failures, head, of_head)


def open_subsets(args: argparse.Namespace) -> list[Subset]:
    """Every subset asked for, its audio looked up before anything is computed."""
    wanted = {
        name: part
        for name, part in protocols.SCORED[args.task].items()
        if not args.subset or name in args.subset
    }
    subsets = []
    for name, part in wanted.items():
        trials = dataset.read_protocol(args.task, args.path_to_database, part)
        score_files.check_names(
            f"{args.path_to_database}, {name}", [trial.name for trial in trials]
        )
        missing = ranks.broadcast(lambda: protocols.find_missing(trials))
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
    if (
        name == "A3"
        and present
        and {t.label for t in missing} == {REAL}
        and REAL not in {t.label for t in present}
    ):
        cli.echo(
            f"A3: its {len(missing)} real files are not distributed (copyright); scoring its {len(present)} fakes "
            "alone, so it will have no EER"
        )
        return
    line = f"{name}: {protocols.describe_missing(missing, len(trials))}"
    if not present or not args.skip_missing:
        advice = (
            "leave the subset out with --subset"
            if args.task == "codecfake"
            else "give the corpus's folder with -d"
        )
        raise InputError(
            f"{line}; fetch them, {advice}"
            + (", or go on without them with --skip_missing" if present else "")
        )
    cli.echo(f"note: {line}; going on without them")


def scores_of(head: torch.nn.Module, args: argparse.Namespace) -> str:
    """What a score file of this run holds, in words that differ where it would."""
    return f"{'logit differences' if args.llr else 'probabilities'} of the weights {torch_files.digest(head)[:16]}"


def require_same_scores(folder: Path, scores: str, wanted: Sequence[str], overwrite: bool) -> None:
    """Refuse to take another model's score files for these, and say so where they lie beside them."""
    score_files.read_checksums(folder)  # damaged, it would be found only after hours
    others = {
        file: held
        for file, held in score_files.made_of(folder).items()
        if held != scores and (folder / file).exists()
    }
    for file, held in others.items():
        if file in wanted and not overwrite:
            raise InputError(
                f"{folder / file}: holds {held}, asked for are {scores}; give another --result_folder, or --overwrite"
            )
    if left := [file for file in others if file not in wanted]:
        cli.echo(
            f"note: {folder}: {', '.join(left)} there hold {others[left[0]]}, not {scores} as what is written now"
        )


def finished(subset: str, folders: Sequence[Path]) -> bool:
    return all((folder / f"{subset}_result.txt").exists() for folder in folders)


def write_subset(
    args: argparse.Namespace,
    folder: Path,
    subset: Subset,
    logits: np.ndarray,
    failures: dict[int, str],
    head: torch.nn.Module,
    scores: str,
) -> None:
    """The score file, the list of rows it lacks if it lacks any, and where it comes from."""
    folder.mkdir(parents=True, exist_ok=True)
    words = protocols.LABEL_WORDS[args.task]
    kept = [row for row in range(len(subset.trials)) if row not in failures]
    lacking = folder / f"{subset.name}_missing.txt"
    if len(kept) == len(subset.trials) and not subset.absent:
        lacking.unlink(missing_ok=True)
    else:
        with files.atomic_write(lacking) as file:
            file.writelines(f"{trial.name} absent\n" for trial in subset.absent)
            file.writelines(
                f"{subset.trials[row].name} {cli.printable(reason)}\n"
                for row, reason in sorted(failures.items())
            )
    path = folder / f"{subset.name}_result.txt"
    text = score_files.format_scores(
        path,
        [subset.trials[row].name for row in kept],
        to_scores(logits[kept], args.llr),
        [words[subset.trials[row].label] for row in kept],
    )
    if score_files.made_of(folder).get(path.name, scores) != scores:
        path.unlink(missing_ok=True)  # no kill may leave it under the name of these weights
    score_files.write_trials(path, [subset.trials[row] for row in kept])
    # The checksum first: killed in between, there is no score file, and the subset is scored again.
    about = {
        "head": head.name,
        "feat": head.feat,
        "scores": "logit difference" if args.llr else "softmax(logits)[real]",
        "precision": args.precision,
        "torch": str(torch.__version__),
        "model": head.info,
    }
    score_files.write_provenance(
        folder, about, scores, path.name, hashlib.sha256(text.encode()).hexdigest()
    )
    with files.atomic_write(path) as file:
        file.write(text)
    count = len(subset.absent) + len(failures)
    cli.echo(
        f"{path}: {len(kept)} scores"
        + (f", {count} trials without one are listed in {lacking.name}" if count else "")
    )


# ── A person's own recordings ────────────────────────────────────────────────────────────────────


def score_recordings(args: argparse.Namespace, heads: dict[str, torch.nn.Module]) -> None:
    """One line a recording and model; with --result_folder a score file as well."""
    paths = find_recordings(args.path)
    scorer = Scorer(args, heads)
    logits, failures, _ = next(scorer.score_files({"audio": paths}, args.num_workers))
    if not ranks.is_first():
        return
    kept = [row for row in range(len(paths)) if row not in failures]
    for number, (name, head) in enumerate(heads.items()):
        print_verdicts(
            name, head, [paths[row] for row in kept], to_scores(logits[kept, number], llr=False)
        )
        if args.result_folder:
            folder = args.result_folder / name if len(heads) > 1 else args.result_folder
            folder.mkdir(parents=True, exist_ok=True)
            score_files.write_scores(
                folder / "audio_result.txt",
                [quote(os.fsencode(paths[row])) for row in kept],
                to_scores(logits[kept, number], args.llr),
                [score_files.UNLABELLED] * len(kept),
            )
            cli.echo(f"{folder / 'audio_result.txt'}: {len(kept)} scores")
    if failures:
        for reason in failures.values():
            print(cli.printable(f"not scored: {reason}"), file=sys.stderr)
        raise InputError(
            f"{len(failures)} of {len(paths)} recordings were not scored, as listed above"
        )


def find_recordings(given: Sequence[Path]) -> list[str]:
    """The files themselves, and every recording below the folders, in order."""
    paths: list[str] = []
    for path in given:
        if path.is_dir():
            below = sorted(
                str(p) for p in path.rglob("*") if p.suffix.lower() in RECORDINGS and p.is_file()
            )
            if not below:
                raise InputError(
                    f"{path}: expected recordings in this folder ({', '.join(sorted(RECORDINGS))}), found none"
                )
            paths += below
        elif path.exists():
            paths.append(str(path))
        else:
            raise InputError(f"{path}: no such file or folder")
    return list(dict.fromkeys(paths))


def print_verdicts(
    name: str, head: torch.nn.Module, paths: Sequence[str], scores: np.ndarray
) -> None:
    width = max((len(path) for path in paths), default=0)
    cli.echo(f"{name}: {head.name} on {head.feat}, {trained_on(head.info)}.")
    for path, score in zip(paths, scores):
        verdict = "real" if score > THRESHOLD else "fake"
        cli.echo(
            f"{path:<{width}}  {soundfile.info(os.fsencode(path)).duration:8.2f} s  {score:.6f}  {verdict}"
        )


def trained_on(info: dict) -> str:
    """The sentence a verdict has to be read with."""
    about = {
        "19LA": "trained on ASVspoof2019 LA (text-to-speech and voice conversion of 2019)",
        "codecfake": "trained on Codecfake (speech from six neural codecs)",
        "co-train": "trained on Codecfake and ASVspoof2019 LA",
    }
    known = about.get(info.get("train_task"), info.get("trained", "trained on unknown data"))
    return (
        f"{known}. The score is its probability of bona fide speech from the first 4.04 s; on other kinds of fakes, "
        "languages or channels it can be wrong without showing it"
    )


if __name__ == "__main__":
    ranks.run(main, if_stopped="run the same command again to go on; finished subsets are kept")
