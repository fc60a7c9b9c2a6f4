from __future__ import annotations

import pytest

from shelora.errors import NonFiniteValue, RankMismatch, ValueOutOfRange
from shelora.lora import lora_scaling


@pytest.mark.parametrize(
    ("alpha", "rank", "rslora", "expected"), [(16.0, 8, False, 2.0), (16.0, 16, True, 4.0), (1.0, 4, False, 0.25)]
)
def test_scaling(alpha, rank, rslora, expected):
    assert lora_scaling(alpha, rank, rslora) == expected


@pytest.mark.parametrize(
    ("alpha", "rank", "error"),
    [(16.0, 0, RankMismatch), (0.0, 4, ValueOutOfRange), (-1.0, 4, ValueOutOfRange), (float("nan"), 4, NonFiniteValue)],
)
def test_refusals(alpha, rank, error):
    with pytest.raises(error):
        lora_scaling(alpha, rank)
