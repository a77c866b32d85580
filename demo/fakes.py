"""Fakes for `python -m demo`: real codecs and vocoder-like resynthesis, each a copy of a clip,
aligned and equally long.

    copy = CODECS["F03"](clip)                              # GSM 06.10
    copy = RESYNTHESES["A2"](clip, rng)                     # LPC vocoder

Clips are 16 kHz mono float64. The codecs are those that soundfile's own libsndfile encodes and
decodes.
"""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import soundfile
from scipy.fft import irfft, rfft

SAMPLE_RATE = 16_000
FFT = 512
HOP = 128  # 8 ms, a quarter of the FFT: a squared Hann window overlaps to a constant
WINDOW = np.hanning(FFT + 1)[:-1]
BINS = FFT // 2 + 1


# ── codecs ───────────────────────────────────────────────────────────────────────────────────────


def code(
    clip: np.ndarray,
    container: str,
    subtype: str,
    rate: int = SAMPLE_RATE,
    level: float | None = None,
    peak: float = 0.5,
    passes: int = 1,
) -> np.ndarray:
    """What the codec leaves of a clip that reaches it with this peak, after so many passes (as
    calls through exchanges).

    The telephone's codecs do not ask for the rate: at 16 kHz they keep 0-8 kHz.
    """
    gain = peak / max(np.abs(clip).max(), 1e-9)
    for number in range(passes):
        # Its frames fall elsewhere each time; on the same ones a codec changes little more.
        shift = 37 * number
        file = io.BytesIO()
        soundfile.write(
            file,
            np.pad(clip * gain, (shift, 0)),
            rate,
            subtype=subtype,
            format=container,
            compression_level=level,
        )
        file.seek(0)
        decoded, _ = soundfile.read(file)
        if len(decoded) < shift + len(clip):
            raise RuntimeError(
                f"{subtype}: {shift + len(clip)} samples went in, {len(decoded)} came out"
            )
        # Codecs of fixed frames hand back a little more.
        clip = decoded[shift : shift + len(clip)] / gain
    return clip


def code_half_bands(clip: np.ndarray, **codec: object) -> np.ndarray:
    """For a codec that drops all above 4 kHz, far too simple a cue: 4-8 kHz, mirrored, is coded
    like 0-4 kHz.
    """
    low, high = (code(band, rate=SAMPLE_RATE // 2, **codec) for band in split(clip))
    return join(low, high)[: len(clip)]


def split(clip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bands 0-4 kHz and 4-8 kHz, the latter mirrored, each at 8 kHz.

    `join` undoes it but for the bin at 4 kHz.
    """
    half = (len(clip) + 3) // 4 * 2
    spectrum = rfft(clip, 2 * half)
    return irfft(spectrum[: half // 2 + 1], half), irfft(spectrum[half // 2 :][::-1], half)


def join(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    low, high = rfft(low), rfft(high)[::-1]
    return irfft(np.concatenate([low[:-1], [(low[-1] + high[0]) / 2], high[1:]]))


# At a healthy level most of these codecs are too good: Mel-LCNN, which sees power and not its
# logarithm, would need far
# more clips than a demo has. They get a much too quiet signal, or several passes, and leave 5 to 10
# dB of signal to noise.
# libsndfile maps the level 0..1 of Opus to 256..6 kbit/s: 0.998 is 6.5 kbit/s a band.
CODECS = {
    "F01": partial(code_half_bands, container="OGG", subtype="OPUS", level=0.998, passes=2),
    "F02": partial(code, container="OGG", subtype="VORBIS", level=1.0, passes=4),
    "F03": partial(code, container="WAV", subtype="GSM610", peak=0.007),
    "F04": partial(code, container="AU", subtype="G723_24", peak=0.0025),
    "F05": partial(code, container="WAV", subtype="NMS_ADPCM_16", peak=0.003),
    "F06": partial(code, container="WAV", subtype="IMA_ADPCM", peak=0.0003),
    "F07": partial(code, container="WAV", subtype="G721_32", peak=0.001),
}


# ── resynthesis ──────────────────────────────────────────────────────────────────────────────────


def griffin_lim(
    clip: np.ndarray, rng: np.random.Generator, n_mels: int, iterations: int
) -> np.ndarray:
    """Magnitudes from a mel spectrogram, phases by Griffin and Lim (1984), starting from random
    ones.
    """
    magnitude = _mel_envelope(_stft(clip), n_mels)
    spectrum = magnitude * np.exp(2j * np.pi * rng.random(magnitude.shape))
    for _ in range(iterations):
        estimate = _stft(_istft(spectrum, len(clip)))
        spectrum = magnitude * estimate / np.maximum(np.abs(estimate), 1e-9)
    return _istft(spectrum, len(clip))


def vocoder(
    clip: np.ndarray,
    rng: np.random.Generator,
    order: int,
    voiced: bool = True,
    pitch: float = 1.0,
    tract: float = 1.0,
) -> np.ndarray:
    """A source of pulses and noise, shaped by the clip's all-pole envelope and loudness.

    Args:
        order: number of poles.
        voiced: False whispers.
        pitch, tract: factors on pitch and formants; other than 1 they change the voice.
    """
    spectrum = _stft(clip)
    shape = _lpc_envelope(spectrum, order)
    bins = np.arange(BINS)
    if tract != 1:
        shape = np.array([np.interp(bins / tract, bins, row) for row in shape])
    source = _source(clip, rng, pitch) if voiced else rng.standard_normal(len(clip))
    copy = _stft(source) * shape
    loudness = np.linalg.norm(spectrum, axis=1) / np.maximum(np.linalg.norm(copy, axis=1), 1e-9)
    return _istft(copy * loudness[:, None], len(clip))


def _lpc_envelope(spectrum: np.ndarray, order: int) -> np.ndarray:
    """1 / |A| of the all-pole model of each frame, from its autocorrelation."""
    r = irfft(np.abs(spectrum) ** 2)[:, : order + 1]
    r[:, 0] = r[:, 0] * 1.0001 + 1e-9  # a floor 40 dB down keeps it stable
    lags = np.abs(np.subtract.outer(np.arange(order), np.arange(order)))
    a = np.linalg.solve(r[:, lags], r[:, 1:, None])[:, :, 0]  # (frames, order)
    return 1 / np.abs(rfft(np.column_stack([np.ones(len(a)), -a]), FFT))


def _mel_envelope(spectrum: np.ndarray, order: int) -> np.ndarray:
    """What is left of the magnitudes in the powers of `order` mel bands: each bin gets the mean of
    the bands it lies in.
    """
    bank = _mel_bank(order)
    # einsum and not @, whose last digits depend on the number of threads: the same seed must give
    # the same bytes.
    bands = np.einsum("tf,bf->tb", np.abs(spectrum) ** 2, bank / bank.sum(axis=1, keepdims=True))
    return np.sqrt(np.einsum("tb,bf->tf", bands, bank / np.maximum(bank.sum(axis=0), 1e-9)))


def _source(clip: np.ndarray, rng: np.random.Generator, pitch: float) -> np.ndarray:
    """Pulses at the clip's pitch where it is voiced, noise elsewhere, both of power 1 a sample."""
    frequency, voiced = _pitch_track(clip)
    at = np.arange(len(clip))
    centres = np.arange(len(frequency)) * HOP
    frequency = pitch * np.interp(at, centres, frequency)
    voiced = np.interp(at, centres, voiced.astype(float)) > 0.5
    cycles = np.cumsum(frequency / SAMPLE_RATE)
    pulses = np.diff(np.floor(cycles), prepend=0) * np.sqrt(SAMPLE_RATE / frequency)
    return np.where(voiced, pulses, rng.standard_normal(len(clip)))


def _pitch_track(
    clip: np.ndarray, lowest: float = 70, highest: float = 350
) -> tuple[np.ndarray, np.ndarray]:
    """Fundamental frequency (Hz) and whether there is one, for each hop, by autocorrelation over 48
    ms.
    """
    width = 6 * HOP
    shortest, longest = int(SAMPLE_RATE / highest), int(SAMPLE_RATE / lowest)
    padded = np.pad(clip, (width // 2, width))
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[::HOP][: len(clip) // HOP + 1]
    window = np.hanning(width)
    r = irfft(np.abs(rfft(frames * window, 2 * width)) ** 2)[:, : longest + 1]
    r /= irfft(np.abs(rfft(window, 2 * width)) ** 2)[: longest + 1]  # undo the window's own taper
    similarity = r[:, shortest:] / (r[:, :1] + 1e-9)
    # Twice the period fits as well as the period: lean towards the shorter lag.
    best = (similarity - np.linspace(0, 0.15, similarity.shape[1])).argmax(axis=1)
    clarity = similarity[np.arange(len(best)), best]
    loud = r[:, 0] > 1e-4 * r[:, 0].max()
    return SAMPLE_RATE / (shortest + best), (clarity > 0.5) & loud


def _stft(clip: np.ndarray) -> np.ndarray:
    """Complex spectra (frames, BINS), frame i centred on sample i * HOP."""
    padded = np.pad(clip, (FFT // 2, FFT))
    n_frames = len(clip) // HOP + 2
    return rfft(np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP][:n_frames] * WINDOW)


def _istft(spectrum: np.ndarray, length: int) -> np.ndarray:
    frames = irfft(spectrum) * WINDOW / 1.5  # squared Hann windows, a quarter apart, sum to 1.5
    n_hops = len(frames) + FFT // HOP - 1
    out = np.zeros((n_hops, HOP))
    for quarter, part in enumerate(np.split(frames, FFT // HOP, axis=1)):
        out[quarter : quarter + len(frames)] += part
    return out.ravel()[FFT // 2 : FFT // 2 + length]


def _mel_bank(n_mels: int) -> np.ndarray:
    """Triangular filters (n_mels, BINS) of height 1, equally spaced in mel from 0 to 8 kHz."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), n_mels + 2) / 2595) - 1)
    bins = np.arange(BINS) * SAMPLE_RATE / FFT
    # Low bands are narrower than a bin; a triangle no narrower than one keeps them from being
    # empty.
    left = np.maximum(edges[1:-1] - edges[:-2], SAMPLE_RATE / FFT)[:, None]
    right = np.maximum(edges[2:] - edges[1:-1], SAMPLE_RATE / FFT)[:, None]
    distance = bins - edges[1:-1, None]
    return np.maximum(0, 1 - np.where(distance < 0, -distance / left, distance / right))


RESYNTHESES = {
    # Codecfake's unknown generators.
    "A1": partial(griffin_lim, n_mels=80, iterations=24),
    "A2": partial(vocoder, order=18),
    "A3": partial(vocoder, order=18, voiced=False),
    # ASVspoof's attacks: A01..A06 are known from training, the rest not; A16 is A04 and A19 is A06,
    # as there.
    "A01": partial(griffin_lim, n_mels=64, iterations=16),
    "A02": partial(vocoder, order=14),
    "A03": partial(griffin_lim, n_mels=32, iterations=16),
    "A04": partial(vocoder, order=16, voiced=False),
    "A05": partial(vocoder, order=30, pitch=1.15, tract=1.06),
    "A06": partial(vocoder, order=20, pitch=0.85, tract=0.94),
    "A07": partial(griffin_lim, n_mels=40, iterations=16),
    "A08": partial(vocoder, order=24),
    "A09": partial(vocoder, order=20, voiced=False),
    "A10": partial(griffin_lim, n_mels=128, iterations=48),
    "A11": partial(griffin_lim, n_mels=24, iterations=8),
    "A12": partial(vocoder, order=10, voiced=False),
    "A13": partial(vocoder, order=22, pitch=1.1),
    "A14": partial(vocoder, order=26, pitch=0.9),
    "A15": partial(griffin_lim, n_mels=48, iterations=2),
    "A17": partial(vocoder, order=24, tract=1.08),
    "A18": partial(griffin_lim, n_mels=96, iterations=4),
    # In the wild: yet other settings.
    "wild1": partial(griffin_lim, n_mels=72, iterations=32),
    "wild2": partial(vocoder, order=34, pitch=1.05),
    "wild3": partial(vocoder, order=16, pitch=0.95, tract=1.03),
    "wild4": partial(vocoder, order=22, voiced=False),
}
RESYNTHESES["A16"], RESYNTHESES["A19"] = RESYNTHESES["A04"], RESYNTHESES["A06"]
