"""Files become samples: libsndfile first, and ffmpeg (PyAV) for what it cannot decode."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import soundfile

from runtime.cli import InputError

LIBSNDFILE, FFMPEG = "libsndfile", "ffmpeg"
FASTEST_RATE = 768_000  # Hz; converters go no higher
BLOCK = 2**20  # values read at a time, whatever number of channels a header claims

# Containers that ffmpeg may open. Play lists are not among them: they open other files.
CONTAINERS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,caf,dsf,eac3,flac,flv,matroska,webm,mov,mp4,m4a,3gp,"
    "mp3,mpeg,mpegts,nistsphere,ogg,rm,tta,voc,w64,wav,wv,avi"
)
# Containers whose header tells a duration that is not estimated from the size of the file.
TELL_DURATION = ("mov", "matroska", "asf", "caf", "wv", "aiff")
DURATION_SLACK = 0.25  # seconds; encoders count their padding


class Decoded(NamedTuple):
    """The first samples of a file."""

    samples: np.ndarray  # (n,) float32, the mean of the channels
    rate: int  # Hz
    decoder: str  # LIBSNDFILE or FFMPEG
    peak: float  # largest |sample| of any channel
    at_end: bool  # nothing follows them


class _Undecodable(Exception):
    """A decoder's own word on why it cannot read a file."""


def read_start(path: str | Path, needed: Callable[[int], int | None]) -> Decoded:
    """Decode as many samples as are needed, or all that there are.

    Args:
        needed: of a sampling rate in Hz, the number of samples wanted; None: all.

    Raises:
        InputError: no permission, not a regular file, not audio, no samples, or fewer than the
            container announces, where those would have been needed.
    """
    _require_file(path)
    try:
        decoded = _read_by_libsndfile(path, needed)
    except _Undecodable as reason:
        decoded = _read_by_ffmpeg(path, needed, str(reason))
    if not len(decoded.samples):
        raise InputError(
            f"{path}: expected audio, found no samples in it; fetch the file again or take it out"
        )
    return decoded


def _require_file(path: str | Path) -> None:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise InputError(
                f"{path}: expected an audio file, found something that is not a regular file"
            )
        with open(path, "rb"):
            pass
    except PermissionError:
        raise InputError(f"{path}: permission denied; make it readable for this user") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not status.st_size:
        raise InputError(
            f"{path}: cannot be read as audio (the file is empty); fetch the file again or take it "
            "out"
        )


def _require_rate(path: str | Path, rate: int) -> None:
    if not 1 <= rate <= FASTEST_RATE:
        raise InputError(f"{path}: expected a sampling rate up to {FASTEST_RATE} Hz, got {rate}")


class _Collector:
    """Blocks of channels, averaged, until enough are there."""

    def __init__(self, wanted: int | None):
        self.wanted = float("inf") if wanted is None else wanted
        self.blocks: list[np.ndarray] = []
        self.peak = 0.0

    @property
    def is_full(self) -> bool:
        return self.wanted <= 0

    def add(self, block: np.ndarray) -> None:
        """Take (n, channels) float32."""
        block = block[: int(min(len(block), self.wanted))]
        if not len(block):
            return
        # What overflows here is refused by name later.
        with np.errstate(over="ignore", invalid="ignore"):
            self.blocks.append(block.mean(axis=1, dtype=np.float32))
            self.peak = max(self.peak, float(np.abs(block).max()))
        self.wanted -= len(block)

    def decoded(self, rate: int, decoder: str) -> Decoded:
        samples = np.concatenate(self.blocks) if self.blocks else np.empty(0, np.float32)
        return Decoded(samples, rate, decoder, self.peak, not self.is_full)


# ── libsndfile ───────────────────────────────────────────────────────────────────────────────────


def _read_by_libsndfile(path: str | Path, needed: Callable[[int], int | None]) -> Decoded:
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # names need not be UTF-8
            _require_rate(path, file.samplerate)
            found = _Collector(needed(file.samplerate))
            step = max(1, BLOCK // file.channels)
            at_end = False
            while not found.is_full and not at_end:
                size = int(min(step, found.wanted))
                block = file.read(size, dtype="float32", always_2d=True)
                found.add(block)
                at_end = not len(block)
            if at_end:  # a longer file may be cut wherever it likes, the clip is the same
                _require_whole(path, file)
                if not found.blocks and file.format == "FLAC":
                    raise _Undecodable("announces no samples")
            return found.decoded(file.samplerate, LIBSNDFILE)
    # TypeError: a .raw file, which has no header.
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise _Undecodable(reason or "damaged, or of an unknown format") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


# What libsndfile reports of the chunk with the samples, in WAV, AIFF and AU.
ANNOUNCED = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
NO_LENGTH = 2**31 - 2**16  # bytes; what writes into a pipe announces this much or more
SLACK = 128  # bytes; some writers count the header


def _require_whole(path: str | Path, file: soundfile.SoundFile) -> None:
    """Raise InputError where a file holds less than it announces, as after a broken copy.

    Raises _Undecodable for what libsndfile reads only the first part of.
    """
    for announced, found in ANNOUNCED.findall(file.extra_info):
        if int(found) + SLACK < int(announced) < NO_LENGTH:
            raise InputError(
                f"{path}: cut short: announces {announced} bytes of samples, has {found}; fetch "
                "the file again or take it out"
            )
    if file.format == "OGG":
        if _check_ogg(path) > 1:
            raise _Undecodable("several Ogg streams, one after another")
    if file.format in ("MP3", "MPEG"):
        _check_mp3(path)


# ── What containers tell ─────────────────────────────────────────────────────────────────────────


def _check_ogg(path: str | Path) -> int:
    """Walk the pages of an Ogg file; return how many streams follow one another in it.

    Raises InputError where the last page is partial or does not end its stream (RFC 3533).
    """
    data = Path(path).read_bytes()
    at, n_links, in_headers, ended = 0, 0, False, False
    while data[at : at + 4] == b"OggS" and at + 27 <= len(data):
        kind, n_segments = data[at + 5], data[at + 26]
        if kind & 2 and not in_headers:
            n_links += 1
        in_headers, ended = bool(kind & 2), bool(kind & 4)
        at += 27 + n_segments + sum(data[at + 27 : at + 27 + n_segments])
    if at > len(data) or not ended:
        raise InputError(
            f"{path}: cut short: its last Ogg page does not end the stream; fetch the file again "
            f"or take it out (where it is whole, convert it: {_conversion(path)})"
        )
    return n_links


def _check_riff(path: str | Path) -> None:
    """Raise InputError where a WAV or AVI file is shorter than its first chunk says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
    announced = int.from_bytes(head[4:8], "little")
    if head[:4] == b"RIFF" and size + SLACK < announced < NO_LENGTH:
        raise InputError(
            f"{path}: cut short: announces {announced} bytes, has {size}; fetch the file again or "
            "take it out"
        )


def _check_mp3(path: str | Path) -> None:
    """Raise InputError where an MP3 is shorter than the Xing or Info frame at its start says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = _after_id3(file)
        file.seek(start)
        head = file.read(2048)
    found = re.search(rb"(?:Xing|Info)\0\0\0(.)", head, re.DOTALL)
    if not found or not found[1][0] & 2:
        return
    at = found.end() + (4 if found[1][0] & 1 else 0)
    announced = int.from_bytes(head[at : at + 4], "big")
    available = size - start - max(head.find(b"\xff"), 0)
    if available + SLACK < announced:
        raise InputError(
            f"{path}: cut short: announces {announced} bytes of MP3, has {available}; fetch the "
            "file again or take it out"
        )


def _after_id3(file: BinaryIO) -> int:
    """Where an ID3v2 tag ends; 0 where there is none."""
    head = file.read(10)
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    a, b, c, d = head[6:10]
    return 10 + (a << 21 | b << 14 | c << 7 | d)


# ── ffmpeg ───────────────────────────────────────────────────────────────────────────────────────


def _read_by_ffmpeg(
    path: str | Path, needed: Callable[[int], int | None], libsndfile_said: str
) -> Decoded:
    import av  # a second of imports that few corpora need

    av.logging.set_level(av.logging.PANIC)
    try:
        # A file object: names need not be UTF-8, and no other file or address can be opened.
        with open(path, "rb") as file, _open_container(av, file) as container:
            stream = _audio_stream(path, container)
            decoded = _decode_stream(path, container, stream, needed)
            announced = _announced_seconds(container, stream)
            container_name = container.format.name
    except InputError:
        raise
    # OSError: PyAV hands on what a seek beyond the file's start says.
    except (av.error.FFmpegError, OSError, ValueError, NotImplementedError) as error:
        raise InputError(_refusal(path, libsndfile_said, error)) from None
    if not decoded.at_end:
        return decoded
    if container_name == "ogg":
        _check_ogg(path)
    if container_name in ("wav", "avi"):
        _check_riff(path)
    seconds = len(decoded.samples) / decoded.rate
    if announced and seconds + DURATION_SLACK < announced:
        raise InputError(
            f"{path}: cut short: announces {announced:.2f} s, has {seconds:.2f} s; fetch the file "
            "again or take it out"
        )
    return decoded


def _audio_stream(path: str | Path, container):
    """The first stream of sound, an av.AudioStream."""
    if not container.streams.audio:
        raise InputError(f"{path}: expected audio, found none in this {container.format.name} file")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise NotImplementedError("no decoder for its codec")
    _require_rate(path, stream.rate or 0)
    return stream


def _decode_stream(path: str | Path, container, stream, needed) -> Decoded:
    rate = stream.rate
    found = _Collector(needed(rate))
    for frame in container.decode(stream):
        if frame.sample_rate != rate:
            raise InputError(
                f"{path}: its sampling rate changes from {rate} to {frame.sample_rate} Hz; "
                f"convert it: {_conversion(path)}"
            )
        found.add(_to_float(frame))
        if found.is_full:
            break
    return found.decoded(rate, FFMPEG)


def _open_container(av, file: BinaryIO):
    return av.open(file, options={"format_whitelist": CONTAINERS}, metadata_errors="replace")


def _to_float(frame) -> np.ndarray:
    """An av.AudioFrame as (n, channels) float32, integers scaled to [-1, 1)."""
    values = frame.to_ndarray()
    if frame.format.is_planar:
        values = values.T
    else:
        values = values.reshape(frame.samples, -1)
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    if values.dtype.kind == "i":
        scale = 2.0 ** -(8 * values.dtype.itemsize - 1)
        return (values * scale).astype(np.float32)
    return values.astype(np.float32)


def _announced_seconds(container, stream) -> float | None:
    """The duration that the container's header states, where it is one of TELL_DURATION."""
    if not container.format.name.startswith(TELL_DURATION):
        return None
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is None or container.streams.video:
        return None
    return container.duration / 1e6


def _refusal(path: str | Path, libsndfile_said: str, error: Exception) -> str:
    reasons = f"libsndfile: {libsndfile_said}; ffmpeg: {getattr(error, 'strerror', error)}"
    return (
        f"{path}: cannot be read as audio ({reasons}); where the file is whole, convert it: "
        f"{_conversion(path)}; otherwise fetch the file again or take it out"
    )


def _conversion(path: str | Path) -> str:
    return f"ffmpeg -i {os.path.basename(path)} -ar 16000 -ac 1 converted.wav"
