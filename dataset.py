"""What training and scoring read: trials, clips, features, and the order of training batches."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import frontends
from formats import audio, protocols, torch_files
from formats.audio import CLIP_SAMPLES, SAMPLE_RATE, load_clip
from formats.decoders import FFMPEG
from formats.feature_cache import EIGHT_BITS, FeatureCache, decode_codes
from formats.protocols import FAKE, REAL, Trial, read_protocol
from frontends import FEATURE_SHAPES, FrontEnd
from runtime import cli, devices, limits, ranks
from runtime.cli import InputError

__all__ = [
    "CLIP_SAMPLES",
    "FAKE",
    "FEATURE_SHAPES",
    "REAL",
    "SAMPLE_RATE",
    "Trial",
    "load_clip",
    "read_protocol",
]

TRAIN_TASKS = {  # what -t trains on -> its corpora, in the order of their rows
    "19LA": ("19LA",),
    "codecfake": ("codecfake",),
    "co-train": ("codecfake", "19LA"),
}
CO_TRAIN_FOLDERS = {"codecfake": "Codecfake", "19LA": "LA"}  # below -d
CPU = torch.device("cpu")
CLIP_BYTES = 4 * CLIP_SAMPLES
PREFETCHED = 2  # batches that a worker makes ahead
CLIPS_A_READ = 32  # of a batch where files are only looked at
FAULT_LENGTH = 256  # bytes


# ── Clips ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ClipBatch:
    """Some clips of a corpus; a file that could not be read is in `failures` instead."""

    rows: list[int]  # positions in the list of paths that was given
    clips: Tensor  # (len(rows), 64600) float32
    rates: list[int]  # of each clip's file, Hz
    failures: dict[int, str]  # row -> one line saying what is wrong with its file
    digests: list[bytes]  # of the samples, if asked for: clips with the same one are the same clip
    decoders: list[str]  # of each clip's file


def clip_batches(
    paths: Sequence[str],
    batches: Sequence[Sequence[int]],
    num_workers: int,
    with_digests: bool = False,
) -> Iterator[ClipBatch]:
    """Decode the given batches of rows, in order, in `num_workers` processes (0: in this one).

    Where /dev/shm is too small for the clips that wait, they come through pipes, which copies them
    twice more.

    Raises:
        InputError: a worker died or failed; the message names the file it was reading, or what it
            lacked.
    """
    num_workers = limits.allowed_workers(num_workers)
    largest = max((len(rows) for rows in batches), default=0)
    waiting = CLIP_BYTES * largest * num_workers * (PREFETCHED + 1)
    by_pipe = num_workers > 0 and waiting > limits.free_shared_memory()
    if by_pipe:
        cli.echo(
            f"note: {limits.SHARED_MEMORY} is too small for the {waiting / 1e6:.0f} MB of clips "
            "that wait: they come through pipes, which is slower (docker run --shm-size=1g)"
        )
    clips = _Clips(paths, num_workers, by_pipe, with_digests)
    try:
        loading = _start_loading(clips, batches, num_workers)
        if num_workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises wherever the program stands; without it, a death is noticed
            # here.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for batch in loading:
            cli.stop_if_asked()
            if by_pipe:
                batch = replace(batch, clips=torch.from_numpy(batch.clips))
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # torch's word for a death, or a broken pipe
        if not num_workers:
            raise
        reason = clips.reason_of_failure(error)
        if not reason:
            raise
        raise InputError(reason) from error


def _start_loading(
    clips: _Clips, batches: Sequence[Sequence[int]], num_workers: int
) -> Iterator[ClipBatch]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores are the user's choice
        loader = torch.utils.data.DataLoader(
            clips,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=_unchanged,
            worker_init_fn=clips.prepare_worker,
            persistent_workers=False,
            prefetch_factor=PREFETCHED if num_workers else None,
            multiprocessing_context="fork" if num_workers else None,
        )
        return iter(loader)


class _Clips(torch.utils.data.Dataset):
    """Decodes batches of rows inside the workers of a DataLoader."""

    def __init__(
        self,
        paths: Sequence[str],
        num_workers: int,
        by_pipe: bool = False,
        with_digests: bool = False,
    ):
        self.paths = paths
        self.by_pipe = by_pipe
        self.with_digests = with_digests
        # What a worker that dies leaves behind, in memory that it shares with its parent:
        # (process id, row) of the file that each worker is reading, and what it failed of.
        self.reading = _shared((max(num_workers, 1), 2), np.int64)
        self.reading[:] = -1
        self._fault = _shared((FAULT_LENGTH,), np.uint8)

    def __getitems__(self, rows: list[int]) -> ClipBatch:
        worker = torch.utils.data.get_worker_info()
        reading = self.reading[worker.id if worker else 0]
        reading[0] = os.getpid()
        batch = ClipBatch([], torch.empty(0, CLIP_SAMPLES), [], {}, [], [])
        clips = []
        for row in rows:
            reading[1] = row
            try:
                recording = audio.load_recording(self.paths[row])
            except InputError as error:
                batch.failures[row] = str(error)
                continue
            batch.rows.append(row)
            batch.rates.append(recording.rate)
            batch.decoders.append(recording.decoder)
            if self.with_digests:  # a quarter of a worker's time
                digest = hashlib.blake2b(recording.clip.numpy(), digest_size=16).digest()
                batch.digests.append(digest)
            clips.append(recording.clip)
        reading[1] = -1
        if clips:
            batch = replace(batch, clips=torch.stack(clips))
        return replace(batch, clips=batch.clips.numpy()) if self.by_pipe else batch

    def prepare_worker(self, worker: int) -> None:
        _ignore_signals()
        # A batch that cannot be handed over would be reported and lost, and waited for without end.
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(self._end_worker)

    def _end_worker(self, error: BaseException, batch: object) -> None:
        reason = f"{type(error).__name__}: {error}".encode()[:FAULT_LENGTH]
        self._fault[: len(reason)] = np.frombuffer(reason, np.uint8)
        os._exit(1)

    def reason_of_failure(self, error: BaseException) -> str | None:
        """One line: why the workers failed, as far as they left word; None: a defect of ours."""
        fault = self._fault.tobytes().rstrip(b"\0").decode(errors="replace")
        advice = limits.advice_on(fault or str(error))
        if advice:
            return f"the decoding processes failed: {advice}"
        if fault:
            return (
                f"a decoding process failed ({fault}); give --num_workers 0, or a smaller "
                "--batch_size"
            )
        files = self.files_of_dead_workers()
        if not files:
            return None
        return (
            f"a decoding process died while it was reading {' or '.join(files)}; take that file "
            "out, or lower --num_workers if memory ran out"
        )

    def files_of_dead_workers(self) -> list[str]:
        """What workers that have ended were reading."""
        for _ in range(100):  # a process's connections close a moment before it has ended
            dead = [
                row for process, row in self.reading.tolist() if process > 0 and _has_ended(process)
            ]
            if dead:
                return [self.paths[row] if row >= 0 else "no file" for row in dead]
            time.sleep(0.02)
        return []


def _has_ended(process: int) -> bool:
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _unchanged(batch: ClipBatch) -> ClipBatch:
    return batch


def _shared(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array of zeros that forked processes write to as well; it takes no room in /dev/shm."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)


def _ignore_signals() -> None:
    """Ctrl-C reaches the whole process group; only the main process answers it, in one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The thread that hands tensors over would report a parent which ends while it takes one.
    sys.excepthook = _say_nothing


def _say_nothing(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    pass


def absent_trials(trials: Sequence[Trial], skip_missing: bool) -> set[Trial]:
    """The trials whose files are not there, once a note has said so.

    Raises:
        InputError: there are some without --skip_missing, or all of them are absent.
    """
    missing = ranks.broadcast(lambda: protocols.find_missing(trials))
    if missing:
        line = protocols.describe_missing(missing, len(trials))
        if not skip_missing or len(missing) == len(trials):
            raise InputError(f"{line}; fetch them, or go on without them with --skip_missing")
        cli.echo(f"note: {line}; going on without them")
    return set(missing)


def read_every_file(
    paths: Sequence[str], num_workers: int, what: str
) -> tuple[dict[int, str], Counter]:
    """Decode every file once, each rank its share.

    Args:
        what: on the progress bar.

    Returns:
        Row -> one line on a file that cannot be read, in order; and how many of the others are at
        each sampling rate in Hz.
    """
    rows = range(len(paths))
    batches = [rows[first : first + CLIPS_A_READ] for first in rows[::CLIPS_A_READ]]
    failures: dict[int, str] = {}
    rates: Counter = Counter()
    with tqdm(
        total=len(rows), unit="file", desc=what, leave=False, disable=not ranks.is_first()
    ) as bar:
        for batch in clip_batches(paths, ranks.shard(batches), num_workers):
            failures |= batch.failures
            rates.update(batch.rates)
            bar.update(ranks.size() * (len(batch.rows) + len(batch.failures)))
    of_all = ranks.gather((failures, rates))
    failures = {row: why for of_rank, _ in of_all for row, why in of_rank.items()}
    return dict(sorted(failures.items())), sum((rates for _, rates in of_all), Counter())


def describe_rates(rates: Counter) -> str | None:
    """A line for the user where a corpus mixes sampling rates, as release V2 of Codecfake does."""
    if len(rates) < 2:
        return None
    counts = ", ".join(f"{rate} Hz ({count} files)" for rate, count in sorted(rates.items()))
    return f"note: sampling rates are mixed: {counts}; everything is resampled to {SAMPLE_RATE} Hz"


def describe_decoders(decoders: Counter) -> str | None:
    """A line for the user where libsndfile could not decode all files."""
    count = decoders[FFMPEG]
    if not count:
        return None
    return (
        f"note: {count} of {decoders.total()} files read by ffmpeg: libsndfile cannot decode them"
    )


# ── Features ─────────────────────────────────────────────────────────────────────────────────────


class Features(Protocol):
    """What training reads from: a cache, a folder of the reference's files, or several as one."""

    folder: str
    names: Sequence[str]  # N
    labels: np.ndarray  # (N,) int64, REAL or FAKE
    shape: tuple[int, int]  # (frames, dim)
    dtype: str  # as stored, one of formats.feature_cache.DTYPES
    front_end: dict[str, Any]  # what made it; the reference's files record only the feat
    about: dict[str, Any]  # recorded beside it, not compared: where the weights came from, versions

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (B, frames, dim) float16 or float32, labels (B,).

        Raises InputError naming a damaged row.
        """


class StoredFeatures(Features, Protocol):
    """The features of one part of one corpus."""

    def require_complete(self) -> None:
        """Raise InputError where rows are still to be extracted."""

    def check_protocol(self, trials: Sequence[Trial]) -> None:
        """Raise InputError where the features are those of other trials."""


class ReferenceFeatures:
    """A folder of the reference's own files, one pickled tensor a clip.

    `%06d_<name>_<real|fake>.pt` for Codecfake, `%05d_<utterance>_<attack>_<bonafide|spoof>.pt` for
    19LA: names hold underscores of their own, so the label is what follows the last one.
    """

    dtype = "float32"
    _NAME = re.compile(r"\d+_(.+)_(real|fake|bonafide|spoof)\.pt")
    _LARGEST = 2**22  # bytes; the reference's own take 824,774

    def __init__(self, folder: str | Path, feat: str):
        self.folder = str(folder)
        self.front_end = {"feat": feat}
        self.shape = FEATURE_SHAPES[feat]
        self.files = sorted(name for name in os.listdir(folder) if name.endswith(".pt"))
        matches = [self._NAME.fullmatch(name) for name in self.files]
        if None in matches:
            raise InputError(
                f"{folder}/{self.files[matches.index(None)]}: expected the reference's "
                "<number>_<name>_<label>.pt with a label of real, fake, bonafide or spoof"
            )
        self.names = [match[1] for match in matches]
        labels = [REAL if match[2] in ("real", "bonafide") else FAKE for match in matches]
        is_codecfake = matches[0][2] in ("real", "fake")
        self.about: dict[str, Any] = {"task": "codecfake" if is_codecfake else "19LA"}
        self.labels = np.array(labels, dtype=np.int64)

    def require_complete(self) -> None:
        """The reference's folders do not say how many files belong to them."""

    def check_protocol(self, trials: Sequence[Trial]) -> None:
        """Raise InputError where a file is of no trial or has another label."""
        labels = {trial.name: trial.label for trial in trials}
        for file, name, label in zip(self.files, self.names, self.labels, strict=True):
            # 19LA's names carry the attack behind the utterance.
            utterance = name if name in labels else name.rpartition("_")[0]
            if labels.get(utterance) != label:
                raise InputError(
                    f"{self.folder}/{file}: the protocol given with -d has no such trial with that "
                    "label"
                )

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        features = [self._read_file(f"{self.folder}/{self.files[row]}") for row in rows]
        return torch.stack(features), torch.from_numpy(self.labels[rows])

    def _read_file(self, path: str) -> Tensor:
        size = os.path.getsize(path)
        if size > self._LARGEST:
            raise InputError(f"{path}: expected one clip's feature, got a file of {size} bytes")
        tensor = torch_files.load(path)
        feat = self.front_end["feat"]
        frames, dim = self.shape
        # The reference stored mel frequency first, (1, 80, 505), and XLS-R frames first, (1, 201,
        # 1024).
        expected = (1, dim, frames) if feat == "mel" else (1, frames, dim)
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        if shape != expected:
            raise InputError(f"{path}: expected a tensor {expected} of --feat {feat}, got {shape}")
        feature = tensor[0].detach().float()
        if not torch.isfinite(feature).all():
            raise InputError(
                f"{path}: holds values that are not finite; make the file again or take it out"
            )
        return (feature.T if feat == "mel" else feature).contiguous()


class JoinedFeatures:
    """Several parts as one; rows of the second are numbered on from the first's."""

    def __init__(self, parts: Sequence[StoredFeatures]):
        self.parts = list(parts)
        self.sizes = [len(part.labels) for part in parts]
        self.folder = " + ".join(part.folder for part in parts)
        self.labels = np.concatenate([part.labels for part in parts])
        self.shape = parts[0].shape
        self.dtype = parts[0].dtype
        self.front_end = parts[0].front_end
        self.about = parts[0].about
        self._starts = np.cumsum([0, *self.sizes])

    @property
    def names(self) -> Sequence[str]:
        return [name for part in self.parts for name in part.names]

    def name(self, row: int) -> str:
        part = self._part_of(row)
        return self.parts[part].names[row - self._starts[part]]

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        values = self._join(rows, lambda part, rows: part.read(rows)[0])
        return values, torch.from_numpy(self.labels[rows])

    def has_codes(self) -> bool:
        """Whether all parts are caches in one of the 8-bit forms."""
        return self.dtype in EIGHT_BITS.values() and len({p.dtype for p in self.parts}) == 1

    def read_codes(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Rows as they are stored, for feature_cache.decode_codes(), and labels."""
        values = self._join(rows, lambda part, rows: torch.from_numpy(part.read_stored(rows)))
        return values, torch.from_numpy(self.labels[rows])

    def _join(
        self, rows: np.ndarray, read: Callable[[StoredFeatures, np.ndarray], Tensor]
    ) -> Tensor:
        """What `read` gives of each part's own rows, in the order of `rows`."""
        part_of = self._part_of(rows)
        if (part_of == part_of[0]).all():
            return read(self.parts[part_of[0]], rows - self._starts[part_of[0]])
        numbers = np.unique(part_of)
        positions = [np.flatnonzero(part_of == number) for number in numbers]
        pieces = [
            read(self.parts[number], rows[where] - self._starts[number])
            for number, where in zip(numbers, positions, strict=True)
        ]
        if len({piece.dtype for piece in pieces}) > 1:
            pieces = [piece.float() for piece in pieces]
        values = torch.empty(len(rows), *pieces[0].shape[1:], dtype=pieces[0].dtype)
        for where, piece in zip(positions, pieces, strict=True):
            values[where] = piece
        return values

    def _part_of(self, rows: np.ndarray | int) -> np.ndarray | int:
        return np.searchsorted(self._starts, rows, side="right") - 1


def open_features(root: str | Path, part: str, feat: str) -> StoredFeatures:
    """The complete features of one part, ours or the reference's.

    Args:
        root: the folder with train/ and dev/.
        part: "train" or "dev".

    Raises:
        InputError: none there, not finished, or made with another front end.
    """
    folder = Path(root) / part / feat
    if not folder.is_dir():
        raise InputError(
            f"{folder}: expected the features of --feat {feat}, {_describe_others(folder.parent)}; "
            "make them with preprocess.py, or point -f (Codecfake) or -f1 (19LA) at the folder "
            "that holds train/ and dev/"
        )
    features = _open_store(folder, feat)
    features.require_complete()
    same_front_end = features.front_end["feat"] == feat
    if not same_front_end or features.shape[0] != FEATURE_SHAPES[feat][0]:
        raise InputError(
            f"{folder}: expected features of --feat {feat}, it was made with --feat "
            f"{features.front_end['feat']}"
        )
    if not len(features.labels):
        raise InputError(f"{folder}: holds no readable row")
    return features


def _open_store(folder: Path, feat: str) -> StoredFeatures:
    if (folder / "cache.json").exists():
        return FeatureCache(folder)
    if any(name.endswith(".pt") for name in os.listdir(folder)):
        return ReferenceFeatures(folder, feat)
    raise InputError(
        f"{folder}: neither a feature cache nor the reference's .pt files; make it with "
        "preprocess.py"
    )


def _describe_others(parent: Path) -> str:
    others = sorted(path.name for path in parent.glob("*") if path.is_dir())
    if others:
        return f"found {', '.join(others)} there"
    return f"found no features under {parent}"


def common_front_end(parts: Sequence[Features]) -> dict[str, Any]:
    """What made all the features.

    The reference's files, which record less, agree with everything that they do not contradict.

    Raises:
        InputError: two parts were made with different front ends.
    """
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.front_end.items():
            if merged.setdefault(key, value) != value:
                raise InputError(
                    f"{part.folder}: made with {key} {value!r}, {parts[0].folder} with "
                    f"{merged[key]!r}; train on features of one front end"
                )
    return merged


# Names that only one corpus has.
CORPUS_NAMES = {
    "19LA": re.compile(r"LA_[TDE]_\d{7}"),
    "codecfake": re.compile(r"F0\d_.+\.wav"),
}


def corpus_of(store: Features) -> str | None:
    """Whose features these are: as recorded, or as a fake's name tells; None where neither does."""
    if "task" in store.about:
        return store.about["task"]
    fakes = np.flatnonzero(store.labels == FAKE)
    if not len(fakes):
        return None
    name = store.names[fakes[0]]
    return next((task for task, form in CORPUS_NAMES.items() if form.match(name)), None)


def in_order(stores: Sequence[StoredFeatures], tasks: Sequence[str]) -> list[StoredFeatures]:
    """The features in the order of the corpora that they belong to.

    Raises:
        InputError: they are of other corpora.
    """
    found = [corpus_of(store) for store in stores]
    if len(stores) > 1 and found == list(reversed(tasks)):
        cli.echo("note: -f holds 19LA's features and -f1 Codecfake's; they are taken as they are")
        return list(reversed(stores))
    for store, corpus, task in zip(stores, found, tasks, strict=True):
        if corpus not in (None, task):
            raise InputError(
                f"{store.folder}: expected the features of {task}, it holds those of {corpus}; -f "
                "is Codecfake's folder, -f1 19LA's"
            )
    return list(stores)


def check_size(features: Features, feat: str) -> None:
    """Raise InputError where the features have another size than the heads take."""
    if features.shape != FEATURE_SHAPES[feat]:
        raise InputError(
            f"{features.folder}: expected features {FEATURE_SHAPES[feat]} of --feat {feat}, got "
            f"{features.shape}; they were made with wav2vec 2.0 weights of another size"
        )


def check_ssl(folder: str, front_end: dict[str, Any], feat: str, ssl: str) -> None:
    """Raise InputError where the features were not made with these wav2vec 2.0 weights."""
    if feat == "mel":
        return
    for key, value in frontends.load_frontend(feat, ssl).fingerprint().items():
        if front_end.get(key, value) != value:
            raise InputError(
                f"{folder}: made with {key} {front_end[key]!r}, --ssl {ssl} gives {value!r}"
            )


def check_protocols(features: JoinedFeatures, train_task: str, root: Path, part: str) -> None:
    """Raise InputError where the features are not those of the corpora under `root`."""
    tasks = TRAIN_TASKS[train_task]
    for task, store in zip(tasks, features.parts, strict=True):
        store.check_protocol(read_protocol(task, corpus_folder(root, train_task, task), part))


def corpus_folder(root: Path | None, train_task: str, task: str) -> Path:
    """Where a corpus of a training task lies, given -d (None: the default folders)."""
    if root is None:
        return cli.CORPUS_FOLDERS[task]
    return root / CO_TRAIN_FOLDERS[task] if len(TRAIN_TASKS[train_task]) > 1 else root


def read_ahead(
    features: Features,
    batches: Sequence[np.ndarray],
    threads: int,
    device: torch.device = CPU,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels of each batch in order, read by threads while the caller computes.

    Threads, not processes: reading and checking release the interpreter, and nothing has to be
    copied between processes. OnlineFeatures are computed by the caller's thread instead, from clips
    that processes decode.

    Args:
        threads: 0 reads in the caller's own thread.
        device: where both are handed on. To a GPU they go from pinned memory while it computes, and
            8-bit codes are decoded there.
    """
    if isinstance(features, OnlineFeatures):
        yield from features.compute_ahead(batches, threads)
    elif not is_gpu(device):
        yield from _read_in_threads(features.read, batches, threads)
    else:
        yield from _read_to_gpu(features, batches, threads, device)


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _read_to_gpu(
    features: Features, batches: Sequence[np.ndarray], threads: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    has_codes = isinstance(features, JoinedFeatures) and features.has_codes()

    def read(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        values, labels = features.read_codes(rows) if has_codes else features.read(rows)
        return values.pin_memory(), labels.pin_memory()

    for values, labels in _read_in_threads(read, batches, threads):
        values = values.to(device, non_blocking=True)
        if has_codes:
            values = decode_codes(values, features.dtype, features.shape)
        yield values, labels.to(device, non_blocking=True)


def _read_in_threads(
    read: Callable[[np.ndarray], tuple[Tensor, Tensor]],
    batches: Sequence[np.ndarray],
    threads: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `read` gives of each batch, in order."""
    if threads == 0:
        for rows in batches:
            cli.stop_if_asked()
            yield read(rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for rows in batches:
                cli.stop_if_asked()
                waiting.append(pool.submit(read, rows))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for task in waiting:
                task.cancel()


# ── Features without a cache ─────────────────────────────────────────────────────────────────────


class AudioPart:
    """The clips of one part of one corpus; their features are computed when they are wanted.

    Args:
        folder: the corpus's, for messages.
        front_end, precision: what computes the features, recorded as a cache records it.
    """

    dtype = "float32"

    def __init__(
        self, folder: str | Path, trials: Sequence[Trial], front_end: FrontEnd, precision: str
    ):
        self.folder = str(folder)
        self.paths = [trial.path for trial in trials]
        self.names = [trial.name for trial in trials]
        self.labels = np.array([trial.label for trial in trials], dtype=np.int64)
        self.shape = (FEATURE_SHAPES[front_end.feat][0], front_end.dim)
        self.front_end = front_end.fingerprint() | {"precision": precision}
        self.about = {"ssl": getattr(front_end, "ssl", None)}


class OnlineFeatures(JoinedFeatures):
    """Features computed from audio in the training loop; nothing is written to the disk.

    Rows, order and values are those of float32 caches of the same corpora.

    Args:
        network: the front end, on `device`.
        batch_size: of training; the front end takes no more clips at once.
    """

    def __init__(
        self,
        parts: Sequence[AudioPart],
        network: FrontEnd,
        device: torch.device,
        batch_size: int,
    ):
        super().__init__(parts)
        self.paths = [path for part in parts for path in part.paths]
        self.network, self.device, self.batch_size = network, device, batch_size

    def read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Features (B, frames, dim) float32 and labels (B,), both on the device."""
        return next(self.compute_ahead([rows], 0))

    def compute_ahead(
        self, batches: Sequence[np.ndarray], num_workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What read() gives of each batch, in order.

        Processes decode the clips of the batches to come; the front end runs in the caller's thread
        alone. It takes equally many clips each time, wherever the batches begin and end, so that a
        clip's feature does not depend on the clips beside it; see devices.pad_batch().

        Raises:
            InputError: a file cannot be read, or a worker died; the message names the file.
        """
        if not batches:
            return
        size = min(devices.clips_a_batch(self.device), self.batch_size)
        rows = np.concatenate(batches)
        pieces = np.split(rows, range(size, len(rows), size))
        computed = self._compute(pieces, size, num_workers)
        ready = torch.empty(0, *self.shape, device=self.device)  # of the batches to come
        # Copied at once: each copy of a batch would wait for everything that is queued.
        labels = torch.from_numpy(self.labels[rows]).to(self.device)
        for batch in batches:
            while len(ready) < len(batch):
                # A copy that backward() may keep, unlike what is made in inference mode.
                ready = torch.cat([ready, next(computed)])
            yield ready[: len(batch)], labels[: len(batch)]
            ready, labels = ready[len(batch) :], labels[len(batch) :]

    def _compute(
        self, pieces: Sequence[np.ndarray], size: int, num_workers: int
    ) -> Iterator[Tensor]:
        """Features (B, frames, dim) of each piece of at most `size` rows."""
        for batch in clip_batches(self.paths, [piece.tolist() for piece in pieces], num_workers):
            for why in batch.failures.values():
                raise InputError(f"{why}; it could be read when the run began")
            with (
                devices.memory_advice(self.batch_size),
                torch.inference_mode(),
                torch.autocast(self.device.type, enabled=False),
            ):
                padded = devices.pad_batch(batch.clips, size, self.device)
                features = self.network(padded)[: len(batch.clips)]
            yield features


# ── The order of training ────────────────────────────────────────────────────────────────────────

# Both orders are functions of (seed, epoch) alone, so a run can be taken up at any epoch, or in the
# middle of one, without having stored a sampler.


def shuffled_batches(
    sizes: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Every row of every corpus once, shuffled together.

    Args:
        sizes: rows of each corpus; the rows of the second are numbered on from the first's.
        epoch: from 1.

    Returns:
        Row numbers, a batch an array; the last may be short.
    """
    order = _permutation(sum(sizes), seed, 0, epoch)
    return np.split(order, range(batch_size, len(order), batch_size))


def proportional_batches(
    sizes: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """CSAM's batches (Xie et al., section IV): both corpora in each, in proportion to their sizes.

    One epoch is one pass over the larger corpus. Each corpus is shuffled anew when it is exhausted
    and not before, so the smaller one's passes run across batches and epochs.

    Args:
        sizes: rows of the two corpora; the rows of the second are numbered on from the first's.
        epoch: from 1.

    Returns:
        Row numbers, a batch an array, the larger corpus's first; the last batch may be short.
    """
    if len(sizes) != 2 or batch_size < 2:
        raise InputError(
            f"CSAM takes two corpora and batches of at least 2, got {len(sizes)} and {batch_size}"
        )
    large, small = (0, 1) if sizes[0] >= sizes[1] else (1, 0)
    offset = (0, sizes[0])
    n_large = _clamp(round(batch_size * sizes[large] / sum(sizes)), 1, batch_size - 1)
    n_batches = -(-sizes[large] // n_large)
    left_over = sizes[large] - (n_batches - 1) * n_large  # of the larger corpus, in the last batch
    n_small = [batch_size - n_large] * (n_batches - 1)
    n_small.append(_clamp(round(left_over * sizes[small] / sizes[large]), 1, batch_size - n_large))

    order = _permutation(sizes[large], seed, large, epoch) + offset[large]
    larger = np.split(order, range(n_large, len(order), n_large))
    drawn = (epoch - 1) * sum(n_small)  # of the smaller corpus, in earlier epochs
    stream = _endless_passes(sizes[small], seed, small, drawn, sum(n_small)) + offset[small]
    smaller = np.split(stream, np.cumsum(n_small)[:-1])
    return [np.concatenate(pair) for pair in zip(larger, smaller, strict=True)]


def _clamp(number: int, lowest: int, highest: int) -> int:
    return min(max(number, lowest), highest)


def _endless_passes(size: int, seed: int, corpus: int, start: int, count: int) -> np.ndarray:
    """Positions start .. start + count of a corpus read pass after pass, each shuffled anew."""
    first, last = start // size, (start + count - 1) // size
    passes = [_permutation(size, seed, corpus, number + 1) for number in range(first, last + 1)]
    return np.concatenate(passes)[start - first * size :][:count]


def _permutation(size: int, seed: int, corpus: int, number: int) -> np.ndarray:
    return np.random.default_rng((seed, corpus, number)).permutation(size)
