"""Mel spectrograms."""

from __future__ import annotations

from typing import Any

import torch
import torchaudio
from torch import Tensor

from formats.audio import SAMPLE_RATE
from frontends.base import FrontEnd


class Mel(FrontEnd):
    """Power mel spectrogram without a logarithm: the released Mel-LCNN's BatchNorm statistics fit
    only this.
    """

    feat, dim = "mel", 80

    def __init__(self) -> None:
        super().__init__()
        self.spectrogram = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=512, hop_length=128, n_mels=80
        )

    def forward(self, clips: Tensor) -> Tensor:
        with torch.autocast(
            clips.device.type, enabled=False
        ):  # powers span more than bfloat16 resolves
            return self.spectrogram(clips).transpose(1, 2)  # (B, 505, 80)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"scale": "power", "n_fft": 512, "hop": 128}
