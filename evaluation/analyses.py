"""What `--metrics`, `--by source` and `-d` ask of results: tables, figures for JSON, mismatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import eval_metrics
from eval_metrics import Calibration
from evaluation.results import Evaluated, Figures, Result, evaluate_trials
from evaluation.tables import ABSENT, Table, percent
from formats import protocols, score_files
from formats.score_files import AsvScores, Scores
from runtime.cli import InputError

# ── Metrics beyond the EER ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class MetricInputs:
    """Files beside the scores that some metrics need."""

    asv: AsvScores | None = None
    threshold_from: str | None = None  # development score file: see find_dev_file()
    calibrate: str | None = None


def find_dev_file(folder: Path, given: str, n_models: int) -> Path:
    """A development file belongs to one model: it lies in the model's folder, or there is one model.

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
class _Decision:
    """How one model's scores are to be read, and what its development files say."""

    probabilities: bool
    fit: Calibration | None
    threshold: float | None


def metrics_table(evaluated: Sequence[Evaluated], inputs: MetricInputs) -> tuple[Table, Figures]:
    """One row a model and subset. The figures are fractions, and bits."""
    columns = _metric_columns(inputs)
    rows, figures = [], {}
    notes = [
        "minDCF, actDCF, Cllr: as ASVspoof 5 defines them (Pspoof 0.05, Cmiss 1, Cfa 10; "
        "actDCF decides at -0.642)"
    ]
    for of_model in evaluated:
        found, notes_on_model = _measure(of_model, inputs, len(evaluated))
        notes += [f"{of_model.name}: {note}" for note in notes_on_model]
        for result in of_model.with_eer:
            record = found[result.subset]
            figures[of_model.name, result.subset] = record
            cells = [cell(result, record) for cell in columns.values()]
            rows.append([of_model.name, result.subset, *cells])
    return Table("Metrics", ["model", "subset", *columns], rows, notes, n_names=2), figures


def _measure(
    of_model: Evaluated, inputs: MetricInputs, n_models: int
) -> tuple[dict[str, dict], list[str]]:
    """(subset -> figures, what a reader must know about them)."""
    results = of_model.with_eer
    if not results:
        return {}, ["no score file with both classes"]
    decision = _decide(of_model, inputs, n_models)
    found = {}
    for result in results:
        record = _costs(result, decision)
        if decision.threshold is not None:
            record["at_dev_threshold"] = _errors_at(result, decision.threshold)
        if inputs.asv and result.subset == "19LA":
            record["min_tdcf_2019_legacy"] = eval_metrics.min_tdcf_2019(result.counts, inputs.asv)
        found[result.subset] = record
    return found, _metric_notes(found, inputs, decision)


def _decide(of_model: Evaluated, inputs: MetricInputs, n_models: int) -> _Decision:
    dev = {}
    for purpose, given in (("threshold", inputs.threshold_from), ("calibrate", inputs.calibrate)):
        if given:
            dev[purpose] = _read_dev(find_dev_file(of_model.model.folder, given, n_models))
    files = [result.trials for result in of_model.with_eer] + list(dev.values())
    probabilities = eval_metrics.holds_probabilities(files)
    fit = threshold = None
    if "calibrate" in dev:
        llrs, _ = eval_metrics.as_llrs(dev["calibrate"].scores, probabilities)
        fit = eval_metrics.fit_calibration(llrs, dev["calibrate"].is_real)
    if "threshold" in dev:
        _, threshold = eval_metrics.compute_eer(dev["threshold"].real, dev["threshold"].fake)
    return _Decision(probabilities, fit, threshold)


def _read_dev(path: Path) -> Scores:
    trials = score_files.read_scores(path)
    n_real = int(np.sum(trials.is_real))
    n_fake = len(trials.names) - n_real
    if not n_real or not n_fake:
        raise InputError(
            f"{path}: expected development scores of both classes, got "
            f"{n_real} real and {n_fake} fake trials"
        )
    return trials


def _costs(result: Result, decision: _Decision) -> dict[str, object]:
    real, n_real = eval_metrics.as_llrs(result.real, decision.probabilities)
    fake, n_fake = eval_metrics.as_llrs(result.fake, decision.probabilities)
    costs: dict[str, object] = {
        "auc": eval_metrics.auc(result.counts),
        "min_dcf": eval_metrics.min_dcf(result.counts),
        "act_dcf": eval_metrics.compute_act_dcf(real, fake),
        "cllr": eval_metrics.compute_cllr(real, fake),
        "scores_are": "probabilities" if decision.probabilities else "log-likelihood ratios",
        "n_saturated": n_real + n_fake,
    }
    fit = decision.fit
    if fit:
        costs["calibrated"] = {
            "act_dcf": eval_metrics.compute_act_dcf(fit(real), fit(fake)),
            "cllr": eval_metrics.compute_cllr(fit(real), fit(fake)),
            "slope": fit.slope,
            "offset": fit.offset,
        }
    return costs


def _errors_at(result: Result, threshold: float) -> dict[str, float]:
    rejected, accepted = eval_metrics.errors_at(threshold, result.real, result.fake)
    n_real, n_fake = len(result.real), len(result.fake)
    return {
        "threshold": threshold,
        "accuracy": 1 - (rejected + accepted) / (n_real + n_fake),
        "frr": rejected / n_real,
        "far": accepted / n_fake,
    }


Cell = Callable[[Result, dict], str]


def _metric_columns(inputs: MetricInputs) -> dict[str, Cell]:
    """Column -> its cell, from a result and the figures found for it."""
    columns: dict[str, Cell] = {
        "EER (%)": lambda result, found: percent(result.eer),
        "AUC (%)": lambda result, found: percent(100 * found["auc"]),
        "minDCF": lambda result, found: f"{found['min_dcf']:.4f}",
        "actDCF": lambda result, found: f"{found['act_dcf']:.4f}",
        "Cllr (bits)": lambda result, found: f"{found['cllr']:.4f}",
    }
    if inputs.calibrate:
        columns["actDCF cal."] = lambda result, found: f"{found['calibrated']['act_dcf']:.4f}"
        columns["Cllr cal."] = lambda result, found: f"{found['calibrated']['cllr']:.4f}"
    if inputs.threshold_from:
        columns["accuracy (%)"] = _at_threshold("accuracy")
        columns["FRR (%)"] = _at_threshold("frr")
        columns["FAR (%)"] = _at_threshold("far")
    if inputs.asv:
        columns["min t-DCF (legacy 2019)"] = _tdcf
    return columns


def _at_threshold(key: str) -> Cell:
    return lambda result, found: percent(100 * found["at_dev_threshold"][key])


def _tdcf(result: Result, found: dict) -> str:
    value = found.get("min_tdcf_2019_legacy")
    return ABSENT if value is None else f"{value:.5f}"


def _metric_notes(found: dict[str, dict], inputs: MetricInputs, decision: _Decision) -> list[str]:
    notes = _notes_on_scores(found, decision.probabilities)
    fit = decision.fit
    if fit:
        note = (
            f"cal.: calibrated by logistic regression on {inputs.calibrate}: "
            f"LLR = {fit.slope:.4g} x score {fit.offset:+.4g}"
        )
        if fit.slope < 0:
            note += " (negative slope: the development scores point the wrong way)"
        notes.append(note)
    if decision.threshold is not None:
        notes.append(
            f"accuracy, FRR, FAR: real if the score is above {decision.threshold:.6g}, "
            f"the EER's threshold of {inputs.threshold_from}"
        )
    return notes


def _notes_on_scores(found: dict[str, dict], probabilities: bool) -> list[str]:
    if not probabilities:
        return ["the scores are taken for log-likelihood ratios (some lie outside [0, 1])"]
    notes = [
        "the scores are taken for probabilities (all lie in [0, 1]): actDCF and Cllr use their "
        "log odds"
    ]
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


# ── By codec or attack ───────────────────────────────────────────────────────────────────────────


def by_source_table(
    evaluated: Sequence[Evaluated],
    sources: dict[str, dict[str, str]],
    n_resamples: int,
    seed: int,
) -> tuple[Table, Figures]:
    """EER of each source's fakes against all real trials.

    Args:
        sources: subset -> trial's name -> its codec or attack, "-" if real or unknown. Results of
            other subsets are left out.
    """
    rows, figures = [], {}
    for of_model in evaluated:
        for result in of_model.with_eer:
            if result.subset not in sources:
                continue
            parts = _by_source(result, sources[result.subset], n_resamples, seed)
            rows += [_source_row(source, part) for source, part in parts.items()]
            records = [{"source": source, **part.record()} for source, part in parts.items()]
            figures[of_model.name, result.subset] = {"by_source": records}
    columns = ["model", "subset", "source", "real", "fake", "EER (%)", "95 % interval"]
    notes = [
        "each source's fakes against all real trials of the subset; true EERs, over 50 % if inverted"
    ]
    return Table("EER by source", columns, rows, notes, n_names=3), figures


def _by_source(
    result: Result, source_of: dict[str, str], n_resamples: int, seed: int
) -> dict[str, Result]:
    tags = np.array([source_of.get(name, "-") for name in result.trials.names])
    parts = {}
    for source in sorted(set(tags[~result.trials.is_real].tolist())):
        trials = _with_pooled_real(result.trials, tags == source)
        parts[source] = evaluate_trials(
            result.model, result.subset, result.file, trials, n_resamples, seed
        )
    return parts


def _with_pooled_real(trials: Scores, of_source: np.ndarray) -> Scores:
    keep = np.flatnonzero(trials.is_real | of_source)
    return Scores([trials.names[i] for i in keep], trials.scores[keep], trials.is_real[keep])


def _source_row(source: str, part: Result) -> list[str]:
    interval = part.interval
    return [
        part.model,
        part.subset,
        "unknown" if source == "-" else source,
        str(len(part.real)),
        str(len(part.fake)),
        percent(part.eer),
        f"{interval.low:.3f} .. {interval.high:.3f}" if interval else ABSENT,
    ]


# ── Score files against the protocol ─────────────────────────────────────────────────────────────

N_NAMED = 3  # of each kind of problem


def protocol_labels(task: str, root: str | Path, subset: str) -> dict[str, tuple[bool, str]]:
    """Trial's name -> (is it real, its codec or attack), from the corpus's own protocol.

    Raises InputError where the corpus or its protocol is absent or malformed.
    """
    trials = protocols.read_protocol(task, root, protocols.SCORED[task][subset])
    return {trial.name: (trial.label == protocols.REAL, trial.source) for trial in trials}


def find_problems(path: str | Path, labels: dict[str, tuple[bool, str]]) -> list[str]:
    """What is wrong with a score file, one line a kind: how many, and the first names."""
    trials = score_files.read_rows(path)
    scored = dict(zip(trials.names, trials.is_real, strict=True))
    known = [name for name in scored if name in labels]
    kinds = {
        "missing (in the protocol, not scored)": [name for name in labels if name not in scored],
        "extra (scored, not in the protocol)": [name for name in scored if name not in labels],
        "duplicated": [name for name, count in Counter(trials.names).items() if count > 1],
        "non-finite": [trials.names[i] for i in np.flatnonzero(~np.isfinite(trials.scores))],
        "wrong label": [name for name in known if labels[name][0] != scored[name]],
    }
    return [
        f"{path}: {len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names
    ]


def _first(names: Sequence[str]) -> str:
    more = ", .." if len(names) > N_NAMED else ""
    return ", ".join(name[:60] for name in names[:N_NAMED]) + more
