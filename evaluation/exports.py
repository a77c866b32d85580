"""Score files for other people's programs, and DET points. Each writer returns what it wrote."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import eval_metrics
from evaluation.results import Evaluated, Result
from runtime import files


def write_asvspoof5(evaluated: Sequence[Evaluated], folder: Path) -> list[str]:
    """One `<model>_<subset>.tsv` a score file, as ASVspoof 5's evaluation package reads it.

    The package takes the scores for log-likelihood ratios: probabilities become log odds.

    Returns:
        One line a file: what it holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for of_model in evaluated:
        for subset, result in of_model.results.items():
            path = folder / f"{_plain(of_model.name)}_{_plain(subset)}.tsv"
            llrs, n_saturated = eval_metrics.as_llrs(result.trials.scores, result.probabilities)
            rows = zip(result.trials.names, llrs.tolist(), strict=True)
            with files.atomic_write(path) as file:
                file.write("filename\tcm-score\n")
                file.writelines(f"{trial}\t{score!r}\n" for trial, score in rows)
            written.append(f"{path}: {_described(result, n_saturated)}")
    return written


def write_arena(evaluated: Sequence[Evaluated], folder: Path) -> list[str]:
    """`scores.txt` and `result.yaml` of the Speech Anti-Spoofing Arena for each score file.

    They lie in DIR where there is one score file, else in DIR/<model>/<subset>. The scores are log
    odds, which no rounding makes equal; the EER is by the Arena's own rule.

    Returns:
        One line a file: what it holds.
    """
    results = [(m.name, result) for m in evaluated for result in m.with_eer]
    written = []
    for model, result in results:
        place = folder if len(results) == 1 else folder / _plain(model) / _plain(result.subset)
        place.mkdir(parents=True, exist_ok=True)
        llrs, n_saturated = eval_metrics.as_llrs(result.trials.scores, result.probabilities)
        rows = zip(result.trials.names, llrs.tolist(), strict=True)
        text = "".join(f"{trial} {score!r}\n" for trial, score in rows)
        with files.atomic_write(place / "scores.txt") as file:
            file.write(text)
        is_real = result.trials.is_real
        eer = 100 * eval_metrics.arena_eer(llrs[is_real], llrs[~is_real])
        with files.atomic_write(place / "result.yaml") as file:
            file.write(_arena_yaml(model, result, eer, text))
        written.append(
            f"{place / 'scores.txt'}: {_described(result, n_saturated)}; EER by the Arena's rule "
            f"{eer:.3f} %"
        )
    return written


def _arena_yaml(model: str, result: Result, eer: float, scores_text: str) -> str:
    """JSON strings are YAML strings too, so that a hostile name stays one."""
    slug = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    digest = hashlib.sha256(scores_text.encode()).hexdigest()
    return "\n".join(
        [
            "schema_version: 1",
            "system:",
            f"  name: {json.dumps(model)}",
            f"  slug: {json.dumps(slug)}",
            "dataset:",
            f"  id: {json.dumps(result.subset)}  # the Arena's id of the data set",
            "  split: test",
            "scores:",
            f"  eer_percent: {eer!r}",
            f"  n_trials: {len(result.trials.names)}",
            f"  n_skipped: {result.n_missing}",
            "artifact:",
            f"  scores_sha256: {digest}",
            "",
        ]
    )


def _described(result: Result, n_saturated: int) -> str:
    if not result.probabilities:
        return "log-likelihood ratios as they are in the score file"
    line = "log odds of the score file's probabilities"
    if n_saturated:
        line += f", {n_saturated} of exactly 0 or 1 at the nearest float32 inside"
    return line


def write_det_points(evaluated: Sequence[Evaluated], path: Path) -> None:
    """Every point of every DET curve as CSV. Below all scores the threshold is -inf."""
    with files.atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "subset", "threshold", "frr_percent", "far_percent"])
        for of_model in evaluated:
            for result in of_model.with_eer:
                counts = result.counts
                thresholds = ["-inf", *counts.thresholds[1:].tolist()]
                frr, far = (100 * counts.frr).tolist(), (100 * counts.far).tolist()
                for point in zip(thresholds, frr, far, strict=True):
                    writer.writerow([of_model.name, result.subset, *point])


def _plain(name: str) -> str:
    """The name as part of a file name."""
    return name.replace("/", "_")
