"""The factor between a LoRA product and the update it stands for."""

from __future__ import annotations

import math

from shelora.errors import RankMismatch
from shelora.lora.arrays import check_positive


def lora_scaling(alpha: float, rank: int, rslora: bool = False) -> float:
    """LoRA scaling: the update is scaling * b @ a.

    Args:
        alpha: the adapter's alpha, positive.
        rank: the adapter's rank, at least 1.
        rslora: rank-stabilised LoRA divides by the square root of the rank.

    Returns:
        alpha / rank, or alpha / sqrt(rank).

    Raises:
        RankMismatch: rank below 1.
        NonFiniteValue: alpha is NaN or infinite.
        ValueOutOfRange: alpha is not positive.

    Source: docs/method.md section 2.
    """
    if rank < 1:
        raise RankMismatch(f"expected a LoRA rank of at least 1, got {rank}")
    return check_positive("alpha", alpha) / (math.sqrt(rank) if rslora else rank)
