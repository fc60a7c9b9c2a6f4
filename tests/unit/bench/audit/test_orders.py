from __future__ import annotations

import numpy as np
import pytest

from bench.audit.orders import link, match_known_vector, match_statistics

WIDTH = 80


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(3)


def test_columns_of_two_rounds_are_linked_by_content(generator) -> None:
    before = generator.normal(size=(30, WIDTH))
    order = generator.permutation(WIDTH)
    after = before[:, order] + 0.1 * generator.normal(size=before.shape)
    assert link(before, after).tolist() == order.tolist()


def test_exact_statistics_give_the_order_and_foreign_ones_do_not(generator) -> None:
    inputs = generator.normal(size=(400, WIDTH)) @ generator.normal(size=(WIDTH, WIDTH))
    moment, order = inputs.T @ inputs, generator.permutation(WIDTH)
    assert match_statistics(moment[np.ix_(order, order)], moment).tolist() == order.tolist()
    foreign = generator.normal(size=(400, WIDTH)) @ generator.normal(size=(WIDTH, WIDTH))
    assert np.mean(match_statistics(foreign.T @ foreign, moment) == order) < 0.2


def test_a_known_vector_gives_the_order_in_a_small_span_only(generator) -> None:
    vector, order = generator.normal(size=WIDTH), generator.permutation(WIDTH)

    def span(dimensions: int):
        rows = np.vstack([vector[order], generator.normal(size=(dimensions - 1, WIDTH))])
        return np.linalg.qr((generator.normal(size=(dimensions, dimensions)) @ rows).T)[0].T

    guess, residual = match_known_vector(span(3), vector, generator)
    assert residual < 1e-4
    assert guess.tolist() == order.tolist()
    guess, residual = match_known_vector(span(40), vector, generator, tries=20)
    assert residual > 1e-4
    assert np.mean(guess == order) < 0.3
