"""Memory by the row: what a corpus of a million must not multiply.    python -m pytest tests/test_scale.py"""
from __future__ import annotations

import argparse
import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
import generate_score
import model
import preprocess
from conftest import REPO
from dataset import Trial
from feature_cache import CacheWriter, FeatureCache

sys.path.insert(0, str(REPO / "benchmarks"))

import bench_scale

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
    def clip_batches(paths: list[str], batches: list, num_workers: int) -> Iterator[dataset.ClipBatch]:
        clips = dataset._Clips(paths, num_workers)
        return (clips.__getitems__(batch) for batch in batches)
    monkeypatch.setattr(dataset, "clip_batches", clip_batches)
    monkeypatch.setattr(dataset, "CLIP_SAMPLES", bench_scale.CLIP_SAMPLES)
    monkeypatch.setattr(dataset, "_load_clip", bench_scale.stand_in_clip)
    monkeypatch.setattr(model, "load_frontend", lambda *names: bench_scale.CheapFrontEnd())


# Each bound is a quarter to a half above what was measured, which stands beside it.


def test_reading_a_protocol(corpus: Path) -> None:
    assert peak_a_row(lambda: dataset.read_protocol("codecfake", corpus, "train")) < 400          # 270


def test_looking_for_missing_files(trials: list[Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    listing = [bench_scale.codecfake_name(row) for row in range(ROWS)]
    monkeypatch.setattr(dataset.os, "listdir", lambda folder: listing)
    assert peak_a_row(lambda: dataset.find_missing(trials)) < 100             # 66
    assert dataset.find_missing(trials) == []


def test_laying_out_a_cache(tmp_path: Path, trials: list[Trial]) -> None:
    assert peak_a_row(lambda: CacheWriter(tmp_path, trials, {"feat": "mel"}, SHAPE)) < 160         # 108


def test_extracting_and_opening_a_cache(tmp_path: Path, trials: list[Trial], stand_ins: None) -> None:
    """Rows are written, marked and forgotten; a cache that is opened holds names and labels once."""
    writer = CacheWriter(tmp_path, trials, {"feat": "mel"}, SHAPE)
    args = argparse.Namespace(task="codecfake", batch_size=128, max_failed=0, num_workers=0, precision="fp32")
    assert peak_a_row(lambda: preprocess.extract(args, "train", writer, bench_scale.CheapFrontEnd(), set(), torch.device("cpu"))) < 240    # 160
    writer.close()
    assert peak_a_row(lambda: FeatureCache(tmp_path)) < 310           # 207
    assert len(FeatureCache(tmp_path).names) == ROWS


def test_the_order_of_an_epoch() -> None:
    assert peak_a_row(lambda: dataset.shuffled_batches([ROWS], 128, 0, 1)) < 38        # 25


def test_scoring(trials: list[Trial], stand_ins: None) -> None:
    """Logits are kept for each distinct clip, the clips themselves are not."""
    scorer = generate_score.Scorer(argparse.Namespace(gpu=-1, precision="fp32", batch_size=128, ssl=None), {"cheap": bench_scale.CheapHead()})
    known: dict[bytes, np.ndarray] = {}
    assert peak_a_row(lambda: scorer.score_files([trial.path for trial in trials], 0, known, "train")) < 300       # 239
    assert len(known) == ROWS
