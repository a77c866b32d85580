"""The reference's way of doing things, written anew and plainly: what the benchmarks measure
against.

One clip at a time through all 24 blocks in float32, a pickled file a clip, a DataLoader over those
files, the heads as published (with the batch norms whose results they throw away), one clip at a
time again for scoring.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import CLIP_SAMPLES, JoinedFeatures
from formats.feature_cache import DONE, CacheWriter, _guard
from frontends.ssl import LAYER
from main_train import Sharpness, weighted_cross_entropy
from model import LCNN, W2VAASIST, Residual_block


def load_clip(path: str) -> Tensor:
    samples = soundfile.read(path, dtype="float32")[0]
    return torch.from_numpy(np.tile(samples, CLIP_SAMPLES // len(samples) + 1)[:CLIP_SAMPLES])


def load_frontend(ssl: str, device: torch.device) -> nn.Module:
    import transformers

    return transformers.Wav2Vec2Model.from_pretrained(ssl, dtype=torch.float32).eval().to(device)


def feature(front_end: nn.Module, path: str, device: torch.device) -> Tensor:
    """(1, 201, 1024) of one file."""
    clip = load_clip(path)
    clip = (clip - clip.mean()) / torch.sqrt(clip.var(correction=0) + 1e-7)
    with torch.no_grad():
        return (
            front_end(clip[None].to(device), output_hidden_states=True).hidden_states[LAYER].cpu()
        )


def extract(front_end: nn.Module, paths: Sequence[str], folder: Path, device: torch.device) -> None:
    for number, path in enumerate(paths):
        torch.save(
            feature(front_end, path, device), folder / f"{number:06d}_{Path(path).name}_real.pt"
        )


class PlainWriter(CacheWriter):
    """The writer of a float16 cache without its threads: numpy casts and looks for infinities, and
    each batch waits for the disk.
    """

    def write(self, rows: Sequence[int], features: np.ndarray) -> None:
        stored = np.ascontiguousarray(features, dtype=np.float16)
        if not np.isfinite(stored).all():
            raise ValueError("a feature is not finite in float16")
        for row, data in zip(rows, stored, strict=True):
            descriptor, offset = self.layout.locate(row, os.O_RDWR)
            os.pwrite(descriptor, data, offset)
            self._unmarked[row] = zlib.crc32(data)

    def mark_failed(self, rows: Sequence[int]) -> None:
        super().mark_failed(rows)
        os.fdatasync(self._index)

    def flush(self) -> None:
        for shard in {row // self.layout.rows_per_shard for row in self._unmarked}:
            os.fdatasync(self.layout._open[shard])
        rows = np.array(sorted(self._unmarked), dtype=np.int64)
        crc = np.array([self._unmarked[row] for row in rows], dtype=np.uint32)
        self._mark(rows, np.stack([crc, _guard(rows, crc, DONE)], axis=1))
        self._unmarked.clear()


class PtFiles(torch.utils.data.Dataset):
    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.pt"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        path = self.files[row]
        return torch.load(path, weights_only=False)[0].float(), int(path.stem.endswith("_fake"))


def batches(folder: Path, batch_size: int, num_workers: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        PtFiles(folder), batch_size, shuffle=True, num_workers=num_workers
    )


class _ResidualBlock(Residual_block):
    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "bn1"):
            F.selu(self.bn1(x))  # published so: computed, then written over
        return super().forward(x)


class _MaxFeatureMap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.max(*torch.split(x, x.shape[1] // 2, dim=1))


def as_published(head: LCNN | W2VAASIST) -> LCNN | W2VAASIST:
    """The head, its layers computed as the published network computes them."""
    for module in head.modules():
        if isinstance(module, Residual_block):
            module.__class__ = _ResidualBlock
        for name, child in module.named_children():
            if type(child).__name__ == "MaxFeatureMap2D":
                setattr(module, name, _MaxFeatureMap())
    return head


def train_step(
    head: nn.Module, optimiser: torch.optim.Optimizer, features: Tensor, labels: Tensor
) -> Tensor:
    optimiser.zero_grad()
    loss = weighted_cross_entropy(head(features)[1], labels)
    loss.backward()
    optimiser.step()
    return loss.detach()


def score(front_end: nn.Module, head: nn.Module, path: str, device: torch.device) -> float:
    with torch.no_grad():
        return float(
            torch.softmax(head(feature(front_end, path, device).to(device))[1], dim=1)[0, 0]
        )


# ── What this program did before: one parameter, one row, one batch at a time ────────────────────


@torch.no_grad()
def climb(head: nn.Module, sharpness: Sharpness) -> list[tuple[nn.Parameter, Tensor]]:
    """main_train.climb(), parameter by parameter."""
    moving = [p for p in head.parameters() if p.grad is not None]
    norms = [(p.abs() * p.grad if sharpness.adaptive else p.grad).norm() for p in moving]
    norm = torch.stack(norms).norm() + 1e-12
    original = []
    for p in moving:
        original.append((p, p.clone()))
        p.add_((p * p * p.grad if sharpness.adaptive else p.grad) * (sharpness.rho / norm))
    return original


@torch.no_grad()
def descend(original: list[tuple[nn.Parameter, Tensor]]) -> None:
    for p, value in original:
        p.copy_(value)


def read_joined(features: JoinedFeatures, rows: np.ndarray) -> Tensor:
    """Rows of several caches as float32, (B, frames, dim)."""
    starts = np.cumsum([0, *features.sizes])
    part_of = np.searchsorted(starts, rows, side="right") - 1
    out = torch.empty(len(rows), *features.shape)
    for number in np.unique(part_of):
        where = np.flatnonzero(part_of == number)
        out[where] = features.parts[number].read(rows[where] - starts[number])[0].float()
    return out
