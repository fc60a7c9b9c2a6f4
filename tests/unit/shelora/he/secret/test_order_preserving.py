from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import InvalidConfiguration, ShapeMismatch, ValueOutOfRange
from shelora.he.secret.order_preserving import OrderPreservingScores

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def scores() -> OrderPreservingScores:
    return OrderPreservingScores(KEY)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(0, 1023), max_size=30))
def test_order_and_equality_are_kept(scores: OrderPreservingScores, values: list[int]) -> None:
    plain = np.array(values, dtype=np.int64)
    encrypted = scores.encrypt(plain)
    assert encrypted.dtype == np.int64
    assert encrypted.shape == plain.shape
    assert np.all((encrypted >= 0) & (encrypted < 2**40))
    np.testing.assert_array_equal(
        np.sign(np.subtract.outer(plain, plain)), np.sign(np.subtract.outer(encrypted, encrypted))
    )


def test_agents_with_one_key_agree_and_other_keys_differ(scores: OrderPreservingScores) -> None:
    plain = np.array([[0, 5], [1023, 5]], dtype=np.uint16)
    encrypted = scores.encrypt(plain)
    assert encrypted.shape == (2, 2)
    np.testing.assert_array_equal(encrypted, OrderPreservingScores(KEY).encrypt(plain))
    assert np.any(encrypted != OrderPreservingScores(KEY[::-1]).encrypt(plain))


def test_known_score_is_remembered(scores: OrderPreservingScores, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = np.array([7, 7, 9])
    first = scores.encrypt(plain)
    monkeypatch.setattr(scores._scheme, "encrypt", None)
    np.testing.assert_array_equal(scores.encrypt(plain), first)


@pytest.mark.parametrize("bad", [-1, 1024, 2**40])
def test_scores_beyond_ten_bits_are_refused(scores: OrderPreservingScores, bad: int) -> None:
    with pytest.raises(ValueOutOfRange, match="from 0 to 1023"):
        scores.encrypt(np.array([3, bad]))


def test_other_dtypes_are_refused(scores: OrderPreservingScores) -> None:
    with pytest.raises(ShapeMismatch, match="float64"):
        scores.encrypt(np.array([0.5]))


def test_short_key_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="at least 32 bytes, got 31"):
        OrderPreservingScores(KEY[:31])


def test_key_does_not_leak(scores: OrderPreservingScores) -> None:
    assert repr(scores) == "OrderPreservingScores(<redacted>)"
    for duplicate in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            duplicate(scores)
