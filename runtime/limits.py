"""What the system lets worker processes have: shared memory and file descriptors."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from runtime import cli

SHARED_MEMORY = Path("/dev/shm")
LOCKS_NEED = 2**20  # bytes of shared memory without which no worker can be started
FILES_A_WORKER = 8  # descriptors of the main process: pipes, and the batches that wait
FILES_BESIDE = 40  # for everything else that a script opens
MANY_FILES = 65_536

# Words of the system and of torch -> what to do.
ADVICE = {
    "shared memory": "/dev/shm is full: give it more (docker run --shm-size=1g), or give a smaller "
    "--batch_size, or --num_workers 0",
    "open files": "too many open files: raise the limit (ulimit -n), or give a smaller "
    "--num_workers",
    "memory": "memory ran out: give a smaller --num_workers",
}
WORDS = {
    "shared memory": ("(shm)", "/torch_", "No space left", "Bus error", "bus error"),
    "open files": ("Too many open files",),
    "memory": ("MemoryError", "Cannot allocate memory"),
}


def free_shared_memory() -> int:
    """Bytes of shared memory that this process may take; those of a machine share what is free."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    local_ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    n_ranks = int(local_ranks) if local_ranks.isdecimal() else 1
    return found.f_bavail * found.f_frsize // max(n_ranks, 1)


def allowed_workers(wanted: int) -> int:
    """How many worker processes can be started, at most `wanted`; a note says why fewer."""
    if wanted and free_shared_memory() < LOCKS_NEED:
        cli.echo(f"note: {SHARED_MEMORY} is full or absent: no worker processes")
        return 0
    allowed = max(0, (_file_limit() - _n_open_files() - FILES_BESIDE) // FILES_A_WORKER)
    if allowed < wanted:
        cli.echo(
            f"note: few files may be open (ulimit -n): {allowed} worker processes, not {wanted}"
        )
    return min(wanted, allowed)


def _file_limit() -> int:
    """The number of descriptors that this process may have, raised as far as it is allowed to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MANY_FILES if soft == resource.RLIM_INFINITY else soft


def _n_open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # another kind of system
        return 0


def advice_on(reason: str) -> str | None:
    """What to do where a process failed for want of memory or descriptors; None: another reason."""
    for resource_name, words in WORDS.items():
        if any(word in reason for word in words):
            return ADVICE[resource_name]
    return None
