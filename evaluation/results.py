"""From folders of score files to one result for each model and subset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import eval_metrics
from eval_metrics import ErrorCounts, OperatingPoint
from evaluation import bootstrap
from formats import score_files
from formats.score_files import Scores
from runtime.cli import InputError

TASKS = {  # task -> its subsets, as score files name them
    "19LA": ("19LA",),
    "ITW": ("ITW",),
    "codecfake": ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "A1", "A2", "A3"),
}
SUBSETS = tuple(subset for subsets in TASKS.values() for subset in subsets)
ALIASES = {"L1": "A1", "L2": "A2", "L3": "A3", "IWA": "ITW"}  # names in the published results

AVERAGED = {  # the paper's averages and what they are the mean of
    "CAVG": ("C1", "C2", "C3", "C4", "C5", "C6", "C7"),
    "AVG": ("19LA", "ITW", "C1", "C2", "C3", "C4", "C5", "C6", "C7"),
}
COLUMNS = ("19LA", "ITW", *AVERAGED["CAVG"], "CAVG", "A1", "A2", "A3", "AVG")


@dataclass(frozen=True)
class Model:
    """A folder of score files."""

    name: str
    folder: Path
    files: dict[str, Path]  # subset -> score file, in the order of SUBSETS


@dataclass(frozen=True)
class Interval:
    """The 95 % interval of an EER, in percent."""

    low: float
    high: float
    unit: str  # what was resampled: "source utterance" or "trial"
    n_resamples: int
    seed: int
    rule_of_three: bool  # no error was seen: `high` is 3 / n, not the bootstrap's

    def record(self) -> dict[str, object]:
        return {
            "interval": [self.low, self.high],
            "resampled_by": self.unit,
            "n_resamples": self.n_resamples,
            "seed": self.seed,
            "interval_by": "rule of three" if self.rule_of_three else "bootstrap",
        }


@dataclass(frozen=True)
class Result:
    """One score file evaluated. Error rates in percent."""

    model: str
    subset: str
    file: Path
    trials: Scores
    counts: ErrorCounts | None = None  # None, as `point`, where a class is missing
    point: OperatingPoint | None = None  # where the EER is
    interval: Interval | None = None
    note: str | None = None  # why there is no EER
    changed: bool = False  # edited or damaged since generate_score.py wrote it
    n_missing: int = 0  # trials that generate_score.py could not score

    @property
    def real(self) -> np.ndarray:
        return self.trials.real

    @property
    def fake(self) -> np.ndarray:
        return self.trials.fake

    @property
    def eer(self) -> float | None:
        return self.point and 100 * self.point.eer

    @property
    def inverted(self) -> bool:
        """Whether the scores point the wrong way: the paper then prints 100 - EER."""
        return self.point is not None and self.point.eer > 0.5

    @property
    def eer_paper(self) -> float | None:
        return self.eer if not self.inverted else 100 - self.eer

    def record(self) -> dict[str, object]:
        """The result for JSON: no NaN in it, absent figures are None."""
        record: dict[str, object] = {
            "model": self.model,
            "subset": self.subset,
            "n_real": len(self.real),
            "n_fake": len(self.fake),
            "eer": self.eer,
            "eer_paper": self.eer_paper,
            "inverted": self.inverted,
            "threshold": self.point and self.point.threshold,
            "file": str(self.file),
        }
        if self.point:
            record["false_rejections"] = self.point.false_rejections
            record["false_acceptances"] = self.point.false_acceptances
        if self.interval:
            record |= self.interval.record()
        if self.note:
            record["note"] = self.note
        if self.changed:
            record["changed"] = True
        if self.n_missing:
            record["n_missing"] = self.n_missing
        return record


@dataclass(frozen=True)
class Evaluated:
    """A model and the result of each of its score files."""

    model: Model
    results: dict[str, Result]  # by subset, in the order of SUBSETS

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def with_eer(self) -> list[Result]:
        """The results of the subsets that hold both classes."""
        return [result for result in self.results.values() if result.point]


Figures = dict[tuple[str, str], dict[str, object]]  # (model, subset) -> what an analysis found


def merge_records(evaluated: Sequence[Evaluated], analyses: Sequence[Figures]) -> list[dict]:
    """One record a result for JSON, with the figures that the analyses add to it."""
    records = []
    for of_model in evaluated:
        for subset, result in of_model.results.items():
            record = result.record()
            for figures in analyses:
                record |= figures.get((of_model.name, subset), {})
            records.append(record)
    return records


# ── Finding score files ──────────────────────────────────────────────────────────────────────────


def find_models(folders: Iterable[str | Path], subsets: Sequence[str] = SUBSETS) -> list[Model]:
    """A model for each folder that holds score files, and for each of its sub-folders that does.

    Raises:
        InputError: a folder that is absent or leads to no score file; a subset with two files.
    """
    models = []
    for folder in map(Path, folders):
        models += _models_below(folder, subsets)
    return _distinctly_named(models)


def _models_below(folder: Path, subsets: Sequence[str]) -> list[Model]:
    advice = "run `python generate_score.py` first, or name another folder with --result_folder"
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected score files such as {folder}/C1_result.txt in it; "
            f"{advice}"
        )
    models = []
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        files = _score_files(place, subsets)
        if files:
            models.append(Model(place.resolve().name, place, files))
    if not models:
        raise InputError(
            f"{folder}: no score file of {', '.join(subsets)} in it or in its sub-folders; "
            f"expected names such as {subsets[0]}_result.txt; {advice}"
        )
    return models


def _score_files(folder: Path, subsets: Sequence[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(path for path in folder.glob("*.txt") if path.is_file()):
        name = path.stem.removesuffix("_result")
        subset = ALIASES.get(name, name)
        if subset not in subsets:
            continue
        if subset in files:
            raise InputError(
                f"{folder}: both {files[subset].name} and {path.name} are scores of {subset}; "
                "keep one of them"
            )
        files[subset] = path
    return {subset: files[subset] for subset in SUBSETS if subset in files}


def _distinctly_named(models: list[Model]) -> list[Model]:
    """Folders of one name are told apart by their paths; a folder given twice counts once."""
    unique = list({model.folder.resolve(): model for model in models}.values())
    names = [model.name for model in unique]
    return [
        model if names.count(model.name) == 1 else replace(model, name=str(model.folder))
        for model in unique
    ]


# ── Evaluating ───────────────────────────────────────────────────────────────────────────────────


def evaluate(model: Model, n_resamples: int = bootstrap.N_RESAMPLES, seed: int = 0) -> Evaluated:
    """A result for each of the model's score files. Without resamples there are no intervals."""
    checksums = score_files.read_checksums(model.folder)
    results = {}
    for subset, path in model.files.items():
        trials = score_files.read_scores(path)
        result = evaluate_trials(model.name, subset, path, trials, n_resamples, seed)
        results[subset] = replace(
            result,
            changed=not score_files.is_unchanged(path, checksums),
            n_missing=_count_missing(path, subset),
        )
    return Evaluated(model, results)


def _count_missing(path: Path, subset: str) -> int:
    """How many trials generate_score.py could not score and lists beside the score file."""
    beside = path.with_name(f"{subset}_missing.txt")
    return beside.read_bytes().count(b"\n") if beside.is_file() else 0


def evaluate_trials(
    model: str, subset: str, file: Path, trials: Scores, n_resamples: int, seed: int
) -> Result:
    """The result of one model on the given trials of one subset."""
    n_real, n_fake = len(trials.real), len(trials.fake)
    if not n_real or not n_fake:
        return Result(model, subset, file, trials, note=_why_no_eer(subset, n_real, n_fake))
    counts = eval_metrics.count_errors(trials.real, trials.fake)
    point = eval_metrics.eer_point(counts)
    interval = estimate_interval(trials, subset, point, n_resamples, seed) if n_resamples else None
    return Result(model, subset, file, trials, counts, point, interval)


def estimate_interval(
    trials: Scores, subset: str, point: OperatingPoint, n_resamples: int, seed: int
) -> Interval:
    """Bootstrap interval of the EER; where nothing went wrong, up to the rule of three's bound."""
    clusters, unit = bootstrap.find_clusters(trials.names, subset)
    if not point.false_rejections and not point.false_acceptances:
        fewest = int(min(np.sum(trials.is_real), np.sum(~trials.is_real)))
        high = 100 * eval_metrics.rule_of_three(fewest)
        return Interval(0.0, high, unit, n_resamples, seed, rule_of_three=True)
    eers = bootstrap.resample_eers([trials.scores], trials.is_real, clusters, n_resamples, seed)
    low, high = bootstrap.interval(eers[:, 0])
    return Interval(100 * low, 100 * high, unit, n_resamples, seed, rule_of_three=False)


def _why_no_eer(subset: str, n_real: int, n_fake: int) -> str:
    if not n_real and not n_fake:
        return "the score file is empty"
    present = f"only fake trials ({n_fake})" if n_fake else f"only real trials ({n_real})"
    why = f"{present}, and an EER needs both classes"
    if subset == "A3" and n_fake:
        why += "; A3's real files are not distributed (copyright)"
    return why


def average(of_model: Evaluated, name: str) -> float | None:
    """CAVG or AVG as the paper takes it: the mean of its figures, 100 - EER where inverted."""
    figures = []
    for subset in AVERAGED[name]:
        result = of_model.results.get(subset)
        if result is None or result.eer_paper is None:
            return None
        figures.append(result.eer_paper)
    return float(np.mean(figures))


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
