"""Scores of a subset that is not finished, both ends: `<subset>_partial.npz` beside the results.

A file that cannot be read, or an interruption, keeps a subset from being finished. What was
computed of it waits here for the next run, which scores the rest. Each process has a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from formats.protocols import Trial
from runtime.files import atomic_write


class Kept(NamedTuple):
    """What is known of one trial."""

    logits: np.ndarray  # (2,) float64
    decoder: str  # what read its file


def partial_path(folder: Path, subset: str, rank: int = 0) -> Path:
    return folder / f"{subset}_partial{f'_{rank}' if rank else ''}.npz"


def partial_paths(folder: Path, subset: str) -> list[Path]:
    """The files of all processes."""
    return sorted(folder.glob(f"{subset}_partial*.npz"))


def key_of(trial: Trial) -> str:
    """A trial and the state of its file: a recording that was replaced is scored again."""
    about = os.stat(trial.path)
    return f"{trial.name} {about.st_size} {about.st_mtime_ns}"


def write_partial(path: Path, made_by: str, known: Mapping[str, Kept]) -> None:
    """Replace a store, whole or not at all.

    Args:
        made_by: all that decides the logits: weights, front end, precision.
        known: trials, by key_of(); their logits are finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logits = np.array([kept.logits for kept in known.values()]).reshape(len(known), 2)
    with atomic_write(path, "wb") as file:
        np.savez(
            file,
            made_by=np.array(made_by),
            keys=np.array(list(known), str),
            logits=logits,
            decoders=np.array([kept.decoder for kept in known.values()], str),
        )


def read_partial(path: Path, made_by: str) -> dict[str, Kept]:
    """What write_partial() wrote; nothing if absent, damaged or of others."""
    try:
        with np.load(path, allow_pickle=False) as store:
            found, keys, logits = str(store["made_by"]), store["keys"], store["logits"]
            decoders = store["decoders"]
    except Exception:  # damaged zip files fail in many ways; what is lost is computed again
        return {}
    if found != made_by or logits.shape != (len(keys), 2) or decoders.shape != keys.shape:
        return {}
    return dict(zip(keys.tolist(), map(Kept, logits, decoders.tolist()), strict=True))
