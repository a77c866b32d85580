r"""Our scores of real recordings beside the authors' own, trial by trial.

    python -m benchmarks.reproduce -t 19LA -d LA --model_folder vocoder_mellcnn codec_mellcnn \
        --published published_scores/vocoder_mellcnn published_scores/codec_mellcnn

Reads any part of a corpus in its official layout (-d; what is absent is counted), released weights,
and the authors' score files: for each --model_folder one of --published, a folder with
`<subset>_result.txt`, or a table with the columns subset, trial and the folder's name. Several
corpora: give -t and -d as often. `--recordings FOLDER` scores files that a table's trials name and
that lie in no corpus's layout. Writes docs/reproduced.md (--output), and prints nothing else.

A model and subset are IDENTICAL where no verdict differs, and scores and log odds by no more than
TF32, in which the authors' GPU computed convolutions, can move them; CLOSE where no more than 1 %
of the verdicts differ; else DIFFERENT. Sections of the page behind the first are kept.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import eval_metrics
import generate_score
from dataset import FAKE, REAL
from evaluation import results
from formats import audio, protocols, score_files
from runtime import cli, devices
from runtime.cli import InputError
from runtime.files import atomic_write
from runtime.provenance import run_info

# What the rounding of convolutions to TF32 moves the released Mel-LCNNs' scores by, with a margin.
TF32_SCORE = 0.02  # at most
TF32_LOG_ODDS = 0.01, 0.05  # in the median, and of 95 %
CLOSE_VERDICTS = 0.01
RESOLVED = 0.999  # float32 cannot tell the log odds of scores much above

COLUMNS = (
    "model",
    "subset",
    "trials",
    "absent",
    "verdicts flipped",
    "EER ours",
    "EER published",
    "score: median",
    "score: 95 %",
    "score: max",
    "log odds: median",
    "log odds: 95 %",
    "log odds: max",
    "verdict",
)


@dataclass(frozen=True)
class Recordings:
    """Files to score under one name."""

    subset: str
    paths: dict[str, str]  # trial -> file
    n_absent: int


@dataclass(frozen=True)
class Comparison:
    """One model's scores of one subset, N trials, ours and the authors'."""

    model: str
    subset: str
    ours: np.ndarray  # (N,) log odds
    theirs: np.ndarray  # (N,) scores in 0 .. 1
    is_real: np.ndarray  # (N,) bool
    n_absent: int


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("-t", "--task", action="append", choices=tuple(protocols.SCORED))
    parser.add_argument("-d", "--path_to_database", type=Path, action="append", metavar="DIR")
    parser.add_argument(
        "--recordings", type=Path, metavar="FOLDER", help="files named as the trials of a table"
    )
    parser.add_argument("--model_folder", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--published", type=Path, nargs="+", required=True, metavar="DIR|FILE")
    parser.add_argument("--ssl", metavar="ID|DIR", help="wav2vec 2.0 weights")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/reproduced.md"))
    devices.add_options(parser, "arithmetic")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    tasks, roots = args.task or [], args.path_to_database or []
    if len(tasks) != len(roots):
        raise InputError("-t and -d go together: one -d for each -t")
    published = find_published(args.model_folder, args.published)
    parts = [part for task, root in zip(tasks, roots, strict=True) for part in corpus(task, root)]
    if args.recordings:
        parts += loose_recordings(args.recordings, published)
    if not any(part.paths for part in parts):
        raise InputError("no recording of these corpora is there; give the corpus's folder with -d")
    heads = generate_score.load_heads(args.model_folder)
    comparisons = compare(args, heads, parts, published)
    write_page(args, comparisons)


# ── What the authors published ───────────────────────────────────────────────────────────────────

Published = dict[str, dict[str, tuple[float, bool]]]  # subset -> trial -> score, whether it is real


def find_published(folders: Sequence[Path], sources: Sequence[Path]) -> list[Published]:
    """The published scores of each model folder, in their order; one table serves all."""
    if len(sources) == 1 and sources[0].is_file():
        return [read_table(sources[0], folder.resolve().name) for folder in folders]
    if len(sources) != len(folders):
        raise InputError(
            f"--published: expected one for each of {len(folders)} model folders, or one table, "
            f"got {len(sources)}"
        )
    return [
        read_table(source, folder.resolve().name) if source.is_file() else read_folder(source)
        for source, folder in zip(sources, folders, strict=True)
    ]


def read_table(path: Path, model: str) -> Published:
    published: Published = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            missing = {"subset", "trial", "label", model} - {k for k, v in row.items() if v}
            if missing:
                raise InputError(f"{path}: expected columns {', '.join(sorted(missing))}")
            is_real = row["label"] in score_files.REAL_WORDS
            published.setdefault(row["subset"], {})[row["trial"]] = float(row[model]), is_real
    return published


def read_folder(folder: Path) -> Published:
    models = results.find_models([folder])
    if len(models) != 1:
        raise InputError(f"{folder}: expected the score files of one model, found {len(models)}")
    published: Published = {}
    for subset, path in models[0].files.items():
        trials = score_files.read_scores(path)
        values = zip(trials.scores.tolist(), trials.is_real.tolist(), strict=True)
        published[subset] = dict(zip(trials.names, values, strict=True))
    return published


# ── Recordings ───────────────────────────────────────────────────────────────────────────────────


def corpus(task: str, root: Path) -> list[Recordings]:
    """Every subset of a corpus whose list is there."""
    parts = []
    for name, part in protocols.SCORED[task].items():
        try:
            trials = protocols.read_protocol(task, root, part)
        except InputError as error:
            cli.echo(f"note: {name}: {error}")
            continue
        absent = set(protocols.find_missing(trials))
        paths = {trial.name: str(trial.path) for trial in trials if trial not in absent}
        parts.append(Recordings(name, paths, len(absent)))
    return parts


def loose_recordings(folder: Path, published: Sequence[Published]) -> list[Recordings]:
    files = {path.stem: str(path) for path in sorted(folder.iterdir()) if path.is_file()}
    parts = []
    for subset, trials in published[0].items():
        paths = {name: files[Path(name).stem] for name in trials if Path(name).stem in files}
        if paths:
            parts.append(Recordings(f"{subset}, originals", paths, 0))
    return parts


# ── Ours beside theirs ───────────────────────────────────────────────────────────────────────────


def compare(
    args: argparse.Namespace,
    heads: dict,
    parts: Sequence[Recordings],
    published: Sequence[Published],
) -> list[Comparison]:
    """Score all recordings with all heads; one Comparison a head and subset with trials of both."""
    scorer = generate_score.Scorer(args, heads)
    lists = {part.subset: list(part.paths.values()) for part in parts if part.paths}
    comparisons = []
    with_files = [part for part in parts if part.paths]
    for part, scored in zip(with_files, scorer.score_files(lists, args.num_workers), strict=True):
        for reason in scored.failures.values():
            cli.echo(f"note: not scored: {reason}")
        for number, (model, theirs) in enumerate(zip(heads, published, strict=True)):
            known = theirs.get(part.subset.partition(",")[0], {})
            comparison = compare_part(model, part, scored.logits[:, number], known)
            if comparison:
                comparisons.append(comparison)
    return comparisons


def compare_part(
    model: str, part: Recordings, logits: np.ndarray, known: dict[str, tuple[float, bool]]
) -> Comparison | None:
    """Logits (N, 2), NaN where a file cannot be read, beside those scores that are known."""
    odds = logits[:, REAL] - logits[:, FAKE]
    pairs = [
        (value, *known[name])
        for name, value in zip(part.paths, odds.tolist(), strict=True)
        if name in known and np.isfinite(value)
    ]
    if not pairs:
        return None
    ours, theirs, is_real = map(np.array, zip(*pairs, strict=True))
    n_absent = max(len(known), len(part.paths) + part.n_absent) - len(pairs)
    return Comparison(model, part.subset, ours, theirs, is_real, n_absent)


def judge(flipped: int, scores: np.ndarray, log_odds: np.ndarray) -> str:
    """One word on |differences| (N,) of scores and of log odds, with a reason where it is known."""
    median, high = np.percentile(log_odds, [50, 95]) if len(log_odds) else (0, 0)
    in_reach = median <= TF32_LOG_ODDS[0] and high <= TF32_LOG_ODDS[1]
    if not flipped and scores.max() <= TF32_SCORE and in_reach:
        return "IDENTICAL"
    if flipped <= CLOSE_VERDICTS * len(scores):
        return "CLOSE"
    return "DIFFERENT: other audio, weights or front end than the authors'"


def describe(found: Comparison) -> list[str]:
    """One row of the page's table."""
    ours = 1 / (1 + np.exp(-found.ours))
    difference = np.abs(ours - found.theirs)
    flipped = int(((ours > 0.5) != (found.theirs > 0.5)).sum())
    resolved = (found.theirs > 0) & (found.theirs < RESOLVED)
    theirs = found.theirs[resolved]
    of_odds = np.abs(found.ours[resolved] - (np.log(theirs) - np.log1p(-theirs)))
    return [
        found.model,
        found.subset,
        str(len(ours)),
        str(found.n_absent),
        str(flipped),
        _eer(ours, found.is_real),
        _eer(found.theirs, found.is_real),
        *_spread(difference, ".1e"),
        *_spread(of_odds, ".4f"),
        judge(flipped, difference, of_odds),
    ]


def _eer(scores: np.ndarray, is_real: np.ndarray) -> str:
    if is_real.all() or not is_real.any():
        return "-"
    return f"{100 * eval_metrics.compute_eer(scores[is_real], scores[~is_real])[0]:.3f} %"


def _spread(values: np.ndarray, form: str) -> list[str]:
    if not len(values):
        return ["-"] * 3
    return [format(value, form) for value in (*np.percentile(values, [50, 95]), values.max())]


PAGE = """# Published scores, reproduced

The released weights' scores of real recordings, as this project computes them, beside the scores
that the authors publish: `python -m benchmarks.reproduce`.

{device}, --precision {precision}, {resampler}, torch {torch}.

{table}

- *Absent*: trials of the corpus's list or of the published file that were not scored here.
- Differences are absolute. Log odds, log(p / (1 - p)), are compared where the published score is
  below {resolved}: above, float32 resolves them coarsely.
- IDENTICAL: no verdict at 0.5 differs; the scores differ by {most:g} at most, the log odds by
  {median:g} in the median and by {high:g} in 95 % of the trials, at most. TF32 explains that much:
  PyTorch lets cuDNN compute convolutions in it, and the authors' GPU did. With inputs and weights
  of convolutions 3, 4, 5, 7 and 9 rounded to TF32 the log odds agree to 0.005 (tests/test_real.py).
  CLOSE: at most 1 % of the verdicts differ. DIFFERENT: more do.
"""


def write_page(args: argparse.Namespace, comparisons: Sequence[Comparison]) -> None:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(describe, comparisons)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    device = devices.pick_device(args.gpu)
    page = PAGE.format(
        device="CPU" if device.type == "cpu" else run_info(device)["device"],
        precision=args.precision or devices.DEFAULT_PRECISION[device.type],
        resampler=audio.RESAMPLER,
        torch=torch.__version__,
        resolved=RESOLVED,
        table=table,
        most=TF32_SCORE,
        median=TF32_LOG_ODDS[0],
        high=TF32_LOG_ODDS[1],
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as file:
        file.write(page + written_by_hand(args.output))
    cli.echo(f"{args.output}: {len(comparisons)} models and subsets")


def written_by_hand(page: Path) -> str:
    """The sections behind the first of an existing page."""
    if not page.is_file():
        return ""
    _, heading, rest = page.read_text(encoding="utf-8").partition("\n## ")
    return heading + rest


if __name__ == "__main__":
    cli.run(main, if_stopped="run the same command again")
