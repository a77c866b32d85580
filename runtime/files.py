"""Files that appear whole or not at all, and folders that one process holds at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from runtime.cli import InputError


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a file beside `path` for writing; rename it to `path` once it is whole and on the disk.

    An exception inside the block removes the partial file and leaves an older `path` as it was.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        with open(
            partial, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass  # the first error is the one worth telling
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


_locks: set[IO] = set()


def _leave_locks_to_parent() -> None:
    for file in _locks:
        file.close()  # closing a copy leaves the parent's lock as it is


os.register_at_fork(
    after_in_child=_leave_locks_to_parent
)  # else a killed owner's helpers would hold on to its lock


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process. The kernel drops the lock with its owner, however that one
    ends.

    Raises InputError where another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process is writing there; wait for it, or choose another folder"
            ) from None
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)
