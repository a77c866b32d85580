"""What intervals are drawn of. Run: python -m pytest tests/test_units.py"""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.units import UNKNOWN_SPEAKERS, find_units, join_units, share_levels
from formats import protocols
from formats.score_files import Scores
from runtime.cli import InputError

NAMES = [
    "p276_001.wav",
    "F01_p276_001.wav",
    "p276_002.wav",
    "SSB05440084.wav",
    "F01_SSB05440084.wav",
    "L1_p335_035.wav",
]


def trials(names, speakers=(), attacks=(), is_real=None):
    is_real = np.arange(len(names)) % 2 == 0 if is_real is None else np.array(is_real)
    return Scores(names, np.arange(len(names), dtype=float), is_real, speakers, attacks)


@pytest.mark.parametrize(
    "name, speaker",
    [
        ("p276_290.wav", "p276"),
        ("F03_p303_064.wav", "p303"),
        ("L1_p335_035.wav", "p335"),
        ("s5_014.wav", "s5"),
        ("SSB05440084.wav", "SSB0544"),
        ("F01_SSB05440084.wav", "SSB0544"),
        ("YCsop4JzOMZ0.wav", "-"),
        ("pause_1.wav", "-"),
        ("s_000.wav", "-"),
    ],
)
def test_speakers_of_codecfake_stand_in_the_names(name, speaker):
    assert protocols.codecfake_speaker(name) == speaker


def test_codecfake_draws_speakers_with_their_copies():
    units = find_units(trials(NAMES), "C1")
    assert units.name == "speaker" and len(units.factors) == 1
    assert units.factors[0].codes.tolist() == [0, 0, 0, 1, 1, 2]
    assert units.factors[0].strata.tolist() == [0, 1, 0]  # AISHELL-3 apart from VCTK


def test_utterances_and_trials_can_be_asked_for():
    units = find_units(trials(NAMES), "C1", "utterance")
    assert units.name == "source utterance"
    assert units.factors[0].codes.tolist() == [0, 0, 1, 2, 2, 3]
    assert find_units(trials(NAMES), "C1", "trial").factors[0].codes.tolist() == list(range(6))


def test_a_clip_of_unknown_speaker_is_drawn_with_its_copies():
    names = ["p276_001.wav", "p277_001.wav", "x.wav", "F01_x.wav", "y.wav"]
    units = find_units(trials(names), "C7")
    assert units.factors[0].codes.tolist() == [0, 1, 2, 2, 3]
    assert units.name == "speaker (3 trials: utterance)"


def test_without_speakers_the_unit_says_so():
    assert find_units(trials(["0", "1", "2"]), "ITW").name == UNKNOWN_SPEAKERS
    assert "give the corpus with -d" in UNKNOWN_SPEAKERS
    one = find_units(trials(list("abc"), ["x"] * 3), "ITW")
    assert one.name == "trial: all of one speaker, says nothing of others"
    named = find_units(trials(["x.wav", "F01_x.wav"]), "C1")
    assert named.name == "source utterance: speakers unknown, likely too narrow"


def test_speakers_and_attacks_are_two_factors_and_real_trials_have_no_attack():
    n = 20
    speakers = [f"LA_{i % 4:04d}" for i in range(n)]
    attacks = ["-" if i % 2 == 0 else f"A{7 + i % 6:02d}" for i in range(n)]
    # A07 + {1, 3, 5}: three attacks only, too few to be drawn.
    assert find_units(trials(list("abcdefghijklmnopqrst"), speakers, attacks), "19LA").name == (
        "speaker"
    )
    attacks = ["A99" if i % 2 == 0 else f"A{7 + i % 10:02d}" for i in range(n)]
    units = find_units(trials(list("abcdefghijklmnopqrst"), speakers, attacks), "19LA")
    assert units.name == "speaker x attack"
    speaker, attack = units.factors
    assert speaker.n_levels == 4 and attack.n_levels == 5
    assert set(attack.codes[::2]) == {-1} and (attack.codes[1::2] >= 0).all()


def test_clusters_of_a_file_must_hold_every_trial():
    clusters = {"a": "x", "b": "x", "c": "y"}
    units = find_units(trials(list("abc")), "own", clusters)
    assert units.factors[0].codes.tolist() == [0, 0, 1] and units.name == "cluster"
    with pytest.raises(InputError, match=r"1 trials are in no cluster \(first: d\)"):
        find_units(trials(list("abcd")), "own", clusters)


def test_the_number_of_clusters_is_that_of_the_smaller_factor():
    speakers, attacks = list("xxyyzz"), ["-", "A1", "-", "A2", "-", "A1"]
    units = find_units(trials(list("abcdef"), speakers, attacks), "own")
    is_real = np.arange(6) % 2 == 0
    assert units.n_clusters(is_real) == 3
    both = find_units(
        trials(
            [str(i) for i in range(24)],
            [f"s{i % 12}" for i in range(24)],
            ["-"] * 12 + [f"A{i % 5}" for i in range(12)],
            np.arange(24) < 12,
        ),
        "19LA",
    )
    assert both.n_clusters(np.arange(24) < 12) == 12 and both.n_clusters(np.arange(24) >= 12) == 5


def test_subsets_share_the_speakers_of_one_name_within_a_corpus_only():
    a = find_units(trials(["p276_1.wav", "p277_1.wav"]), "C1")
    b = find_units(trials(["p277_2.wav", "p278_2.wav"]), "C2")
    other = find_units(trials(["u", "v"], ["p276", "p277"]), "ITW")
    codes, strata = join_units([a, b, other], ["C1", "C2", "ITW"])
    assert [of_subset[0].tolist() for of_subset in codes] == [[0, 1], [1, 2], [3, 4]]
    assert strata[0].tolist()[:3] == [strata[0][0]] * 3 and strata[0][3] != strata[0][0]
    share = share_levels([a, b, other], ["C1", "C2", "ITW"])
    assert share.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
