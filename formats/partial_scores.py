"""Scores of a subset that is not finished, both ends: `<subset>_partial.npz` beside the results.

A file that cannot be read keeps a subset from being finished. What was computed of it waits here
for the next run, which scores the rest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from formats.protocols import Trial
from runtime.files import atomic_write


def partial_path(folder: Path, subset: str) -> Path:
    return folder / f"{subset}_partial.npz"


def key_of(trial: Trial) -> str:
    """A trial and the state of its file: a recording that was replaced is scored again."""
    about = os.stat(trial.path)
    return f"{trial.name} {about.st_size} {about.st_mtime_ns}"


def write_partial(path: Path, made_by: str, keys: Sequence[str], logits: np.ndarray) -> None:
    """Replace the store, whole or not at all.

    Args:
        made_by: all that decides the logits: weights, front end, precision.
        keys: N trials, by key_of().
        logits: (N, 2) float64, finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        np.savez(file, made_by=np.array(made_by), keys=np.array(keys), logits=logits)


def read_partial(path: Path, made_by: str) -> dict[str, np.ndarray]:
    """What write_partial() wrote: key -> logits (2,); nothing if absent, damaged or of others."""
    try:
        with np.load(path, allow_pickle=False) as store:
            found, keys, logits = str(store["made_by"]), store["keys"], store["logits"]
    except Exception:  # damaged zip files fail in many ways; what is lost is computed again
        return {}
    if found != made_by or logits.shape != (len(keys), 2):
        return {}
    return dict(zip(keys.tolist(), logits, strict=True))
