"""Recordings become clips: decoding, channels, sampling rate, length."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from formats import decoders
from formats.decoders import Decoded
from runtime.cli import InputError

SAMPLE_RATE = 16_000
CLIP_SAMPLES = 64_600  # 4.04 s, the published clip length
LOOK_AHEAD = 4096  # samples at the lower of the two rates; 1024 do up to 96 kHz
RESAMPLER = f"soxr {soxr.__version__} HQ"  # what makes clips of files that are not at 16 kHz


# ── Clips ────────────────────────────────────────────────────────────────────────────────────────


class Recording(NamedTuple):
    """A clip, and how its file was read."""

    clip: Tensor  # (64600,) float32
    rate: int  # the file's own, Hz; RESAMPLER made the clip where it is not 16 kHz
    decoder: str = decoders.LIBSNDFILE  # or decoders.FFMPEG


def load_clip(path: str | Path) -> Tensor:
    """Read an audio file as the (64600,) float32 clip that every front end takes.

    Mono (mean of channels), 16 kHz, integer formats scaled to [-1, 1), nothing clamped; the first
    64,600 samples, a shorter recording repeated end to end and cut.

    Raises:
        InputError: no permission, not a regular file, not audio, no samples, fewer than the
            container announces, or samples, of those that are used, that are not finite.
    """
    return load_recording(path).clip


def load_recording(path: str | Path) -> Recording:
    """load_clip(), and how the file was read."""
    decoded = decoders.read_start(path, _samples_needed)
    clip = _at_16_khz(path, decoded)[:CLIP_SAMPLES]
    return Recording(torch.from_numpy(np.resize(clip, CLIP_SAMPLES)), decoded.rate, decoded.decoder)


def _at_16_khz(path: str | Path, decoded: Decoded) -> np.ndarray:
    samples = decoded.samples
    clip = samples if decoded.rate == SAMPLE_RATE else resample(samples, decoded.rate)
    if not np.isfinite(samples).all() or not np.isfinite(clip).all():
        raise InputError(
            f"{path}: holds samples that are not finite (NaN, infinity, or too large to compute "
            "with); repair the file or take it out"
        )
    return clip


# ── A person's own recordings ────────────────────────────────────────────────────────────────────

SILENCE = 1e-4  # between the lowest and the highest sample: three steps of 16 bits
CANCELLED = 0.01  # of the channels' peak: what their mean must exceed
SHORTEST = 400  # samples at 16 kHz: the frame of wav2vec 2.0, 25 ms


class Inspection(NamedTuple):
    """What a verdict on a recording has to be read with."""

    seconds: float | None  # as decoded, to the end of the file; None: damaged before it
    nothing_to_judge: str | None  # why there can be no verdict
    note: str | None


def inspect(path: str | Path) -> Inspection:
    """Decode a whole recording and look at the part that is judged.

    Raises:
        InputError: as load_clip(); a fault behind the part that is judged is one too.
    """
    decoded = decoders.read_start(path, lambda rate: None)
    start = decoded._replace(samples=decoded.samples[: _samples_needed(decoded.rate)])
    clip = _at_16_khz(path, start)[:CLIP_SAMPLES]
    note = None
    if decoded.peak > 2:
        note = f"levels over 1 (up to {decoded.peak:g}): scale the samples to -1 .. 1"
    return Inspection(len(decoded.samples) / decoded.rate, _fault(clip, start.peak), note)


def _fault(clip: np.ndarray, peak: float) -> str | None:
    if len(clip) < SHORTEST:
        return f"it lasts {1000 * len(clip) / SAMPLE_RATE:g} ms"
    span = float(clip.max() - clip.min())
    if peak > SILENCE and span < CANCELLED * peak and float(np.abs(clip).max()) < CANCELLED * peak:
        return "its channels cancel one another"
    if span < SILENCE:
        return "its first 4.04 s are silent"
    return None


# ── Sampling rates ───────────────────────────────────────────────────────────────────────────────


def sampling_rate(path: str | Path) -> int | None:
    """The file's own rate in Hz, from its header where that can be read; None: unreadable."""
    try:
        return soundfile.info(os.fsencode(path)).samplerate
    except (soundfile.LibsndfileError, RuntimeError, TypeError, OSError):
        pass
    try:
        return load_recording(path).rate
    except InputError:
        return None


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
