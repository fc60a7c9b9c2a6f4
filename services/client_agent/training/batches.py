"""Token sequences and the batches made of them; rows are padded only to the longest of their batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from services.client_agent.training.data import Row
from services.client_agent.training.model import LoadedModel, vocabulary_size
from shelora.errors import InvalidConfiguration

EVALUATION_TOKENS: Final = 2048
"""Most tokens, padding included, in a batch that is only evaluated."""


@dataclass(frozen=True)
class Sequences:
    """Tokenised rows.

    Attributes:
        tokens: one int32[length] a row.
        labels: int64[rows], class indices; -1 where the task has none.
        pad_token_id: token that fills short rows.
    """

    tokens: tuple[NDArray[np.int32], ...]
    labels: NDArray[np.int64]
    pad_token_id: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """One padded batch on its device: tokens, mask int64[rows, longest]; labels int64[rows]."""

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward pass."""
        return {"input_ids": self.tokens, "attention_mask": self.mask}


def tokenize(rows: Sequence[Row], loaded: LoadedModel, labels: Sequence[str], task: str) -> Sequences:
    """Turn texts into token sequences, cut to the model's length; causal texts end with the end token.

    Raises:
        InvalidConfiguration: a text without tokens, or with only one where the next token is to be predicted.
    """
    if not rows:
        return Sequences((), np.zeros(0, dtype=np.int64), loaded.pad_token_id)
    causal = task == "causal-lm"
    encoded = loaded.tokenizer([row.text for row in rows], truncation=True, max_length=loaded.max_tokens)["input_ids"]
    end: Any = loaded.tokenizer.eos_token_id
    known = vocabulary_size(loaded.network)
    sequences: list[NDArray[np.int32]] = []
    for row, tokens in zip(rows, encoded, strict=True):
        if causal and end is not None and len(tokens) < loaded.max_tokens and (not tokens or tokens[-1] != end):
            tokens = [*tokens, end]
        if len(tokens) < (2 if causal else 1):
            raise InvalidConfiguration(
                f"{row.origin}: expected a text of at least {2 if causal else 1} tokens, got {len(tokens)}",
                hint="remove the row",
            )
        if max(tokens) >= known:
            raise InvalidConfiguration(
                f"{row.origin}: expected tokens below {known}, the model's vocabulary, got {max(tokens)}",
                hint="the folder in model.source holds a tokenizer of another model",
            )
        sequences.append(np.asarray(tokens, dtype=np.int32))
    index = {label: position for position, label in enumerate(labels)}
    classes = [-1 if causal or row.label is None else index[row.label] for row in rows]
    return Sequences(tuple(sequences), np.asarray(classes, dtype=np.int64), loaded.pad_token_id)


def collate(sequences: Sequences, chosen: Sequence[int] | NDArray[np.int64], device: torch.device) -> Batch:
    """Pad the chosen rows to the longest of them."""
    rows = [sequences.tokens[index] for index in chosen]
    longest = max(len(row) for row in rows)
    tokens = np.full((len(rows), longest), sequences.pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for position, row in enumerate(rows):
        tokens[position, : len(row)] = row
        mask[position, : len(row)] = 1
    labels = sequences.labels[np.asarray(chosen, dtype=np.int64)]
    return Batch(*(torch.from_numpy(array).to(device) for array in (tokens, mask, labels)))


def count_steps(examples: int, batch_size: int, steps: int | None, epochs: float | None, default: int) -> int:
    """Optimizer steps of a round."""
    if epochs is not None:
        return max(1, math.ceil(epochs * examples / min(batch_size, examples)))
    return default if steps is None else steps


def draw_batches(
    labels: NDArray[np.int64], batch_size: int, steps: int, seed: int, balance: float = 0.0
) -> list[NDArray[np.int64]]:
    """Row indices of the batches of a round.

    A label that occurs c times gets a share of all draws proportional to c ** (1 - balance); its rows are drawn in
    shuffled passes, so that no row comes twice before every other row of its label came once.

    Args:
        labels: int64[rows], at least one row.
        batch_size: rows a batch; no more than there are rows.
        steps: number of batches.
        seed: of all draws.
        balance: 0 draws labels as often as they occur, 1 all equally often.

    Returns:
        `steps` arrays int64[min(batch_size, rows)].
    """
    generator = np.random.default_rng(seed)
    size = min(batch_size, len(labels))
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shares = counts ** (1.0 - balance)
    bounds = np.rint(np.cumsum(shares) / shares.sum() * steps * size).astype(np.int64)
    drawn = []
    for index, quota in enumerate(np.diff(bounds, prepend=0)):
        rows = np.flatnonzero(group == index)
        passes = [generator.permutation(rows) for _ in range(-(-quota // len(rows)))]
        drawn.append(np.concatenate([*passes, rows[:0]])[:quota])
    order = generator.permutation(np.concatenate(drawn))
    return [order[start : start + size] for start in range(0, steps * size, size)]


def by_length(sequences: Sequences, budget_tokens: int = EVALUATION_TOKENS) -> list[NDArray[np.int64]]:
    """All rows in batches of similar length, none above the token budget unless it is a single row.

    Returns:
        int64 index arrays, shortest rows first.
    """
    lengths = np.fromiter((len(row) for row in sequences.tokens), dtype=np.int64, count=len(sequences))
    batches: list[list[int]] = []
    for index in np.argsort(lengths, kind="stable"):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget_tokens:
            batches[-1].append(int(index))
        else:
            batches.append([int(index)])
    return [np.asarray(batch, dtype=np.int64) for batch in batches]
