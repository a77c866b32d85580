"""Corpora, clips and batches: from the files a researcher downloads to the order they are trained in.

Protocols (one parse function a corpus), audio reading, and the order of training batches. The cached
features have a room of their own, `feature_cache.py`.
"""
from __future__ import annotations

import csv
import gc
import hashlib
import math
import os
import re
import signal
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

import cli
from cli import InputError

SAMPLE_RATE = 16_000
CLIP_SAMPLES = 64_600      # 4.04 s, the published clip length
REAL, FAKE = 0, 1          # labels and logit columns; a score is always higher-is-real
FEATURE_SHAPES = {         # (frames, dim)
    "mel": (505, 80),      # 1 + 64,600 // 128 frames of 80 mel bands
    "xls-r-5": (201, 1024),  # what wav2vec 2.0's strides leave of 64,600 samples: one frame per 20 ms
}
CODECFAKE_SUBSETS = ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "A1", "A2", "A3")
PARTS = {"codecfake": ("train", "dev", *CODECFAKE_SUBSETS), "19LA": ("train", "dev", "eval"), "ITW": ("all",)}
SCORED = {                 # task -> {subset as score files name it: part of the corpus}
    "19LA": {"19LA": "eval"},
    "ITW": {"ITW": "all"},
    "codecfake": {subset: subset for subset in CODECFAKE_SUBSETS},
}
LABEL_WORDS = {"codecfake": ("real", "fake"), "19LA": ("bonafide", "spoof"), "ITW": ("bonafide", "spoof")}


class Trial(NamedTuple):           # a million of them are read in seconds; a frozen dataclass takes three times as long
    """One row of a protocol."""

    name: str      # as score files write it: with .wav in Codecfake, without extension elsewhere
    path: str
    label: int     # REAL or FAKE
    source: str    # codec (F01..F07, L1..L3) or attack (A01..A19), "-" if real or unknown


# ── Protocols ────────────────────────────────────────────────────────────────────────────────────


def read_protocol(task: str, root: str | Path, part: str) -> list[Trial]:
    """All rows of one part of a corpus, in the protocol's order.

    Args:
        task: "codecfake", "19LA" or "ITW".
        root: the corpus folder, laid out as its authors release it.
        part: one of PARTS[task].

    Raises:
        InputError: no such corpus there, a row that is not one (names the file and the row), or a recording that is both real
            and fake.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the corpus's folder with -d")
    collecting = gc.isenabled()
    gc.disable()                       # a million new tuples would have it look through them all over and over
    try:
        protocol, trials = {"codecfake": _codecfake, "19LA": _asvspoof2019, "ITW": _in_the_wild}[task](root, part)
    finally:
        if collecting:
            gc.enable()
    if not trials:
        raise InputError(f"{protocol}: has no rows")
    if len({trial.path for trial in trials}) < len(trials):      # the same row twice only counts twice, in training
        _require_one_label_each(protocol, trials)
    return trials


def _require_one_label_each(protocol: Path, trials: list[Trial]) -> None:
    labels: dict[str, int] = {}
    for trial in trials:
        if labels.setdefault(trial.path, trial.label) != trial.label:
            raise InputError(f"{protocol}: {trial.name} is in it as bona fide and as spoof; take the wrong row out")


def _codecfake(root: Path, part: str) -> tuple[Path, list[Trial]]:
    """`name.wav real|fake tag`, or the two-column copies without the tag."""
    names = [part, "L" + part[1]] if part[0] == "A" else [part]
    protocol = _first_file(root, [f"label/{name}.txt" for name in names])
    folders = [root / above / name for above in ("test", "") for name in names]
    if part in ("train", "dev"):
        folders = [root / part]
    found = [f for f in folders if f.is_dir()]
    folder = next((f for f in found if any(os.scandir(f))), (found or folders)[0])
    folder = str(folder)               # formatting a Path a million times takes a second

    trials, words, sources = [], {"real": REAL, "fake": FAKE}, {}
    for row, fields in _rows(protocol):
        if len(fields) not in (2, 3):
            raise _bad_row(protocol, row, "`name.wav real|fake tag`", fields)
        name, tag = _plain_name(protocol, row, fields[0]), fields[2] if len(fields) == 3 else "-"
        label = _label(protocol, row, fields[1], words)
        if tag not in sources:
            sources[tag] = f"F{int(tag):02d}" if tag.isascii() and tag.isdigit() else _plain_name(protocol, row, tag, "tag")
        trials.append(Trial(name, f"{folder}/{name}", label, "-" if label == REAL else sources[tag]))
    return protocol, trials


def _asvspoof2019(root: Path, part: str) -> tuple[Path, list[Trial]]:
    """`speaker utterance - attack key`."""
    if not (root / "ASVspoof2019_LA_cm_protocols").is_dir() and (root / "LA").is_dir():
        root = root / "LA"             # LA.zip unpacks into a folder LA of its own
    kind = "trn" if part == "train" else "trl"
    protocol = _first_file(root, [f"ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{part}.{kind}.txt"])
    folder = str(root / f"ASVspoof2019_LA_{part}" / "flac")

    trials, words = [], {"bonafide": REAL, "spoof": FAKE}
    for row, fields in _rows(protocol):
        if len(fields) != 5:
            raise _bad_row(protocol, row, "`speaker utterance - attack key`", fields)
        name = _plain_name(protocol, row, fields[1])
        label = _label(protocol, row, fields[4], words)
        attack = _plain_name(protocol, row, fields[3], "attack")
        trials.append(Trial(name, f"{folder}/{name}.flac", label, "-" if label == REAL else attack))
    return protocol, trials


def _in_the_wild(root: Path, part: str) -> tuple[Path, list[Trial]]:
    """The released `meta.csv`, or the reference's five-column `label.txt` with its audio in `wav/`."""
    if not (root / "meta.csv").is_file() and (root / "release_in_the_wild").is_dir():
        root = root / "release_in_the_wild"
    protocol = _first_file(root, ["meta.csv", "label.txt"])
    words = {"bona-fide": REAL, "bonafide": REAL, "spoof": FAKE}
    trials = []
    if protocol.name == "label.txt":
        for row, fields in _rows(protocol):
            if len(fields) != 5:
                raise _bad_row(protocol, row, "five columns with the id in the 2nd and the label in the 5th", fields)
            name = _plain_name(protocol, row, fields[1])
            trials.append(Trial(name, f"{root}/wav/{name}.wav", _label(protocol, row, fields[4], words), "-"))
        return protocol, trials
    for row, fields in _csv_rows(protocol):
        if len(fields) != 3:
            raise _bad_row(protocol, row, "`file,speaker,label`", fields)
        file = _plain_name(protocol, row, fields[0].strip())
        label = _label(protocol, row, fields[2].strip(), words)
        trials.append(Trial(Path(file).stem, f"{root}/{file}", label, "-"))
    return protocol, trials


def find_missing(trials: Sequence[Trial]) -> list[Trial]:
    """The trials whose audio file is not there. Lists each folder once instead of asking file by file."""
    present: dict[str, set[str]] = {}
    missing = []
    for trial in trials:
        folder, _, file = trial.path.rpartition("/")
        if folder not in present:
            present[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if file not in present[folder]:
            missing.append(trial)
    return missing


def describe_missing(missing: Sequence[Trial], n_trials: int) -> str:
    """One line: how many of the protocol's files are absent, where, and the first names."""
    folders = sorted({trial.path.rpartition("/")[0] for trial in missing})
    first = ", ".join(trial.path.rpartition("/")[2] for trial in missing[:3])
    return f"{len(missing)} of {n_trials} files named by the protocol are not in {' or '.join(folders[:3])} (first: {first})"


def _first_file(root: Path, candidates: list[str]) -> Path:
    for candidate in candidates:
        if (root / candidate).is_file():
            return root / candidate
    raise InputError(f"{root}: expected {' or '.join(candidates)} in it, found neither a corpus of that layout nor that "
                     "part of it; give the corpus's folder with -d (README, Data)")


LONGEST_ROW = 4_096        # characters; no real protocol comes near it


def _lines(protocol: Path) -> Iterator[tuple[int, str]]:
    """(row number from 1, line) of every row that is not blank. Never holds more than LONGEST_ROW of one."""
    row = 0
    with open(protocol, encoding="utf-8-sig", newline=None) as file:
        try:
            while line := file.readline(LONGEST_ROW + 1):
                row += 1
                if len(line) > LONGEST_ROW:
                    raise InputError(f"{protocol}:{row}: expected a protocol row, got a line of over {LONGEST_ROW} characters")
                if line.strip():
                    yield row, line.rstrip("\n")
        except UnicodeDecodeError:
            raise InputError(f"{protocol}: not a text file (row {row + 1} or after is not UTF-8)") from None


def _rows(protocol: Path) -> Iterator[tuple[int, list[str]]]:
    return ((row, line.split()) for row, line in _lines(protocol))


def _csv_rows(protocol: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of `meta.csv` below its header; a first row that is data is kept as data."""
    for row, line in _lines(protocol):
        try:
            fields = next(csv.reader([line], strict=True))       # each line by itself: a stray quote must not swallow the next
        except csv.Error as error:
            raise InputError(f"{protocol}:{row}: expected `file,speaker,label`, got {line[:60]!r} ({error})") from None
        if [field.strip() for field in fields] != ["file", "speaker", "label"]:
            yield row, fields


def _plain_name(protocol: Path, row: int, name: str, what: str = "file name") -> str:
    """The name, once it is sure to stay inside the corpus's folder and to drive no terminal."""
    if not name or "/" in name or "\\" in name or name in (".", "..") or not name.isprintable():
        raise InputError(f"{protocol}:{row}: expected a plain {what}, got {name[:60]!r}")
    return name


def _label(protocol: Path, row: int, word: str, words: dict[str, int]) -> int:
    if word not in words:
        raise InputError(f"{protocol}:{row}: expected the label {' or '.join(words)}, got {word[:60]!r}")
    return words[word]


def _bad_row(protocol: Path, row: int, expected: str, fields: list[str]) -> InputError:
    return InputError(f"{protocol}:{row}: expected {expected}, got {len(fields)} columns: {' '.join(fields)[:80]!r}")


# ── Clips ────────────────────────────────────────────────────────────────────────────────────────


def load_clip(path: str | Path) -> Tensor:
    """Read an audio file as the (64600,) float32 clip that every front end takes.

    Mono (mean of channels), 16 kHz, integer formats scaled to [-1, 1), nothing clamped; the first
    64,600 samples, a shorter recording repeated end to end and cut.

    Raises:
        InputError: not a regular file, not audio, no samples, fewer than a WAV, AIFF or AU file announces, or samples, of those
            that are used, that are not finite.
    """
    return _load_clip(path)[0]


def _load_clip(path: str | Path) -> tuple[Tensor, int]:
    """The clip and the file's own sampling rate in Hz."""
    samples, rate = _read_start(path)
    if rate != SAMPLE_RATE:
        samples = resample(samples, rate)
    if not torch.isfinite(samples).all():
        raise InputError(f"{path}: holds samples that are not finite (NaN, infinity, or too large to compute with); repair the file or "
                         "take it out")
    copies = -(-CLIP_SAMPLES // len(samples))
    return samples.repeat(copies)[:CLIP_SAMPLES].contiguous(), rate


def _read_start(path: str | Path) -> tuple[Tensor, int]:
    """As many mono samples, at the file's own rate, as a clip is made of."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):   # opening a named pipe would wait for ever
            raise InputError(f"{path}: expected an audio file, found something that is not a regular file")
        with soundfile.SoundFile(os.fsencode(path)) as file:      # names need not be UTF-8
            if not 1 <= file.samplerate <= FASTEST_RATE:
                raise InputError(f"{path}: expected a sampling rate up to {FASTEST_RATE} Hz, got {file.samplerate}")
            wanted = _samples_needed(file.samplerate)
            step = max(1, 2**20 // file.channels)     # bounds memory, whatever channel count a header claims
            blocks = []
            while wanted > 0 and len(block := file.read(min(step, wanted), dtype="float32", always_2d=True)):
                with np.errstate(over="ignore", invalid="ignore"):       # what comes of it is refused by name
                    blocks.append(block.mean(axis=1))
                wanted -= len(block)
            rate = file.samplerate
            if wanted > 0:                            # a longer file may be cut wherever it likes, the clip is the same
                _require_whole(path, file.extra_info)
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:     # TypeError: headerless .raw
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise InputError(f"{path}: cannot be read as audio ({reason}); fetch the file again or take it out") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not blocks:
        raise InputError(f"{path}: expected audio, found no samples in it; fetch the file again or take it out")
    return torch.from_numpy(np.concatenate(blocks)), rate


# What libsndfile reports of the chunk with the samples, in WAV, AIFF and AU.
ANNOUNCED = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
NO_LENGTH = 2**31 - 2**16  # bytes; what writes into a pipe announces this much or more
SLACK = 128                # bytes; some writers count the header


def _require_whole(path: str | Path, report: str) -> None:
    """Raises InputError where a header announces more samples than the file holds, as after a broken copy."""
    for announced, found in ANNOUNCED.findall(report):
        if int(found) + SLACK < int(announced) < NO_LENGTH:
            raise InputError(f"{path}: cut short: announces {announced} bytes of samples, has {found}; fetch the file again or take it out")


# librosa's kaiser_best, which the reference used, in the terms of torchaudio's resampler (its documentation gives them).
ZERO_CROSSINGS, ROLLOFF, KAISER_BETA = 64, 0.9475937167399596, 14.769656459379492
FASTEST_RATE = 768_000     # Hz; converters go no higher, and the filter's length grows with the rate
LARGEST_KERNEL = 2**22     # weights; only odd rates such as 44,101 Hz need more than a few thousand


def resample(samples: Tensor, rate: int) -> Tensor:
    """Band-limited interpolation of (n,) float32 from `rate` Hz to (ceil(16000 n / rate),) at 16 kHz."""
    common = math.gcd(rate, SAMPLE_RATE)
    phases, period = SAMPLE_RATE // common, rate // common
    if phases * (2 * _filter_reach(rate) + period) > LARGEST_KERNEL:
        return _resample_directly(samples, rate)
    return _resampler(rate)(samples)


@lru_cache(maxsize=16)
def _resampler(rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(rate, SAMPLE_RATE, resampling_method="sinc_interp_kaiser",
                                          lowpass_filter_width=ZERO_CROSSINGS, rolloff=ROLLOFF, beta=KAISER_BETA)


def _resample_directly(samples: Tensor, rate: int) -> Tensor:
    """The same windowed sinc, evaluated at each output instant.

    A rate without a small ratio to 16 kHz would need a polyphase kernel of gigabytes.
    """
    cutoff = min(rate, SAMPLE_RATE) * ROLLOFF                    # Hz, twice the band that is kept
    reach = _filter_reach(rate)
    padded = torch.nn.functional.pad(samples.double(), (reach, reach + 1))
    taps = torch.arange(-reach, reach + 1)
    out = []
    for instants in torch.arange(math.ceil(len(samples) * SAMPLE_RATE / rate)).split(1024):
        centre = instants * rate // SAMPLE_RATE                  # the input sample at or before each instant
        index = centre[:, None] + taps                           # (n, 2 * reach + 1)
        offset = index.double() / rate - instants[:, None].double() / SAMPLE_RATE  # seconds
        crossings = (offset * cutoff).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
        window = torch.special.i0(KAISER_BETA * torch.sqrt(1 - (crossings / ZERO_CROSSINGS) ** 2))
        weights = torch.sinc(crossings) * window * (cutoff / rate / np.i0(KAISER_BETA))
        out.append((padded[index + reach] * weights).sum(dim=1))
    return torch.cat(out).float()


def _filter_reach(rate: int) -> int:
    """Input samples the interpolation filter reaches to either side."""
    return math.ceil(ZERO_CROSSINGS * rate / (min(rate, SAMPLE_RATE) * ROLLOFF))


def _samples_needed(rate: int) -> int:
    """Input samples that decide the first 64,600 output samples."""
    if rate == SAMPLE_RATE:
        return CLIP_SAMPLES
    return math.ceil(CLIP_SAMPLES * rate / SAMPLE_RATE) + _filter_reach(rate) + rate // math.gcd(rate, SAMPLE_RATE)


@dataclass(frozen=True)
class ClipBatch:
    """Some clips of a corpus; a file that could not be read is in `failures` instead."""

    rows: list[int]              # positions in the list of paths that was given
    clips: Tensor                # (len(rows), 64600) float32
    rates: Counter               # sampling rate in Hz -> number of files
    failures: dict[int, str]     # row -> one line saying what is wrong with its file
    digests: list[bytes]         # of the samples: clips with the same one are the same clip


class _Clips(torch.utils.data.Dataset):
    def __init__(self, paths: Sequence[str], num_workers: int):
        self.paths = paths
        # (process, row) that each worker is at, in memory they share: the last word of one that dies.
        self.reading = torch.full((max(num_workers, 1), 2), -1).share_memory_()

    def __getitems__(self, rows: list[int]) -> ClipBatch:
        worker = torch.utils.data.get_worker_info()
        mine = self.reading[worker.id if worker else 0]
        mine[0] = os.getpid()
        good, clips, rates, failures, digests = [], [], Counter(), {}, []
        for row in rows:
            mine[1] = row
            try:
                clip, rate = _load_clip(self.paths[row])
            except InputError as error:
                failures[row] = str(error)
                continue
            good.append(row)
            clips.append(clip)
            rates[rate] += 1
            digests.append(hashlib.blake2b(clip.numpy(), digest_size=16).digest())
        mine[1] = -1
        return ClipBatch(good, torch.stack(clips) if clips else torch.empty(0, CLIP_SAMPLES), rates, failures, digests)

    def left_by_the_dead(self) -> list[str]:
        """The files that processes which have ended were reading."""
        for _ in range(100):           # a process's connections close a moment before it has ended
            if left := [self.paths[row] if row >= 0 else "no file" for process, row in self.reading.tolist() if process > 0 and _has_ended(process)]:
                return left
            time.sleep(0.02)
        return []


def _has_ended(process: int) -> bool:
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def clip_batches(paths: Sequence[str], batches: Sequence[Sequence[int]], num_workers: int) -> Iterator[ClipBatch]:
    """Decode the given batches of rows, in order, in `num_workers` processes (0: in this one)."""
    clips = _Clips(paths, num_workers)
    loader = torch.utils.data.DataLoader(
        clips, batch_sampler=batches, num_workers=num_workers, collate_fn=_unchanged,
        worker_init_fn=_leave_last_word_to_parent, persistent_workers=False)
    try:
        loading = iter(loader)
        if num_workers and threading.current_thread() is threading.main_thread():
            # torch raises from a handler wherever the program happens to stand; without it, a death is noticed here.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for batch in loading:
            cli.stop_if_asked()
            yield batch
    except (RuntimeError, OSError, EOFError) as error:         # what a dead process leaves: torch's word, or a broken pipe
        left = clips.left_by_the_dead() if num_workers else []
        if not left:
            raise
        raise InputError(f"a decoding process died while it was reading {' or '.join(left)}; take that file out, or lower "
                         "--num_workers if memory ran out") from error


def _unchanged(batch: ClipBatch) -> ClipBatch:
    return batch


def _leave_last_word_to_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group; only the main process answers it, in one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _say_nothing      # the thread that hands tensors over reports a parent which ends while it takes one


def _say_nothing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    pass


def describe_rates(rates: Counter) -> str | None:
    """A line for the user where a corpus mixes sampling rates, as release V2 of Codecfake does."""
    if len(rates) < 2:
        return None
    counts = ", ".join(f"{rate} Hz ({count} files)" for rate, count in sorted(rates.items()))
    return f"note: sampling rates are mixed: {counts}; everything is resampled to {SAMPLE_RATE} Hz"


# ── The order of training ────────────────────────────────────────────────────────────────────────

# Both orders are functions of (seed, epoch) alone, so a run can be taken up at any epoch, or in the
# middle of one, without having stored a sampler.


def shuffled_batches(sizes: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Every row of every corpus once, shuffled together.

    Args:
        sizes: rows of each corpus; the rows of the second are numbered on from the first's.
        epoch: from 1.

    Returns:
        Row numbers, a batch an array; the last may be short.
    """
    order = _permutation(sum(sizes), seed, 0, epoch)
    return np.split(order, range(batch_size, len(order), batch_size))


def proportional_batches(sizes: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """CSAM's batches (Xie et al., section IV): both corpora in every batch, in the proportion of their sizes.

    One epoch is one pass over the larger corpus. Each corpus is shuffled anew when it is exhausted and
    not before, so the smaller one's passes run across batches and epochs.

    Args:
        sizes: rows of the two corpora; the rows of the second are numbered on from the first's.
        epoch: from 1.

    Returns:
        Row numbers, a batch an array, the larger corpus's first; the last batch may be short.
    """
    if len(sizes) != 2 or batch_size < 2:
        raise InputError(f"CSAM takes two corpora and batches of at least 2, got {len(sizes)} and {batch_size}")
    large, small = (0, 1) if sizes[0] >= sizes[1] else (1, 0)
    offset = (0, sizes[0])
    of_large = min(max(round(batch_size * sizes[large] / sum(sizes)), 1), batch_size - 1)
    n_batches = -(-sizes[large] // of_large)
    left_over = sizes[large] - (n_batches - 1) * of_large        # of the larger corpus, in the last batch
    of_small = [batch_size - of_large] * (n_batches - 1)
    of_small.append(min(max(round(left_over * sizes[small] / sizes[large]), 1), batch_size - of_large))

    order = _permutation(sizes[large], seed, large, epoch) + offset[large]
    larger = np.split(order, range(of_large, len(order), of_large))
    drawn = (epoch - 1) * sum(of_small)                          # of the smaller corpus, in earlier epochs
    stream = _endless_passes(sizes[small], seed, small, drawn, sum(of_small)) + offset[small]
    smaller = np.split(stream, np.cumsum(of_small)[:-1])
    return [np.concatenate(pair) for pair in zip(larger, smaller)]


def _endless_passes(size: int, seed: int, corpus: int, start: int, count: int) -> np.ndarray:
    """Positions start .. start + count of a corpus read pass after pass, each pass shuffled anew."""
    first, last = start // size, (start + count - 1) // size
    passes = np.concatenate([_permutation(size, seed, corpus, number + 1) for number in range(first, last + 1)])
    return passes[start - first * size:][:count]


def _permutation(size: int, seed: int, corpus: int, number: int) -> np.ndarray:
    return np.random.default_rng((seed, corpus, number)).permutation(size)
