"""Networks and weights against the published ones.    python -m pytest tests/test_model.py"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import types
import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import model
from dataset import CLIP_SAMPLES, FEATURE_SHAPES
from formats import torch_files
from frontends import xlsr
from runtime import devices
from runtime.cli import InputError

PARITY = 1e-4  # absolute; two float32 implementations of the same network differ by about 1e-6


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def assert_parity(head: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        embedding, logits = head.eval()(tensors["features"].float())
    torch.testing.assert_close(embedding, tensors["embedding"], atol=PARITY, rtol=0)
    torch.testing.assert_close(logits, tensors["logits"], atol=PARITY, rtol=0)


# ── Heads ──


@pytest.mark.parametrize("name", ["codec_w2v2aasist", "vocoder_mellcnn"])
def test_released_weights_give_the_published_logits(reference: Path, name: str) -> None:
    assert_parity(
        model.load_head(reference / "checkpoints" / name),
        read_safetensors(reference / f"{name}.parity.safetensors"),
    )


@pytest.mark.parametrize(
    "name, head, feat", [("W2V2-AASIST", "W2VAASIST", "xls-r-5"), ("W2V2-LCNN", "lcnn", "xls-r-5")]
)
def test_strong_random_weights_give_the_published_logits(
    reference: Path, name: str, head: str, feat: str
) -> None:
    """The released attention has decayed to nothing; these weights show an error in it."""
    tensors = read_safetensors(reference / f"{name}.random.parity.safetensors")
    network = model.build_head(head, feat)
    network.load_state_dict(
        {
            key.removeprefix("weights."): tensor
            for key, tensor in tensors.items()
            if key.startswith("weights.")
        }
    )
    assert_parity(network, tensors)


@pytest.mark.parametrize(
    "name, head, feat",
    [
        ("Mel-LCNN", "lcnn", "mel"),
        ("W2V2-LCNN", "lcnn", "xls-r-5"),
        ("W2V2-AASIST", "W2VAASIST", "xls-r-5"),
    ],
)
def test_parameter_names_and_shapes_are_the_published(
    reference: Path, name: str, head: str, feat: str
) -> None:
    expected = json.loads((reference / "state_dict_keys.json").read_text())[name]
    assert {
        key: list(tensor.shape) for key, tensor in model.build_head(head, feat).state_dict().items()
    } == expected


@pytest.mark.parametrize(
    "head, feat, embedding",
    [("lcnn", "mel", 256), ("lcnn", "xls-r-5", 256), ("W2VAASIST", "xls-r-5", 160)],
)
def test_heads_take_a_batch_of_features(head: str, feat: str, embedding: int) -> None:
    found = model.build_head(head, feat).eval()(torch.randn(2, *FEATURE_SHAPES[feat]))
    assert [tuple(t.shape) for t in found] == [(2, embedding), (2, 2)]


def test_every_trained_parameter_receives_a_gradient() -> None:
    """bn1 of the residual blocks is the one exception, and it says so by not asking for one."""
    head = model.W2VAASIST().train()
    head(torch.randn(2, 201, 1024))[1].sum().backward()
    without = {name for name, p in head.named_parameters() if p.grad is None}
    assert without == {
        f"encoder.{i}.0.bn1.{kind}" for i in range(1, 6) for kind in ("weight", "bias")
    }
    assert without == {name for name, p in head.named_parameters() if not p.requires_grad}


def test_max_feature_map_equals_the_plain_maximum() -> None:
    x = torch.randn(2, 6, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.equal(model.MaxFeatureMap2D()(x), torch.maximum(*x.chunk(2, dim=1)))
    assert torch.autograd.gradcheck(model.MaxFeatureMap2D(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_heads_take_features_of_any_float_type(dtype: torch.dtype) -> None:
    head = model.build_head("lcnn", "mel").eval()
    features = torch.rand(2, 505, 80).to(dtype)
    assert torch.equal(head(features)[1], head(features.float())[1])


def test_a_head_refuses_features_of_another_front_end() -> None:
    with pytest.raises(InputError, match=r"takes features \(B, 505, 80\).*those of --feat xls-r-5"):
        model.LCNN("mel")(torch.zeros(1, 201, 1024))
    with pytest.raises(InputError, match="expected one of"):
        model.build_head("W2VAASIST", "mel")


# ── Front ends ──


def untruncated(
    ssl: Path, clips: torch.Tensor, autocast: AbstractContextManager | None = None
) -> torch.Tensor:
    """Entry 5 of the hidden states of the whole network, the plain way."""
    import transformers

    network = transformers.Wav2Vec2Model.from_pretrained(ssl).eval()
    normalised = torch.stack(
        [(clip - clip.mean()) / torch.sqrt(clip.var(correction=0) + 1e-7) for clip in clips]
    )
    with torch.inference_mode(), autocast or nullcontext():
        return network(normalised, output_hidden_states=True).hidden_states[5]


def test_five_blocks_equal_entry_5_of_the_whole_network(ssl_narrow: Path) -> None:
    """Catches the library's closing LayerNorm, an index off by one, and a missing normalisation."""
    clips = 0.1 * torch.randn(2, CLIP_SAMPLES) + 0.3
    found = model.load_frontend("xls-r-5", str(ssl_narrow))(clips)
    torch.testing.assert_close(found, untruncated(ssl_narrow, clips), atol=1e-5, rtol=0)


def test_a_batch_equals_its_clips_one_by_one(ssl_narrow: Path) -> None:
    front_end, clips = model.load_frontend("xls-r-5", str(ssl_narrow)), torch.randn(3, CLIP_SAMPLES)
    one_by_one = torch.cat([front_end(clip[None]) for clip in clips])
    torch.testing.assert_close(front_end(clips), one_by_one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [CLIP_SAMPLES, 320 * 20, 1500])
def test_clips_below_one_another_do_not_mix(
    ssl_narrow: Path, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU all clips of a batch go through the convolutions as one signal; their seams must not
    show.
    """
    encoder, clips = (
        model.load_frontend("xls-r-5", str(ssl_narrow)).encoder,
        torch.randn(3, samples),
    )
    expected = encoder(clips)
    monkeypatch.setattr(xlsr, "CLIPS_AT_ONCE", 3)
    torch.testing.assert_close(encoder(clips), expected, atol=1e-5, rtol=0)


def test_clips_shorter_than_the_positions_reach(ssl_narrow: Path) -> None:
    """Four frames, sixteen taps."""
    clips = torch.randn(2, 1500)
    torch.testing.assert_close(
        model.load_frontend("xls-r-5", str(ssl_narrow))(clips),
        untruncated(ssl_narrow, clips),
        atol=1e-5,
        rtol=0,
    )


def test_bfloat16_stays_near_float32(ssl_narrow: Path) -> None:
    """8 bits of mantissa cost 1.1 % RMS on this narrow network, on every processor; a norm or a
    residual stream summed in bfloat16 costs several times that. The library's own autocast is no
    yardstick: torch's bfloat16 convolutions are off by 33 % on narrow networks where the processor
    has AMX."""
    clips = torch.randn(1, CLIP_SAMPLES)
    exact, ours = (
        model.load_frontend("xls-r-5", str(ssl_narrow), precision)(clips)
        for precision in ("fp32", "bf16")
    )
    error = (ours - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert ours.dtype == torch.float32
    assert 1e-4 < error < 0.02


def test_wav2vec2_of_another_kind_runs_as_the_library_does(tmp_path: Path) -> None:
    """A group norm in the convolutions, norms after the blocks: as in wav2vec2-large, which also
    has 1024 dimensions.
    """
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path)
    clips = torch.randn(2, CLIP_SAMPLES)
    torch.testing.assert_close(
        model.load_frontend("xls-r-5", str(tmp_path))(clips),
        untruncated(tmp_path, clips),
        atol=1e-5,
        rtol=0,
    )


def test_a_front_end_never_trains(ssl_narrow: Path) -> None:
    """In train mode layerdrop (here 0.5) would remove blocks."""
    front_end, clips = model.load_frontend("xls-r-5", str(ssl_narrow)), torch.randn(1, CLIP_SAMPLES)
    expected = front_end(clips)
    assert torch.equal(front_end.train()(clips), expected)
    assert not front_end(clips).requires_grad


def test_mel_is_a_power_spectrogram_time_first() -> None:
    """Twice the amplitude is four times the power; a tone sits in one band and stays there over
    time.
    """
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(CLIP_SAMPLES) / 16_000)[None]
    front_end = model.load_frontend("mel")
    mel = front_end(tone)
    assert mel.shape == (1, 505, 80)
    torch.testing.assert_close(front_end(2 * tone), 4 * mel)
    assert len(set(mel[0, 5:-5].argmax(dim=1).tolist())) == 1


def test_weights_that_are_no_wav2vec2_are_refused(tmp_path: Path, ssl_narrow: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        model.load_frontend("xls-r-5", str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bert", "num_hidden_layers": 6})
    )
    with pytest.raises(InputError, match="got bert with 6"):
        model.load_frontend("xls-r-5", str(tmp_path))
    config = json.loads((ssl_narrow / "config.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="at least 5 blocks, got wav2vec2 with 4"):
        model.load_frontend("xls-r-5", str(tmp_path))


def test_weights_with_holes_are_refused(tmp_path: Path, ssl_narrow: Path) -> None:
    """The library would fill them with random numbers and go on."""
    tensors = safetensors.torch.load_file(ssl_narrow / "model.safetensors")
    del (
        tensors["encoder.layers.3.attention.k_proj.weight"],
        tensors["encoder.layers.5.attention.k_proj.weight"],
    )
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(ssl_narrow / "config.json", tmp_path)
    with pytest.raises(
        InputError, match=r"1 tensors are missing \(first: encoder.layers.3.attention.k_proj.weight"
    ):
        model.load_frontend("xls-r-5", str(tmp_path))


def test_an_unknown_front_end_is_refused() -> None:
    with pytest.raises(InputError, match="--feat mfcc: expected"):
        model.load_frontend("mfcc")


def test_fingerprint_tells_weights_apart(ssl_narrow: Path, ssl_1024: Path) -> None:
    fingerprints = [
        model.load_frontend("xls-r-5", str(ssl)).fingerprint()
        for ssl in (ssl_narrow, ssl_narrow, ssl_1024)
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


# ── Checkpoints ──


def pickle_as_released(head: nn.Module, path: Path, parallel: bool = False) -> None:
    """Save the whole module as the published files are: classes of a module called `model`, perhaps
    in DataParallel.
    """
    wrapped = nn.DataParallel(head) if parallel else head
    if parallel:  # what DataParallel holds on a machine with two GPUs
        wrapped.device_ids, wrapped.output_device, wrapped.src_device_obj = (
            [0, 1],
            0,
            torch.device("cuda:0"),
        )
    torch.save(wrapped, path)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    "head, feat", [("lcnn", "mel"), ("lcnn", "xls-r-5"), ("W2VAASIST", "xls-r-5")]
)
def test_pickled_modules_load_without_their_classes(
    tmp_path: Path, head: str, feat: str, parallel: bool
) -> None:
    original = model.build_head(head, feat).eval()
    pickle_as_released(original, tmp_path / model.WEIGHTS, parallel)
    found, features = model.load_head(tmp_path), torch.randn(2, *FEATURE_SHAPES[feat])
    assert not found.training and found.feat == feat
    assert torch.equal(found(features)[1], original(features)[1])


def test_our_checkpoint_comes_back_with_its_record(tmp_path: Path) -> None:
    head, info = model.W2VAASIST(), {"feat": "xls-r-5", "labels": ["real", "fake"], "epoch": 3}
    model.save_head(tmp_path / "head.pt", head, info)
    found = model.load_head(tmp_path / "head.pt")
    assert found.info == info
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.state_dict().values(), head.state_dict().values(), strict=True)
    )
    torch.load(tmp_path / "head.pt", weights_only=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model_state_dict": weights, "optimizer": {"lr": 0.1}},
        lambda weights: {"model": {f"_orig_mod.{name}": w for name, w in weights.items()}},
        lambda weights: {f"_orig_mod.module.{name}": w for name, w in weights.items()},
        lambda weights: {f"module._orig_mod.{name}": w for name, w in weights.items()},
        lambda weights: {"model": {"state_dict": weights}},
    ],
    ids=["state_dict", "model_state_dict", "model", "compiled", "parallel", "nested"],
)
def test_checkpoints_of_other_trainers_load(tmp_path: Path, wrap) -> None:
    head = model.LCNN("mel")
    torch.save(wrap(head.state_dict()), tmp_path / "best.pth")
    found = model.load_head(tmp_path)
    assert all(map(torch.equal, found.state_dict().values(), head.state_dict().values()))
    assert found.info["trained"].startswith("weights of unknown origin")


def test_safetensors_load_and_damage_is_named(tmp_path: Path) -> None:
    head, path = model.LCNN("mel"), tmp_path / "model.safetensors"
    safetensors.torch.save_file(head.state_dict(), path)
    found = model.load_head(tmp_path)
    assert all(map(torch.equal, found.state_dict().values(), head.state_dict().values()))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        model.load_head(tmp_path)


def test_several_files_of_weights_are_named(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pth", "last_state.pt", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"found 2: a\.pt, b\.pth; name the file"):
        model.load_head(tmp_path)


@pytest.mark.parametrize("name", ["ssl_model.model.encoder.weight", "wav2vec2.masked_spec_embed"])
def test_a_model_with_its_own_front_end_is_named(tmp_path: Path, name: str) -> None:
    weights = {**model.W2VAASIST().state_dict(), name: torch.zeros(2)}
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(InputError, match=f"another model's weights: .*own front end .{name}"):
        model.load_head(tmp_path / "x.pt")


def test_published_files_are_told_by_their_checksum(reference: Path, tmp_path: Path) -> None:
    """The same weights saved again are no published file."""
    released = [path for path in (reference / "checkpoints").iterdir() if path.is_dir()]
    for folder in released:
        trained = model.load_head(folder).info["trained"]
        name = folder.name.removesuffix("_CSAM")
        assert trained == f"released weights {name}, no record of the training"
    torch.save(model.load_head(released[0]).state_dict(), tmp_path / "again.pt")
    assert model.load_head(tmp_path).info["trained"].startswith("weights of unknown origin")


def test_conversion_of_a_released_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pickle_as_released(model.LCNN("mel"), tmp_path / "released.pt")
    model.main([str(tmp_path / "released.pt"), "-o", str(tmp_path / "ours.pt")])
    assert "lcnn on mel, 973,032 parameters and buffers" in capsys.readouterr().out
    assert torch.load(tmp_path / "ours.pt", weights_only=True)["format"] == model.FORMAT
    with pytest.raises(InputError, match="exists already"):
        model.main([str(tmp_path / "released.pt"), "-o", str(tmp_path / "ours.pt")])


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, name",
    [
        (os.system, "posix.system"),
        (eval, "eval"),
        (exec, "exec"),
        (torch.hub.load, "torch.hub.load"),
        (getattr, "getattr"),
    ],
)
def test_a_file_that_would_run_code_is_refused_by_name(tmp_path: Path, function, name: str) -> None:
    head = model.LCNN("mel")
    head.extra = Runs(function, f"open({str(tmp_path / 'was_here')!r}, 'w')")
    torch.save(head, tmp_path / "evil.pt")
    with pytest.raises(InputError, match=rf"refused, it names .*{name}"):
        model.load_head(tmp_path / "evil.pt")
    assert not (tmp_path / "was_here").exists()


def test_classes_outside_the_list_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("model_of_somebody")
    module.Head = type("Head", (nn.Linear,), {"__module__": "model_of_somebody"})
    monkeypatch.setitem(sys.modules, "model_of_somebody", module)
    torch.save(module.Head(2, 2), tmp_path / "other.pt")
    with pytest.raises(InputError, match="model_of_somebody.Head"):
        model.load_head(tmp_path / "other.pt")


def test_an_archive_that_swells_is_refused(tmp_path: Path) -> None:
    plain, bomb = io.BytesIO(), tmp_path / "bomb.pt"
    torch.save({"x": torch.zeros(1_000_000)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(InputError, match="would swell"):
        torch_files.load(bomb)


def test_tensors_larger_than_their_storage_are_refused(tmp_path: Path) -> None:
    storage = torch.zeros(1).storage()
    torch.save(
        Runs(torch._utils._rebuild_tensor_v2, storage, 0, (10**9,), (1,), False, {}),
        tmp_path / "huge.pt",
    )
    with pytest.raises(InputError, match="damaged"):
        torch_files.load(tmp_path / "huge.pt")


def test_a_changed_byte_or_a_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "head.pt"
    model.save_head(path, model.LCNN("mel"), {})
    whole = path.read_bytes()
    for damaged in (
        whole[:100_000] + bytes([whole[100_000] ^ 1]) + whole[100_001:],
        whole[:-1000],
        b"",
        b"no weights",
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="head.pt"):
            model.load_head(path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1, 2],
        {"LL.weight": torch.zeros(3)},
        {"a": "b"},
        torch.zeros(3),
        {"format": "codecfake-head-1"},
        nn.Linear(2, 2),
        {**model.LCNN("mel").state_dict(), "fc_mu.bias": torch.full((2,), float("nan"))},
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match="x.pt"):
        model.load_head(tmp_path / "x.pt")


def test_absent_weights_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pretrained_model/README.md"):
        model.load_head(tmp_path)


def test_no_gpu_is_a_clear_line() -> None:
    with pytest.raises(InputError, match="--gpu 99"):
        devices.pick_device(99)
    assert devices.pick_device(-1).type == "cpu"


def test_the_first_of_two_gpus_is_taken_or_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_try_gpu", started.append)
    assert [str(devices.pick_device(gpu)) for gpu in (None, 1, -1)] == ["cuda:0", "cuda:1", "cpu"]
    assert started == [0, 1]
    with pytest.raises(InputError, match="--gpu 2: expected one of the 2 GPUs"):
        devices.pick_device(2)


@pytest.mark.parametrize(
    "why",
    [
        "CUDA error: no kernel image is available for execution on the device",
        "CUDA error: out of memory",
    ],
)
def test_a_gpu_that_cannot_compute_is_a_clear_line(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(gpu: int) -> None:
        raise RuntimeError(
            f"{why}\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(devices, "_try_gpu", refuse)
    with pytest.raises(InputError, match=f"--gpu 0: .*{why}.*--gpu -1") as caught:
        devices.pick_device(None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "why",
    [
        "CUDA out of memory. Tried to allocate 2 GiB",
        "CUDA error: out of memory",
        "cuFFT error: CUFFT_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_any_lack_of_memory_says_what_to_lower(why: str) -> None:
    with pytest.raises(InputError, match="--batch_size 64; lower it"), devices.memory_advice(64):
        raise RuntimeError(why)


def test_published_precision_is_tf32_in_convolutions_alone(capsys) -> None:
    devices.set_precision("published", torch.device("cpu"))
    try:
        assert torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert "on the CPU it is fp32" in "".join(capsys.readouterr())
    finally:
        devices.set_precision("fp32", torch.device("cpu"))


def test_float32_is_float32_unless_tf32_is_asked_for() -> None:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for precision, allowed in (("tf32", True), ("fp32", False), ("tf32", True), ("bf16", False)):
        devices.set_precision(precision, torch.device("cpu"))
        assert [backend.allow_tf32 for backend in backends] == [allowed, allowed]


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bfloat16_without_the_arithmetic_is_said(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation
    )
    devices.set_precision("bf16", torch.device("cuda:0"))
    said = capsys.readouterr().out
    assert ("GPU has no fast bfloat16" in said) is not has_bf16
