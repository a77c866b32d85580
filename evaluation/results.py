"""From folders of score files to one result for each model and subset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import eval_metrics
from eval_metrics import ErrorCounts, OperatingPoint
from evaluation import bootstrap
from evaluation.bootstrap import Sample
from evaluation.units import Units, find_units, join_units, share_levels
from formats import protocols, score_files, score_forms
from formats.protocols import UNKNOWN, Trial
from formats.score_files import Scores
from formats.score_forms import ScoreTable
from formats.trial_lists import NameIndex
from runtime.cli import InputError

TASKS = {  # task -> its subsets, as score files name them
    "19LA": ("19LA",),
    "ITW": ("ITW",),
    "codecfake": ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "A1", "A2", "A3"),
}
SUBSETS = tuple(subset for subsets in TASKS.values() for subset in subsets)
OTHER_SUBSET = "scores"  # the column of score files that are named after none of them
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
    by_file: bool = False  # named by --scores: its figures are EERs, never the paper's 100 - EER


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, in percent."""

    low: float
    high: float
    unit: str  # what was drawn: "speaker", "speaker x attack", "source utterance", "trial", ...
    n_resamples: int
    seed: int
    rule_of_three: bool = False  # an end is 3 / n or 100 - 3 / n, which resampling cannot know

    def record(self) -> dict[str, object]:
        return {
            "interval_low_percent": self.low,
            "interval_high_percent": self.high,
            "resampled_by": self.unit,
            "n_resamples": self.n_resamples,
            "seed": self.seed,
            "interval_by": "rule of three" if self.rule_of_three else "bootstrap",
        }

    def mirrored(self) -> Interval:
        """That of 100 - EER."""
        return replace(self, low=100 - self.high, high=100 - self.low)


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
    units: Units | None = None  # what is drawn; None without an EER or without intervals
    changed: bool = False  # edited or damaged since generate_score.py wrote it
    n_missing: int = 0  # trials that generate_score.py could not score
    holds: str | None = None  # what generate_score.py recorded that the scores are
    remarks: Sequence[str] = ()  # on how labels, speakers and names were found

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

    @property
    def interval_paper(self) -> Interval | None:
        """The interval of `eer_paper`."""
        return self.interval.mirrored() if self.interval and self.inverted else self.interval

    @property
    def probabilities(self) -> bool:
        """Whether the scores are probabilities: as recorded, else if all lie in [0, 1]."""
        return hold_probabilities(self.trials.scores, self.holds)

    @property
    def unequal(self) -> str | None:
        """What is wrong with the EER where no threshold has nearly equal rates; else None."""
        if self.point is None:
            return None
        frr = self.point.false_rejections / len(self.real)
        far = self.point.false_acceptances / len(self.fake)
        if abs(frr - far) <= 1 / min(len(self.real), len(self.fake)):
            return None
        return f"no threshold with equal rates: FRR {100 * frr:.3g} %, FAR {100 * far:.3g} %"

    @property
    def sample(self) -> Sample:
        """The trials as bootstrap.py draws them."""
        return Sample(self.trials.scores, self.trials.is_real, self.units.codes)

    def record(self) -> dict[str, object]:
        """The result for JSON: no NaN in it, absent figures are None."""
        record: dict[str, object] = {
            "model": self.model,
            "subset": self.subset,
            "n_real": len(self.real),
            "n_fake": len(self.fake),
            "eer_percent": self.eer,
            "eer_paper_percent": self.eer_paper,
            "inverted": self.inverted,
            "threshold": self.point and finite(self.point.threshold),
            "file": str(self.file),
        }
        if self.point:
            record["false_rejections"] = self.point.false_rejections
            record["false_acceptances"] = self.point.false_acceptances
        if self.unequal:
            record["unequal_rates"] = self.unequal
        if self.interval:
            record |= self.interval.record()
        if self.note:
            record["note"] = self.note
        if self.changed:
            record["changed"] = True
        if self.n_missing:
            record["n_missing"] = self.n_missing
        if self.remarks:
            record["remarks"] = list(self.remarks)
        return record


@dataclass(frozen=True)
class Average:
    """CAVG or AVG of one model, in percent."""

    name: str
    value: float
    pooled: float  # EER of all trials of its subsets at one threshold
    interval: Interval | None
    inverted: bool  # a part of it counts as 100 - EER

    def record(self, model: str) -> dict[str, object]:
        record: dict[str, object] = {
            "model": model,
            "subset": self.name,
            "mean_of": list(AVERAGED[self.name]),
            "eer_paper_percent": self.value,
            "pooled_eer_percent": self.pooled,
        }
        return record | (self.interval.record() if self.interval else {})


@dataclass(frozen=True)
class Evaluated:
    """A model, the result of each of its score files, and the averages that these allow."""

    model: Model
    results: dict[str, Result]  # by subset
    averages: dict[str, Average]  # by name

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def with_eer(self) -> list[Result]:
        """The results of the subsets that hold both classes."""
        return [result for result in self.results.values() if result.point]


Figures = dict[tuple[str, str], dict[str, object]]  # (model, subset) -> what an analysis found


def merge_records(evaluated: Sequence[Evaluated], analyses: Sequence[Figures]) -> list[dict]:
    """One record a result and average for JSON, with the figures that the analyses add to it."""
    records = []
    for of_model in evaluated:
        of_subsets = [result.record() for result in of_model.results.values()]
        of_averages = [average.record(of_model.name) for average in of_model.averages.values()]
        for record in of_subsets + of_averages:
            for figures in analyses:
                record |= figures.get((of_model.name, record["subset"]), {})
            records.append(record)
    return records


def hold_probabilities(scores: np.ndarray, holds: str | None) -> bool:
    """Whether a file's scores are probabilities.

    Args:
        holds: what generate_score.py recorded, "probabilities of .." or "logit differences of ..".
    """
    if holds is None:
        return eval_metrics.are_probabilities(scores)
    return holds.startswith("probabilities")


def finite(value: float) -> float | None:
    """The number, or None where JSON has none: a threshold below or above all scores."""
    return value if np.isfinite(value) else None


# ── Finding score files ──────────────────────────────────────────────────────────────────────────


def find_models(folders: Iterable[str | Path], subsets: Sequence[str] = SUBSETS) -> list[Model]:
    """A model for each folder that holds score files, and for each of its sub-folders that does.

    Raises:
        InputError: a folder that is absent or leads to no score file; a subset with two files.
    """
    models = []
    for folder in map(Path, folders):
        models += _models_below(folder, subsets)
    return distinctly_named(models)


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


def distinctly_named(models: Sequence[Model]) -> list[Model]:
    """Models of one name are told apart by their paths; files given twice count once."""
    unique = {
        tuple(path.resolve() for path in model.files.values()): model for model in models
    }.values()
    names = [model.name for model in unique]
    return [
        model if names.count(model.name) == 1 else replace(model, name=_path_name(model))
        for model in unique
    ]


def _path_name(model: Model) -> str:
    return str(next(iter(model.files.values())) if model.by_file else model.folder)


def model_of_file(path: str | Path, name: str | None = None) -> Model:
    """A score file of any name as a model of its own.

    Its subset is the one that the file is named after (C1_result.txt), else OTHER_SUBSET.

    Raises InputError where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a score file")
    subset = path.stem.removesuffix("_result")
    subset = ALIASES.get(subset, subset)
    if subset not in SUBSETS:
        subset = OTHER_SUBSET
    return Model(name or path.stem, path.parent, {subset: path}, by_file=True)


# ── Evaluating ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Settings:
    """How score files are read and intervals drawn."""

    n_resamples: int = bootstrap.N_RESAMPLES  # 0: no intervals
    seed: int = 0
    cluster_by: str | dict[str, str] = "speaker"  # as units.find_units() takes it
    columns: dict[str, str] = field(default_factory=dict)  # as score_forms.read_table() takes it
    labels: dict[str, list[Trial]] = field(default_factory=dict)  # subset -> its trials
    negate: bool = False  # the files' scores are higher for fake trials


def evaluate(model: Model, n_resamples: int = bootstrap.N_RESAMPLES, seed: int = 0) -> Evaluated:
    """evaluate_with() plain settings. Without resamples there are no intervals."""
    return evaluate_with(Settings(n_resamples, seed), model)


def evaluate_with(settings: Settings, model: Model) -> Evaluated:
    """A result for each of the model's score files, and the averages.

    Raises:
        InputError: a malformed score file, one without labels that nobody else gives, or a damaged
            provenance.json.
    """
    checksums = score_files.read_checksums(model.folder)
    holds = score_files.made_of(model.folder)
    results = {}
    for subset, path in model.files.items():
        trials, remarks = read_trials(path, subset, settings)
        results[subset] = replace(
            evaluate_trials(
                model.name,
                subset,
                path,
                trials,
                settings.n_resamples,
                settings.seed,
                settings.cluster_by,
            ),
            changed=not score_files.is_unchanged(path, checksums),
            n_missing=_count_missing(path, subset),
            holds=holds.get(path.name),
            remarks=remarks,
        )
    return Evaluated(model, results, _averages(results, settings))


def read_trials(path: Path, subset: str, settings: Settings) -> tuple[Scores, list[str]]:
    """A score file of any form with all that is known of its trials: (trials, remarks).

    Labels, speakers and attacks come from settings.labels, else from the file itself, else from
    the list that generate_score.py wrote beside it.

    Raises:
        InputError: as score_forms.read_table(); and where no label is known.
    """
    table = score_forms.read_table(path, settings.columns)
    score_forms.require_valid(path, table)
    if settings.negate:
        table = table._replace(scores=_negated(table.scores))
    given = settings.labels.get(subset)
    recorded = [] if given else score_files.read_trials(path)
    if not given and not recorded:
        if table.labels is None and table.names:
            raise InputError(
                f"{path}: has no labels; give them with -d CORPUS or --labels FILE "
                "(a list with the columns utt and label, or a corpus's protocol)"
            )
        return score_forms.to_scores(table, _labels(table)), []
    known = {trial.name: trial for trial in given or recorded}
    return _join(path, table, known)


def _negated(scores: np.ndarray) -> np.ndarray:
    """The scores turned round; probabilities stay probabilities."""
    return 1 - scores if eval_metrics.are_probabilities(scores) else -scores


def _labels(table: ScoreTable) -> np.ndarray:
    return np.empty(0, dtype=int) if table.labels is None else table.labels


def _join(path: Path, table: ScoreTable, known: dict[str, Trial]) -> tuple[Scores, list[str]]:
    """The file's trials with what a list says of them."""
    index, remarks = NameIndex(known), []
    entries = [index.find(name) for name in table.names]
    pairs = zip(table.names, entries, strict=True)
    n_other_form = sum(entry is not None and entry != name for name, entry in pairs)
    if n_other_form:
        remarks.append(
            f"{n_other_form} names differ from the list's only by folder, extension or attack and "
            f"were joined (first: {_first_other(table.names, entries)})"
        )
    keep = list(range(len(entries)))
    if table.labels is None:
        keep = [i for i, entry in enumerate(entries) if entry is not None]
        if len(keep) < len(entries):
            remarks.append(f"{len(entries) - len(keep)} trials have no label and are left out")
    labels = [
        known[entries[i]].label if table.labels is None else int(table.labels[i]) for i in keep
    ]
    trials = [known[entries[i]] if entries[i] is not None else None for i in keep]
    scores = Scores(
        [table.names[i] for i in keep],
        table.scores[keep],
        np.array(labels, dtype=int) == protocols.REAL,
        _column([trial and trial.speaker for trial in trials], table.speakers, keep),
        _column([trial and trial.source for trial in trials], table.attacks, keep),
    )
    return scores, remarks


def _first_other(names: Sequence[str], entries: Sequence[str | None]) -> str:
    for name, entry in zip(names, entries, strict=True):
        if entry is not None and entry != name:
            return f"{name[:40]} for {entry[:40]}"
    return ""


def _column(
    listed: list[str | None], in_file: Sequence[str] | None, keep: Sequence[int]
) -> list[str]:
    """What the list says of each trial; where it says nothing, what the score file says."""
    column = []
    for value, i in zip(listed, keep, strict=True):
        if value is None or value == UNKNOWN:
            value = in_file[i] if in_file else UNKNOWN
        column.append(value)
    return column


def _count_missing(path: Path, subset: str) -> int:
    """How many trials generate_score.py could not score and lists beside the score file."""
    beside = path.with_name(f"{subset}_missing.txt")
    return beside.read_bytes().count(b"\n") if beside.is_file() else 0


def evaluate_trials(
    model: str,
    subset: str,
    file: Path,
    trials: Scores,
    n_resamples: int,
    seed: int,
    cluster_by: str | dict[str, str] = "speaker",
) -> Result:
    """The result of one model on the given trials of one subset."""
    n_real, n_fake = len(trials.real), len(trials.fake)
    if not n_real or not n_fake:
        return Result(model, subset, file, trials, note=_why_no_eer(subset, n_real, n_fake))
    counts = eval_metrics.count_errors(trials.real, trials.fake)
    result = Result(model, subset, file, trials, counts, eval_metrics.eer_point(counts))
    if not n_resamples:
        return result
    result = replace(result, units=find_units(trials, subset, cluster_by))
    return replace(result, interval=estimate_interval(result, n_resamples, seed))


def estimate_interval(result: Result, n_resamples: int, seed: int) -> Interval:
    """The interval of an EER. What resampling cannot know, the rule of three does.

    Where the smaller class has no error, its error rate may still be up to 3 / n. Resampling that
    class never shows an error, so the upper end is at least 3 / n; where all of it is wrong, the
    lower end is at most 1 - 3 / n. n counts clusters, the smaller class is the one of fewer.
    """
    factors = result.units.factors
    eer = result.point.eer
    low, high = bootstrap.estimate_interval(eer, result.sample, factors, n_resamples, seed)
    no_error, all_wrong, n = _extremes(result)
    by_rule = False
    if no_error and eval_metrics.rule_of_three(n) > high:
        high, by_rule = eval_metrics.rule_of_three(n), True
    if all_wrong and 1 - eval_metrics.rule_of_three(n) < low:
        low, by_rule = 1 - eval_metrics.rule_of_three(n), True
    return Interval(100 * low, 100 * high, result.units.name, n_resamples, seed, by_rule)


def _extremes(result: Result) -> tuple[bool, bool, int]:
    """(the smaller class has no error, all of it is wrong, its number of clusters).

    Classes of as many clusters count as one: both must have no error, or be wrong altogether.
    """
    is_real, point = result.trials.is_real, result.point
    n_real, n_fake = result.units.n_clusters(is_real), result.units.n_clusters(~is_real)
    classes = [
        (n_real, point.false_rejections, len(result.real)),
        (n_fake, point.false_acceptances, len(result.fake)),
    ]
    n = min(n_real, n_fake)
    smaller = [(errors, trials) for clusters, errors, trials in classes if clusters == n]
    no_error = all(errors == 0 for errors, _ in smaller)
    all_wrong = all(errors == trials for errors, trials in smaller)
    return no_error, all_wrong, n


def _why_no_eer(subset: str, n_real: int, n_fake: int) -> str:
    if not n_real and not n_fake:
        return "the score file is empty"
    present = f"only fake trials ({n_fake})" if n_fake else f"only real trials ({n_real})"
    why = f"{present}, and an EER needs both classes"
    if subset == "A3" and n_fake:
        why += "; A3's real files are not distributed (copyright)"
    return why


# ── Averages ─────────────────────────────────────────────────────────────────────────────────────


def _averages(results: dict[str, Result], settings: Settings) -> dict[str, Average]:
    """CAVG and AVG as the paper takes them, where all their parts are: means of its figures."""
    averages = {}
    for name, subsets in AVERAGED.items():
        parts = [results.get(subset) for subset in subsets]
        if all(part and part.point for part in parts):
            value = float(np.mean([part.eer_paper for part in parts]))
            interval = _average_interval(parts, value, settings) if settings.n_resamples else None
            inverted = any(part.inverted for part in parts)
            averages[name] = Average(name, value, _pooled_eer(parts), interval, inverted)
    return averages


def _pooled_eer(parts: Sequence[Result]) -> float:
    """The EER in percent of all trials at one threshold."""
    real = np.concatenate([part.real for part in parts])
    fake = np.concatenate([part.fake for part in parts])
    return 100 * eval_metrics.compute_eer(real, fake)[0]


def _average_interval(parts: Sequence[Result], value: float, settings: Settings) -> Interval:
    """The interval of a mean from those of its parts: MOVER (Zou and Donner, 2008).

    value - low = sqrt(sum over i, j of r_ij d_i d_j) / n, with d_i how far the i-th part's lower
    end is below its figure and r_ij the correlation of two parts when their subsets are drawn
    together; likewise upwards. So a part without an error brings its rule of three along.
    """
    correlation = _correlations(parts, settings)
    below = np.array([part.eer_paper - part.interval_paper.low for part in parts])
    above = np.array([part.interval_paper.high - part.eer_paper for part in parts])
    down, up = (np.sqrt(max(0.0, d @ correlation @ d)) / len(parts) for d in (below, above))
    names = list(dict.fromkeys(part.units.name for part in parts))
    return Interval(
        max(0.0, value - down),
        min(100.0, value + up),
        "; ".join(names),
        settings.n_resamples,
        settings.seed,
        any(part.interval.rule_of_three for part in parts),
    )


def _correlations(parts: Sequence[Result], settings: Settings) -> np.ndarray:
    """(S, S) of the parts' figures when speakers, attacks or utterances are drawn for all at once.

    Subsets without a cluster in common are independent. Where a part never varied, its correlation
    is unknown, and 1 with those that share its clusters.
    """
    share = share_levels([part.units for part in parts], [part.subset for part in parts])
    joint = np.flatnonzero(share.sum(axis=1) > 1)
    if not joint.size:
        return np.eye(len(parts))
    eers = _draw_together([parts[i] for i in joint], settings)
    varies = joint[np.ptp(eers, axis=0) > 0]
    correlation = np.ones((len(parts), len(parts)))
    if varies.size > 1:
        moving = eers[:, np.ptp(eers, axis=0) > 0]
        correlation[np.ix_(varies, varies)] = np.corrcoef(moving, rowvar=False)
    correlation[~share] = 0.0
    np.fill_diagonal(correlation, 1.0)
    return correlation


def _draw_together(parts: Sequence[Result], settings: Settings) -> np.ndarray:
    """Resampled figures of the parts, as the paper prints them: (B, parts) fractions."""
    codes, strata = join_units([part.units for part in parts], [part.subset for part in parts])
    samples = [
        Sample(part.trials.scores, part.trials.is_real, its_codes)
        for part, its_codes in zip(parts, codes, strict=True)
    ]
    eers = bootstrap.resample_together(samples, strata, settings.n_resamples, settings.seed)
    whole = eers[~np.isnan(eers).any(axis=1)]
    return np.where([part.inverted for part in parts], 1 - whole, whole)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
