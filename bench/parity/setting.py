"""What is trained: agents, rounds, texts, splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from services.client_agent.config import EMBEDDED

EVEN: Final = "even"
SKEWED: Final = "skewed"


@dataclass(frozen=True)
class Setting:
    """One federation's worth of training, shared by all methods.

    Attributes:
        ranks: LoRA rank of every agent.
        rounds, steps, batch_size: of local training.
        learning_rate: of local training.
        label_balance: how evenly local labels are drawn, from 0 (as they occur) to 1.
        max_tokens: texts are cut to so many.
        curve_texts: test texts, evenly picked, that are looked at after every round but the last; None looks at all.
        seeds: of split, batches and start; everything is repeated for each.
        concentrations: of the Dirichlet split by name; None splits evenly.
        source: the base model.
    """

    ranks: tuple[int, ...] = (4, 8, 16, 32)
    rounds: int = 5
    steps: int = 30
    batch_size: int = 16
    learning_rate: float = 2e-3
    label_balance: float = 1.0
    max_tokens: int = 32
    curve_texts: int | None = 240
    seeds: tuple[int, ...] = (0, 1, 2)
    concentrations: Mapping[str, float | None] = field(default_factory=lambda: {EVEN: None, SKEWED: 0.5})
    source: str = EMBEDDED
