"""Synthetic voices for `python -m demo`: source-filter synthesis of endless nonsense speech.

    speaker = new_speaker(np.random.default_rng(1))
    clip = speak(speaker, 3.0, np.random.default_rng(2))        # 16 kHz, mono, float64

A speaker is a vocal tract, a larynx, a room and a microphone; a clip is phrases of consonant-vowel
syllables with a pitch contour of their own. No two clips are alike, and none of them is speech:
such voices check an installation, they say nothing about real deepfakes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.signal import fftconvolve, lfilter, resample_poly

SAMPLE_RATE = 16_000
HOP = 80  # 5 ms: how often pitch, loudness and formants move
FFT = 1024  # frame and ringing, 64 ms
OVERSAMPLING = 4  # the glottal pulse has corners: made at 64 kHz, it does not alias
TOP_FORMANTS = np.array([3500, 4500, 5500, 6500])  # F4..F7 of a 17.5 cm tract, Hz
BANDWIDTHS = np.array([60, 90, 130, 200, 350, 600, 900])  # of F1..F7, Hz

# F1, F2, F3 of the vowels of American men (Peterson and Barney, 1952), Hz.
VOWELS = np.array(
    [
        (270, 2290, 3010),
        (390, 1990, 2550),
        (530, 1840, 2480),
        (660, 1720, 2410),
        (730, 1090, 2440),
        (570, 840, 2410),
        (440, 1020, 2240),
        (300, 870, 2240),
        (640, 1190, 2390),
        (490, 1350, 1690),
    ]
)


@dataclass(frozen=True)
class Consonant:
    """What a consonant asks of the synthesiser; each part of it lasts `seconds`."""

    seconds: float
    formants: tuple[int, int, int]  # where F1..F3 head for, Hz
    voicing: float = 0.0  # amplitude of the glottal source, a vowel's is 1
    noise: float = 0.0  # amplitude of the noise in the mouth
    centre: float = 4000.0  # of that noise, Hz
    width: float = 2000.0
    burst: bool = False  # a closure, then the noise for 12 ms


CONSONANTS = (
    Consonant(0.09, (300, 1700, 2600), noise=0.30, centre=6200, width=2200),  # s
    Consonant(0.09, (300, 1900, 2500), noise=0.30, centre=3400, width=1600),  # sh
    Consonant(0.08, (300, 1100, 2300), noise=0.10, centre=5000, width=6000),  # f
    Consonant(0.07, (300, 1700, 2600), voicing=0.35, noise=0.15, centre=6000, width=2500),  # z
    Consonant(0.06, (300, 1100, 2300), voicing=0.35, noise=0.06, centre=5000, width=6000),  # v
    Consonant(0.07, (500, 1500, 2500), noise=0.08, centre=1800, width=2500),  # h
    Consonant(0.08, (250, 900, 2200), noise=0.25, centre=1000, width=1500, burst=True),  # p
    Consonant(0.08, (250, 1800, 2700), noise=0.35, centre=4300, width=2500, burst=True),  # t
    Consonant(0.08, (250, 2000, 2300), noise=0.35, centre=2100, width=1200, burst=True),  # k
    Consonant(
        0.06, (250, 900, 2200), voicing=0.12, noise=0.15, centre=1000, width=1500, burst=True
    ),  # b
    Consonant(
        0.06, (250, 1800, 2700), voicing=0.12, noise=0.20, centre=4000, width=2500, burst=True
    ),  # d
    Consonant(
        0.06, (250, 2000, 2300), voicing=0.12, noise=0.20, centre=2000, width=1200, burst=True
    ),  # g
    Consonant(0.07, (250, 1000, 2200), voicing=0.35),  # m
    Consonant(0.07, (250, 1700, 2600), voicing=0.35),  # n
    Consonant(0.07, (360, 1100, 2700), voicing=0.60),  # l
    Consonant(0.07, (320, 1100, 1500), voicing=0.60),  # r
    Consonant(0.07, (280, 700, 2200), voicing=0.55),  # w
    Consonant(0.07, (270, 2200, 3000), voicing=0.55),  # y
)


@dataclass(frozen=True)
class Speaker:
    """What stays the same from one clip of a person to the next."""

    pitch: float  # mean fundamental frequency, Hz
    liveliness: float  # spread of the pitch contour, semitones
    tract: float  # formants are this times an average man's
    open_quotient: float  # share of a cycle in which the glottis is open
    breath: float  # aspiration noise beside the pulses
    jitter: float  # relative deviation of one cycle's length
    shimmer: float  # relative deviation of one cycle's amplitude
    pace: float  # syllables per second
    echo: float  # reverberation time, seconds
    reflections: float  # amplitude of the reverberation
    noise_db: float  # room noise relative to the speech
    noise_colour: float  # pole of the filter that shapes it
    brightness: float  # the microphone's tilt


def new_speaker(rng: np.random.Generator) -> Speaker:
    """Draw a speaker: low voices have long vocal tracts, as people do."""
    height = rng.uniform(0, 1)
    return Speaker(
        pitch=95 * 2 ** (1.25 * height) * rng.uniform(0.92, 1.08),
        liveliness=rng.uniform(1.5, 3.5),
        tract=0.95 + 0.2 * height + rng.uniform(-0.04, 0.04),
        open_quotient=rng.uniform(0.5, 0.75),
        breath=rng.uniform(0.01, 0.06),
        jitter=rng.uniform(0.004, 0.015),
        shimmer=rng.uniform(0.02, 0.08),
        pace=rng.uniform(3.5, 5.5),
        echo=rng.uniform(0.1, 0.35),
        reflections=rng.uniform(0.2, 0.6),
        noise_db=rng.uniform(-50, -35),
        noise_colour=rng.uniform(0.3, 0.95),
        brightness=rng.uniform(-0.25, 0.35),
    )


def speak(speaker: Speaker, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """A clip of exactly `seconds`, peak 0.5: every draw from `rng` gives another one."""
    n_frames = int(np.ceil(seconds * SAMPLE_RATE / HOP)) + 1
    score = _utterance(speaker, n_frames, rng)
    voice = _voice_source(speaker, score, rng)
    clip = _vocal_tract(voice, score["formants"] * speaker.tract)
    clip += _mouth_noise(score, rng)
    clip = lfilter([1, -speaker.brightness], 1, clip)
    clip = _in_a_room(speaker, clip, rng)[: round(seconds * SAMPLE_RATE)]
    return 0.5 * clip / np.abs(clip).max()


@dataclass(frozen=True)
class Spoken:
    """A clip yet to be spoken: speaker and words follow from the numbers alone."""

    seed: int
    speaker: int
    number: int
    seconds: float

    source = "synthetic voice"

    def read(self) -> np.ndarray:
        """16 kHz mono float64."""
        speaker = new_speaker(np.random.default_rng([self.seed, self.speaker]))
        return speak(
            speaker, self.seconds, np.random.default_rng([self.seed, self.speaker, self.number])
        )


def _utterance(speaker: Speaker, n_frames: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Control tracks, one row a frame: pitch, voicing, noise, centre, width (n,) and formants (n,
    7).
    """
    rows, pitches = [], []
    while len(rows) < n_frames:
        n_syllables = rng.integers(3, 9)
        for position in np.arange(n_syllables) / n_syllables:
            start = len(rows)
            rows += _syllable(speaker, rng)
            # The voice falls over a phrase by four semitones, each syllable a little up or down.
            pitches += [rng.normal(0, speaker.liveliness) + 2 - 4 * position] * (len(rows) - start)
        pause = int(rng.uniform(0.1, 0.4) * SAMPLE_RATE / HOP)
        rows += [(0.0, 0.0, 4000.0, 2000.0, *rows[-1][4:])] * pause
        pitches += [0.0] * pause
    tracks = np.array(rows[:n_frames])
    tracks = np.column_stack([_smooth(tracks[:, :2], 3), tracks[:, 2:4], _smooth(tracks[:, 4:], 9)])
    top = np.broadcast_to(TOP_FORMANTS, (n_frames, len(TOP_FORMANTS)))
    semitones = _smooth(np.array(pitches[:n_frames])[:, None], 25)[:, 0]
    return {
        "pitch": speaker.pitch * 2 ** (semitones / 12),
        "voicing": tracks[:, 0],
        "noise": tracks[:, 1],
        "centre": tracks[:, 2],
        "width": tracks[:, 3],
        "formants": np.column_stack([tracks[:, 4:], top]),
    }


def _syllable(speaker: Speaker, rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Frames (voicing, noise, centre, width, F1, F2, F3) of a consonant and a vowel, or of a vowel
    alone.
    """
    rows = []
    if rng.random() < 0.9:
        c = CONSONANTS[rng.integers(len(CONSONANTS))]
        n = max(4, int(c.seconds * rng.uniform(0.8, 1.3) * SAMPLE_RATE / HOP))
        noise = np.full(n, c.noise)
        if c.burst:
            noise[:-3] = 0
        rows += [(c.voicing, level, c.centre, c.width, *c.formants) for level in noise]
    vowel = VOWELS[rng.integers(len(VOWELS))] * rng.uniform(0.95, 1.05, 3)
    n = max(8, int((rng.uniform(0.7, 1.4) / speaker.pace - 0.07) * SAMPLE_RATE / HOP))
    return rows + [(rng.uniform(0.8, 1.0), 0.0, 4000.0, 2000.0, *vowel)] * n


def _voice_source(
    speaker: Speaker, score: dict[str, np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """The glottal flow's derivative with its breath, one pulse a cycle (Rosenberg, 1971)."""
    rate = SAMPLE_RATE * OVERSAMPLING
    n_samples = len(score["pitch"]) * HOP * OVERSAMPLING
    starts, periods, strengths = _cycles(speaker, score["pitch"], n_samples / rate, rng)
    t = np.arange(n_samples) / rate
    cycle = np.searchsorted(starts, t, side="right") - 1
    phase = (t - starts[cycle]) / periods[cycle]
    opening, closed = 0.65 * speaker.open_quotient, speaker.open_quotient
    flow = np.where(
        phase < opening,
        0.5 - 0.5 * np.cos(np.pi * phase / opening),
        np.cos(0.5 * np.pi * np.clip((phase - opening) / (closed - opening), 0, 1)),
    )
    pulses = np.diff(strengths[cycle] * flow, prepend=0) * rate / (10 * speaker.pitch)
    pulses = resample_poly(pulses, 1, OVERSAMPLING)
    breath = speaker.breath * rng.standard_normal(len(pulses)) * (0.4 + flow[::OVERSAMPLING])
    return (pulses + breath) * _per_sample(score["voicing"])


def _cycles(
    speaker: Speaker, pitch: np.ndarray, seconds: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length (seconds) and amplitude of each glottal cycle, each a little irregular."""
    starts, periods = [0.0], []
    while starts[-1] < seconds:
        frame = min(int(starts[-1] * SAMPLE_RATE / HOP), len(pitch) - 1)
        periods.append((1 + speaker.jitter * np.clip(rng.standard_normal(), -3, 3)) / pitch[frame])
        starts.append(starts[-1] + periods[-1])
    strengths = 1 + speaker.shimmer * rng.standard_normal(len(periods))
    return np.array(starts[:-1]), np.array(periods), strengths


def _vocal_tract(source: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """A cascade of resonators, gain 1 at 0 Hz (Klatt, 1980), moved every frame; formants (n, 7) in
    Hz.
    """
    response = np.ones((len(formants), FFT // 2 + 1), dtype=np.complex64)
    for centre, width in zip(formants.T, BANDWIDTHS, strict=True):
        response *= _resonator(centre, np.full(len(centre), width))
    return _filter_by_frame(response, source)


def _mouth_noise(score: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Friction and bursts: white noise through one resonance that follows the consonants."""
    hiss = rng.standard_normal(len(score["noise"]) * HOP) * _per_sample(score["noise"])
    response = _resonator(score["centre"], score["width"])
    return _filter_by_frame(response / np.abs(response).max(axis=1, keepdims=True), hiss)


def _resonator(centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Frequency response (n, FFT / 2 + 1) of a pair of poles, one row a frame; centre and width
    (n,) in Hz.
    """
    radius = np.exp(-np.pi * width / SAMPLE_RATE)[:, None]
    a1 = (
        -2
        * radius
        * np.cos(2 * np.pi * np.minimum(centre, 0.44 * SAMPLE_RATE) / SAMPLE_RATE)[:, None]
    )
    a2 = radius**2
    delay = np.exp(-2j * np.pi * np.arange(FFT // 2 + 1) / FFT).astype(
        np.complex64
    )  # single precision: half the time
    return (1 + a1 + a2).astype(np.float32) / (
        1 + (a1.astype(np.float32) + a2.astype(np.float32) * delay) * delay
    )


def _filter_by_frame(response: np.ndarray, signal: np.ndarray) -> np.ndarray:
    """Filter each frame by its own row of `response` (n, FFT / 2 + 1); frames fade into each other,
    so nothing clicks.
    """
    n = len(response)
    padded = np.pad(signal[: n * HOP], (HOP, FFT))
    frames = (
        np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP)[: n * HOP : HOP]
        * np.hanning(2 * HOP + 1)[:-1]
    )
    rings = np.fft.irfft(np.fft.rfft(frames, FFT) * response, FFT)  # (n, FFT): 54 ms to fade away
    out = np.zeros(len(padded))
    for i, ring in enumerate(rings):
        out[i * HOP : i * HOP + FFT] += ring
    return out[HOP : HOP + n * HOP]


def _in_a_room(speaker: Speaker, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The clip with its reflections and the noise of the place."""
    t = np.arange(int(speaker.echo * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(t)) * 10 ** (
        -3 * t / speaker.echo
    )  # 60 dB down after `echo` seconds
    tail *= speaker.reflections / np.linalg.norm(tail)
    tail[0] = 1
    clip = fftconvolve(clip, tail)[: len(clip)]
    noise = lfilter([1], [1, -speaker.noise_colour], rng.standard_normal(len(clip)))
    return clip + noise * 10 ** (speaker.noise_db / 20) * np.std(clip) / np.std(noise)


def _smooth(tracks: np.ndarray, width: int) -> np.ndarray:
    """Moving average over `width` frames (an odd number), column by column."""
    padded = np.pad(tracks, ((width // 2, width // 2), (0, 0)), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=0).mean(axis=-1)


def _per_sample(track: np.ndarray) -> np.ndarray:
    frames = np.arange(len(track)) * HOP
    return np.interp(np.arange(len(track) * HOP), frames, track)
