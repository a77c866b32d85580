"""wav2vec 2.0 up to the hidden state the heads see, computed time-major.

The library keeps its convolutions channels-first, which leaves each layer norm and GELU a strided
walk through memory. Here a signal is a matrix (frames, channels) throughout, and a whole batch is
one such matrix, clip below clip: each convolution is a few matrix products on views, with nothing
copied, and everything else runs along contiguous rows. The weights are the library's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIPS_AT_ONCE = (
    1  # through the convolutions on a CPU: 26 MB of activations a clip already outgrow its caches
)


class TimeMajorEncoder(nn.Module):
    """Convolutions, projection, positional convolution and transformer blocks of a wav2vec 2.0 of
    XLS-R's kind.

    Args:
        library: a transformers Wav2Vec2Model with layer norms in its convolutions and "stable"
            blocks
            (norms first), cut to the blocks that are wanted.
        dtype: type of the matrix products and of what lies between them. Sums inside a norm and the
            residual stream, which gathers what every block adds, stay float32.
    """

    def __init__(self, library: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        config = library.config
        self.strides = config.conv_stride
        self.kernels = config.conv_kernel
        self.convs = nn.ModuleList(
            _Conv(layer, stride, dtype)
            for layer, stride in zip(
                library.feature_extractor.conv_layers, config.conv_stride, strict=True
            )
        )
        self.projection_norm = _Norm(library.feature_projection.layer_norm, dtype)
        self.projection = _Linear([library.feature_projection.projection], dtype)
        self.positions = _PositionalConv(library.encoder.pos_conv_embed)
        self.blocks = nn.ModuleList(
            _Block(layer, config.num_attention_heads, dtype) for layer in library.encoder.layers
        )
        self.dtype = dtype
        self.requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips (B, samples) float32, normalised -> what the last block hands on, (B, frames,
        hidden) float32.
        """
        with torch.autocast(clips.device.type, enabled=False):
            at_once = len(clips) if clips.is_cuda else CLIPS_AT_ONCE
            x = torch.cat(
                [self._convolve(part) for part in clips.split(at_once)]
            )  # (B, frames, conv channels)
            x = self.projection(self.projection_norm(x)).float()  # (B, frames, hidden)
            x = x + self.positions(x)
            for block in self.blocks:
                x = block(x)
        return x

    def fuse(self, backend: str | Callable = "inductor") -> str | None:
        """Compile norm, GELU and casts of the convolutions into one pass over memory.

        As single kernels they move 24 bytes a value in bfloat16, as one kernel 4.

        Returns:
            Why that is not possible here, in a line, where it is not: all stays as it was then.
        """
        norm = self.convs[0].norm
        try:
            import torch._inductor.config as settings  # takes a second

            fused = torch.compile(norm_and_gelu, dynamic=True, backend=backend)
            # Compiled here and not later, as features are computed; one kernel needs one process.
            with torch.inference_mode(), settings.patch(compile_threads=1):
                rows = torch.zeros(
                    64, len(norm.weight), dtype=self.dtype, device=norm.weight.device
                )
                fused(rows, norm.weight, norm.bias, norm.eps)
        except Exception as error:  # no C compiler, a GPU that Triton does not know, ...
            return " ".join(f"{type(error).__name__}: {error}".split())[:160]
        for conv in self.convs:
            conv.norm_and_gelu = fused
        return None

    def _convolve(self, clips: Tensor) -> Tensor:
        n_clips, frames = clips.shape
        # Filled up to a multiple of all strides, clips stay aligned below one another in every
        # layer. The frames
        # this adds at the end of each are the only ones whose windows reach into the next clip.
        x = F.pad(clips, (0, -frames % math.prod(self.strides))).view(-1, 1).to(self.dtype)
        for conv, kernel, stride in zip(self.convs, self.kernels, self.strides, strict=True):
            x = conv(x)
            frames = (frames - kernel) // stride + 1
        return x.view(n_clips, -1, x.shape[1])[:, :frames]


class _Conv(nn.Module):
    """A strided convolution, layer norm and GELU on (frames, channels).

    Its taps are cut into slabs of `stride` taps. Under one slab the windows of successive frames do
    not overlap, so that the slab's share is a plain matrix product with a view of the input. Only
    the few samples under the first layer are cheaper to copy than its output is to go over twice.
    """

    def __init__(self, layer: nn.Module, stride: int, dtype: torch.dtype):
        super().__init__()
        weight = layer.conv.weight.detach()  # (out, in, kernel)
        self.stride, self.copies = stride, weight.shape[1] == 1
        bias = layer.conv.bias if layer.conv.bias is not None else torch.zeros(len(weight))
        matrix = weight.permute(2, 1, 0).flatten(0, 1)  # (kernel * in, out)
        self.slabs = []
        for number, slab in enumerate(
            matrix.split(len(matrix) if self.copies else stride * weight.shape[1])
        ):
            self.slabs.append(f"slab{number}")
            self.register_buffer(self.slabs[-1], slab.contiguous().to(dtype))
        self.register_buffer("bias", bias.detach().to(dtype))
        self.norm = _Norm(layer.layer_norm, dtype)
        self.norm_and_gelu: Callable | None = None  # norm_and_gelu() compiled, see fuse()

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, self.stride * x.shape[1])  # (frames, stride * in)
        first, *others = (getattr(self, name) for name in self.slabs)
        # What a window lacks at the very end is filled with nothing: the last frames are not of any
        # clip.
        while self.copies and x.shape[1] < len(first):
            more = x[1:, : len(first) - x.shape[1]]
            x = torch.cat([x, F.pad(more, (0, 0, 0, 1))], dim=1)  # (frames, kernel)
        out = torch.addmm(self.bias, x[:, : len(first)], first)
        for number, slab in enumerate(others, start=1):
            out[:-number].addmm_(x[number:, : len(slab)], slab)
        if self.norm_and_gelu:
            return self.norm_and_gelu(out, self.norm.weight, self.norm.bias, self.norm.eps)
        return F.gelu(self.norm(out))


def norm_and_gelu(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GELU of the layer norm of rows x (frames, channels), inside in float32; of x's type."""
    return F.gelu(F.layer_norm(x.float(), weight.shape, weight, bias, eps)).to(x.dtype)


class _Norm(nn.Module):
    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype):
        super().__init__()
        self.eps, self.dtype = norm.eps, dtype
        self.register_buffer("weight", norm.weight.detach().clone())
        self.register_buffer("bias", norm.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # a CPU mixes rows of 16 bits with float32 weights, CUDA does not
            x = x.float()
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps).to(self.dtype)


class _Linear(nn.Module):
    """One or several linear layers on the same input, side by side in one product."""

    def __init__(self, layers: list[nn.Linear], dtype: torch.dtype):
        super().__init__()
        self.register_buffer(
            "weight", torch.cat([layer.weight.detach() for layer in layers]).to(dtype)
        )
        self.register_buffer("bias", torch.cat([layer.bias.detach() for layer in layers]).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _PositionalConv(nn.Module):
    """The grouped convolution that tells positions apart, by way of the spectrum.

    128 taps wide, it took a tenth of the time of everything here, and by the spectrum takes a
    hundredth, which leaves no reason to make it in less than float32.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        conv = layer.conv
        self.groups, self.padding = conv.groups, conv.padding[0]
        self.register_buffer(
            "weight", conv.weight.detach().clone()
        )  # (hidden, hidden / groups, taps), its norm worked out
        self.register_buffer("bias", conv.bias.detach().clone())
        self._spectra: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, frames, hidden) float32 -> the same."""
        frames = x.shape[1]
        length = _smooth(frames + self.padding)  # what wraps around meets only zeros
        spectrum = torch.fft.rfft(x, n=length, dim=1).unflatten(
            2, (self.groups, -1)
        )  # (B, bins, groups, in)
        mixed = spectrum.permute(1, 2, 0, 3).flatten(0, 1) @ self._weight_spectrum(
            length
        )  # (bins * groups, B, out)
        mixed = (
            mixed.unflatten(0, (-1, self.groups)).permute(2, 0, 1, 3).flatten(2)
        )  # (B, bins, hidden)
        return F.gelu(torch.fft.irfft(mixed, n=length, dim=1)[:, :frames] + self.bias)

    def _weight_spectrum(self, length: int) -> Tensor:
        """(bins * groups, in, out) complex64; made at the first clip of a length, on its device."""
        key = length, self.weight.device
        if key not in self._spectra:
            groups = [
                self._group_spectrum(weight, length)
                for weight in self.weight.cpu().chunk(self.groups)
            ]
            self._spectra = {key: torch.stack(groups, dim=1).flatten(0, 1).to(self.weight.device)}
        return self._spectra[key]

    def _group_spectrum(self, weight: Tensor, length: int) -> Tensor:
        """Taps (out, in, taps) -> (bins, in, out) complex64."""
        taps = F.pad(weight.double(), (0, length - weight.shape[2])).roll(-self.padding, dims=2)
        # Convolutions of networks are correlations: tap j meets frame t + j - padding. Taps that
        # few frames never meet are cut off.
        return torch.fft.rfft(taps).conj().permute(2, 1, 0).to(torch.complex64)


def _smooth(length: int) -> int:
    """The next length with no prime factor above 5: Fourier transforms of others are slow."""
    rest = length
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    return length if rest == 1 else _smooth(length + 1)


class _Block(nn.Module):
    """A transformer block with its norms before attention and feed-forward."""

    def __init__(self, layer: nn.Module, heads: int, dtype: torch.dtype):
        super().__init__()
        self.heads = heads
        attention, feed_forward = layer.attention, layer.feed_forward
        self.norm1 = _Norm(layer.layer_norm, dtype)
        self.query_key_value = _Linear(
            [attention.q_proj, attention.k_proj, attention.v_proj], dtype
        )
        self.out = _Linear([attention.out_proj], dtype)
        self.norm2 = _Norm(layer.final_layer_norm, dtype)
        self.widen = _Linear([feed_forward.intermediate_dense], dtype)
        self.narrow = _Linear([feed_forward.output_dense], dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, frames, hidden) float32 -> the same."""
        q, k, v = (
            self.query_key_value(self.norm1(x))
            .unflatten(2, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        mixed = (
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )  # (B, frames, hidden)
        x = x + self.out(mixed)
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))
