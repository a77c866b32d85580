"""wav2vec 2.0 of other kinds, and what is given for --ssl by mistake.

python -m pytest tests/test_frontends.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import save_wav2vec2

from frontends import load_frontend
from runtime.cli import InputError

CLIPS = torch.randn(2, 64_600, generator=torch.Generator().manual_seed(0))


def hidden_state_5(folder: Path, clips: torch.Tensor) -> torch.Tensor:
    """Entry 5 of the whole network's hidden states."""
    import transformers

    network = transformers.Wav2Vec2Model.from_pretrained(folder).eval()
    variance = clips.var(dim=1, keepdim=True, correction=0)
    clips = (clips - clips.mean(dim=1, keepdim=True)) / torch.sqrt(variance + 1e-7)
    with torch.inference_mode():
        return network(clips, output_hidden_states=True).hidden_states[5]


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter_attn_dim": 8},
        {"add_adapter": True},
        {"do_stable_layer_norm": False},
        {"feat_extract_norm": "group", "conv_bias": False, "do_stable_layer_norm": False},
        {"hidden_act": "relu"},
        {"conv_kernel": [10, 3, 3, 3, 3, 3, 2]},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_networks_of_other_kinds_are_computed_as_the_library_does(tmp_path, changes) -> None:
    """Adapters were once left out in silence: features were off by 0.4."""
    folder = save_wav2vec2(tmp_path, hidden_size=32, **changes)
    with torch.inference_mode():
        features = load_frontend("xls-r-5", str(folder))(CLIPS)
    torch.testing.assert_close(features, hidden_state_5(folder, CLIPS), atol=1e-4, rtol=1e-4)


def test_other_strides_are_refused(tmp_path: Path) -> None:
    folder = save_wav2vec2(tmp_path, hidden_size=32, conv_stride=[5, 2, 2, 2, 2, 2, 1])
    with pytest.raises(InputError, match="expected 201 frames a clip, .* give 40"):
        load_frontend("xls-r-5", str(folder))


def test_weights_that_are_not_finite_are_named(ssl_narrow: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(ssl_narrow, tmp_path / "ssl")
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layers.2.final_layer_norm.bias"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"damaged, encoder\.layers\.2\.final_layer_norm\.bias"):
        load_frontend("xls-r-5", str(folder))


def test_the_folder_is_recorded_absolute(ssl_narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ssl_narrow.parent)
    assert load_frontend("xls-r-5", ssl_narrow.name).ssl == str(ssl_narrow)


@pytest.mark.parametrize("ssl", ["./nowhere", "/nowhere/at/all", "a/b/c", "weights/", "~/nowhere"])
def test_a_mistyped_folder_is_not_looked_for_on_the_hub(ssl: str, monkeypatch) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    with pytest.raises(InputError, match="no such folder"):
        load_frontend("xls-r-5", ssl)


def test_what_is_no_checkpoint_is_named(ssl_narrow: Path, tmp_path: Path) -> None:
    fairseq = tmp_path / "xlsr2_300m.pt"
    fairseq.write_bytes(b"PK")
    with pytest.raises(InputError, match="got a file .*fairseq"):
        load_frontend("xls-r-5", str(fairseq))

    cached = tmp_path / "models--facebook--wav2vec2"
    revision = shutil.copytree(ssl_narrow, cached / "snapshots" / "abc")
    with pytest.raises(InputError, match=f"the hub's cache: give {revision}"):
        load_frontend("xls-r-5", str(cached))

    pointer = tmp_path / "lfs"
    pointer.mkdir()
    (pointer / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="a Git LFS pointer, not the weights"):
        load_frontend("xls-r-5", str(pointer))
