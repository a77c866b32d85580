"""What the command lines share: one-line errors, clean interruption, options.

Imports nothing heavy, so that `evaluate_score.py` starts at once.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR = 2  # exit code of a mistake that the user can mend
SIGNAL_EXIT = 128  # the shell's convention: 128 + the signal's number
END_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Default folders, below the one where the command runs.
CORPUS_FOLDERS = {
    "codecfake": Path("data/Codecfake"),
    "19LA": Path("data/LA"),
    "ITW": Path("data/ITW"),
}
FEATURE_FOLDERS = {"codecfake": Path("features/Codecfake"), "19LA": Path("features/LA")}
MODEL_FOLDER = Path("models/try")
RESULT_FOLDER = Path("result")
MAX_FAILED = 0.1  # percent of a part's files that may be unreadable


class InputError(ValueError):
    """Bad input.

    The message is one line: which file (and row), what was expected, what came, what to do.
    """


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised where the program stands so that `finally` blocks run."""


# ── How a process ends ───────────────────────────────────────────────────────────────────────────

_go_on = "run the same command again"  # what a user does after an interruption or a full disk
_main_process = os.getpid()  # the one that answers signals; its workers end with it
_signal: int | None = None  # SIGINT or SIGTERM, once one has come


def _always() -> bool:
    return True


_may_report: Callable[[], bool] = _always


def report_only_if(is_first: Callable[[], bool]) -> None:
    """Of several processes on one job, let one say what ended them all.

    Args:
        is_first: called once, when this process ends with an error; True in one process only.
    """
    global _may_report
    _may_report = is_first


def how_to_go_on(advice: str) -> None:
    """Replace what a user is told after an interruption or a full disk, once work has begun."""
    global _go_on
    _go_on = advice


def run(main: Callable[[], None], if_stopped: str) -> None:
    """Call a script's main() and end the process as the shell expects.

    A user's mistake prints one line and exits with 2; Ctrl-C and SIGTERM print how to go on
    (`if_stopped`, until how_to_go_on() replaces it) and exit with 130 and 143. Anything else is a
    defect of ours and keeps its traceback.
    """
    global _main_process
    _main_process = os.getpid()
    how_to_go_on(if_stopped)
    for number in END_SIGNALS:
        signal.signal(number, _raise_stopped)
    sys.unraisablehook = _report_unraisable
    _secure_streams()
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        _end(USER_ERROR, f"error: {error}")
    except BrokenPipeError:  # `| head` closed the pipe: not an error, and nobody left to tell
        sys.stdout = None
        _may_report()
        sys.exit(SIGNAL_EXIT + signal.SIGPIPE)
    except OSError as error:
        _end(USER_ERROR, f"error: {describe(error)}")
    except Stopped:
        word = "interrupted" if _signal == signal.SIGINT else "terminated"
        _end(SIGNAL_EXIT + _signal, f"{word}: {_go_on}")
    except Exception:
        if _may_report():
            raise
        sys.exit(1)  # another process ended, which broke the connection to it


def end_quietly_if_stopped() -> None:
    """Ctrl-C and SIGTERM while a script is still importing: one line, no traceback."""
    for number in END_SIGNALS:
        signal.signal(number, _end_before_start)


def _end_before_start(number: int, frame: object) -> None:
    os.write(2, b"interrupted: nothing was begun\n")
    os._exit(SIGNAL_EXIT + number)


def _secure_streams() -> None:
    """No name that a locale cannot print, and no closed stream, may end a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def stop_if_asked() -> None:
    """Raise Stopped if a signal has come.

    Loops call this: an exception raised in a handler is lost when the interpreter happens to be in
    a callback that ignores exceptions, as while it forks a process.
    """
    if _signal is not None:
        raise Stopped


def _raise_stopped(number: int, frame: object) -> None:
    global _signal
    if os.getpid() != _main_process:  # a worker that was forked a moment ago
        return
    _signal = number
    for repeated in END_SIGNALS:  # an impatient second Ctrl-C must not break off the clean end
        signal.signal(repeated, signal.SIG_IGN)
    raise Stopped


def _report_unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    if _signal is None:  # else it is Stopped itself, or an object that it left half-made
        sys.__unraisablehook__(unraisable)


def _end(code: int, message: str) -> NoReturn:
    if _may_report():
        print(printable(message), file=sys.stderr)
    sys.exit(code)


# ── What is printed ──────────────────────────────────────────────────────────────────────────────

ADVICE = {
    errno.ENOSPC: "; free some space, then {go_on}",
    errno.EDQUOT: "; raise the quota, then {go_on}",
    errno.EROFS: "; choose a folder that can be written",
    errno.EACCES: "; check its permissions",
    errno.EMFILE: "; raise the limit of open files (ulimit -n), or give a smaller --num_workers",
}


def describe(error: OSError) -> str:
    """One line for an error of the operating system: the file, the reason, what to do if known."""
    where = f"{error.filename}: " if error.filename else ""
    advice = ADVICE.get(error.errno, "").format(go_on=_go_on)
    return f"{where}{error.strerror or error}{advice}"


def printable(text: str) -> str:
    """The text with control characters spelled out: no name may drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def echo(line: str) -> None:
    """Print a line in which names may stand that others chose."""
    print(printable(line))


# ── Options ──────────────────────────────────────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):
    """Wrong options are one line, which one of several processes says."""

    def error(self, message: str) -> NoReturn:
        _end(USER_ERROR, f"error: {message}; --help explains the options")


def add_feature_folders(parser: argparse.ArgumentParser, what: str) -> None:
    """-f and -f1, which preprocess.py and main_train.py know."""
    for option, long_option, task, corpus in (
        ("-f", "--path_to_features", "codecfake", "Codecfake"),
        ("-f1", "--path_to_features1", "19LA", "19LA"),
    ):
        parser.add_argument(
            option,
            long_option,
            type=Path,
            metavar="DIR",
            help=f"where {corpus}'s {what} (default: {FEATURE_FOLDERS[task]})",
        )


def feature_folder(args: argparse.Namespace, task: str, alone: bool) -> Path:
    """The features of a corpus: as -f or -f1 say, or the default folder.

    Args:
        alone: no other corpus takes part; 19LA's folder may then be given as -f, too.
    """
    given = {"codecfake": args.path_to_features, "19LA": args.path_to_features1}
    if task == "19LA" and alone:
        given[task] = given[task] or args.path_to_features
    return given[task] or FEATURE_FOLDERS[task]


def add_fault_options(group: argparse._ArgumentGroup, max_failed: float | None) -> None:
    """--skip_missing and --max_failed, of scripts that read a whole corpus.

    Args:
        max_failed: the value where --max_failed is not given; MAX_FAILED is what then holds.
    """
    group.add_argument(
        "--skip_missing",
        action="store_true",
        help="go on without files that are absent or unreadable, however many",
    )
    group.add_argument(
        "--max_failed",
        type=percent,
        default=max_failed,
        metavar="PERCENT",
        help="stop when more of the files cannot be read; not with --skip_missing (default: "
        f"{MAX_FAILED} %%)",
    )


def add_compute_options(
    parser: argparse.ArgumentParser, batch_help: str, batch_size: int | None = None
) -> argparse._ArgumentGroup:
    """The options that every script which runs a network shares."""
    group = parser.add_argument_group("compute")
    group.add_argument(
        "--gpu",
        type=int,
        metavar="N",
        help="index of the GPU, -1 for the CPU (default: the first GPU if there is one)",
    )
    group.add_argument(
        "--batch_size", type=at_least(1), default=batch_size, metavar="N", help=batch_help
    )
    group.add_argument(
        "--num_workers",
        type=at_least(0),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="workers that read ahead; 0: read in the main process (default: %(default)s)",
    )
    return group


def number(
    *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: a finite number x with least <= x, above < x and x < below."""
    bounds = [f"of at least {least:g}"] if least > -math.inf else []
    bounds += [f"above {above:g}"] if above > -math.inf else []
    bounds += [f"below {below:g}"] if below < math.inf else []

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value or not above < value < below:
            wanted = " and ".join(bounds)
            raise argparse.ArgumentTypeError(f"expected a number {wanted}, got {text!r}")
        return value

    return parse


def percent(text: str) -> float:
    """An argparse type: a number from 0 to 100."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"expected 0 to 100, got {text}")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            message = f"expected a whole number of at least {least}, got {text!r}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return number


def switch(text: str) -> bool:
    """An argparse type: True or False."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return words[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}") from None


# `--SAM`, `--SAM True` and `--SAM False` all mean what they say.
SWITCH: dict[str, Any] = {
    "type": switch,
    "nargs": "?",
    "const": True,
    "default": False,
    "metavar": "True|False",
}
