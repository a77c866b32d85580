"""Other people's score files and lists. Run: python -m pytest tests/test_score_forms.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from formats import score_files, trial_lists
from formats.protocols import FAKE, REAL, Trial
from formats.score_forms import read_table, require_valid
from formats.trial_lists import NameIndex, read_clusters, read_labels
from runtime.cli import InputError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ── Forms that are understood ────────────────────────────────────────────────────────────────────

REAL_THEN_FAKE = [REAL, FAKE]


@pytest.mark.parametrize(
    "text, names, scores, labels, attacks",
    [
        # `name score` of SSL_Anti-spoofing and XLSR-Mamba
        ("0.wav -4.168\nLA_E_1 -3.2\n", ["0.wav", "LA_E_1"], [-4.168, -3.2], None, None),
        ("a 0.5 real\nb 0.25 spoof\n", ["a", "b"], [0.5, 0.25], REAL_THEN_FAKE, None),
        # ASVspoof 2019's baselines
        (
            "a - bonafide 0.9\nb A11 spoof 0.1\n",
            ["a", "b"],
            [0.9, 0.1],
            REAL_THEN_FAKE,
            ["-", "A11"],
        ),
        # spoof_SUPERB: names with blanks
        (
            "Own (Sonic-3)/x y.wav - bonafide 1\nOwn (Sonic-3)/z.wav - spoof -1.2\n",
            ["Own (Sonic-3)/x y.wav", "Own (Sonic-3)/z.wav"],
            [1, -1.2],
            REAL_THEN_FAKE,
            None,
        ),
        # ASVspoof 5, scores and keys
        ("filename\tcm-score\na\t1.5\nb\t-2\n", ["a", "b"], [1.5, -2], None, None),
        (
            "filename\tcm-score\tcm-label\na\t1\tbonafide\nb\t2\tspoof\n",
            ["a", "b"],
            [1, 2],
            REAL_THEN_FAKE,
            None,
        ),
        ("ID,Score,Label\na,1,real\nb,2,fake\n", ["a", "b"], [1, 2], REAL_THEN_FAKE, None),
        (
            'label,LLR,path,attack\nbonafide,1,"x,1.wav",-\nspoof,2,y.wav,TTS\n',
            ["x,1.wav", "y.wav"],
            [1, 2],
            REAL_THEN_FAKE,
            ["-", "TTS"],
        ),
    ],
)
def test_forms_of_other_programs_are_read(tmp_path, text, names, scores, labels, attacks):
    table = read_table(write(tmp_path / "s.txt", text))
    assert table.names == names and table.scores.tolist() == scores
    assert (None if table.labels is None else table.labels.tolist()) == labels
    assert table.attacks == attacks


def test_columns_can_be_named(tmp_path):
    path = write(tmp_path / "s.csv", "clip,utt,p,q\nc1,u1,0.1,7\nc2,u2,0.2,8\n")
    table = read_table(path, {"name": "clip", "score": "q"})
    assert table.names == ["c1", "c2"] and table.scores.tolist() == [7, 8]
    with pytest.raises(InputError, match="expected a column 'r', got clip, utt, p, q"):
        read_table(path, {"score": "r"})


# ── Forms that have more than one meaning ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, row, message",
    [
        ("utt -1.5 0.3\n", 1, "two numbers could be two logits, or a score and a label: never"),
        ("utt 0.9 1\n", 1, "two numbers could be two logits, or a score and a label: never"),
        ("Output, LA_E_1, 0, 0.9\n", 1, "expected `name score`"),
        ("a,0.5,real\n", 1, "expected `name score`"),
        ("a\n", 1, r"expected `name score`, .*got 1 column"),
        ("a x\n", 1, "expected `name score`"),
        ("a 1.0\nb 0.5 real\n", 2, "`name score` as in the first row, got 3 column"),
        ("a 1.0\nb 1_0\n", 2, "expected a number as the score, got '1_0'"),
        ("a - real 1\nb spoof 1\n", 2, "`name attack word score` as in the first row"),
        ("a - real 1\nb c A11 spoof 1\n", 2, "the form in which names may have blanks"),
        ("a - real 1\nb - genuine 1\n", 2, "expected one of real, .*got 'genuine'"),
        ('ID,Score\na,"[0.1, 0.9]"\n', 2, "expected one score, got a list"),
        ("utt,score,label\na,1,1\n", 2, "expected one of real, .* as the label, got '1'"),
        ("utt,score\na,1,real\n", 2, "expected 2 columns as in the header, got 3"),
        ("utt,score,llr\na,1,2\n", 1, "score and llr could both be the score; name one with"),
        ("path,utt,score\nx,a,1\n", 1, "path and utt could both be the name; name one with"),
        ("utt,probability\na,1\n", 1, "expected a column of the score .*--columns score=NAME"),
    ],
)
def test_what_has_two_meanings_is_refused_by_row(tmp_path, text, row, message):
    path = write(tmp_path / "s.txt", text)
    with pytest.raises(InputError, match=message) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}:{row}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [("a 1\na 2\n", "each trial once, got 'a' again"), ("a 1\nb nan\n", "finite scores, got nan")],
)
def test_repeated_trials_and_non_finite_scores_are_refused(tmp_path, text, message):
    path = write(tmp_path / "s.txt", text)
    with pytest.raises(InputError, match=message):
        require_valid(path, read_table(path))


# ── Lists of trials ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "x.wav real 0\nF01_x.wav fake 1 \n",
            [("x.wav", REAL, "-", "-"), ("F01_x.wav", FAKE, "-", "-")],
        ),
        (
            "LA_1 u1 - - bonafide\nLA_2 u2 - A07 spoof\n",
            [("u1", REAL, "-", "LA_1"), ("u2", FAKE, "A07", "LA_2")],
        ),
        (  # ASVspoof 2021, stage-1 keys
            "LA_9 u1 alaw ita_tx - bonafide notrim eval\n"
            "LA_9 u2 alaw ita_tx A07 spoof notrim eval\n",
            [("u1", REAL, "-", "LA_9"), ("u2", FAKE, "A07", "LA_9")],
        ),
        (  # full DF keys
            "LA_3 u2 nocodec asvspoof A14 spoof notrim progress traditional_vocoder - - - -\n",
            [("u2", FAKE, "A14", "LA_3")],
        ),
        (  # ASVspoof 5: the attack of a real row is "bonafide"
            "D_6 u1 F - - - AC1 bonafide bonafide -\nD_6 u2 F - - - AC1 A11 spoof -\n",
            [("u1", REAL, "-", "D_6"), ("u2", FAKE, "A11", "D_6")],
        ),
        (  # In-the-Wild: speakers have blanks
            "file,speaker,label\n0.wav,Alec Guinness,spoof\n1.wav,Bo,bona-fide\n",
            [("0.wav", FAKE, "-", "Alec Guinness"), ("1.wav", REAL, "-", "Bo")],
        ),
        (
            "path\tlabel\tspeaker\tsource\nd/a b.wav\treal\ts1\t-\nd/c.wav\tfake\ts2\tTTS\n",
            [("d/a b.wav", REAL, "-", "s1"), ("d/c.wav", FAKE, "TTS", "s2")],
        ),
    ],
)
def test_lists_and_protocols_are_read(tmp_path, text, expected):
    trials = read_labels(write(tmp_path / "list", text))
    assert [(t.name, t.label, t.source, t.speaker) for t in trials] == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no rows"),
        ("a b c d\n", ":1: expected a header that names the columns .*got 4 columns"),
        ("utt,speaker\na,b\n", ":1: expected a column of the label"),
        ("utt,label\na,1\n", ":2: expected one of real, .*got '1'"),
        ("utt,label\na,real\na,fake\n", ":3: a is in it as real and as fake"),
        ("utt,label\n,real\n", ":2: expected a trial's name"),
        ("utt,label\n\x1b[31m,real\n", ":2: expected a trial's name"),
        ("utt,label\nb\xff,real\n", "expected a text file in UTF-8"),
    ],
)
def test_malformed_lists_are_named_by_row(tmp_path, text, message):
    path = tmp_path / "list"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        read_labels(path)


def test_clusters_are_read_by_name(tmp_path):
    path = write(tmp_path / "c.csv", "utt,cluster\na,x\nb,x\nc,y\n")
    assert read_clusters(path) == {"a": "x", "b": "x", "c": "y"}
    assert read_clusters(write(path, "utt\tspeaker\na\tz z\n")) == {"a": "z z"}
    for text, message in (
        ("utt,colour\na,x\n", "columns `utt` and `cluster`"),
        ("utt,cluster\na,\n", ":2: expected a cluster of a, got nothing"),
        ("utt,cluster\na,x\na,y\n", ":3: a is in two clusters"),
    ):
        with pytest.raises(InputError, match=message):
            read_clusters(write(path, text))


def test_recorded_trials_survive_a_round_trip_and_are_no_score_file(tmp_path):
    trials = [
        Trial("u1.wav", "/x/u1.wav", REAL, "-", "Alec Guinness"),
        Trial("F01_u1.wav", "/x/F01_u1.wav", FAKE, "F01", "-"),
    ]
    score_files.write_trials(tmp_path / "C1_result.txt", trials)
    (path,) = tmp_path.iterdir()
    assert path.name == "C1_trials.tsv" and path.suffix != ".txt"
    assert score_files.read_trials(tmp_path / "C1_result.txt") == [
        trial._replace(path="") for trial in trials
    ]
    assert score_files.read_trials(tmp_path / "C2_result.txt") == []


@pytest.mark.parametrize(
    "name, entry",
    [
        ("x.wav", "x.wav"),
        ("x", "x.wav"),
        ("x.flac", "x.wav"),
        ("/data/set/x.wav", "x.wav"),
        ("C:\\data\\x.WAV", "x.wav"),
        ("LA_E_2834763_A11", "LA_E_2834763"),
        ("LA_E_2834763_-", "LA_E_2834763"),
        ("LA_E_2834763_A1", None),
        ("twice.wav", None),  # a/twice.wav and b/twice.wav: never guessed
        ("a/twice.wav", "a/twice.wav"),
        ("y", None),
    ],
)
def test_names_join_across_folders_extensions_and_attacks(name, entry):
    index = NameIndex(["x.wav", "LA_E_2834763", "a/twice.wav", "b/twice.wav"])
    assert index.find(name) == entry


def test_words_of_the_corpora_are_known():
    assert trial_lists.label_of("f", 1, " bona-fide ") == REAL
