from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from services.client_agent.training.batches import Batch
from services.client_agent.training.calibration import activation_norms


class TwoLayers(torch.nn.Module):
    """An embedding table into one layer a token, and into another layer a row (its mean over tokens)."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.per_token, self.per_row, self.unused = (torch.nn.Linear(3, 2) for _ in range(3))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        values = self.table[input_ids]
        return self.per_token(values).sum() + self.per_row(values.mean(dim=1)).sum()


def test_norms_leave_out_padding_and_add_up_over_batches():
    table = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
    model = TwoLayers(table)
    batches = [
        Batch(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([0, 1])),
        Batch(torch.tensor([[5, 2]]), torch.tensor([[1, 1]]), torch.tensor([0])),
    ]
    layers = [model.per_token, model.per_row, model.unused]
    seen: list[float] = []
    factories = [lambda batch=batch: batch for batch in batches]
    found = activation_norms(model, layers, factories, contextlib.nullcontext, lambda share, _: seen.append(share))
    tokens = table[torch.tensor([1, 2, 3, 4, 5, 2])].double().numpy()
    rows = np.stack([table[torch.tensor(row)].mean(0).numpy() for row in ([1, 2, 3], [4, 0, 0], [5, 2])])
    np.testing.assert_allclose(found[0], np.linalg.norm(tokens, axis=0), rtol=1e-12)
    np.testing.assert_allclose(found[1], np.linalg.norm(rows.astype(np.float64), axis=0), rtol=1e-6)
    np.testing.assert_array_equal(found[2], np.zeros(3))
    assert seen == [0.5, 1.0]
    assert not any(layer._forward_pre_hooks for layer in layers)
