"""Front ends: clips become features."""

from __future__ import annotations

from frontends.base import FEATURE_SHAPES, GFLOP_A_CLIP, FrontEnd
from frontends.mel import Mel
from frontends.ssl import DEFAULT_SSL, XLSR
from runtime.cli import InputError

__all__ = [
    "DEFAULT_SSL",
    "FEATURE_SHAPES",
    "GFLOP_A_CLIP",
    "FrontEnd",
    "Mel",
    "XLSR",
    "load_frontend",
]


def load_frontend(feat: str, ssl: str | None = None, precision: str = "fp32") -> FrontEnd:
    """The front end called on clips (B, 64600) float32 that returns features (B, frames, dim)
    float32.

    Args:
        feat: "mel" -> (B, 505, 80), or "xls-r-5" -> (B, 201, 1024).
        ssl: hub id or local folder of the wav2vec 2.0 weights; None: facebook/wav2vec2-xls-r-300m.
        precision: "bf16" and "fp16" multiply matrices in 16 bits, those of xls-r-5 alone. For TF32
            see set_precision().

    Raises:
        InputError: an unknown feat, or weights that are absent, incomplete or of another kind.
    """
    if feat == "mel":
        return Mel().eval()
    if feat == "xls-r-5":
        return XLSR(ssl or DEFAULT_SSL, precision)
    raise InputError(f"--feat {feat}: expected {' or '.join(FEATURE_SHAPES)}")
