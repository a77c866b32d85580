"""Memory by the row: what a corpus of a million must not multiply.    python -m pytest
tests/test_scale.py
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import dataset
import frontends
import generate_score
import preprocess
from benchmarks import bench_scale, estimates, scale
from dataset import Trial
from formats import audio, protocols
from formats.feature_cache import CacheWriter, FeatureCache
from runtime.cli import InputError

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
        paths: list[str], batches: list, num_workers: int, with_digests: bool = False
    ) -> Iterator[dataset.ClipBatch]:
        clips = dataset._Clips(paths, num_workers, with_digests=with_digests)
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
        task="codecfake",
        batch_size=128,
        max_failed=0,
        skip_missing=False,
        num_workers=0,
        precision="fp32",
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
    scorer.start = lambda clips, plainly=scorer.start: computed.append(len(clips)) or plainly(clips)
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


def machine(**changes: float) -> scale.Machine:
    """One that does all at once but for what is named."""
    rates = ("decode", "main", "front_end", "head", "train", "write", "read", "copy", "disk")
    return scale.Machine("", **dict.fromkeys(rates, float("inf")) | changes)


def test_hours_are_those_of_the_slowest_resource() -> None:
    """360,000 clips: decoded at 100 a second in 1 h, computed at 50 in 2 h, 400 kB each read and
    written at 10 MB/s in 4 h.
    """
    job = scale.Job("", decoded=360_000, front_end=360_000, written=360_000)
    slow = machine(decode=100, front_end=50, disk=10e6)
    busy = scale.seconds(job, slow, row_bytes=300_000, audio_bytes=100_000)
    assert {name: value for name, value in busy.items() if value} == {
        "decoding": 3600,
        "front end": 7200,
        "disk": 14_400,
    }
    assert scale.hours(busy, slow) == (4, "disk")
    for changes, expected in (
        ({"disk": 100e6}, (2, "front end")),
        ({"disk": 100e6, "one_processor": True}, (3, "front end")),
        ({"disk": 100e6, "write": 40}, (2.5, "writer")),
        ({"disk": 100e6, "main": 25}, (4, "main thread")),
        ({"disk": 100e6, "copy": 5.584e6}, (10, "copies")),  # 258,400 a clip and 300,000
    ):
        other = dataclasses.replace(slow, **changes)
        assert scale.hours(scale.seconds(job, other, 300_000, 100_000), other) == expected
    training = scale.Job("", read=7_200, trained=3_600, head=3_600)
    busy = scale.seconds(training, machine(read=0.5, train=4, head=2, disk=1e9), 1e6, 0)
    assert (busy["readers"], busy["head"], busy["disk"]) == (14_400, 2700, 7.2)


def test_without_a_cache_the_front_end_must_outrun_the_disk() -> None:
    """D = 2,000 rows/s, T = 6,000 clips/s: 1 / (1/2,000 - 1/6,000) = 3,000."""
    slow = machine(disk=2_000 * 400_000, train=6_000)
    assert scale.fastest_without_cache(slow, 400_000) == pytest.approx(3_000)
    assert scale.fastest_without_cache(machine(train=6_000), 400_000) is None
    online = scale.online_job()
    assert (online.front_end, online.trained, online.written, online.read) == (
        8_333_430,
        7_407_470,
        0,
        0,
    )


GIVEN = {
    "front_end": 2,
    "head": 60,
    "train": 20,
    "decode": 1_000,
    "pad": 10_000,
    "write": 2_000,
    "rows": 5_000,
}
OPTIONS = [word for name, value in GIVEN.items() for word in (f"--{name}", str(value))]


def test_gpus_share_everything_but_a_training_step() -> None:
    args = scale.get_parser().parse_args([*OPTIONS, "--step_ms", "12.8"])
    one = scale.with_gpu(scale.estimated("H100"), "bf16", 1, args)
    eight = scale.with_gpus(8, one, args)
    assert (one.front_end, one.write, one.disk) == (6_300, 2_000, 1e9)
    assert (one.decode, one.read) == (14_000, 40_000)
    assert one.main == pytest.approx(1 / (1e-4 + 1.4e-3 / 32))
    assert (eight.front_end, eight.write, eight.disk) == (50_400, 16_000, 1e9)
    assert eight.train == pytest.approx(10_000)  # 128 clips in 12.8 ms
    assert one.train == pytest.approx(
        estimates.training_rate(estimates.CARDS["H100"], estimates.HEADS["W2VAASIST"], "bf16")
    )


def test_the_page_says_what_is_measured_and_what_estimated(tmp_path: Path) -> None:
    results = {
        "Machine": {"name": {"value": "NVIDIA A100-SXM4-80GB"}},
        "Front end": {f"{name}, 32": {"clips/s": 1_000} for name in ("fp32", "tf32", "bf16 fused")},
        "Training steps": {f"W2VAASIST, {name}": {"clips/s": 3_000} for name in scale.PRECISIONS},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = tmp_path / "SCALE.md"
    scale.main([*OPTIONS, "--gpu_results", str(tmp_path / "results.json"), "-o", str(page)])
    text = page.read_text()
    assert "| A100-SXM4-80GB: front end, clips/s | 1,000 | 1,000 | 1,000 | measured |" in text
    assert "| H100: front end, clips/s | 930 | 3,100 | 6,300 | est |" in text
    assert "| 1 RTX 4090 | est | bf16 |" in text
    assert "| 1 A100-SXM4-80GB | measured | bf16 |" in text
    assert "| Codecfake train: 740,747 | 610.9 | 304.9 | 609.9 | 158.5 | 153.1 |" in text
    # 833,343 clips: at 930/s 0.249 h, at 3,100/s less than the disk's 0.125 h
    row = "extraction, Codecfake train + dev; disk 1 GB/s | 0.249 h, front end | 0.125 h, disk"
    assert row in text, text
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match="results.json: expected .* without 'Training steps'"):
        scale.read_results(tmp_path / "results.json")
