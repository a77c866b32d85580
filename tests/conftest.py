"""Fixtures: small real things. Audio is tones and noise in tmp_path, wav2vec 2.0 a narrow model
saved to disk.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

REPO = Path(__file__).resolve().parents[1]
REFERENCE = REPO.parent / "shared" / "reference"

# `make test` runs two tests at a time, each in one thread.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def reference() -> Path:
    """Published weights, parity tensors, scores and a small corpus; they are not part of this
    project.
    """
    if not REFERENCE.is_dir():
        pytest.skip("needs ../shared/reference, the published weights and parity tensors")
    return REFERENCE


def write_tone(
    path: Path,
    seconds: float = 0.5,
    pitch: float = 220.0,
    rate: int = 16_000,
    channels: int = 1,
    seed: int = 0,
) -> Path:
    """A tone with harmonics and noise, as PCM 16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, t = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in (1, 2, 3)) * 0.1 + rng.normal(
        0, 0.01, t.size
    )
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate, subtype="PCM_16")
    return path


def make_codecfake(root: Path, n_real: int = 4) -> Path:
    """Codecfake's layout: fakes a little higher in pitch than the real clips, which a head can
    learn.
    """
    for part, tags in (
        ("train", (1, 2)),
        ("dev", (1,)),
        *((f"C{k}", (k,)) for k in range(1, 8)),
        *((f"A{k}", (f"L{k}",)) for k in (1, 2, 3)),
    ):
        folder = root / part if part in ("train", "dev") else root / "test" / part
        rows = []
        for n in range(n_real):
            name, seed = (
                f"s{part if part in ('train', 'dev', 'C7') else ''}_{n:03d}.wav",
                n + 100 * len(part),
            )
            write_tone(folder / name, pitch=150 + 5 * n, seed=seed)
            rows.append(f"{name} real {tags[0] if part[0] == 'A' else 0}")
            for tag in tags:
                fake = f"F{tag:02d}_{name}" if isinstance(tag, int) else f"{tag}_{name}"
                write_tone(folder / fake, pitch=320 + 5 * n, seed=seed)
                rows.append(
                    f"{fake} fake {tag}" + " " * (n % 2)
                )  # trailing blanks occur in the real lists
        _write(root / "label" / f"{part}.txt", rows)
    return root


def make_la(root: Path, n_real: int = 4) -> Path:
    """ASVspoof2019 LA's layout, with a stray file that no protocol names."""
    for part, letter, kind in (("train", "T", "trn"), ("dev", "D", "trl"), ("eval", "E", "trl")):
        rows = []
        for n in range(2 * n_real):
            utterance, fake = f"LA_{letter}_{1000000 + n}", n % 2
            write_tone(
                root / f"ASVspoof2019_LA_{part}/flac/{utterance}.flac",
                pitch=300 if fake else 160,
                seed=n,
            )
            rows.append(f"LA_{n:04d} {utterance} - {'A07 spoof' if fake else '- bonafide'}")
        write_tone(root / f"ASVspoof2019_LA_{part}/flac/LA_{letter}_9999999.flac")
        _write(root / f"ASVspoof2019_LA_cm_protocols/ASVspoof2019.LA.cm.{part}.{kind}.txt", rows)
    return root


def make_itw(root: Path, n: int = 6) -> Path:
    """In-the-Wild as released: speakers' names hold blanks."""
    rows = ["file,speaker,label"]
    for i in range(n):
        write_tone(root / f"release_in_the_wild/{i}.wav", pitch=300 if i % 2 else 160, seed=i)
        rows.append(f"{i}.wav,Alec Guinness,{'spoof' if i % 2 else 'bona-fide'}")
    _write(root / "release_in_the_wild/meta.csv", rows)
    return root


def _write(path: Path, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with miniature Codecfake/, LA/ and ITW/.

    Read only: tests that damage something make their own.
    """
    root = tmp_path_factory.mktemp("corpora")
    make_codecfake(root / "Codecfake")
    make_la(root / "LA")
    make_itw(root / "ITW")
    return root


def save_wav2vec2(folder: Path, hidden_size: int, blocks: int = 6, **changes: object) -> Path:
    """A small wav2vec 2.0 of XLS-R's kind whose LayerNorms are random, as after training, not at 1
    and 0.
    """
    import transformers

    settings = dict(
        hidden_size=hidden_size,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[16] * 7,
        feat_extract_norm="layer",
        conv_bias=True,
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.5,
    )
    config = transformers.Wav2Vec2Config(**(settings | changes))
    torch.manual_seed(1)
    network = transformers.Wav2Vec2Model(config)
    for name, parameter in network.named_parameters():
        if "norm" in name:  # an adapter's is not called layer_norm
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ssl_narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wav2vec2(tmp_path_factory.mktemp("ssl") / "narrow", hidden_size=32)


@pytest.fixture(scope="session")
def ssl_1024(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small but for its hidden size, which the heads need."""
    return save_wav2vec2(tmp_path_factory.mktemp("ssl") / "wide", hidden_size=1024)
