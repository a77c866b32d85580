"""Damage, hostile files, full disks, kills: the fast part of tests/torture.py.

python -m pytest tests/test_robustness.py
"""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import resource_sharer
from multiprocessing.connection import Client
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import torch
from conftest import REPO, make_codecfake, write_tone
from faults import (
    HOSTILE_PROGRAMS,
    TWO_FLOATS,
    Fuse,
    doubled,
    fails_with,
    hostile_archives,
    hostile_objects,
    storage_program,
    write_program,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dataset
import evaluate_score
import frontends
import generate_score
import main_train
import model
import preprocess
from dataset import FAKE, REAL, Trial
from formats import audio, feature_cache, score_files, torch_files, training_state
from formats.feature_cache import DONE, CacheWriter, FeatureCache
from formats.training_state import TrainingState
from runtime import cli, devices, files
from runtime.cli import InputError

CPU = ["--gpu", "-1", "--num_workers", "0"]


def run(module, *arguments: object) -> None:
    module.main([str(argument) for argument in arguments])


def make_cache(folder: Path, rows: int = 6, feat: str = "mel") -> Path:
    trials = [Trial(f"t{i}.wav", f"/nowhere/t{i}.wav", i % 2, "-") for i in range(rows)]
    writer = CacheWriter(folder, trials, {"feat": feat}, dataset.FEATURE_SHAPES[feat])
    writer.write(
        range(rows),
        np.random.default_rng(rows).random((rows, *dataset.FEATURE_SHAPES[feat]), np.float32),
    )
    writer.close()
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features")
    for part in ("train", "dev"):
        make_cache(root / part / "mel")
    return root


def train(features: Path, out: Path, *options: object) -> Path:
    run(
        main_train,
        "-t",
        "codecfake",
        "-m",
        "lcnn",
        "--feat",
        "mel",
        "-f",
        features,
        "-o",
        out,
        "--batch_size",
        4,
        "--num_epochs",
        1,
        *CPU,
        *options,
    )
    return out


# ── Hostile files ──


@pytest.mark.parametrize("name", hostile_objects(Path("canary")))
def test_objects_that_are_no_data_are_refused(tmp_path: Path, name: str) -> None:
    torch.save(hostile_objects(tmp_path / "canary")[name], tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"x\.pt: .*(refused|damaged|expected|weights)") as refusal:
        model.load_head(tmp_path / "x.pt")
    assert "\n" not in str(refusal.value) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", HOSTILE_PROGRAMS)
def test_programs_by_hand_are_refused(tmp_path: Path, name: str) -> None:
    program, message = HOSTILE_PROGRAMS[name]
    with pytest.raises(InputError, match=message):
        torch_files.load(write_program(tmp_path / "x.pt", program, **{"data/0": TWO_FLOATS}))


def test_a_tensor_inside_its_storage_is_read(tmp_path: Path) -> None:
    program = storage_program(b"K\x02\x85", b"K\x01\x85", b"K\x02")
    assert torch_files.load(
        write_program(tmp_path / "x.pt", program, **{"data/0": TWO_FLOATS})
    ).tolist() == [1, 2]


def test_unusual_archives_are_refused(tmp_path: Path) -> None:
    for name, path in hostile_archives(tmp_path).items():
        with pytest.raises(InputError, match=path.name):
            torch_files.load(path)
            pytest.fail(name)


def test_what_torch_saves_comes_back(tmp_path: Path) -> None:
    """All that our own files and the released ones hold, views into one storage and empty tensors
    included.
    """
    base = torch.arange(12.0)
    content = {
        "a": [1, -1, 2**40, 0.5, None, True, False, "x", ()],
        "b": (base.view(3, 4).T, base[3:]),
        7: torch.empty(0, 3),
        "d": nn.Parameter(torch.eye(2)),
        "half": torch.ones(2, dtype=torch.float16),
    }
    torch_files.save(tmp_path / "x.pt", content)
    found = torch_files.load(tmp_path / "x.pt")
    assert found["a"] == content["a"] and found.keys() == content.keys()
    for one, other in (
        (found["b"][0], content["b"][0]),
        (found["b"][1], base[3:]),
        (found["d"], torch.eye(2)),
        (found["half"], content["half"]),
        (found[7], content[7]),
    ):
        assert one.dtype == other.dtype and torch.equal(one, other)
    found["b"][0][0, 0] = 99
    assert (
        found["b"][0].untyped_storage().data_ptr() == found["b"][1].untyped_storage().data_ptr()
    ), "shared storages stay shared"


@pytest.mark.parametrize(
    "info",
    [
        {"train_task": ["x"]},
        {"ssl": 5},
        {"front_end": "mel"},
        {"x": torch.zeros(1)},
        {"x": doubled(60)},
        {"x": doubled(19)},
        "text",
    ],
    ids=["task", "ssl", "front end", "tensor", "doubled", "large", "text"],
)
def test_a_checkpoints_record_must_be_plain(tmp_path: Path, info: object) -> None:
    model.save_head(tmp_path / "x.pt", model.LCNN("mel"), info)
    with pytest.raises(InputError, match="record of something else"):
        model.load_head(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("settings"),
        lambda s: s.update(epoch="2"),
        lambda s: s["progress"].pop("step"),
        lambda s: s["progress"].update(loss="x"),
        lambda s: s.update(history=[{}]),
        lambda s: s["head"].popitem(),
        lambda s: s["optimiser"].pop("state"),
        lambda s: s["optimiser"]["state"][0].update(exp_avg=torch.zeros(1)),
        lambda s: s["optimiser"]["state"].update({999: {}}),
        lambda s: s.update(settings=doubled(60)),
        lambda s: s.update(history=[dict.fromkeys(training_state.RECORD_KEYS)]),
    ],
)
def test_a_state_of_other_parts_is_refused(tmp_path: Path, change) -> None:
    head = nn.Linear(3, 2)
    optimiser = torch.optim.Adam(head.parameters())
    head(torch.rand(2, 3)).sum().backward()
    optimiser.step()
    path = tmp_path / "last_state.pt"
    weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    state = TrainingState({}, head=weights, optimiser=optimiser.state_dict())
    training_state.write_state(path, state)
    training_state.restore(path, training_state.read_state(path), head, optimiser)
    content = torch_files.load(path)
    change(content)
    torch_files.save(path, content)
    before = [p.clone() for p in head.parameters()]
    with pytest.raises(InputError, match="damaged, its .* is not that of such a run"):
        training_state.restore(path, training_state.read_state(path), head, optimiser)
    assert all(map(torch.equal, head.parameters(), before))


# ── Protocols ──


@pytest.mark.parametrize(
    "row, message",
    [
        ('1.wav,"never closed,spoof', "meta.csv:2: expected `file,speaker,label`"),
        ("1.wav,a\0b,spoof", None),
        ('"../1.wav",a,spoof', "plain file name"),
        ("/etc/passwd,a,spoof", "plain file name"),
        ('1.wav,"' + "x" * 200_000 + '",spoof', "over 4096 characters"),
        ("1\x1b[2J.wav,a,spoof", "plain file name"),
    ],
)
def test_hostile_rows_of_meta_csv(tmp_path: Path, row: str, message: str | None) -> None:
    """An open quote would swallow the rest of the file, or end in an error of the csv module."""
    (tmp_path / "meta.csv").write_text(
        "file,speaker,label\n" + row + "\n" + "2.wav,b,bona-fide\n" * 5
    )
    if message is None:
        assert len(dataset.read_protocol("ITW", tmp_path, "all")) == 6
        return
    with pytest.raises(InputError, match=message):
        dataset.read_protocol("ITW", tmp_path, "all")


PROTOCOLS = {
    "codecfake": ("label/train.txt", "train"),
    "19LA": ("ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.train.trn.txt", "train"),
    "ITW": ("meta.csv", "all"),
}
plain, word = (
    st.sampled_from(["a.wav", "b", "-", "1", "L1"]),
    st.sampled_from(["real", "fake", "bonafide", "bona-fide", "spoof"]),
)
strange = st.sampled_from(["..", "../b", "/c", "d/e", "x\x1b[m", "\u202e", "\\", ""]) | st.text(
    max_size=6
)
one = plain | strange
well_formed = {
    "codecfake": st.tuples(one, word, one),
    "19LA": st.tuples(one, one, plain, one, word),
    "ITW": st.tuples(one, one, word),
}


@pytest.mark.parametrize("task", PROTOCOLS)
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_a_protocol_holds_paths_stay_in_the_corpus(
    tmp_path_factory: pytest.TempPathFactory, task: str, data: st.DataObject
) -> None:
    """Either every row becomes a trial that is safe to open and to print, or one line says which
    row is not.
    """
    rows = data.draw(
        st.lists(well_formed[task], max_size=3)
        | st.lists(st.lists(one | word, max_size=6), max_size=3)
    )
    separator, end = (
        data.draw(st.sampled_from([",", "\t"] if task == "ITW" else [" ", "\t"])),
        data.draw(st.sampled_from(["\n", "\r\n", " \n"])),
    )
    root = tmp_path_factory.getbasetemp() / f"protocols_{task}"
    file, part = PROTOCOLS[task]
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes(
        "".join(separator.join(row) + end for row in rows).encode("utf-8", "surrogatepass")
    )
    try:
        trials = dataset.read_protocol(task, root, part)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith(str(root))
        return
    for trial in trials:
        assert os.path.normpath(trial.path) == trial.path and Path(trial.path).is_relative_to(root)
        assert trial.label in (REAL, FAKE) and (trial.name + trial.source).isprintable()


def test_escapes_in_tags_are_refused(tmp_path: Path) -> None:
    (tmp_path / "label").mkdir()
    (tmp_path / "label/train.txt").write_text("a.wav fake \x1b[31m\n")
    with pytest.raises(InputError, match=r"train\.txt:1: expected a plain tag, got '\\x1b"):
        dataset.read_protocol("codecfake", tmp_path, "train")


def test_repeated_names_are_refused_before_scoring(tmp_path: Path) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=1)
    with open(root / "label/C1.txt", "a") as file:
        file.write("s_000.wav real 0\n")
    model.save_head(tmp_path / model.WEIGHTS, model.LCNN("mel"), {})
    with pytest.raises(InputError, match="C1: expected each trial once, got 's_000.wav' again"):
        run(
            generate_score,
            "-t",
            "codecfake",
            "-d",
            root,
            "--subset",
            "C1",
            "--model_folder",
            tmp_path,
            "--result_folder",
            tmp_path / "r",
            *CPU,
        )
    assert not (tmp_path / "r").exists()


# ── Damage and repair ──


def damage_cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def damage_header(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"?")


@pytest.mark.parametrize("damage", [damage_cut, damage_header, Path.unlink])
@pytest.mark.parametrize("name", ["features_00001.npy", "index.npy", "trials.tsv", "cache.json"])
def test_repair_redoes_what_is_damaged_and_no_more(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage
) -> None:
    monkeypatch.setattr(feature_cache, "ROWS_PER_SHARD", 4)
    command = ["-d", corpora / "Codecfake", "-f", tmp_path, "--feat", "mel", *CPU]
    run(preprocess, *command)
    folder = tmp_path / "train/mel"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    with pytest.raises(InputError, match=rf"{name}: |no feature cache to verify"):
        run(preprocess, *command, "--verify")
    if not (
        folder / "cache.json"
    ).exists():  # then it is as if never made: an ordinary run makes it
        run(preprocess, *command)
    else:
        written: list[int] = []
        real_write = CacheWriter.write
        monkeypatch.setattr(
            CacheWriter,
            "write",
            lambda self, rows, values: written.extend(rows) or real_write(self, rows, values),
        )
        run(preprocess, *command, "--verify", "--repair")
        everything = name == "cache.json" or (
            name == "index.npy" and damage is Path.unlink
        )  # nobody knows what is whole
        assert len(written) == 12 if everything else len(written) < 12
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_changed_digit_of_a_score_is_found(
    corpora: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model.save_head(tmp_path / model.WEIGHTS, model.LCNN("mel"), {})
    command = [
        "-t",
        "ITW",
        "-d",
        corpora / "ITW",
        "--model_folder",
        tmp_path,
        "--result_folder",
        tmp_path / "r",
        *CPU,
    ]
    run(generate_score, *command)
    path = tmp_path / "r/ITW_result.txt"
    run(evaluate_score, "--result_folder", tmp_path / "r", "--no_ci")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b" 0.", b" 0.1", 1))
    assert "WARNING" not in capsys.readouterr().out
    run(evaluate_score, "--result_folder", tmp_path / "r", "--no_ci")
    assert re.search(r"WARNING: .*ITW_result\.txt was edited or damaged", capsys.readouterr().out)
    (tmp_path / "r/provenance.json").write_text("{")
    for script, options in (
        (evaluate_score, ["--result_folder", tmp_path / "r", "--no_ci"]),
        (generate_score, [*command, "--overwrite"]),
    ):
        with pytest.raises(InputError, match=r"provenance\.json: damaged"):
            run(script, *options)
    (tmp_path / "r/provenance.json").unlink()
    run(generate_score, *command, "--overwrite")
    assert path.read_bytes() == whole


def test_what_was_extracted_stays_when_its_file_is_gone(tmp_path: Path) -> None:
    root = make_codecfake(tmp_path / "Codecfake", n_real=2)
    command = ["-d", root, "-f", tmp_path / "f", "--feat", "mel", *CPU]
    run(preprocess, *command)
    CacheWriter.forget(writer := open_writer(tmp_path / "f/train/mel", root), [0])
    writer.close()
    (root / "train/strain_001.wav").unlink()
    (root / "train/F01_strain_001.wav").write_text("damaged since")
    run(preprocess, *command, "--skip_missing")
    assert (FeatureCache(tmp_path / "f/train/mel").states == DONE).all()
    assert not (tmp_path / "f/train/mel/failed.txt").exists()


def test_zeroed_entries_of_the_index_are_told_when_verifying(corpora: Path, tmp_path: Path) -> None:
    """They look like rows not written yet, which is what they have to be taken for; but such a
    cache is not whole.
    """
    command = ["-d", corpora / "Codecfake", "-f", tmp_path, "--feat", "mel", *CPU]
    run(preprocess, *command)
    with open(tmp_path / "train/mel/index.npy", "r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(bytes(16))
    with pytest.raises(InputError, match="2 of 12 rows are not extracted yet"):
        run(preprocess, *command, "--verify")


def open_writer(folder: Path, root: Path) -> CacheWriter:
    meta = json.loads((folder / "cache.json").read_text())
    return CacheWriter(
        folder,
        dataset.read_protocol("codecfake", root, "train"),
        meta["front_end"],
        (505, 80),
        meta["dtype"],
    )


# ── Training ──


def test_weights_that_are_not_finite_are_never_saved(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of finite loss can leave them so; the dev set may hold one class and no EER to stumble
    over it.
    """
    out = train(features, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    real_step = main_train.train_step

    def poisoned(head, *arguments):
        loss = real_step(head, *arguments)
        head.state_dict()["fc_mu.bias"].fill_(float("nan"))
        return loss

    monkeypatch.setattr(main_train, "train_step", poisoned)
    monkeypatch.setattr(main_train, "SAVE_EVERY", -1)
    with pytest.raises(
        InputError, match="epoch 2, after step 1: fc_mu.bias is not finite any more"
    ):
        train(features, out, "--num_epochs", 2, "--continue_training")
    assert {path: path.read_bytes() for path in out.rglob("*.pt")} == before


def out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_running_out_of_memory_says_what_to_lower(
    features: Path, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_head(tmp_path / model.WEIGHTS, model.LCNN("mel"), {})
    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match="out of memory with --batch_size 4; lower it"),
    ):
        patch.setattr(main_train, "train_step", out_of_memory)
        train(features, tmp_path / "run")
    monkeypatch.setattr(frontends.Mel, "forward", out_of_memory)
    with pytest.raises(InputError, match="out of memory with --batch_size 8"):
        run(preprocess, "-d", corpora / "Codecfake", "-f", tmp_path / "f", "--feat", "mel", *CPU)
    with pytest.raises(InputError, match="out of memory with --batch_size 3"):
        run(
            generate_score,
            "-t",
            "ITW",
            "-d",
            corpora / "ITW",
            "--model_folder",
            tmp_path,
            "--result_folder",
            tmp_path / "r",
            *CPU,
            "--batch_size",
            3,
        )
    with pytest.raises(RuntimeError, match="of another kind"), devices.memory_advice(1):
        raise RuntimeError("of another kind")


def test_a_kill_between_state_and_log_loses_no_record(features: Path, tmp_path: Path) -> None:
    out = train(features, tmp_path / "run")
    whole = (out / "log.jsonl").read_text()
    (out / "log.jsonl").unlink()
    train(features, out, "--continue_training")
    assert (out / "log.jsonl").read_text() == whole


# ── Disks ──

ROWS = [Trial(f"t{i}", "", i % 2, "-") for i in range(7)]
VALUES = np.random.default_rng(0).random((7, 2, 3)).astype(np.float32)


def fill(folder: Path) -> None:
    """Write what a cache does not hold yet, marking every second row."""
    writer = CacheWriter(folder, ROWS, {"feat": "mel"}, (2, 3))
    for row in np.flatnonzero(writer.states() != DONE):
        writer.write([row], VALUES[[row]])
        if row % 2:
            writer.flush()
    writer.close()


@pytest.mark.parametrize(
    "blow",
    [
        fails_with(errno.ENOSPC),
        fails_with(errno.EROFS),
        lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    ],
    ids=["full", "read-only", "stopped"],
)
def test_a_cache_goes_on_after_a_fault_at_every_action(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blow
) -> None:
    monkeypatch.setattr(feature_cache, "ROWS_PER_SHARD", 3)
    with (counted := Fuse(tmp_path)).installed():
        fill(tmp_path / "whole")
    assert counted.count > 40
    for at in range(1, counted.count + 1):
        folder, fuse = tmp_path / str(at), Fuse(tmp_path, at, blow)
        with fuse.installed(), pytest.raises((OSError, KeyboardInterrupt, StopIteration)):
            fill(folder)
            next(iter(()))
        fill(folder)
        assert folder_bytes(folder) == folder_bytes(tmp_path / "whole"), at


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_full_disk_leaves_the_older_file(tmp_path: Path) -> None:
    """torch.save hides the system's error behind one of its own, so that nobody could tell a full
    disk from a defect.
    """
    path, at = tmp_path / "x.pt", 0
    torch_files.save(path, {"x": torch.zeros(10)})
    whole = path.read_bytes()
    for at in range(1, 5):  # open, write, fsync, rename
        with (
            Fuse(tmp_path, at, fails_with(errno.ENOSPC)).installed(),
            pytest.raises(OSError) as caught,
        ):
            torch_files.save(path, {"x": torch.ones(10)})
        assert path.read_bytes() == whole and not path.with_name("x.pt.part").exists()
        said = cli.describe(caught.value)
        assert said.startswith(str(path)) and "free some space, then" in said


# ── Determinism ──


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_caches_weights_and_scores_do_not_depend_on_the_workers(
    corpora: Path, tmp_path: Path
) -> None:
    """To the last byte, over three runs with 0, 1 and 4 workers."""
    folders, root = [], make_codecfake(tmp_path / "Codecfake", n_real=1)
    for number, workers in enumerate((0, 1, 4)):
        folders.append(folder := tmp_path / str(number))
        cpu = ["--gpu", "-1", "--num_workers", workers]
        run(preprocess, "-d", root, "-f", folder / "f", "--feat", "mel", "--batch_size", 1, *cpu)
        run(
            main_train,
            "-t",
            "codecfake",
            "-m",
            "lcnn",
            "--feat",
            "mel",
            "-f",
            folder / "f",
            "-o",
            folder / "m",
            "--num_epochs",
            1,
            "--batch_size",
            2,
            *cpu,
        )
        run(
            generate_score,
            "-t",
            "ITW",
            "-d",
            corpora / "ITW",
            "--model_folder",
            folder / "m",
            "--result_folder",
            folder / "r",
            *cpu,
        )
    for folder in folders[1:]:
        for part, pattern in (("f", "*.*"), ("m", "anti*.pt"), ("r", "*.txt")):
            found, expected = (
                {path.relative_to(root): path.read_bytes() for path in root.rglob(pattern)}
                for root in (folder / part, folders[0] / part)
            )
            assert found == expected and found, part


# ── Names ──


def test_escapes_in_names_never_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Names of recordings and of models, what a checkpoint says of itself, and names that are not
    even UTF-8.
    """
    head = tmp_path / "head\x1b[2J"
    head.mkdir()
    model.save_head(head / model.WEIGHTS, model.LCNN("mel"), {"trained": "\x1b[31mby me"})
    (recordings := tmp_path / "mine").mkdir()
    for name in (b"a\x1b[31m.wav", b"b\xff.wav", b"c\nd.wav"):
        write_tone(tmp_path / "tone.wav").rename(recordings / os.fsdecode(name))
    command = [
        "-t",
        "audio",
        "--path",
        tmp_path / "mine",
        "--model_folder",
        head,
        "--result_folder",
        tmp_path / "r\x1b",
        *CPU,
    ]
    run(generate_score, *command)
    (tmp_path / "mine/bad\x1b.wav").write_text("no audio")
    with pytest.raises(InputError, match="1 of 4"):
        run(generate_score, *command)
    printed = capsys.readouterr()
    assert (
        "\x1b" not in printed.out + printed.err
        and "\\x1b[31m.wav" in printed.out
        and "by me" in printed.out
    )
    names = [unquote_to_bytes(name) for name in eval_names(tmp_path / "r\x1b/audio_result.txt")]
    assert {name.rpartition(b"/")[2] for name in names} == {
        b"a\x1b[31m.wav",
        b"b\xff.wav",
        b"c\nd.wav",
    }


def eval_names(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text().splitlines()]


def test_headerless_audio_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(bytes(100))
    with pytest.raises(InputError, match=r"x\.raw: cannot be read as audio"):
        dataset.load_clip(tmp_path / "x.raw")


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "101", "many"])
def test_max_failed_is_a_percentage(text: str) -> None:
    with pytest.raises(SystemExit):
        preprocess.parse(["--max_failed", text])


def test_a_second_signal_does_not_break_off_the_clean_end(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(cli, "_signal", None)
    try:
        for number in before:
            signal.signal(number, cli._raise_stopped)
        with pytest.raises(cli.Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert cli._signal == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ── Processes ──


def test_a_helper_just_forked_leaves_signals_to_its_parent() -> None:
    """Ctrl-C reaches it before it could say so itself."""
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); from runtime import cli\n"
        "def main():\n"
        "    if helper := os.fork(): sys.exit(os.waitpid(helper, 0)[1])\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('goes on')\n"
        "cli.run(main, 'run it again')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, REPO], capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "goes on\n", "")


def test_a_worker_that_is_still_ending_is_waited_for() -> None:
    clips = dataset._Clips(["the file"], 1)
    if not (helper := os.fork()):
        time.sleep(0.2)
        os._exit(1)
    clips.reading[0] = torch.tensor([helper, 0])
    assert clips.files_of_dead_workers() == ["the file"]
    os.waitpid(helper, 0)


def test_the_file_a_dead_worker_was_reading_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(write_tone(tmp_path / f"clip{i}.wav", seconds=0.1)) for i in range(8)]
    real_load = audio.load_recording

    def dies_at_the_sixth(path):
        if path == paths[5]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_load(path)

    monkeypatch.setattr(audio, "load_recording", dies_at_the_sixth)
    with pytest.raises(
        InputError,
        match=r"a decoding process died while it was reading \S*clip5\.wav; take that file out",
    ):
        list(dataset.clip_batches(paths, [[i] for i in range(8)], 2))


def test_workers_do_not_speak_of_a_parent_that_ended_while_it_took_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def ends(ticket: tuple) -> None:
        Client(ticket[0], authkey=multiprocessing.current_process().authkey).close()
        time.sleep(0.3)  # the worker has this long to complain
        raise KeyboardInterrupt

    monkeypatch.setattr(resource_sharer._ResourceSharer, "get_connection", staticmethod(ends))
    with pytest.raises(KeyboardInterrupt):
        list(dataset.clip_batches([str(write_tone(tmp_path / "clip.wav", seconds=0.1))], [[0]], 1))
    gc.collect()  # ends the worker
    assert capfd.readouterr().err == ""


def test_the_helpers_of_a_killed_owner_do_not_hold_its_lock(tmp_path: Path) -> None:
    """A forked child inherits the descriptor; flock would hand it the lock too."""
    code = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1]); from runtime import files\n"
        "with files.exclusive(sys.argv[2]):\n"
        "    if os.fork() == 0: print('forked', flush=True); time.sleep(30); os._exit(0)\n"
        "    time.sleep(30)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, REPO, tmp_path], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        owner.stdout.readline()
        with (
            pytest.raises(InputError, match="another process is writing there"),
            files.exclusive(tmp_path),
        ):
            pass
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        with files.exclusive(tmp_path):
            pass
    finally:
        os.killpg(owner.pid, signal.SIGKILL)


def test_a_refused_second_holder_does_not_drop_the_first_ones_lock(tmp_path: Path) -> None:
    """Record locks do not exclude within a process, and closing any descriptor would drop them."""
    attempt = (
        "import sys; sys.path.insert(0, sys.argv[1]); from runtime import files\n"
        "with files.exclusive(sys.argv[2]): pass"
    )
    command = [sys.executable, "-c", attempt, REPO, tmp_path]
    with files.exclusive(tmp_path):
        with pytest.raises(InputError, match="is writing there"), files.exclusive(tmp_path):
            pass
        refused = subprocess.run(command, capture_output=True, text=True)
    assert "another process is writing there" in refused.stderr
    assert subprocess.run(command).returncode == 0
    with files.exclusive(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_noted_once(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(files.fcntl, "lockf", lambda *_: fails_with(number)())
    with files.exclusive(tmp_path):
        (tmp_path / "work").touch()
    [note] = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: {tmp_path}/.lock: ") and os.strerror(number) in note
    assert note.endswith(f"no other run writes to {tmp_path}")


@pytest.mark.parametrize("script", ["preprocess", "main_train", "generate_score"])
def test_scripts_run_where_there_are_no_locks(
    script: str,
    features: Path,
    corpora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(files.fcntl, "lockf", lambda *_: fails_with(errno.ENOLCK)())
    if script == "preprocess":
        command = ["-d", corpora / "Codecfake", "-f", tmp_path / "out", "--feat", "mel"]
        run(preprocess, *command, *CPU)
    elif script == "main_train":
        train(features, tmp_path / "out")
    else:
        model.save_head(tmp_path / model.WEIGHTS, model.LCNN("mel"), {})
        command = ["-t", "ITW", "-d", corpora / "ITW", "--model_folder", tmp_path]
        run(generate_score, *command, "--result_folder", tmp_path / "out", *CPU)
    assert f"note: {tmp_path}/out" in capsys.readouterr().out


def test_two_processes_on_one_result_folder(corpora: Path, tmp_path: Path) -> None:
    model.save_head(tmp_path / model.WEIGHTS, model.LCNN("mel"), {})
    with (
        files.exclusive(tmp_path / "r"),
        pytest.raises(InputError, match="another process is writing there"),
    ):
        run(
            generate_score,
            "-t",
            "ITW",
            "-d",
            corpora / "ITW",
            "--model_folder",
            tmp_path,
            "--result_folder",
            tmp_path / "r",
            *CPU,
        )


# ── What no other test reaches ──


@pytest.mark.parametrize(
    "task, file, row",
    [
        ("19LA", "LA/ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.eval.trl.txt", "a b c"),
        ("ITW", "label.txt", "a b c"),
        ("ITW", "meta.csv", "a.wav,spoof"),
    ],
)
def test_rows_with_too_few_columns_are_named(
    tmp_path: Path, task: str, file: str, row: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(f"{row}\n")
    with pytest.raises(InputError, match=rf"{Path(file).name}:1: expected .*, got \d columns"):
        dataset.read_protocol(task, tmp_path, {"19LA": "eval", "ITW": "all"}[task])


def test_a_rate_that_no_converter_has_is_refused(tmp_path: Path) -> None:
    data = bytearray(write_tone(tmp_path / "x.wav").read_bytes())
    data[24:28] = (768_001).to_bytes(4, "little")
    (tmp_path / "x.wav").write_bytes(data)
    with pytest.raises(InputError, match="expected a sampling rate up to 768000 Hz, got 768001"):
        dataset.load_clip(tmp_path / "x.wav")


def test_a_defect_in_decoding_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path):
        raise RuntimeError("a defect")

    monkeypatch.setattr(audio, "load_recording", fails)
    with pytest.raises(RuntimeError, match="a defect"):
        list(dataset.clip_batches(["x"], [[0]], 0))


def test_csam_needs_two_corpora() -> None:
    with pytest.raises(InputError, match="CSAM takes two corpora"):
        dataset.proportional_batches([3], 8, 688, 1)


def test_a_cache_that_fails_under_its_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut while open: the row is damaged.

    A disk that reports an error: the file is named. No row left: said so.
    """
    folder = make_cache(tmp_path / "train/mel", rows=2)
    cache = FeatureCache(folder)
    cache.read(np.array([0]))
    os.truncate(folder / "features_00000.npy", 1000)
    assert cache.damaged_rows() == [0, 1]
    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(os, "preadv", lambda *arguments: fails_with(errno.EIO)())
        cache.read(np.array([0]))
    assert caught.value.filename == str(folder / "features_00000.npy")
    writer = CacheWriter(
        folder, [Trial(f"t{i}.wav", "", i % 2, "-") for i in range(2)], {"feat": "mel"}, (505, 80)
    )
    writer.mark_failed([0, 1])
    with pytest.raises(InputError, match="holds no readable row"):
        dataset.open_features(tmp_path, "train", "mel")


def test_three_parts_of_which_one_has_no_row_in_the_batch(features: Path) -> None:
    part = FeatureCache(features / "train/mel")
    joined = dataset.JoinedFeatures([part] * 3)
    assert torch.equal(joined.read(np.array([1, 14]))[0], part.read(np.array([1, 2]))[0].float())


@pytest.mark.parametrize("text", ['{"sha256": {"C1_result.txt": 1}}', "[]", "["])
def test_a_list_of_checksums_of_another_kind_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(InputError, match="provenance.json: damaged"):
        score_files.read_checksums(tmp_path)


# ── Streams ──


@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", ">&- 2>&-"])
def test_no_stream_ends_a_run(tmp_path: Path, redirection: str) -> None:
    """A cluster's ASCII locale with a name outside it; streams that are closed."""
    folder = tmp_path / "Übung"
    folder.mkdir()
    rows = [f"{n}.wav 0.{9 - n} {'real' if n < 4 else 'fake'}\n" for n in range(8)]
    (folder / "C1_result.txt").write_text("".join(rows))
    command = f"'{sys.executable}' evaluate_score.py --no_ci --result_folder '{folder}' "
    done = subprocess.run(
        ["bash", "-c", command + redirection],
        cwd=REPO,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if not redirection:
        assert "bung" in done.stdout
