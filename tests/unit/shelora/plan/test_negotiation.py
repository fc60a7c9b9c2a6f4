from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shelora.errors import NonFiniteValue, ShapeMismatch, SizeMismatch, ValueOutOfRange
from shelora.plan import (
    MAX_SCORE,
    DenseShape,
    FederationSeed,
    ModelShapes,
    ModuleShape,
    order_columns,
    pack_scores,
    priorities_digest,
    priorities_from_scores,
    unpack_scores,
)

SHAPES = ModelShapes((ModuleShape("a", 8, 5), ModuleShape("b", 8, 3)), (DenseShape("head", (2,)),))
RESOLUTION = 2.0**-12
scores = hnp.arrays(np.float64, 8, elements=st.floats(0, 100))


def split(values: np.ndarray) -> list[np.ndarray]:
    return [values[:5], values[5:]]


@given(scores)
def test_packed_values_lie_on_the_grid_inside_their_range(values: np.ndarray) -> None:
    packed = pack_scores(SHAPES, split(values))
    assert packed.shape == (8,)
    assert packed.dtype == np.float64
    assert packed.min() >= 0
    assert packed.max() <= 2.0**-4
    assert np.array_equal(packed * 2**22, np.rint(packed * 2**22))


@given(scores)
def test_unpack_gives_the_scores_back_to_the_resolution(values: np.ndarray) -> None:
    found = unpack_scores(SHAPES, pack_scores(SHAPES, split(values)))
    assert [part.size for part in found] == [5, 3]
    assert np.abs(np.concatenate(found) - np.minimum(values, MAX_SCORE)).max() <= RESOLUTION / 2


@given(st.lists(scores, min_size=1, max_size=6), hnp.arrays(np.float64, 8, elements=st.floats(-1.1e-7, 1.1e-7)))
def test_decryption_error_changes_nothing(agents: list[np.ndarray], error: np.ndarray) -> None:
    total = np.sum([pack_scores(SHAPES, split(values)) for values in agents], axis=0)
    for exact, noisy in zip(unpack_scores(SHAPES, total), unpack_scores(SHAPES, total + error), strict=True):
        assert np.array_equal(exact, noisy)
    first, second = priorities_from_scores(SHAPES, total), priorities_from_scores(SHAPES, total - error)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


@given(scores)
def test_priorities_sort_the_sum(values: np.ndarray) -> None:
    total = pack_scores(SHAPES, split(values)) * 3
    for priority, part in zip(priorities_from_scores(SHAPES, total), split(total), strict=True):
        assert np.array_equal(priority, order_columns(part))


def test_ties_go_by_column_index() -> None:
    assert [part.tolist() for part in priorities_from_scores(SHAPES, np.zeros(8))] == [[0, 1, 2, 3, 4], [0, 1, 2]]


def test_the_largest_federation_stays_in_range() -> None:
    highest = pack_scores(SHAPES, split(np.full(8, 1e9)))
    assert (highest == 2.0**-4).all()
    assert (4095 * highest < 2**8).all()


def test_dense_only_models_have_nothing_to_negotiate() -> None:
    shapes = ModelShapes((), (DenseShape("head", (2,)),))
    assert pack_scores(shapes, []).shape == (0,)
    assert unpack_scores(shapes, np.zeros(0)) == []


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        ([np.ones(5)], SizeMismatch),
        ([np.ones(5), np.ones(4)], ShapeMismatch),
        ([np.ones(5), np.ones((3, 1))], ShapeMismatch),
        ([np.ones(5), np.full(3, np.nan)], NonFiniteValue),
        ([np.ones(5), np.full(3, -1.0)], ValueOutOfRange),
    ],
)
def test_pack_refuses_other_scores(parts: list[np.ndarray], error: type[Exception]) -> None:
    with pytest.raises(error):
        pack_scores(SHAPES, parts)


def test_unpack_refuses_other_values() -> None:
    for shape in ((7,), (9,), (8, 1)):
        with pytest.raises(SizeMismatch, match="expected 8 scores"):
            unpack_scores(SHAPES, np.zeros(shape))
    with pytest.raises(NonFiniteValue):
        unpack_scores(SHAPES, np.full(8, np.inf))


def test_priorities_digest_tells_every_difference() -> None:
    seed = FederationSeed(bytes(range(32)))
    lists = [np.arange(5), np.arange(3)]
    digests = [
        priorities_digest(seed, "fed", 1, lists),
        priorities_digest(FederationSeed(bytes(32)), "fed", 1, lists),
        priorities_digest(seed, "other", 1, lists),
        priorities_digest(seed, "fed", 2, lists),
        priorities_digest(seed, "fed", 1, [np.arange(5), np.array([0, 2, 1])]),
        priorities_digest(seed, "fed", 1, [np.arange(5)]),
        priorities_digest(seed, "fed", 1, [np.concatenate(lists)]),
    ]
    assert len(set(digests)) == len(digests)
    assert digests[0] == priorities_digest(seed, "fed", 1, [part.astype(np.int32) for part in lists])
