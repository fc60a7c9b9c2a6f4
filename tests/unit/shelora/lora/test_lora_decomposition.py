from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.lora import basis, canonical, reparameterize
from shelora.lora.decomposition import decompose

BOUND = 1e-12
REAL = np.linalg.svd


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[tuple[int, ...]]]:
    """Lets the library fail so many times; gives the shapes it was asked for."""

    def fail(times: int) -> list[tuple[int, ...]]:
        asked: list[tuple[int, ...]] = []

        def svd(matrix, *arguments, **options):
            asked.append(matrix.shape)
            if len(asked) <= times:
                raise np.linalg.LinAlgError("SVD did not converge")
            return REAL(matrix, *arguments, **options)

        monkeypatch.setattr(np.linalg, "svd", svd)
        return asked

    return fail


def check(matrix: np.ndarray) -> None:
    left, energy, right = decompose(matrix)
    k = min(matrix.shape)
    assert (left.shape, energy.shape, right.shape) == ((matrix.shape[0], k), (k,), (k, matrix.shape[1]))
    size = max(1.0, float(np.abs(matrix).max(initial=0.0)))
    np.testing.assert_allclose((left * energy) @ right, matrix, atol=BOUND * size)
    np.testing.assert_allclose(left.T @ left, np.eye(k), atol=BOUND)
    np.testing.assert_allclose(right @ right.T, np.eye(k), atol=BOUND)
    assert (np.diff(energy) <= 0).all()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_any_matrix_is_put_together_again(m, n, rank, entropy):
    rng = np.random.default_rng(entropy)
    check(rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)))


@pytest.mark.parametrize("shape", [(6, 5), (5, 6), (5, 5)])
@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_decomposition_that_does_not_converge_is_made_another_way(failing, shape, failures):
    asked = failing(failures)
    check(np.random.default_rng(0).normal(size=shape))
    assert len(asked) == failures + 1
    assert asked[-1] == (shape, (min(shape), shape[1]), shape[::-1])[failures]


def test_what_converges_in_no_way_is_told(failing):
    asked = failing(3)
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        decompose(np.eye(4))
    assert len(asked) == 3


def test_the_algebra_survives_a_failure(failing):
    rng = np.random.default_rng(1)
    b, a = rng.normal(size=(7, 3)), rng.normal(size=(3, 6))
    failing(1)
    factors = canonical(b, a, 2.0)
    np.testing.assert_allclose(factors.left @ factors.right, 2.0 * b @ a, atol=BOUND * 100)
    failing(1)
    directions = basis([b], [1.0], 3)
    np.testing.assert_allclose(directions @ (directions.T @ b), b, atol=BOUND * 100)
    failing(1)
    adapter = reparameterize(directions, directions.T @ b @ a, 3, 0.5, np.zeros((3, 6)))
    np.testing.assert_allclose(0.5 * adapter.b @ adapter.a, b @ a, atol=BOUND * 100)
