"""Training without a cache takes the steps of training from one.

python -m pytest tests/test_online.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_codecfake, make_la
from test_ranks import on_ranks

import main_train
import model
import preprocess
from formats import protocols
from formats.feature_cache import FeatureCache
from runtime.cli import InputError

CPU = ["--gpu", "-1", "--num_workers", "1"]
TRAIN = ["--batch_size", "8", "--num_epochs", "2", *CPU]
FEATURES = {  # -> the head that takes them
    "mel": "lcnn",
    "xls-r-5": "W2VAASIST",
}
TOLERANCE = 1e-4  # of losses; on one machine they are equal to the bit
FOLDERS = {"codecfake": ("Codecfake", "-f"), "19LA": ("LA", "-f1")}


@pytest.fixture(scope="module")
def caches(corpora: Path, ssl_1024: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32 caches of both corpora and both front ends."""
    root = tmp_path_factory.mktemp("caches")
    for task, (folder, option) in FOLDERS.items():
        for feat in FEATURES:
            extract(task, corpora / folder, option, root / folder, feat, ssl_1024)
    return root


def extract(task: str, corpus: Path, option: str, out: Path, feat: str, ssl: Path) -> None:
    words = ["-t", task, "-d", corpus, option, out, "--feat", feat, "--ssl", ssl]
    words += ["--dtype", "float32", "--max_failed", "50", "--skip_missing", *CPU]
    preprocess.main([str(word) for word in words])


def train(out: Path, task: str, feat: str, *options: object) -> list[dict]:
    """The records of the epochs."""
    words = ["-t", task, "-m", FEATURES[feat], "--feat", feat, "-o", out, *TRAIN, *options]
    main_train.main([str(word) for word in words])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def cached(caches: Path) -> list[object]:
    return ["-f", caches / "Codecfake", "-f1", caches / "LA"]


def online(corpora: Path, task: str, ssl: Path) -> list[object]:
    folder = corpora if task == "co-train" else corpora / FOLDERS[task][0]
    return ["--online", "-d", folder, "--ssl", ssl]


def assert_same_epochs(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected)
    for key in ("loss", "dev_loss", "dev_eer"):
        np.testing.assert_allclose(
            [record[key] for record in found],
            [record[key] for record in expected],
            atol=TOLERANCE,
            rtol=0,
            err_msg=key,
        )


@pytest.mark.parametrize(
    "task, feat, options",
    [
        ("codecfake", "mel", []),
        ("19LA", "xls-r-5", []),
        ("co-train", "xls-r-5", ["--CSAM"]),
        ("co-train", "mel", ["--batch_size", 5]),
    ],
)
def test_the_numbers_are_those_of_a_float32_cache(
    corpora, caches, ssl_1024, tmp_path: Path, monkeypatch, task, feat, options
) -> None:
    """The loss of every step, the dev losses, the EERs and the record in the checkpoint."""
    losses: list[float] = []
    real_step = main_train.train_step

    def noted(*arguments):
        losses.append(real_step(*arguments))
        return losses[-1]

    monkeypatch.setattr(main_train, "train_step", noted)
    expected = train(tmp_path / "cached", task, feat, *cached(caches), *options)
    of_steps, losses = losses, []
    found = train(tmp_path / "online", task, feat, *online(corpora, task, ssl_1024), *options)
    assert_same_epochs(found, expected)
    np.testing.assert_allclose(losses, of_steps, atol=TOLERANCE, rtol=0)
    one, other = (model.load_head(tmp_path / name).info for name in ("cached", "online"))
    for key in set(one) - {"run", "dev_loss", "dev_eer", "epoch"}:
        assert other[key] == one[key], key


def test_nothing_but_the_run_folder_is_written(ssl_1024, tmp_path: Path, monkeypatch) -> None:
    make_la(tmp_path / "data" / "LA")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    train(tmp_path / "run", "19LA", "mel", "--online")  # -d has a default
    assert [path for path in sorted(tmp_path.rglob("*")) if "run" not in path.parts] == before


def test_a_run_goes_on_from_a_cache_or_from_audio(
    corpora, caches, ssl_1024, tmp_path: Path, monkeypatch
) -> None:
    """Both record the same settings, and another front end is refused."""
    expected = train(tmp_path / "whole", "codecfake", "mel", *cached(caches))
    halves = tmp_path / "halves"
    from_audio = online(corpora, "codecfake", ssl_1024)
    train(halves, "codecfake", "mel", *from_audio, "--num_epochs", "1")
    found = train(halves, "codecfake", "mel", *cached(caches), "--continue_training")
    assert_same_epochs(found, expected)
    found = train(
        halves, "codecfake", "mel", *from_audio, "--num_epochs", "3", "--continue_training"
    )
    assert_same_epochs(found[:2], expected)
    monkeypatch.setattr(main_train.frontends.Mel, "fingerprint", lambda self: {"feat": "other"})
    with pytest.raises(InputError, match="was trained with front_end"):
        train(halves, "codecfake", "mel", *from_audio, "--continue_training")


def test_a_run_goes_on_in_the_middle_of_an_epoch(
    corpora, ssl_1024, tmp_path: Path, monkeypatch
) -> None:
    """Where the pieces that the front end takes begin at other rows than in the unbroken run."""
    options = [*online(corpora, "codecfake", ssl_1024), "--batch_size", "5", "--num_epochs", "1"]
    expected = train(tmp_path / "whole", "codecfake", "mel", *options)
    real_step = main_train.shard_step
    steps = []

    def stop_at_the_second(*arguments):
        steps.append(0)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real_step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(main_train, "SAVE_EVERY", -1)
        patch.setattr(main_train, "shard_step", stop_at_the_second)
        train(tmp_path / "stopped", "codecfake", "mel", *options)
    found = train(tmp_path / "stopped", "codecfake", "mel", *options, "--continue_training")
    assert_same_epochs(found, expected)


def test_two_ranks_compute_their_own_rows(corpora, caches, ssl_1024, tmp_path: Path) -> None:
    """Of two ranks, each takes its rows of a batch; the last batch has too few for both."""
    command = ["-t", "codecfake", "-m", "lcnn", "--feat", "mel", *TRAIN, "--batch_size", 11]
    on_ranks(
        tmp_path,
        "commands",
        ("main_train", [*command, "-o", tmp_path / "cached", *cached(caches)]),
        (
            "main_train",
            [*command, "-o", tmp_path / "online", *online(corpora, "codecfake", ssl_1024)],
        ),
    )
    of_cache, of_audio = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("cached", "online")
    )
    assert_same_epochs(of_audio, of_cache)


# ── Files that are absent or cannot be read ──


def test_rows_without_audio_are_those_that_a_cache_leaves_out(
    ssl_1024, tmp_path: Path, capsys
) -> None:
    corpus = make_codecfake(tmp_path / "Codecfake")
    (corpus / "train/strain_001.wav").write_text("no audio")
    (corpus / "train/F01_strain_002.wav").unlink()
    extract("codecfake", corpus, "-f", tmp_path / "cache", "mel", ssl_1024)
    options = ["--online", "-d", corpus, "--skip_missing"]
    capsys.readouterr()
    found = train(tmp_path / "online", "codecfake", "mel", *options)
    said = capsys.readouterr().out
    assert "1 of 12 files named by the protocol are not in" in said
    assert "note: 1 files of codecfake train cannot be read" in said and "strain_001.wav" in said
    expected = train(tmp_path / "cached", "codecfake", "mel", "-f", tmp_path / "cache")
    assert_same_epochs(found, expected)
    assert len(FeatureCache(tmp_path / "cache/train/mel").labels) == 10
    make_codecfake(corpus)
    (corpus / "train/strain_001.wav").write_text("no audio")
    with pytest.raises(InputError, match=r"1 of 12 files .* more than --max_failed 0.1 %.*_001"):
        train(tmp_path / "strict", "codecfake", "mel", "--online", "-d", corpus)


def test_absent_files_are_refused_before_anything_is_read(tmp_path: Path, monkeypatch) -> None:
    corpus = make_la(tmp_path / "LA")
    missing = protocols.read_protocol("19LA", corpus, "dev")[0].path
    Path(missing).unlink()
    monkeypatch.setattr(main_train.dataset, "clip_batches", None)
    with pytest.raises(InputError, match="1 of 8 files named by the protocol.*--skip_missing"):
        train(tmp_path / "run", "19LA", "mel", "--online", "-d", corpus)


def test_a_file_damaged_since_the_run_began_is_named(tmp_path: Path, monkeypatch) -> None:
    corpus = make_la(tmp_path / "LA")
    path = Path(protocols.read_protocol("19LA", corpus, "train")[0].path)
    real_start = main_train.Run.start

    def damage(*arguments):
        path.write_text("no audio")
        real_start(*arguments)

    monkeypatch.setattr(main_train.Run, "start", damage)
    with pytest.raises(InputError, match=f"{path.name}.*could be read when the run began"):
        train(tmp_path / "run", "19LA", "mel", "--online", "-d", corpus)


def test_a_used_folder_is_refused_before_the_files_are_read(
    corpora, tmp_path: Path, monkeypatch
) -> None:
    train(tmp_path / "run", "19LA", "mel", "--online", "-d", corpora / "LA")
    monkeypatch.setattr(main_train, "readable_trials", None)
    with pytest.raises(InputError, match="not empty.*ever overwritten"):
        train(tmp_path / "run", "19LA", "mel", "--online", "-d", corpora / "LA")


def test_weights_of_another_size_are_refused_before_the_files_are_read(
    corpora, ssl_narrow, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(main_train, "readable_trials", None)
    with pytest.raises(InputError, match=r"expected features \(201, 1024\).*got \(201, 32\)"):
        train(tmp_path / "run", "19LA", "xls-r-5", *online(corpora, "19LA", ssl_narrow))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--skip_missing"], "go with --online"),
        (["--max_failed", "1"], "go with --online"),
        (["--online", "-f", "features"], "leave -f and -f1 out"),
    ],
)
def test_options_that_make_no_sense(options: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main_train.parse(["-t", "19LA", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
