"""Slips of a user's: wrong folders, wrong weights, little space. All is known before the hours."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import make_codecfake, save_wav2vec2
from test_pipeline import CPU, run

import dataset
import main_train
import preprocess
from formats.feature_cache import FeatureCache
from runtime.cli import InputError

TRAIN = ["--feat", "mel", "-m", "lcnn", "--num_epochs", 1, *CPU]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """Mel features of both corpora, in Codecfake/ and LA/."""
    root = tmp_path_factory.mktemp("features")
    run(preprocess, "-d", corpora / "Codecfake", "-f", root / "Codecfake", "--feat", "mel", *CPU)
    run(preprocess, "-t", "19LA", "-d", corpora / "LA", "-f", root / "LA", "--feat", "mel", *CPU)
    return root


# ── A cache knows its corpus ──


def test_19las_features_may_be_given_as_f(features: Path, tmp_path: Path) -> None:
    """preprocess.py wrote them to -f in the fixture."""
    run(main_train, "-t", "19LA", "-f", features / "LA", "-o", tmp_path / "head", *TRAIN)


@pytest.mark.parametrize("task, folder", [("19LA", "Codecfake"), ("codecfake", "LA")])
@pytest.mark.parametrize("recorded", [True, False])
def test_the_features_of_another_corpus_are_refused(
    features: Path, tmp_path: Path, task: str, folder: str, recorded: bool, monkeypatch
) -> None:
    if not recorded:  # as in older caches: the names tell
        opened = dataset.open_features
        monkeypatch.setattr(dataset, "open_features", lambda *given: without_task(opened(*given)))
    with pytest.raises(InputError, match=f"expected the features of {task}, it holds those of"):
        run(main_train, "-t", task, "-f", features / folder, "-o", tmp_path / "head", *TRAIN)
    assert not (tmp_path / "head").exists()


def without_task(cache: FeatureCache) -> FeatureCache:
    del cache.about["task"]
    return cache


def test_folders_that_are_swapped_are_put_right(features: Path, capsys) -> None:
    given = [
        "-t",
        "co-train",
        "-f",
        features / "LA",
        "-f1",
        features / "Codecfake",
        "--feat",
        "mel",
    ]
    args = main_train.parse(list(map(str, given)))
    train, _ = main_train.open_corpora(args)
    assert [store.about["task"] for store in train.parts] == ["codecfake", "19LA"]
    assert "note: -f holds 19LA's features" in capsys.readouterr().out


def test_one_corpus_is_not_written_over_another(features: Path, corpora: Path) -> None:
    with pytest.raises(InputError, match="holds a cache with the features of codecfake, this run"):
        run(preprocess, "-t", "19LA", "-d", corpora / "LA", "-f1", features / "Codecfake",
            "--feat", "mel", *CPU)  # fmt: skip


# ── Before the hours ──


def test_devs_old_cache_is_looked_at_before_train_is_extracted(
    features: Path, corpora: Path, tmp_path: Path
) -> None:
    shutil.copytree(features / "Codecfake" / "dev", tmp_path / "dev")
    with pytest.raises(InputError, match="dev/mel: holds a cache with dtype 'float16'"):
        run(preprocess, "-d", corpora / "Codecfake", "-f", tmp_path, "--feat", "mel",
            "--dtype", "float32", *CPU)  # fmt: skip
    assert not (tmp_path / "train").exists()


def test_space_for_both_parts_is_looked_at(corpora: Path, tmp_path: Path, monkeypatch) -> None:
    bytes_of_train = 12 * 505 * 80 * 2
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(bytes_of_train + 1000))
    with pytest.raises(InputError, match="train and dev need .* free some space"):
        run(preprocess, "-d", corpora / "Codecfake", "-f", tmp_path / "f", "--feat", "mel", *CPU)
    assert not (tmp_path / "f").exists()


def test_hidden_states_that_no_head_takes_are_refused(
    corpora: Path, tmp_path: Path, ssl_narrow: Path
) -> None:
    command = ["-d", corpora / "Codecfake", "-f", tmp_path / "f", "--ssl", ssl_narrow, *CPU]
    with pytest.raises(InputError, match="hidden states have 32 values, the heads here take 1024"):
        run(preprocess, *command)
    assert not (tmp_path / "f").exists()


# ── No cache without rows stands in the way ──


def test_a_refused_run_leaves_no_cache(tmp_path: Path) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=1)
    for path in (root / "train").iterdir():
        path.write_text("not audio")
    with pytest.raises(InputError, match="cannot be read, more than --max_failed"):
        run(preprocess, "-d", root, "-f", tmp_path / "f", "--feat", "mel", *CPU)
    assert os.listdir(tmp_path / "f/train/mel") == [".lock"]


def test_a_cache_without_rows_gives_way_to_other_weights(
    corpora: Path, tmp_path: Path, ssl_narrow: Path, monkeypatch
) -> None:
    other = save_wav2vec2(tmp_path / "other", hidden_size=32, num_conv_pos_embeddings=8)
    command = ["-d", corpora / "Codecfake", "-f", tmp_path / "f", "--any_size", *CPU]

    def kill(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preprocess, "extract", kill)
        patched.setattr(preprocess.feature_cache, "remove", lambda folder: None)
        with pytest.raises(KeyboardInterrupt):
            run(preprocess, *command, "--ssl", other)
    before = json.loads((tmp_path / "f/train/xls-r-5/cache.json").read_text())
    run(preprocess, *command, "--ssl", ssl_narrow)
    after = json.loads((tmp_path / "f/train/xls-r-5/cache.json").read_text())
    assert before["front_end"] != after["front_end"]
    assert len(FeatureCache(tmp_path / "f/train/xls-r-5").labels) == 12


# ── Complete means whole ──


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 99)])
def test_shards_are_looked_at_before_a_cache_is_complete(
    features: Path, corpora: Path, tmp_path: Path, damage
) -> None:
    shutil.copytree(features / "Codecfake", tmp_path / "f")
    damage(tmp_path / "f/train/mel/features_00000.npy")
    with pytest.raises(InputError, match=r"features_00000.npy: (missing|damaged).*--repair"):
        run(preprocess, "-d", corpora / "Codecfake", "-f", tmp_path / "f", "--feat", "mel", *CPU)
    with pytest.raises(InputError, match=r"features_00000.npy: (missing|damaged).*--repair"):
        run(main_train, "-t", "codecfake", "-f", tmp_path / "f", "-o", tmp_path / "head", *TRAIN)


# ── Files that cannot be read ──


def test_skip_missing_covers_unreadable_files(tmp_path: Path) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=2)
    for name in ("strain_000.wav", "F01_strain_000.wav"):
        (root / "train" / name).write_text("not audio")
    (root / "train/strain_001.wav").unlink()
    command = ["-d", root, "-f", tmp_path / "f", "--feat", "mel", *CPU]
    run(preprocess, *command, "--skip_missing")
    assert len(FeatureCache(tmp_path / "f/train/mel").labels) == 3


def test_none_of_the_files_can_be_read(tmp_path: Path) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=1)
    for path in (root / "train").iterdir():
        path.write_text("not audio")
    with pytest.raises(InputError, match="none of its 3 files can be read; the last: "):
        run(preprocess, "-d", root, "-f", tmp_path / "f", "--feat", "mel", "--skip_missing", *CPU)
    assert os.listdir(tmp_path / "f/train/mel") == [".lock"]


def test_the_cache_records_what_ffmpeg_decoded(tmp_path: Path) -> None:
    """Also across a repair, which reads a file a second time."""
    root = make_codecfake(tmp_path / "Codecfake", n_real=2)
    path = root / "train/strain_001.wav"
    write_m4a(path)
    command = ["-d", root, "-f", tmp_path / "f", "--feat", "mel", *CPU]
    run(preprocess, *command)
    cache = tmp_path / "f/train/mel"
    assert (cache / "ffmpeg.txt").read_text() == "strain_001.wav\n"
    assert not (tmp_path / "f/dev/mel/ffmpeg.txt").exists()
    with open(cache / "features_00000.npy", "r+b") as shard:
        shard.seek(128)
        shard.write(b"damage" * 100_000)
    run(preprocess, *command, "--verify", "--repair")
    assert (cache / "ffmpeg.txt").read_text() == "strain_001.wav\n"


def write_m4a(path: Path) -> None:
    """AAC in MP4, under whatever name: half a second of a tone."""
    samples = np.sin(np.arange(8_000) / 10).astype(np.float32)[None] / 2
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = 16_000
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
