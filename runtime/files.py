"""Files that appear whole or not at all, and folders that one process holds at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from runtime.cli import InputError, echo


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


UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def open_text(path: str | Path) -> IO[str]:
    """A text file for reading, whatever ends its lines and with or without a byte-order mark.

    Raises InputError as refuse_utf16().
    """
    with open(path, "rb") as file:
        refuse_utf16(path, file.read(64))
    return open(path, encoding="utf-8-sig", newline=None)


def refuse_utf16(path: str | Path, start: bytes) -> None:
    """Raise InputError where a text begins as UTF-16 does, which some editors save as "Unicode".

    Args:
        start: the first bytes of the file; of ASCII in UTF-16, half of them are NUL.
    """
    if start.startswith(UTF16_MARKS) or 3 * start.count(0) > len(start):
        raise InputError(
            f"{path}: expected UTF-8, this looks like UTF-16; save it as UTF-8 (iconv -f UTF-16 -t "
            "UTF-8)"
        )


def require_place_for_file(path: str | Path) -> None:
    """Raise InputError where a file could not be written there, before its contents are made."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: expected the name of a file, this is a folder")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it, or name another")
    _require_writable(path.parent)


def require_place_for_folder(path: str | Path) -> None:
    """Raise InputError where a folder could not be made or written to."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise InputError(f"{path}: expected a folder, this is a file")
    _require_writable(path)


def _require_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: permission denied; choose a folder that can be written")


# What a file system without locks answers: NFS with nolock, Lustre without flock, some FUSE ones.
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_held: set[tuple[int, int]] = set()  # device and inode of the lock files of this process


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold `folder` for this process, by a record lock on `folder`/.lock.

    Forked processes do not inherit a record lock, and the kernel drops it when its owner ends. It
    does not exclude a second holder within one process, and closing any descriptor of the lock file
    drops it; so lock files that are held are remembered, and not opened again. Where the file
    system knows no locks, a note says so and the work goes on.

    Raises:
        InputError: another process holds the folder, or this one does already.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    if path.exists() and _identity(os.stat(path)) in _held:
        raise _busy(folder)
    with open(path, "a") as file:
        _lock(file, path)
        identity = _identity(os.fstat(file.fileno()))
        _held.add(identity)
        try:
            yield
        finally:
            _held.discard(identity)


def _lock(file: IO, path: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _busy(path.parent) from None
        if error.errno not in NO_LOCKS:
            raise
        echo(
            f"note: {path}: this file system has no locks ({error.strerror}); "
            f"see to it that no other run writes to {path.parent}"
        )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _busy(folder: Path) -> InputError:
    return InputError(
        f"{folder}: another process is writing there; wait for it, or choose another folder"
    )
