"""Kill, damage, starve and lie to the pipeline, and hold what is left against an undisturbed run.

    python -m tests.torture                             # everything, about 10 minutes on 2 cores
    python -m tests.torture --only kill damage --cases 50 --seed 7

Prints a table of figures and writes it to tests/TORTURE.md. Exits with 1 if any case fails. Every
case ends in one of three ways that are right: the result is *equal* to the undisturbed run's, the
damage is *detected* and named, or the input is *refused* in one line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch

import dataset
import generate_score
import main_train
import model
import preprocess
from evaluation.results import evaluate, find_models
from formats import audio, feature_cache, torch_files, training_state
from runtime.cli import InputError
from tests.conftest import make_codecfake, make_itw
from tests.faults import (
    DISK_ERRORS,
    HOSTILE_PROGRAMS,
    TWO_FLOATS,
    Child,
    Fuse,
    Outcome,
    damage,
    fails_with,
    hostile_archives,
    hostile_objects,
    killed,
    run_child,
    write_program,
)

TABLE = Path(__file__).with_name("TORTURE.md")
CLEAN_END = 5.0  # seconds that an interrupted run may take to end
LOAD_SECONDS = 30.0  # that one file may take, on a busy machine
LOAD_BYTES = 500e6  # that reading hostile files may add to a process
WORDS = ("equal", "detected", "refused")


@dataclass(frozen=True)
class Case:
    """One thing that was done, and how it ended."""

    what: str
    ending: str  # one of WORDS, or what went wrong

    @property
    def failed(self) -> bool:
        return self.ending not in WORDS


# ── The three stages ─────────────────────────────────────────────────────────────────────────────


class Stage:
    """A script on a small corpus, and what an undisturbed run of it leaves behind."""

    def __init__(self, name: str, script, options: Sequence[object], output: str, folder: Path):
        self.name, self.script, self.folder = name, script, folder
        self.options, self.output = [*map(str, options), "--gpu", "-1"], output
        self.fresh = 0
        out, counted = self.new_folder(), folder / f"{name}.count"
        outcome = run_child(lambda: self._count(out, counted))
        assert outcome.code == 0, outcome.err
        self.whole, self.actions = self.contents(out), int(counted.read_text())

    def _count(self, out: Path, counted: Path) -> None:
        """Run undisturbed; note how many actions of the disk that takes."""
        with (fuse := Fuse(self.folder)).installed():
            self.main(out)
        counted.write_text(str(fuse.count))

    def new_folder(self) -> Path:
        self.fresh += 1
        return self.folder / f"{self.name}{self.fresh}"

    def main(self, out: Path, workers: int = 0) -> None:
        options = [*self.options, self.output, str(out), "--num_workers", str(workers)]
        if (out / main_train.STATE_FILE).exists():
            options.append("--continue_training")
        self.script.main(options)

    def contents(self, out: Path) -> dict[str, object]:
        """Everything a run leaves, by file.

        Times are left out, and TensorBoard's files, which hold them.
        """
        return {
            str(path.relative_to(out)): _content(path)
            for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != ".lock" and "tensorboard" not in path.parts
        }

    def ending(self, out: Path, workers: int = 0) -> str:
        """How going on in `out` ends: "equal", or in what it differs."""
        outcome = run_child(lambda: self.main(out, workers))
        if outcome.code:
            return f"resuming ended with {outcome.code}: {outcome.err.strip().splitlines()[-1:]}"
        found = self.contents(out)
        differing = sorted(
            name
            for name in found.keys() | self.whole.keys()
            if found.get(name) != self.whole.get(name)
        )
        shutil.rmtree(out)
        return f"differs in {', '.join(differing)}" if differing else "equal"


def _content(path: Path) -> object:
    if path.name == "last_state.pt":
        return _without_times(torch_files.load(path))
    if path.name == "log.jsonl":
        return [_without_times(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_bytes()


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


MEL = ["-t", "codecfake", "--feat", "mel"]


def make_stages(folder: Path) -> dict[str, Stage]:
    """preprocess, train and score on few clips; every step is saved, a shard holds four rows."""
    feature_cache.ROWS_PER_SHARD, preprocess.FLUSH_EVERY, main_train.SAVE_EVERY = 4, 2, -1
    make_codecfake(folder / "Codecfake", n_real=2)
    make_itw(folder / "ITW")
    (folder / "head").mkdir()
    torch.manual_seed(0)
    info = {"feat": "mel", "train_task": "codecfake"}
    model.save_head(folder / "head" / model.WEIGHTS, model.LCNN("mel"), info)
    extraction = [*MEL, "-d", folder / "Codecfake", "--batch_size", 2]
    features = Stage("preprocess", preprocess, extraction, "-f", folder)
    shutil.move(folder / "preprocess1", folder / "features")
    return {
        "preprocess": features,
        "train": Stage("train", main_train, _training(folder), "-o", folder),
        "score": Stage("score", generate_score, _scoring(folder), "--result_folder", folder),
    }


def _training(folder: Path) -> list[object]:
    sizes = ["--batch_size", 3, "--num_epochs", 2]
    return [*MEL, "-m", "lcnn", "-f", folder / "features", *sizes]


def _scoring(folder: Path) -> list[object]:
    subsets = ["--subset", "C1", "C2", "C7"]
    head = ["--batch_size", 3, "--model_folder", folder / "head"]
    return ["-t", "codecfake", *subsets, "-d", folder / "Codecfake", *head]


@dataclass
class Bench:
    """What the groups share."""

    folder: Path
    rng: random.Random

    @cached_property
    def stages(self) -> dict[str, Stage]:
        return make_stages(self.folder)


# ── Groups ───────────────────────────────────────────────────────────────────────────────────────


def kill(bench: Bench) -> Iterator[Case]:
    """SIGKILL at actions of the disk and at any time, SIGINT and SIGTERM; then the same command
    again.
    """
    for number, stage in itertools.product(range(30), bench.stages.values()):
        at, out = (
            1 + (number * stage.actions // 30 + bench.rng.randrange(3)) % stage.actions,
            stage.new_folder(),
        )
        yield Case(f"{stage.name}: killed at action {at}", _killed_at(stage, out, at))
    for _, stage in itertools.product(range(8), bench.stages.values()):
        out, delay = stage.new_folder(), bench.rng.uniform(0.01, 0.8)
        child = Child(partial(stage.main, out, workers=0))
        time.sleep(delay)
        child.signal(signal.SIGKILL)
        child.wait()
        yield Case(f"{stage.name}: killed after {delay:.2f} s", stage.ending(out))
    for _, number, stage in itertools.product(
        range(3), (signal.SIGINT, signal.SIGTERM), bench.stages.values()
    ):
        yield _interrupted(
            stage, number, bench.rng.uniform(0.02, 0.6), workers=bench.rng.choice((0, 2))
        )


def _burn(fuse: Fuse, stage: Stage, out: Path) -> None:
    """Run a stage while the fuse is set."""
    with fuse.installed():
        stage.main(out)


def _killed_at(stage: Stage, out: Path, at: int) -> str:
    fuse = Fuse(stage.folder, at, killed)
    outcome = run_child(partial(_burn, fuse, stage, out))
    return (
        stage.ending(out)
        if outcome.code == -signal.SIGKILL
        else f"was not killed, but ended with {outcome.code}"
    )


def _interrupted(stage: Stage, number: int, delay: float, workers: int) -> Case:
    what, out = (
        f"{stage.name}: {signal.Signals(number).name} after {delay:.2f} s, {workers} workers",
        stage.new_folder(),
    )
    child = Child(lambda: stage.main(out, workers))
    time.sleep(delay)
    sent = time.monotonic()
    child.signal(number)
    outcome = child.wait()
    took = time.monotonic() - sent
    # Before the handlers are set the signal ends the process as it ends any other.
    if outcome.code not in (0, 128 + number, -number) or took > CLEAN_END + 2 * (outcome.code == 0):
        return Case(what, f"ended with {outcome.code} after {took:.1f} s: {outcome.err[-300:]}")
    if outcome.code == 128 + number and ("again" not in outcome.err or "Traceback" in outcome.err):
        return Case(what, f"said {outcome.err[-300:]}")
    return Case(what, stage.ending(out))


def disk(bench: Bench) -> Iterator[Case]:
    """Every action of the disk fails in turn (full, read-only, no permission, broken), files
    vanish, reads are slow.
    """
    for number, stage in itertools.product(range(20), bench.stages.values()):
        at, error = (
            1 + (number * stage.actions // 20 + bench.rng.randrange(3)) % stage.actions,
            DISK_ERRORS[number % len(DISK_ERRORS)],
        )
        out, fuse = stage.new_folder(), Fuse(stage.folder, at, fails_with(error))

        yield Case(
            f"{stage.name}: {os.strerror(error)} from action {at}",
            _refused_then_equal(stage, out, run_child(partial(_burn, fuse, stage, out))),
        )
    for workers, (name, gone, moment) in itertools.product((0, 2), _vanishing(bench)):
        stage, out = bench.stages[name], bench.stages[name].new_folder()
        yield Case(
            f"{name}: {gone.name} vanishes, {workers} workers",
            _vanished(stage, out, gone, moment, workers),
        )
    for stage in bench.stages.values():
        out = stage.new_folder()
        with (
            mock.patch.object(os, "preadv", _slow(os.preadv)),
            mock.patch.object(audio, "load_recording", _slow(audio.load_recording)),
        ):
            yield Case(f"{stage.name}: slow reads", stage.ending(out, workers=2))


def _refused_then_equal(stage: Stage, out: Path, outcome: Outcome) -> str:
    if not outcome.refused:
        return f"ended with {outcome.code}: {outcome.err[-400:]}"
    return stage.ending(out)


def _vanishing(bench: Bench) -> list[tuple[str, Path, str]]:
    """(stage, file, function after which the file is gone)."""
    return [
        (
            "preprocess",
            bench.folder / "Codecfake/train/strain_001.wav",
            "formats.protocols.find_missing",
        ),
        (
            "score",
            bench.folder / "Codecfake/test/C2/F02_s_001.wav",
            "formats.protocols.find_missing",
        ),
        *(
            ("train", bench.folder / "features/train/mel" / name, "main_train.settings_of")
            for name in ("features_00000.npy", "features_00001.npy")
        ),
    ]


def _vanished(stage: Stage, out: Path, gone: Path, moment: str, workers: int) -> str:
    module, _, name = moment.rpartition(".")
    real = getattr(sys.modules[module], name)

    def then_remove(*arguments):
        result = real(*arguments)
        gone.rename(hidden) if gone.exists() else None
        return result

    hidden = gone.with_name("hidden")
    with mock.patch.object(sys.modules[module], name, then_remove):
        outcome = run_child(lambda: stage.main(out, workers))
    hidden.rename(gone)
    return (
        _refused_then_equal(stage, out, outcome)
        if gone.name in outcome.err
        else f"did not name {gone.name}: {outcome.err[-300:]}"
    )


def _slow(function: Callable) -> Callable:
    def slowly(*arguments):
        time.sleep(0.05)
        return function(*arguments)

    return slowly


def concurrent(bench: Bench) -> Iterator[Case]:
    """A second process on the same output stops; a killed owner's lock does not outlive it, though
    its helpers do.
    """
    for _, workers, stage in itertools.product(range(2), (0, 2), bench.stages.values()):
        at = bench.rng.randrange(1, stage.actions // 2)
        yield Case(
            f"{stage.name}: a second process at action {at}, {workers} workers",
            _second(stage, at, workers, kill_owner=False),
        )
        yield Case(
            f"{stage.name}: owner killed at action {at}, {workers} workers",
            _second(stage, at, workers, kill_owner=True),
        )


def _second(stage: Stage, at: int, workers: int, kill_owner: bool) -> str:
    out = stage.new_folder()
    marker = stage.folder / f"{out.name}.held"

    def pause() -> None:
        if not marker.exists():
            marker.touch()
            time.sleep(2)

    fuse = Fuse(out, at, pause, halves=False)

    def owner() -> None:
        with fuse.installed():
            stage.main(out, workers)

    first = Child(owner)
    while not marker.exists() and time.monotonic() - first.began < 60:
        time.sleep(0.01)
    if kill_owner:
        first.signal(signal.SIGKILL)
        first.wait()
        return stage.ending(out, workers)
    second = run_child(lambda: stage.main(out, workers))
    outcome = first.wait()
    if outcome.code or not second.refused or "another process is writing there" not in second.err:
        return f"ended with {outcome.code}, the second with {second.code}: {second.err[-300:]}"
    return stage.ending(out)


def damaged(bench: Bench) -> Iterator[Case]:
    """Flipped bits, cuts, zeros, swapped rows and files in all that is kept.

    Caches are repaired to the same bytes.
    """
    stage, kept = (
        bench.stages["preprocess"],
        (
            "train/mel/cache.json",
            "train/mel/trials.tsv",
            "train/mel/index.npy",
            "train/mel/features_00000.npy",
            "train/mel/features_00001.npy",
            "dev/mel/features_00000.npy",
            "dev/mel/index.npy",
        ),
    )
    for number in range(240):
        out = Path(shutil.copytree(bench.folder / "features", stage.new_folder()))
        path = out / kept[number % len(kept)]
        others = [
            other
            for other in path.parent.glob("features_*.npy")
            if other != path and path.suffix == ".npy" and path.stem != "index"
        ]
        what = damage(path, bench.rng, others)
        yield Case(f"cache: {what}", _cache_ending(stage, out))
    train, score = _finished(bench.stages["train"]), _finished(bench.stages["score"])
    for number in range(150):
        path = (
            train
            / (
                "last_state.pt",
                model.WEIGHTS,
                f"checkpoint/{model.WEIGHTS.replace('.pt', '_1.pt')}",
            )[number % 3]
        )
        yield _damaged_file(bench, path, _load_checkpoint, [])
    for number in range(150):
        path = (
            score
            / ("C1_result.txt", "C2_result.txt", "C7_result.txt", "provenance.json")[number % 4]
        )
        others = (
            [score / "C1_result.txt"] if path.name in ("C2_result.txt", "C7_result.txt") else []
        )
        yield _damaged_file(bench, path, lambda path: _evaluated(path.parent), others)


def _cache_ending(stage: Stage, out: Path) -> str:
    """Whether the damage is named, and --repair undoes it."""
    intact = stage.contents(out) == stage.whole
    verify = run_child(lambda: preprocess.main([*stage.options, "-f", str(out), "--verify"]))
    if not intact and verify.code == 0 and _all_rows(out) != _all_rows(stage.folder / "features"):
        return "damage went unseen"
    if verify.code and not verify.refused:
        return f"verifying ended with {verify.code}: {verify.err[-300:]}"
    removed = not all((out / part / "mel/cache.json").exists() for part in ("train", "dev"))
    options = (
        [] if removed else ["--verify", "--repair"]
    )  # without a cache.json it is as if never made
    repair = run_child(lambda: preprocess.main([*stage.options, "-f", str(out), *options]))
    if repair.code:
        return f"repairing ended with {repair.code}: {repair.err[-300:]}"
    ending = stage.ending(out)
    return "detected" if ending == "equal" and verify.code else ending


def _all_rows(root: Path) -> list[bytes]:
    caches = [feature_cache.FeatureCache(root / part / "mel") for part in ("train", "dev")]
    found = [
        part.read(np.arange(len(part.labels)))[0].numpy().tobytes()
        + repr(part.names).encode()
        + part.labels.tobytes()
        for part in caches
    ]
    for each in caches:
        each.layout.close()
    return found


def _finished(stage: Stage) -> Path:
    out = stage.new_folder()
    outcome = run_child(lambda: stage.main(out))
    assert outcome.code == 0, outcome.err
    return out


def _damaged_file(
    bench: Bench, path: Path, read: Callable[[Path], object], others: list[Path]
) -> Case:
    """Damage a file, read it, put it back."""
    saved = {each: each.read_bytes() for each in (path, *others)}
    expected = read(path)
    what = damage(path, bench.rng, others)
    try:
        ending = "equal" if read(path) == expected else "damage went unseen"
    except InputError as error:
        ending = (
            "detected"
            if path.name in str(error)
            or any(other.name in str(error) for other in path.parent.iterdir())
            else f"not named: {error}"
        )
    except Exception as error:
        ending = f"{type(error).__name__}: {error}"
    for each, data in saved.items():
        each.write_bytes(data)
    return Case(what, ending)


def _load_checkpoint(path: Path) -> object:
    if path.name == "last_state.pt":
        if not path.exists():
            raise InputError(f"{path} is gone: the run starts again")
        return _without_times(asdict(training_state.read_state(path)))
    head = model.load_head(path)
    return _without_times(dict(head.state_dict())), head.info


def _evaluated(folder: Path) -> object:
    [found] = find_models([folder], ("C1", "C2", "C7"))
    if set(found.files) != {"C1", "C2", "C7"}:
        raise InputError(
            f"{folder}: a dash in the table for each of C1_result.txt, C2_result.txt, "
            "C7_result.txt that is absent"
        )
    results = list(evaluate(found, 0).results.values())
    if changed := [str(result.file) for result in results if result.changed]:
        raise InputError(f"{', '.join(changed)}: named below the table as edited or damaged")
    return [
        (
            result.subset,
            result.trials.names,
            result.trials.scores.tolist(),
            result.trials.is_real.tolist(),
        )
        for result in results
    ]


# ── Audio ────────────────────────────────────────────────────────────────────────────────────────

AUDIO_A_CHILD = 40


def recordings(bench: Bench) -> Iterator[Case]:
    """Fuzzed recordings: each loads as a clip of finite samples, or is refused by name, in bounded
    time and memory.
    """
    recipes = [*_odd_recordings(), *_mutations(bench.rng)]
    for first in range(0, len(recipes), AUDIO_A_CHILD):
        folder = bench.folder / f"audio{first}"
        folder.mkdir()
        paths = []
        for number, (name, make) in enumerate(recipes[first : first + AUDIO_A_CHILD], start=first):
            paths.append(folder / f"{number}_{name}")
            make(paths[-1])
        outcome = run_child(partial(_load_all, paths), limit=300)
        reports = dict(json.loads(line) for line in outcome.out.splitlines())
        for path in paths:
            ending = reports.get(str(path), f"ended the process with {outcome.code}")
            yield Case(
                path.name,
                ending
                if outcome.grown < LOAD_BYTES
                else f"with others took {outcome.grown / 1e6:.0f} MB",
            )
        shutil.rmtree(folder)


def _load_all(paths: Sequence[Path]) -> None:
    for path in paths:
        began = time.monotonic()
        try:
            clip = dataset.load_clip(path)
            ending = (
                "equal"
                if clip.shape == (dataset.CLIP_SAMPLES,)
                and clip.dtype == torch.float32
                and clip.isfinite().all()
                else "a wrong clip"
            )
        except InputError as error:
            ending = (
                "refused"
                if str(path) in str(error) and "\n" not in str(error)
                else f"not named: {error}"
            )
        except Exception as error:
            ending = f"{type(error).__name__}: {error}"
        if time.monotonic() - began > LOAD_SECONDS:
            ending = f"took {time.monotonic() - began:.0f} s"
        print(json.dumps([str(path), ending]))


def _wave(seconds: float = 0.3, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    t = np.arange(max(1, int(seconds * rate)))[:, None] / rate
    return np.repeat(0.3 * np.sin(2 * np.pi * 300 * t), channels, axis=1).astype(np.float32)


def _header(
    rate: int = 16_000,
    channels: int = 1,
    length: int = 2000,
    bits: int = 16,
    kind: int = 1,
    riff: int | None = None,
) -> bytes:
    """The head of a WAV file, with whatever it claims."""
    block = channels * bits // 8
    return (
        b"RIFF"
        + struct.pack("<I", (36 + length if riff is None else riff) & 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack(
            "<IHHIIHH",
            16,
            kind,
            channels & 0xFFFF,
            rate & 0xFFFFFFFF,
            rate * block & 0xFFFFFFFF,
            block & 0xFFFF,
            bits,
        )
        + b"data"
        + struct.pack("<I", length & 0xFFFFFFFF)
    )


Maker = Callable[[Path], object]  # writes a file
ODD_RATES = [1, 2, 7, 100, 999, 4_000, 8_000, 11_025, 22_050, 44_100, 44_101, 48_000, 96_000]
ODD_RATES += [192_000, 384_000, 767_999, 768_000, 768_001, 2**31 - 1]


def _raw(data: bytes) -> Maker:
    return lambda path: path.write_bytes(data)


def _sound(samples: np.ndarray, rate: int = 16_000, **options: str) -> Maker:
    return lambda path: soundfile.write(path, samples, rate, **options)


def _odd_recordings() -> Iterator[tuple[str, Maker]]:
    """Recordings that are odd on purpose, by the name of what is odd."""
    yield from _odd_headers()
    yield from _odd_samples()
    yield from _odd_files()


def _odd_headers() -> Iterator[tuple[str, Maker]]:
    for rate in ODD_RATES:
        samples = _wave().astype(np.int16).tobytes()[:2000].ljust(2000, b"\1")
        yield f"rate{rate}.wav", _raw(_header(rate) + samples)
    for channels in (0, 1025, 65_535):
        yield f"channels{channels}.wav", _raw(_header(channels=channels) + bytes(2000))
    for length in (0, 1, 2, 2**31, 2**32 - 1, 1_999, 100_000_000):
        yield f"claims{length}.wav", _raw(_header(length=length) + bytes(2000))
    for bits in (0, 1, 7, 8, 12, 24, 32, 64, 65_535):
        yield f"bits{bits}.wav", _raw(_header(bits=bits) + bytes(2000))
    for kind in (0, 2, 3, 6, 7, 17, 49, 85, 0xFFFE, 0xFFFF):
        yield f"codec{kind}.wav", _raw(_header(kind=kind) + bytes(2000))


def _odd_samples() -> Iterator[tuple[str, Maker]]:
    for channels in (2, 3, 8, 255, 1024):
        yield f"channels{channels}.wav", _sound(_wave(0.05, channels=channels))
    for value in (np.nan, np.inf, -np.inf, 1e38, 1e-45):
        samples = _wave()
        samples[100] = value
        yield f"value{value}.wav", _sound(samples, subtype="FLOAT")
    for count in (0, 1, 2, 64_599, 64_600, 64_601):
        yield f"samples{count}.wav", _sound(np.full(count, 0.1))
        yield f"samples{count}.flac", _sound(np.full(count, 0.1))
    yield "three_hours.wav", _three_hours


def _odd_files() -> Iterator[tuple[str, Maker]]:
    for name, data in (
        ("text", b"this is not audio\n" * 100),
        ("empty", b""),
        ("zeros", bytes(10_000)),
        ("RIFF only", b"RIFF"),
        ("one byte", b"R"),
        ("html", b"<html>404</html>"),
    ):
        for suffix in ("wav", "flac", "ogg", "mp3", "raw", "aiff", "none"):
            yield f"{name}.{suffix}", _raw(data)
    for suffix, wrong in itertools.permutations(("wav", "flac", "ogg", "mp3"), 2):
        yield f"{suffix} in truth.{wrong}", partial(_write_encoded, suffix)
    yield "headerless.raw", _raw(_wave().tobytes())
    yield "link.wav", lambda path: path.symlink_to(path)
    yield "dangling.wav", lambda path: path.symlink_to("nowhere")
    yield "pipe.wav", os.mkfifo
    yield "folder.wav", Path.mkdir
    yield "device.wav", lambda path: path.symlink_to("/dev/zero")
    yield "absent.wav", lambda path: None
    yield "esc\x1b[31m.wav", _raw(b"x")


def _write_encoded(suffix: str, path: Path) -> None:
    path.write_bytes(_encoded(suffix))


def _three_hours(path: Path) -> None:
    samples = 3 * 3600 * 16_000
    path.write_bytes(_header(length=2 * samples))
    os.truncate(path, 44 + 2 * samples)


@cache
def _encoded(suffix: str) -> bytes:
    """A short recording in that format."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{suffix}"
        soundfile.write(path, _wave(0.5), 16_000)
        return path.read_bytes()


def _mutations(
    rng: random.Random, count: int = 900
) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Recordings with bits flipped, above all in their heads, cut, spliced or with a byte run
    changed.
    """
    for number in range(count):
        suffix = ("wav", "flac", "ogg", "mp3")[number % 4]
        data = bytearray(_encoded(suffix))
        for _ in range(rng.choice((1, 1, 2, 5, 40))):
            at = rng.randrange(min(len(data), rng.choice((48, 200, len(data)))))
            action = rng.randrange(5)
            if action == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif action == 1:
                data[at : at + 4] = struct.pack(
                    "<I", rng.choice((0, 1, 2**31 - 1, 2**32 - 1, rng.randrange(2**32)))
                )
            elif action == 2:
                del data[rng.randrange(at, len(data)) :]
            elif action == 3:
                data[at:at] = rng.randbytes(rng.randrange(64))
            else:
                del data[at : at + rng.randrange(64)]
            data = data or bytearray(b"\0")
        yield f"mutated.{suffix}", lambda path, data=bytes(data): path.write_bytes(data)


# ── Hostile files ────────────────────────────────────────────────────────────────────────────────


def hostile(bench: Bench) -> Iterator[Case]:
    """Files that would run code, or fill memory or time, where checkpoints, features and resume
    states are expected.
    """
    folder, canary = bench.folder / "hostile", bench.folder / "canary"
    files = hostile_archives(folder)
    for number, (name, (program, _)) in enumerate(HOSTILE_PROGRAMS.items()):
        files[name] = write_program(
            folder / f"program{number}.pt", program, **{"data/0": TWO_FLOATS}
        )
    for number, (name, content) in enumerate(hostile_objects(canary).items()):
        files[name] = folder / f"object{number}.pt"
        torch.save(content, files[name])
    readers = {
        "checkpoint": model.load_head,
        "state": training_state.read_state,
        "feature": _read_feature,
    }
    for (name, path), (place, read) in itertools.product(files.items(), readers.items()):
        if path.is_dir() and place == "checkpoint":
            continue  # a folder is a fair way to name a checkpoint
        outcome = run_child(partial(read, path), limit=2 * LOAD_SECONDS)
        ending = (
            "refused"
            if outcome.refused and path.name in outcome.err
            else f"ended with {outcome.code}: {outcome.err[-300:]}"
        )
        if canary.exists() or outcome.grown > LOAD_BYTES or outcome.seconds > LOAD_SECONDS:
            ending = (
                f"canary {canary.exists()}, {outcome.grown / 1e6:.0f} MB, {outcome.seconds:.0f} s"
            )
        yield Case(f"{place}: {name}", ending)


def _read_feature(path: Path) -> None:
    """Read the file as one of the reference's features, under the name that such have."""
    folder = path.with_suffix(".features")
    folder.mkdir(exist_ok=True)
    feature = folder / f"0_{path.stem}.pt_real.pt"
    feature.unlink(missing_ok=True)
    feature.symlink_to(path)
    dataset.ReferenceFeatures(folder, "mel").read(np.array([0]))


# ── Protocols ────────────────────────────────────────────────────────────────────────────────────

LISTS = {
    "codecfake": ("train", "label/train.txt", "{} fake {}"),
    "19LA": (
        "train",
        "ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.train.trn.txt",
        "sp {} - {} spoof",
    ),
    "ITW": ("all", "meta.csv", "{},{},spoof"),
}
NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "a/../b",
    "a\\b",
    "",
    " ",
    "a\0b",
    "a\x1b[2Jb",
    "a\x07",
    "a\u202eb",
    "a\u2028b",
    "a\x85b",
    "a\x7f",
    "x" * 5_000,
    "x" * 10_000_000,
    '"',
    '"a',
    '"a\nb"',
    "a,b,c",
    "'",
    "%s%n",
    "${HOME}",
    "$(touch canary)",
    "é",
    "\u0301",
    "名",
    "-rf",
    "~",
    "a b",
    "CON",
    "\ufeff",
    "1" * 4_000,
    "\x1c",
    "NaN",
    "<script>",
)


def protocol(bench: Bench) -> Iterator[Case]:
    """Rows that lead out of the corpus, drive a terminal, or never end: refused with file and row,
    or harmless.
    """
    for task, (part, file, row) in LISTS.items():
        for name, place in itertools.product(NAMES, range(2)):
            fields = (name, "x") if place == 0 else ("x.wav", name)
            yield _read_list(
                bench,
                task,
                part,
                file,
                ("good.wav real 0\n" if task == "codecfake" else "").encode()
                + row.format(*fields).encode()
                + b"\n",
            )
        for data in (
            b"",
            b"\0" * 1000,
            b"\xff\xfe" + bytes(100),
            b"\n" * 100_000,
            b"\r\r\r",
            b'"' * 1_000_000,
            b'"\n' * 100_000,
            b"," * 4000,
            b"a b c\n" * 100_000,
            b'1.wav,"a\n' * 100_000,
            b"\x80" * 100,
            os.urandom(5000),
        ):
            yield _read_list(bench, task, part, file, data)
        for _ in range(100):
            data = bytearray((row.format("a.wav", "A01") + "\n").encode() * 20)
            for _ in range(bench.rng.randrange(1, 10)):
                data[bench.rng.randrange(len(data))] = bench.rng.randrange(256)
            yield _read_list(bench, task, part, file, bytes(data))


def _read_list(bench: Bench, task: str, part: str, file: str, data: bytes) -> Case:
    root = bench.folder / "protocols" / task
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    what, began = f"{task}: {data[-60:]!r}", time.monotonic()
    try:
        trials = dataset.read_protocol(task, root, part)
    except InputError as error:
        plain = str(error).isprintable() and str(root) in str(error) and len(str(error)) < 1000
        return Case(
            what,
            "refused"
            if plain and time.monotonic() - began < LOAD_SECONDS
            else f"said {str(error)[:200]!r}",
        )
    except Exception as error:
        return Case(what, f"{type(error).__name__}: {str(error)[:200]}")
    inside = all(
        Path(os.path.normpath(trial.path)).is_relative_to(root)
        and (trial.name + trial.source).isprintable()
        for trial in trials
    )
    return Case(what, "equal" if inside else "leads out of the corpus")


# ── Command line ─────────────────────────────────────────────────────────────────────────────────

HEADING = (
    "| group | cases | equal | detected | refused | failures | seconds |\n"
    "|---|---|---|---|---|---|---|"
)
PAGE = """# Survives anything

Made by `python -m tests.torture --seed {seed}`. *Equal*: the result, resumed or repaired where that
is called for, has the bytes of an undisturbed run's, or what was read is whole. *Detected*: the
damage is named. *Refused*: one line, and nothing is run, lost or half-written.

{table}

Python {python}, torch {torch}, {cores} cores, which the groups share.
"""
GROUPS = {
    "kill": kill,
    "damage": damaged,
    "disk": disk,
    "concurrent": concurrent,
    "audio": recordings,
    "hostile": hostile,
    "protocol": protocol,
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(GROUPS),
        default=list(GROUPS),
        metavar="GROUP",
        help=f"of {', '.join(GROUPS)} (default: all)",
    )
    parser.add_argument(
        "--cases", type=int, metavar="N", help="at most N cases a group (default: all)"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="groups at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=688, help="of what is damaged and when (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=TABLE,
        metavar="FILE",
        help="where the table goes (default: tests/TORTURE.md)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(1)  # a pool of threads would not survive the forks
    sys.argv = sys.argv[:1]  # recorded by the scripts as their command
    rows, failures = [], []
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for name, (cases, seconds) in zip(
            args.only,
            pool.map(
                run_group, args.only, itertools.repeat(args.cases), itertools.repeat(args.seed)
            ),
            strict=True,
        ):
            failures += [f"{name}: {case.what}: {case.ending}" for case in cases if case.failed]
            rows.append(_row(name, cases, seconds))
            print(rows[-1], flush=True)
    table = "\n".join([HEADING, *rows])
    args.out.write_text(
        PAGE.format(
            table=table,
            seed=args.seed,
            python=platform.python_version(),
            torch=torch.__version__,
            cores=os.cpu_count(),
        )
    )
    print(f"\n{table}\n\n{args.out}")
    for failure in failures:
        print(failure.encode("unicode_escape").decode(), file=sys.stderr)
    return int(bool(failures))


def run_group(name: str, most: int | None, seed: int) -> tuple[list[Case], float]:
    """The cases of one group, in a folder of its own, and the seconds they took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"torture-{name}-") as folder:
        return list(
            itertools.islice(GROUPS[name](Bench(Path(folder), random.Random(seed))), most)
        ), time.monotonic() - began


def _row(name: str, cases: Sequence[Case], seconds: float) -> str:
    counts = Counter(case.ending for case in cases)
    figures = [
        len(cases),
        *(counts[word] for word in WORDS),
        sum(case.failed for case in cases),
        round(seconds),
    ]
    about = " ".join(GROUPS[name].__doc__.split())  # a row of the table is one line
    return f"| {name}: {about} | " + " | ".join(map(str, figures)) + " |"


if __name__ == "__main__":
    sys.exit(main())
