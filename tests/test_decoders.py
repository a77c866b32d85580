"""What libsndfile cannot decode is read by ffmpeg; what is not whole is refused.

python -m pytest tests/test_decoders.py
"""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from dataset import CLIP_SAMPLES, load_clip
from formats import audio, decoders
from runtime.cli import InputError

# File name -> codec; libsndfile opens none of them.
FOR_FFMPEG = {
    "x.m4a": "aac",
    "x.mp4": "aac",
    "x.aac": "aac",
    "x.webm": "libopus",
    "x.oga": "flac",
    "x.mka": "pcm_s16le",
    "x.caf": "alac",
    "x.wv": "wavpack",
    "x.wav": "g722",
}


def encode(path: Path, codec: str, seconds: float = 2, rate: int = 48_000, channels: int = 1):
    """A tone as PyAV encodes it."""
    t = np.arange(int(seconds * rate))
    wave = (8000 * np.sin(t / 20 + np.arange(channels)[:, None])).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = "mono" if channels == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(wave.T.reshape(1, -1).copy(), "s16", stream.layout.name)
        frame.sample_rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def by_ffmpeg(path: Path) -> np.ndarray:
    """(channels, n) float32, by ffmpeg's own conversion."""
    resampler = av.AudioResampler("fltp")
    with av.open(str(path)) as container:
        frames = [out for frame in container.decode(audio=0) for out in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray() for frame in frames], axis=1)


def halve(path: Path) -> Path:
    os.truncate(path, path.stat().st_size // 2)
    return path


@pytest.mark.parametrize(
    "name, channels",
    # G.722 has one channel.
    [(name, n) for name in FOR_FFMPEG for n in (1, 2) if (name, n) != ("x.wav", 2)],
)
def test_what_libsndfile_cannot_open_has_ffmpegs_samples(tmp_path: Path, name, channels) -> None:
    path = encode(tmp_path / name, FOR_FFMPEG[name], channels=channels)
    decoded = decoders.read_start(path, lambda rate: None)
    theirs = by_ffmpeg(path)
    assert decoded.decoder == decoders.FFMPEG and decoded.rate == 48_000
    np.testing.assert_array_equal(decoded.samples, theirs.T.mean(axis=1, dtype=np.float32))
    recording = audio.load_recording(path)
    assert recording.decoder == decoders.FFMPEG and recording.clip.shape == (CLIP_SAMPLES,)
    assert audio.inspect(path).seconds == theirs.shape[1] / 48_000


def test_libsndfile_comes_first(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.flac", np.full(100, 0.25), 16_000)
    assert audio.load_recording(tmp_path / "x.flac").decoder == decoders.LIBSNDFILE


@pytest.mark.parametrize("name", ["x.m4a", "x.webm", "x.oga", "x.mka", "x.wv", "x.wav"])
def test_half_of_what_ffmpeg_reads_is_refused(tmp_path: Path, name: str) -> None:
    path = halve(encode(tmp_path / name, FOR_FFMPEG[name]))
    with pytest.raises(InputError, match=rf"{name}: (cut short|cannot be read as audio)"):
        load_clip(path)


@pytest.mark.parametrize("name, codec", [("x.mp3", "libmp3lame"), ("x.opus", "libopus")])
def test_half_of_what_libsndfile_reads_is_refused(tmp_path: Path, name: str, codec: str) -> None:
    path = encode(tmp_path / name, codec)
    assert audio.load_recording(path).decoder == decoders.LIBSNDFILE
    with pytest.raises(InputError, match=rf"{name}: cut short"):
        load_clip(halve(path))


def test_a_cut_behind_the_samples_that_are_used_does_not_matter(tmp_path: Path) -> None:
    path = encode(tmp_path / "x.opus", "libopus", seconds=20)
    whole = load_clip(path)
    assert (load_clip(halve(path)) == whole).all()


@pytest.mark.parametrize("name", ["x.ogg", "x.opus"])
def test_chained_ogg_is_read_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.opus":
        encode(path, "libopus", seconds=1)
    else:
        soundfile.write(path, 0.3 * np.sin(np.arange(16_000) / 20), 16_000)
    once = audio.inspect(path).seconds
    path.write_bytes(2 * path.read_bytes())
    assert audio.inspect(path).seconds == pytest.approx(2 * once, abs=0.05)


@pytest.mark.parametrize("announced", [0, 2**36 - 1, 100_000])
def test_a_flac_that_announces_another_length_is_read(tmp_path: Path, announced: int) -> None:
    path = tmp_path / "x.flac"
    soundfile.write(path, 0.3 * np.sin(np.arange(20_000) / 20), 16_000)
    whole, data = load_clip(path), bytearray(path.read_bytes())
    streaminfo = int.from_bytes(data[18:26], "big") & ~(2**36 - 1) | announced
    data[18:26] = streaminfo.to_bytes(8, "big")
    path.write_bytes(data)
    assert (load_clip(path) == whole).all()
    assert audio.inspect(path).seconds == 20_000 / 16_000


def test_a_refusal_says_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(b"no audio at all " * 100)
    with pytest.raises(InputError, match="x.dat: .*libsndfile: .*ffmpeg: .*ffmpeg -i x.dat"):
        load_clip(tmp_path / "x.dat")


def test_damage_is_refused_by_name_or_read(tmp_path: Path) -> None:
    """Bits flipped in the heads of files: what decoders raise is said in one line."""
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for name in ("x.m4a", "x.webm", "x.oga", "x.mka", "x.wav"):
        whole = encode(tmp_path / name, FOR_FFMPEG[name], seconds=0.5).read_bytes()
        for _ in range(25):
            data = bytearray(whole)
            for at in rng.integers(0, 400, 3):
                data[at] ^= 1 << rng.integers(8)
            path.write_bytes(data)
            try:
                assert load_clip(path).isfinite().all()
            except InputError as error:
                assert "damaged: " in str(error) and "\n" not in str(error)


def test_play_lists_open_no_other_file(tmp_path: Path) -> None:
    encode(tmp_path / "x.aac", "aac")
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nx.aac\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile x.aac\n")
    for name in ("list.m3u8", "list.ffconcat"):
        with pytest.raises(InputError, match="cannot be read as audio"):
            load_clip(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user other than root, who may read all")
def test_permission_denied_is_called_that(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", np.zeros(100), 16_000)
    (tmp_path / "x.wav").chmod(0)
    with pytest.raises(InputError, match="x.wav: permission denied"):
        load_clip(tmp_path / "x.wav")


# ── What there is to judge ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "samples, reason",
    [
        (np.zeros(16_000), "silent"),
        (np.full(16_000, 0.25), "silent"),
        (np.array([0.25]), "lasts 0.0625 ms"),
        (np.sin(np.arange(16_000))[:, None] * [0.5, -0.5], "channels cancel"),
        (np.sin(np.arange(16_000)) * 0.001, None),
        (np.sin(np.arange(16_000))[:, None] * [0.5, 0.0], None),
    ],
)
def test_nothing_to_judge(tmp_path: Path, samples: np.ndarray, reason: str | None) -> None:
    soundfile.write(tmp_path / "x.wav", samples, 16_000, subtype="FLOAT")
    found = audio.inspect(tmp_path / "x.wav").nothing_to_judge
    assert reason in found if reason else found is None


def test_levels_of_integer_scale_are_noticed(tmp_path: Path) -> None:
    for peak, noticed in ((20_000, True), (1.2, False)):
        wave = peak * np.sin(np.arange(16_000) / 20)
        soundfile.write(tmp_path / "x.wav", wave, 16_000, subtype="FLOAT")
        note = audio.inspect(tmp_path / "x.wav").note
        assert ("levels over 1" in note) if noticed else note is None


def test_verdicts_say_what_they_rest_on(tmp_path: Path) -> None:
    import generate_score

    soundfile.write(tmp_path / "silent.wav", np.zeros(32_000), 16_000)
    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(32_000)) * 0.5, 16_000)
    silent, tone = (
        generate_score.describe_verdict(0.75, generate_score.look_at(str(tmp_path / name)))
        for name in ("silent.wav", "tone.wav")
    )
    assert "nothing to judge" in silent and "real" not in silent
    assert tone.split() == ["2.00", "s", "0.750000", "real"]


def test_extreme_logits_become_probabilities_without_a_warning() -> None:
    import warnings

    import generate_score

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = np.array([[-2000.0, 0.0], [2000.0, 0.0]])
        assert generate_score.to_scores(logits, llr=False).tolist() == [0.0, 1.0]
