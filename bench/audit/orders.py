"""Attacks on the secret column order: both see columns in wire order and look for the columns' true indices."""

from __future__ import annotations

from typing import Final

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # comes without types

from bench.audit.wire import Float64, Int64

_SPREAD: Final = 0.2
_SIZE_WEIGHT: Final = 20.0
_REFINEMENTS: Final = 30
_ITERATIONS: Final = 300


def link(known: Float64, seen: Float64) -> Int64:
    """Match columns of one round with those of another by their content.

    Successive updates of an agent hardly differ, so a column of a later round lies nearest to itself.

    Args:
        known: float64[m, n], an update or average in the order of one round.
        seen: float64[m, n], an update in the order of another.

    Returns:
        int64[n]: for every position of `seen` the position of `known`.
    """
    cost = np.square(seen).sum(axis=0)[:, None] - 2 * seen.T @ known + np.square(known).sum(axis=0)[None]
    return _assign(-cost)


def match_statistics(seen: Float64, public: Float64) -> Int64:
    """Match second moments of columns with those of a public corpus: spectral graph matching, then refinement.

    Args:
        seen: float64[n, n], second moment of what was seen over the rounds, in wire order.
        public: float64[n, n], second moment of the layer's inputs on public texts, in true order.

    Returns:
        int64[n]: for every wire position the column it is taken for.

    Source: Fan, Mao, Wu, Xu 2020, spectral graph matching by pairwise eigen-alignments (GRAMPA).
    """
    ours, our_size = _correlations(seen)
    theirs, their_size = _correlations(public)
    values, vectors = np.linalg.eigh(ours / np.linalg.norm(ours, 2))
    others, other_vectors = np.linalg.eigh(theirs / np.linalg.norm(theirs, 2))
    weights = 1 / (np.square(values[:, None] - others[None]) + _SPREAD**2)
    ones = np.ones_like(weights)
    guess = _assign(vectors @ (weights * (vectors.T @ ones @ other_vectors)) @ other_vectors.T)
    size = np.square(np.log(our_size / our_size.mean())[:, None] - np.log(their_size / their_size.mean())[None])
    for _ in range(_REFINEMENTS):
        alike = (
            2 * ours @ theirs[:, guess].T - np.square(ours).sum(axis=1)[:, None] - np.square(theirs).sum(axis=1)[None]
        )
        better = _assign(alike - _SIZE_WEIGHT * size)
        if np.array_equal(better, guess):
            break
        guess = better
    return guess


def match_known_vector(
    span: Float64, vector: Float64, generator: np.random.Generator, tries: int = 200
) -> tuple[Int64, float]:
    """Find the order in which a known vector lies in a known span, by alternating sorting and projection.

    Every text of an encoder opens with the same token at the same place, whose first-layer input anybody can compute. A
    span of few dimensions holds hardly any reordering of it but the true one.

    Args:
        span: float64[d, n], orthonormal rows in wire order.
        vector: float64[n] in true order.
        generator: of starting points.
        tries: starting points.

    Returns:
        int64[n], for every wire position the column it is taken for, and the relative residual: near 0 when found.
    """
    ascending, columns = np.sort(vector), np.argsort(vector)
    norm = float(np.linalg.norm(vector))
    starts = [sign * row for row in span[:2] for sign in (1.0, -1.0)]
    starts += [generator.normal(size=len(span)) @ span for _ in range(tries)]
    best, residual = columns, np.inf
    for start in starts:
        point, ranks = start, np.argsort(np.argsort(start))
        for _ in range(_ITERATIONS):
            projected = (ascending[ranks] @ span.T) @ span
            if np.allclose(projected, point, rtol=0, atol=1e-12):
                break
            point, ranks = projected, np.argsort(np.argsort(projected))
        left = float(np.linalg.norm(ascending[ranks] - (ascending[ranks] @ span.T) @ span)) / norm
        if left < residual:
            best, residual = columns[ranks], left
        if residual < 1e-4:
            break
    return best, residual


def _assign(score: Float64) -> Int64:
    """The one-to-one assignment of largest total score: for every row its column."""
    chosen: Int64 = linear_sum_assignment(score, maximize=True)[1]
    return chosen


def _correlations(moment: Float64) -> tuple[Float64, Float64]:
    size = np.sqrt(np.maximum(np.diag(moment), 1e-30))
    return moment / np.outer(size, size), size
