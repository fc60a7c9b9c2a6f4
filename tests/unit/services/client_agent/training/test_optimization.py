from __future__ import annotations

import numpy as np
import pytest
import torch

from services.client_agent.config import TrainingSection
from services.client_agent.training.optimization import absent_offset, make_optimizer, round_seed


def test_round_seeds_differ_by_seed_and_round():
    seeds = {round_seed(seed, number) for seed in range(20) for number in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**56 for seed in seeds)
    assert round_seed(3, 5) == round_seed(3, 5)
    assert round_seed(1, 11) != round_seed(11, 1)


def test_classes_without_texts_get_no_gradient():
    offset = absent_offset(np.array([0, 2, 2]), 4)
    assert offset is not None
    logits = torch.zeros(3, 4, requires_grad=True)
    torch.nn.functional.cross_entropy(logits + offset, torch.tensor([0, 2, 2])).backward()
    assert logits.grad is not None
    assert logits.grad[:, [1, 3]].eq(0).all()
    assert logits.grad[:, [0, 2]].ne(0).all()
    assert absent_offset(np.array([1, 0]), 2) is None


def test_the_rate_rises_then_stays_and_vectors_do_not_decay():
    section = TrainingSection(learning_rate=0.4, warmup=0.25, weight_decay=0.5)
    pair, matrix, vector = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (3, 2), (3,)))
    optimizer, schedule = make_optimizer(section, 8, [pair], [matrix, vector])
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.4])
    decays = {id(tensor): group["weight_decay"] for group in optimizer.param_groups for tensor in group["params"]}
    assert decays == {id(pair): 0.5, id(matrix): 0.5, id(vector): 0.0}


def test_without_warmup_or_whole_tensors():
    section = TrainingSection(warmup=0.0)
    optimizer, _ = make_optimizer(section, 30, [torch.nn.Parameter(torch.zeros(2, 2))], [])
    assert [group["lr"] for group in optimizer.param_groups] == [section.learning_rate]
