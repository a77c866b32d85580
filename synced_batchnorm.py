"""BatchNorm over the rows of all ranks, on the CPU as on GPUs; torch's own takes GPUs only."""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def sync_batchnorms(network: nn.Module) -> nn.Module:
    """Put a SyncedBatchNorm in the place of each BatchNorm below `network`; names and values stay."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, _BatchNorm):
                setattr(parent, name, SyncedBatchNorm.like(norm))
    return network


class SyncedBatchNorm(_BatchNorm):
    """Training normalises (B, C, ...) by the mean and variance of all ranks' rows together; B may be 0 on some of them."""

    @classmethod
    def like(cls, norm: _BatchNorm) -> SyncedBatchNorm:
        synced = cls(norm.num_features, norm.eps, norm.momentum, norm.affine).to(norm.running_mean.device)
        synced.load_state_dict(norm.state_dict())
        for ours, theirs in zip(synced.parameters(), norm.parameters()):
            ours.requires_grad_(theirs.requires_grad)
        return synced.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        out, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return out


class _Normalise(torch.autograd.Function):
    """x (B, C, ...), weight and bias (C,) or None -> the same normalised; mean, biased variance (C,); count () of values a channel.

    As in one process: the gradient of weight and bias is this rank's share, that of x takes in the loss of all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, wide = (0, *range(2, x.dim())), (1, -1, *(1 for _ in x.shape[2:]))
        own_count = x.new_full((1,), x.numel() // x.shape[1], dtype=torch.float32)
        sums = torch.cat([x.float().sum(dims), own_count])
        dist.all_reduce(sums)
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = x.float() - mean.view(wide)
        squares = centred.square().sum(dims)           # a second pass: the mean square less the squared mean cancels
        dist.all_reduce(squares)
        variance = squares / count
        inverse = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.dims, ctx.wide = dims, wide
        out = centred * inverse.view(wide)
        if weight is not None:
            out = out * weight.view(wide) + bias.view(wide)
        ctx.mark_non_differentiable(mean, variance, count)
        return out.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        dims, wide = ctx.dims, ctx.wide
        grad, normed = grad.float(), (x.float() - mean.view(wide)) * inverse.view(wide)
        own = torch.stack([grad.sum(dims), (grad * normed).sum(dims)])         # (2, C)
        joint = own.clone()
        dist.all_reduce(joint)
        along_one, along_normed = joint / count
        scale = inverse if weight is None else inverse * weight
        of_x = (grad - along_one.view(wide) - normed * along_normed.view(wide)) * scale.view(wide)
        return of_x.to(x.dtype), *((None, None) if weight is None else (own[1], own[0])), None
