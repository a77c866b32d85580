"""The miniature corpora of `make demo`: layouts, copies, and no way to tell the class but by
listening.

python -m pytest tests/test_demo.py
"""

from __future__ import annotations

import csv
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import correlate
from scipy.stats import rankdata

from demo import corpora as demo
from demo import fakes
from demo.recordings import find_clips
from demo.voices import Spoken
from runtime import cli

SCALE = 0.1
RATE = demo.SAMPLE_RATE


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small") / "demo"
    demo.build(out, scale=SCALE, workers=1)
    return out


@pytest.fixture(scope="module")
def records(corpora) -> list[dict[str, str]]:
    with open(corpora / "speakers.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    return Spoken(seed=1, speaker=1, number=1, seconds=3.017).read()


# --- layouts
# ------------------------------------------------------------------------------------------


def protocol(path: Path) -> list[list[str]]:
    """Fields of each line, split at single blanks; a trailing blank is dropped."""
    return [line.removesuffix(" ").split(" ") for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "subset", ["train", "dev", *(f"C{k}" for k in range(1, 8)), "A1", "A2", "A3"]
)
def test_codecfake_labels_name_exactly_the_files_beside_them(corpora, subset):
    root = corpora / "Codecfake"
    rows = protocol(root / "label" / f"{subset}.txt")
    folder = root / subset if subset in ("train", "dev") else root / "test" / subset
    assert sorted(name for name, *_ in rows) == sorted(path.name for path in folder.iterdir())
    for name, label, tag in rows:
        codec = name.split("_")[0] if label == "fake" else None
        if subset.startswith("A"):
            assert (codec, tag) == (subset if codec else None, f"L{subset[1]}")
        else:
            assert tag == (codec[-1] if codec else "0"), name
        if codec and not subset.startswith("A"):
            assert subset in ("train", "dev", f"C{tag}") and (tag != "7" or subset == "C7")


def test_some_lines_of_every_protocol_end_in_a_blank(corpora):
    for path in [
        *corpora.glob("Codecfake/label/train.txt"),
        *corpora.glob("LA/ASVspoof2019_LA_cm_protocols/*.txt"),
    ]:
        ends = Counter(line.endswith(" ") for line in path.read_text().splitlines())
        assert ends[True] and ends[False] > ends[True], path


def test_codecfake_shares_its_real_clips_among_the_test_sets(corpora):
    test = corpora / "Codecfake" / "test"
    for group in ([f"C{k}" for k in range(1, 8)], ["A1", "A2", "A3"]):
        contents = [
            {path.name: path.read_bytes() for path in (test / subset).glob("s*.wav")}
            for subset in group
        ]
        assert len(contents[0]) == round(demo.PARTS[group[0][0]].real * SCALE)
        assert all(content == contents[0] for content in contents), group


def test_every_training_clip_has_a_copy_by_each_known_codec(corpora):
    names = Counter(name for name, *_ in protocol(corpora / "Codecfake/label/train.txt"))
    real = [name for name in names if name.startswith("s")]
    assert set(names) == {*real, *(f"F0{k}_{name}" for name in real for k in range(1, 7))}


@pytest.mark.parametrize(
    "part, ending, attacks",
    [("train", "trn", range(1, 7)), ("dev", "trl", range(1, 7)), ("eval", "trl", range(7, 20))],
)
def test_asvspoof_protocols_have_five_columns_and_their_files(corpora, part, ending, attacks):
    rows = protocol(
        corpora / f"LA/ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{part}.{ending}.txt"
    )
    files = {
        path.stem
        for path in (corpora / f"LA/ASVspoof2019_LA_{part}/flac").iterdir()
        if path.suffix == ".flac"
    }
    assert {utterance for _, utterance, *_ in rows} <= files
    assert len(files - {utterance for _, utterance, *_ in rows}) == (0 if part == "train" else 2)
    assert {(attack, key) for *_, attack, key in rows} == {
        ("-", "bonafide"),
        *((f"A{k:02d}", "spoof") for k in attacks),
    }
    for speaker, utterance, nothing, *_ in rows:
        assert (
            speaker.startswith("LA_0")
            and utterance.startswith(f"LA_{part[0].upper()}_")
            and nothing == "-"
        )


def test_in_the_wild_has_its_header_and_speakers_with_blanks(corpora):
    folder = corpora / "ITW/release_in_the_wild"
    with open(folder / "meta.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "speaker", "label"]
    assert {label for *_, label in rows} == {"bona-fide", "spoof"}
    assert sorted(name for name, *_ in rows) == sorted(path.name for path in folder.glob("*.wav"))
    assert all(" " in speaker for _, speaker, _ in rows)


def test_speakers_of_training_are_not_in_the_test_sets(records):
    speakers = defaultdict(set)
    for record in records:
        where = record["file"]
        group = "train" if "train" in where else "dev" if "dev" in where else "test"
        speakers[group].add(record["speaker"])
    assert not speakers["train"] & speakers["test"]
    assert not speakers["dev"] & (speakers["train"] | speakers["test"])
    assert all(len(names) > 1 for names in speakers.values())


def test_the_record_lists_every_audio_file(corpora, records):
    audio = {
        path.relative_to(corpora).as_posix()
        for path in corpora.rglob("*")
        if path.suffix in (".wav", ".flac")
    }
    assert [record["file"] for record in records if record["file"] not in audio] == []
    assert len(records) == len(audio)


# --- nothing but the sound tells the class
# ----------------------------------------------------------------


def auc(real: list[float], fake: list[float]) -> float:
    """Share of pairs in which the fake's value is the greater one; 0.5 says that the value tells
    nothing.
    """
    ranks = rankdata([*real, *fake])[len(real) :]
    return (ranks.sum() - len(fake) * (len(fake) + 1) / 2) / (len(real) * len(fake))


@pytest.mark.parametrize("corpus", ["Codecfake", "LA", "ITW"])
def test_level_length_offset_and_file_do_not_tell_real_from_fake(corpora, records, corpus):
    values = {label: defaultdict(list) for label in ("real", "fake")}
    headers = defaultdict(set)
    for record in records:
        if not record["file"].startswith(corpus):
            continue
        path = corpora / record["file"]
        clip, rate = soundfile.read(path)
        assert rate == RATE and clip.ndim == 1 and abs(clip.mean()) < 1e-5
        found = values[record["label"]]
        found["speech level"].append(demo.speech_level(clip))
        found["peak"].append(np.abs(clip).max())
        found["level of the first 5 ms"].append(np.abs(clip[: demo.FADE]).max())
        found["length"].append(len(clip))
        found["file size"].append(path.stat().st_size)
        if path.suffix == ".wav":  # all of the header but the two fields that hold the length
            header = path.read_bytes()[:44]
            headers[record["label"]].add(header[:4] + header[8:40])
    assert headers["real"] == headers["fake"] and len(headers["real"]) == (
        0 if corpus == "LA" else 1
    )
    for name, real in values["real"].items():
        fake = values["fake"][name]
        # In LA and In-the-Wild not every clip has a copy, and so few clips differ by chance: two
        # standard deviations of it.
        chance = (
            0
            if corpus == "Codecfake"
            else 2 * np.sqrt((len(real) + len(fake) + 1) / (12 * len(real) * len(fake)))
        )
        bound = chance + (
            0.06 if name in ("speech level", "length", "file size") else 0.15
        )  # codecs do change the waveform
        assert abs(auc(real, fake) - 0.5) < bound, f"{name}: AUC {auc(real, fake):.3f}"


def test_a_clip_and_its_copies_have_one_level_and_length(corpora):
    for path in (corpora / "Codecfake/train").glob("s*.wav"):
        clips = [
            soundfile.read(copy)[0] for copy in (corpora / "Codecfake/train").glob(f"*{path.name}")
        ]
        levels = [20 * np.log10(demo.speech_level(clip)) for clip in clips]
        assert len(clips) == 7 and {len(clip) for clip in clips} == {len(clips[0])}
        assert max(levels) - min(levels) < 1, path.name


def test_the_last_steps_leave_no_offset_and_no_click(voice):
    samples = finished(voice + 0.3)
    assert samples.dtype == np.int16 and abs(samples.mean()) < 0.05
    assert np.abs(samples[[0, -1]]).max() <= 2


@pytest.mark.parametrize("name", fakes.CODECS)
def test_the_pauses_of_a_copy_hold_the_same_noise_as_the_originals(voice, name):
    pause = demo.speaking(voice)[demo.FADE : -demo.FADE] == 0
    levels = [
        20 * np.log10(finished(clip, demo.speaking(voice))[demo.FADE : -demo.FADE][pause].std())
        for clip in (voice, fakes.CODECS[name](voice))
    ]
    assert pause.sum() > RATE / 10 and abs(levels[0] - levels[1]) < 0.3, levels


# --- the fakes are copies, and are not the original
# -----------------------------------------------------------


def finished(clip: np.ndarray, gate: np.ndarray | None = None) -> np.ndarray:
    return demo.finish(
        clip, np.ones(len(clip)) if gate is None else gate, 1, np.random.default_rng(1)
    )


@pytest.mark.parametrize("name", fakes.CODECS)
def test_codec_copies_are_aligned_close_and_not_equal(voice, name):
    copy = fakes.CODECS[name](voice)
    assert len(copy) == len(voice)
    delay = correlate(copy, voice, method="fft").argmax() - (len(voice) - 1)
    assert abs(delay) <= 1, f"{delay} samples late"
    assert 0.75 < np.corrcoef(copy, voice)[0, 1] < 0.99


@pytest.mark.parametrize("name", fakes.RESYNTHESES)
def test_resynthesis_follows_the_loudness_of_the_clip_without_its_waveform(voice, name):
    copy = fakes.RESYNTHESES[name](voice, np.random.default_rng(1))
    assert len(copy) == len(voice) and np.isfinite(copy).all()
    envelopes = [
        np.abs(clip[: len(clip) // 160 * 160].reshape(-1, 160)).mean(axis=1)
        for clip in (voice, copy)
    ]
    delays = range(-5, 6)
    alike = [np.corrcoef(envelopes[0], np.roll(envelopes[1], shift))[0, 1] for shift in delays]
    assert max(alike) > 0.85 and abs(delays[int(np.argmax(alike))]) <= 1, alike
    assert abs(np.corrcoef(copy, voice)[0, 1]) < 0.3


@pytest.mark.parametrize("name", fakes.CODECS)
def test_copies_keep_the_band_above_4_khz(voice, name):
    def share_above_4_khz(clip):
        power = np.abs(np.fft.rfft(finished(clip))) ** 2
        return (
            power[len(power) * 17 // 32 : len(power) * 27 // 32].sum() / power.sum()
        )  # 4.25 to 6.75 kHz

    assert 1 / 3 < share_above_4_khz(fakes.CODECS[name](voice)) / share_above_4_khz(voice) < 3


def test_half_bands_join_to_the_clip(voice):
    for length in (16000, 16001, 16002, 16003):
        joined = fakes.join(*fakes.split(voice[:length]))
        np.testing.assert_allclose(joined[:length], voice[:length], atol=1e-3)


def test_voices_differ_between_speakers_and_between_clips_and_repeat_themselves():
    first = Spoken(1, 1, 1, 1.5).read()
    assert np.array_equal(first, Spoken(1, 1, 1, 1.5).read()) and len(first) == 24000
    for other in (Spoken(1, 1, 2, 1.5), Spoken(1, 2, 1, 1.5), Spoken(2, 1, 1, 1.5)):
        assert abs(np.corrcoef(first, other.read())[0, 1]) < 0.3


# --- recordings
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def speech(tmp_path) -> Path:
    """Four speakers' folders in four formats, and files that cannot be used."""
    folder = tmp_path / "speech"
    for speaker, (suffix, rate, channels) in enumerate(
        [("wav", 44100, 2), ("flac", 8000, 1), ("ogg", 24000, 1), ("mp3", 32000, 2)], 1
    ):
        (folder / f"person {speaker}").mkdir(parents=True)
        for take in range(2):
            audio = np.random.default_rng(take).standard_normal((12 * rate, channels)) * 0.05
            soundfile.write(folder / f"person {speaker}" / f"take {take}.{suffix}", audio, rate)
    soundfile.write(folder / "person 1" / "short.wav", np.ones(8000) * 0.1, RATE)
    soundfile.write(folder / "person 1" / "silent.wav", np.zeros(48000), RATE)
    soundfile.write(folder / "person 1" / "nan.wav", np.full(48000, np.nan), RATE, subtype="FLOAT")
    (folder / "person 2" / "broken.flac").write_bytes(b"fLaC but not really")
    (folder / "person 2" / "notes.txt").write_text("not audio")
    return folder


def test_recordings_become_clips_by_speaker_and_the_unusable_are_said(speech):
    clips, skipped = find_clips(speech, wanted=40, rng=np.random.default_rng(1))
    assert len(clips) == 4
    for cuts in clips.values():
        assert len({cut.name.split("/")[0] for cut in cuts}) == 1
        for cut in cuts:
            assert 1.0 <= cut.seconds <= 5.0
            assert abs(len(cut.read()) - cut.seconds * RATE) <= 2 and cut.read().std() > 0.01
    reasons = dict(line.split(": ", 1) for line in skipped)
    assert set(reasons) == {f"person 1/{name}.wav" for name in ("short", "silent", "nan")} | {
        "person 2/broken.flac"
    }
    assert (
        "shorter than 1 s" in reasons["person 1/short.wav"]
        and reasons["person 1/silent.wav"] == "silent"
    )


def test_a_folder_around_all_speakers_is_no_speaker_and_files_without_folders_are(speech, tmp_path):
    clips, _ = find_clips(tmp_path, wanted=40, rng=np.random.default_rng(1))
    assert len(clips) == 4
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(speech.rglob("take*"))):
        shutil.copy(path, flat / f"{number}{path.suffix}")
    clips, _ = find_clips(flat, wanted=40, rng=np.random.default_rng(1))
    assert len(clips) == 8


def test_the_demo_can_be_built_from_recordings(speech, tmp_path, capsys):
    demo.build(tmp_path / "demo", speech=speech, scale=0.05, workers=1)
    said = capsys.readouterr().out
    assert "synthetic" not in said and "silent.wav: silent" in said
    with open(tmp_path / "demo/speakers.csv", newline="") as file:
        records = list(csv.DictReader(file))
    people = defaultdict(set)
    for record in records:
        people["train" if "train" in record["file"] else "other"].add(
            record["source"].split("/")[0]
        )
    assert people["train"] and not people["train"] & people["other"]


def test_too_few_speakers_are_refused_in_one_line(speech, tmp_path):
    for number in (3, 4):
        shutil.rmtree(speech / f"person {number}")
    with pytest.raises(cli.InputError, match="found 2 speakers.*at least 3"):
        demo.build(tmp_path / "demo", speech=speech, workers=1)
    assert not (tmp_path / "demo").exists() and not (tmp_path / "demo.part").exists()


# --- the folder -----------------------------------------------------------------------------------
# ----------------


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed, workers in (("one", 3, 1), ("two", 3, 2), ("other", 4, 1)):
        demo.build(tmp_path / name, seed=seed, scale=0.02, workers=workers)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    same = [
        name for name in one if name in other and name.endswith(".wav") and one[name] == other[name]
    ]
    assert same == []


def test_a_finished_demo_is_reused_and_other_settings_are_refused(corpora, capsys):
    before = contents(corpora)
    (corpora / "features").mkdir()  # what later steps add is no reason to build anew
    demo.build(corpora, scale=SCALE, workers=1)
    assert "already there" in capsys.readouterr().out
    with pytest.raises(cli.InputError, match="made with another seed"):
        demo.build(corpora, scale=SCALE, seed=1)
    (corpora / "features").rmdir()
    assert contents(corpora) == before


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(cli.InputError, match="not made by `python -m demo`"):
        demo.build(tmp_path)
    assert contents(tmp_path) == {"precious.txt": b"mine"}


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def no_space(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(demo, "_place", no_space)
    with pytest.raises(OSError, match="No space"):
        demo.build(tmp_path / "demo", scale=0.02, workers=1)
    assert list(tmp_path.iterdir()) == []
