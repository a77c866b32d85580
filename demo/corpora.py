"""Build miniatures of Codecfake, ASVspoof2019 LA and In-the-Wild, in their exact layouts, to try
the pipeline on.

    python -m demo                              # data/demo/{Codecfake,LA,ITW}, synthetic voices
    python -m demo --speech LibriSpeech         # the same from your own recordings

Codecfake's fakes are copies by real codecs that libsndfile encodes and decodes; A1..A3, LA's
attacks and In-the-Wild's fakes are vocoder-like resynthesis. Real and fake take the same last steps
to a file, so that no level, length or header tells them apart, and no speaker of a test set is
heard in training. Also writes README.txt, and speakers.csv: who speaks in each file and what made
it. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import zlib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from scipy.fft import irfft, rfft
from scipy.signal import lfilter
from tqdm import tqdm

from demo.fakes import CODECS, RESYNTHESES
from demo.recordings import SUFFIXES, Cut, find_clips, fingerprint
from demo.voices import Spoken
from runtime import cli
from runtime.files import exclusive

SAMPLE_RATE = 16_000
RECIPE = 1  # raise it when the same settings give other files
SETTINGS = "settings.json"  # marks a folder as ours

SPEAKERS = {"train": 10, "dev": 4, "test": 8}  # synthetic voices; nobody is in two of the groups


@dataclass(frozen=True)
class Part:
    """How many clips a part of a corpus shows as they are, and of how many it shows fakes."""

    group: str  # of SPEAKERS
    real: int
    faked: int


PARTS = {  # files: real + fake
    "train": Part("train", 60, 60),  # 60 + 360: each clip by each of F01..F06
    "dev": Part("dev", 12, 12),  # 12 + 72
    "C": Part("test", 40, 40),  # 40 + 40 in each of C1..C7, the real ones the same in all
    "A": Part("test", 40, 40),  # 40 + 40 in each of A1..A3, likewise
    "LA train": Part("train", 20, 30),  # 20 + 180: each clip by each of A01..A06
    "LA dev": Part("dev", 8, 12),  # 8 + 72
    "LA eval": Part("test", 30, 20),  # 30 + 260: A07..A19
    "ITW": Part("test", 50, 30),  # 50 + 30
}

REAL = "-"
ATTACKS = {"train": range(1, 7), "dev": range(1, 7), "eval": range(7, 20)}
WILD = ("wild1", "wild2", "wild3", "wild4")
TRAILING_BLANK_EVERY = 11  # lines; the published label files have some

SECONDS = (1.2, 5.0)  # of a synthetic clip
EMPHASIS = (
    0.95  # of treble, as by a bright microphone: without it, most of a clip's power is below 1 kHz
)
SPEECH_LEVEL = (-26.0, -20.0)  # dBFS while somebody speaks
NOISE_FLOOR = (-62.0, -52.0)  # dBFS of the noise added to every file
PAUSE = 30  # dB below the loudest 20 ms
# Gain over frequency (Hz). The gap at 4 kHz hides where the two half bands of a codec meet.
BAND = {0: 0, 60: 0, 100: 1, 3850: 1, 3950: 0, 4050: 0, 4150: 1, 6800: 1, 7200: 0, 8000: 0}
# Group delay, seconds, at every 100 Hz: spreads pulses out, so that peaks do not tell a voice from
# a vocoder.
DELAY = np.random.default_rng(1).uniform(-0.008, 0.008, 81)
FADE = SAMPLE_RATE // 200  # 5 ms
FRAME = SAMPLE_RATE // 50  # 20 ms

SYNTHETIC = "synthetic voices: checks the installation, says nothing about real deepfakes"

Clip = Spoken | Cut
Parts = dict[
    str, tuple[list[Clip], list[Clip]]
]  # of each of PARTS: the clips shown as they are, those faked


@dataclass(frozen=True)
class File:
    """One audio file of the corpora: whose clip, by which codec or attack, and where."""

    path: str  # below the demo's folder
    clip: Clip
    maker: str  # key of CODECS or RESYNTHESES, or REAL
    also: tuple[str, ...] = ()  # where else the same bytes go


Plan = tuple[list[File], dict[str, str]]  # audio, and the text of each protocol by its path


def build(
    out: Path,
    speech: Path | None = None,
    seed: int = 688,
    scale: float = 1.0,
    workers: int | None = None,
) -> None:
    """Build the three corpora in `out`, `scale` times the usual number of clips, or reuse them if
    they are there.

    The folder appears when it is whole. Raises InputError, and touches nothing, where `out` holds
    anything else.
    """
    settings = {"recipe": RECIPE, "seed": seed, "scale": scale, "speech": _fingerprint(speech)}
    if _is_there(out, settings):
        print(f"{out} is already there; to build it anew, remove it first")
        return
    clips, voices = _synthetic(seed, scale) if speech is None else _recorded(speech, seed, scale)
    plans = [_codecfake(clips, seed), _asvspoof(clips, seed), _in_the_wild(clips, seed)]
    files = [file for plan in plans for file in plan[0]]
    texts = {path: text for plan in plans for path, text in plan[1].items()}
    texts |= {"speakers.csv": _speakers(files), "README.txt": _readme(voices, seed)}

    partial = out.with_name(out.name + ".part")
    with exclusive(partial):
        try:
            _empty(partial)
            _make_all(partial, files, seed, workers or len(os.sched_getaffinity(0)))
            for path, text in texts.items():
                _place(partial / path, text.encode())
            _place(partial / SETTINGS, json.dumps(settings, indent=1).encode())
            (partial / ".lock").unlink()
            if out.exists():
                out.rmdir()  # _is_there found it empty
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"{out}: {sum(1 + len(file.also) for file in files)} files of {voices}")


# ── whose clips ──────────────────────────────────────────────────────────────────────────────────


def _synthetic(seed: int, scale: float) -> tuple[Parts, str]:
    """The clips of each part, and what the voices are called."""
    print(SYNTHETIC)
    pools, first = {}, 1
    for group, n_speakers in SPEAKERS.items():
        pools[group] = [
            Spoken(seed, first + n % n_speakers, n, round(_spread(SECONDS, n * 5**0.5), 3))
            for n in range(1, _n_wanted(group, scale) + 1)
        ]
        first += n_speakers
    return _deal(pools, scale), SYNTHETIC


def _recorded(folder: Path, seed: int, scale: float) -> tuple[Parts, str]:
    """The same from recordings: speakers are dealt to the groups, most clips first, to where most
    are missing.
    """
    wanted = {group: _n_wanted(group, scale) for group in SPEAKERS}
    speakers, skipped = find_clips(folder, sum(wanted.values()), _generator(seed, "recordings"))
    _say_skipped(skipped)
    if len(speakers) < len(SPEAKERS):
        raise cli.InputError(
            f"{folder}: found {len(speakers)} speakers with recordings that can be used, expected "
            f"at least {len(SPEAKERS)}: one sub-folder each, or without sub-folders one file each "
            f"({', '.join(sorted(SUFFIXES))})"
        )
    pools: dict[str, list[Clip]] = {group: [] for group in SPEAKERS}
    for cuts in sorted(speakers.values(), key=len, reverse=True):
        neediest = min(pools, key=lambda group: len(pools[group]) / wanted[group])
        pools[neediest] += cuts
    for group, pool in pools.items():
        order = _generator(seed, group).permutation(len(pool))
        pools[group] = [replace(pool[i], number=n) for n, i in enumerate(order, start=1)]
        if len(pool) < wanted[group]:
            print(
                f"{folder}: {len(pool)} clips for {group} where {wanted[group]} would be used: "
                "that part is smaller"
            )
    return _deal(pools, scale), f"recordings: {len(speakers)} speakers of {folder.name}"


def _say_skipped(skipped: list[str]) -> None:
    for line in skipped[:5]:
        print(f"skipped {cli.printable(line)}")
    if len(skipped) > 5:
        print(f"skipped {len(skipped) - 5} more")


def _n_wanted(group: str, scale: float) -> int:
    return sum(max(_n_clips(part, scale)) for part in PARTS.values() if part.group == group)


def _n_clips(part: Part, scale: float) -> tuple[int, int]:
    return max(2, round(part.real * scale)), max(2, round(part.faked * scale))


def _deal(pools: dict[str, list[Clip]], scale: float) -> Parts:
    """Deal each group's clips to its parts, none twice; where there are too few, its parts shrink
    alike.
    """
    dealt = {}
    for group, pool in pools.items():
        group_scale = scale * min(1, len(pool) / _n_wanted(group, scale))
        start = 0
        for name, part in PARTS.items():
            if part.group == group:
                real, faked = _n_clips(part, group_scale)
                clips = pool[start : start + max(real, faked)]
                if len(clips) < 2:
                    raise cli.InputError(
                        f"too few clips to test on: {len(pool)} for the {group} sets; give more or "
                        "longer recordings"
                    )
                dealt[name] = clips[:real], clips[:faked]
                start += len(clips)
    return dealt


# ── what goes where ──────────────────────────────────────────────────────────────────────────────


def _codecfake(parts: Parts, seed: int) -> Plan:
    """train, dev, and the ten test sets: C1..C7 share their real clips, and so do A1..A3."""
    files, labels = [], {}
    for part in ("train", "dev"):
        real, faked = parts[part]
        made = [(clip, REAL) for clip in real] + [
            (clip, f"F0{k}") for clip in faked for k in range(1, 7)
        ]
        files += [File(f"Codecfake/{part}/{_wav(*one)}", *one) for one in made]
        labels[part] = [
            f"{_wav(clip, maker)} {_real_or_fake(maker)} {0 if maker == REAL else maker[-1]}"
            for clip, maker in made
        ]
    for part, subsets in {"C": [f"C{k}" for k in range(1, 8)], "A": ["A1", "A2", "A3"]}.items():
        real, faked = parts[part]
        for clip in real:
            first, *others = (f"Codecfake/test/{subset}/{_wav(clip, REAL)}" for subset in subsets)
            files.append(File(first, clip, REAL, also=tuple(others)))
        for subset in subsets:
            k = subset[-1]
            maker, real_tag, fake_tag = (
                (f"F0{k}", "0", k) if part == "C" else (subset, f"L{k}", f"L{k}")
            )
            files += [
                File(f"Codecfake/test/{subset}/{_wav(clip, maker)}", clip, maker) for clip in faked
            ]
            labels[subset] = [f"{_wav(clip, REAL)} real {real_tag}" for clip in real]
            labels[subset] += [f"{_wav(clip, maker)} fake {fake_tag}" for clip in faked]
    return files, {
        f"Codecfake/label/{name}.txt": _lines(rows, seed, name) for name, rows in labels.items()
    }


def _asvspoof(parts: Parts, seed: int) -> Plan:
    """LA; its dev and eval folders also hold files that no protocol names, as the published ones
    do.
    """
    files, protocols = [], {}
    for part, ending in {"train": "trn", "dev": "trl", "eval": "trl"}.items():
        real, faked = parts[f"LA {part}"]
        made = [(clip, REAL) for clip in real] + [
            (clip, f"A{k:02d}") for k in ATTACKS[part] for clip in faked
        ]
        numbers = _generator(seed, f"LA {part}").choice(
            np.arange(1_000_000, 10_000_000), len(made), replace=False
        )
        folder, letter, rows = f"LA/ASVspoof2019_LA_{part}/flac", part[0].upper(), []
        for (clip, maker), number in zip(made, numbers, strict=True):
            utterance = f"LA_{letter}_{number}"
            files.append(File(f"{folder}/{utterance}.flac", clip, maker))
            rows.append(
                f"LA_{clip.speaker:04d} {utterance} - {maker} "
                f"{'bonafide' if maker == REAL else 'spoof'}"
            )
        if part != "train":
            files += [
                File(f"{folder}/LA_{letter}_A{numbers[i]}.flac", real[i], REAL) for i in range(2)
            ]
        protocols[f"LA/ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{part}.{ending}.txt"] = (
            _lines(rows, seed, part)
        )
    return files, protocols


def _in_the_wild(parts: Parts, seed: int) -> Plan:
    """In-the-Wild as released: meta.csv beside the files it names, the speakers' names with blanks
    in them.
    """
    real, faked = parts["ITW"]
    made = [(clip, REAL) for clip in real] + [
        (clip, WILD[i % len(WILD)]) for i, clip in enumerate(faked)
    ]
    order = _generator(seed, "ITW").permutation(len(made))
    folder = "ITW/release_in_the_wild"
    files, rows = [], ["file,speaker,label"]
    for number, (clip, maker) in enumerate(made[i] for i in order):
        files.append(File(f"{folder}/{number}.wav", clip, maker))
        rows.append(
            f"{number}.wav,Speaker {clip.speaker:02d},{'bona-fide' if maker == REAL else 'spoof'}"
        )
    return files, {f"{folder}/meta.csv": "\n".join(rows) + "\n"}


def _wav(clip: Clip, maker: str) -> str:
    name = f"s{clip.speaker:02d}_{clip.number:04d}.wav"
    return name if maker == REAL else f"{maker}_{name}"


def _real_or_fake(maker: str) -> str:
    return "real" if maker == REAL else "fake"


def _lines(rows: list[str], seed: int, name: str) -> str:
    """The rows in random order, some with the trailing blank of the published files."""
    order = _generator(seed, f"order of {name}").permutation(len(rows))
    return "".join(
        f"{rows[row]}{' ' if at % TRAILING_BLANK_EVERY == 0 else ''}\n"
        for at, row in enumerate(order, start=1)
    )


def _speakers(files: list[File]) -> str:
    """speakers.csv: who speaks in each file, what made it, and from what."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", "speaker", "label", "maker", "source"])
    for file in files:
        for path in (file.path, *file.also):
            table.writerow(
                [
                    path,
                    f"s{file.clip.speaker:02d}",
                    _real_or_fake(file.maker),
                    file.maker,
                    file.clip.source,
                ]
            )
    return text.getvalue()


def _readme(voices: str, seed: int) -> str:
    return f"""Miniatures of Codecfake, ASVspoof2019 LA and In-the-Wild.

Made by `python -m demo` (seed {seed}). Results on them compare with no published figure.

Real clips: {voices}.

Codec copies:
    F01 Opus at 6.5 kbit/s in each of two half bands, passed through twice
    F02 Vorbis at its lowest quality, passed through four times
    F03 GSM 06.10
    F04 G.723 at 24 kbit/s
    F05 NMS ADPCM at 16 kbit/s
    F06 IMA ADPCM
    F07 G.721 at 32 kbit/s, only in C7
F03 to F07 run at 16 kHz, twice the rate of their standards, on a signal too quiet for them. All
copies are far coarser than good use of these codecs: a small network has to learn in minutes.

Other fakes: A1 Griffin-Lim, A2 LPC vocoder, A3 the same whispered; LA's attacks and In-the-Wild's
fakes are these with other settings.

All files, real and fake: treble emphasised, pulses spread out in time, pauses muted to one noise
floor, one distribution of level and length.
"""


# ── files ────────────────────────────────────────────────────────────────────────────────────────


def _make_all(folder: Path, files: list[File], seed: int, workers: int) -> None:
    jobs = defaultdict(list)
    for file in files:
        jobs[file.clip].append(file)
    with tqdm(total=len(files), unit="file", desc=f"building {folder.with_suffix('')}") as bar:
        for done in _in_parallel(
            [(folder, seed, clip, its_files) for clip, its_files in jobs.items()], workers
        ):
            bar.update(done)


def _in_parallel(jobs: list[tuple], workers: int) -> Iterator[int]:
    if workers == 1:
        yield from (_make(*job) for job in jobs)
        return
    # Ctrl-C reaches the workers too; only the parent answers it.
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        signal.signal,
        (signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield from (
            done.result() for done in as_completed([pool.submit(_make, *job) for job in jobs])
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _make(folder: Path, seed: int, clip: Clip, files: list[File]) -> int:
    """Write all files made from one clip; returns how many."""
    speech = clip.read()
    gate = speaking(speech)
    for file in files:
        rng = _generator(seed, file.path)
        if file.maker in CODECS:
            made = CODECS[file.maker](speech)
        elif file.maker in RESYNTHESES:
            made = RESYNTHESES[file.maker](speech, rng)
        else:
            made = speech
        encoded = io.BytesIO()
        soundfile.write(
            encoded,
            finish(made, gate, clip.number, rng),
            SAMPLE_RATE,
            format=Path(file.path).suffix[1:],
            subtype="PCM_16",
        )
        for path in (file.path, *file.also):
            _place(folder / path, encoded.getvalue())
    return len(files)


def finish(clip: np.ndarray, gate: np.ndarray, number: int, rng: np.random.Generator) -> np.ndarray:
    """The last steps of every file, real or fake: tone, band, level, pauses, noise floor, fades, no
    offset, dither, 16 bit.

    A clip and its copies have one level and one floor, by the clip's number, and the pauses of the
    original: how a codec fills a pause would tell it at once.
    """
    n = len(clip)
    padded = np.pad(
        lfilter([1, -EMPHASIS], 1, clip), (0, SAMPLE_RATE // 10)
    )  # no ringing around to the start
    spectrum = rfft(padded)
    frequency = np.linspace(0, SAMPLE_RATE / 2, len(spectrum))
    gain = np.interp(frequency, list(BAND), list(BAND.values()))
    phase = (
        2
        * np.pi
        * np.cumsum(np.interp(frequency, np.arange(len(DELAY)) * 100, DELAY))
        * frequency[1]
    )
    clip = irfft(spectrum * gain * np.exp(-1j * phase), len(padded))[:n]
    clip = clip * gate
    gain = 10 ** (_spread(SPEECH_LEVEL, number * 2**0.5) / 20) / speech_level(clip)
    clip *= min(gain, 0.95 / np.abs(clip).max())
    clip += 10 ** (_spread(NOISE_FLOOR, number * 3**0.5) / 20) * rng.standard_normal(n)
    fade = np.linspace(0, 1, FADE)
    clip[:FADE] *= fade
    clip[-FADE:] *= fade[::-1]
    dither = rng.random(n) - rng.random(n)  # triangular, one step to either side
    return np.round((clip - clip.mean()) * 32768 + dither).astype(np.int16)


def _spread(interval: tuple[float, float], multiple: float) -> float:
    """Where n times an irrational number falls for n = 1, 2, 3…: evenly in the interval, however
    few are taken (Weyl).
    """
    low, high = interval
    return low + (high - low) * (multiple % 1)


def speech_level(clip: np.ndarray) -> float:
    """Root mean square of the frames in which somebody speaks."""
    power = _power(clip)
    return float(np.sqrt(power[power > power.max() * 10 ** (-PAUSE / 10)].mean()))


def speaking(clip: np.ndarray) -> np.ndarray:
    """A value a sample: 1 in speech, 0 in pauses, with ramps of 20 ms between them."""
    power = _power(clip)
    loud = np.pad(power > power.max() * 10 ** (-PAUSE / 10), 1)
    loud = loud[:-2] | loud[1:-1] | loud[2:]  # and the frame before and after
    return np.interp(np.arange(len(clip)), (np.arange(len(loud)) + 0.5) * FRAME, loud)


def _power(clip: np.ndarray) -> np.ndarray:
    """Mean square of each whole frame."""
    return np.mean(clip[: len(clip) // FRAME * FRAME].reshape(-1, FRAME) ** 2, axis=1)


def _place(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _generator(seed: int, name: str) -> np.random.Generator:
    """Each name its own random numbers, whatever else is drawn and in whatever order."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


# ── the folder ───────────────────────────────────────────────────────────────────────────────────


def _is_there(out: Path, settings: dict) -> bool:
    """True if `out` was made with these settings, False if there is nothing; anything else is an
    InputError.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / SETTINGS).read_text())
    except (OSError, ValueError):
        raise cli.InputError(
            f"{out}: is not empty and was not made by `python -m demo`; choose another folder with "
            "-o"
        ) from None
    if found != settings:
        changed = ", ".join(key for key in settings if found.get(key) != settings[key])
        raise cli.InputError(
            f"{out}: was made with another {changed}; remove it (make clean-demo), or choose "
            "another folder with -o"
        )
    return True


def _empty(folder: Path) -> None:
    """Remove what a killed run left in its working folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _fingerprint(speech: Path | None) -> str | None:
    if speech is None:
        return None
    if not speech.is_dir():
        raise cli.InputError(f"{speech}: no such folder of recordings")
    return hashlib.sha256(json.dumps(fingerprint(speech)).encode()).hexdigest()[:16]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("data/demo"),
        help="folder to build (default: %(default)s)",
    )
    parser.add_argument(
        "--speech",
        type=Path,
        metavar="FOLDER",
        help="recordings of real speech, one sub-folder (or else one file) a speaker; default: "
        "synthetic voices",
    )
    parser.add_argument("--seed", type=int, default=688, help="0 or more (default: %(default)s)")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="times the usual number of clips (default: %(default)s)",
    )
    parser.add_argument("--num_workers", type=int, help="processes (default: one a core)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.seed < 0 or args.scale <= 0 or (args.num_workers or 1) < 1:
        parser.error("--seed must be 0 or more, --scale and --num_workers more than 0")
    build(args.out, args.speech, args.seed, args.scale, args.num_workers)
