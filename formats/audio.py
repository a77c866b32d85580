"""Recordings become clips: decoding, channels, sampling rate, length."""

from __future__ import annotations

import math
import os
import re
import stat
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from runtime.cli import InputError

SAMPLE_RATE = 16_000
CLIP_SAMPLES = 64_600  # 4.04 s, the published clip length


# ── Clips ────────────────────────────────────────────────────────────────────────────────────────


def load_clip(path: str | Path) -> Tensor:
    """Read an audio file as the (64600,) float32 clip that every front end takes.

    Mono (mean of channels), 16 kHz, integer formats scaled to [-1, 1), nothing clamped; the first
    64,600 samples, a shorter recording repeated end to end and cut.

    Raises:
        InputError: not a regular file, not audio, no samples, fewer than a WAV, AIFF or AU file
            announces, or samples, of those
            that are used, that are not finite.
    """
    return _load_clip(path)[0]


def _load_clip(path: str | Path) -> tuple[Tensor, int]:
    """The clip and the file's own sampling rate in Hz."""
    samples, rate = _read_start(path)
    if rate != SAMPLE_RATE:
        samples = resample(samples, rate)
    if not torch.isfinite(samples).all():
        raise InputError(
            f"{path}: holds samples that are not finite (NaN, infinity, or too large to compute "
            f"with); repair the file or "
            "take it out"
        )
    copies = -(-CLIP_SAMPLES // len(samples))
    return samples.repeat(copies)[:CLIP_SAMPLES].contiguous(), rate


def _read_start(path: str | Path) -> tuple[Tensor, int]:
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
    return torch.from_numpy(np.concatenate(blocks)), rate


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


# librosa's kaiser_best, which the reference used, in the terms of torchaudio's resampler (its
# documentation gives them).
ZERO_CROSSINGS, ROLLOFF, KAISER_BETA = 64, 0.9475937167399596, 14.769656459379492
FASTEST_RATE = 768_000  # Hz; converters go no higher, and the filter's length grows with the rate
LARGEST_KERNEL = 2**22  # weights; only odd rates such as 44,101 Hz need more than a few thousand


def resample(samples: Tensor, rate: int) -> Tensor:
    """Band-limited interpolation of (n,) float32 from `rate` Hz to (ceil(16000 n / rate),) at 16
    kHz.
    """
    common = math.gcd(rate, SAMPLE_RATE)
    phases, period = SAMPLE_RATE // common, rate // common
    if phases * (2 * _filter_reach(rate) + period) > LARGEST_KERNEL:
        return _resample_directly(samples, rate)
    return _resampler(rate)(samples)


@lru_cache(maxsize=16)
def _resampler(rate: int) -> torchaudio.transforms.Resample:
    return torchaudio.transforms.Resample(
        rate,
        SAMPLE_RATE,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=ZERO_CROSSINGS,
        rolloff=ROLLOFF,
        beta=KAISER_BETA,
    )


def _resample_directly(samples: Tensor, rate: int) -> Tensor:
    """The same windowed sinc, evaluated at each output instant.

    A rate without a small ratio to 16 kHz would need a polyphase kernel of gigabytes.
    """
    cutoff = min(rate, SAMPLE_RATE) * ROLLOFF  # Hz, twice the band that is kept
    reach = _filter_reach(rate)
    padded = torch.nn.functional.pad(samples.double(), (reach, reach + 1))
    taps = torch.arange(-reach, reach + 1)
    out = []
    for instants in torch.arange(math.ceil(len(samples) * SAMPLE_RATE / rate)).split(1024):
        centre = instants * rate // SAMPLE_RATE  # the input sample at or before each instant
        index = centre[:, None] + taps  # (n, 2 * reach + 1)
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
    return (
        math.ceil(CLIP_SAMPLES * rate / SAMPLE_RATE)
        + _filter_reach(rate)
        + rate // math.gcd(rate, SAMPLE_RATE)
    )
