"""What `--metrics`, `--by source` and `-d` ask of results: tables, figures for JSON, mismatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import eval_metrics
from eval_metrics import Calibration
from evaluation.results import (
    Evaluated,
    Figures,
    Result,
    Settings,
    evaluate_trials,
    hold_probabilities,
    read_trials,
)
from evaluation.tables import (
    ABSENT,
    INTERVAL,
    MARK,
    SELF_MARK,
    Table,
    interval_cell,
    interval_notes,
    percent,
)
from formats import protocols, score_files, score_forms
from formats.protocols import UNKNOWN, Trial
from formats.score_files import AsvScores, Scores
from formats.trial_lists import NameIndex
from runtime.cli import InputError

# ── Metrics beyond the EER ───────────────────────────────────────────────────────────────────────

HALF = 0.5  # the probability at which real and fake are equally likely; log odds 0


@dataclass(frozen=True)
class MetricInputs:
    """Files and numbers beside the scores that some metrics need."""

    asv: AsvScores | None = None
    threshold: float | None = None  # in the units of the score files
    threshold_from: str | None = None  # development score file: see find_dev_file()
    calibrate: str | None = None
    settings: Settings = Settings()  # how development files are read


def find_dev_file(folder: Path, given: str, n_models: int) -> Path:
    """A development file belongs to one model: in the model's folder, or there is one model only.

    Raises InputError where it is in none of these places.
    """
    inside = folder / given
    if inside.is_file():
        return inside
    if n_models > 1:
        raise InputError(
            f"{inside}: no such file; development scores belong to one model: with {n_models} "
            "models, put such a file into each model's folder and give its name, or name one model "
            "with --result_folder"
        )
    return Path(given)


@dataclass(frozen=True)
class _Dev:
    """Development scores, as log odds where they are probabilities."""

    path: Path
    trials: Scores
    probabilities: bool

    @property
    def llrs(self) -> np.ndarray:
        return eval_metrics.as_llrs(self.trials.scores, self.probabilities).llrs

    def is_of(self, result: Result) -> bool:
        """Whether these are the very trials of a result."""
        return self.path.resolve() == result.file.resolve()


@dataclass(frozen=True)
class _Plan:
    """What one model's development files say."""

    calibrated_on: _Dev | None = None
    fit: Calibration | None = None
    threshold_of: _Dev | None = None
    threshold: float | None = None  # in the units of `threshold_of`


def metrics_table(evaluated: Sequence[Evaluated], inputs: MetricInputs) -> tuple[Table, Figures]:
    """One row a model and subset: what the scores are worth as log-likelihood ratios."""
    columns = _metric_columns(inputs)
    rows, figures = [], {}
    notes = [
        "minDCF, actDCF, Cllr: as ASVspoof 5 defines them (Pspoof 0.05, Cmiss 1, Cfa 10; "
        "actDCF decides at -0.642)"
    ]
    for of_model in evaluated:
        plan = _plan(of_model, inputs, len(evaluated))
        found = {result.subset: _costs(result, plan, inputs) for result in of_model.with_eer}
        notes += [f"{of_model.name}: {note}" for note in _metric_notes(found, plan)]
        for result in of_model.with_eer:
            record = found[result.subset]
            figures[of_model.name, result.subset] = record
            cells = [cell(result, record) for cell in columns.values()]
            rows.append([of_model.name, result.subset, *cells])
    return Table("Metrics", ["model", "subset", *columns], rows, notes, n_names=2), figures


def _plan(of_model: Evaluated, inputs: MetricInputs, n_models: int) -> _Plan:
    if not of_model.with_eer:
        return _Plan()
    folder, plan = of_model.model.folder, _Plan()
    if inputs.calibrate:
        dev = _read_dev(find_dev_file(folder, inputs.calibrate, n_models), inputs.settings)
        fit = eval_metrics.fit_calibration(dev.llrs, dev.trials.is_real)
        plan = replace(plan, calibrated_on=dev, fit=fit)
    if inputs.threshold_from:
        dev = _read_dev(find_dev_file(folder, inputs.threshold_from, n_models), inputs.settings)
        _, threshold = eval_metrics.compute_eer(dev.trials.real, dev.trials.fake)
        plan = replace(plan, threshold_of=dev, threshold=threshold)
    return plan


def _read_dev(path: Path, settings: Settings) -> _Dev:
    trials, _ = read_trials(path, "dev", replace(settings, labels={}))
    n_real, n_fake = len(trials.real), len(trials.fake)
    if not n_real or not n_fake:
        raise InputError(
            f"{path}: expected development scores of both classes, got "
            f"{n_real} real and {n_fake} fake trials"
        )
    holds = score_files.made_of(path.parent).get(path.name)
    return _Dev(path, trials, hold_probabilities(trials.scores, holds))


def _costs(result: Result, plan: _Plan, inputs: MetricInputs) -> dict[str, object]:
    real, n_real = eval_metrics.as_llrs(result.real, result.probabilities)
    fake, n_fake = eval_metrics.as_llrs(result.fake, result.probabilities)
    costs: dict[str, object] = {
        "auc_percent": 100 * eval_metrics.auc(result.counts),
        "min_dcf": eval_metrics.min_dcf(result.counts),
        "act_dcf": eval_metrics.compute_act_dcf(real, fake),
        "cllr_bits": eval_metrics.compute_cllr(real, fake),
        "scores_are": "probabilities" if result.probabilities else "log-likelihood ratios",
        "n_saturated": n_real + n_fake,
    }
    fit = plan.fit
    if fit:
        costs["calibrated"] = {
            "act_dcf": eval_metrics.compute_act_dcf(fit(real), fit(fake)),
            "cllr_bits": eval_metrics.compute_cllr(fit(real), fit(fake)),
            "slope": fit.slope,
            "offset": fit.offset,
            "on_itself": plan.calibrated_on.is_of(result),
        }
    if inputs.asv and result.subset == "19LA":
        costs["min_tdcf_2019_legacy"] = eval_metrics.min_tdcf_2019(result.counts, inputs.asv)
    return costs


Cell = Callable[[Result, dict], str]


def _metric_columns(inputs: MetricInputs) -> dict[str, Cell]:
    """Column -> its cell, from a result and the figures found for it."""
    columns: dict[str, Cell] = {"EER (%)": lambda result, found: _eer_cell(result), **COST_COLUMNS}
    if inputs.calibrate:
        columns["actDCF cal."] = _calibrated("act_dcf")
        columns["Cllr cal."] = _calibrated("cllr_bits")
    if inputs.asv:
        columns["min t-DCF (legacy 2019)"] = _tdcf
    return columns


COST_COLUMNS: dict[str, Cell] = {
    "AUC (%)": lambda result, found: percent(found["auc_percent"]),
    "minDCF": lambda result, found: f"{found['min_dcf']:.4f}",
    "actDCF": lambda result, found: f"{found['act_dcf']:.4f}",
    "Cllr (bits)": lambda result, found: f"{found['cllr_bits']:.4f}",
}


def _eer_cell(result: Result) -> str:
    return percent(result.eer) + (MARK if result.inverted else "")


def _calibrated(key: str) -> Cell:
    def cell(result: Result, found: dict) -> str:
        calibrated = found["calibrated"]
        return f"{calibrated[key]:.4f}" + (SELF_MARK if calibrated["on_itself"] else "")

    return cell


def _tdcf(result: Result, found: dict) -> str:
    value = found.get("min_tdcf_2019_legacy")
    return ABSENT if value is None else f"{value:.5f}"


def _metric_notes(found: dict[str, dict], plan: _Plan) -> list[str]:
    if not found:
        return ["no score file with both classes"]
    notes = _notes_on_scores(found)
    if plan.fit:
        notes += _notes_on_fit(found, plan)
    return notes


def _notes_on_fit(found: dict[str, dict], plan: _Plan) -> list[str]:
    fit, dev = plan.fit, plan.calibrated_on
    of = "log odds" if dev.probabilities else "score"
    note = (
        f"cal.: calibrated by logistic regression on {dev.path}: "
        f"LLR = {fit.slope:.4g} x {of} {fit.offset:+.4g}"
    )
    if fit.slope < 0:
        note += " (negative slope: the development scores point the wrong way)"
    notes = [note]
    if eval_metrics.are_separated(dev.trials.real, dev.trials.fake):
        notes.append(
            f"WARNING: a threshold separates the classes of {dev.path}: no finite slope fits best, "
            "the one above only depends on the regularisation"
        )
    if any(record["calibrated"]["on_itself"] for record in found.values()):
        notes.append(f"{SELF_MARK} calibrated on the very trials: optimistic")
    return notes


def _notes_on_scores(found: dict[str, dict]) -> list[str]:
    by_kind: dict[str, list[str]] = {}
    for subset, record in found.items():
        by_kind.setdefault(record["scores_are"], []).append(subset)
    mixed = len(by_kind) > 1
    notes = []
    for kind, subsets in by_kind.items():
        of = f" of {', '.join(subsets)}" if mixed else ""
        if kind == "probabilities":
            notes.append(
                f"the scores{of} are taken for probabilities: actDCF and Cllr use their log odds"
            )
        else:
            notes.append(f"the scores{of} are taken for log-likelihood ratios")
    saturated = [
        f"{subset} {record['n_saturated']}"
        for subset, record in found.items()
        if record["n_saturated"]
    ]
    if saturated:
        notes.append(
            f"WARNING: scores of exactly 0 or 1, rounded by softmax: {', '.join(saturated)}; "
            "actDCF and Cllr put them at the nearest float32 inside and are approximate; "
            "generate_score.py --llr keeps the logit difference"
        )
    return notes


# ── Decisions at a threshold ─────────────────────────────────────────────────────────────────────


def decisions_table(evaluated: Sequence[Evaluated], inputs: MetricInputs) -> tuple[Table, Figures]:
    """One row a model and subset: accuracy, precision, recall and F1 at a threshold."""
    rows, figures, notes = [], {}, []
    for of_model in evaluated:
        plan = _plan(of_model, replace(inputs, calibrate=None), len(evaluated))
        for result in of_model.with_eer:
            record = _decide(result, plan, inputs)
            figures[of_model.name, result.subset] = {"decisions": record}
            rows.append([of_model.name, result.subset, *_decision_cells(record)])
        if plan.threshold is not None:
            notes.append(
                f"{of_model.name}: the threshold is that of the EER of {plan.threshold_of.path}"
            )
    if inputs.threshold is None and not inputs.threshold_from:
        notes.append(
            f"the threshold is {HALF} of probabilities, 0 of log odds; --threshold sets it"
        )
    notes.append(
        "real if the score is above the threshold; precision, recall and F1 of finding the fakes"
    )
    if any(figure["decisions"]["on_itself"] for figure in figures.values()):
        notes.append(f"{SELF_MARK} decided at the very trials' EER threshold: optimistic")
    columns = ["threshold", "accuracy (%)", "FRR (%)", "FAR (%)"]
    columns += ["precision (%)", "recall (%)", "F1 (%)"]
    return Table("Decisions", ["model", "subset", *columns], rows, notes, n_names=2), figures


def _decide(result: Result, plan: _Plan, inputs: MetricInputs) -> dict[str, object]:
    real, fake, on_itself = result.real, result.fake, False
    if plan.threshold is not None:
        threshold, dev = plan.threshold, plan.threshold_of
        on_itself = dev.is_of(result)
        if dev.probabilities != result.probabilities:  # both as log odds
            real = eval_metrics.as_llrs(real, result.probabilities).llrs
            fake = eval_metrics.as_llrs(fake, result.probabilities).llrs
            threshold = float(eval_metrics.as_llrs([threshold], dev.probabilities).llrs[0])
    elif inputs.threshold is not None:
        threshold = inputs.threshold
    else:
        threshold = HALF if result.probabilities else 0.0
    rates = eval_metrics.decide_at(threshold, real, fake)._asdict()
    percents = {f"{name}_percent": 100 * rate for name, rate in rates.items()}
    return {"threshold": threshold, **percents, "on_itself": on_itself}


def _decision_cells(record: dict) -> list[str]:
    keys = ("accuracy", "frr", "far", "precision", "recall", "f1")
    mark = SELF_MARK if record["on_itself"] else ""
    threshold = f"{record['threshold']:.6g}{mark}"
    return [threshold, *(percent(record[f"{key}_percent"]) for key in keys)]


# ── By codec or attack ───────────────────────────────────────────────────────────────────────────


def by_source_table(
    evaluated: Sequence[Evaluated], settings: Settings, with_metrics: bool
) -> tuple[Table, Figures]:
    """EER of each source's fakes against all real trials, and of all fakes together.

    Raises InputError where no trial's source is known.
    """
    rows, figures, notes, intervals = [], {}, [], []
    for of_model in evaluated:
        for result in of_model.with_eer:
            parts = _by_source(result, settings)
            for source, part in parts.items():
                found = _costs(part, _Plan(), MetricInputs()) if with_metrics else {}
                rows.append(_source_row(source, part, found))
                notes += _source_notes(source, part)
                intervals += [part.interval] if part.interval else []
                records = figures.setdefault((of_model.name, result.subset), {"by_source": []})
                records["by_source"].append({"source": source, **part.record(), **found})
    if not rows:
        raise InputError(
            "--by source: no codec or attack of these trials is known; give the corpus with -d or "
            "a list with the column `attack` with --labels"
        )
    columns = ["model", "subset", "source", "real", "fake", "EER (%)", INTERVAL]
    columns += [*COST_COLUMNS] if with_metrics else []
    columns += ["resampled by"] if intervals else []
    about = [
        "each source's fakes against all real trials of the subset; true EERs",
        *notes,
        *interval_notes(intervals),
    ]
    return Table("EER by source", columns, rows, about, n_names=3), figures


def _by_source(result: Result, settings: Settings) -> dict[str, Result]:
    """Source -> its result; POOLED last. Nothing where no source is known."""
    trials = result.trials
    if not trials.attacks:
        return {}
    tags = np.array(trials.attacks)
    sources = sorted(set(tags[~trials.is_real].tolist()))
    if sources == [UNKNOWN]:
        return {}
    parts = {}
    for source in sources:
        chosen = _with_pooled_real(trials, tags == source)
        part = evaluate_trials(
            result.model,
            result.subset,
            result.file,
            chosen,
            settings.n_resamples,
            settings.seed,
            settings.cluster_by,
        )
        parts["unknown" if source == UNKNOWN else source] = replace(part, holds=result.holds)
    return parts | {POOLED: result}


POOLED = "all"


def _with_pooled_real(trials: Scores, of_source: np.ndarray) -> Scores:
    keep = np.flatnonzero(trials.is_real | of_source)
    return Scores(
        [trials.names[i] for i in keep],
        trials.scores[keep],
        trials.is_real[keep],
        [trials.speakers[i] for i in keep] if trials.speakers else (),
        [trials.attacks[i] for i in keep],
    )


def _source_row(source: str, part: Result, found: dict) -> list[str]:
    return [
        part.model,
        part.subset,
        source,
        str(len(part.real)),
        str(len(part.fake)),
        _eer_cell(part),
        interval_cell(part.interval),
        *(cell(part, found) for cell in (COST_COLUMNS.values() if found else ())),
        *([part.interval.unit] if part.interval else []),
    ]


def _source_notes(source: str, part: Result) -> list[str]:
    where = f"{part.model}, {part.subset}, {source}"
    notes = []
    if part.inverted:
        notes.append(f"{MARK} {where}: the scores point the wrong way")
    if part.unequal:
        notes.append(f"{where}: {part.unequal}; the EER is the mean of the two")
    return notes


# ── Score files against lists of trials ──────────────────────────────────────────────────────────

N_NAMED = 3  # of each kind of problem


def protocol_trials(task: str, root: str | Path, subset: str) -> list[Trial]:
    """The trials of a subset, from the corpus's own protocol.

    Raises InputError where the corpus or its protocol is absent or malformed.
    """
    return protocols.read_protocol(task, root, protocols.SCORED[task][subset])


def find_problems(
    path: str | Path, trials: Sequence[Trial], columns: dict[str, str] | None = None
) -> list[str]:
    """What is wrong with a score file, one line a kind: how many, and the first names.

    Names that differ from the list's only by folder, extension or attack mean the same trial.
    """
    table = score_forms.read_table(path, columns)
    labels = {trial.name: trial.label for trial in trials}
    index = NameIndex(labels)
    entries = [index.find(name) for name in table.names]
    scored = set(entries)
    kinds = {
        "missing (in the protocol, not scored)": [name for name in labels if name not in scored],
        "extra (scored, not in the protocol)": [
            name for name, entry in zip(table.names, entries, strict=True) if entry is None
        ],
        "duplicated": _repeated(table.names, entries),
        "non-finite": [table.names[i] for i in np.flatnonzero(~np.isfinite(table.scores))],
        "wrong label": _wrongly_labelled(table, entries, labels),
    }
    return [
        f"{path}: {len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names
    ]


def _repeated(names: Sequence[str], entries: Sequence[str | None]) -> list[str]:
    trials = [entry or name for name, entry in zip(names, entries, strict=True)]
    return [trial for trial, count in Counter(trials).items() if count > 1]


def _wrongly_labelled(
    table: score_forms.ScoreTable, entries: Sequence[str | None], labels: dict[str, int]
) -> list[str]:
    if table.labels is None:
        return []
    wrong = [
        name
        for name, entry, label in zip(table.names, entries, table.labels.tolist(), strict=True)
        if entry is not None and labels[entry] != label
    ]
    return list(dict.fromkeys(wrong))


def _first(names: Sequence[str]) -> str:
    more = ", .." if len(names) > N_NAMED else ""
    return ", ".join(name[:60] for name in names[:N_NAMED]) + more
