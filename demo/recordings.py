"""Clips of real recordings for `python -m demo --speech FOLDER`: any format, rate and number of
channels.

    clips, skipped = find_clips(Path("LibriSpeech"), wanted=300, rng=np.random.default_rng(1))

A sub-folder is a speaker; without sub-folders, every file is one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

SAMPLE_RATE = 16_000
SUFFIXES = {".wav", ".flac", ".ogg", ".mp3"}
SHORTEST, LONGEST = 1.0, 5.0  # seconds of a clip
SILENCE = 1e-3  # a clip that never rises above -60 dBFS holds no speech
MOST_SPEAKERS = 60  # of a large corpus a sample is enough


@dataclass(frozen=True)
class Cut:
    """Seconds `start` to `stop` of a recording; `speaker` and `number` are the demo's own."""

    speaker: int
    number: int
    path: Path
    name: str  # of the recording, below the folder that was given
    start: float
    stop: float

    @property
    def seconds(self) -> float:
        return self.stop - self.start

    @property
    def source(self) -> str:
        return f"{self.name} {self.start:.2f}-{self.stop:.2f} s"

    def read(self) -> np.ndarray:
        """16 kHz mono float64; exactly `seconds` long, give or take a sample."""
        with soundfile.SoundFile(self.path) as file:
            rate = file.samplerate
            file.seek(round(self.start * rate))
            audio = file.read(round(self.seconds * rate), always_2d=True).mean(axis=1)
        return resample_poly(audio, SAMPLE_RATE, rate)


def find_clips(
    folder: Path, wanted: int, rng: np.random.Generator
) -> tuple[dict[int, list[Cut]], list[str]]:
    """About twice the `wanted` clips, evenly by speaker, and a line for each recording that gave
    none: which and why.
    """
    clips, skipped = {}, []
    speakers = _by_speaker(folder)
    names = sorted(speakers)
    if len(names) > MOST_SPEAKERS:
        names = [names[i] for i in sorted(rng.choice(len(names), MOST_SPEAKERS, replace=False))]
    most = max(8, 2 * wanted // max(1, len(names)))
    for speaker, name in enumerate(names, start=1):
        found: list[Cut] = []
        for i in rng.permutation(len(speakers[name])):
            path = speakers[name][i]
            below = path.relative_to(folder).as_posix()
            try:
                spans = _spans(path, most - len(found), rng)
            except ValueError as error:
                skipped.append(f"{below}: {error}")
                continue
            found += [
                Cut(speaker, len(found) + n, path, below, *span)
                for n, span in enumerate(spans, start=1)
            ]
            if len(found) == most:
                break
        if found:
            clips[speaker] = found
    return clips, skipped


def fingerprint(folder: Path) -> list[list]:
    """Name and size of every recording: what tells one folder from another without reading it."""
    return [
        [path.relative_to(folder).as_posix(), path.stat().st_size] for path in _recordings(folder)
    ]


def _recordings(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    )


def _by_speaker(folder: Path) -> dict[str, list[Path]]:
    recordings = _recordings(folder)
    names = [path.relative_to(folder).parts for path in recordings]
    while names and len({parts[0] for parts in names}) == 1 and min(map(len, names)) > 1:
        names = [parts[1:] for parts in names]  # one folder around everybody is nobody
    speakers = defaultdict(list)
    for path, parts in zip(recordings, names, strict=True):
        speakers[parts[0]].append(path)
    return speakers


def _spans(path: Path, most: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Start and stop, in seconds, of up to `most` clips of a recording.

    ValueError says why there are none.
    """
    audio, rate = _beginning(path, most * LONGEST)
    seconds = len(audio) / rate
    if seconds < SHORTEST:
        raise ValueError(f"{seconds:.2f} s, shorter than {SHORTEST:g} s")
    if not np.isfinite(audio).all():
        raise ValueError("holds samples that are not finite")
    loudness = np.abs(audio).max(axis=1)
    spans, start = [], 0.0
    while seconds - start >= SHORTEST and len(spans) < most:
        stop = min(start + rng.uniform(SHORTEST, LONGEST), seconds)
        if loudness[round(start * rate) : round(stop * rate)].max() > SILENCE:
            spans.append((start, stop))
        start = stop
    if not spans:
        raise ValueError("silent")
    return spans


def _beginning(path: Path, seconds: float) -> tuple[np.ndarray, int]:
    try:
        with soundfile.SoundFile(path) as file:
            return file.read(
                int(seconds * file.samplerate), dtype="float32", always_2d=True
            ), file.samplerate
    except soundfile.LibsndfileError as error:
        raise ValueError(f"cannot be read ({error.error_string.rstrip('.')})") from error
