"""What `--metrics`, `--by source`, `--compare` and `-d` ask of results: tables, figures for JSON, mismatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import eval_metrics
from evaluation import bootstrap
from evaluation.results import Model, Result, evaluate_trials
from evaluation.tables import ABSENT, Table, percent, signed
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


def find_dev_file(model: Model, given: str, n_models: int) -> Path:
    """A development file belongs to one model: it lies in the model's folder, or there is one model only."""
    inside = model.folder / given
    if inside.is_file():
        return inside
    if n_models > 1:
        raise InputError(
            f"{inside}: no such file; development scores belong to one model: with {n_models} models, put such a "
            "file into each model's folder and give its name, or name one model with --result_folder"
        )
    return Path(given)


def metrics_table(
    models: Sequence[Model], results: Sequence[Result], inputs: MetricInputs
) -> Table:
    """One row a model and subset. Fills `extra` of the results with the figures: fractions, and bits."""
    columns = _metric_columns(inputs)
    rows, notes = (
        [],
        [
            "minDCF, actDCF, Cllr: as ASVspoof 5 defines them (Pspoof 0.05, Cmiss 1, Cfa 10; actDCF decides at -0.642)"
        ],
    )
    for model in models:
        own = [result for result in results if result.model == model.name and result.point]
        notes += [f"{model.name}: {note}" for note in _measure(model, own, inputs, len(models))]
        rows += [
            [model.name, result.subset, *(cell(result) for cell in columns.values())]
            for result in own
        ]
    return Table("Metrics", ["model", "subset", *columns], rows, notes, n_names=2)


def _measure(
    model: Model, results: Sequence[Result], inputs: MetricInputs, n_models: int
) -> list[str]:
    """Fill `extra` of one model's results; return what a reader must know about the figures."""
    if not results:
        return ["no score file with both classes"]
    dev = {
        name: _read_dev(find_dev_file(model, given, n_models))
        for name, given in (("threshold", inputs.threshold_from), ("calibrate", inputs.calibrate))
        if given
    }
    probabilities = eval_metrics.holds_probabilities(
        [result.trials for result in results] + list(dev.values())
    )
    fit = threshold = None
    if "calibrate" in dev:
        fit = eval_metrics.fit_calibration(
            eval_metrics.as_llrs(dev["calibrate"].scores, probabilities)[0],
            dev["calibrate"].is_real,
        )
    if "threshold" in dev:
        _, threshold = eval_metrics.compute_eer(dev["threshold"].real, dev["threshold"].fake)
    for result in results:
        result.extra.update(_costs(result, probabilities, fit))
        if threshold is not None:
            result.extra["at_dev_threshold"] = _decisions(result, threshold)
        if inputs.asv and result.subset == "19LA":
            result.extra["min_tdcf_2019_legacy"] = eval_metrics.compute_min_tdcf_2019(
                result.real, result.fake, inputs.asv
            )
    return _metric_notes(results, inputs, probabilities, threshold, fit)


def _read_dev(path: Path) -> Scores:
    trials = score_files.read_scores(path)
    if trials.is_real.all() or not trials.is_real.any():
        raise InputError(
            f"{path}: expected development scores of both classes, got "
            f"{np.sum(trials.is_real)} real and {np.sum(~trials.is_real)} fake trials"
        )
    return trials


def _costs(
    result: Result, probabilities: bool, fit: eval_metrics.Calibration | None
) -> dict[str, object]:
    real, n_real = eval_metrics.as_llrs(result.real, probabilities)
    fake, n_fake = eval_metrics.as_llrs(result.fake, probabilities)
    costs: dict[str, object] = {
        "auc": eval_metrics.compute_auc(result.real, result.fake),
        "min_dcf": eval_metrics.compute_min_dcf(result.real, result.fake),
        "act_dcf": eval_metrics.compute_act_dcf(real, fake),
        "cllr": eval_metrics.compute_cllr(real, fake),
        "scores_are": "probabilities" if probabilities else "log-likelihood ratios",
        "n_saturated": n_real + n_fake,
    }
    if fit:
        costs["calibrated"] = {
            "act_dcf": eval_metrics.compute_act_dcf(fit(real), fit(fake)),
            "cllr": eval_metrics.compute_cllr(fit(real), fit(fake)),
            "slope": fit.slope,
            "offset": fit.offset,
        }
    return costs


def _decisions(result: Result, threshold: float) -> dict[str, float]:
    rejected, accepted = eval_metrics.errors_at(threshold, result.real, result.fake)
    n_real, n_fake = len(result.real), len(result.fake)
    return {
        "threshold": threshold,
        "accuracy": 1 - (rejected + accepted) / (n_real + n_fake),
        "frr": rejected / n_real,
        "far": accepted / n_fake,
    }


def _metric_columns(inputs: MetricInputs) -> dict[str, Callable[[Result], str]]:
    """Column -> its cell of a result."""
    columns: dict[str, Callable[[Result], str]] = {
        "EER (%)": lambda r: percent(r.eer),
        "AUC (%)": lambda r: percent(100 * r.extra["auc"]),
        "minDCF": lambda r: f"{r.extra['min_dcf']:.4f}",
        "actDCF": lambda r: f"{r.extra['act_dcf']:.4f}",
        "Cllr (bits)": lambda r: f"{r.extra['cllr']:.4f}",
    }
    if inputs.calibrate:
        columns["actDCF cal."] = lambda r: f"{r.extra['calibrated']['act_dcf']:.4f}"
        columns["Cllr cal."] = lambda r: f"{r.extra['calibrated']['cllr']:.4f}"
    if inputs.threshold_from:
        for name, key in (("accuracy (%)", "accuracy"), ("FRR (%)", "frr"), ("FAR (%)", "far")):
            columns[name] = lambda r, key=key: percent(100 * r.extra["at_dev_threshold"][key])
    if inputs.asv:
        columns["min t-DCF (legacy 2019)"] = (
            lambda r: f"{r.extra['min_tdcf_2019_legacy']:.5f}" if r.subset == "19LA" else ABSENT
        )
    return columns


def _metric_notes(
    results: Sequence[Result],
    inputs: MetricInputs,
    probabilities: bool,
    threshold: float | None,
    fit: eval_metrics.Calibration | None,
) -> list[str]:
    notes = []
    if probabilities:
        notes.append(
            "the scores are taken for probabilities (all lie in [0, 1]): actDCF and Cllr use their log odds"
        )
        saturated = [
            f"{r.subset} {r.extra['n_saturated']}" for r in results if r.extra["n_saturated"]
        ]
        if saturated:
            notes.append(
                f"WARNING: scores of exactly 0 or 1, rounded by softmax: {', '.join(saturated)}; actDCF and Cllr put them "
                "at the nearest float32 inside and are approximate; generate_score.py --llr keeps the logit difference"
            )
    else:
        notes.append("the scores are taken for log-likelihood ratios (some lie outside [0, 1])")
    if fit:
        notes.append(
            f"cal.: calibrated by logistic regression on {inputs.calibrate}: LLR = {fit.slope:.4g} x score {fit.offset:+.4g}"
            + (
                " (negative slope: the development scores point the wrong way)"
                if fit.slope < 0
                else ""
            )
        )
    if threshold is not None:
        notes.append(
            f"accuracy, FRR, FAR: real if the score is above {threshold:.6g}, the EER's threshold of {inputs.threshold_from}"
        )
    return notes


# ── By codec or attack ───────────────────────────────────────────────────────────────────────────


def by_source_table(
    results: Sequence[Result], sources: dict[str, dict[str, str]], n_resamples: int, seed: int
) -> Table:
    """EER of each source's fakes against all real trials. Fills `extra` of the results.

    Args:
        results: those of subsets that `sources` lacks are left out.
        sources: subset -> trial's name -> its codec or attack, "-" if real or unknown.
    """
    rows = []
    for result in (result for result in results if result.point and result.subset in sources):
        own = [sources[result.subset].get(name, "-") for name in result.trials.names]
        parts = [
            (source, _with_pooled_real(result.trials, np.array([tag == source for tag in own])))
            for source in sorted(
                {tag for tag, is_real in zip(own, result.trials.is_real) if not is_real}
            )
        ]
        found = [
            (
                source,
                evaluate_trials(
                    result.model, result.subset, result.file, trials, n_resamples, seed
                ),
            )
            for source, trials in parts
        ]
        result.extra["by_source"] = [{"source": source, **part.record()} for source, part in found]
        rows += [
            [
                result.model,
                result.subset,
                "unknown" if source == "-" else source,
                str(len(part.real)),
                str(len(part.fake)),
                percent(part.eer),
                _interval(part),
            ]
            for source, part in found
        ]
    return Table(
        "EER by source",
        ["model", "subset", "source", "real", "fake", "EER (%)", "95 % interval"],
        rows,
        [
            "each source's fakes against all real trials of the subset; true EERs, over 50 % if inverted"
        ],
        n_names=3,
    )


def _with_pooled_real(trials: Scores, of_source: np.ndarray) -> Scores:
    keep = np.flatnonzero(trials.is_real | of_source)
    return Scores([trials.names[i] for i in keep], trials.scores[keep], trials.is_real[keep])


def _interval(result: Result) -> str:
    return f"{result.interval.low:.3f} .. {result.interval.high:.3f}" if result.interval else ABSENT


# ── Two models ───────────────────────────────────────────────────────────────────────────────────


def compare(a: Model, b: Model, n_resamples: int, seed: int) -> tuple[Table, list[dict]]:
    """Paired bootstrap of EER(A) - EER(B) on every subset that both have: (table, records for JSON)."""
    shared = [subset for subset in a.files if subset in b.files]
    records = [
        record for subset in shared if (record := _difference(a, b, subset, n_resamples, seed))
    ]
    if not records:
        raise InputError(f"--compare: {a.name} and {b.name} have no subset with an EER in common")
    for record, p_holm in zip(records, bootstrap.holm([record["p"] for record in records])):
        better = a.name if record["difference"] < 0 else b.name
        record |= {
            "p_holm": p_holm,
            "verdict": f"{better} is better"
            if p_holm < 1 - bootstrap.COVERAGE
            else "not separable",
        }
    rows = [
        [
            r["subset"],
            percent(r["eer_a"]),
            percent(r["eer_b"]),
            signed(r["difference"]),
            f"{signed(r['interval'][0])} .. {signed(r['interval'][1])}",
            f"{r['p']:.3f}",
            f"{r['p_holm']:.3f}",
            r["verdict"],
        ]
        for r in records
    ]
    units = sorted({record["resampled_by"] for record in records})
    notes = [
        f"A: {a.name}; B: {b.name}; true EERs in percent, difference: A - B",
        f"paired bootstrap: both models on the same {n_resamples} resamples (by {' or '.join(units)}), seed {seed}; 95 % interval",
        f"p: two-sided; p (Holm): corrected for looking at {len(records)} subsets, the verdict's basis (below 0.05)",
    ]
    columns = [
        "subset",
        "EER A",
        "EER B",
        "difference",
        "95 % interval",
        "p",
        "p (Holm)",
        "verdict",
    ]
    return Table(f"{a.name} against {b.name}", columns, rows, notes), records


def _difference(
    a: Model, b: Model, subset: str, n_resamples: int, seed: int
) -> dict[str, object] | None:
    """The record of one subset; None where it has one class only."""
    ours, theirs = (score_files.read_scores(model.files[subset]) for model in (a, b))
    if ours.is_real.all() or not ours.is_real.any():
        return None
    theirs = _in_order_of(ours, theirs, a.files[subset], b.files[subset])
    clusters, unit = bootstrap.find_clusters(ours.names, subset)
    eers = bootstrap.resample_eers(
        [ours.scores, theirs.scores], ours.is_real, clusters, n_resamples, seed
    )
    differences = 100 * (eers[:, 0] - eers[:, 1])
    eer_a, eer_b = (
        100 * eval_metrics.compute_eer(trials.real, trials.fake)[0] for trials in (ours, theirs)
    )
    return {
        "model_a": a.name,
        "model_b": b.name,
        "subset": subset,
        "eer_a": eer_a,
        "eer_b": eer_b,
        "difference": eer_a - eer_b,
        "interval": list(bootstrap.interval(differences)),
        "p": bootstrap.p_value(differences),
        "resampled_by": unit,
    }


def _in_order_of(ours: Scores, theirs: Scores, our_file: Path, their_file: Path) -> Scores:
    """The second model's trials in the order of the first's. Raises InputError unless they are the same trials."""
    position = {name: i for i, name in enumerate(theirs.names)}
    if only := set(ours.names) ^ set(theirs.names):
        raise InputError(
            f"--compare: {our_file} and {their_file} hold different trials: {len(only)} are in one file only "
            f"(first: {min(only)[:60]}); score both models on the same trials"
        )
    order = np.array([position[name] for name in ours.names])
    differ = np.flatnonzero(theirs.is_real[order] != ours.is_real)
    if differ.size:
        raise InputError(
            f"--compare: {our_file} and {their_file} disagree on which of {differ.size} trial(s) are real "
            f"(first: {ours.names[differ[0]][:60]}); check their third column"
        )
    return Scores(ours.names, theirs.scores[order], ours.is_real)


# ── Score files against the protocol ─────────────────────────────────────────────────────────────

N_NAMED = 3  # of each kind of problem


def protocol_labels(task: str, root: str | Path, subset: str) -> dict[str, tuple[bool, str]]:
    """Trial's name -> (is it real, its codec or attack), from the corpus's own protocol.

    Raises InputError where the corpus or its protocol is absent or malformed.
    """
    part = protocols.SCORED[task][subset]
    return {
        trial.name: (trial.label == protocols.REAL, trial.source)
        for trial in protocols.read_protocol(task, root, part)
    }


def find_problems(path: str | Path, labels: dict[str, tuple[bool, str]]) -> list[str]:
    """What is wrong with a score file, one line a kind: how many, and the first names."""
    trials = score_files.read_rows(path)
    scored = dict(zip(trials.names, trials.is_real))
    kinds = {
        "missing (in the protocol, not scored)": [name for name in labels if name not in scored],
        "extra (scored, not in the protocol)": [name for name in scored if name not in labels],
        "duplicated": [name for name, count in Counter(trials.names).items() if count > 1],
        "non-finite": [trials.names[i] for i in np.flatnonzero(~np.isfinite(trials.scores))],
        "wrong label": [
            name
            for name, is_real in scored.items()
            if name in labels and labels[name][0] != is_real
        ],
    }
    return [
        f"{path}: {len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names
    ]


def _first(names: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in names[:N_NAMED]) + (
        ", .." if len(names) > N_NAMED else ""
    )
