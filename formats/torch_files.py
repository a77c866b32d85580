"""Files written by torch.save, both ends, without running anything that is in them.

A pickle is a program, and unpickling a stranger's file runs it. `torch.load(weights_only=True)`
runs only what makes containers and tensors. Before it starts, the archive's sizes and checksums
are checked, and the program is looked through: the names in it have to stand in a list, shorter
than torch's own (which lets a file ask for a bytearray of 3 GB), and no tuple may unfold to more
than MOST_PARTS. A pair of the same pair, 60 times over, would otherwise take 2^60 steps where it
is hashed or printed; lists and dicts may still be nested so, and are to be walked with a limit.
Memory is bounded by the file's size.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import stat
import zipfile
from collections.abc import Iterable, Set
from contextlib import nullcontext
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
MOST_PARTS = 10_000  # in a tuple, with those of the tuples in it
MOST_VALUES = 4_000_000  # in a file, each object counted once
STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NAMES = {  # what any file may name
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "builtins.set",
    "__builtin__.set",
    *(f"torch.{cuda}{kind}Storage" for kind in STORAGES for cuda in ("", "cuda.")),
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
    stand_ins = frozenset(stand_ins)
    try:
        members = _read_archive(path)
        _check_program(path, members["data.pkl"], NAMES | stand_ins)
        records = [(Record, name) for name in stand_ins]
        # The list is the process's own: threads that read features leave it alone.
        with torch.serialization.safe_globals(records) if records else nullcontext():
            content = torch.load(path, map_location="cpu", weights_only=True)
        _check_values(content, {len(data) for data in members.values()})
        return content
    except (InputError, OSError):
        raise
    # A hostile or damaged file can fail in any way; all of them mean refusal.
    except Exception as error:
        raise InputError(
            f"{path}: damaged, or not a file of this program ({_reason(error)[:160]})"
        ) from error


def _reason(error: Exception) -> str:
    """The line of an error that says what is wrong; torch puts advice around it."""
    text = str(error)
    _, found, rest = text.partition("WeightsUnpickler error:")
    if found and rest.strip():
        return rest.strip().splitlines()[0]
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[-1]


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
            "file"
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
            "it again"
        )
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if (
            any(member.compress_type != zipfile.ZIP_STORED for member in members)
            or sum(member.file_size for member in members) > size
        ):
            raise InputError(
                f"{path}: refused, its contents would swell when unpacked; torch.save writes no "
                "such files"
            )
        names = [member.filename.partition("/")[2] for member in members]
        if len({name.lower() for name in names}) < len(names):  # torch's reader ignores case
            raise InputError(
                f"{path}: refused, it holds two members of one name; torch.save writes no such "
                "files"
            )
        try:
            return {name: archive.read(member) for name, member in zip(names, members, strict=True)}
        except zipfile.BadZipFile as error:
            raise InputError(f"{path}: damaged ({error}); fetch or make it again") from None


# ── The pickle inside ────────────────────────────────────────────────────────────────────────────

_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE")
_MARK = -1  # on the stack of sizes


def _check_program(path: str | Path, program: bytes, names: Set[str]) -> None:
    """Look through a pickle without running it: its size, its names, the sizes of its tuples.

    Raises:
        InputError: it names something that is not in `names`.
        ValueError: too large, or no sound pickle.
    """
    if len(program) > LARGEST_PICKLE:
        raise ValueError("a pickle of unusual size")
    stack: list[int] = []  # parts of the tuples there; 1 for anything else
    memo: dict[int, int] = {}
    for instruction, argument, _ in pickletools.genops(program):
        if instruction.name == "PROTO" and argument != 2:
            raise ValueError(f"pickle protocol {argument}; torch.save writes 2")
        if instruction.name in ("GLOBAL", "INST"):
            name = argument.replace(" ", ".", 1)
            if name not in names:
                raise InputError(
                    f"{path}: refused, it names {name[:100]}, which is not in the list of what "
                    "such a file may hold; nothing of it was run"
                )
        if instruction.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif instruction.name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif instruction.name == "MARK":
            stack.append(_MARK)
        else:
            size = 1 + sum(_operands(stack, instruction))
            if instruction.name not in _TUPLES:
                size = 1
            if size > MOST_PARTS:
                raise ValueError(f"a tuple of more than {MOST_PARTS} parts")
            stack.extend([size] * len(instruction.stack_after))


def _operands(stack: list[int], instruction: pickletools.OpcodeInfo) -> list[int]:
    """Take from the stack what an instruction takes."""
    before = instruction.stack_before
    operands = []
    if pickletools.markobject in before:
        while (size := stack.pop()) != _MARK:
            operands.append(size)
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        operands.append(stack.pop())
    return operands


def _check_values(content: Any, sizes: Set[int]) -> None:
    """Hold the values against the archive: each tensor lies in a storage, which is a member.

    Containers may hold themselves; each is looked at once.

    Args:
        sizes: bytes of the archive's members.

    Raises:
        ValueError: a tensor larger than its storage, a key that is neither text nor a whole number,
            or more than MOST_VALUES values.
    """
    waiting, seen = [content], set()
    for _ in range(MOST_VALUES):
        if not waiting:
            return
        value = waiting.pop()
        if isinstance(value, Tensor):
            _check_tensor(value, sizes)
        elif isinstance(value, (dict, list, tuple, set, Record)) and id(value) not in seen:
            seen.add(id(value))
            waiting += _parts(value)
    raise ValueError("more values than a file of this program holds")


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Record):
        value = vars(value)
    if not isinstance(value, dict):
        return value
    if not all(isinstance(key, (str, int)) for key in value):
        raise ValueError("a dict with keys that are neither text nor whole numbers")
    return value.values()


def _check_tensor(tensor: Tensor, sizes: Set[int]) -> None:
    stored = tensor.untyped_storage().nbytes()
    if stored and stored not in sizes:
        raise ValueError(f"a storage of {stored} bytes, which no member of the archive has")
    if tensor.numel() * tensor.element_size() > stored:
        raise ValueError(f"a tensor {tuple(tensor.shape)} larger than its storage")


# ── Released networks ────────────────────────────────────────────────────────────────────────────

MOST_MODULES = (
    1_000  # in a pickled head; the released ones have about 100, one that holds itself has no end
)
# What a released file may name: its own classes and torch's layers, DataParallel among them. They
# come back as inert records, never as the class.
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
