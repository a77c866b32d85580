"""Ways to hurt the pipeline, shared by test_robustness.py and torture.py: faults of the disk,
damage, hostile files.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from runtime import cli

# ── Processes ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outcome:
    """How a child process ended."""

    code: int  # exit status; negative: the signal that killed it
    out: str
    err: str
    seconds: float
    grown: int  # bytes of memory at its peak, over what its parent had

    @property
    def refused(self) -> bool:
        """Whether it ended as a user's mistake should: exit code 2, one line, no traceback."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return (
            self.code == 2
            and len(errors) == 1
            and "Traceback" not in self.err
            and "Exception" not in self.err
        )


class Child:
    """A forked process that runs `function` as a script's main().

    Torch is imported already, so it starts at once.
    """

    def __init__(
        self, function: Callable[[], None], if_stopped: str = "run the same command again"
    ):
        self.began = time.monotonic()
        self.files = [tempfile.TemporaryFile() for _ in range(2)]
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function, if_stopped)

    def _run(self, function: Callable[[], None], if_stopped: str) -> None:
        code = 1
        try:
            os.setsid()
            for number, file in enumerate(self.files, start=1):
                os.dup2(file.fileno(), number)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True)
            cli.run(function, if_stopped)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def signal(self, number: int) -> None:
        """To the child alone, as the kernel's memory killer does; its helpers have to notice."""
        os.kill(self.pid, number)

    def wait(self, limit: float = 120) -> Outcome:
        while (ended := os.wait4(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() - self.began > limit:
                os.killpg(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        return Outcome(
            os.waitstatus_to_exitcode(ended[1]),
            *texts,
            time.monotonic() - self.began,
            max(0, ended[2].ru_maxrss - self.before) * 1024,
        )


def run_child(function: Callable[[], None], limit: float = 120) -> Outcome:
    return Child(function).wait(limit)


# ── Faults of the disk ───────────────────────────────────────────────────────────────────────────


class Fuse:
    """Counts what the process does to files below a folder; at the n-th action, and all later ones,
    `blow` is called.

    A write is half done before, unless `halves` is off. Actions: opening for writing, write,
    pwrite, truncate, fsync, fdatasync, rename.
    """

    def __init__(
        self,
        below: Path,
        at: int | None = None,
        blow: Callable[[], None] = lambda: None,
        halves: bool = True,
    ):
        self.below, self.at, self.blow, self.halves, self.count = str(below), at, blow, halves, 0

    def tick(self) -> bool:
        """Count an action; whether it is one to fail."""
        self.count += 1
        return self.at is not None and self.count >= self.at

    def burn(self, half: Callable[[], object] = lambda: None) -> None:
        if self.tick():
            if self.halves:
                half()
            self.blow()

    @contextmanager
    def installed(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in ("pwrite", "replace", "fsync", "fdatasync")}
        real_open = builtins.open

        def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
            self.burn(lambda: real["pwrite"](descriptor, data[: len(data) // 2], offset))
            return real["pwrite"](descriptor, data, offset)

        def burning(name: str) -> Callable:
            def call(*arguments):
                self.burn()
                return real[name](*arguments)

            return call

        def opening(path, mode="r", *arguments, **options):
            if not (set(mode) & set("wax+") and str(path).startswith(self.below)):
                return real_open(path, mode, *arguments, **options)
            self.burn()
            return _Burning(real_open(path, mode, *arguments, **options), self)

        with (
            mock.patch.multiple(
                os,
                pwrite=pwrite,
                **{name: burning(name) for name in ("replace", "fsync", "fdatasync")},
            ),
            mock.patch.object(builtins, "open", opening),
            mock.patch.object(io, "open", opening),
        ):
            yield


class _Burning:
    """A file whose writes the fuse counts."""

    def __init__(self, file, fuse: Fuse):
        self._file, self._fuse = file, fuse

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def write(self, data) -> int:
        def half() -> None:
            self._file.write(data[: len(data) // 2])
            self._file.flush()

        self._fuse.burn(half)
        return self._file.write(data)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def truncate(self, size: int) -> int:
        self._fuse.burn()
        return self._file.truncate(size)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails_with(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)

# ── Damage ───────────────────────────────────────────────────────────────────────────────────────


def damage(path: Path, rng: random.Random, others: list[Path]) -> str:
    """Hurt a file in one of the ways that disks and people do; return what was done. It may happen
    to change nothing.
    """
    data = bytearray(path.read_bytes())
    kind = rng.choice(
        [
            "flip",
            "flip",
            "cut",
            "zero",
            "swap rows",
            "append",
            "remove",
            "empty",
            *(["swap files"] if others else []),
        ]
    )
    at, length = rng.randrange(len(data)), rng.randrange(1, 1 + len(data) // 2)
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "swap rows":
        length = min(length, 4096)
        at = rng.randrange(max(1, len(data) - 2 * length))
        data[at : at + 2 * length] = data[at + length : at + 2 * length] + data[at : at + length]
    elif kind == "append":
        data += rng.randbytes(rng.randrange(1, 5000))
    elif kind == "empty":
        data.clear()
    elif kind == "swap files":
        other = rng.choice(others)
        theirs = other.read_bytes()
        other.write_bytes(data)
        data = theirs
    if kind == "remove":
        path.unlink()
    else:
        path.write_bytes(data)
    return f"{kind} {path.name}"


# ── Hostile torch files ──────────────────────────────────────────────────────────────────────────


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class WithState:
    """Pickles to a class with a state that its __setstate__ acts on."""

    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __setstate__(self, state: dict) -> None:
        Path(state["canary"]).mkdir()


def write_program(
    path: Path, program: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes
) -> Path:
    """A torch.save archive around a pickle made by hand."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {"data.pkl": program, "version": b"3\n", **members}.items():
            archive.writestr(f"x/{name}", data)
    return path


def storage_program(shape: bytes, stride: bytes, count: bytes) -> bytes:
    """A float tensor on member data/0; the arguments are pickle instructions."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + count
        + b"tQ"
    )
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00"
        + shape
        + stride
        + b"\x89NtR."
    )


DOUBLED = b"h\x00h\x00\x86q\x00"  # a pair of what the memo holds, in its place
EMPTY_PAIR = b"\x80\x02)q\x00"  # the empty tuple, memorised
HOSTILE_PROGRAMS = {  # name -> (pickle, what the refusal says)
    "os.system": (
        b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
        "refused, it names posix.system",
    ),
    "protocol 4": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "pickle protocol 4"),
    "INST": (b"(S'true'\nios\nsystem\n.", "refused, it names os.system"),
    "key of 2^60 parts": (
        EMPTY_PAIR + DOUBLED * 60 + b"}h\x00K\x01s.",
        "a tuple of more than 10000 parts",
    ),
    "text of 2^60 parts": (EMPTY_PAIR + b"ctorch\ndevice\n" + DOUBLED * 60 + b"h\x00R.", "damaged"),
    "memo place 2^31": (b"\x80\x02K\x01r\xff\xff\xff\x7f\x85R.", "damaged"),
    "text of 2 GB": (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"),
    "no instructions": (b"", "damaged"),
    "no end": (b"\x80\x02", "damaged"),
    "no result": (b"\x80\x02.", "damaged"),
    "items of nothing": (b"\x80\x02e.", "damaged"),
    "items without a start": (b"\x80\x02K\x01K\x02e.", "damaged"),
    "4 million lists": (b"\x80\x02" + b"]" * 2**22 + b".", "unusual size"),
    "attributes of a list": (b"\x80\x02]K\x01b.", "damaged.*list"),
    "tensor of nothing": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89NtR.",
        "damaged",
    ),
    "more values than stored": (
        storage_program(b"K\x03\x85", b"K\x01\x85", b"K\x02"),
        "storage that is not resizable",
    ),
    "stride beyond the end": (
        storage_program(b"K\x02\x85", b"K\x02\x85", b"K\x02"),
        "storage that is not resizable",
    ),
    "a billion values by stride 0": (
        storage_program(b"J\x00\x00\x00\x40\x85", b"K\x00\x85", b"K\x02"),
        "larger than its storage",
    ),
    "negative size": (
        storage_program(b"J\xff\xff\xff\xff\x85", b"K\x01\x85", b"K\x02"),
        "damaged",
    ),
    "lying storage": (
        storage_program(b"K\x02\x85", b"K\x01\x85", b"K\x63"),
        "damaged.*does not match expected size",
    ),
    "storage of no size": (
        storage_program(b"K\x02\x85", b"K\x01\x85", b")"),
        "damaged",
    ),
}
TWO_FLOATS = np.array([1, 2], np.float32).tobytes()


def hostile_objects(canary: Path) -> dict[str, object]:
    """Things that torch.save writes and that would do harm, or hold what is no data, when
    unpickled.
    """
    text = f"open({str(canary)!r}, 'w')"
    return {
        "os.mkdir": Call(os.mkdir, str(canary)),
        "os.system": Call(os.system, f"touch {canary}"),
        "eval": Call(eval, text),
        "exec": Call(exec, text),
        "open": Call(open, str(canary), "w"),
        "getattr": Call(getattr, "x", "upper"),
        "torch.load": Call(torch.load, str(canary)),
        "torch.hub": Call(torch.hub.load, "a/b", "c"),
        "a class's __setstate__": WithState(canary),
        "a nested call": {"x": [Call(os.mkdir, str(canary))]},
        "bytearray of 3 GB": Call(bytearray, 3 * 10**9),
        "sparse": torch.zeros(1).to_sparse(),
        "meta": torch.zeros(10**6, 10**6, device="meta"),
        "quantised": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "tuple as key": {("a", 1): 2},
        "None as key": {None: 1},
        "complex number": 1j,
        "numbers": 7,
        "text": "x" * 1000,
        "module cycle": endless_head("cycle"),
        "2^60 modules": endless_head("doubling"),
        "long names": endless_head("names"),
        "modules of no dict": endless_head("list"),
        "2^60 lists": {"x": doubled(60)},
    }


def endless_head(kind: str) -> nn.Module:
    """A pickled module that a careless walk would never finish."""
    head = nn.Sequential(nn.Linear(1, 1))
    if kind == "cycle":
        head._modules["again"] = head
    elif kind == "doubling":
        for _ in range(60):
            inner, head = head, nn.Sequential()
            head._modules = {"a": inner, "b": inner}
    elif kind == "names":
        head._modules = {"n" * 100_000: head}
    else:
        head._modules = [1]
    return head


def doubled(levels: int) -> list:
    """2^levels lists in the memory of `levels`."""
    value: list = []
    for _ in range(levels):
        value = [value, value]
    return value


def hostile_archives(folder: Path) -> dict[str, Path]:
    """Archives that are made of members in an unusual way."""
    folder.mkdir(parents=True, exist_ok=True)
    zeros = bytes(50_000_000)
    found = {
        "deflated bomb": write_program(
            folder / "deflated.pt", b"\x80\x02N.", zipfile.ZIP_DEFLATED, **{"data/0": zeros}
        ),
        "lzma bomb": write_program(
            folder / "lzma.pt", b"\x80\x02N.", zipfile.ZIP_LZMA, **{"data/0": zeros}
        ),
        "overlapping members": folder / "overlapping.pt",
        "two of one name": folder / "two.pt",
        "text": folder / "text.pt",
        "legacy pickle": folder / "legacy.pt",
        "empty": folder / "empty.pt",
        "folder": folder / "folder.pt",
        "pipe": folder / "pipe.pt",
        "sparse 2 TB": folder / "large.pt",
    }
    _overlap(
        write_program(
            found["overlapping members"],
            b"\x80\x02N.",
            **{f"data/{i}": b"0" * 100_000 for i in range(50)},
        )
    )
    with zipfile.ZipFile(found["two of one name"], "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02N.")
        archive.writestr("y/data.pkl", b"\x80\x02K\x01.")
    found["text"].write_text("no weights")
    torch.save({"x": 1}, found["legacy pickle"], _use_new_zipfile_serialization=False)
    found["empty"].write_bytes(b"")
    found["folder"].mkdir(exist_ok=True)
    os.mkfifo(found["pipe"])
    with open(found["sparse 2 TB"], "wb") as file:
        file.truncate(2 * 10**12)
    return found


def _overlap(path: Path) -> None:
    """Have every member's directory entry point at the first member's bytes: 5 MB that claim to be
    read fifty times.
    """
    data = bytearray(path.read_bytes())
    position, first = data.find(b"PK\x01\x02"), None
    while position >= 0:
        offset = data[position + 42 : position + 46]
        first = first or bytes(offset)
        data[position + 42 : position + 46] = first
        position = data.find(b"PK\x01\x02", position + 46)
    path.write_bytes(data)
