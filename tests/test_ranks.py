"""Two processes under torchrun do what one does.    python -m pytest tests/test_ranks.py"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, make_codecfake, write_tone
from on_ranks import NORMS, comparable, norm_inputs

import generate_score
import main_train
import model
import preprocess
from dataset import FEATURE_SHAPES, Trial
from formats.feature_cache import CacheWriter
from runtime import cli, ranks
from runtime.cli import InputError

CPU = ["--gpu", "-1", "--num_workers", "1"]


@dataclass(frozen=True)
class Outcome:
    """What a launch came to."""

    code: int  # of torchrun: 0, or 1 where a rank failed
    report: str  # torchrun's own
    out: list[str]  # of each rank
    err: list[str]


def torchrun(logs: Path, *command: object, n: int = 2) -> Outcome:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={n}",
            "--redirects=3",
            f"--log_dir={logs}",
            *map(str, command),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    out, err = (
        [next(logs.glob(f"*/attempt_0/{rank}/{name}.log")).read_text() for rank in range(n)]
        for name in ("stdout", "stderr")
    )
    return Outcome(result.returncode, result.stderr, out, err)


def on_ranks(folder: Path, case: str, *commands: tuple[str, list]) -> Outcome:
    lines = (
        [json.dumps([(script, [str(word) for word in words]) for script, words in commands])]
        if commands
        else []
    )
    outcome = torchrun(folder / "logs", "-m", "tests.on_ranks", case, folder, *lines)
    assert outcome.code == 0 or case == "interrupted", "\n".join(outcome.err) + outcome.report
    return outcome


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As each rank has; sums over several threads have other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(module, words: list) -> None:
    module.main([str(word) for word in words])


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Contents by name, without the locks and what a cache records of the run that made it."""
    paths = [path for path in folder.rglob(pattern) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): content_of(path) for path in paths}


def content_of(path: Path) -> bytes:
    content = path.read_bytes()
    if path.name != "cache.json":
        return content
    meta = json.loads(content)
    assert {"command", "commit", "versions", "device"} == meta["about"].pop("run").keys()
    meta.pop("crc32")
    return json.dumps(meta).encode()


# ── preprocess.py ──


def damaged_codecfake(root: Path) -> Path:
    """Two files that cannot be read, in batches of different ranks, and one that is absent."""
    make_codecfake(root)
    for name in ("F01_strain_000.wav", "strain_001.wav"):
        (root / "train" / name).write_text("no audio")
    (root / "train/strain_003.wav").unlink()
    return root


def test_caches_have_the_bytes_of_one_process(
    corpora: Path, ssl_narrow: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also the list of failures, and where one rank looks at the index a second after the other;
    what is said is said once.
    """
    broken = damaged_codecfake(tmp_path / "Codecfake")
    mel = [
        "-d",
        broken,
        "--feat",
        "mel",
        "--batch_size",
        2,
        "--skip_missing",
        "--max_failed",
        20,
        *CPU,
    ]
    xlsr = ["-d", corpora / "Codecfake", "--ssl", ssl_narrow, "--any_size", "--batch_size", 4, *CPU]
    run(preprocess, [*mel, "-f", tmp_path / "one"])
    alone = capsys.readouterr().out
    run(preprocess, [*xlsr, "-f", tmp_path / "one"])
    outcome = on_ranks(
        tmp_path,
        "slow_second_rank",
        ("preprocess", [*mel, "-f", tmp_path / "two"]),
        ("preprocess", [*xlsr, "-f", tmp_path / "two"]),
    )
    expected = files(tmp_path / "one")
    assert len(expected["train/mel/failed.txt"].splitlines()) == 3 and len(expected) == 21
    assert files(tmp_path / "two") == expected
    assert (
        outcome.out[0].startswith(
            alone.replace("one/train", "two/train").replace("one/dev", "two/dev")
        )
        and outcome.out[1] == ""
    )
    assert "12/12" in outcome.err[0] and "clip" not in outcome.err[1]


def test_an_interrupted_run_goes_on_with_another_number_of_ranks(
    corpora: Path, tmp_path: Path
) -> None:
    command = ["-d", corpora / "Codecfake", "--feat", "mel", "--batch_size", 2, *CPU]
    run(preprocess, [*command, "-f", tmp_path / "one"])
    outcome = on_ranks(
        tmp_path / "two", "interrupted", ("preprocess", [*command, "-f", tmp_path / "two"])
    )
    said = "".join(outcome.err).count("interrupted: run the same command again")
    assert outcome.code and said == 1 and "Traceback" not in "".join(outcome.err)
    assert files(tmp_path / "two/dev") != files(tmp_path / "one/dev")
    run(preprocess, [*command, "-f", tmp_path / "two"])
    assert {part: files(tmp_path / "two" / part) for part in ("train", "dev")} == {
        part: files(tmp_path / "one" / part) for part in ("train", "dev")
    }


# ── generate_score.py ──


def test_scores_have_the_bytes_of_one_process(
    corpora: Path, ssl_1024: Path, tmp_path: Path
) -> None:
    """Two models on one pass, with files that cannot be read, on each rank."""
    heads = []
    for name, head in (("mel", model.LCNN("mel")), ("xlsr", model.W2VAASIST())):
        heads.append(tmp_path / "models" / name)
        heads[-1].mkdir(parents=True)
        model.save_head(heads[-1] / model.WEIGHTS, head, {"feat": head.feat, "ssl": str(ssl_1024)})
    broken = make_codecfake(tmp_path / "Codecfake", n_real=2)
    for name in ("s_000.wav", "s_001.wav", "F01_s_000.wav"):
        (broken / "test/C1" / name).write_text("no audio")
    commands = [
        ["-t", "codecfake", "-d", broken, "--subset", "C1", "--skip_missing"],
        ["-t", "ITW", "-d", corpora / "ITW"],
    ]
    options = ["--model_folder", *heads, "--batch_size", 2, *CPU, "--result_folder"]
    for command in commands:
        run(generate_score, [*command, *options, tmp_path / "one"])
    outcome = on_ranks(
        tmp_path,
        "commands",
        *(("generate_score", [*command, *options, tmp_path / "two"]) for command in commands),
    )
    expected = files(tmp_path / "one", "*.txt")
    assert len(expected["mel/C1_missing.txt"].splitlines()) == 3 and len(expected) == 6
    assert files(tmp_path / "two", "*.txt") == expected
    assert outcome.out[0].count("ITW_result.txt: 6 scores") == 2 and outcome.out[1] == ""


# ── main_train.py ──


RUNS = {
    f"{head} {way}": (feat, head, way)
    for feat, head, ways in (
        ("mel", "lcnn", ("plain", "CSAM")),
        ("xls-r-5", "W2VAASIST", ("plain", "SAM", "ASAM", "CSAM")),
    )
    for way in ways
}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of Codecfake and two of LA, whose classes differ."""
    root = tmp_path_factory.mktemp("features")
    for corpus, rows in (("Codecfake", 3), ("LA", 2)):
        for part, feat in (
            (part, feat) for part in ("train", "dev") for feat in ("mel", "xls-r-5")
        ):
            labels = np.arange(rows) % 2
            values = (
                np.random.default_rng((rows, len(part))).random(
                    (rows, *FEATURE_SHAPES[feat]), np.float32
                )
                + 0.2 * labels[:, None, None]
            )
            writer = CacheWriter(
                root / corpus / part / feat,
                [Trial(f"{corpus}{i}", "", int(label), "-") for i, label in enumerate(labels)],
                {"feat": feat},
                FEATURE_SHAPES[feat],
            )
            writer.write(range(rows), values)
            writer.close()
    return root


@pytest.fixture(scope="module")
def trained(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/ and two/ with a folder for each of RUNS: two epochs on one process, and on two ranks.

    Three rows in batches of two leave a last one of one row, and a rank without any.
    """
    root = tmp_path_factory.mktemp("trained")
    commands = {
        processes: [
            [
                "-t",
                "co-train" if way == "CSAM" else "codecfake",
                "-m",
                head,
                "--feat",
                feat,
                "-f",
                features / "Codecfake",
                "-f1",
                features / "LA",
                "-o",
                root / processes / name,
                "--num_epochs",
                2,
                "--batch_size",
                2,
                *CPU,
                *([] if way == "plain" else [f"--{way}"]),
            ]
            for name, (feat, head, way) in RUNS.items()
        ]
        for processes in ("one", "two")
    }
    with comparable():
        for command in commands["one"]:
            run(main_train, command)
    on_ranks(root, "exactly", *(("main_train", command) for command in commands["two"]))
    return root


@pytest.mark.parametrize("name", RUNS)
def test_training_takes_the_steps_of_one_process(trained: Path, name: str) -> None:
    """The loss divides by the weights of the whole batch, BatchNorm takes all its rows, SAM climbs
    the joint gradient.
    """
    one, two = (
        [json.loads(line) for line in (trained / n / name / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    assert len(two) == 2
    for key in ("loss", "dev_loss", "dev_eer"):
        np.testing.assert_allclose(
            [record[key] for record in two],
            [record[key] for record in one],
            atol=1e-6,
            rtol=0,
            err_msg=key,
        )
    one, two = (
        model.load_head(
            trained / n / name / "checkpoint/anti-spoofing_feat_model_2.pt"
        ).state_dict()
        for n in ("one", "two")
    )
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-6, rtol=1e-5, msg=f"{key} differs")


def test_a_run_of_two_ranks_goes_on_as_one(trained: Path, features: Path, tmp_path: Path) -> None:
    """Its state holds no trace of how many wrote it."""
    name = "lcnn CSAM"
    run(
        main_train,
        [
            "-t",
            "co-train",
            "-m",
            "lcnn",
            "--feat",
            "mel",
            "-f",
            features / "Codecfake",
            "-f1",
            features / "LA",
            "-o",
            trained / "two" / name,
            "--num_epochs",
            3,
            "--batch_size",
            2,
            "--CSAM",
            "--continue_training",
            *CPU,
        ],
    )
    records = (trained / "two" / name / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in records] == [1, 2, 3]


@pytest.mark.parametrize("case", ["norm", "norm_compiled"])
def test_synced_batchnorm_is_batchnorm_of_the_joint_batch(tmp_path: Path, case: str) -> None:
    """Also inside a network that is compiled: were it compiled itself, gradients would be wrong."""
    on_ranks(tmp_path, case)
    for kind in NORMS:
        layer, x, factor = norm_inputs(kind)
        x.requires_grad_()
        out = layer(x)
        (out * factor).sum().backward()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        expected = {"out": out, "again": out, "x": x.grad, "eval": layer.eval()(x)}
        parts = [torch.load(tmp_path / f"{kind} {rank}.pt", weights_only=True) for rank in range(2)]
        for what, joint in expected.items():
            for rank, part in enumerate(parts):
                torch.testing.assert_close(
                    part[what],
                    joint[rank::2],
                    atol=1e-3 if kind == "far from zero" else 1e-5,
                    rtol=1e-5,
                    msg=f"{kind}, {what}, rank {rank}",
                )
        for number, parameter in enumerate(layer.parameters()):
            torch.testing.assert_close(
                sum(part["parameters"][number] for part in parts),
                parameter.grad,
                atol=1e-3,
                rtol=1e-4,
            )
        for name, tensor in before.items():
            for part in parts:
                torch.testing.assert_close(
                    part["state"][name],
                    tensor,
                    atol=1e-5,
                    rtol=1e-5,
                    msg=f"{kind}, {name}",
                )


# ── Mistakes ──


def test_a_head_that_several_processes_train_is_not_compiled(monkeypatch, capsys) -> None:
    monkeypatch.setattr(ranks, "_size", 2)
    with pytest.raises(SystemExit):
        main_train.parse(["-t", "19LA", "--compile"])
    assert "--compile is for one process, here are 2" in capsys.readouterr().err


def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [ranks.gpu(asked) for asked in (None, 1, -1)] == [None, 1, -1]  # one process: as asked
    monkeypatch.setattr(ranks, "_size", 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [ranks.gpu(asked) for asked in (None, -1)] == [1, -1]
    with pytest.raises(InputError, match="--gpu 0: names one GPU, but of 3 processes"):
        ranks.gpu(0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        InputError,
        match="process 3 of this machine finds no GPU left, torch sees 2; .*--nproc_per_node",
    ):
        ranks.gpu(None)


@pytest.mark.parametrize(
    "command, message",
    [
        (
            [
                "preprocess.py",
                "--feat",
                "mel",
                "-d",
                "{}",
                "--max_failed",
                10,
                "-f",
                "{}/f",
                "--batch_size",
                2,
                *CPU,
            ],
            "2 of 12 files cannot be read, more than",
        ),
        (
            ["preprocess.py", "--feat", "mel", "-d", "{}/nowhere", "-f", "{}/f", *CPU],
            "nowhere: no such folder",
        ),
        (["main_train.py", "-t", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_a_mistake_ends_all_ranks_in_one_line(tmp_path: Path, command: list, message: str) -> None:
    """Whether one rank meets it, or all do; torchrun adds its own report."""
    damaged_codecfake(tmp_path)
    write_tone(tmp_path / "train/strain_003.wav")  # nothing is absent
    outcome = torchrun(tmp_path / "logs", *(str(word).format(tmp_path) for word in command))
    err = "".join(outcome.err)
    assert outcome.code == 1 and re.search(r"exitcode\s*: 2", outcome.report), err + outcome.report
    assert err.count("error: ") == 1 and message in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    "size, rank, message",
    [
        ("", "0", "WORLD_SIZE is ''"),
        ("abc", "0", "WORLD_SIZE is 'abc'"),
        ("2", "0", "not all 2 processes came"),
        ("2", "1", "not all 2 processes came"),
    ],
)
def test_left_over_variables_of_a_cluster_end_in_one_line(
    size: str, rank: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(ranks, "PEER_TIMEOUT", timedelta(seconds=1))
    variables = {"WORLD_SIZE": size, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message) as refused:
        ranks._join()
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def test_ctrl_c_does_not_wait_for_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    began = threading.Event()
    let_go = threading.Event()

    def wait_for_peers() -> None:
        began.set()
        let_go.wait(60)

    def ask_to_stop() -> None:
        if began.wait(0):
            raise cli.Stopped

    monkeypatch.setattr(cli, "stop_if_asked", ask_to_stop)
    with pytest.raises(cli.Stopped):
        ranks._interruptibly(wait_for_peers)
    assert not let_go.is_set()
    let_go.set()
