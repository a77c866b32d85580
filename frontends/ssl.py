"""Hidden states of wav2vec 2.0."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formats.audio import CLIP_SAMPLES
from formats.torch_files import digest
from frontends.base import FEATURE_SHAPES, FrontEnd
from frontends.xlsr import TimeMajorEncoder
from runtime import cli
from runtime.cli import InputError
from runtime.devices import SIXTEEN_BITS, autocast

DEFAULT_SSL = "facebook/wav2vec2-xls-r-300m"
LAYER = 5  # hidden state that the heads see; entry 0 is what enters the first block
# Kernels and strides of all published wav2vec 2.0: 201 frames from 64,600 samples.
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
# Clips of a corpus; compiling takes 10 to 30 s (an estimate). Not those left to compute: a resumed
# run rounds as an unbroken one does.
FUSE_FROM = 20_000
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.h5")
LFS_POINTER = b"version https://git-lfs"


class XLSR(FrontEnd):
    """Hidden state 5 of wav2vec 2.0 XLS-R (Babu et al. 2021, arXiv 2111.09296).

    Blocks 6 to 24 are never built.

    Args:
        ssl: hub id or local folder.
        precision: one of devices.PRECISIONS.

    Raises:
        InputError: no such weights, incomplete or not finite ones, or another kind of network.
    """

    feat = "xls-r-5"

    def __init__(self, ssl: str, precision: str = "fp32"):
        super().__init__()
        library = _load_wav2vec2(ssl)
        # A folder is recorded so that it is found again from another one.
        self.ssl = str(Path(ssl).absolute()) if Path(ssl).is_dir() else ssl
        self.precision = precision
        self.dim = library.config.hidden_size
        self.weights_sha256 = digest(library)
        self.encoder: nn.Module
        if _is_of_xlsrs_kind(library.config):
            dtype = SIXTEEN_BITS.get(precision, torch.float32)
            self.encoder = TimeMajorEncoder(library, dtype)
        else:
            self.encoder = _Library(library, precision)
        self.requires_grad_(False).eval()

    def forward(self, clips: Tensor) -> Tensor:
        # As the checkpoint's own feature extractor normalises.
        mean = clips.mean(dim=1, keepdim=True)
        variance = clips.var(dim=1, keepdim=True, correction=0)
        clips = (clips - mean) / torch.sqrt(variance + 1e-7)
        return self.encoder(clips)  # (B, 201, 1024)

    def expect(self, n_clips: int) -> None:
        """On a GPU, fuse the norms and GELUs of the convolutions for so many clips."""
        on_gpu = next(self.buffers()).is_cuda
        if not on_gpu or n_clips < FUSE_FROM or not isinstance(self.encoder, TimeMajorEncoder):
            return
        reason = self.encoder.fuse()
        if reason:
            cli.echo(f"note: norms and GELUs are not fused, which takes longer ({reason})")

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {
            "layer": LAYER,
            "normalisation": "zero mean, unit variance per clip",
            "weights_sha256": self.weights_sha256,
        }


class _Library(nn.Module):
    """wav2vec 2.0 of another kind than XLS-R, as the library runs it.

    Such are networks with layer norms after the blocks, with a group norm, or with adapters in the
    blocks.
    """

    def __init__(self, network: nn.Module, precision: str):
        super().__init__()
        self.network, self.precision = network, precision

    def forward(self, clips: Tensor) -> Tensor:
        with autocast(self.precision, clips.device):
            return self.network(clips).last_hidden_state.float()


def _is_of_xlsrs_kind(config: Any) -> bool:
    """Whether TimeMajorEncoder computes what the library does."""
    wanted = {
        "feat_extract_norm": "layer",
        "feat_extract_activation": "gelu",
        "hidden_act": "gelu",
        "do_stable_layer_norm": True,
        "adapter_attn_dim": None,
        "conv_kernel": KERNELS,
        "conv_stride": STRIDES,
    }
    for name, value in wanted.items():
        found = getattr(config, name, None)
        if isinstance(found, list):
            found = tuple(found)
        if found != value:
            return False
    return True


# ── Loading ──────────────────────────────────────────────────────────────────────────────────────


def _load_wav2vec2(ssl: str) -> nn.Module:
    """The first five blocks; `last_hidden_state` is hidden state 5 of the whole network."""
    _refuse_what_is_no_checkpoint(ssl)
    encoder = _from_pretrained(ssl)
    for name, parameter in encoder.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(
                f"--ssl {ssl}: its weights are damaged, {name} holds values that are not finite; "
                "fetch them again"
            )
    if encoder.config.do_stable_layer_norm:
        # The library closes the encoder with a LayerNorm that belongs after block 24; entry 5
        # carries none.
        encoder.encoder.layer_norm = nn.Identity()
    return encoder


def _from_pretrained(ssl: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()  # it warns of the 19 blocks we leave out on purpose
    transformers.logging.disable_progress_bar()
    # The hub client's failures come back as one error below.
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        config = transformers.AutoConfig.from_pretrained(ssl)
        _check_config(config)
        config.num_hidden_layers = LAYER
        config.add_adapter = False  # it stands behind all blocks, of no meaning to hidden state 5
        encoder, report = transformers.Wav2Vec2Model.from_pretrained(
            ssl, config=config, dtype=torch.float32, output_loading_info=True
        )
    # The hub client, safetensors and the model each fail in ways of their own.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"--ssl {ssl}: the wav2vec 2.0 weights cannot be loaded ({reason}); give a local "
            "folder that holds config.json and the weights, or a hub id while online"
        ) from error
    missing = sorted(set(report["missing_keys"]) - {"masked_spec_embed"})
    if missing:
        raise InputError(
            f"--ssl {ssl}: incomplete weights, {len(missing)} tensors are missing (first: "
            f"{missing[0]})"
        )
    return encoder


def _check_config(config: Any) -> None:
    """Raise ValueError where the network gives no hidden state 5 of 201 frames."""
    blocks = getattr(config, "num_hidden_layers", 0)
    if config.model_type != "wav2vec2" or blocks < LAYER:
        raise ValueError(
            f"expected wav2vec2 with at least {LAYER} blocks, got {config.model_type} with {blocks}"
        )
    frames = CLIP_SAMPLES
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
    wanted = FEATURE_SHAPES[XLSR.feat][0]
    if frames != wanted:
        raise ValueError(
            f"expected {wanted} frames a clip, its kernels and strides give {frames}: no head "
            "takes them"
        )


def _refuse_what_is_no_checkpoint(ssl: str) -> None:
    """Name what is often given by mistake, before the hub is asked.

    Raises:
        InputError: a file, a folder without config.json, a Git LFS pointer, or a path to nothing.
    """
    path = Path(ssl).expanduser()
    if path.is_file():
        kind = "a fairseq checkpoint: convert it with transformers" if path.suffix == ".pt" else ""
        raise InputError(
            f"--ssl {ssl}: expected a folder with config.json and the weights, got a file"
            f"{kind and ' (' + kind + ')'}"
        )
    if not path.is_dir():
        if _looks_like_a_path(ssl):
            raise InputError(f"--ssl {ssl}: no such folder; check the path, or give a hub id")
        return
    if not (path / "config.json").exists():
        revisions = sorted(path.glob("snapshots/*/config.json"))
        advice = "give the folder that holds it and the weights"
        if revisions:
            advice = f"this is a folder of the hub's cache: give {revisions[-1].parent}"
        raise InputError(f"--ssl {ssl}: holds no config.json; {advice}")
    for pattern in WEIGHT_FILES:
        for file in path.glob(pattern):
            with open(file, "rb") as weights:
                if weights.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise InputError(
                        f"{file}: a Git LFS pointer, not the weights; run `git lfs pull` there"
                    )


def _looks_like_a_path(ssl: str) -> bool:
    """A hub id is `name` or `owner/name`; a folder of that form is looked for first."""
    starts_like_one = ssl.startswith(("/", "./", "../", "~"))
    return starts_like_one or ssl.endswith("/") or ssl.count("/") > 1
