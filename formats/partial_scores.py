"""Scores of a subset that is not finished, both ends: `<subset>_partial.npz` beside the results.

A file that cannot be read keeps a subset from being finished. What was computed of it waits here
for the next run, which scores the rest.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.files import atomic_write


def partial_path(folder: Path, subset: str) -> Path:
    return folder / f"{subset}_partial.npz"


def write_partial(path: Path, made_by: str, names: Sequence[str], logits: np.ndarray) -> None:
    """Replace the store, whole or not at all.

    Args:
        made_by: all that decides the logits: weights, front end, precision.
        names: N trials.
        logits: (N, 2) float64, finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        np.savez(file, made_by=np.array(made_by), names=np.array(names), logits=logits)


def read_partial(path: Path, made_by: str) -> dict[str, np.ndarray]:
    """What write_partial() wrote: trial -> logits (2,); nothing if absent, damaged or of others."""
    try:
        with np.load(path, allow_pickle=False) as store:
            found, names, logits = str(store["made_by"]), store["names"], store["logits"]
    # numpy and zipfile each fail in ways of their own; what is lost is computed again.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    if found != made_by or logits.shape != (len(names), 2):
        return {}
    return dict(zip(names.tolist(), logits, strict=True))
