"""Files written by torch.save, both ends, without running anything that is in them.

A pickle is a program, and unpickling a stranger's file runs it. Here the few instructions that
torch.save needs for containers and tensors are carried out one by one; a name is looked up in a
list, never imported. What is left to a file then is to be damaged, or to be large: checksums are
checked, and memory is bounded by the size of the file.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickletools
import stat
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from runtime import files
from runtime.cli import InputError

LARGEST_FILE = 2**30  # bytes; a head with its optimiser takes 50 million
LARGEST_PICKLE = 2**22  # bytes of instructions; the released networks take 0.2 million
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Record:
    """Stands in for a class that a file names: holds its attributes and runs no code."""


def load(path: str | Path, stand_ins: Iterable[str] = ()) -> Any:
    """The contents of a torch.save file: plain containers with keys of text or whole numbers, and
    CPU tensors.

    Containers may hold themselves, as in any pickle: walk them with a limit.

    Args:
        stand_ins: full names of the classes whose instances come back as `Record`.

    Raises:
        InputError: not such a file, damaged, or naming anything that is neither data nor in
            `stand_ins`.
    """
    try:
        return _Pickle(path, _read_archive(path), frozenset(stand_ins)).run()
    except (InputError, OSError):
        raise
    except (
        Exception
    ) as error:  # a hostile or damaged file can fail in any way; all of them mean refusal
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path}: damaged, or not a file of this program ({reason[-1][:160]})"
        ) from error


def save(path: str | Path, content: Any) -> None:
    """torch.save, whole or not at all.

    Written in memory first: torch's own writer hides a full disk's error.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with files.atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())


def is_plain(value: Any, limit: int = 1_000_000) -> bool:
    """Whether a value is text, numbers and containers of them, not more than `limit` in all, nested
    20 deep at most.
    """
    waiting = [(value, 0)]
    for _ in range(limit):
        if not waiting:
            return True
        value, depth = waiting.pop()
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, (list, tuple)):
            waiting += [(item, depth + 1) for item in value]
        elif not isinstance(value, (str, int, float, bool, type(None))):
            return False
        if depth > 20:
            return False
    return False


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's names, shapes and values; the module lies on the CPU."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


# ── The archive ──────────────────────────────────────────────────────────────────────────────────


def _check_size(path: str | Path) -> int:
    """Bytes of a regular file that is not too large for a head."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            f"{path}: expected a file written by torch.save, found something that is not a regular "
            f"file"
        )
    if status.st_size > LARGEST_FILE:
        raise InputError(
            f"{path}: expected at most {LARGEST_FILE} bytes, got {status.st_size}; no head takes "
            "so many, so it is another model, perhaps with its own front end"
        )
    return status.st_size


def _read_archive(path: str | Path) -> dict[str, bytes]:
    """Every member by its name without the folder they all lie in; checksums are checked on the
    way.
    """
    size = _check_size(path)
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path}: not a file written by torch.save (1.6 or newer), or cut short; fetch or make "
            f"it again"
        )
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if (
            any(member.compress_type != zipfile.ZIP_STORED for member in members)
            or sum(member.file_size for member in members) > size
        ):
            raise InputError(
                f"{path}: refused, its contents would swell when unpacked; torch.save writes no "
                f"such files"
            )
        names = [member.filename.partition("/")[2] for member in members]
        if len(set(names)) < len(names):
            raise InputError(
                f"{path}: refused, it holds two members of one name; torch.save writes no such "
                f"files"
            )
        try:
            return {name: archive.read(member) for name, member in zip(names, members, strict=True)}
        except zipfile.BadZipFile as error:
            raise InputError(f"{path}: damaged ({error}); fetch or make it again") from None


# ── The pickle inside ────────────────────────────────────────────────────────────────────────────


class _Name:
    """A global that the pickle names."""

    def __init__(self, name: str):
        self.name = name


_NULL = object()  # marks the start of a tuple's or a container's items on the stack


class _Pickle:
    """The instructions that torch.save writes (pickle protocol 2), a method each; any other is an
    error.
    """

    def __init__(self, path: str | Path, members: dict[str, bytes], stand_ins: frozenset[str]):
        self.path, self.members, self.stand_ins = path, members, stand_ins
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Tensor] = {}
        self.calls: dict[str, Callable] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "collections.OrderedDict": dict,
            "torch.Size": tuple,
            "torch.device": lambda *_: "cpu",
            "builtins.set": list,
            "__builtin__.set": list,
        }
        self.names = {
            *self.calls,
            *stand_ins,
            *(f"torch.{cuda}{name}" for name in DTYPES for cuda in ("", "cuda.")),
        }

    def run(self) -> Any:
        program = self.members["data.pkl"]
        if len(program) > LARGEST_PICKLE or self.members.get("byteorder", b"little") != b"little":
            raise ValueError("a pickle of unusual size, or of a big-endian machine")
        for instruction, argument, _ in pickletools.genops(program):
            step = getattr(self, "_" + instruction.name.lower(), None)
            if step is None:
                raise ValueError(
                    f"{instruction.name} in its pickle, which torch.save does not write"
                )
            step(argument)
        return self.stack.pop()

    def _tensor(self, storage: Tensor, offset: int, shape: tuple, stride: tuple, *_: Any) -> Tensor:
        if (
            not isinstance(storage, Tensor)
            or len(shape) != len(stride)
            or not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride))
        ):
            raise ValueError("a tensor without a storage, or of impossible size")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if math.prod(shape) > len(storage) or (math.prod(shape) and last >= len(storage)):
            raise ValueError(f"a tensor {tuple(shape)} larger than its storage of {len(storage)}")
        return storage.as_strided(shape, stride, offset)

    def _binpersid(self, _: None) -> None:
        """A tensor's storage: ("storage", type, name of the archive's member, device, number of
        values).
        """
        _, kind, key, _, count = self.stack.pop()
        dtype = DTYPES[kind.name.rpartition(".")[2]]
        if not isinstance(key, str) or not isinstance(count, int):
            raise ValueError("a storage without a name or size")
        if key not in self.storages:
            data = self.members[f"data/{key}"]
            self.storages[key] = (
                torch.frombuffer(bytearray(data), dtype=dtype)
                if data
                else torch.empty(0, dtype=dtype)
            )
        storage = self.storages[key]
        if storage.dtype != dtype or len(storage) != count:
            raise ValueError(
                f"a storage of {count} {dtype} values in {len(self.members[f'data/{key}'])} bytes"
            )
        self.stack.append(storage)

    def _global(self, name: str) -> None:
        name = name.replace(" ", ".", 1)
        if name not in self.names:
            raise InputError(
                f"{self.path}: refused, it names {name[:100]}, which is not in the list of what "
                f"such a file may "
                "hold; nothing of it was run"
            )
        self.stack.append(_Name(name))

    def _reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.calls[function.name](*arguments))

    def _newobj(self, _: None) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind.name not in self.stand_ins or arguments:
            raise ValueError(f"an object of {kind.name} made in an unusual way")
        self.stack.append(Record())

    def _build(self, _: None) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Record):
            vars(made).update(state)
        elif not isinstance(
            made, dict
        ):  # a state_dict carries version numbers, which are not needed
            raise ValueError(f"attributes for a {type(made).__name__}")

    def _setitems(self, _: None) -> None:
        items = self._items()
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise ValueError("a dict with keys that are neither text nor whole numbers")
            self.stack[-1][key] = value

    def _setitem(self, _: None) -> None:
        self.stack[-2:-2] = [_NULL]
        self._setitems(None)

    def _append(self, _: None) -> None:
        value = self.stack.pop()
        self.stack[-1].append(value)

    def _appends(self, _: None) -> None:
        items = self._items()
        self.stack[-1].extend(items)

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._items()))

    def _take(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _items(self) -> list[Any]:
        """What lies above the last mark."""
        start = len(self.stack) - 1
        while self.stack[start] is not _NULL:
            start -= 1
            if start < 0:
                raise ValueError("items without a start")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def _binput(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def _binget(self, place: int) -> None:
        self.stack.append(self.memo[place])

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pass(self, _: Any) -> None:
        pass

    _binint = _binint1 = _binint2 = _long1 = _binfloat = _binunicode = _push
    _long_binput, _long_binget = _binput, _binget
    _proto = _stop = _pass
    _mark = lambda self, _: self.stack.append(_NULL)  # noqa: E731
    _none = lambda self, _: self.stack.append(None)  # noqa: E731
    _newtrue = lambda self, _: self.stack.append(True)  # noqa: E731
    _newfalse = lambda self, _: self.stack.append(False)  # noqa: E731
    _empty_dict = lambda self, _: self.stack.append({})  # noqa: E731
    _empty_list = lambda self, _: self.stack.append([])  # noqa: E731
    _empty_tuple = lambda self, _: self.stack.append(())  # noqa: E731
    _tuple1 = lambda self, _: self._take(1)  # noqa: E731
    _tuple2 = lambda self, _: self._take(2)  # noqa: E731
    _tuple3 = lambda self, _: self._take(3)  # noqa: E731


# ── Released networks ────────────────────────────────────────────────────────────────────────────

MOST_MODULES = (
    1_000  # in a pickled head; the released ones have about 100, one that holds itself has no end
)
# What a released file may name: its own classes and torch's layers, DataParallel among them. They
# come
# back as inert records, never as the class.
RELEASED_CLASSES = (
    *(
        f"model.{name}"
        for name in (
            "W2VAASIST",
            "LCNN",
            "MaxFeatureMap2D",
            "GraphAttentionLayer",
            "HtrgGraphAttentionLayer",
            "GraphPool",
            "Residual_block",
        )
    ),
    *(
        f"{layer.__module__}.{layer.__qualname__}"
        for layer in vars(nn).values()
        if isinstance(layer, type) and issubclass(layer, nn.Module)
    ),
)


WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which trainers keep weights
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


def read_weights(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict of a pickled module, of a trainer's checkpoint, or of a file that is one.

    Raises:
        InputError: none of these.
    """
    for _ in range(len(WRAPPERS)):
        wrapped = _wrapped(content)
        if wrapped is None:
            break
        content = wrapped
    if isinstance(content, Record):
        try:
            content = _walk_module(content)
        except (AttributeError, TypeError, ValueError):
            raise InputError(f"{path}: damaged, or not a pickled network") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected weights of a head, found a {type(content).__name__}")
    return {_without_prefixes(str(name)): tensor for name, tensor in content.items()}


def _wrapped(content: Any) -> Any:
    """What a trainer's checkpoint holds under one of the usual keys, or None."""
    if not isinstance(content, dict):
        return None
    parts = (content.get(key) for key in WRAPPERS)
    return next((part for part in parts if isinstance(part, (dict, Record))), None)


def _without_prefixes(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name. Raises InputError where it is damaged."""
    _check_size(path)
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged, or not a safetensors file ({error})") from None


def _walk_module(record: Any) -> dict[str, Tensor]:
    """What `state_dict()` would give, read off the attributes of a pickled module."""
    found: dict[str, Tensor] = {}
    waiting = [("", record)]
    for prefix, module in waiting:
        tensors = {**module._parameters, **module._buffers}
        if any(len(str(name)) > 200 for name in (*tensors, *module._modules)):
            raise ValueError("names of unusual length")
        found |= {
            f"{prefix}{name}": tensor for name, tensor in tensors.items() if tensor is not None
        }
        waiting += [
            (f"{prefix}{name}.", child)
            for name, child in module._modules.items()
            if child is not None
        ]
        if len(waiting) > MOST_MODULES:
            raise ValueError("modules without end")
    return found
