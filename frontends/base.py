"""What all front ends have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from formats.audio import CLIP_SAMPLES, SAMPLE_RATE

FEATURE_SHAPES = {  # (frames, dim)
    "mel": (505, 80),  # 1 + 64,600 // 128 frames of 80 mel bands
    "xls-r-5": (
        201,
        1024,
    ),  # what wav2vec 2.0's strides leave of 64,600 samples: one frame per 20 ms
}
GFLOP_A_CLIP = {"mel": 0.03, "xls-r-5": 46.2}  # counted from the shapes, five blocks


# ── Front ends ───────────────────────────────────────────────────────────────────────────────────


class FrontEnd(nn.Module):
    """Clips (B, 64600) float32 at 16 kHz -> features (B, frames, dim).

    Never trained, always in eval mode.
    """

    feat: str
    dim: int

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the features' values; caches and checkpoints made with different ones do
        not mix.
        """
        return {"feat": self.feat, "clip_samples": CLIP_SAMPLES, "sample_rate": SAMPLE_RATE}

    def expect(self, n_clips: int) -> None:
        """Take time now for what pays over so many clips; the base class knows of nothing."""

    def train(self, mode: bool = True) -> FrontEnd:
        return super().train(False)  # layerdrop would remove blocks, dropout would add noise
