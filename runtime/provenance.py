"""What made an artefact: command, commit, versions, device.

One form for caches, checkpoints, scores and reports.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchaudio", "transformers", "soundfile", "soxr", "av", "numpy")


def run_info(device: object = "cpu") -> dict[str, Any]:
    """The record of this process, as plain data for JSON and checkpoints.

    Returns:
        command: the command line, quoted for a shell.
        commit: of the program's own git checkout, with "-dirty" behind it where files were changed;
            None where there is no checkout.
        versions: of Python and of those PACKAGES that are installed.
        device: where the networks computed, such as "cuda:0".
    """
    return {
        "command": command_line(),
        "commit": commit(),
        "versions": versions(),
        "device": str(device),
    }


def command_line() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@lru_cache
def commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


@lru_cache
def versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
