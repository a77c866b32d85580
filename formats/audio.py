"""Recordings become clips: decoding, channels, sampling rate, length."""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from runtime.cli import InputError

SAMPLE_RATE = 16_000
CLIP_SAMPLES = 64_600  # 4.04 s, the published clip length
FASTEST_RATE = 768_000  # Hz; converters go no higher
LOOK_AHEAD = 4096  # samples at the lower of the two rates; 1024 do up to 96 kHz
RESAMPLER = f"soxr {soxr.__version__} HQ"  # what makes clips of files that are not at 16 kHz


# ── Clips ────────────────────────────────────────────────────────────────────────────────────────


class Recording(NamedTuple):
    """A clip, and how its file was read."""

    clip: Tensor  # (64600,) float32
    rate: int  # the file's own, Hz; RESAMPLER made the clip where it is not 16 kHz


def load_clip(path: str | Path) -> Tensor:
    """Read an audio file as the (64600,) float32 clip that every front end takes.

    Mono (mean of channels), 16 kHz, integer formats scaled to [-1, 1), nothing clamped; the first
    64,600 samples, a shorter recording repeated end to end and cut.

    Raises:
        InputError: not a regular file, not audio, no samples, fewer than a WAV, AIFF or AU file
            announces, or samples, of those that are used, that are not finite.
    """
    return load_recording(path).clip


def load_recording(path: str | Path) -> Recording:
    """load_clip(), and how the file was read."""
    samples, rate = _read_start(path)
    clip = samples
    if rate != SAMPLE_RATE:
        clip = resample(samples, rate)[:CLIP_SAMPLES]
    if not np.isfinite(samples).all() or not np.isfinite(clip).all():
        raise InputError(
            f"{path}: holds samples that are not finite (NaN, infinity, or too large to compute "
            "with); repair the file or take it out"
        )
    return Recording(torch.from_numpy(np.resize(clip, CLIP_SAMPLES)), rate)


def _read_start(path: str | Path) -> tuple[np.ndarray, int]:
    """As many mono samples, at the file's own rate, as a clip is made of."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
            raise InputError(
                f"{path}: expected an audio file, found something that is not a regular file"
            )
        with soundfile.SoundFile(os.fsencode(path)) as file:  # names need not be UTF-8
            if not 1 <= file.samplerate <= FASTEST_RATE:
                raise InputError(
                    f"{path}: expected a sampling rate up to {FASTEST_RATE} Hz, got "
                    f"{file.samplerate}"
                )
            wanted = _samples_needed(file.samplerate)
            step = max(
                1, 2**20 // file.channels
            )  # bounds memory, whatever channel count a header claims
            blocks = []
            while wanted > 0 and len(
                block := file.read(min(step, wanted), dtype="float32", always_2d=True)
            ):
                with np.errstate(
                    over="ignore", invalid="ignore"
                ):  # what comes of it is refused by name
                    blocks.append(block.mean(axis=1))
                wanted -= len(block)
            rate = file.samplerate
            if wanted > 0:  # a longer file may be cut wherever it likes, the clip is the same
                _require_whole(path, file.extra_info)
    except (
        soundfile.LibsndfileError,
        RuntimeError,
        TypeError,
    ) as error:  # TypeError: headerless .raw
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise InputError(
            f"{path}: cannot be read as audio ({reason}); fetch the file again or take it out"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not blocks:
        raise InputError(
            f"{path}: expected audio, found no samples in it; fetch the file again or take it out"
        )
    return np.concatenate(blocks), rate


# What libsndfile reports of the chunk with the samples, in WAV, AIFF and AU.
ANNOUNCED = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
NO_LENGTH = 2**31 - 2**16  # bytes; what writes into a pipe announces this much or more
SLACK = 128  # bytes; some writers count the header


def _require_whole(path: str | Path, report: str) -> None:
    """Raises InputError where a header announces more samples than the file holds, as after a
    broken copy.
    """
    for announced, found in ANNOUNCED.findall(report):
        if int(found) + SLACK < int(announced) < NO_LENGTH:
            raise InputError(
                f"{path}: cut short: announces {announced} bytes of samples, has {found}; fetch "
                f"the file again or take it out"
            )


# ── Sampling rates ───────────────────────────────────────────────────────────────────────────────


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """(n,) float32 at `rate` Hz -> (ceil(16000 n / rate),) float32 at 16 kHz.

    What librosa.load() has done since its version 0.10, and with it the published scores: soxr's
    HQ. soxr rounds the length; librosa pads it with zeros, or cuts it, to the next whole sample.
    """
    n_samples = math.ceil(len(samples) * SAMPLE_RATE / rate)
    out = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")[:n_samples]
    return np.pad(out, (0, n_samples - len(out)))


def _samples_needed(rate: int) -> int:
    """Input samples that decide the first 64,600 output samples, at any rate to the last bit."""
    if rate == SAMPLE_RATE:
        return CLIP_SAMPLES
    return math.ceil(CLIP_SAMPLES * rate / SAMPLE_RATE) + _look_ahead(rate)


def _look_ahead(rate: int) -> int:
    """Samples behind the clip that its last samples depend on: soxr's filters and their blocks."""
    return math.ceil(LOOK_AHEAD * max(rate, SAMPLE_RATE) / SAMPLE_RATE)
