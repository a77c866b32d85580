"""How often the 95 % intervals cover the truth, by simulation. Writes docs/coverage.md.

    python -m benchmarks.bench_coverage [runs a setting]     # 200 runs: some 20 minutes on 2 cores

Scores are normal, with effects of the speaker (on both classes, and on fakes alone) and of the
attack. So the true EER over all speakers and attacks is known exactly: real scores have the
variance 1 + s^2, fake ones 1 + s^2 + f^2 + a^2, and the EER is Phi(-distance / (sum of both sd)).
The effects' sizes are those seen in the published scores of two of the paper's models.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import ndtri
from tqdm import tqdm

from eval_metrics import count_errors, eer_point
from evaluation import comparisons, results
from evaluation.bootstrap import percentile_interval, resample_eers
from evaluation.results import Model, Result, Settings
from evaluation.units import find_units
from formats.score_files import Scores
from runtime.files import atomic_write

N_RUNS = 200
N_RESAMPLES = 200  # an interval; the evaluator's default, 1000, changes nothing but the time
OUTPUT = Path(__file__).parent.parent / "docs" / "coverage.md"


@dataclass(frozen=True)
class World:
    """How the scores of one setting come about; effects in units of the sd within a speaker."""

    name: str
    eer: float  # the truth
    n_speakers: int
    n_real: int  # of a speaker
    n_fake: int  # of a speaker and attack
    speaker: float = 0.0  # sd of a speaker's effect on both classes
    speaker_fake: float = 0.0  # sd of its further effect on fakes
    n_attacks: int = 1
    attack: float = 0.0  # sd of an attack's effect
    n_real_only: int = 0  # speakers without fakes
    sizes: str = "equal"  # of the speakers: "equal", "lognormal", or "one big"
    heavy: bool = False  # effects are t with 3 degrees of freedom: a few extreme speakers
    nested: bool = False  # each speaker is heard in one attack only

    @property
    def sds(self) -> tuple[float, float]:
        real = 1 + self.speaker**2
        return np.sqrt(real), np.sqrt(real + self.speaker_fake**2 + self.attack**2)


# All speakers and attacks of the real sets, a third of their trials.
C = World("", 0, 327, 13, 13)
ITW = World("", 0, 54, 120, 70, speaker=0.6, speaker_fake=0.4, sizes="lognormal")
LA = World(
    "", 0, 48, 36, 30, speaker=0.4, speaker_fake=0.3, n_attacks=13, attack=1.0, n_real_only=19
)
WORLDS = [
    replace(C, name="C1, Mel-LCNN", eer=0.36, speaker=1.7, speaker_fake=0.8),
    replace(C, name="C1, W2V2-AASIST", eer=0.001, speaker=0.45, speaker_fake=0.4),
    replace(C, name="C1, a few errors", eer=0.0002, speaker=0.45, speaker_fake=0.4),
    replace(C, name="C1, extreme speakers", eer=0.015, speaker=0.5, speaker_fake=0.5, heavy=True),
    replace(ITW, name="ITW", eer=0.05),
    replace(ITW, name="ITW, inverted", eer=0.53),
    replace(ITW, name="ITW, one speaker has a fifth", eer=0.05, sizes="one big"),
    replace(LA, name="19LA", eer=0.003),
    replace(LA, name="19LA, Mel-LCNN", eer=0.05),
    replace(LA, name="19LA, stronger attacks", eer=0.05, attack=1.25),
    replace(LA, name="19LA, attacks alike", eer=0.05, attack=0.0),
    replace(LA, name="19LA, no effects", eer=0.05, attack=0.0, speaker=0.0, speaker_fake=0.0),
    replace(LA, name="nested: one attack a speaker", eer=0.05, nested=True, n_real_only=0),
    World("10 speakers", 0.05, 10, 40, 40, speaker=0.5, speaker_fake=0.3),
    World("5 speakers", 0.05, 5, 40, 40, speaker=0.5, speaker_fake=0.3),
]
UNEQUAL = [(20, 200, 0.02), (50, 1000, 0.005), (500, 50, 0.01), (200, 200, 0.1)]


def simulate(world: World, seed: int) -> Scores:
    """One set of trials: names, scores, labels, speakers, attacks."""
    rng = np.random.default_rng([seed, 1])

    def effects(sd: float, n: int) -> np.ndarray:
        drawn = rng.standard_t(3, n) / np.sqrt(3) if world.heavy else rng.normal(size=n)
        return sd * drawn

    n = world.n_speakers + world.n_real_only
    share = _sizes(world, n)
    both, on_fake = effects(world.speaker, n), effects(world.speaker_fake, n)
    attack = effects(world.attack, world.n_attacks)
    real = np.repeat(np.arange(n), np.maximum(1, np.round(world.n_real * share)).astype(int))
    counts = np.maximum(1, np.round(world.n_fake * share[: world.n_speakers])).astype(int)
    fake = np.repeat(np.arange(world.n_speakers), counts * world.n_attacks)
    if world.nested:
        attacks = fake % world.n_attacks
    else:
        attacks = np.concatenate([np.repeat(np.arange(world.n_attacks), k) for k in counts])
    distance = -ndtri(world.eer) * sum(world.sds)
    scores = np.concatenate(
        [
            distance + both[real] + rng.normal(size=len(real)),
            both[fake] + on_fake[fake] + attack[attacks] + rng.normal(size=len(fake)),
        ]
    )
    names = [f"t{i}" for i in range(len(scores))]
    labels = np.arange(len(scores)) < len(real)
    speakers = [f"s{i}" for i in np.concatenate([real, fake])]
    codes = ["-"] * len(real) + [f"A{i}" for i in attacks]
    return Scores(names, scores, labels, speakers, codes)


def _sizes(world: World, n: int) -> np.ndarray:
    """Relative number of trials of each speaker, the same in every run; mean 1."""
    if world.sizes == "lognormal":
        drawn = np.exp(np.random.default_rng(1).normal(size=n))
        return drawn / drawn.mean()
    share = np.ones(n)
    if world.sizes == "one big":
        share[0] = n / 4  # of n + n / 4
    return share / share.mean()


def truth(world: World) -> float:
    """The EER of all speakers and attacks; of heavy tails, by ten million trials."""
    if not world.heavy:
        return world.eer
    rng, n = np.random.default_rng(0), 10_000_000

    def tails() -> np.ndarray:
        return rng.standard_t(3, n) / np.sqrt(3)

    distance = -ndtri(world.eer) * sum(world.sds)
    real = distance + world.speaker * tails() + rng.normal(size=n)
    fake = world.speaker * tails() + world.speaker_fake * tails() + rng.normal(size=n)
    return eer_point(count_errors(real, fake)).eer


Ends = dict[str, tuple[float, float]]


def intervals(world: World, seed: int) -> Ends:
    """Method -> interval, fractions, of one simulated set."""
    trials = simulate(world, seed)
    result = results.evaluate_trials("", "own", Path(), trials, N_RESAMPLES, seed)
    ends = {}
    for method, unit in (("percentile, trials", "trial"), ("percentile, drawn", "speaker")):
        factors = find_units(trials, "own", unit).factors
        eers = resample_eers([trials.scores], trials.is_real, factors, N_RESAMPLES, seed)[:, 0]
        ends[method] = percentile_interval(eers)
    return ends | {"here": _here(result)}


def _here(result: Result) -> tuple[float, float]:
    return result.interval.low / 100, result.interval.high / 100


def intervals_of_trials(setting: tuple[int, int, float], seed: int) -> Ends:
    """The same for independent trials of classes of unequal size."""
    n_real, n_fake, eer = setting
    rng = np.random.default_rng([seed, 2])
    scores = np.concatenate([rng.normal(-2 * ndtri(eer), 1, n_real), rng.normal(0, 1, n_fake)])
    trials = Scores([f"t{i}" for i in range(len(scores))], scores, np.arange(len(scores)) < n_real)
    result = results.evaluate_trials("", "own", Path(), trials, N_RESAMPLES, seed, "trial")
    eers = resample_eers([scores], trials.is_real, result.units.factors, N_RESAMPLES, seed)[:, 0]
    ends = percentile_interval(eers)
    return {"percentile, trials": ends, "percentile, drawn": ends, "here": _here(result)}


def rejects(world: World, seed: int) -> bool:
    """Whether two systems of equal truth are called different."""
    a = simulate(world, seed)
    b = simulate(world, seed + 10**6)
    mixed = b._replace(scores=np.sqrt(0.5) * a.scores + np.sqrt(0.5) * b.scores)
    other = simulate(world, seed + 2 * 10**6)
    ours = a._replace(scores=np.sqrt(0.5) * a.scores + np.sqrt(0.5) * other.scores)
    units = find_units(a, "own")
    record = comparisons.difference(
        Model("a", Path(), {}),
        Model("b", Path(), {}),
        "own",
        ours,
        mixed,
        units,
        N_RESAMPLES,
        Settings(seed=seed),
    )
    return record["p"] < 0.05


# ── The table ────────────────────────────────────────────────────────────────────────────────────


def cover(name: str, target: float, task: Callable[[int], Ends], n_runs: int, pool) -> str:
    """A row: for each method how often it covers; for ours the misses on either side too."""
    runs = list(tqdm(pool.map(task, range(n_runs), chunksize=5), total=n_runs, desc=name))
    cells = []
    for method in ("percentile, trials", "percentile, drawn", "here"):
        ends = np.array([run[method] for run in runs])
        covered = (ends[:, 0] <= target) & (target <= ends[:, 1])
        cells.append(f"{100 * covered.mean():.1f}")
    low, high = (np.array([run["here"][i] for run in runs]) for i in (0, 1))
    cells += [
        f"{100 * np.mean(target < low):.1f}",
        f"{100 * np.mean(target > high):.1f}",
        f"{100 * np.median(high - low):.3f}",
    ]
    row = f"| {name} | {100 * target:.3g} | " + " | ".join(cells) + " |"
    tqdm.write(row)
    return row


def main() -> None:
    n_runs = int(sys.argv[1]) if len(sys.argv) > 1 else N_RUNS
    with ProcessPoolExecutor() as pool:
        rows = [
            cover(
                f"{n} real, {m} fake", eer, partial(intervals_of_trials, (n, m, eer)), n_runs, pool
            )
            for n, m, eer in UNEQUAL
        ]
        rows += [
            cover(world.name, truth(world), partial(intervals, world), n_runs, pool)
            for world in WORLDS
        ]
        levels = []
        for world in (WORLDS[0], WORLDS[8], WORLDS[13]):
            found = list(
                tqdm(pool.map(partial(rejects, world), range(n_runs)), total=n_runs, desc="tests")
            )
            levels.append(f"| {world.name} | {100 * np.mean(found):.1f} |")
    text = TEXT.format(
        rows="\n".join(rows),
        levels="\n".join(levels),
        n_runs=n_runs,
        n_resamples=N_RESAMPLES,
        error=100 * np.sqrt(0.95 * 0.05 / n_runs),
    )
    OUTPUT.parent.mkdir(exist_ok=True)
    with atomic_write(OUTPUT) as file:
        file.write(text)
    print(text)


TEXT = """# What the intervals cover

`python -m benchmarks.bench_coverage` writes this page: {n_runs} simulated sets of trials a setting,
{n_resamples} resamples an interval. A coverage of 95 % has a standard error of {error:.1f} points.

The scores are normal with effects of speakers and attacks whose sizes are those of the published
scores (attacks: 1 to 1.25 times the spread within one; speakers: 0.45 to 1.9 times). The truth is
the EER over *all* speakers and attacks of which a set holds some. Numbers of speakers and attacks
are those of C1, In-the-Wild and 19LA; of the trials there is a third.

- trials: the percentile bootstrap that draws trials, as most papers have it
- drawn: the percentile bootstrap with speakers, or speakers and attacks, drawn
- here: the interval that `evaluate_score.py` prints; how often the truth lies below and above it,
  and its median width in points

| setting | EER (%) | trials | drawn | **here** | below | above | width |
|---|--:|--:|--:|--:|--:|--:|--:|
{rows}

Paired tests of two systems that are equally good, called different at p < 0.05, in percent (should
be at most 5):

| setting | called different |
|---|--:|
{levels}
"""


if __name__ == "__main__":
    main()
