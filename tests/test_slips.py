"""Slips of a user's: wrong folders, wrong weights, little space. All is known before the hours."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import make_codecfake, make_la, save_wav2vec2, write_tone
from test_pipeline import CPU, run

import dataset
import evaluate_score
import generate_score
import main_train
import model
import preprocess
from formats import protocols
from formats.feature_cache import FeatureCache
from runtime import cli, devices
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


# ── Layouts one level off ──


def test_audio_that_lies_a_folder_deeper_is_found(tmp_path: Path) -> None:
    """In real/ and fake/, in a folder of the subset's own name, and with .WAV."""
    root = make_codecfake(tmp_path / "Codecfake", n_real=2)
    for path in list((root / "train").iterdir()):
        kind = "fake" if path.name.startswith("F") else "real"
        (root / "train" / kind).mkdir(exist_ok=True)
        path.rename(root / "train" / kind / path.name)
    (root / "test/C1").rename(root / "test/inner")
    (root / "test/C1").mkdir()
    (root / "test/inner").rename(root / "test/C1/C1")
    for path in list((root / "test/C2").iterdir()):
        path.rename(path.with_suffix(".WAV"))
    for part in ("train", "C1", "C2"):
        trials = protocols.read_protocol("codecfake", root, part)
        assert protocols.find_missing(trials) == []
        assert all(trial.name.endswith(".wav") for trial in trials)


def test_19la_as_wav_is_found(tmp_path: Path) -> None:
    root = make_la(tmp_path / "LA", n_real=1)
    for path in list((root / "ASVspoof2019_LA_eval/flac").iterdir()):
        path.rename(path.with_suffix(".wav"))
    trials = protocols.read_protocol("19LA", root, "eval")
    assert protocols.find_missing(trials) == []


def test_two_files_of_one_name_are_not_guessed_between(tmp_path: Path) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=1)
    path = root / "test/C1/s_000.wav"
    for folder in ("a", "b"):
        (root / "test/C1" / folder).mkdir()
        shutil.copy(path, root / "test/C1" / folder)
    path.unlink()
    trials = protocols.read_protocol("codecfake", root, "C1")
    assert [trial.name for trial in protocols.find_missing(trials)] == ["s_000.wav"]


def test_the_hint_says_where_a_file_lies(tmp_path: Path) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=1)
    (root / "elsewhere").mkdir()
    (root / "train/strain_000.wav").rename(root / "elsewhere/strain_000.wav")
    with pytest.raises(InputError, match=r"\(first: strain_000.wav\); .*/elsewhere/strain_000.wav"):
        run(preprocess, "-d", root, "-f", tmp_path / "f", "--feat", "mel", *CPU)


# ── Text in other encodings ──


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path: Path, encoding: str) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=1)
    protocol = root / "label/train.txt"
    protocol.write_bytes(protocol.read_text().encode(encoding))
    with pytest.raises(InputError, match="label/train.txt: expected UTF-8, this looks like UTF-16"):
        protocols.read_protocol("codecfake", root, "train")
    scores = tmp_path / "scores.txt"
    scores.write_bytes("a 0.5 real\nb 0.1 fake\n".encode(encoding))
    for options in (["--scores", scores], ["--scores", protocol, "--labels", scores]):
        with pytest.raises(InputError, match="expected UTF-8, this looks like UTF-16"):
            run(evaluate_score, *options)


def test_a_folder_without_permission_is_called_that(tmp_path: Path, monkeypatch) -> None:
    write_tone(tmp_path / "a.wav")

    class Entry:
        name = "a.wav"

        def stat(self) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "a.wav")

    with pytest.raises(PermissionError):
        protocols._has_content(Entry())


# ── Places that cannot be written ──


@pytest.mark.parametrize(
    "option, path, message",
    [
        ("--plot", "none/det.png", "there is no folder .*none"),
        ("--plot", "folder.png", "expected the name of a file, this is a folder"),
        ("--det_points", "none/det.csv", "there is no folder .*none"),
        ("--report", "file/report", "expected a folder, this is a file"),
        ("--export_arena", "file", "expected a folder, this is a file"),
    ],
)
def test_places_are_looked_at_before_anything_is_read(
    tmp_path: Path, option: str, path: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=message):
        run(evaluate_score, "--scores", tmp_path / "no_scores.txt", option, tmp_path / path)


# ── How to go on ──


def test_the_advice_is_the_command_that_works(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_go_on", "run the same command again")
    full = OSError(errno.ENOSPC, "No space left on device", "x")
    assert cli.describe(full).endswith("free some space, then run the same command again")
    command = ["-t", "codecfake", "-f", features / "Codecfake", "-o", tmp_path / "head", *TRAIN]
    run(main_train, *command)
    assert "run the same command with --continue_training to go on" in cli.describe(full)
    run(main_train, *command, "--continue_training")
    assert "run the same command to go on" in cli.describe(full)


# ── A GPU that torch cannot use ──


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040).")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "_has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    devices.warn_of_cpu(None, 1e6)
    line = capsys.readouterr().out
    assert line.startswith("WARNING: no usable GPU (The NVIDIA driver on your system is too old (f")
    assert re.search(r"on the CPU, about [\d.e+]+ h; --gpu -1 silences this\n$", line)
    devices.warn_of_cpu(-1, 1e6)
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"--gpu 0: expected one of the 0 GPUs .*too old"):
        devices.pick_device(0)


# ── A person's own recordings ──


def test_what_is_not_judged_gets_no_score(tmp_path: Path, capsys) -> None:
    model.save_head(tmp_path / model.WEIGHTS, model.LCNN("mel"), {})
    write_tone(tmp_path / "sound.wav")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    run(generate_score, "-t", "audio", "--path", tmp_path / "sound.wav", tmp_path / "silent.wav",
        "--model_folder", tmp_path, "--result_folder", tmp_path / "r", *CPU)  # fmt: skip
    assert "nothing to judge: its first 4.04 s are silent" in capsys.readouterr().out
    lines = (tmp_path / "r/audio_result.txt").read_text().splitlines()
    assert len(lines) == 1 and "sound.wav" in lines[0]


def test_weights_without_a_record_are_said_to_be_unchecked(
    tmp_path: Path, ssl_1024: Path, capsys
) -> None:
    torch.save(model.W2VAASIST().state_dict(), tmp_path / model.WEIGHTS)
    args = generate_score.parse(["-t", "ITW", "--ssl", str(ssl_1024), *CPU])
    generate_score.Scorer(args, {"theirs": model.load_head(tmp_path)})
    assert "note: theirs: these weights do not record their front end" in capsys.readouterr().out


# ── Memory of a GPU ──


@pytest.mark.parametrize("gigabytes, size", [(4, 8), (8, 32), (24, 32), (80, 128)])
def test_a_gpus_memory_decides_the_batch(gigabytes: int, size: int, monkeypatch) -> None:
    card = namedtuple("card", "total_memory")(gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert devices.clips_a_batch(torch.device("cuda:0")) == size
    assert devices.clips_a_batch(torch.device("cpu")) == 8
