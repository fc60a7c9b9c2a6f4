"""The optimizer of a round: learning-rate course, groups, seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from services.client_agent.config import TrainingSection

_ABSENT: Final = -1e9
_SEED_BYTES: Final = 7
"""56 bits: every library at hand takes such a seed."""


def round_seed(seed: int, round_number: int) -> int:
    """Seed of a round's batch order and dropout: the same round trained again gives the same numbers."""
    digest = hashlib.sha256(f"shelora round seed {seed} {round_number}".encode()).digest()
    return int.from_bytes(digest[:_SEED_BYTES], "big")


def absent_offset(labels: NDArray[np.int64], classes: int) -> torch.Tensor | None:
    """What to add to the logits in training so that classes without local texts are left alone.

    Their share of the softmax becomes exactly 0, and with it their gradient: an agent teaches the shared head nothing
    about classes that it never saw (restricted softmax).

    Args:
        labels: int64[texts], class indices.
        classes: number of classes.

    Returns:
        float32[classes], or None when every class occurs.
    """
    counts = np.bincount(labels, minlength=classes)
    if counts.all():
        return None
    return torch.from_numpy(np.where(counts > 0, 0.0, _ABSENT).astype(np.float32))


def make_optimizer(
    section: TrainingSection, steps: int, pairs: Sequence[torch.nn.Parameter], whole: Sequence[torch.nn.Parameter]
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a linear warm-up.

    Args:
        section: rates and decay.
        steps: optimizer steps of the round.
        pairs: LoRA weights.
        whole: tensors trained whole; vectors among them (biases, norms) do not decay.

    Returns:
        The optimizer and the schedule that sets its rates after every step.
    """
    decay = section.weight_decay
    groups = [
        {"params": list(pairs), "weight_decay": decay},
        {"params": [tensor for tensor in whole if tensor.ndim > 1], "weight_decay": decay},
        {"params": [tensor for tensor in whole if tensor.ndim <= 1], "weight_decay": 0.0},
    ]
    kept = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(kept, lr=section.learning_rate)
    rising = max(1, round(section.warmup * steps))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rising))
