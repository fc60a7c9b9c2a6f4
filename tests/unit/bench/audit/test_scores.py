from __future__ import annotations

import numpy as np
import pytest

from bench.audit.scores import area_under_curve, recover

VOCABULARY = 40


def far(places: int) -> np.ndarray:
    return np.full((places, VOCABULARY), 0.9, dtype=np.float32)


def test_recall_counts_what_is_nearest_at_its_place() -> None:
    found = far(4)
    found[0, 1] = found[1, 7] = found[2, 8] = 0.001
    got = recover(found, [np.array([1, 7, 8, 30])], given={1})
    assert got.recall == pytest.approx(2 / 3)
    assert got.rouge1 == pytest.approx(2 / 3)
    assert got.rouge2 == pytest.approx(1 / 2)


def test_a_threshold_takes_nothing_above_it() -> None:
    found = far(2)
    found[0, 3], found[1, 4] = 0.005, 0.1
    assert recover(found, [np.array([3, 4])], set()).recall == 1
    assert recover(found, [np.array([3, 4])], set(), threshold=0.01).recall == 0.5


def test_spans_that_say_nothing_recover_nothing() -> None:
    assert recover(np.ones((3, VOCABULARY), dtype=np.float32), [np.array([0, 1, 2])], set()).recall == 0


def test_no_more_picks_than_texts() -> None:
    found = far(1).repeat(2, axis=0)
    found[:, :5] = 0.0
    texts = [np.array([0, 1]), np.array([1, 4])]
    assert recover(found, texts, set()).recall == pytest.approx(3 / 4), "the fifth nearest is not picked"


def test_models_without_places_are_judged_by_their_bag_of_tokens() -> None:
    found = far(1)
    found[0, [5, 6, 7]] = 0.0
    got = recover(found, [np.array([5, 6]), np.array([6, 9])], set())
    assert got.recall == pytest.approx(3 / 4)
    assert got.error > 0


def test_area_under_curve() -> None:
    assert area_under_curve(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert area_under_curve(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert area_under_curve(np.array([0.0]), np.array([1.0, 2.0])) == 0.0
