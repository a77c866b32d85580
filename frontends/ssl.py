"""Hidden states of wav2vec 2.0."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from formats.torch_files import digest
from frontends.base import FrontEnd
from frontends.xlsr import TimeMajorEncoder
from runtime.cli import InputError
from runtime.devices import autocast

DEFAULT_SSL = "facebook/wav2vec2-xls-r-300m"
LAYER = 5  # hidden state that the heads see; entry 0 is what enters the first block


class XLSR(FrontEnd):
    """Hidden state 5 of wav2vec 2.0 XLS-R (Babu et al.

    2021, arXiv 2111.09296); blocks 6 to 24 are never built.
    """

    feat = "xls-r-5"

    def __init__(self, ssl: str, precision: str = "fp32"):
        super().__init__()
        self.ssl, self.precision = ssl, precision
        library = _load_wav2vec2(ssl)
        self.dim = library.config.hidden_size
        self.weights_sha256 = digest(library)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.encoder = (
            TimeMajorEncoder(library, dtype)
            if _is_of_xlsrs_kind(library.config)
            else _Library(library, precision)
        )
        self.requires_grad_(False).eval()

    def forward(self, clips: Tensor) -> Tensor:
        mean = clips.mean(dim=1, keepdim=True)
        variance = clips.var(dim=1, keepdim=True, correction=0)
        clips = (clips - mean) / torch.sqrt(
            variance + 1e-7
        )  # as the checkpoint's own feature extractor
        return self.encoder(clips)  # (B, 201, 1024)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {
            "layer": LAYER,
            "normalisation": "zero mean, unit variance per clip",
            "weights_sha256": self.weights_sha256,
        }


class _Library(nn.Module):
    """wav2vec 2.0 of another kind than XLS-R (layer norms after the blocks, a group norm), as the
    library runs it.
    """

    def __init__(self, network: nn.Module, precision: str):
        super().__init__()
        self.network, self.precision = network, precision

    def forward(self, clips: Tensor) -> Tensor:
        with autocast(self.precision, clips.device):
            return self.network(clips).last_hidden_state.float()


def _is_of_xlsrs_kind(config: Any) -> bool:
    return (
        config.feat_extract_norm == "layer"
        and config.do_stable_layer_norm
        and config.feat_extract_activation == config.hidden_act == "gelu"
        and not config.add_adapter
    )


def _load_wav2vec2(ssl: str) -> nn.Module:
    """The first five blocks, so set up that `last_hidden_state` is hidden state 5 of the whole
    network.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # it warns of the 19 blocks we leave out on purpose
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(
        logging.CRITICAL
    )  # its failures come back as one error below
    try:
        config = transformers.AutoConfig.from_pretrained(ssl)
        blocks = getattr(config, "num_hidden_layers", 0)
        if config.model_type != "wav2vec2" or blocks < LAYER:
            raise ValueError(
                f"expected wav2vec2 with at least {LAYER} blocks, got {config.model_type} with "
                f"{blocks}"
            )
        config.num_hidden_layers = LAYER
        encoder, report = transformers.Wav2Vec2Model.from_pretrained(
            ssl, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (
        Exception
    ) as error:  # the hub client, safetensors and the model each fail in ways of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"--ssl {ssl}: the wav2vec 2.0 weights cannot be loaded ({reason}); give a local "
            f"folder that "
            "holds config.json and the weights, or a hub id while online"
        ) from error
    if missing := sorted(set(report["missing_keys"]) - {"masked_spec_embed"}):
        raise InputError(
            f"--ssl {ssl}: incomplete weights, {len(missing)} tensors are missing (first: "
            f"{missing[0]})"
        )
    if config.do_stable_layer_norm:
        # The library closes the encoder with a LayerNorm that belongs after block 24: entry 5
        # carries none.
        encoder.encoder.layer_norm = nn.Identity()
    return encoder
