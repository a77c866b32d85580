"""What the command lines share: one-line errors, clean interruption, options.

Imports nothing heavy, so that `evaluate_score.py` starts at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERROR = 2  # exit code of a mistake that the user can mend
SIGNAL_EXIT = 128  # the shell's convention: 128 + the signal's number


class InputError(ValueError):
    """Bad input. The message is one line: which file (and row), what was expected, what came, what to do."""


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised where the program stands so that `finally` blocks run."""


_answering = os.getpid()  # the process that a signal ends; its helpers end with it
_stopped_by: int | None = None  # the signal, once one has come
_has_last_word: Callable[[], bool] = lambda: True


def one_last_word(claim: Callable[[], bool]) -> None:
    """Of several processes on one job, only the one whose `claim()` gives True says what ended it: one failure ends them all."""
    global _has_last_word
    _has_last_word = claim


def run(main: Callable[[], None], if_stopped: str) -> None:
    """Call a script's main() and end the process as the shell expects.

    A user's mistake prints one line and exits with 2; Ctrl-C and SIGTERM print `if_stopped` (how to
    go on) and exit with 130 and 143. Anything else is a defect of ours and keeps its traceback.
    """
    global _answering
    _answering = os.getpid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.unraisablehook = _report_unraisable
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _end(USER_ERROR, f"error: {error}")
    except BrokenPipeError:  # `| head` closed the pipe: not an error, and nobody left to tell
        sys.stdout = None
        _has_last_word()
        sys.exit(SIGNAL_EXIT + signal.SIGPIPE)
    except OSError as error:
        _end(USER_ERROR, f"error: {describe(error)}")
    except Stopped:
        word = "interrupted" if _stopped_by == signal.SIGINT else "terminated"
        _end(SIGNAL_EXIT + _stopped_by, f"{word}: {if_stopped}")
    except Exception:
        if _has_last_word():
            raise
        sys.exit(1)  # the end of another process broke the connection to it


def _stop(number: int, frame: object) -> None:
    global _stopped_by
    if os.getpid() != _answering:  # a helper that was forked a moment ago
        return
    _stopped_by = number
    for repeated in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # an impatient second Ctrl-C must not break off the clean end
        signal.signal(repeated, signal.SIG_IGN)
    raise Stopped


def _report_unraisable(lost: sys.UnraisableHookArgs) -> None:
    if _stopped_by is None:  # else it is Stopped itself, or an object it left half-made
        sys.__unraisablehook__(lost)


def stop_if_asked() -> None:
    """Raise Stopped if a signal has come. Loops call this: an exception raised in a handler is lost when the
    interpreter happens to be in a callback that ignores them, as while it forks a process."""
    if _stopped_by is not None:
        raise Stopped


def describe(error: OSError) -> str:
    """One line for an error of the operating system: the file, the reason, what to do where that is known."""
    where = f"{error.filename}: " if error.filename else ""
    advice = {
        errno.ENOSPC: "; free some space and run the same command again: finished work is kept",
        errno.EDQUOT: "; raise the quota and run the same command again: finished work is kept",
        errno.EROFS: "; choose a folder that can be written",
        errno.EACCES: "; check its permissions",
    }.get(error.errno, "")
    return f"{where}{error.strerror or error}{advice}"


def printable(text: str) -> str:
    """The text with control characters spelled out: names from protocols must not drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def echo(line: str) -> None:
    """Print a line in which names may stand that others chose."""
    print(printable(line))


class Parser(argparse.ArgumentParser):
    """Of several processes given the same wrong options, one says so."""

    def error(self, message: str) -> NoReturn:
        if _has_last_word():
            super().error(message)
        sys.exit(USER_ERROR)


def add_compute_options(
    parser: argparse.ArgumentParser, batch_help: str, batch_size: int | None = None
) -> None:
    """The options that every script which runs a network shares."""
    parser.add_argument(
        "--gpu",
        type=int,
        metavar="N",
        help="index of the GPU, -1 for the CPU (default: the first GPU if there is one)",
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=batch_size, metavar="N", help=batch_help
    )
    parser.add_argument(
        "--num_workers",
        type=at_least(0),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="helpers that read ahead; 0: read in the main process (default: %(default)s)",
    )


def percent(text: str) -> float:
    """An argparse type: a number from 0 to 100."""
    if not 0 <= (value := float(text)) <= 100:
        raise argparse.ArgumentTypeError(f"expected 0 to 100, got {text}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return int(text)

    return number


def switch(text: str) -> bool:
    """`--SAM`, `--SAM True` and `--SAM False` all mean what they say (for argparse's `type`)."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return words[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}") from None


def _end(code: int, message: str) -> None:
    if _has_last_word():
        print(printable(message), file=sys.stderr)
    sys.exit(code)
