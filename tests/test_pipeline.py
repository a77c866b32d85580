"""The command lines, one after another, on small corpora.

python -m pytest tests/test_pipeline.py
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import REPO, make_codecfake, make_la, write_tone

import dataset
import evaluate_score
import generate_score
import main_train
import model
import preprocess
from dataset import FEATURE_SHAPES, Trial
from formats import partial_scores
from formats.feature_cache import CacheWriter, FeatureCache
from formats.score_files import read_scores
from runtime import files
from runtime.cli import InputError

CPU = ["--gpu", "-1", "--num_workers", "1"]
PAIRS = [("mel", "lcnn"), ("xls-r-5", "lcnn"), ("xls-r-5", "W2VAASIST")]


def run(module, *arguments: object) -> None:
    module.main([str(argument) for argument in arguments])


def shell(*arguments: object, cwd: Path = REPO) -> subprocess.CompletedProcess:
    """A command as a user types it."""
    script, *rest = map(str, arguments)
    return subprocess.run(
        [sys.executable, REPO / script, *rest], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def assert_refused(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr and re.search(message, result.stderr), result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1


@pytest.fixture(scope="module")
def head_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Mel-LCNN: enough for everything but the quality of its scores."""
    folder = tmp_path_factory.mktemp("models") / "untrained"
    folder.mkdir()
    torch.manual_seed(0)
    model.save_head(
        folder / model.WEIGHTS, model.LCNN("mel"), {"feat": "mel", "train_task": "codecfake"}
    )
    return folder


# ── All together ──


@pytest.mark.parametrize("feat, head", PAIRS)
def test_the_four_scripts(
    corpora: Path,
    ssl_1024: Path,
    tmp_path: Path,
    feat: str,
    head: str,
    capsys: pytest.CaptureFixture,
) -> None:
    front_end = ["--feat", feat, "--ssl", ssl_1024]
    run(preprocess, "-d", corpora / "Codecfake", "-f", tmp_path / "f", *front_end, *CPU)
    run(preprocess, "-t", "19LA", "-d", corpora / "LA", "-f1", tmp_path / "f1", *front_end, *CPU)
    run(
        main_train,
        "-t",
        "co-train",
        "-m",
        head,
        "--feat",
        feat,
        "-f",
        tmp_path / "f",
        "-f1",
        tmp_path / "f1",
        "-o",
        tmp_path / "model",
        "--CSAM",
        "--num_epochs",
        1,
        "--batch_size",
        8,
        "-d",
        corpora,
        "--ssl",
        ssl_1024,
        *CPU,
    )
    for task, folder in (("19LA", "LA"), ("ITW", "ITW"), ("codecfake", "Codecfake")):
        run(
            generate_score,
            "-t",
            task,
            "-d",
            corpora / folder,
            "--model_folder",
            tmp_path / "model",
            "--result_folder",
            tmp_path / "result",
            *CPU,
        )
    capsys.readouterr()
    run(evaluate_score, "--result_folder", tmp_path / "result", "--format", "json", "--no_ci")
    cells = {cell["subset"]: cell for cell in json.loads(capsys.readouterr().out)}
    assert set(cells) >= {"19LA", "ITW", *(f"C{k}" for k in range(1, 8)), "A1", "A2", "A3"}
    assert all(0 <= cells[subset]["eer_percent"] <= 100 for subset in ("19LA", "ITW", "C1", "A3"))
    assert (cells["C1"]["n_real"], cells["C1"]["n_fake"], cells["19LA"]["n_real"]) == (4, 4, 4)


@pytest.fixture(scope="module")
def random_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("random")
    for corpus, rows in (("Codecfake", 2), ("LA", 2)):
        for part, feat in ((part, feat) for part in ("train", "dev") for feat in FEATURE_SHAPES):
            count = rows if part == "train" else 2
            writer = CacheWriter(
                root / corpus / part / feat,
                [Trial(f"{i}", "", i % 2, "-") for i in range(count)],
                {"feat": feat},
                FEATURE_SHAPES[feat],
            )
            writer.write(
                range(count),
                np.random.default_rng(count).random((count, *FEATURE_SHAPES[feat]), np.float32),
            )
            writer.close()
    return root


@pytest.mark.parametrize("feat, head", PAIRS)
@pytest.mark.parametrize(
    "task, optimiser",
    [
        *(
            (task, optimiser)
            for task in ("19LA", "codecfake", "co-train")
            for optimiser in (None, "--SAM", "--ASAM")
        ),
        ("co-train", "--CSAM"),
    ],
)
def test_every_task_head_and_optimiser_trains(
    random_features: Path, tmp_path: Path, feat: str, head: str, task: str, optimiser: str | None
) -> None:
    run(
        main_train,
        "-t",
        task,
        "-m",
        head,
        "--feat",
        feat,
        "-f",
        random_features / "Codecfake",
        "-f1",
        random_features / "LA",
        "-o",
        tmp_path / "model",
        "--num_epochs",
        1,
        "--batch_size",
        4,
        *([optimiser] if optimiser else []),
        *CPU,
    )
    assert model.load_head(tmp_path / "model").feat == feat


def test_the_references_own_features_train(tmp_path: Path, corpora: Path) -> None:
    """The same clips as .pt files and as our cache train to the same weights (a float32 cache:
    theirs are float32).
    """
    run(
        preprocess,
        "-d",
        corpora / "Codecfake",
        "-f",
        tmp_path / "ours",
        "--feat",
        "mel",
        "--dtype",
        "float32",
        *CPU,
    )
    for part in ("train", "dev"):
        (tmp_path / "theirs" / part / "mel").mkdir(parents=True)
        cache = FeatureCache(tmp_path / "ours" / part / "mel")
        for row, (name, label) in enumerate(zip(cache.names, cache.labels, strict=True)):
            feature = cache.read(np.array([row]))[0].transpose(1, 2).contiguous()
            torch.save(
                feature,
                tmp_path
                / "theirs"
                / part
                / "mel"
                / f"{row:06d}_{name}_{'fake' if label else 'real'}.pt",
            )
    for folder in ("ours", "theirs"):
        run(
            main_train,
            "-t",
            "codecfake",
            "-m",
            "lcnn",
            "--feat",
            "mel",
            "-f",
            tmp_path / folder,
            "-o",
            tmp_path / "model" / folder,
            "--num_epochs",
            1,
            "--batch_size",
            8,
            *CPU,
        )
    states = [
        model.load_head(tmp_path / "model" / folder).state_dict() for folder in ("ours", "theirs")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_readmes_commands_with_their_defaults(tmp_path: Path) -> None:
    """Typed in a folder of one's own, with data/ where the README puts it; -t and nothing else."""
    make_codecfake(tmp_path / "data/Codecfake", n_real=2)
    for command in (
        ["preprocess.py", "--feat", "mel"],
        ["main_train.py", "-t", "codecfake", "--feat", "mel", "-m", "lcnn", "--num_epochs", "1"],
        ["generate_score.py", "-t", "codecfake"],
        ["evaluate_score.py"],
    ):
        result = shell(*command, cwd=tmp_path)
        assert result.returncode == 0, (command, result.stderr)
    assert "C7" in result.stdout and "CAVG" in result.stdout
    assert (tmp_path / "models/try/anti-spoofing_feat_model.pt").exists() and (
        tmp_path / "result/A3_result.txt"
    ).exists()


# ── preprocess.py ──


@pytest.mark.parametrize("rate, is_valid", [(16_000, True), (24_000, False)])
def test_caches_of_the_old_resampler_are_taken_over_or_refused(
    tmp_path: Path, rate: int, is_valid: bool
) -> None:
    """Before its resampler was recorded, a cache of a corpus at 16 kHz went through none."""
    corpus = make_codecfake(tmp_path / "Codecfake", n_real=1)
    write_tone(corpus / "train" / "F01_strain_000.wav", rate=rate)
    command = [preprocess, "-d", corpus, "-f", tmp_path / "f", "--feat", "mel", *CPU]
    run(*command)
    record = tmp_path / "f" / "train" / "mel" / "resampler.json"
    assert (json.loads(record.read_text())["resampler"] is None) == is_valid
    record.unlink()
    if is_valid:
        run(*command)
        assert record.exists()
    else:
        with pytest.raises(InputError, match=r"older resampler, and .*F01_strain_000\.wav is at"):
            run(*command)


def test_a_whole_download_is_ready(tmp_path: Path, corpora: Path, capsys) -> None:
    for task, folder in (("codecfake", "Codecfake"), ("19LA", "LA"), ("ITW", "ITW")):
        features = [] if task == "ITW" else ["-f1" if task == "19LA" else "-f", tmp_path]
        options = ["--check", "-t", task, "-d", corpora / folder, *features]
        run(preprocess, *options, "--num_workers", 0)
        assert capsys.readouterr().out.endswith("ready\n")
    assert not any(tmp_path.iterdir())


def test_a_broken_download_is_described(tmp_path: Path, capsys) -> None:
    """A file absent, one unreadable, one that no row names, one at another rate."""
    corpus = make_codecfake(tmp_path / "Codecfake", n_real=1)
    (corpus / "train" / "strain_000.wav").unlink()
    write_tone(corpus / "train" / "surplus.wav")
    (corpus / "test" / "C2" / "F02_s_000.wav").write_text("not audio")
    write_tone(corpus / "test" / "C3" / "F03_s_000.wav", rate=24_000)
    (corpus / "label" / "C5.txt").unlink()
    options = ["--check", "-d", corpus, "-f", tmp_path / "f", "--num_workers", 0, "--all"]
    with pytest.raises(InputError) as refused:
        run(preprocess, *options)
    out = capsys.readouterr().out
    assert "train: 1 real and 2 fake rows (published: 105821 and 634926)" in out
    assert "2 files present, 1 absent, 1 not named" in out
    assert "release V2 (mixed rates)" in out and "24000 Hz: 1" in out
    for problem in ("1 of 3 files", "1 files of C2 cannot be read", "C5 has no protocol"):
        assert problem in str(refused.value)


def test_a3_without_its_real_half_is_whole(tmp_path: Path, capsys) -> None:
    corpus = make_codecfake(tmp_path / "Codecfake", n_real=1)
    for path in (corpus / "test" / "A3").glob("s_*.wav"):
        path.unlink()
    run(preprocess, "--check", "-d", corpus, "-f", tmp_path / "f", "--num_workers", 0)
    out = capsys.readouterr().out
    assert "its real files are not distributed" in out and out.endswith("ready\n")


def test_the_eight_bit_form_is_the_front_ends(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        run(preprocess, "--feat", "mel", "--dtype", "affine8")
    assert "affine8 does not suit mel, whose form is sqrt8" in capsys.readouterr().err


def cache_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_an_interrupted_extraction_ends_in_the_same_bytes(
    corpora: Path, ssl_narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every batch in turn, and resumed: a row's bytes do not depend on which rows
    were left to do.
    """
    command = [
        "-d",
        corpora / "Codecfake",
        "--feat",
        "xls-r-5",
        "--any_size",
        "--ssl",
        ssl_narrow,
        "--batch_size",
        4,
        *CPU,
    ]
    run(preprocess, *command, "-f", tmp_path / "whole")
    monkeypatch.setattr(preprocess, "FLUSH_EVERY", 3)
    real_compute = preprocess.compute
    for _ in range(20):
        calls = iter(range(3))

        def stop_at_the_third(*arguments, calls=calls):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return real_compute(*arguments)

        monkeypatch.setattr(preprocess, "compute", stop_at_the_third)
        try:
            run(preprocess, *command, "-f", tmp_path / "stopped")
            break
        except KeyboardInterrupt:
            continue
    for part in ("train", "dev"):
        assert cache_bytes(tmp_path / "whole" / part / "xls-r-5") == cache_bytes(
            tmp_path / "stopped" / part / "xls-r-5"
        )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_cache_holds_what_the_front_end_gives_each_clip(
    corpora: Path, ssl_narrow: Path, tmp_path: Path, num_workers: int
) -> None:
    """The plain way: one clip at a time, no batches, no worker processes, no half precision."""
    from dataset import load_clip, read_protocol

    run(
        preprocess,
        "-d",
        corpora / "Codecfake",
        "-f",
        tmp_path,
        "--any_size",
        "--ssl",
        ssl_narrow,
        "--dtype",
        "float32",
        "--gpu",
        -1,
        "--num_workers",
        num_workers,
    )
    cache, front_end = (
        FeatureCache(tmp_path / "train/xls-r-5"),
        model.load_frontend("xls-r-5", str(ssl_narrow)),
    )
    trials = read_protocol("codecfake", corpora / "Codecfake", "train")
    assert cache.names == [trial.name for trial in trials]
    with torch.inference_mode():
        for row in (0, 1, 11):
            plain = front_end(load_clip(trials[row].path)[None])
            torch.testing.assert_close(
                cache.read(np.array([row]))[0], plain.clone(), atol=1e-5, rtol=0
            )


def test_verify_and_repair(corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["-d", corpora / "Codecfake", "-f", tmp_path, "--feat", "mel", *CPU]
    with pytest.raises(InputError, match="no feature cache to verify"):
        run(preprocess, *command, "--verify")
    run(preprocess, *command)
    run(preprocess, *command, "--verify")
    whole = cache_bytes(tmp_path / "train/mel")
    for row in (2, 9):
        with open(tmp_path / "train/mel/features_00000.npy", "r+b") as file:
            file.seek(128 + row * 505 * 80 * 2 + 1000)
            file.write(b"\x00damage")
    with pytest.raises(InputError, match="add --repair"):
        run(preprocess, *command, "--verify")
    assert (
        "row 2 (" in (printed := capsys.readouterr().out)
        and "row 9 (" in printed
        and "12 rows, 2 damaged" in printed
    )
    run(preprocess, *command, "--verify", "--repair")
    assert cache_bytes(tmp_path / "train/mel") == whole


def test_bad_files_stop_or_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=4)
    (root / "train/strain_001.wav").write_text("not audio")
    soundfile.write(root / "dev/sdev_000.wav", np.full(100, np.nan), 16_000, subtype="FLOAT")
    command = ["-d", root, "-f", tmp_path / "f", "--feat", "mel", *CPU]
    with pytest.raises(
        InputError,
        match=r"1 of 12 files cannot be read, more than --max_failed 0.1 %; the last: "
        r".*strain_001\.wav: cannot be read",
    ):
        run(preprocess, *command)
    run(preprocess, *command, "--max_failed", 20)
    assert "1 files have no features" in capsys.readouterr().out
    assert "strain_001.wav\t" in (tmp_path / "f/train/mel/failed.txt").read_text()
    assert "sdev_000.wav\t" in (tmp_path / "f/dev/mel/failed.txt").read_text()
    assert len(FeatureCache(tmp_path / "f/train/mel").labels) == 11
    write_tone(root / "train/strain_001.wav")
    run(preprocess, *command, "--max_failed", 20)
    assert (
        len(FeatureCache(tmp_path / "f/train/mel").labels) == 12
        and not (tmp_path / "f/train/mel/failed.txt").exists()
    )


def test_absent_files_stop_unless_allowed(tmp_path: Path) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=3)
    (root / "train/strain_001.wav").unlink()
    command = ["-d", root, "-f", tmp_path / "f", "--feat", "mel", *CPU]
    with pytest.raises(
        InputError,
        match=r"1 of 9 files named by the protocol are not in .*train \(first: strain_001.wav\)",
    ):
        run(preprocess, *command)
    run(preprocess, *command, "--skip_missing")
    assert len(FeatureCache(tmp_path / "f/train/mel").labels) == 8


def test_mixed_rates_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=2)
    write_tone(root / "train/strain_001.wav", rate=44_100, channels=2)
    run(preprocess, "-d", root, "-f", tmp_path / "f", "--feat", "mel", *CPU)
    assert "16000 Hz (5 files), 44100 Hz (1 files)" in capsys.readouterr().out


# ── generate_score.py ──


def score(
    corpora: Path, head_folder: Path, result: Path, *options: object, task: str = "codecfake"
) -> None:
    folder = {"codecfake": "Codecfake", "19LA": "LA", "ITW": "ITW"}[task]
    run(
        generate_score,
        "-t",
        task,
        "-d",
        corpora / folder,
        "--model_folder",
        head_folder,
        "--result_folder",
        result,
        *CPU,
        *options,
    )


def test_score_files_hold_the_softmax_of_the_logits(
    corpora: Path, head_folder: Path, tmp_path: Path
) -> None:
    from dataset import load_clip, read_protocol

    for task, word in (("codecfake", "real"), ("19LA", "bonafide"), ("ITW", "bonafide")):
        score(corpora, head_folder, tmp_path, task=task)
        subset = "C1" if task == "codecfake" else task
        first = (tmp_path / f"{subset}_result.txt").read_text().splitlines()[0].split()
        assert first[2] == word and first[0].endswith(".wav") == (task == "codecfake")
    trials, found = (
        read_protocol("19LA", corpora / "LA", "eval"),
        read_scores(tmp_path / "19LA_result.txt"),
    )
    assert list(found.names) == [t.name for t in trials] and found.is_real.tolist() == [
        t.label == 0 for t in trials
    ]
    head, front_end = model.load_head(head_folder), model.load_frontend("mel")
    with torch.inference_mode():
        plain = [
            float(torch.softmax(head(front_end(load_clip(t.path)[None]))[1][0], 0)[0])
            for t in trials
        ]
    np.testing.assert_allclose(found.scores, plain, atol=1e-6)
    score(corpora, head_folder, tmp_path / "llr", "--llr", task="19LA")
    llr = read_scores(tmp_path / "llr/19LA_result.txt").scores
    np.testing.assert_allclose(1 / (1 + np.exp(-llr)), found.scores, atol=1e-12)


def test_a_shared_clip_is_computed_once_and_scores_the_same(
    corpora: Path, head_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C1..C6 and A1..A3 share their real clips.

    Scored alone or after the others, a subset's file has the same bytes.
    """
    computed, started = [], []
    real_compute, real_start = generate_score.Scorer.start, dataset.clip_batches
    monkeypatch.setattr(
        generate_score.Scorer,
        "start",
        lambda self, clips: computed.append(len(clips)) or real_compute(self, clips),
    )
    monkeypatch.setattr(
        dataset,
        "clip_batches",
        lambda *files, **options: started.append(len(files[0])) or real_start(*files, **options),
    )
    score(corpora, head_folder, tmp_path / "all")
    assert started == [80], "decoding starts once for all subsets"
    distinct = {path.read_bytes() for path in (corpora / "Codecfake/test").rglob("*.wav")}
    assert sum(computed) == len(distinct) <= 80 - 8 * 4, (
        "nine of the ten subsets have the same four real clips"
    )
    monkeypatch.undo()
    for subset in ("C3", "C7", "A2"):
        score(corpora, head_folder, tmp_path / subset, "--subset", subset)
        name = f"{subset}_result.txt"
        assert (tmp_path / subset / name).read_bytes() == (tmp_path / "all" / name).read_bytes()


def test_several_models_share_one_pass(
    corpora: Path, head_folder: Path, ssl_1024: Path, tmp_path: Path
) -> None:
    other = tmp_path / "models" / "aasist"
    other.mkdir(parents=True)
    torch.manual_seed(1)
    model.save_head(other / model.WEIGHTS, model.W2VAASIST(), {"feat": "xls-r-5"})
    both = ["-t", "ITW", "-d", corpora / "ITW", "--ssl", ssl_1024, *CPU]
    run(
        generate_score,
        *both,
        "--model_folder",
        head_folder,
        other,
        "--result_folder",
        tmp_path / "both",
    )
    for folder in (head_folder, other):
        run(
            generate_score,
            *both,
            "--model_folder",
            folder,
            "--result_folder",
            tmp_path / "alone" / folder.name,
        )
        name = "ITW_result.txt"
        assert (tmp_path / "both" / folder.name / name).read_bytes() == (
            tmp_path / "alone" / folder.name / name
        ).read_bytes()


def test_finished_subsets_are_skipped(
    corpora: Path, head_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    score(corpora, head_folder, tmp_path, "--subset", "C1", "C2")
    (tmp_path / "C1_result.txt").write_text("mine\n")
    (tmp_path / "C2_result.txt").unlink()
    score(corpora, head_folder, tmp_path, "--subset", "C1", "C2")
    assert (tmp_path / "C1_result.txt").read_text() == "mine\n" and (
        tmp_path / "C2_result.txt"
    ).exists()
    score(corpora, head_folder, tmp_path, "--subset", "C1", "C2")
    assert "nothing to do" in capsys.readouterr().out
    score(corpora, head_folder, tmp_path, "--subset", "C1", "--overwrite")
    assert len((tmp_path / "C1_result.txt").read_text().splitlines()) == 8


def test_scores_of_other_weights_are_not_taken_for_finished(
    corpora: Path, head_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    torch.manual_seed(1)
    model.save_head(tmp_path / "other" / model.WEIGHTS, model.LCNN("mel"), {"feat": "mel"})
    result = tmp_path / "result"
    score(corpora, head_folder, result, "--subset", "C1")
    before = (result / "C1_result.txt").read_bytes()
    for folder, *options in ((tmp_path / "other",), (head_folder, "--llr")):
        with pytest.raises(
            InputError,
            match=r"C1_result.txt: holds probabilities of the weights \w+, asked for are "
            ".*--overwrite",
        ):
            score(corpora, folder, result, "--subset", "C1", *options)
    assert (result / "C1_result.txt").read_bytes() == before
    capsys.readouterr()
    score(corpora, tmp_path / "other", result, "--subset", "C2")
    assert "C1_result.txt there hold probabilities of the weights" in capsys.readouterr().out
    score(corpora, tmp_path / "other", result, "--subset", "C1", "--overwrite")
    score(corpora, tmp_path / "other", result, "--subset", "C1", "C2")
    out = capsys.readouterr().out
    assert "nothing to do" in out and "there hold" not in out


def test_a3_without_its_real_half(
    head_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=2)
    for path in (root / "test/A3").glob("s_*.wav"):
        path.unlink()
    run(
        generate_score,
        "-t",
        "codecfake",
        "-d",
        root,
        "--subset",
        "A3",
        "--model_folder",
        head_folder,
        "--result_folder",
        tmp_path / "r",
        *CPU,
    )
    assert (
        "its 2 real files are not distributed (copyright); scoring its 2 fakes alone, so it will "
        "have no EER" in capsys.readouterr().out
    )
    assert (tmp_path / "r/A3_missing.txt").read_text() == "s_000.wav absent\ns_001.wav absent\n"
    run(evaluate_score, "--result_folder", tmp_path / "r", "--no_ci")
    assert "A3" in capsys.readouterr().out


def test_missing_and_unreadable_audio_when_scoring(head_folder: Path, tmp_path: Path) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=2)
    (root / "test/C2/s_000.wav").unlink()
    (root / "test/C2/F02_s_001.wav").write_text("not audio")
    command = [
        "-t",
        "codecfake",
        "-d",
        root,
        "--subset",
        "C1",
        "C2",
        "--model_folder",
        head_folder,
        "--result_folder",
        tmp_path / "r",
        *CPU,
    ]
    with pytest.raises(
        InputError, match=r"C2: 1 of 4 files named by the protocol .*--skip_missing"
    ):
        run(generate_score, *command)
    run(generate_score, *command, "--skip_missing")
    assert list(read_scores(tmp_path / "r/C2_result.txt").names) == ["F02_s_000.wav", "s_001.wav"]
    assert len(read_scores(tmp_path / "r/C1_result.txt").names) == 4
    missing = (tmp_path / "r/C2_missing.txt").read_text().splitlines()
    assert (
        missing[0] == "s_000.wav absent"
        and missing[1].startswith("F02_s_001.wav ")
        and len(missing) == 2
    )
    write_tone(root / "test/C2/s_000.wav")
    with pytest.raises(InputError, match="1 files cannot be read, as listed above"):
        run(generate_score, *command, "--overwrite")


def test_an_unreadable_file_costs_no_other_score(
    head_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """It is told at once, other subsets are finished, and the next run scores it alone."""
    root = make_codecfake(tmp_path / "Codecfake", n_real=2)
    broken = root / "test/C1/F01_s_001.wav"
    sound = broken.read_bytes()
    command = ["-t", "codecfake", "-d", root, "--subset", "C1", "C2", "--model_folder"]
    command += [head_folder, *CPU]
    run(generate_score, *command, "--result_folder", tmp_path / "whole")
    broken.write_text("not audio")
    out = tmp_path / "r"
    with pytest.raises(InputError, match="1 files cannot be read, as listed above"):
        run(generate_score, *command, "--result_folder", out)
    assert "C1: " in capsys.readouterr().err
    assert (out / "C2_result.txt").exists() and not (out / "C1_result.txt").exists()
    broken.write_bytes(sound)
    asked = []
    real_batches = dataset.clip_batches

    def noted(paths, *arguments, **options):
        asked.extend(paths)
        return real_batches(paths, *arguments, **options)

    monkeypatch.setattr(dataset, "clip_batches", noted)
    run(generate_score, *command, "--result_folder", out)
    assert asked == [str(broken)]
    for name in ("C1_result.txt", "C2_result.txt"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "C1_partial.npz").exists()


@pytest.mark.parametrize("ended", ["by a signal", "after a while"])
def test_scores_of_an_interrupted_subset_are_kept(
    head_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    """When a signal ends the run, and now and then, for a kill that nothing can answer."""
    root = make_codecfake(tmp_path / "Codecfake", n_real=3)
    command = ["-t", "codecfake", "-d", root, "--subset", "C1", "--model_folder", head_folder]
    command += ["--batch_size", 2, *CPU]
    run(generate_score, *command, "--result_folder", tmp_path / "whole")
    out = tmp_path / "r"
    real_start, real_keep = generate_score.Scorer.start, generate_score.keep_scores
    n_started = itertools.count(1)

    def stop_at_the_third(scorer, clips):
        if next(n_started) == 3:
            if ended == "after a while":  # what a kill leaves
                monkeypatch.setattr(generate_score, "keep_scores", lambda *_: None)
            raise KeyboardInterrupt
        return real_start(scorer, clips)

    if ended == "after a while":
        monkeypatch.setattr(generate_score, "KEEP_EVERY", -1)
    monkeypatch.setattr(generate_score.Scorer, "start", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(generate_score, *command, "--result_folder", out)
    assert (out / "C1_partial.npz").exists() and not (out / "C1_result.txt").exists()
    monkeypatch.setattr(generate_score, "keep_scores", real_keep)
    n_computed = []

    def count(scorer, clips):
        n_computed.append(len(clips))
        return real_start(scorer, clips)

    monkeypatch.setattr(generate_score.Scorer, "start", count)
    run(generate_score, *command, "--result_folder", out)
    assert sum(n_computed) < 6
    assert (out / "C1_result.txt").read_bytes() == (tmp_path / "whole/C1_result.txt").read_bytes()
    record = json.loads((out / "provenance.json").read_text())
    assert record["decoders"] == {"libsndfile": 6}
    assert not (out / "C1_partial.npz").exists()


def test_one_batch_computes_while_the_next_is_gathered() -> None:
    """And a clip that is still being computed is not computed again."""
    events = []

    def start(clips: torch.Tensor):
        number = len([event for event in events if event[0] == "start"])
        events.append(("start", number))

        def wait() -> np.ndarray:
            events.append(("wait", number))
            return clips[:, :2, None].numpy()

        return wait

    computed = generate_score._Computed(start, batch_size=2)
    clips = torch.arange(20.0).view(5, 4)
    digests = [b"a", b"b", b"a", b"c", b"d"]
    for digest, clip in zip(digests, clips, strict=True):
        computed.add(digest, clip)
    assert events == [("start", 0), ("start", 1), ("wait", 0)]
    computed.finish()
    scored = generate_score.Scored.nothing(5, 2)
    scored.logits = scored.logits[:, :, :1]
    computed.fill(scored, digests)
    first = [0, 4, 0, 12, 16]  # the third is the first's clip
    assert scored.logits[:, 0, 0].tolist() == first


def test_kept_scores_are_those_of_the_same_weights(tmp_path: Path) -> None:
    """And of the same file: one that was replaced is scored again."""
    path = partial_scores.partial_path(tmp_path, "C1")
    of_a = partial_scores.Kept(np.array([1.0, 2.0]), "libsndfile")
    of_b = partial_scores.Kept(np.array([3.0, 4.0]), "ffmpeg")
    partial_scores.write_partial(path, "these", {"a.wav": of_a, "b.wav": of_b})
    known = partial_scores.read_partial(path, "these")
    assert list(known) == ["a.wav", "b.wav"]
    assert known["b.wav"].logits.tolist() == [3.0, 4.0]
    assert known["b.wav"].decoder == "ffmpeg"
    assert partial_scores.read_partial(path, "others") == {}
    path.write_bytes(path.read_bytes()[:-40])
    assert partial_scores.read_partial(path, "these") == {}
    sound = write_tone(tmp_path / "a.wav")
    trial = Trial("a.wav", str(sound), 0, "-")
    before = partial_scores.key_of(trial)
    write_tone(sound, seconds=0.7)
    assert partial_scores.key_of(trial) != before


def test_options_given_twice_count_together(head_folder: Path, tmp_path: Path) -> None:
    parsed = generate_score.parse(
        ["-t", "codecfake", "--subset", "C1", "--subset", "C2", "--model_folder", "a"]
        + ["--model_folder", "b"]
    )
    assert parsed.subset == ["C1", "C2"] and parsed.model_folder == [Path("a"), Path("b")]
    assert generate_score.parse(["-t", "ITW"]).model_folder == [Path("models/try")]


def test_folders_are_read_with_their_links_and_say_what_they_leave(tmp_path: Path, capsys) -> None:
    elsewhere = tmp_path / "elsewhere"
    write_tone(elsewhere / "b.wav")
    folder = tmp_path / "folder"
    write_tone(folder / "a.wav")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    (folder / "._a.wav").write_bytes(b"mac")
    write_tone(folder / "__MACOSX" / "c.wav")
    (folder / "notes.txt").write_text("x")
    found = generate_score.find_recordings([folder])
    assert [Path(path).name for path in found] == ["a.wav", "b.wav"]
    assert "left out 1 ._* (a Mac's notes), 1 .txt" in capsys.readouterr().out


@pytest.mark.parametrize("library", ["_multiarray_umath", "libtorch_cpu"])
def test_ctrl_c_during_the_imports_is_one_line(library: str) -> None:
    """Sent while numpy is imported, and while torch is."""
    child = subprocess.Popen(
        [sys.executable, "main_train.py", "--help"], cwd=REPO, stderr=subprocess.PIPE, text=True
    )
    while library not in Path(f"/proc/{child.pid}/maps").read_text():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert "Traceback" not in err


def test_other_weights_than_those_trained_on_are_refused(
    corpora: Path, ssl_1024: Path, tmp_path: Path
) -> None:
    made = model.load_frontend("xls-r-5", str(ssl_1024)).fingerprint() | {
        "weights_sha256": "of another"
    }
    model.save_head(tmp_path / "head.pt", model.W2VAASIST(), {"front_end": made})
    with pytest.raises(InputError, match="was trained on features with weights_sha256 of another"):
        run(
            generate_score,
            "-t",
            "ITW",
            "-d",
            corpora / "ITW",
            "--model_folder",
            tmp_path / "head.pt",
            "--ssl",
            ssl_1024,
            "--result_folder",
            tmp_path,
            *CPU,
        )


def test_a_persons_own_recordings(
    head_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_tone(tmp_path / "mine/deep er/my voice.flac", seconds=2, rate=44_100, channels=2)
    write_tone(tmp_path / "mine/a.wav", seconds=1)
    (tmp_path / "mine/notes.txt").write_text("not a recording")
    run(
        generate_score,
        "-t",
        "audio",
        "--path",
        tmp_path / "mine",
        "--model_folder",
        head_folder,
        "--result_folder",
        tmp_path / "r",
        *CPU,
    )
    printed = capsys.readouterr().out
    assert "trained on Codecfake" in printed and "1.00 s" in printed and "2.00 s" in printed
    assert len(re.findall(r"0\.\d{6}  (real|fake)", printed)) == 2
    assert len((tmp_path / "r/audio_result.txt").read_text().splitlines()) == 2
    with pytest.raises(InputError, match="no such file"):
        run(
            generate_score,
            "-t",
            "audio",
            "--path",
            tmp_path / "nothing",
            "--model_folder",
            head_folder,
        )
    with pytest.raises(InputError, match="1 of 2 recordings were not scored"):
        run(
            generate_score,
            "-t",
            "audio",
            "--path",
            tmp_path / "mine/a.wav",
            tmp_path / "mine/notes.txt",
            "--model_folder",
            head_folder,
            *CPU,
        )


# ── As the shell sees it ──


def test_mistakes_end_in_one_line_and_exit_code_2(
    corpora: Path, head_folder: Path, tmp_path: Path
) -> None:
    assert_refused(
        shell("preprocess.py", "-d", tmp_path / "nowhere"),
        "nowhere: no such folder; give the corpus's folder with -d",
    )
    assert_refused(
        shell("main_train.py", "-t", "codecfake", "-f", tmp_path, "-o", tmp_path / "o"),
        "expected the features of --feat xls-r-5",
    )
    assert not (tmp_path / "o").exists(), "nothing half-written"
    assert_refused(
        shell(
            "generate_score.py", "-t", "19LA", "-d", corpora / "ITW", "--model_folder", head_folder
        ),
        "expected ASVspoof2019_LA_cm_protocols",
    )
    assert_refused(
        shell("generate_score.py", "-t", "19LA", "--model_folder", tmp_path), "no such weights"
    )
    (tmp_path / "result").mkdir()
    (tmp_path / "result/C1_result.txt").write_text("a.wav 0.5 real\nb.wav NaN fake\n")
    assert_refused(
        shell("evaluate_score.py", "--result_folder", tmp_path / "result"),
        r"C1_result\.txt:2: expected a finite score",
    )


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_cleanly_and_say_how_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    make_la(tmp_path / "LA", n_real=40)
    command = [
        sys.executable,
        REPO / "preprocess.py",
        "-t",
        "19LA",
        "-d",
        tmp_path / "LA",
        "-f1",
        tmp_path / "f",
        "--feat",
        "mel",
        "--batch_size",
        "1",
        *CPU,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "f/train/mel/cache.json").exists() and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, number)  # the terminal's Ctrl-C reaches the decoding processes as well
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert "run the same command again to go on" in errors and "Traceback" not in errors
    run(preprocess, *command[2:])
    FeatureCache(tmp_path / "f/train/mel").require_complete()


def test_a_second_process_on_the_same_output_stops(tmp_path: Path, corpora: Path) -> None:
    command = ["-d", corpora / "Codecfake", "-f", tmp_path / "f", "--feat", "mel", *CPU]
    with (
        files.exclusive(tmp_path / "f/train/mel"),
        pytest.raises(InputError, match="another process is writing there"),
    ):
        run(preprocess, *command)
    run(preprocess, *command)
    shutil.rmtree(tmp_path / "f")
