"""Memory by the row: what a corpus of a million must not multiply.    python -m pytest
tests/test_scale.py
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import dataset
import frontends
import generate_score
import preprocess
from benchmarks import bench_scale, scale
from dataset import Trial
from formats import audio, protocols
from formats.feature_cache import CacheWriter, FeatureCache

ROWS = 40_000
SHAPE = bench_scale.SHAPE


def peak_a_row(work: Callable[[], object]) -> float:
    """The most that a piece of work and its result hold at any time, in bytes a row."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / ROWS
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    bench_scale.make_protocols(folder, ROWS)
    return folder


@pytest.fixture(scope="module")
def trials(corpus: Path) -> list[Trial]:
    return dataset.read_protocol("codecfake", corpus, "train")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short clips, decoded in this process: torch's loader takes minutes under tracemalloc."""

    def clip_batches(
        paths: list[str], batches: list, num_workers: int
    ) -> Iterator[dataset.ClipBatch]:
        clips = dataset._Clips(paths, num_workers)
        return (clips.__getitems__(batch) for batch in batches)

    monkeypatch.setattr(dataset, "clip_batches", clip_batches)
    monkeypatch.setattr(dataset, "CLIP_SAMPLES", bench_scale.CLIP_SAMPLES)
    monkeypatch.setattr(audio, "load_recording", bench_scale.stand_in_clip)
    monkeypatch.setattr(frontends, "load_frontend", lambda *names: bench_scale.CheapFrontEnd())


# Each bound is a quarter to a half above what was measured, which stands beside it.


def test_reading_a_protocol(corpus: Path) -> None:
    assert peak_a_row(lambda: dataset.read_protocol("codecfake", corpus, "train")) < 400  # 270


def test_looking_for_missing_files(trials: list[Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    listing = {bench_scale.codecfake_name(row) for row in range(ROWS)}
    monkeypatch.setattr(protocols, "files_with_content", lambda folder: listing)
    assert peak_a_row(lambda: protocols.find_missing(trials)) < 100  # 66
    assert protocols.find_missing(trials) == []


def test_laying_out_a_cache(tmp_path: Path, trials: list[Trial]) -> None:
    assert peak_a_row(lambda: CacheWriter(tmp_path, trials, {"feat": "mel"}, SHAPE)) < 160  # 108


def test_extracting_and_opening_a_cache(
    tmp_path: Path, trials: list[Trial], stand_ins: None
) -> None:
    """Rows are written, marked and forgotten; an open cache holds names and labels once."""
    writer = CacheWriter(tmp_path, trials, {"feat": "mel"}, SHAPE)
    args = argparse.Namespace(
        task="codecfake", batch_size=128, max_failed=0, num_workers=0, precision="fp32"
    )
    assert (
        peak_a_row(
            lambda: preprocess.extract(
                args, "train", writer, bench_scale.CheapFrontEnd(), set(), torch.device("cpu")
            )
        )
        < 280
    )  # 160 to 250, by numpy's version
    writer.close()
    assert peak_a_row(lambda: FeatureCache(tmp_path)) < 250  # 207
    assert len(FeatureCache(tmp_path).names) == ROWS


def test_the_order_of_an_epoch() -> None:
    assert peak_a_row(lambda: dataset.shuffled_batches([ROWS], 128, 0, 1)) < 38  # 25


def test_scoring(trials: list[Trial], stand_ins: None) -> None:
    """Logits are kept for each distinct clip, the clips themselves are not."""
    scorer = generate_score.Scorer(
        argparse.Namespace(gpu=-1, precision="fp32", batch_size=128, ssl=None),
        {"cheap": bench_scale.CheapHead()},
    )
    computed = []
    scorer.logits = lambda clips, plainly=scorer.logits: (
        computed.append(len(clips)) or plainly(clips)
    )
    assert (
        peak_a_row(lambda: next(scorer.score_files({"train": [trial.path for trial in trials]}, 0)))
        < 300
    )  # 239
    assert sum(computed) == ROWS


# ── scale.py ──


def test_the_figures_of_the_whole_job() -> None:
    """Added up by hand from the corpora's published sizes."""
    codecfake, la, training, scoring = scale.jobs()
    assert (codecfake.decoded, codecfake.front_end, codecfake.written) == (
        833_343,
        833_343,
        833_343,
    ) and la.written == 50_224
    assert (training.trained, training.head, training.read, training.decoded) == (
        7_407_470,
        925_960,
        8_333_430,
        0,
    )
    assert (scoring.decoded, scoring.front_end, scoring.head, scoring.written) == (
        474_869,
        408_729,
        408_729,
        0,
    )
    assert scale.disk_bytes(10) == {
        "reference": 8_247_740,
        "float16": 4_116_480,
        "float32": 8_232_960,
        "affine8": 2_140_160,
        "sqrt8": 2_066_280,
    }


def test_hours_are_those_of_the_slowest_resource() -> None:
    """360,000 clips: decoded at 2 x 50 a second in 1 h, computed at 50 in 2 h, 400 kB each written
    at 10 MB/s in 4 h.
    """
    job = scale.Job("", decoded=360_000, front_end=360_000, written=360_000)
    machine = scale.Machine(
        "",
        cores=2,
        decode=50,
        rows=1,
        front_end=50,
        head=1,
        train=1,
        disk=10e6,
        one_processor=False,
    )
    busy = scale.seconds(job, machine, row_bytes=300_000, audio_bytes=100_000)
    assert busy == {"decode": 3600, "compute": 7200, "disk": 14_400} and scale.hours(
        busy, machine
    ) == (4, "disk")
    faster = dataclasses.replace(machine, disk=100e6)
    assert scale.hours(scale.seconds(job, faster, 300_000, 100_000), faster) == (2, "compute")
    shared = dataclasses.replace(faster, one_processor=True)
    assert scale.hours(scale.seconds(job, shared, 300_000, 100_000), shared) == (3, "compute")
    training = scale.Job("", read=7_200, trained=3_600, head=3_600)
    slow = dataclasses.replace(machine, rows=0.5, train=4, head=2, disk=1e9)
    assert scale.seconds(training, slow, 1e6, 0) == {"decode": 7200, "compute": 2700, "disk": 7.2}


def test_the_estimate_for_gpus_follows_its_assumptions(tmp_path: Path) -> None:
    """1 TFLOP/s at half its peak: 10 clips a second of 50 GFLOP; eight GPUs, eight times; training
    takes three forwards.
    """
    given = {
        "front_end": 1,
        "head": 1,
        "train": 1,
        "decode": 100,
        "rows": 100,
        "front_end_gflop": 50,
        "head_gflop": 5,
        "gpu_tflops": 1,
        "front_end_share": 0.5,
        "head_share": 0.03,
        "gpu_cores": 4,
    }
    options = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    args = scale.get_parser().parse_args(options)
    here = scale.Machine("", 2, 100, 100, 1, 1, 1, 1e9, one_processor=True)
    one, eight = scale.on_gpus(1, here, args), scale.on_gpus(8, here, args)
    assert (one.front_end, one.head, one.train, one.cores) == pytest.approx((10, 6, 2, 4))
    assert (eight.front_end, eight.head, eight.train, eight.cores, eight.disk) == pytest.approx(
        (80, 48, 16, 32, 1e9)
    )
    scale.main([*options, "-o", str(tmp_path / "SCALE.md")])
    text = (tmp_path / "SCALE.md").read_text()
    assert "| 23.1 h, compute | 2.89 h, compute |" in text, (
        text
    )  # 833,343 clips at 10 and at 80 a second
    assert (
        "an estimate, not measured" in text
        and "| Codecfake train: 740,747 | 610.9 | 304.9 | 609.9 | 158.5 | 153.1 |" in text
    )
