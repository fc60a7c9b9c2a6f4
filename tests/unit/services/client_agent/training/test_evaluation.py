from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from services.client_agent.training.batches import Batch, Sequences
from services.client_agent.training.evaluation import evaluate, score


class FixedLogits(torch.nn.Module):
    """Answers with the logits of a table: class scores of the first token, or next-token scores of every token."""

    def __init__(self, table: torch.Tensor, *, per_token: bool) -> None:
        super().__init__()
        self.table, self.per_token = table, per_token

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids if self.per_token else input_ids[:, 0]])


def batch(tokens: list[list[int]], mask: list[list[int]], labels: list[int]) -> Batch:
    return Batch(torch.tensor(tokens), torch.tensor(mask), torch.tensor(labels))


def test_classification_scores():
    model = FixedLogits(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), per_token=False)
    result = score(model, batch([[0], [1], [1]], [[1]] * 3, [0, 0, 1]), "sequence-classification")
    expected = np.log1p(np.exp(-2)) + np.log1p(np.exp(1)) + np.log1p(np.exp(-1))
    assert float(result.loss) == pytest.approx(expected, rel=1e-6)
    assert (int(result.right), result.count) == (2, 3)


def test_an_offset_shifts_the_logits():
    model = FixedLogits(torch.tensor([[2.0, 0.0]]), per_token=False)
    result = score(model, batch([[0]], [[1]], [0]), "sequence-classification", torch.tensor([-3.0, 0.0]))
    assert float(result.loss) == pytest.approx(np.log1p(np.exp(1)), rel=1e-6)
    assert int(result.right) == 0


def test_causal_scores_count_next_tokens_and_no_padding():
    """The table predicts token + 1; row one follows it for 1 of 2 steps, row two for its only step."""
    table = torch.full((5, 5), -4.0)
    table[torch.arange(4), torch.arange(1, 5)] = 4.0
    model = FixedLogits(table, per_token=True)
    result = score(model, batch([[0, 1, 3], [2, 3, 4]], [[1, 1, 1], [1, 1, 0]], [-1, -1]), "causal-lm")
    good, bad = np.log1p(4 * np.exp(-8)), 8 + np.log1p(4 * np.exp(-8))
    assert float(result.loss) == pytest.approx(2 * good + bad, rel=1e-6)
    assert (int(result.right), result.count) == (2, 3)


def test_evaluation_is_independent_of_batches():
    generator = np.random.default_rng(0)
    tokens = tuple(generator.integers(0, 9, size=length).astype(np.int32) for length in generator.integers(1, 900, 40))
    sequences = Sequences(tokens, generator.integers(0, 3, size=40), 0)
    table = torch.from_numpy(generator.normal(size=(9, 3)))
    seen: list[float] = []
    found = evaluate(
        FixedLogits(table, per_token=False),
        sequences,
        "sequence-classification",
        torch.device("cpu"),
        contextlib.nullcontext,
        lambda fraction, _: seen.append(fraction),
    )
    scores = table[torch.tensor([int(row[0]) for row in tokens])]
    labels = torch.from_numpy(sequences.labels)
    assert found.accuracy == float((scores.argmax(1) == labels).double().mean())
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(scores, labels)), rel=1e-6)
    assert found.examples == 40
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[-1] == 1.0
