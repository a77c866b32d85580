"""Where a training run stands, both ends: `last_state.pt`, all that --continue_training needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats import torch_files
from runtime.cli import InputError

FORMAT = "codecfake-state-1"
RECORD_KEYS = {"epoch", "loss", "dev_loss", "dev_eer", "lr", "seconds"}  # of one epoch in history
REMEDY = "choose another -o to train again from epoch 1 to the same weights"


@dataclass
class Progress:
    """How far the epoch under way has come."""

    step: int = 0  # steps that are done
    loss: float = 0.0  # sum of batch losses, each times its batch's total class weight
    weight: float = 0.0  # sum of the total class weights
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        return self.loss / self.weight


@dataclass
class TrainingState:
    """Everything a run needs to go on as if it had not been interrupted."""

    settings: dict[str, Any]  # all that shapes the weights
    epoch: int = 1  # the epoch under way
    progress: Progress = field(default_factory=Progress)
    history: list[dict[str, Any]] = field(default_factory=list)  # a record an epoch
    head: dict[str, Tensor] = field(default_factory=dict)  # state_dict()
    optimiser: dict[str, Any] = field(default_factory=dict)  # state_dict()


def write_state(path: str | Path, state: TrainingState) -> None:
    """Replace the state at `path`, whole or not at all."""
    content = {"format": FORMAT, **vars(state), "progress": asdict(state.progress)}
    torch_files.save(path, content)


def read_state(path: str | Path) -> TrainingState:
    """Read what write_state() wrote.

    Raises:
        InputError: not the state of a training run, or damaged: the message names the part.
    """
    try:
        content = torch_files.load(path)
    except InputError as error:
        raise InputError(f"{error}; or {REMEDY}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(
            f"{path}: expected the state of a training run, found something else; choose another -o"
        )
    if content.keys() != vars(TrainingState({})).keys():
        raise _damaged(path, "list of parts")
    state = TrainingState(**content)
    if not isinstance(state.progress, dict) or state.progress.keys() != vars(Progress()).keys():
        raise _damaged(path, "progress")
    state.progress = Progress(**state.progress)
    for part, is_right in _check_parts(state).items():
        if not is_right:
            raise _damaged(path, part)
    return state


def _check_parts(state: TrainingState) -> dict[str, bool]:
    """Part of a state -> whether it holds what write_state() puts there."""
    return {
        "settings": _is_plain(state.settings, dict),
        "epoch": isinstance(state.epoch, int),
        "progress": all(isinstance(x, (int, float)) for x in vars(state.progress).values()),
        "history": _is_plain(state.history, list) and all(map(_is_record, state.history)),
        "head": isinstance(state.head, dict),
        "optimiser": isinstance(state.optimiser, dict),
    }


def _is_plain(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and torch_files.is_plain(value)


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not record.keys() >= RECORD_KEYS:
        return False
    return isinstance(record["dev_loss"], (int, float))


def restore(
    path: str | Path, state: TrainingState, head: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    """Put the state's weights and the optimiser's moments back where they came from.

    Args:
        path: for the message.
        optimiser: torch.optim.Adam over head.parameters(); its options stay as they are.

    Raises:
        InputError: names or shapes are not those of this head; nothing is changed then.
    """
    if not fits_head(state.head, head):
        raise _damaged(path, "head")
    if not fits_adam(state.optimiser, head):
        raise _damaged(path, "optimiser")
    head.load_state_dict(state.head)
    moments = {
        "state": state.optimiser["state"],
        "param_groups": optimiser.state_dict()["param_groups"],
    }
    optimiser.load_state_dict(moments)


def fits_head(weights: dict[str, Any], head: nn.Module) -> bool:
    """Whether the weights have the names and shapes of this head's."""
    return _shapes(weights) == _shapes(head.state_dict())


def fits_adam(state: dict[str, Any], head: nn.Module) -> bool:
    """Whether an optimiser's state is what Adam remembers of this head's parameters."""
    moments = state.get("state")
    if not isinstance(moments, dict):
        return False
    shapes = dict(enumerate(p.shape for p in head.parameters()))
    return all(_are_moments(moment, shapes.get(number)) for number, moment in moments.items())


def _are_moments(moment: Any, shape: torch.Size | None) -> bool:
    """Whether this is what Adam remembers of a parameter of that shape (None: there is none)."""
    if shape is None or not isinstance(moment, dict):
        return False
    return _shapes(moment) == {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}


def _shapes(tensors: dict[str, Any]) -> dict[str, torch.Size | None]:
    return {name: getattr(tensor, "shape", None) for name, tensor in tensors.items()}


def _damaged(path: str | Path, part: str) -> InputError:
    return InputError(f"{path}: damaged, its {part} is not that of such a run; {REMEDY}")
