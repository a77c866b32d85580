"""Score files held against the protocol they claim to cover."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import eval_metrics

N_NAMED = 3                # of each kind of problem


def protocol_labels(task: str, root: str | Path, subset: str) -> dict[str, tuple[bool, str]]:
    """Trial's name -> (is it real, its codec or attack), from the corpus's own protocol.

    Raises InputError where the corpus or its protocol is absent or malformed.
    """
    import dataset                     # brings torch: only who gives a corpus pays for it

    part = dataset.SCORED[task][subset]
    return {trial.name: (trial.label == dataset.REAL, trial.source) for trial in dataset.read_protocol(task, root, part)}


def find_problems(path: str | Path, labels: dict[str, tuple[bool, str]]) -> list[str]:
    """What is wrong with a score file, one line a kind: how many, and the first names."""
    trials = eval_metrics.read_rows(path)
    scored = dict(zip(trials.names, trials.is_real))
    kinds = {
        "missing (in the protocol, not scored)": [name for name in labels if name not in scored],
        "extra (scored, not in the protocol)": [name for name in scored if name not in labels],
        "duplicated": [name for name, count in Counter(trials.names).items() if count > 1],
        "non-finite": [trials.names[i] for i in np.flatnonzero(~np.isfinite(trials.scores))],
        "wrong label": [name for name, is_real in scored.items() if name in labels and labels[name][0] != is_real],
    }
    return [f"{path}: {len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names]


def _first(names: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in names[:N_NAMED]) + (", .." if len(names) > N_NAMED else "")
