"""Numbers from scores, and score files (both ends). Plain numpy.

Everywhere a higher score means "more likely real": target trials are the real (bona fide) ones,
nontarget trials the fake (spoofed) ones. Rates are fractions, not percent.
"""
from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

import cli
from cli import InputError

# ── Score files ──────────────────────────────────────────────────────────────────────────────────

REAL_WORDS = ("real", "bonafide", "bona-fide")
FAKE_WORDS = ("fake", "spoof")
UNLABELLED = "-"           # recordings whose label nobody knows: written, but there is nothing to evaluate
IS_REAL = {word.encode(): word in REAL_WORDS for word in REAL_WORDS + FAKE_WORDS}


class Scores(NamedTuple):
    """The trials of one score file, in its order."""

    names: Sequence[str]       # N
    scores: np.ndarray         # (N,) float64, higher = more likely real
    is_real: np.ndarray        # (N,) bool

    @property
    def real(self) -> np.ndarray:
        return self.scores[self.is_real]

    @property
    def fake(self) -> np.ndarray:
        return self.scores[~self.is_real]


def read_scores(path: str | Path) -> Scores:
    """Read a score file of rows `name score word`; the words are REAL_WORDS and FAKE_WORDS.

    An empty file and a file of one class are fine here: it is only their EER that does not exist.

    Raises:
        InputError: a malformed row, an unknown word, a score that is not a finite number, a name that
            occurs twice. The message names file and row.
    """
    trials = read_rows(path)
    finite = np.isfinite(trials.scores)
    if not finite.all():
        trial = int(np.argmin(finite))
        raise InputError(f"{path}:{_row_of(path, trial)}: expected a finite score, got {trials.scores[trial]}; "
                         "score this trial again")
    if len(set(trials.names)) < len(trials.names):
        name, count = Counter(trials.names).most_common(1)[0]
        second = trials.names.index(name, trials.names.index(name) + 1)
        raise InputError(f"{path}:{_row_of(path, second)}: expected each trial once, got {_shortened(name)} "
                         f"{count} times; keep one row of it")
    return trials


def read_rows(path: str | Path) -> Scores:
    """Like read_scores(), but lets non-finite scores and repeated names through, for those who count them."""
    lines = _read(path)
    try:
        return _parse(lines)
    except (ValueError, KeyError):
        return _parse(_whole_rows(path, lines))


ROW_END = b"\0"            # no score file has it as a word of its own


def _parse(lines: bytes) -> Scores:
    """Score rows without a blank one among them. Column by column: three times as fast as row by row."""
    lines = lines.rstrip()
    if not lines:
        return Scores([], np.empty(0), np.empty(0, dtype=bool))
    fields = lines.replace(b"\n", b" " + ROW_END + b" ").split() + [ROW_END]
    names, scores, words, ends = fields[0::4], fields[1::4], fields[2::4], fields[3::4]
    if 4 * ends.count(ROW_END) != len(fields) or ROW_END in names or b"_" in b" ".join(scores):
        raise ValueError("a row without exactly three columns, or an underscore, which Python allows in numbers")
    values = np.array(list(map(float, scores)))
    is_real = np.array([IS_REAL[word] for word in words])
    return Scores(b"\n".join(names).decode().split("\n"), values, is_real)


def write_scores(path: str | Path, names: Sequence[str], scores: Sequence[float], words: Sequence[str]) -> None:
    """Write a score file that read_scores() reads back to the last bit, whole or not at all.

    Raises InputError as format_scores(), before anything is written.
    """
    text = format_scores(path, names, scores, words)
    with cli.replacing(path) as file:
        file.write(text)


def format_scores(path: str | Path, names: Sequence[str], scores: Sequence[float], words: Sequence[str]) -> str:
    """What a score file at `path` holds.

    Raises InputError for names as check_names(), for scores that are not finite, for unknown words, and
    for sequences of unequal length.
    """
    if not len(names) == len(scores) == len(words):
        raise InputError(f"{path}: expected as many names as scores and words, "
                         f"got {len(names)}, {len(scores)} and {len(words)}")
    check_names(path, names)
    lines = []
    for name, score, word in zip(names, map(float, scores), words):
        if not np.isfinite(score):
            raise InputError(f"{path}: expected a finite score for {_shortened(name)}, got {score}")
        if word.encode() not in IS_REAL and word != UNLABELLED:
            raise InputError(f"{path}: expected {_known_words()} for {_shortened(name)}, got {_shortened(word)}")
        lines.append(f"{name} {score!r} {word}\n")
    return "".join(lines)


def check_names(path: str | Path, names: Sequence[str]) -> None:
    """Raise InputError for a name that no score file can hold: empty, with a blank in it, or there twice."""
    seen = set()
    for name in names:
        if not name or name.split() != [name]:
            raise InputError(f"{path}: expected a trial's name without blanks, got {_shortened(name)}")
        if name in seen:
            raise InputError(f"{path}: expected each trial once, got {_shortened(name)} again")
        seen.add(name)


PROVENANCE = "provenance.json"     # beside score files: what made them, and their SHA-256


def read_checksums(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each score file in the folder that generate_score.py wrote. Raises InputError where their list is damaged."""
    return read_provenance(folder, "sha256")


def read_provenance(folder: str | Path, what: str) -> dict[str, str]:
    """What generate_score.py recorded under this heading of each score file. Raises InputError where that is damaged."""
    path = Path(folder) / PROVENANCE
    if not path.is_file():
        return {}
    try:
        recorded = json.loads(path.read_bytes()).get(what, {})
        if all(isinstance(value, str) for value in recorded.values()):
            return recorded
    except (ValueError, AttributeError, RecursionError):
        pass
    raise InputError(f"{path}: damaged, or not written by generate_score.py; remove it to take the score files beside it as they are")


def is_unchanged(path: str | Path, checksums: dict[str, str]) -> bool:
    """Whether a score file is what generate_score.py wrote, as far as is known: a changed digit has no other mark."""
    path = Path(path)
    return checksums.get(path.name) in (None, hashlib.sha256(path.read_bytes()).hexdigest())


def _read(path: str | Path) -> bytes:
    return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")      # the mark some editors put there


def _whole_rows(path: str | Path, lines: bytes) -> bytes:
    """The lines without blank ones. Raises InputError for the first row that is not `name score word`."""
    rows = []
    for number, line in enumerate(lines.split(b"\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        if problem := _problem_of(fields):
            raise InputError(f"{path}:{number}: {problem}; is this a score file of generate_score.py?")
        rows.append(line)
    return b"\n".join(rows)


def _problem_of(fields: list[bytes]) -> str | None:
    if len(fields) != 3 or ROW_END in fields:
        return f"expected `name score word`, got {len(fields)} column(s): {_shortened(b' '.join(fields[:4]))}"
    name, score, word = fields
    if not _is_number(score):
        return f"expected a number as the score, got {_shortened(score)}"
    if word not in IS_REAL:
        hint = " (a recording without a label, of which there is nothing to evaluate)" if word == UNLABELLED.encode() else ""
        return f"expected {_known_words()}, got {_shortened(word)}{hint}"
    try:
        name.decode()
    except UnicodeDecodeError:
        return f"expected a name in UTF-8, got {_shortened(name)}"
    return None


def _is_number(text: bytes) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return b"_" not in text


def _row_of(path: str | Path, trial: int) -> int:
    """Row number, from 1, of the trial-th row that is not blank."""
    return [number for number, line in enumerate(_read(path).split(b"\n"), start=1) if line.strip()][trial]


def _known_words() -> str:
    return "one of " + ", ".join(REAL_WORDS + FAKE_WORDS)


def _shortened(text: str | bytes) -> str:
    text = text[:60].decode(errors="replace") if isinstance(text, bytes) else text
    return repr(text[:60])


# ── Error rates ──────────────────────────────────────────────────────────────────────────────────


class OperatingPoint(NamedTuple):
    """What deciding at one threshold costs. A trial is accepted as real when its score is above it."""

    threshold: float
    false_rejections: int      # real trials taken for fake
    false_acceptances: int     # fake trials taken for real
    eer: float                 # mean of the two rates


def compute_eer(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> tuple[float, float]:
    """Equal error rate as the ASVspoof challenges compute it, with equal scores as one threshold.

    Args:
        target_scores: scores of the real trials, (n,).
        nontarget_scores: scores of the fake trials, (m,).

    Returns:
        (eer, threshold): the mean of false rejection and false acceptance rate, a fraction, at the
        threshold where they differ least; the lowest such threshold.

    Raises:
        InputError (a ValueError): a class without trials, or a score that is not finite.
    """
    point = find_eer_point(target_scores, nontarget_scores)
    return point.eer, point.threshold


def find_eer_point(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> OperatingPoint:
    """compute_eer() with the number of errors of either kind at its threshold."""
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    rejected, accepted, thresholds = _count_errors(target, nontarget)
    # |FRR - FAR| times both class sizes: whole numbers, so that equal differences compare as equal.
    at = int(np.argmin(np.abs(rejected * nontarget.size - accepted * target.size)))
    eer = (rejected[at] / target.size + accepted[at] / nontarget.size) / 2
    return OperatingPoint(float(thresholds[at]), int(rejected[at]), int(accepted[at]), float(eer))


def compute_det_curve(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detection error trade-off: both error rates at every distinct score.

    Returns:
        (frr, far, thresholds), each (distinct scores + 1,), thresholds ascending. The first point lies
        just below the lowest score: FRR 0, FAR 1. The last has FRR 1, FAR 0.

    Raises:
        InputError: as compute_eer().
    """
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    rejected, accepted, thresholds = _count_errors(target, nontarget)
    return rejected / target.size, accepted / nontarget.size, thresholds


def compute_auc(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> float:
    """Area under the ROC curve: how often a real trial outscores a fake one, ties counting half."""
    frr, far, _ = compute_det_curve(target_scores, nontarget_scores)
    return float(np.sum((far[:-1] - far[1:]) * (2 - frr[:-1] - frr[1:])) / 2)


def errors_at(threshold: float, target_scores: ArrayLike, nontarget_scores: ArrayLike) -> tuple[int, int]:
    """(false rejections, false acceptances) when a trial is accepted as real above the threshold."""
    target, nontarget = _both_classes(target_scores, nontarget_scores)
    return int(np.sum(target <= threshold)), int(np.sum(nontarget > threshold))


def rule_of_three(n_trials: int) -> float:
    """Upper end of the one-sided 95 % interval of an error rate when n trials gave no error.

    (1 - p)^n = 0.05 has the solution p = 3 / n, nearly.
    """
    return min(1.0, 3 / n_trials)


def _both_classes(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The two as flat float64 arrays, once they are sure to have an EER."""
    arrays = []
    for name, scores in (("target (real)", target_scores), ("nontarget (fake)", nontarget_scores)):
        scores = np.asarray(scores, dtype=np.float64).ravel()
        if not scores.size:
            raise InputError(f"expected scores of both classes, got no {name} score")
        if not np.isfinite(scores).all():
            raise InputError(f"expected finite scores, got {np.sum(~np.isfinite(scores))} {name} score(s) that are not")
        arrays.append(scores)
    return arrays[0], arrays[1]


def _count_errors(target: np.ndarray, nontarget: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(false rejections, false acceptances, thresholds), each (distinct scores + 1,)."""
    distinct = np.unique(np.concatenate([target, nontarget]))
    rejected = np.searchsorted(np.sort(target), distinct, side="right")
    accepted = nontarget.size - np.searchsorted(np.sort(nontarget), distinct, side="right")
    below_all = np.nextafter(distinct[0], -np.inf)
    return (np.concatenate([[0], rejected]), np.concatenate([[nontarget.size], accepted]),
            np.concatenate([[below_all], distinct]))


# ── Detection costs ──────────────────────────────────────────────────────────────────────────────

# ASVspoof 5, track 1: the prior and the costs of its detection cost function.
P_SPOOF, C_MISS, C_FA = 0.05, 1.0, 10.0
BAYES_THRESHOLD = -float(np.log(C_MISS * (1 - P_SPOOF) / (C_FA * P_SPOOF)))     # -ln 1.9 = -0.642


def compute_min_dcf(target_scores: ArrayLike, nontarget_scores: ArrayLike) -> float:
    """ASVspoof 5's normalised detection cost at the threshold that makes it least."""
    frr, far, _ = compute_det_curve(target_scores, nontarget_scores)
    return float(_normalised_dcf(frr, far).min())


def compute_act_dcf(target_llrs: ArrayLike, nontarget_llrs: ArrayLike) -> float:
    """ASVspoof 5's normalised detection cost of log-likelihood ratios, decided at the Bayes threshold.

    As in the challenge's evaluation package, a trial exactly at the threshold is accepted here.
    """
    target, nontarget = _both_classes(target_llrs, nontarget_llrs)
    return float(_normalised_dcf(np.mean(target < BAYES_THRESHOLD), np.mean(nontarget >= BAYES_THRESHOLD)))


def compute_cllr(target_llrs: ArrayLike, nontarget_llrs: ArrayLike) -> float:
    """Cost of log-likelihood ratios, in bits: 0 is perfect, 1 is what "always 0" costs."""
    target, nontarget = _both_classes(target_llrs, nontarget_llrs)
    nats = np.mean(np.logaddexp(0, -target)) + np.mean(np.logaddexp(0, nontarget))
    return float(nats / (2 * np.log(2)))


def _normalised_dcf(frr: ArrayLike, far: ArrayLike) -> np.ndarray:
    miss, fa = C_MISS * (1 - P_SPOOF), C_FA * P_SPOOF
    return (miss * np.asarray(frr) + fa * np.asarray(far)) / min(miss, fa)


# Float32 softmax rounds to 1 what is within 2^-25 of it, and to 0 what is below 2^-150.
HIGHEST_BELOW_ONE = 1 - 2.0**-24
LOWEST_ABOVE_ZERO = 2.0**-149


class LogOdds(NamedTuple):
    llrs: np.ndarray           # (N,) natural logarithms
    n_saturated: int           # probabilities of exactly 0 or 1, moved to the nearest float32 inside


def are_probabilities(scores: np.ndarray) -> bool:
    """Whether a file's scores must be probabilities: all of them lie in [0, 1]."""
    return bool(scores.size) and bool(np.all((scores >= 0) & (scores <= 1)))


def to_log_odds(probabilities: ArrayLike) -> LogOdds:
    """ln(p / (1 - p)): the logit difference that softmax took the probabilities from.

    Softmax saturates: an exact 0 or 1 has infinite log odds. It is moved to the nearest number inside
    that float32 can hold (or to the most extreme one present, so that the order stays) and counted.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    inside = (p > 0) & (p < 1)
    lowest = min(LOWEST_ABOVE_ZERO, p[inside].min(initial=1))
    highest = max(HIGHEST_BELOW_ONE, p[inside].max(initial=0))
    p = np.clip(p, lowest, highest)
    return LogOdds(np.log(p) - np.log1p(-p), int(np.sum(~inside)))


# ── Tandem detection cost ────────────────────────────────────────────────────────────────────────


class AsvScores(NamedTuple):
    """Scores of the challenge's speaker verification system, higher = more likely the claimed speaker."""

    target: np.ndarray
    nontarget: np.ndarray
    spoof: np.ndarray


def read_asv_scores(path: str | Path) -> AsvScores:
    """Read the organisers' ASV score file of ASVspoof 2019: rows `source key score`.

    Raises InputError for a malformed row, a score that is not finite, or a key without rows.
    """
    scores: dict[bytes, list[float]] = {b"target": [], b"nontarget": [], b"spoof": []}
    for row, line in enumerate(_read(path).split(b"\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            _, key, score = fields
            scores[key].append(float(score))
        except (ValueError, KeyError):
            raise InputError(f"{path}:{row}: expected `source target|nontarget|spoof score`, got {_shortened(line)}; is this "
                             "ASVspoof2019.LA.asv.eval.gi.trl.scores.txt?") from None
    arrays = {key.decode(): np.array(values) for key, values in scores.items()}
    for key, values in arrays.items():
        if not values.size or not np.isfinite(values).all():
            raise InputError(f"{path}: expected finite scores of {key} trials, got {'some that are not' if values.size else 'none'}")
    return AsvScores(**arrays)


def compute_min_tdcf_2019(target_scores: ArrayLike, nontarget_scores: ArrayLike, asv: AsvScores) -> float:
    """Minimum normalised tandem detection cost in its *legacy* form, that of ASVspoof 2019.

    Kinnunen et al., "t-DCF", Odyssey 2018, eq. (10) and (11), with the 2019 evaluation plan's costs.
    The revised form of ASVspoof 2021 gives other figures.
    """
    p_spoof, c_miss_asv, c_fa_asv, c_miss_cm, c_fa_cm = 0.05, 1, 10, 1, 10
    p_target, p_nontarget = (1 - p_spoof) * 0.99, (1 - p_spoof) * 0.01

    _, asv_threshold = compute_eer(asv.target, asv.nontarget)
    asv_miss = np.mean(asv.target < asv_threshold)
    asv_fa = np.mean(asv.nontarget >= asv_threshold)
    asv_spoof_miss = np.mean(asv.spoof < asv_threshold)

    c1 = p_target * (c_miss_cm - c_miss_asv * asv_miss) - p_nontarget * c_fa_asv * asv_fa
    c2 = c_fa_cm * p_spoof * (1 - asv_spoof_miss)
    if min(c1, c2) <= 0:
        raise InputError("these ASV scores leave a tandem cost of zero or less; the legacy t-DCF is not defined for them")
    frr, far, _ = compute_det_curve(target_scores, nontarget_scores)
    return float((c1 * frr + c2 * far).min() / min(c1, c2))
