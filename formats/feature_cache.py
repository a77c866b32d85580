"""The feature cache: features of a corpus, computed once and read at random in training.

One folder a part and front end, `<features>/<part>/<feat>/`:

    cache.json           what made it: front end, weights, clip length, protocol, form of a row
    trials.tsv           name, label, source of every row, in the protocol's order
    features_00000.npy   fixed-stride rows, ROWS_PER_SHARD to a file: numpy.load reads them
    index.npy            for each row its CRC-32 and a guard word; all zero: not written yet
    failed.txt           the files that could not be read, if any, and why
    resampler.json       what converted clips that are not at 16 kHz; null where all are
    ffmpeg.txt           the files that ffmpeg read, if any; libsndfile read all others

Row n is the n-th trial of the protocol, so writers need no lock, and resuming is a look at the
index. A row is marked only when its bytes are on the disk, and each is checked whenever it is read.
Reading is positional and sorted by offset, which on random rows beats memory maps several times.

Rows are float16, float32, or one of two 8-bit forms of a quarter of float32's bytes (`encode`):

    affine8   for hidden states: x = low + step * code, low and step for each dimension of a clip
    sqrt8     for mel powers: x = scale * code * |code|, scale for each frame

Hidden states of XLS-R have one dimension (225) that holds the peak of 95 % of the frames, so that a
scale a frame wastes the codes of all others. Mel powers span many decades within a frame, of which
steps of equal size keep two. Measured:

    affine8, 21 real hidden states    relative RMS error 0.0047, log odds move by at most 0.03
    sqrt8, the same                   0.0128 and 0.12: new caches of xls-r-5 are not made in it
    sqrt8, mel, 720 clips             log odds of Mel-LCNN move by at most 0.12, no EER does
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import threading
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formats.audio import RESAMPLER, SAMPLE_RATE
from formats.decoders import FFMPEG
from formats.protocols import FAKE, REAL, Trial
from runtime import cli, files
from runtime.cli import InputError

FORMAT = "codecfake-cache-1"
ROWS_PER_SHARD = 4_096  # 1.7 GB of float16 XLS-R features: 181 files for Codecfake's training set
DTYPES = ("float16", "float32", "affine8", "sqrt8")
EIGHT_BITS = {"xls-r-5": "affine8", "mel": "sqrt8"}  # feat -> its 8-bit form
AFFINE_STEPS = 255  # affine8: codes run from 0 to 255
SQRT_STEPS = 127  # sqrt8: codes run from -127 to 127
HALF_EXPONENT = np.uint16(0x7C00)  # float16: all bits of the exponent set is infinity or NaN
ROUND_DOWN = np.float32(1 - 2**-23)  # no largest value decodes to infinity
OWN_FILES = re.compile(
    r"\.lock|trials\.tsv|index\.npy|failed\.txt|resampler\.json|ffmpeg\.txt|"
    r"features_\d{5}\.npy|.+\.part"
)
NOT_YET, DONE, FAILED, DAMAGED = range(4)
_GUARD_BASE = {DONE: 0x5EED0D0E, FAILED: 0xBAD0F11E}


# ── The index ────────────────────────────────────────────────────────────────────────────────────


def _guard(rows: np.ndarray, crc: np.ndarray, state: int) -> np.ndarray:
    """A word that only this row with this checksum and state has, so that no flipped bit in the
    index goes unseen.
    """
    mixed = (
        rows.astype(np.uint64) * 0x9E3779B1 ^ crc.astype(np.uint64)
    ) * 0x85EBCA6B + _GUARD_BASE[state]
    return (mixed & 0xFFFFFFFF).astype(np.uint32)


def _states(index: np.ndarray) -> np.ndarray:
    """State of each row of an index (N, 2)."""
    rows, (crc, guard) = np.arange(len(index)), index.T
    states = np.full(len(index), DAMAGED)
    states[(crc == 0) & (guard == 0)] = NOT_YET
    for state in (FAILED, DONE):
        states[guard == _guard(rows, crc, state)] = state
    return states


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The header that numpy writes, so that numpy.load opens each file of the cache."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": shape,
        },
    )
    return header.getvalue()


# ── A row ────────────────────────────────────────────────────────────────────────────────────────


def row_type(dtype: str, shape: tuple[int, int]) -> np.dtype:
    """One row of (frames, dim) as numpy.load shows it."""
    if dtype == "affine8":
        per_dim = (np.float32, shape[1:])
        return np.dtype([("low", *per_dim), ("step", *per_dim), ("code", np.uint8, shape)])
    if dtype == "sqrt8":
        return np.dtype([("scale", np.float32, shape[:1]), ("code", np.int8, shape)])
    return np.dtype((dtype, shape))


def encode(features: np.ndarray, dtype: str) -> np.ndarray:
    """Features (B, frames, dim) float32 as B rows of a cache.

    Rows are not finite where `dtype` cannot hold the values.

    float16, float32: (B, frames, dim), the values themselves.
    affine8: (B,) records. In a dimension with minimum low and maximum high over the clip's frames,
        step = (high - low) / 255 and code = round((x - low) / step): within step / 2 of x.
    sqrt8: (B,) records. In a frame with peak p = max |x|, code = round(127 sign(x) sqrt(|x| / p))
        and scale = p / 127²: within sqrt(p |x|) / 127 + p / 254² of x.
    """
    if dtype == "affine8":
        return _encode_affine(features)
    if dtype == "sqrt8":
        return _encode_sqrt(features)
    if dtype == "float16":
        return _to_half(features)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(features, dtype=dtype)


def _to_half(features: np.ndarray) -> np.ndarray:
    """torch's cast: numpy's rounding, eight times as fast."""
    features = np.require(features, requirements=["C", "W"])  # torch takes no others
    return torch.from_numpy(features).half().numpy()


def _encode_affine(features: np.ndarray) -> np.ndarray:
    rows = np.empty(len(features), row_type("affine8", features.shape[1:]))
    low, high = features.min(axis=1), features.max(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        step = (high - low) / np.float32(AFFINE_STEPS) * ROUND_DOWN
        code = (features - low[:, None]) / np.where(step > 0, step, 1)[:, None]
        rows["code"] = np.clip(np.rint(code), 0, AFFINE_STEPS)
    rows["low"], rows["step"] = low, step
    return rows


def _encode_sqrt(features: np.ndarray) -> np.ndarray:
    rows = np.empty(len(features), row_type("sqrt8", features.shape[1:]))
    size = np.abs(features)
    peak = size.max(axis=2)
    rows["scale"] = peak / np.float32(SQRT_STEPS**2) * ROUND_DOWN
    with np.errstate(invalid="ignore"):
        size /= np.where(peak > 0, peak, 1)[..., None]
        np.sqrt(size, out=size)
        size *= SQRT_STEPS
        rows["code"] = np.copysign(np.rint(size, out=size), features)
    return rows


def decode(rows: np.ndarray) -> Tensor:
    """Rows that encode() made -> features (B, frames, dim): float16 or float32 as stored.

    The 8-bit forms become float32: training converts to it anyway, and on a CPU making it here
    takes a third of the time of making float16 here and float32 in the training loop.
    """
    if rows.dtype.names is None:
        return torch.from_numpy(rows)
    features = np.empty(rows["code"].shape, np.float32)
    # A clip at a time stays in the processor's cache.
    for row, out in zip(rows, features, strict=True):
        if "low" in rows.dtype.names:
            np.multiply(row["code"], row["step"], out=out)
            np.add(out, row["low"], out=out)
        else:
            square = np.multiply(row["code"], np.abs(row["code"]), dtype=np.int16)
            np.multiply(square, row["scale"][:, None], out=out)
    return torch.from_numpy(features)


def decode_codes(stored: Tensor, dtype: str, shape: tuple[int, int]) -> Tensor:
    """decode() of 8-bit rows on the device that holds them, equal to the bit.

    Args:
        stored: the bytes of rows, (B, row_type(dtype, shape).itemsize) uint8.

    Returns:
        (B, frames, dim) float32.
    """
    n_scales = stored.shape[1] - shape[0] * shape[1]  # their bytes stand before the codes
    scales = stored[:, :n_scales].clone(memory_format=torch.contiguous_format).view(torch.float32)
    code = stored[:, n_scales:].view(torch.int8 if dtype == "sqrt8" else torch.uint8)
    code = code.unflatten(1, shape).float()
    if dtype == "sqrt8":
        return code.mul_(code.abs()).mul_(scales.unsqueeze(2))
    low, step = scales.unsqueeze(1).chunk(2, dim=2)  # each (B, 1, dim)
    # Two steps, as on the host: a fused product and sum would round once only.
    return code.mul_(step).add_(low)


def _finite(rows: np.ndarray) -> np.ndarray:
    """(B,) whether all values of each row are; the scales show it for their codes."""
    if rows.dtype == np.float16:
        # numpy's isfinite takes nine times as long. A row at a time stays in the processor's cache.
        bits = rows.view(np.uint16)
        return np.array([(row & HALF_EXPONENT).max() < HALF_EXPONENT for row in bits], dtype=bool)
    if rows.dtype.names is None:
        parts = [rows]
    else:
        parts = [rows[name] for name in rows.dtype.names if name != "code"]
    finite = [np.isfinite(part).all(axis=tuple(range(1, part.ndim))) for part in parts]
    return np.logical_and.reduce(finite)


# ── Both ends share what a cache consists of ─────────────────────────────────────────────────────


class _Layout:
    """Paths, offsets and the description of one cache."""

    def __init__(self, folder: Path, meta: dict[str, Any]):
        self.folder, self.meta = folder, meta
        self.rows: int = meta["rows"]
        self.shape: tuple[int, int] = (meta["frames"], meta["dim"])
        self.dtype: str = meta["dtype"]
        self.row = row_type(self.dtype, self.shape)
        self.rows_per_shard: int = meta["rows_per_shard"]
        self.row_bytes = self.row.itemsize
        self.header_bytes = len(self.header(0))
        self._open: dict[int, int] = {}
        self._opening = threading.Lock()

    def shard_path(self, shard: int) -> Path:
        return self.folder / f"features_{shard:05d}.npy"

    def n_shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def header(self, shard: int) -> bytes:
        rows = min(self.rows_per_shard, self.rows - shard * self.rows_per_shard)
        return _npy_header((rows, *self.row.shape), self.row.base)

    def shard_size(self, shard: int) -> int:
        rows = min(self.rows_per_shard, self.rows - shard * self.rows_per_shard)
        return self.header_bytes + rows * self.row_bytes

    def locate(self, row: int, flags: int) -> tuple[int, int]:
        """(file descriptor, byte offset) of a row; opens and checks its shard on first use."""
        shard, position = divmod(
            int(row), self.rows_per_shard
        )  # a numpy integer would show in the header
        with self._opening:  # reading threads share the descriptors
            if shard not in self._open:
                self._open[shard] = self._open_shard(shard, flags)
        return self._open[shard], self.header_bytes + position * self.row_bytes

    def _open_shard(self, shard: int, flags: int) -> int:
        path = self.shard_path(shard)
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise InputError(f"{path}: missing; {_REPAIR}") from None
        if os.fstat(descriptor).st_size != self.shard_size(shard) or os.pread(
            descriptor, self.header_bytes, 0
        ) != self.header(shard):
            os.close(descriptor)
            raise InputError(
                f"{path}: damaged, its size or header is not what cache.json says; {_REPAIR}"
            )
        return descriptor

    def check_shards(self, rows: np.ndarray) -> None:
        """Raise InputError where a shard of these rows is missing, or of another size or header."""
        for shard in np.unique(rows // self.rows_per_shard).tolist():
            os.close(self._open_shard(shard, os.O_RDONLY))

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _trials_text(trials: Sequence[Trial]) -> bytes:
    return "".join(f"{t.name}\t{t.label}\t{t.source}\n" for t in trials).encode()


_REPAIR = "run preprocess.py --verify --repair with the options that made the cache"


def _sealed(meta: dict[str, Any]) -> int:
    body = {key: value for key, value in meta.items() if key != "crc32"}
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _is_description(meta: dict[str, Any]) -> bool:
    """Whether cache.json says what this program can read."""
    if meta["format"] != FORMAT or meta["dtype"] not in DTYPES:
        return False
    if not isinstance(meta["front_end"], dict) or not isinstance(meta["about"], dict):
        return False
    return min(meta[size] for size in ("rows", "frames", "dim", "rows_per_shard")) >= 1


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "cache.json"
    try:
        meta = json.loads(path.read_bytes())
        if meta["crc32"] != _sealed(meta) or not _is_description(meta):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path}: damaged, or not a feature cache of this program; {_REPAIR}, or move the "
            "folder away"
        ) from None
    return meta


def recorded_precision(folder: str | Path) -> str | None:
    """The --precision a cache was begun with; None: no cache, or nobody knows."""
    try:
        return _read_meta(Path(folder))["front_end"].get("precision")
    except (FileNotFoundError, InputError):  # a damaged one is mended or refused elsewhere
        return None


def _read_index(folder: Path, rows: int) -> np.ndarray:
    path, header = folder / "index.npy", _npy_header((rows, 2), np.uint32)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {_REPAIR}") from None
    if len(data) != len(header) + rows * 8 or data[: len(header)] != header:
        raise InputError(
            f"{path}: damaged, its size or header is not what cache.json says; {_REPAIR}"
        )
    return np.frombuffer(data, np.uint32, offset=len(header)).reshape(rows, 2).copy()


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────


class CacheWriter:
    """Creates a cache or goes on with one. Several processes may write rows of the same cache.

    Threads may call write() and start_flush() at the same time, for different rows.

    Args:
        folder: `<features>/<part>/<feat>`.
        front_end: all that decides the features' values (`FrontEnd.fingerprint()` and the
            precision).
        shape: (frames, dim) of a row.
        dtype: one of DTYPES.
        about: recorded, not compared: weights' name, versions.

    Raises:
        InputError: the folder holds something else, or a cache made with something else.
    """

    def __init__(
        self,
        folder: str | Path,
        trials: Sequence[Trial],
        front_end: dict[str, Any],
        shape: tuple[int, int],
        dtype: str = "float16",
        about: dict[str, Any] | None = None,
    ):
        self.folder, self.trials = Path(folder), trials
        meta = describe(trials, front_end, shape, dtype, about)
        if not holds(self.folder, meta):
            remove(self.folder)  # it has no rows, if it is there
            _create(self.folder, meta | {"crc32": _sealed(meta)}, _trials_text(trials))
        self.layout = _Layout(self.folder, _read_meta(self.folder))
        self._resampler = None
        if self.records_resampler():
            self._resampler = read_resampler(self.folder)
        self._of_ffmpeg = read_ffmpeg_names(self.folder)
        self._index = os.open(self.folder / "index.npy", os.O_RDWR)
        self._index_header = len(_npy_header((len(trials), 2), np.uint32))
        self._unmarked: dict[int, int] = {}  # row -> CRC-32 of bytes not yet known to be on disk
        self._changing_unmarked = threading.Lock()
        self._flusher = ThreadPoolExecutor(1)
        self._last_flush: Future | None = None
        self._starting_flush = threading.Lock()

    def records_resampler(self) -> bool:
        """Whether the cache says what converted its clips; the first caches did not."""
        return (self.folder / "resampler.json").exists()

    def note_rates(self, rates: Iterable[int]) -> None:
        """Record the resampler before the first row that went through it.

        Args:
            rates: sampling rates in Hz of the files whose rows are written next.
        """
        if self._resampler is None and any(rate != SAMPLE_RATE for rate in rates):
            with suppress(FileNotFoundError):  # another rank wrote the same at the same moment
                record_resampler(self.folder, RESAMPLER)
            self._resampler = RESAMPLER

    def note_decoders(self, rows: Sequence[int], decoders: Sequence[str]) -> None:
        """Record what ffmpeg decoded, before it is stored.

        Args:
            rows: those that are written next.
            decoders: of each, LIBSNDFILE or FFMPEG.
        """
        of_ffmpeg = [row for row, decoder in zip(rows, decoders, strict=True) if decoder == FFMPEG]
        new = {self.trials[row].name for row in of_ffmpeg} - self._of_ffmpeg
        if new:
            self._of_ffmpeg |= new
            with open(self.folder / "ffmpeg.txt", "a", encoding="utf-8") as file:
                file.writelines(f"{name}\n" for name in sorted(new))

    def states(self) -> np.ndarray:
        """(N,) NOT_YET, DONE, FAILED or DAMAGED (the index entry itself)."""
        return _states(_read_index(self.folder, len(self.trials)))

    def write(self, rows: Sequence[int], features: np.ndarray) -> None:
        """Store features (B, frames, dim) float32, or as the cache's own float16, as these rows.

        Raises:
            InputError: a value that is not finite in the cache's type.
        """
        stored = encode(features, self.layout.dtype)
        as_bytes = stored.view(np.uint8).reshape(len(stored), self.layout.row_bytes)
        for row, data, finite, original in zip(
            rows, as_bytes, _finite(stored), features, strict=True
        ):
            if not finite:
                raise self._refusal(row, original)
            descriptor, offset = self.layout.locate(row, os.O_RDWR)
            _write_all(
                descriptor, data, offset, self.layout.shard_path(row // self.layout.rows_per_shard)
            )
            crc = zlib.crc32(data)
            with self._changing_unmarked:
                self._unmarked[row] = crc

    def _refusal(self, row: int, feature: np.ndarray) -> InputError:
        """Why the cache cannot hold a feature, and what to do."""
        largest, dtype = np.abs(feature).max(), self.layout.dtype
        remedies = ["check the file"]
        if np.isfinite(largest):
            reason = f"reaches {largest:.3g}, which {dtype} cannot hold"
            remedies.insert(0, "give --dtype float32")
        elif feature.dtype == np.float16:
            reason = "is not finite, or beyond float16's range of 65504"
            remedies.insert(0, "give --dtype float32")
        else:
            reason = "is not finite"
        if self.layout.meta["front_end"].get("precision") == "fp16":
            remedies.insert(0, "give --precision bf16 or fp32")
        return InputError(
            f"{self.trials[row].path}: its feature {reason}; {', or '.join(remedies)}"
        )

    def unmarked(self) -> int:
        """Rows written since the last flush began."""
        return len(self._unmarked)

    def flush(self) -> None:
        """Bring written rows to the disk, then mark them as done."""
        self.start_flush()
        if self._last_flush:
            self._last_flush.result()

    def start_flush(self, least: int = 1) -> None:
        """Flush in a thread of its own once `least` rows are unmarked; write() goes on meanwhile.

        Waits for the flush before. After one that failed nobody knows what reached the disk: its
        rows stay unmarked, and every later flush raises its error again.

        Raises:
            OSError: the flush before failed.
        """
        with self._starting_flush:
            if self.unmarked() < least:
                return
            if self._last_flush:
                self._last_flush.result()
            with self._changing_unmarked:
                written, self._unmarked = self._unmarked, {}
            self._last_flush = self._flusher.submit(self._flush_rows, written)

    def _flush_rows(self, written: dict[int, int]) -> None:
        """Bring rows to the disk, then mark them as done.

        Args:
            written: row -> CRC-32.
        """
        for shard in {row // self.layout.rows_per_shard for row in written}:
            _sync(self.layout._open[shard], self.layout.shard_path(shard))
        rows = np.array(sorted(written), dtype=np.int64)
        crc = np.array([written[row] for row in rows], dtype=np.uint32)
        self._mark(rows, np.stack([crc, _guard(rows, crc, DONE)], axis=1))

    def mark_failed(self, rows: Sequence[int]) -> None:
        """These trials have no feature; training leaves them out, a later run tries them again."""
        rows, zero = np.asarray(rows, dtype=np.int64), np.zeros(len(rows), np.uint32)
        self._mark(rows, np.stack([zero, _guard(rows, zero, FAILED)], axis=1))

    def forget(self, rows: Sequence[int]) -> None:
        """Mark rows as not written yet, so that the next run makes them anew."""
        self._mark(np.asarray(rows, dtype=np.int64), np.zeros((len(rows), 2), np.uint32))

    def write_failures(self, reasons: dict[int, str]) -> None:
        """List the failed trials in failed.txt; remove the list where there are none."""
        path = self.folder / "failed.txt"
        if not reasons:
            path.unlink(missing_ok=True)
            return
        with files.atomic_write(path) as file:
            file.writelines(
                f"{self.trials[row].name}\t{cli.printable(reason)}\n"
                for row, reason in sorted(reasons.items())
            )

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._flusher.shutdown()
            self.layout.close()
            os.close(self._index)

    def _mark(self, rows: np.ndarray, entries: np.ndarray) -> None:
        if not len(rows):  # a sync that brings nothing to the disk takes milliseconds, too
            return
        runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1)
        for run in runs:
            _write_all(
                self._index,
                np.ascontiguousarray(entries[run]),
                self._index_header + int(rows[run[0]]) * 8,
                self.folder / "index.npy",
            )
        _sync(self._index, self.folder / "index.npy")


def _sync(descriptor: int, path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise


def _write_all(descriptor: int, array: np.ndarray, offset: int, path: Path) -> None:
    data = memoryview(array).cast("B")
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        error.filename = str(path)
        raise


def _create(folder: Path, meta: dict[str, Any], trials_text: bytes) -> None:
    """Lay the files out, empty; cache.json comes last, so that a folder that has it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    foreign = [name for name in sorted(os.listdir(folder)) if not OWN_FILES.fullmatch(name)]
    if foreign:
        raise InputError(
            f"{folder}: holds files that are not of a feature cache (first: {foreign[0]}); a "
            "folder of the reference's .pt files can be trained as it is, a new cache needs a "
            "folder of its own (-f)"
        )
    layout = _Layout(folder, meta)
    disk = os.statvfs(folder)
    needed, free = layout.rows * layout.row_bytes, disk.f_bavail * disk.f_frsize
    if needed > free:
        raise InputError(
            f"{folder}: the cache needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free "
            "some space or choose another disk with -f"
        )
    with files.atomic_write(folder / "trials.tsv", "wb") as file:
        file.write(trials_text)
    for shard in range(layout.n_shards()):
        with files.atomic_write(layout.shard_path(shard), "wb") as file:
            file.write(layout.header(shard))
            file.truncate(layout.shard_size(shard))
    with files.atomic_write(folder / "index.npy", "wb") as file:
        file.write(_npy_header((layout.rows, 2), np.uint32))
        file.truncate(file.tell() + layout.rows * 8)
    record_resampler(folder, None)
    with files.atomic_write(folder / "cache.json") as file:
        json.dump(meta, file, indent=1)


def read_ffmpeg_names(folder: str | Path) -> set[str]:
    """Names of the trials whose files ffmpeg read."""
    try:
        text = (Path(folder) / "ffmpeg.txt").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return set()
    return set(text.splitlines())


def record_resampler(folder: str | Path, resampler: str | None) -> None:
    """Write what converted the clips that are not at 16 kHz; None: there are no such clips."""
    with files.atomic_write(Path(folder) / "resampler.json") as file:
        json.dump({"resampler": resampler}, file)


def read_resampler(folder: str | Path) -> str | None:
    """What record_resampler() wrote.

    Raises:
        FileNotFoundError: a cache made before this was recorded.
        InputError: damaged, or another resampler than this program's: their rows must not mix.
    """
    try:
        resampler = _parse_resampler(folder)
    except _NO_RECORD:
        raise InputError(f"{Path(folder) / 'resampler.json'}: damaged; {_REPAIR}") from None
    if resampler not in (None, RESAMPLER):
        raise InputError(
            f"{folder}: holds features of clips converted by {resampler!r}, this program uses "
            f"{RESAMPLER!r}; move the cache away and run preprocess.py again"
        )
    return resampler


_NO_RECORD = (ValueError, KeyError, TypeError)  # what _parse_resampler() raises of a damaged file


def _parse_resampler(folder: str | Path) -> str | None:
    return json.loads((Path(folder) / "resampler.json").read_bytes())["resampler"]


def mend_files(folder: str | Path, trials: Sequence[Trial]) -> list[str]:
    """Give the files of a cache back their sizes, headers and the list of trials; return the names
    of those that lacked it.

    Rows keep the bytes they have, so afterwards every row that suffered is found by its checksum.
    Where cache.json itself is damaged nobody knows what made the rows: it is removed, so that a
    CacheWriter starts anew.
    """
    folder = Path(folder)
    try:
        layout = _Layout(folder, _read_meta(folder))
    except InputError:
        (folder / "cache.json").unlink()
        return ["cache.json"]
    wanted = {
        layout.shard_path(shard): (layout.header(shard), layout.shard_size(shard))
        for shard in range(layout.n_shards())
    }
    header = _npy_header((layout.rows, 2), np.uint32)
    wanted[folder / "index.npy"] = header, len(header) + layout.rows * 8
    mended = [
        path.name for path, (header, size) in wanted.items() if _mend_file(path, header, size)
    ]
    text, path = _trials_text(trials), folder / "trials.tsv"
    if hashlib.sha256(text).hexdigest() == layout.meta["protocol_sha256"] and (
        not path.exists() or path.read_bytes() != text
    ):
        with files.atomic_write(path, "wb") as file:
            file.write(text)
        mended.append(path.name)
    if _forget_damaged_resampler(folder):
        mended.append("resampler.json")
    return mended


def _forget_damaged_resampler(folder: Path) -> bool:
    """Remove a record that cannot be read, so that the clips' sampling rates are looked at."""
    try:
        with suppress(FileNotFoundError):
            _parse_resampler(folder)
    except _NO_RECORD:
        (folder / "resampler.json").unlink()
        return True
    return False


def _mend_file(path: Path, header: bytes, size: int) -> bool:
    """Put the header and the size right, in place. False where they were."""
    with open(path, "r+b" if path.exists() else "x+b") as file:
        if file.seek(0, os.SEEK_END) == size and os.pread(file.fileno(), len(header), 0) == header:
            return False
        file.truncate(size)
        file.seek(0)
        file.write(header)
    return True


def describe(
    trials: Sequence[Trial],
    front_end: dict[str, Any],
    shape: tuple[int, int],
    dtype: str,
    about: dict[str, Any] | None,
) -> dict[str, Any]:
    """What cache.json says of a cache, but for its checksum. The arguments are CacheWriter's."""
    return {
        "format": FORMAT,
        "rows": len(trials),
        "frames": shape[0],
        "dim": shape[1],
        "dtype": dtype,
        "rows_per_shard": ROWS_PER_SHARD,
        "front_end": front_end,
        "protocol_sha256": hashlib.sha256(_trials_text(trials)).hexdigest(),
        "about": about or {},
    }


def holds(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds the cache that is wanted; not so where there is one without rows.

    Args:
        wanted: by describe().

    Raises:
        InputError: it holds rows of another cache.
    """
    if not (folder / "cache.json").exists():
        return False
    difference = _difference(_read_meta(folder), wanted)
    if difference and has_rows(folder):
        raise InputError(
            f"{folder}: holds a cache with {difference}; choose another folder with -f (-f1 for "
            "19LA), or move the old cache away"
        )
    return difference is None


# What decides the rows of a cache, beside its front end.
COMPARED = ("rows", "frames", "dim", "dtype", "protocol_sha256")


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """In words, what another cache was made with; None where it is the same."""
    corpora = [meta["about"].get("task") for meta in (found, wanted)]
    if None not in corpora and corpora[0] != corpora[1]:
        return f"the features of {corpora[0]}, this run would make those of {corpora[1]}"
    one = {key: found[key] for key in COMPARED} | found["front_end"]
    other = {key: wanted[key] for key in COMPARED} | wanted["front_end"]
    for key, value in other.items():
        if one.get(key) != value:
            return f"{key} {one.get(key)!r}, this run would make {value!r}"
    return None


def has_rows(folder: Path) -> bool:
    """Whether the cache in a folder holds a feature; one whose index is damaged may."""
    try:
        states = _states(_read_index(folder, _read_meta(folder)["rows"]))
    except InputError:
        return True
    return bool(np.isin(states, (DONE, DAMAGED)).any())


def remove(folder: Path) -> None:
    """Take away the cache in a folder, if there is one, cache.json first; the lock and what is not
    of a cache stay.
    """
    if not (folder / "cache.json").exists():
        return
    (folder / "cache.json").unlink()
    for name in sorted(os.listdir(folder)):
        if name != ".lock" and OWN_FILES.fullmatch(name):
            (folder / name).unlink()


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────


class FeatureCache:
    """The readable rows of a cache written by CacheWriter."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.folder = str(folder)
        self.meta = _read_meta(self.path)
        with suppress(FileNotFoundError):  # the first caches do not say
            read_resampler(self.path)
        self.layout = _Layout(self.path, self.meta)
        self.shape, self.dtype, self.front_end, self.about = (
            self.layout.shape,
            self.layout.dtype,
            self.meta["front_end"],
            self.meta["about"],
        )
        self.index = _read_index(self.path, self.layout.rows)
        self.states = _states(self.index)
        self.all_names, self.all_labels = self._read_trials()
        self.usable = np.flatnonzero(self.states == DONE)
        self.labels = self.all_labels[self.usable]
        self.names = list(compress(self.all_names, (self.states == DONE).tolist()))

    def _read_trials(self) -> tuple[list[str], np.ndarray]:
        path = self.path / "trials.tsv"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{path}: missing; {_REPAIR}") from None
        # All columns at once: a million rows take a second, split line by line four.
        every = np.frombuffer(text, np.uint8)
        ends = every[(every == ord("\t")) | (every == ord("\n"))].tobytes()
        fields = text.decode(errors="replace").replace("\n", "\t").split("\t")
        if (
            hashlib.sha256(text).hexdigest() != self.meta["protocol_sha256"]
            or ends != b"\t\t\n" * self.layout.rows
            or not set(fields[1::3]) <= {str(REAL), str(FAKE)}
        ):
            raise InputError(
                f"{path}: damaged, it is not the list that cache.json was made with; {_REPAIR}"
            )
        return fields[:-1:3], np.array(fields[1::3]).astype(np.int64)

    def require_complete(self) -> None:
        """Raise InputError while rows are not written yet, or where index or shards are damaged."""
        for state, what, remedy in (
            (NOT_YET, "not extracted yet", ""),
            (DAMAGED, "damaged in index.npy", " --verify --repair"),
        ):
            if count := int((self.states == state).sum()):
                raise InputError(
                    f"{self.folder}: {count} of {len(self.states)} rows are {what}; run "
                    f"preprocess.py{remedy} with the same options to finish it"
                )
        self.layout.check_shards(self.usable)

    def check_protocol(self, trials: Sequence[Trial]) -> None:
        """Raise InputError where the cache was made from another list of trials."""
        if hashlib.sha256(_trials_text(trials)).hexdigest() != self.meta["protocol_sha256"]:
            raise InputError(
                f"{self.folder}: made from another protocol ({len(self.states)} rows) than the one "
                f"given with -d ({len(trials)} rows); run preprocess.py on that corpus, into "
                "another folder"
            )

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        stored = self.read_stored(rows)
        as_rows = stored.view(self.layout.row.base).reshape(len(rows), *self.layout.row.shape)
        return decode(as_rows), torch.from_numpy(self.labels[rows])

    def read_stored(self, rows: np.ndarray) -> np.ndarray:
        """The bytes of rows as they lie on the disk, checked: (B, bytes of a row) uint8."""
        own = self.usable[rows]
        stored = np.empty((len(own), self.layout.row_bytes), np.uint8)
        for position in np.argsort(own, kind="stable"):
            if not self._read_row(int(own[position]), stored[position]):
                raise InputError(
                    f"{self.layout.shard_path(own[position] // self.layout.rows_per_shard)}: row "
                    f"{own[position]} ({self.all_names[own[position]]}) is damaged; {_REPAIR}"
                )
        return stored

    def damaged_rows(self, progress: Iterable[int] | None = None) -> list[int]:
        """Every row whose bytes or index entry are not what was written.

        Args:
            progress: the rows in order, wrapped by the caller in a progress bar.
        """
        buffer = np.empty(self.layout.row_bytes, np.uint8)
        return [
            row
            for row in (range(self.layout.rows) if progress is None else progress)
            if self.states[row] == DAMAGED
            or (self.states[row] == DONE and not self._read_row(row, buffer))
        ]

    def _read_row(self, row: int, out: np.ndarray) -> bool:
        """Fill `out` with the row's bytes; False where they are not those that were written."""
        descriptor, offset = self.layout.locate(row, os.O_RDONLY)
        data = memoryview(out)
        while data:
            try:
                count = os.preadv(descriptor, [data], offset)
            except OSError as error:
                error.filename = str(self.layout.shard_path(row // self.layout.rows_per_shard))
                raise
            if count == 0:  # cut since it was opened
                return False
            data, offset = data[count:], offset + count
        return zlib.crc32(out) == self.index[row, 0]
