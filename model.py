"""The two heads, LCNN and AASIST, and their checkpoints, both ends.

    python model.py RELEASED.pt -o OUT.pt       # turn a released weight file into our format

Parameter names are those of the published weights, which load with strict=True; where the published
network has a quirk that the weights depend on, a comment says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formats import torch_files
from formats.torch_files import RELEASED_CLASSES
from frontends import FEATURE_SHAPES, load_frontend
from runtime import cli
from runtime.cli import InputError

__all__ = [
    "HEADS",
    "LCNN",
    "W2VAASIST",
    "WEIGHTS",
    "build_head",
    "load_frontend",
    "load_head",
    "save_head",
]

WEIGHTS = "anti-spoofing_feat_model.pt"
SAFETENSORS = ".safetensors"
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", SAFETENSORS)
NOT_WEIGHTS = ("last_state.pt",)  # of a run under way
# SHA-256 of the published files -> their names. vocoder_w2v2lcnn and codec_w2v2lcnn are published
# too, but their checksums are unknown here: they load, and are called weights of unknown origin.
RELEASED = {
    "d8b240a5d50782cf39780bb0ed4c75652cc405fb7aa0aeb1b433bf38faba5f43": "codec_mellcnn",
    "5a606d1fbd578dbd214471cead283c236f4204c54d602e945924b3594f8c25a3": "codec_w2v2aasist",
    "86876e2c0eb98d6e60ecf2f1139112206adf47b1562aee72530d0c22e04c644a": "cotrain_w2v2aasist",
    "330c1993860c4141d0aa9a2818718d238240908e324b5cdda9756f0122011431": "vocoder_mellcnn",
    "02a002ff2c9162d164316aa372feb57525cbd572f1689735500320ceff1f3caa": "vocoder_w2v2aasist",
}
# Parts of names in models that take audio; the heads here take features.
FRONT_END_NAMES = ("ssl", "wav2vec", "w2v", "hubert", "wavlm", "xlsr", "frontend", "front_end")
FRONT_END_NAMES += ("feature_extractor", "feature_projection", "sinc", "encoder.layers")


# ── LCNN ─────────────────────────────────────────────────────────────────────────────────────────


class MaxFeatureMap2D(nn.Module):
    """Maximum of the two halves of the channels (Wu et al. 2018, arXiv 1511.02683, eq. 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return _MaxOfHalves.apply(x)


class _MaxOfHalves(torch.autograd.Function):
    """torch.maximum(*x.chunk(2, dim=1)) with a gradient in two passes over memory instead of a
    dozen.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        from_first = first >= second
        ctx.save_for_backward(from_first)
        return torch.maximum(first, second)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (from_first,) = ctx.saved_tensors
        if torch.compiler.is_compiling():  # it cannot follow products written into slices
            return torch.cat([grad * from_first, grad * from_first.logical_not()], dim=1)
        channels = grad.shape[1]
        out = grad.new_empty(grad.shape[0], 2 * channels, *grad.shape[2:])
        torch.mul(grad, from_first, out=out[:, :channels])
        torch.mul(grad, from_first.logical_not(), out=out[:, channels:])
        return out


def _conv_mfm(channels_in: int, channels_out: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2), MaxFeatureMap2D()]


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, affine=False)


class LCNN(nn.Module):
    """Light CNN over the feature as an image, one channel."""

    name = "lcnn"

    def __init__(self, feat: str):
        super().__init__()
        self.feat = feat
        height, width = (side // 16 for side in FEATURE_SHAPES[feat])  # four poolings by 2
        self.conv1 = nn.Sequential(*_conv_mfm(1, 64, 5), nn.MaxPool2d(2))
        self.conv2 = nn.Sequential(*_conv_mfm(32, 64, 1), _norm(32))
        self.conv3 = nn.Sequential(*_conv_mfm(32, 96, 3), nn.MaxPool2d(2), _norm(48))
        self.conv4 = nn.Sequential(*_conv_mfm(48, 96, 1), _norm(48))
        self.conv5 = nn.Sequential(*_conv_mfm(48, 128, 3), nn.MaxPool2d(2))
        self.conv6 = nn.Sequential(*_conv_mfm(64, 128, 1), _norm(64))
        self.conv7 = nn.Sequential(*_conv_mfm(64, 64, 3), _norm(32))
        self.conv8 = nn.Sequential(*_conv_mfm(32, 64, 1), _norm(32))
        self.conv9 = nn.Sequential(*_conv_mfm(32, 64, 3), nn.MaxPool2d(2))
        self.out = nn.Sequential(
            nn.Dropout(0.7),
            nn.Linear(32 * height * width, 160),
            MaxFeatureMap2D(),
            nn.Linear(80, 256),
        )
        self.fc_mu = nn.Linear(256, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, frames, dim) -> embedding (B, 256), logits (B, 2): REAL, FAKE."""
        features = _checked(features, FEATURE_SHAPES[self.feat], self)
        # The published LCNN sees mel as time x mel but XLS-R as dim x time.
        x = (features if self.feat == "mel" else features.transpose(1, 2)).unsqueeze(1)
        for stage in (
            self.conv1,
            self.conv2,
            self.conv3,
            self.conv4,
            self.conv5,
            self.conv6,
            self.conv7,
            self.conv8,
            self.conv9,
        ):
            x = stage(x)  # at last (B, 32, height, width)
        embedding = self.out(x.flatten(1))
        return embedding, self.fc_mu(embedding)


# ── AASIST (Jung et al. 2022, arXiv 2110.01200) ──────────────────────────────────────────────────


class Residual_block(nn.Module):
    """Two convolutions and a skip, (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels_in: int, channels_out: int, first: bool = False):
        super().__init__()
        if not first:
            # Part of the weights, but the published forward pass overwrites its result: never
            # computed here.
            self.bn1 = nn.BatchNorm2d(channels_in).requires_grad_(False)
        self.conv1 = nn.Conv2d(channels_in, channels_out, (2, 3), padding=(1, 1))
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, (2, 3), padding=(0, 1))
        self.conv_downsample = (
            nn.Conv2d(channels_in, channels_out, (1, 3), padding=(0, 1))
            if channels_in != channels_out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.selu(self.bn2(self.conv1(x))))
        return out + (x if self.conv_downsample is None else self.conv_downsample(x))


class GraphAttentionLayer(nn.Module):
    """Attention between all pairs of nodes, (B, N, in) -> (B, N, out)."""

    def __init__(self, dim_in: int, dim_out: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.att_proj = nn.Linear(dim_in, dim_out)
        self.att_weight = _attention_weight(dim_out)
        self.proj_with_att = nn.Linear(dim_in, dim_out)
        self.proj_without_att = nn.Linear(dim_in, dim_out)
        self.bn = nn.BatchNorm1d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.2, self.training)
        scores = _pair_features(self.att_proj, x) @ self.att_weight  # (B, N, N, 1)
        attention = torch.softmax(scores.squeeze(3) / self.temperature, dim=2)
        return F.selu(
            _norm_nodes(self.bn, self.proj_with_att(attention @ x) + self.proj_without_att(x))
        )


class HtrgGraphAttentionLayer(nn.Module):
    """Attention within and between two kinds of nodes, with a master node that looks at all of
    them.
    """

    def __init__(self, dim_in: int, dim_out: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.proj_type1 = nn.Linear(dim_in, dim_in)
        self.proj_type2 = nn.Linear(dim_in, dim_in)
        self.att_proj = nn.Linear(dim_in, dim_out)
        self.att_projM = nn.Linear(dim_in, dim_out)
        self.att_weight11 = _attention_weight(dim_out)
        self.att_weight22 = _attention_weight(dim_out)
        self.att_weight12 = _attention_weight(dim_out)
        self.att_weightM = _attention_weight(dim_out)
        self.proj_with_att = nn.Linear(dim_in, dim_out)
        self.proj_without_att = nn.Linear(dim_in, dim_out)
        self.proj_with_attM = nn.Linear(dim_in, dim_out)
        self.proj_without_attM = nn.Linear(dim_in, dim_out)
        self.bn = nn.BatchNorm1d(dim_out)

    def forward(
        self, type1: Tensor, type2: Tensor, master: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes (B, N1, in), (B, N2, in), master (B, 1, in) -> the same with `out` features."""
        n1 = type1.shape[1]
        x = torch.cat([self.proj_type1(type1), self.proj_type2(type2)], dim=1)
        x = F.dropout(x, 0.2, self.training)  # (B, N, in)
        new_master = self._update_master(x, master)

        pairs = _pair_features(self.att_proj, x)  # (B, N, N, out)
        within1 = pairs[:, :n1, :n1] @ self.att_weight11
        within2 = pairs[:, n1:, n1:] @ self.att_weight22
        across = pairs[:, :n1, n1:] @ self.att_weight12  # scores are symmetric in the pair
        scores = torch.cat(
            [
                torch.cat([within1, across], dim=2),
                torch.cat([across.transpose(1, 2), within2], dim=2),
            ],
            dim=1,
        ).squeeze(3)
        attention = torch.softmax(scores / self.temperature, dim=2)  # (B, N, N)
        x = F.selu(
            _norm_nodes(self.bn, self.proj_with_att(attention @ x) + self.proj_without_att(x))
        )
        return x[:, :n1], x[:, n1:], new_master

    def _update_master(self, x: Tensor, master: Tensor) -> Tensor:
        scores = torch.tanh(self.att_projM(x * master)) @ self.att_weightM  # (B, N, 1)
        attention = torch.softmax(scores / self.temperature, dim=1)
        summary = attention.transpose(1, 2) @ x  # (B, 1, in)
        return self.proj_with_attM(summary) + self.proj_without_attM(master)


class GraphPool(nn.Module):
    """Keep the half of the nodes with the highest scores, (B, N, D) -> (B, max(N // 2, 1), D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(self.proj(F.dropout(x, 0.3, self.training)))  # (B, N, 1)
        best = scores.topk(max(x.shape[1] // 2, 1), dim=1).indices  # in falling order
        return (x * scores).gather(1, best.expand(-1, -1, x.shape[2]))


class W2VAASIST(nn.Module):
    """The AASIST back end on frames of XLS-R: spectro-temporal graphs instead of a raw-waveform
    encoder.
    """

    name, feat = "W2VAASIST", "xls-r-5"

    def __init__(self) -> None:
        super().__init__()
        self.LL = nn.Linear(1024, 128)
        self.first_bn = nn.BatchNorm2d(1)
        channels = (1, 32, 32, 64, 64, 64, 64)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(Residual_block(c_in, c_out, first=c_in == 1))
                for c_in, c_out in zip(channels, channels[1:], strict=False)
            )
        )
        self.first_bn1 = nn.BatchNorm2d(64)
        self.attention = nn.Sequential(
            nn.Conv2d(64, 128, 1), nn.SELU(), nn.BatchNorm2d(128), nn.Conv2d(128, 64, 1)
        )
        self.pos_S = nn.Parameter(torch.randn(1, 42, 64))
        self.master1 = nn.Parameter(torch.randn(1, 1, 64))
        self.master2 = nn.Parameter(torch.randn(1, 1, 64))
        self.GAT_layer_S = GraphAttentionLayer(64, 64, temperature=2)
        self.GAT_layer_T = GraphAttentionLayer(64, 64, temperature=2)
        self.HtrgGAT_layer_ST11 = HtrgGraphAttentionLayer(64, 32, temperature=100)
        self.HtrgGAT_layer_ST12 = HtrgGraphAttentionLayer(32, 32, temperature=100)
        self.HtrgGAT_layer_ST21 = HtrgGraphAttentionLayer(64, 32, temperature=100)
        self.HtrgGAT_layer_ST22 = HtrgGraphAttentionLayer(32, 32, temperature=100)
        self.pool_S, self.pool_T = GraphPool(64), GraphPool(64)
        self.pool_hS1, self.pool_hT1 = GraphPool(32), GraphPool(32)
        self.pool_hS2, self.pool_hT2 = GraphPool(32), GraphPool(32)
        self.out_layer = nn.Linear(160, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 201, 1024) -> embedding (B, 160), logits (B, 2) in the order REAL, FAKE."""
        features = _checked(features, FEATURE_SHAPES[self.feat], self)
        spectral, temporal = self._nodes(features)
        spectral = self.pool_S(self.GAT_layer_S(spectral))  # (B, 21, 64)
        temporal = self.pool_T(self.GAT_layer_T(temporal))  # (B, 33, 64)

        branches = (
            self._branch(
                temporal,
                spectral,
                self.master1,
                self.HtrgGAT_layer_ST11,
                self.HtrgGAT_layer_ST12,
                self.pool_hT1,
                self.pool_hS1,
            ),
            self._branch(
                temporal,
                spectral,
                self.master2,
                self.HtrgGAT_layer_ST21,
                self.HtrgGAT_layer_ST22,
                self.pool_hT2,
                self.pool_hS2,
            ),
        )
        temporal, spectral, master = (
            torch.maximum(one, other) for one, other in zip(*branches, strict=True)
        )
        embedding = torch.cat(
            [
                temporal.abs().amax(dim=1),
                temporal.mean(dim=1),
                spectral.abs().amax(dim=1),
                spectral.mean(dim=1),
                master.squeeze(1),
            ],
            dim=1,
        )
        return embedding, self.out_layer(F.dropout(embedding, 0.5, self.training))

    def _nodes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 201, 1024) -> spectral nodes (B, 42, 64), temporal nodes (B, 67, 64)."""
        x = self.LL(features).transpose(1, 2).unsqueeze(1)  # (B, 1, 128, 201)
        x = F.selu(self.first_bn(F.max_pool2d(x, 3)))  # (B, 1, 42, 67)
        x = F.selu(self.first_bn1(self.encoder(x)))  # (B, 64, 42, 67)
        w = self.attention(x)
        spectral = (x * torch.softmax(w, dim=3)).sum(dim=3).transpose(1, 2) + self.pos_S
        temporal = (x * torch.softmax(w, dim=2)).sum(dim=2).transpose(1, 2)
        return spectral, temporal

    def _branch(
        self,
        temporal: Tensor,
        spectral: Tensor,
        master: Tensor,
        layer1: nn.Module,
        layer2: nn.Module,
        pool_temporal: nn.Module,
        pool_spectral: nn.Module,
    ) -> list[Tensor]:
        """One of the two parallel heterogeneous stacks -> temporal (B, 16, 32), spectral (B, 10,
        32), master (B, 1, 32).
        """
        temporal, spectral, master = layer1(
            temporal, spectral, master.expand(len(temporal), -1, -1)
        )
        nodes = pool_temporal(temporal), pool_spectral(spectral), master
        changes = layer2(*nodes)
        return [
            F.dropout(node + change, 0.2, self.training)
            for node, change in zip(nodes, changes, strict=True)
        ]


def _attention_weight(dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(dim, 1)))


def _pair_features(projection: nn.Linear, x: Tensor) -> Tensor:
    """tanh(projection(x_i * x_j)) for each ordered pair of nodes (B, N, in) -> (B, N, N, out)."""
    return torch.tanh(projection(x.unsqueeze(2) * x.unsqueeze(1)))


def _norm_nodes(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """BatchNorm over all nodes of the batch, (B, N, D) -> (B, N, D)."""
    return norm(x.flatten(0, 1)).view_as(x)


def _checked(features: Tensor, expected: tuple[int, int], head: nn.Module) -> Tensor:
    """The features in the type of the head's weights, once their shape is sure to fit; caches hand
    on float16.
    """
    if features.dim() != 3 or tuple(features.shape[1:]) != expected:
        fitting = [
            feat for feat, shape in FEATURE_SHAPES.items() if shape == tuple(features.shape[1:])
        ]
        raise InputError(
            f"this {type(head).__name__} takes features (B, {expected[0]}, {expected[1]}), got "
            f"{tuple(features.shape)}"
            + (f", which are those of --feat {fitting[0]}" if fitting else "")
        )
    return features.to(next(head.parameters()).dtype)


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────

FORMAT = "codecfake-head-1"
HEADS = {"W2VAASIST": ("xls-r-5",), "lcnn": ("mel", "xls-r-5")}  # name -> the front ends it takes
# Of one clip forwards, counted by torch's FlopCounterMode; training takes three times as much.
GFLOP_A_CLIP = {("W2VAASIST", "xls-r-5"): 1.4, ("lcnn", "mel"): 1.1, ("lcnn", "xls-r-5"): 5.5}


def build_head(name: str, feat: str) -> LCNN | W2VAASIST:
    """A head with fresh weights. Raises InputError where the head does not take that front end."""
    if feat not in HEADS.get(name, ()):
        raise InputError(
            f"-m {name} --feat {feat}: expected one of "
            + ", ".join(f"{head} with {' or '.join(feats)}" for head, feats in HEADS.items())
        )
    return W2VAASIST() if name == "W2VAASIST" else LCNN(feat)


def load_head(path: str | Path) -> LCNN | W2VAASIST:
    """A trained head in eval mode on the CPU.

    Its `.feat` names the front end, its `.info` how it came about.

    Args:
        path: a checkpoint of ours, a released pickle (also wrapped in DataParallel), a state dict
            (also a trainer's checkpoint with one inside, or a .safetensors file), or a folder that
            holds `anti-spoofing_feat_model.pt` or one other file of weights.

    Raises:
        InputError: no such file, damaged, not a head of ours, or naming anything but weights.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_in(path)
    if not path.exists():
        raise InputError(
            f"{path}: no such weights; train them with main_train.py, or get the released ones as "
            "pretrained_model/README.md says"
        )
    if path.suffix == SAFETENSORS:
        content = torch_files.load_safetensors(path)
    else:
        content = torch_files.load(path, RELEASED_CLASSES)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        weights, info = content.get("state_dict"), content.get("info")
    else:
        weights, info = torch_files.read_weights(path, content), {"trained": _origin(path)}
    if not isinstance(weights, dict) or not _is_record(info):
        raise InputError(
            f"{path}: damaged, a checkpoint without weights, or with a record of something else"
        )
    head = _head_for(path, weights)
    head.info = info
    return head.eval()


def _weights_in(folder: Path) -> Path:
    """The file of weights in a folder: the one of the usual name, or the only one."""
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    files = [path for path in files if path.name not in NOT_WEIGHTS]
    if len(files) > 1:
        raise InputError(
            f"{folder}: expected {WEIGHTS} or one other file of weights, found {len(files)}: "
            + ", ".join(path.name for path in files[:5])
            + "; name the file itself"
        )
    return files[0] if files else folder / WEIGHTS


def _origin(path: Path) -> str:
    """Where weights without a record come from; only a published file's checksum makes it one."""
    name = RELEASED.get(hashlib.sha256(path.read_bytes()).hexdigest())
    origin = f"released weights {name}" if name else "weights of unknown origin"
    return f"{origin}, no record of the training"


def save_head(path: str | Path, head: nn.Module, info: dict[str, Any]) -> None:
    """Write the weights with what rebuilds and explains them; readable with weights_only=True.

    Args:
        info: plain data: front end, labels, arguments, versions, epoch.
    """
    content = {
        "format": FORMAT,
        "head": head.name,
        "feat": head.feat,
        "info": info,
        "state_dict": {name: tensor.cpu() for name, tensor in head.state_dict().items()},
    }
    torch_files.save(path, content)


def _is_record(info: Any) -> bool:
    """Whether the record holds plain data, and text where the program looks things up."""
    return (
        isinstance(info, dict)
        and torch_files.is_plain(info)
        and isinstance(info.get("front_end", {}), dict)
        and all(isinstance(info.get(key, ""), str) for key in ("train_task", "trained", "feat"))
        and isinstance(info.get("ssl"), (str, type(None)))
    )


def _head_for(path: Path, weights: dict[str, Tensor]) -> LCNN | W2VAASIST:
    """Tell the head by the names and shapes of its weights, and load them strictly."""
    if not all(
        isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in weights.values()
    ):
        raise InputError(f"{path}: expected weights of a head, found other things among them")
    shape = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if "LL.weight" in shape:
        head = W2VAASIST()
    elif shape.get("out.1.weight", (0, 0))[-1:] == (4960,):
        head = LCNN("mel")
    else:
        head = LCNN("xls-r-5")
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    if wrong := sorted(set(shape.items()) ^ set(expected.items())):
        if foreign := [name for name in shape.keys() - expected.keys() if _is_front_end(name)]:
            raise InputError(
                f"{path}: another model's weights: it holds its own front end "
                f"({min(foreign)[:80]}), while LCNN and W2VAASIST take features"
            )
        raise InputError(
            f"{path}: the weights are not those of LCNN or W2VAASIST ({len(wrong)} names or shapes "
            f"differ, first: {wrong[0][0]} {wrong[0][1]})"
        )
    if bad := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise InputError(f"{path}: damaged, {bad[0]} holds values that are not finite")
    head.load_state_dict(weights, strict=True)
    return head


def _is_front_end(name: str) -> bool:
    return any(part in name.lower() for part in FRONT_END_NAMES)


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="Turn released weights into a checkpoint of this program.")
    parser.add_argument(
        "released", type=Path, help="a released anti-spoofing_feat_model.pt, or its folder"
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="where to write; must not exist yet"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    head = load_head(args.released)
    if args.out.exists():
        raise InputError(f"{args.out}: exists already; choose another -o")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_head(args.out, head, head.info | {"feat": head.feat, "labels": ["real", "fake"]})
    n = sum(tensor.numel() for tensor in head.state_dict().values())
    print(
        f"{args.out}: {head.name} on {head.feat}, {n:,} parameters and buffers; "
        f"{json.dumps(head.info)}"
    )


if __name__ == "__main__":
    cli.run(main, if_stopped="nothing was written; run the command again")
