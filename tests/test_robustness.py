"""Damage, hostile files, full disks, kills: the fast part of tests/torture.py.    python -m pytest tests/test_robustness.py"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cli
import dataset
import eval_metrics
import evaluate_score
import feature_cache
import generate_score
import main_train
import model
import preprocess
import torch_files
from cli import InputError
from conftest import REPO, make_codecfake, write_tone
from dataset import Trial
from feature_cache import DONE, CacheWriter, FeatureCache

CPU = ["--gpu", "-1", "--num_workers", "0"]


def run(module, *arguments: object) -> None:
    module.main([str(argument) for argument in arguments])


def make_cache(folder: Path, rows: int = 6, feat: str = "mel") -> Path:
    trials = [Trial(f"t{i}.wav", f"/nowhere/t{i}.wav", i % 2, "-") for i in range(rows)]
    writer = CacheWriter(folder, trials, {"feat": feat}, dataset.FEATURE_SHAPES[feat])
    writer.write(range(rows), np.random.default_rng(rows).random((rows, *dataset.FEATURE_SHAPES[feat]), np.float32))
    writer.close()
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("features")
    for part in ("train", "dev"):
        make_cache(root / part / "mel")
    return root


def train(features: Path, out: Path, *options: object) -> Path:
    run(main_train, "-t", "codecfake", "-m", "lcnn", "--feat", "mel", "-f", features, "-o", out, "--batch_size", 4, "--num_epochs", 1, *CPU, *options)
    return out


# ── Hostile files ──


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_program(path: Path, program: bytes, **members: bytes) -> Path:
    """A torch.save archive around a pickle made by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {"data.pkl": program, "version": b"3\n", **members}.items():
            archive.writestr(f"x/{name}", data)
    return path


DOUBLED = b"h\x00h\x00\x86q\x00"           # a pair of what the memo holds, in its place
EMPTY_PAIR = b"\x80\x02)q\x00"             # the empty tuple, memorised


@pytest.mark.parametrize("content", [
    Call(bytearray, 3_000_000_000), Call(os.system, "true"), Call(eval, "1"), Call(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, ()),
    Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (10**6, 10**6), (10**6, 1), False),
    torch.zeros(1).to_sparse(), torch.zeros(1, device="meta"), torch.nested.nested_tensor([torch.zeros(2)]), {("a", 1): 2}, {None: 1}, 1j, {1, 2.5, "a"},
], ids=lambda content: type(content).__name__)
def test_names_outside_the_short_list_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    try:
        torch_files.load(tmp_path / "x.pt")
        assert isinstance(content, set)        # a set comes back as a list
    except InputError as error:
        assert "x.pt" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("program, message", [
    (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "refused, it names posix.system"),
    (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "SHORT_BINUNICODE"),
    (EMPTY_PAIR + DOUBLED * 60 + b"}h\x00K\x01s.", "neither text nor whole numbers"),              # hashing it would take 2^60 steps
    (EMPTY_PAIR + b"ctorch\ndevice\n" + DOUBLED * 60 + b"h\x00R.", "damaged"),
    (b"\x80\x02K\x01r\xff\xff\xff\x7f\x85R.", "damaged"),                                          # memo place 2^31: no array of that size
    (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged"), (b"\x80\x02", "damaged"), (b"", "damaged"), (b"\x80\x02.", "damaged"), (b"\x80\x02e.", "damaged"),
    (b"\x80\x02" + b"]" * 2**22 + b".", "unusual size"), (b"\x80\x02]K\x01b.", "attributes for a list"),
    (b"\x80\x02ctorch\nSize\n)\x81.", "unusual way"),
    (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)" b")\x89NtR.", "damaged"),
], ids=str)
def test_programs_by_hand_are_refused(tmp_path: Path, program: bytes, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=message):
        torch_files.load(write_program(tmp_path / "x.pt", program))
    assert time.monotonic() - began < 20


def storage_program(shape: bytes, stride: bytes, count: bytes) -> bytes:
    """A float tensor on member data/0."""
    persistent = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + count + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + b"K\x00" + shape + stride + b"\x89NtR."


@pytest.mark.parametrize("shape, stride, count, why", [
    (b"K\x02\x85", b"K\x01\x85", b"K\x02", None),
    (b"K\x03\x85", b"K\x01\x85", b"K\x02", "larger than its storage"), (b"K\x02\x85", b"K\x02\x85", b"K\x02", "larger than its storage"),
    (b"J\x00\x00\x00\x40\x85", b"K\x00\x85", b"K\x02", "larger than its storage"),            # stride 0: a billion values out of two
    (b"J\xff\xff\xff\xff\x85", b"K\x01\x85", b"K\x02", "impossible size"), (b"K\x02\x85", b")", b"K\x02", "impossible size"),
    (b"K\x02\x85", b"K\x01\x85", b"K\x63", "a storage of 99"), (b"K\x02\x85", b"K\x01\x85", b")", "without a name or size"),
])
def test_tensors_stay_inside_their_storage(tmp_path: Path, shape: bytes, stride: bytes, count: bytes, why: str | None) -> None:
    path = write_program(tmp_path / "x.pt", storage_program(shape, stride, count), **{"data/0": np.array([1, 2], np.float32).tobytes()})
    if why is None:
        assert torch_files.load(path).tolist() == [1, 2]
        return
    with pytest.raises(InputError, match=why):
        torch_files.load(path)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for program in (b"\x80\x02N.", b"\x80\x02K\x01."):
            archive.writestr("x/data.pkl", program)
    with pytest.raises(InputError, match="two members of one name"):
        torch_files.load(tmp_path / "x.pt")


def test_what_torch_saves_comes_back(tmp_path: Path) -> None:
    """All that our own files and the released ones hold, views into one storage and empty tensors included."""
    base = torch.arange(12.0)
    content = {"a": [1, -1, 2**40, 0.5, None, True, False, "x", ()], "b": (base.view(3, 4).T, base[3:]), 7: torch.empty(0, 3),
               "d": nn.Parameter(torch.eye(2)), "half": torch.ones(2, dtype=torch.float16)}
    torch_files.save(tmp_path / "x.pt", content)
    found = torch_files.load(tmp_path / "x.pt")
    assert found["a"] == content["a"] and found.keys() == content.keys()
    for one, other in ((found["b"][0], content["b"][0]), (found["b"][1], base[3:]), (found["d"], torch.eye(2)), (found["half"], content["half"]), (found[7], content[7])):
        assert one.dtype == other.dtype and torch.equal(one, other)
    found["b"][0][0, 0] = 99
    assert found["b"][0].untyped_storage().data_ptr() == found["b"][1].untyped_storage().data_ptr(), "shared storages stay shared"


def endless_head(kind: str) -> nn.Module:
    head = nn.Sequential(nn.Linear(1, 1))
    if kind == "cycle":
        head._modules["again"] = head
    if kind == "doubling":
        for _ in range(60):
            outer = nn.Sequential()
            outer._modules = {"a": head, "b": head}
            head = outer
    if kind == "names":
        head._modules = {"n" * 100_000: head}
    if kind == "not a dict":
        head._modules = [1]
    return head


@pytest.mark.parametrize("kind", ["cycle", "doubling", "names", "not a dict"])
def test_modules_without_end_are_refused(tmp_path: Path, kind: str) -> None:
    torch.save(endless_head(kind), tmp_path / "x.pt")
    with pytest.raises(InputError, match="not a pickled network"):
        model.load_head(tmp_path / "x.pt")


def doubled(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize("info", [{"train_task": ["x"]}, {"ssl": 5}, {"front_end": "mel"}, {"x": torch.zeros(1)}, {"x": doubled(60)}, {"x": doubled(19)}, "text"],
                         ids=["task", "ssl", "front end", "tensor", "doubled", "large", "text"])
def test_a_checkpoints_record_must_be_plain(tmp_path: Path, info: object) -> None:
    model.save_head(tmp_path / "x.pt", model.LCNN("mel"), info)
    with pytest.raises(InputError, match="record of something else"):
        model.load_head(tmp_path / "x.pt")


@pytest.mark.parametrize("change", [
    lambda s: s.pop("settings"), lambda s: s.update(epoch="2"), lambda s: s["progress"].pop("step"), lambda s: s["progress"].update(loss="x"),
    lambda s: s.update(history=[{}]), lambda s: s["head"].popitem(), lambda s: s["optimiser"].pop("state"),
    lambda s: s["optimiser"]["state"][0].update(exp_avg=torch.zeros(1)), lambda s: s["optimiser"]["state"].update({999: {}}), lambda s: s.update(settings=doubled(60)),
])
def test_a_state_of_other_parts_is_refused(tmp_path: Path, change) -> None:
    head = nn.Linear(3, 2)
    optimiser = torch.optim.Adam(head.parameters())
    head(torch.rand(2, 3)).sum().backward()
    optimiser.step()
    state = {"format": main_train.STATE_FORMAT, "settings": {}, "epoch": 1, "progress": vars(main_train.Progress()), "history": [],
             "head": dict(head.state_dict()), "optimiser": optimiser.state_dict()}
    assert main_train.fits(head, state["head"], state["optimiser"])
    change(state)
    torch_files.save(tmp_path / "last_state.pt", state)
    with pytest.raises(InputError, match="damaged"):
        found = main_train.read_state(tmp_path / "last_state.pt")
        assert main_train.fits(head, found["head"], found["optimiser"]) is False
        raise InputError("damaged")


# ── Protocols ──


@pytest.mark.parametrize("row, message", [
    ('1.wav,"never closed,spoof', "meta.csv:2: expected `file,speaker,label`"), ("1.wav,a\0b,spoof", None), ('"../1.wav",a,spoof', "plain file name"),
    ("/etc/passwd,a,spoof", "plain file name"), ('1.wav,"' + "x" * 200_000 + '",spoof', "over 4096 characters"), ("1\x1b[2J.wav,a,spoof", "plain file name"),
])
def test_hostile_rows_of_meta_csv(tmp_path: Path, row: str, message: str | None) -> None:
    """An open quote would swallow the rest of the file, or end in an error of the csv module."""
    (tmp_path / "meta.csv").write_text("file,speaker,label\n" + row + "\n" + "2.wav,b,bona-fide\n" * 5)
    if message is None:
        assert len(dataset.read_protocol("ITW", tmp_path, "all")) == 6
        return
    with pytest.raises(InputError, match=message):
        dataset.read_protocol("ITW", tmp_path, "all")


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
        run(generate_score, "-t", "codecfake", "-d", root, "--subset", "C1", "--model_folder", tmp_path, "--result_folder", tmp_path / "r", *CPU)
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
def test_repair_redoes_what_is_damaged_and_no_more(corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage) -> None:
    monkeypatch.setattr(feature_cache, "ROWS_PER_SHARD", 4)
    command = ["-d", corpora / "Codecfake", "-f", tmp_path, "--feat", "mel", *CPU]
    run(preprocess, *command)
    folder = tmp_path / "train/mel"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    with pytest.raises(InputError, match=rf"{name}: |no feature cache to verify"):
        run(preprocess, *command, "--verify")
    if not (folder / "cache.json").exists():   # then it is as if never made: an ordinary run makes it
        run(preprocess, *command)
    else:
        written: list[int] = []
        real_write = CacheWriter.write
        monkeypatch.setattr(CacheWriter, "write", lambda self, rows, values: written.extend(rows) or real_write(self, rows, values))
        run(preprocess, *command, "--verify", "--repair")
        everything = name == "cache.json" or (name == "index.npy" and damage is Path.unlink)      # nobody knows what is whole
        assert len(written) == 12 if everything else len(written) < 12
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_a_changed_digit_of_a_score_is_found(corpora: Path, tmp_path: Path) -> None:
    model.save_head(tmp_path / model.WEIGHTS, model.LCNN("mel"), {})
    command = ["-t", "ITW", "-d", corpora / "ITW", "--model_folder", tmp_path, "--result_folder", tmp_path / "r", *CPU]
    run(generate_score, *command)
    path = tmp_path / "r/ITW_result.txt"
    run(evaluate_score, "--result_folder", tmp_path / "r", "--no_ci")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b" 0.", b" 0.1", 1))
    with pytest.raises(InputError, match=r"ITW_result\.txt: damaged or edited"):
        run(evaluate_score, "--result_folder", tmp_path / "r", "--no_ci")
    (tmp_path / "r/provenance.json").write_text("{")
    for script, options in ((evaluate_score, ["--result_folder", tmp_path / "r", "--no_ci"]), (generate_score, [*command, "--overwrite"])):
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


def open_writer(folder: Path, root: Path) -> CacheWriter:
    meta = json.loads((folder / "cache.json").read_text())
    return CacheWriter(folder, dataset.read_protocol("codecfake", root, "train"), meta["front_end"], (505, 80), meta["dtype"])


# ── Training ──


def test_weights_that_are_not_finite_are_never_saved(features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of finite loss can leave them so; the dev set may hold one class and no EER to stumble over it."""
    out = train(features, tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*.pt")}
    real_step = main_train.train_step

    def poisoned(head, *arguments):
        loss = real_step(head, *arguments)
        head.state_dict()["fc_mu.bias"].fill_(float("nan"))
        return loss
    monkeypatch.setattr(main_train, "train_step", poisoned)
    monkeypatch.setattr(main_train, "SAVE_EVERY", -1)
    with pytest.raises(InputError, match="epoch 2, after step 1: fc_mu.bias is not finite any more"):
        train(features, out, "--num_epochs", 2, "--continue_training")
    assert {path: path.read_bytes() for path in out.rglob("*.pt")} == before


def out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_running_out_of_memory_says_what_to_lower(features: Path, corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_head(tmp_path / model.WEIGHTS, model.LCNN("mel"), {})
    with monkeypatch.context() as patch, pytest.raises(InputError, match="out of memory with --batch_size 4; lower it"):
        patch.setattr(main_train, "train_step", out_of_memory)
        train(features, tmp_path / "run")
    monkeypatch.setattr(model.Mel, "forward", out_of_memory)
    with pytest.raises(InputError, match="out of memory with --batch_size 8"):
        run(preprocess, "-d", corpora / "Codecfake", "-f", tmp_path / "f", "--feat", "mel", *CPU)
    with pytest.raises(InputError, match="out of memory with --batch_size 3"):
        run(generate_score, "-t", "ITW", "-d", corpora / "ITW", "--model_folder", tmp_path, "--result_folder", tmp_path / "r", *CPU, "--batch_size", 3)
    with pytest.raises(RuntimeError, match="of another kind"), model.memory_advice(1):
        raise RuntimeError("of another kind")


def test_a_kill_between_state_and_log_loses_no_record(features: Path, tmp_path: Path) -> None:
    out = train(features, tmp_path / "run")
    whole = (out / "log.jsonl").read_text()
    (out / "log.jsonl").unlink()
    train(features, out, "--continue_training")
    assert (out / "log.jsonl").read_text() == whole


# ── Processes ──


def test_the_file_a_dead_worker_was_reading_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(write_tone(tmp_path / f"clip{i}.wav", seconds=0.1)) for i in range(8)]
    real_load = dataset._load_clip

    def dies_at_the_sixth(path):
        if path == paths[5]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_load(path)
    monkeypatch.setattr(dataset, "_load_clip", dies_at_the_sixth)
    with pytest.raises(InputError, match=r"a decoding process died .*; it was reading .*clip5\.wav\. Take that file out"):
        list(dataset.clip_batches(paths, [[i] for i in range(8)], 2))


def test_the_helpers_of_a_killed_owner_do_not_hold_its_lock(tmp_path: Path) -> None:
    """A forked child inherits the descriptor, and with flock the lock."""
    code = ("import os, sys, time; sys.path.insert(0, sys.argv[1]); import cli\n"
            "with cli.only_one(sys.argv[2]):\n"
            "    if os.fork() == 0: time.sleep(30); os._exit(0)\n"
            "    print('held', flush=True); time.sleep(30)")
    owner = subprocess.Popen([sys.executable, "-c", code, REPO, tmp_path], stdout=subprocess.PIPE, start_new_session=True)
    try:
        owner.stdout.readline()
        with pytest.raises(InputError, match="another process is writing there"), cli.only_one(tmp_path):
            pass
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        with cli.only_one(tmp_path):
            pass
    finally:
        os.killpg(owner.pid, signal.SIGKILL)


def test_two_processes_on_one_result_folder(corpora: Path, tmp_path: Path) -> None:
    model.save_head(tmp_path / model.WEIGHTS, model.LCNN("mel"), {})
    with cli.only_one(tmp_path / "r"), pytest.raises(InputError, match="another process is writing there"):
        run(generate_score, "-t", "ITW", "-d", corpora / "ITW", "--model_folder", tmp_path, "--result_folder", tmp_path / "r", *CPU)
