"""Attacks on updates made by hand, where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from bench.audit.attacks import (
    distances,
    gradient_span,
    gram_distances,
    hidden_column,
    join,
    left_distances,
    right_span,
    sketch,
)
from bench.audit.scores import THRESHOLD
from bench.audit.wire import Sight
from shelora.lora import canonical

WIDTH, VOCABULARY, TOKENS, RANK = 96, 300, 10, 16
PLANTED = np.arange(0, 10 * TOKENS, 10)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def embeddings(generator):
    return generator.normal(size=(1, VOCABULARY, WIDTH)).astype(np.float32)


@pytest.fixture
def gradient(generator, embeddings):
    """Of A: a mix of the planted tokens' vectors."""
    return generator.normal(size=(RANK, TOKENS)) @ embeddings[0, PLANTED].astype(np.float64)


def sight(b, a, hidden: int = 0) -> Sight:
    """What is sent of an update, columns in true order, as float32."""
    factors = canonical(b, a, 1.0)
    left, right = (part.astype(np.float32).astype(np.float64) for part in (factors.left, factors.right))
    return Sight(left, right[:, hidden:], WIDTH)


def found(distances_of_versions, threshold: float = THRESHOLD) -> list[int]:
    return np.flatnonzero(distances_of_versions[0][0] < threshold).tolist()


def test_the_gradient_gives_exactly_the_planted_tokens(embeddings, gradient) -> None:
    assert found(distances(embeddings, gradient_span(gradient, np.arange(WIDTH)))) == PLANTED.tolist()


@pytest.mark.parametrize(
    ("hidden", "leaks"), [(1, True), (60, True), (WIDTH - TOKENS - 1, True), (WIDTH - TOKENS, False)]
)
def test_dropped_columns_leak_until_the_span_fills_the_rest(embeddings, gradient, hidden, leaks) -> None:
    columns = np.arange(hidden, WIDTH)
    versions = distances(embeddings, gradient_span(gradient, columns))
    nearest = set(np.argsort(versions[0][0], kind="stable")[:TOKENS].tolist())
    assert (nearest == set(PLANTED.tolist())) == leaks
    assert leaks or versions[0].min() == 1


def test_zeroed_columns_look_safe_under_the_published_threshold(embeddings, gradient) -> None:
    columns = np.arange(1, WIDTH)
    assert found(distances(embeddings, gradient_span(gradient, columns, zeroed=True))) == []
    nearest = np.argsort(distances(embeddings, gradient_span(gradient, columns, zeroed=True))[0][0])[:TOKENS]
    assert set(nearest.tolist()) == set(PLANTED.tolist()), "yet the nearest candidates are the right ones"


@pytest.fixture
def update(generator, gradient):
    """A later round's step: (start of A, sight with nothing hidden, the factors sent)."""
    start = generator.normal(size=(RANK, WIDTH))
    b = generator.normal(size=(WIDTH, RANK))
    return start, b + 0.1 * generator.normal(size=b.shape), start + 0.1 * gradient


def test_the_wire_gives_the_tokens_to_who_knows_order_and_start(embeddings, update) -> None:
    start, b, a = update
    sent = sight(b, a)
    assert found(distances(embeddings, right_span(sent, np.arange(WIDTH), start))) == PLANTED.tolist()
    assert found(distances(embeddings, right_span(sent, np.arange(WIDTH), None))) == [], "the start is needed"


def test_without_the_order_nothing_comes_back(generator, embeddings, update) -> None:
    start, b, a = update
    order = generator.permutation(WIDTH)
    sent = sight(b, a[:, order])
    assert found(distances(embeddings, right_span(sent, np.arange(WIDTH), start))) == []
    assert found(distances(embeddings, right_span(sent, order, start))) == PLANTED.tolist()


def test_a_first_round_leaks_to_who_knows_the_initial_a(generator, embeddings) -> None:
    start = generator.normal(size=(RANK, WIDTH))
    outputs = generator.normal(size=(WIDTH, TOKENS))
    b = outputs @ embeddings[0, PLANTED].astype(np.float64) @ start.T
    hidden = WIDTH - TOKENS - 2
    sent = sight(b, start, hidden)
    columns = np.arange(hidden, WIDTH)
    seen = sketch(embeddings, start)
    assert found(distances(seen, right_span(sent, columns, None), RANK)) == PLANTED.tolist()
    assert found(distances(embeddings, right_span(sent, columns, None))) == []


def test_joined_modules_hold_more_tokens_than_the_rank_of_one(generator, embeddings) -> None:
    rank = TOKENS // 2
    tokens = embeddings[0, PLANTED].astype(np.float64)
    spans = [gradient_span(generator.normal(size=(rank, TOKENS)) @ tokens, np.arange(WIDTH)) for _ in range(2)]
    assert found(distances(embeddings, spans[0])) == []
    assert found(distances(embeddings, join(spans))) == PLANTED.tolist()


def test_joining_keeps_only_columns_that_all_have(generator, embeddings) -> None:
    tokens = embeddings[0, PLANTED].astype(np.float64)
    columns = (np.arange(20, WIDTH), np.arange(WIDTH - 20))
    joined = join([gradient_span(generator.normal(size=(RANK, TOKENS)) @ tokens, part) for part in columns])
    assert np.flatnonzero(joined.mask).tolist() == list(range(20, WIDTH - 20))
    assert found(distances(embeddings, joined)) == PLANTED.tolist()


def test_a_single_hidden_column_is_known_up_to_its_sign(update) -> None:
    _, b, a = update
    truth = sight(b, a).right[:, 0]
    guess = hidden_column(sight(b, a, hidden=1))
    assert min(np.abs(guess - truth).max(), np.abs(guess + truth).max()) < 1e-5


def test_lengths_of_hidden_parts_are_one_more_equation(embeddings, gradient) -> None:
    b = np.random.default_rng(1).normal(size=(WIDTH, RANK))
    a = np.vstack([gradient[:TOKENS], np.random.default_rng(2).normal(size=(RANK - TOKENS, WIDTH))])
    exact = WIDTH - RANK
    sent, columns = sight(b, a, exact), np.arange(exact, WIDTH)
    assert distances(embeddings, right_span(sent, columns, None))[0].min() == 1, "the span fills what is plain"
    assert np.flatnonzero(gram_distances(embeddings, sent, columns, None)[0] < THRESHOLD).tolist() == PLANTED.tolist()


def test_left_factors_alone_give_the_tokens_of_few_keys(generator) -> None:
    heads, width, tokens = 4, 24, 8
    keys = generator.normal(size=(1, VOCABULARY, heads * width)).astype(np.float32)
    planted = keys[0, PLANTED[:tokens]].astype(np.float64)
    left = np.vstack(
        [
            planted[:, head * width : (head + 1) * width].T @ generator.normal(size=(tokens, RANK))
            for head in range(heads)
        ]
    )
    assert found(left_distances(left, keys, heads)) == PLANTED[:tokens].tolist()
    many = generator.normal(size=(heads * width, 2 * width))
    assert left_distances(many, keys, heads)[0].min() == 1, "more dimensions than a head has show nothing"


def test_left_factors_of_a_later_round_need_the_start(generator) -> None:
    width, tokens, rank = 24, 8, 10
    keys = generator.normal(size=(1, VOCABULARY, width)).astype(np.float32)
    start = generator.normal(size=(width, rank))
    left = start + keys[0, PLANTED[:tokens]].astype(np.float64).T @ generator.normal(size=(tokens, rank))
    assert found(left_distances(left, keys, 1)) == []
    assert found(left_distances(left, keys, 1, start)) == PLANTED[:tokens].tolist()
