"""What a GPU should reach by arithmetic: data for gpu.py, which measures it, and for scale.py.

Nothing here was measured on a GPU. A clip through five blocks of XLS-R 300M is 46.2 GFLOP:
convolutions 19.8, blocks 26.1, projection 0.2, positions 0.07. Rates of the front end are sums over
its kernels of the larger of two times: arithmetic at the share of the peak that such shapes reach,
and bytes at the card's bandwidth, plus 1.2 us a kernel. Batches of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

ROW_BYTES = 411_648  # (201, 1024) in float16


@dataclass(frozen=True)
class Card:
    """Effective rates, a fifth to a half below what the maker prints."""

    words: tuple[str, ...]  # of these names, as CUDA spells them
    front_end: dict[str, float]  # clips/s; bf16 with norms and GELUs apart, bf16 fused with them
    stream: float  # TB/s through memory
    convolutions: dict[str, float]  # TFLOP/s of the heads' small convolutions


# The peaks that the estimates start from, TFLOP/s in fp32 / tf32 / bf16 and TB/s:
# H100 67 / 495 / 989 and 3.35, H200 the same and 4.8, A100 19.5 / 156 / 312 and 2.0,
# 4090 83 / 83 / 165 and 1.0, 3090 36 / 36 / 71 and 0.94.
CARDS = {
    "H100": Card(
        ("H100",),
        {"fp32": 930, "tf32": 3_100, "bf16": 3_750, "bf16 fused": 6_300},
        2.8,
        {"fp32": 30, "tf32": 150, "bf16": 250},
    ),
    "H200": Card(
        ("H200",),
        {"fp32": 970, "tf32": 3_700, "bf16": 4_700, "bf16 fused": 7_500},
        4.0,
        {"fp32": 30, "tf32": 150, "bf16": 250},
    ),
    "A100": Card(
        ("A100",),
        {"fp32": 340, "tf32": 1_400, "bf16": 1_900, "bf16 fused": 3_050},
        1.6,
        {"fp32": 10, "tf32": 55, "bf16": 110},
    ),
    "RTX 4090": Card(
        ("4090",),
        {"fp32": 700, "tf32": 860, "bf16": 1_100, "bf16 fused": 1_800},
        0.9,
        {"fp32": 37, "tf32": 45, "bf16": 60},
    ),
    "RTX 3090": Card(
        ("3090",),
        {"fp32": 410, "tf32": 480, "bf16": 710, "bf16 fused": 980},
        0.8,
        {"fp32": 16, "tf32": 20, "bf16": 30},
    ),
}


@dataclass(frozen=True)
class Head:
    """A training step of 128 clips: forward, backward and Adam."""

    gflop: float  # of the convolutions
    gigabytes: dict[str, float]  # moved through memory
    kernels: dict[str, int]  # launched, about 5 us each
    sam_kernels: dict[str, int]  # with SAM: two passes, its own 30 and Adam's 4


# W2V2-AASIST: 326 kernels forward, 606 back, 4 of fused Adam; bf16 adds 302 casts. SAM: 2 x 932 +
# 30 + 4. Mel-LCNN: 60 + 90 + 4; its 36 casts under bf16 are a guess by the number of its layers.
HEADS = {
    "W2VAASIST": Head(
        492,
        {"fp32": 38, "tf32": 38, "bf16": 20},
        {"fp32": 936, "tf32": 936, "bf16": 1_238},
        {"fp32": 1_898, "tf32": 1_898, "bf16": 2_502},
    ),
    "lcnn": Head(
        411,
        {"fp32": 39, "tf32": 39, "bf16": 21},
        {"fp32": 154, "tf32": 154, "bf16": 190},
        {"fp32": 334, "tf32": 334, "bf16": 406},
    ),
}
STEP_CLIPS = 128
LAUNCH = 5e-6  # seconds of the host a kernel
FORWARD_SHARE = 1 / 3  # of a step's arithmetic, bytes and launches


def step_seconds(card: Card, head: Head, precision: str, sam: bool = False) -> float:
    """A step of 128 clips: arithmetic and bytes in turn, or launching where that takes longer.

    H100, W2V2-AASIST: fp32 492/30 + 38/2.8 = 30 ms, tf32 17 ms, bf16 9 ms.
    """
    passes = 2 if sam else 1
    arithmetic = head.gflop / card.convolutions[precision] / 1e3
    moving = head.gigabytes[precision] / card.stream / 1e3
    kernels = head.sam_kernels if sam else head.kernels
    return max(passes * (arithmetic + moving), kernels[precision] * LAUNCH)


def training_rate(card: Card, head: Head, precision: str, sam: bool = False) -> float:
    """Clips a second."""
    return STEP_CLIPS / step_seconds(card, head, precision, sam)


def forward_rate(card: Card, head: Head, precision: str) -> float:
    """Clips a second of the head alone, forwards: validation and scoring."""
    return training_rate(card, head, precision) / FORWARD_SHARE


def card_of(name: str) -> str | None:
    """The card that a device's name is of, None where there is no estimate for it."""
    for card, about in CARDS.items():
        if any(word in name for word in about.words):
            return card
    return None
