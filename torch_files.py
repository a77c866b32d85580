"""Open files written by torch.save without running anything that is in them.

Unpickling a stranger's file runs its code. Here torch's own weights-only reader does the reading, and
what it leaves open is closed around it: archives that swell when unpacked, damage inside a file that
is otherwise well formed, and error texts that advise switching the protection off.
"""
from __future__ import annotations

import os
import stat
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from cli import InputError


class Record:
    """Stands in for a class named by a file: takes the attributes, runs none of the class's code."""


def load(path: str | Path, stand_ins: Iterable[str] = ()) -> Any:
    """The contents of a torch.save file: plain containers and CPU tensors.

    Args:
        stand_ins: full names of the classes whose instances come back as `Record`.

    Raises:
        InputError: not such a file, damaged, or naming anything that is neither data nor in `stand_ins`.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: expected a file written by torch.save, found something that is not a regular file")
        _check_archive(path)
        with safe_globals([(Record, name) for name in stand_ins]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if foreign := get_unsafe_globals_in_checkpoint(path):
                raise InputError(f"{path}: refused, it names {', '.join(sorted(foreign)[:3])}, which is not in the list "
                                 "of what such a file may hold; nothing of it was run")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (InputError, OSError):
        raise
    except Exception as error:         # a hostile or damaged pickle can fail in any way; all of them mean refusal
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path}: damaged, or not a file of this program ({reason[-1][:160]})") from error


def _check_archive(path: str | Path) -> None:
    """Refuse what torch.save does not write: compressed or overlapping members, or contents that changed since."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a file written by torch.save (1.6 or newer), or cut short; fetch it again")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members) or \
                sum(member.file_size for member in members) > os.path.getsize(path):
            raise InputError(f"{path}: refused, its contents would swell when unpacked; torch.save writes no such files")
        if damaged := archive.testzip():
            raise InputError(f"{path}: damaged, the checksum of {damaged} does not match; fetch or make it again")
