"""Little shared memory, few descriptors: workers that cannot be had, or that fail."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dataset
from runtime import limits
from runtime.cli import InputError
from tests.conftest import REPO, write_tone


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [str(write_tone(tmp_path / f"{n}.wav", seed=n)) for n in range(6)]


BATCHES = [[0, 1], [2, 3], [4, 5]]


def test_clips_come_through_pipes_where_shared_memory_is_small(
    paths: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    expected = list(dataset.clip_batches(paths, BATCHES, num_workers=0))
    monkeypatch.setattr(limits, "free_shared_memory", lambda: limits.LOCKS_NEED)
    found = list(dataset.clip_batches(paths, BATCHES, num_workers=2))
    assert "/dev/shm is too small for the 3 MB of clips" in capsys.readouterr().out
    for one, other in zip(expected, found, strict=True):
        assert one.rows == other.rows
        assert torch.equal(one.clips, other.clips)


def test_no_workers_where_there_is_no_shared_memory(
    paths: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(limits, "SHARED_MEMORY", Path("/no/such/folder"))
    assert len(list(dataset.clip_batches(paths, BATCHES, num_workers=2))) == len(BATCHES)
    assert "no worker processes" in capsys.readouterr().out


def test_fewer_workers_where_few_files_may_be_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(limits, "_file_limit", lambda: 100)
    monkeypatch.setattr(limits, "_n_open_files", lambda: 30)
    assert limits.allowed_workers(8) == 3
    assert "3 worker processes, not 8" in capsys.readouterr().out
    assert limits.allowed_workers(2) == 2


def test_the_limit_of_open_files_is_raised() -> None:
    code = "from runtime import limits; print(limits._file_limit())"
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    command = f"ulimit -Sn 50; {sys.executable} -c '{code}'"
    found = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True)
    wanted = limits.MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, limits.MANY_FILES)
    assert int(found.stdout) == wanted


class Unsendable:
    """What a worker cannot hand over."""

    def __init__(self, reason: str):
        self.reason = reason

    def __reduce__(self) -> tuple:
        raise RuntimeError(self.reason)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("unable to allocate shared memory(shm) for file </torch_1>", "--shm-size"),
        ("Too many open files (24)", "ulimit -n"),
        ("anything else", "RuntimeError: anything else"),
    ],
)
def test_a_batch_that_cannot_be_handed_over_ends_the_run(
    paths: list[str], monkeypatch: pytest.MonkeyPatch, reason: str, message: str
) -> None:
    monkeypatch.setattr(dataset._Clips, "__getitems__", lambda self, rows: Unsendable(reason))
    with pytest.raises(InputError, match=message):
        list(dataset.clip_batches(paths, BATCHES, num_workers=1))


def test_a_shared_memory_that_fills_up(tmp_path: Path, paths: list[str]) -> None:
    """In a namespace of its own, with a small /dev/shm that looks large to the program."""
    code = (
        "import sys, time, dataset\n"
        "from runtime import cli, limits\n"
        "limits.free_shared_memory = lambda: 2**40\n"
        "def main():\n"
        "    for batch in dataset.clip_batches(sys.argv[1:], [[0, 1], [2, 3], [4, 5]], 3):\n"
        "        time.sleep(0.2)\n"
        "cli.run(main, '')\n"
    )
    (tmp_path / "script.py").write_text(code)
    mount = "mount -t tmpfs -o size=300k tmpfs /dev/shm"
    shell = f'{mount} && PYTHONPATH={REPO} {sys.executable} "$@"'
    command = ["unshare", "-rm", "bash", "-c", shell, "bash", tmp_path / "script.py", *paths]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("needs unshare, which this system lacks or does not allow")
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2
    assert found.stderr.startswith("error: the decoding processes failed: /dev/shm is full")
    assert found.stderr.count("\n") == 1
