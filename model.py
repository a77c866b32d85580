"""Networks and weights: the two front ends, the two heads, and checkpoints, both ends.

    python model.py RELEASED.pt -o OUT.pt       # turn a released weight file into our format

Parameter names are those of the published weights, which load with strict=True; where the published
network has a quirk that the weights depend on, a comment says so.
"""
from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

import cli
import torch_files
from cli import InputError
from dataset import CLIP_SAMPLES, FEATURE_SHAPES, SAMPLE_RATE
from xlsr import TimeMajorEncoder

DEFAULT_SSL = "facebook/wav2vec2-xls-r-300m"
LAYER = 5                  # hidden state that the heads see; entry 0 is what enters the first block
PRECISIONS = ("fp32", "tf32", "bf16")
WEIGHTS = "anti-spoofing_feat_model.pt"
# As torch's two allocators say it, CUDA itself, and its libraries (CUBLAS_STATUS_ALLOC_FAILED, ...).
NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


# ── Devices and precision ────────────────────────────────────────────────────────────────────────


def pick_device(gpu: int | None) -> torch.device:
    """The GPU with this index; None: the first GPU if there is one, else the CPU; negative: the CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        gpu = 0 if count else -1
    if gpu >= count:
        raise InputError(f"--gpu {gpu}: expected one of the {count} GPUs torch sees here; leave --gpu out to use what there is")
    if gpu < 0:
        _keep_freed_memory()
        return torch.device("cpu")
    try:
        _start(gpu)
    except RuntimeError as error:      # too old for this torch, full, or another program's alone
        raise InputError(f"--gpu {gpu}: torch {torch.__version__} cannot compute on it ({str(error).strip().splitlines()[0]}); choose "
                         "another, or the CPU with --gpu -1") from error
    return torch.device(f"cuda:{gpu}")


def _start(gpu: int) -> None:
    """Make the GPU the one whose streams and events are meant where none is named, and have it compute something."""
    torch.cuda.set_device(gpu)
    torch.ones(1, device="cuda").add_(1).item()


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks: handing each large activation back to the kernel, only to have the next one
    cleared page by page, takes a third of the time of LCNN on a CPU."""
    with suppress(OSError, AttributeError):              # another C library: nothing to set
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_MAX, 0)


def set_precision(precision: str, device: torch.device) -> None:
    """fp32 means float32 everywhere: torch would otherwise use TF32 in convolutions without asking."""
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        backend.allow_tf32 = precision == "tf32"
    if precision == "bf16" and not has_bf16(device):
        what = "GPU" if device.type == "cuda" else "CPU"
        cli.say(f"note: this {what} has no bfloat16 arithmetic; --precision bf16 will be many times slower than fp32")


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are worth asking for; on a GPU, the current one."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """bfloat16 where torch holds it safe, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def filled_up(clips: Tensor, size: int, device: torch.device) -> Tensor:
    """Clips (B, samples) on the device, followed by silence up to (size, samples).

    One shape throughout, so that what becomes of a clip depends neither on the clips beside it nor on
    how often the run was interrupted. Nobody waits for the copy to a GPU.
    """
    full = torch.zeros(size, clips.shape[1], pin_memory=device.type == "cuda")
    full[:len(clips)] = clips
    return full.to(device, non_blocking=True)


@contextmanager
def memory_advice(batch_size: int) -> Iterator[None]:
    """Turn running out of memory inside the block into a line that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_MEMORY):
            raise
        raise InputError(f"out of memory with --batch_size {batch_size}; lower it (for training with a new -o, since it shapes "
                         "the weights), or free memory on that device") from error


# ── Front ends ───────────────────────────────────────────────────────────────────────────────────


class FrontEnd(nn.Module):
    """Clips (B, 64600) float32 at 16 kHz -> features (B, frames, dim). Never trained, always in eval mode."""

    feat: str
    dim: int

    def fingerprint(self) -> dict[str, Any]:
        """All that decides the features' values; caches and checkpoints made with different ones do not mix."""
        return {"feat": self.feat, "clip_samples": CLIP_SAMPLES, "sample_rate": SAMPLE_RATE}

    def train(self, mode: bool = True) -> FrontEnd:
        return super().train(False)    # layerdrop would remove blocks, dropout would add noise


class Mel(FrontEnd):
    """Power mel spectrogram without a logarithm: the released Mel-LCNN's BatchNorm statistics fit only this."""

    feat, dim = "mel", 80

    def __init__(self) -> None:
        super().__init__()
        self.spectrogram = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=512, hop_length=128, n_mels=80)

    def forward(self, clips: Tensor) -> Tensor:
        with torch.autocast(clips.device.type, enabled=False):   # powers span more than bfloat16 resolves
            return self.spectrogram(clips).transpose(1, 2)       # (B, 505, 80)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"scale": "power", "n_fft": 512, "hop": 128}


class XLSR(FrontEnd):
    """Hidden state 5 of wav2vec 2.0 XLS-R (Babu et al. 2021, arXiv 2111.09296); blocks 6 to 24 are never built."""

    feat = "xls-r-5"

    def __init__(self, ssl: str, precision: str = "fp32"):
        super().__init__()
        self.ssl, self.precision = ssl, precision
        library = _load_wav2vec2(ssl)
        self.dim = library.config.hidden_size
        self.weights_sha256 = digest(library)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.encoder = TimeMajorEncoder(library, dtype) if _is_of_xlsrs_kind(library.config) else _Library(library, precision)
        self.requires_grad_(False).eval()

    def forward(self, clips: Tensor) -> Tensor:
        mean = clips.mean(dim=1, keepdim=True)
        variance = clips.var(dim=1, keepdim=True, correction=0)
        clips = (clips - mean) / torch.sqrt(variance + 1e-7)     # as the checkpoint's own feature extractor
        return self.encoder(clips)                               # (B, 201, 1024)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"layer": LAYER, "normalisation": "zero mean, unit variance per clip",
                                        "weights_sha256": self.weights_sha256}


class _Library(nn.Module):
    """wav2vec 2.0 of another kind than XLS-R (layer norms after the blocks, a group norm), as the library runs it."""

    def __init__(self, network: nn.Module, precision: str):
        super().__init__()
        self.network, self.precision = network, precision

    def forward(self, clips: Tensor) -> Tensor:
        with autocast(self.precision, clips.device):
            return self.network(clips).last_hidden_state.float()


def _is_of_xlsrs_kind(config: Any) -> bool:
    return config.feat_extract_norm == "layer" and config.do_stable_layer_norm and \
        config.feat_extract_activation == config.hidden_act == "gelu" and not config.add_adapter


def load_frontend(feat: str, ssl: str | None = None, precision: str = "fp32") -> FrontEnd:
    """The front end called on clips (B, 64600) float32 that returns features (B, frames, dim) float32.

    Args:
        feat: "mel" -> (B, 505, 80), or "xls-r-5" -> (B, 201, 1024).
        ssl: hub id or local folder of the wav2vec 2.0 weights; None: facebook/wav2vec2-xls-r-300m.
        precision: "bf16" multiplies matrices in bfloat16, those of xls-r-5 alone. For TF32 see set_precision().

    Raises:
        InputError: an unknown feat, or weights that are absent, incomplete or of another kind.
    """
    if feat == "mel":
        return Mel().eval()
    if feat == "xls-r-5":
        return XLSR(ssl or DEFAULT_SSL, precision)
    raise InputError(f"--feat {feat}: expected {' or '.join(FEATURE_SHAPES)}")


def _load_wav2vec2(ssl: str) -> nn.Module:
    """The first five blocks, so set up that `last_hidden_state` is hidden state 5 of the whole network."""
    import transformers

    transformers.logging.set_verbosity_error()          # it warns of the 19 blocks we leave out on purpose
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)    # its failures come back as one error below
    try:
        config = transformers.AutoConfig.from_pretrained(ssl)
        blocks = getattr(config, "num_hidden_layers", 0)
        if config.model_type != "wav2vec2" or blocks < LAYER:
            raise ValueError(f"expected wav2vec2 with at least {LAYER} blocks, got {config.model_type} with {blocks}")
        config.num_hidden_layers = LAYER
        encoder, report = transformers.Wav2Vec2Model.from_pretrained(
            ssl, config=config, dtype=torch.float32, output_loading_info=True)
    except Exception as error:         # the hub client, safetensors and the model each fail in ways of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"--ssl {ssl}: the wav2vec 2.0 weights cannot be loaded ({reason}); give a local folder that "
                         "holds config.json and the weights, or a hub id while online") from error
    if missing := sorted(set(report["missing_keys"]) - {"masked_spec_embed"}):
        raise InputError(f"--ssl {ssl}: incomplete weights, {len(missing)} tensors are missing (first: {missing[0]})")
    if config.do_stable_layer_norm:
        # The library closes the encoder with a LayerNorm that belongs after block 24: entry 5 carries none.
        encoder.encoder.layer_norm = nn.Identity()
    return encoder


def digest(module: nn.Module) -> str:
    """SHA-256 of a module's names, shapes and values; the module lies on the CPU."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


# ── LCNN ─────────────────────────────────────────────────────────────────────────────────────────


class MaxFeatureMap2D(nn.Module):
    """Maximum of the two halves of the channels (Wu et al. 2018, arXiv 1511.02683, eq. 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return _MaxOfHalves.apply(x)


class _MaxOfHalves(torch.autograd.Function):
    """torch.maximum(*x.chunk(2, dim=1)) with a gradient in two passes over memory instead of a dozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        from_first = first >= second
        ctx.save_for_backward(from_first)
        return torch.maximum(first, second)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from_first, = ctx.saved_tensors
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
        height, width = (side // 16 for side in FEATURE_SHAPES[feat])      # four poolings by 2
        self.conv1 = nn.Sequential(*_conv_mfm(1, 64, 5), nn.MaxPool2d(2))
        self.conv2 = nn.Sequential(*_conv_mfm(32, 64, 1), _norm(32))
        self.conv3 = nn.Sequential(*_conv_mfm(32, 96, 3), nn.MaxPool2d(2), _norm(48))
        self.conv4 = nn.Sequential(*_conv_mfm(48, 96, 1), _norm(48))
        self.conv5 = nn.Sequential(*_conv_mfm(48, 128, 3), nn.MaxPool2d(2))
        self.conv6 = nn.Sequential(*_conv_mfm(64, 128, 1), _norm(64))
        self.conv7 = nn.Sequential(*_conv_mfm(64, 64, 3), _norm(32))
        self.conv8 = nn.Sequential(*_conv_mfm(32, 64, 1), _norm(32))
        self.conv9 = nn.Sequential(*_conv_mfm(32, 64, 3), nn.MaxPool2d(2))
        self.out = nn.Sequential(nn.Dropout(0.7), nn.Linear(32 * height * width, 160), MaxFeatureMap2D(), nn.Linear(80, 256))
        self.fc_mu = nn.Linear(256, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, frames, dim) -> embedding (B, 256), logits (B, 2) in the order REAL, FAKE."""
        features = _checked(features, FEATURE_SHAPES[self.feat], self)
        # The published LCNN sees mel as time x mel but XLS-R as dim x time.
        x = (features if self.feat == "mel" else features.transpose(1, 2)).unsqueeze(1)
        for stage in (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5,
                      self.conv6, self.conv7, self.conv8, self.conv9):
            x = stage(x)                                                   # at last (B, 32, height, width)
        embedding = self.out(x.flatten(1))
        return embedding, self.fc_mu(embedding)


# ── AASIST (Jung et al. 2022, arXiv 2110.01200) ──────────────────────────────────────────────────


class Residual_block(nn.Module):
    """Two convolutions and a skip, (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels_in: int, channels_out: int, first: bool = False):
        super().__init__()
        if not first:
            # Part of the weights, but the published forward pass overwrites its result: never computed here.
            self.bn1 = nn.BatchNorm2d(channels_in).requires_grad_(False)
        self.conv1 = nn.Conv2d(channels_in, channels_out, (2, 3), padding=(1, 1))
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, (2, 3), padding=(0, 1))
        self.conv_downsample = (nn.Conv2d(channels_in, channels_out, (1, 3), padding=(0, 1))
                                if channels_in != channels_out else None)

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
        scores = _pair_features(self.att_proj, x) @ self.att_weight        # (B, N, N, 1)
        attention = torch.softmax(scores.squeeze(3) / self.temperature, dim=2)
        return F.selu(_norm_nodes(self.bn, self.proj_with_att(attention @ x) + self.proj_without_att(x)))


class HtrgGraphAttentionLayer(nn.Module):
    """Attention within and between two kinds of nodes, with a master node that looks at all of them."""

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

    def forward(self, type1: Tensor, type2: Tensor, master: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes (B, N1, in), (B, N2, in), master (B, 1, in) -> the same three with `out` features."""
        n1 = type1.shape[1]
        x = torch.cat([self.proj_type1(type1), self.proj_type2(type2)], dim=1)
        x = F.dropout(x, 0.2, self.training)                               # (B, N, in)
        new_master = self._update_master(x, master)

        pairs = _pair_features(self.att_proj, x)                           # (B, N, N, out)
        within1 = pairs[:, :n1, :n1] @ self.att_weight11
        within2 = pairs[:, n1:, n1:] @ self.att_weight22
        across = pairs[:, :n1, n1:] @ self.att_weight12                    # scores are symmetric in the pair
        scores = torch.cat([torch.cat([within1, across], dim=2),
                            torch.cat([across.transpose(1, 2), within2], dim=2)], dim=1).squeeze(3)
        attention = torch.softmax(scores / self.temperature, dim=2)        # (B, N, N)
        x = F.selu(_norm_nodes(self.bn, self.proj_with_att(attention @ x) + self.proj_without_att(x)))
        return x[:, :n1], x[:, n1:], new_master

    def _update_master(self, x: Tensor, master: Tensor) -> Tensor:
        scores = torch.tanh(self.att_projM(x * master)) @ self.att_weightM          # (B, N, 1)
        attention = torch.softmax(scores / self.temperature, dim=1)
        summary = attention.transpose(1, 2) @ x                                     # (B, 1, in)
        return self.proj_with_attM(summary) + self.proj_without_attM(master)


class GraphPool(nn.Module):
    """Keep the half of the nodes with the highest scores, (B, N, D) -> (B, max(N // 2, 1), D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.sigmoid(self.proj(F.dropout(x, 0.3, self.training)))         # (B, N, 1)
        best = scores.topk(max(x.shape[1] // 2, 1), dim=1).indices                  # in falling order
        return (x * scores).gather(1, best.expand(-1, -1, x.shape[2]))


class W2VAASIST(nn.Module):
    """The AASIST back end on frames of XLS-R: spectro-temporal graphs instead of a raw-waveform encoder."""

    name, feat = "W2VAASIST", "xls-r-5"

    def __init__(self) -> None:
        super().__init__()
        self.LL = nn.Linear(1024, 128)
        self.first_bn = nn.BatchNorm2d(1)
        channels = (1, 32, 32, 64, 64, 64, 64)
        self.encoder = nn.Sequential(*(nn.Sequential(Residual_block(c_in, c_out, first=c_in == 1))
                                       for c_in, c_out in zip(channels, channels[1:])))
        self.first_bn1 = nn.BatchNorm2d(64)
        self.attention = nn.Sequential(nn.Conv2d(64, 128, 1), nn.SELU(), nn.BatchNorm2d(128), nn.Conv2d(128, 64, 1))
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
        spectral = self.pool_S(self.GAT_layer_S(spectral))                 # (B, 21, 64)
        temporal = self.pool_T(self.GAT_layer_T(temporal))                 # (B, 33, 64)

        branches = (self._branch(temporal, spectral, self.master1, self.HtrgGAT_layer_ST11, self.HtrgGAT_layer_ST12,
                                 self.pool_hT1, self.pool_hS1),
                    self._branch(temporal, spectral, self.master2, self.HtrgGAT_layer_ST21, self.HtrgGAT_layer_ST22,
                                 self.pool_hT2, self.pool_hS2))
        temporal, spectral, master = (torch.maximum(one, other) for one, other in zip(*branches))
        embedding = torch.cat([temporal.abs().amax(dim=1), temporal.mean(dim=1),
                               spectral.abs().amax(dim=1), spectral.mean(dim=1), master.squeeze(1)], dim=1)
        return embedding, self.out_layer(F.dropout(embedding, 0.5, self.training))

    def _nodes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 201, 1024) -> spectral nodes (B, 42, 64), temporal nodes (B, 67, 64)."""
        x = self.LL(features).transpose(1, 2).unsqueeze(1)                 # (B, 1, 128, 201)
        x = F.selu(self.first_bn(F.max_pool2d(x, 3)))                      # (B, 1, 42, 67)
        x = F.selu(self.first_bn1(self.encoder(x)))                        # (B, 64, 42, 67)
        w = self.attention(x)
        spectral = (x * torch.softmax(w, dim=3)).sum(dim=3).transpose(1, 2) + self.pos_S
        temporal = (x * torch.softmax(w, dim=2)).sum(dim=2).transpose(1, 2)
        return spectral, temporal

    def _branch(self, temporal: Tensor, spectral: Tensor, master: Tensor, layer1: nn.Module, layer2: nn.Module,
                pool_temporal: nn.Module, pool_spectral: nn.Module) -> list[Tensor]:
        """One of the two parallel heterogeneous stacks -> temporal (B, 16, 32), spectral (B, 10, 32), master (B, 1, 32)."""
        temporal, spectral, master = layer1(temporal, spectral, master.expand(len(temporal), -1, -1))
        nodes = pool_temporal(temporal), pool_spectral(spectral), master
        changes = layer2(*nodes)
        return [F.dropout(node + change, 0.2, self.training) for node, change in zip(nodes, changes)]


def _attention_weight(dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(dim, 1)))


def _pair_features(projection: nn.Linear, x: Tensor) -> Tensor:
    """tanh(projection(x_i * x_j)) for every ordered pair of the nodes (B, N, in) -> (B, N, N, out)."""
    return torch.tanh(projection(x.unsqueeze(2) * x.unsqueeze(1)))


def _norm_nodes(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """BatchNorm over all nodes of the batch, (B, N, D) -> (B, N, D)."""
    return norm(x.flatten(0, 1)).view_as(x)


def _checked(features: Tensor, expected: tuple[int, int], head: nn.Module) -> Tensor:
    """The features in the type of the head's weights, once their shape is sure to fit; caches hand on float16."""
    if features.dim() != 3 or tuple(features.shape[1:]) != expected:
        fitting = [feat for feat, shape in FEATURE_SHAPES.items() if shape == tuple(features.shape[1:])]
        raise InputError(f"this {type(head).__name__} takes features (B, {expected[0]}, {expected[1]}), got {tuple(features.shape)}"
                         + (f", which are those of --feat {fitting[0]}" if fitting else ""))
    return features.to(next(head.parameters()).dtype)


# ── Checkpoints ──────────────────────────────────────────────────────────────────────────────────

FORMAT = "codecfake-head-1"
MOST_MODULES = 1_000       # in a pickled head; the released ones have about 100, one that holds itself has no end
HEADS = {"W2VAASIST": ("xls-r-5",), "lcnn": ("mel", "xls-r-5")}     # name -> the front ends it takes

# What a released file may name: its own classes and torch's layers, DataParallel among them. They come
# back as inert records, never as the class.
RELEASED_CLASSES = (
    *(f"model.{name}" for name in ("W2VAASIST", "LCNN", "MaxFeatureMap2D", "GraphAttentionLayer",
                                   "HtrgGraphAttentionLayer", "GraphPool", "Residual_block")),
    *(f"{layer.__module__}.{layer.__qualname__}" for layer in vars(nn).values()
      if isinstance(layer, type) and issubclass(layer, nn.Module)),
)


def build_head(name: str, feat: str) -> LCNN | W2VAASIST:
    """A head with fresh weights. Raises InputError where the head does not take that front end."""
    if feat not in HEADS.get(name, ()):
        raise InputError(f"-m {name} --feat {feat}: expected one of "
                         + ", ".join(f"{head} with {' or '.join(feats)}" for head, feats in HEADS.items()))
    return W2VAASIST() if name == "W2VAASIST" else LCNN(feat)


def load_head(path: str | Path) -> LCNN | W2VAASIST:
    """A trained head in eval mode on the CPU; its `.feat` names the front end, its `.info` how it came about.

    Args:
        path: a checkpoint of ours, a released pickle (also wrapped in DataParallel), a plain state dict,
            or a folder holding `anti-spoofing_feat_model.pt`.

    Raises:
        InputError: no such file, damaged, not a head of ours, or naming anything but weights.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.exists():
        raise InputError(f"{path}: no such weights; train them with main_train.py, or get the released ones as "
                         "pretrained_model/README.md says")
    content = torch_files.load(path, RELEASED_CLASSES)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        weights, info = content.get("state_dict"), content.get("info")
    else:
        weights, info = _foreign_weights(path, content), {"trained": "released weights, no record of the training"}
    if not isinstance(weights, dict) or not _is_record(info):
        raise InputError(f"{path}: damaged, a checkpoint without weights, or with a record of something else")
    head = _head_for(path, weights)
    head.info = info
    return head.eval()


def save_head(path: str | Path, head: nn.Module, info: dict[str, Any]) -> None:
    """Write the weights with what rebuilds and explains them; readable with weights_only=True.

    Args:
        info: plain data: front end, labels, arguments, versions, epoch.
    """
    content = {"format": FORMAT, "head": head.name, "feat": head.feat, "info": info,
               "state_dict": {name: tensor.cpu() for name, tensor in head.state_dict().items()}}
    torch_files.save(path, content)


def _is_record(info: Any) -> bool:
    """Whether the record holds plain data, and text where the program looks things up."""
    return isinstance(info, dict) and torch_files.is_plain(info) and isinstance(info.get("front_end", {}), dict) and \
        all(isinstance(info.get(key, ""), str) for key in ("train_task", "trained", "feat")) and \
        isinstance(info.get("ssl"), (str, type(None)))


def _foreign_weights(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict of a pickled module, or of a file that is one."""
    if isinstance(content, torch_files.Record):
        try:
            weights = _walk_module(content)
        except (AttributeError, TypeError, ValueError):
            raise InputError(f"{path}: damaged, or not a pickled network") from None
    elif isinstance(content, dict):
        weights = content
    else:
        raise InputError(f"{path}: expected weights of a head, found a {type(content).__name__}")
    return {str(name).removeprefix("module."): tensor for name, tensor in weights.items()}


def _walk_module(record: Any) -> dict[str, Tensor]:
    """What `state_dict()` would give, read off the attributes of a pickled module."""
    found: dict[str, Tensor] = {}
    waiting = [("", record)]
    for prefix, module in waiting:
        tensors = {**module._parameters, **module._buffers}
        if any(len(str(name)) > 200 for name in (*tensors, *module._modules)):
            raise ValueError("names of unusual length")
        found |= {f"{prefix}{name}": tensor for name, tensor in tensors.items() if tensor is not None}
        waiting += [(f"{prefix}{name}.", child) for name, child in module._modules.items() if child is not None]
        if len(waiting) > MOST_MODULES:
            raise ValueError("modules without end")
    return found


def _head_for(path: Path, weights: dict[str, Tensor]) -> LCNN | W2VAASIST:
    """Tell the head by the names and shapes of its weights, and load them strictly."""
    if not all(isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in weights.values()):
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
        raise InputError(f"{path}: the weights are not those of LCNN or W2VAASIST ({len(wrong)} names or shapes differ, "
                         f"first: {wrong[0][0]} {wrong[0][1]})")
    if bad := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
        raise InputError(f"{path}: damaged, {bad[0]} holds values that are not finite")
    head.load_state_dict(weights, strict=True)
    return head


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Turn released weights into a checkpoint of this program.")
    parser.add_argument("released", type=Path, help="a released anti-spoofing_feat_model.pt, or its folder")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where to write; must not exist yet")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    head = load_head(args.released)
    if args.out.exists():
        raise InputError(f"{args.out}: exists already; choose another -o")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_head(args.out, head, head.info | {"feat": head.feat, "labels": ["real", "fake"]})
    n = sum(tensor.numel() for tensor in head.state_dict().values())
    print(f"{args.out}: {head.name} on {head.feat}, {n:,} parameters and buffers; {json.dumps(head.info)}")


if __name__ == "__main__":
    cli.run(main, if_stopped="nothing was written; run the command again")
