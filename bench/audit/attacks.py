"""Span checks in numpy: which tokens' vectors lie in the space that an update reveals (DAGER, Petrov et al. 2024).

The gradient of a linear layer's weights is a sum over tokens of (output gradient) x (input). Its rows therefore lie
in the span of the layer's inputs, and in a model's first layers the input of a token depends on the token and its
place alone. An attacker computes these vectors for the whole vocabulary and keeps those within a small distance of
the span. With LoRA the gradient of A spans at most min(rank, tokens) dimensions of that space.

A distance is relative: 0 in the span, 1 orthogonal to it. Matrices of spans have orthonormal rows of full width;
columns that an attacker leaves out are zero there and in its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from bench.audit.wire import Float32, Float64, Int64, Sight

Mask = npt.NDArray[np.bool_]

NUMERIC_RANKS: Final = (1e-6, 1e-4, 1e-2, 0.1, 0.3)
"""Where an attacker cuts a spectrum, relative to its largest value; every attack is run with each and the best counts.

float32 on the wire leaves noise of about 1e-7, so the first is the exact span.
"""

EXACT: Final = NUMERIC_RANKS[0]

_TINY: Final = 1e-20


@dataclass(frozen=True, eq=False)
class Span:
    """A space to check candidates against, in versions of falling size.

    Attributes:
        rows: float64[d, n], orthonormal, the strongest first.
        cuts: how many of the rows each version keeps.
        mask: bool[n], the columns that are compared.
    """

    rows: Float64
    cuts: tuple[int, ...]
    mask: Mask


def strongest(rows: Float64, scale: float | None = None) -> tuple[Float64, tuple[int, ...]]:
    """Orthonormal directions of some rows by falling singular value, and how many are above each numeric rank.

    Args:
        rows: float64[r, n].
        scale: what the numeric ranks are relative to; None takes the largest singular value.
    """
    _, energy, directions = np.linalg.svd(rows, full_matrices=False)
    largest = max(energy.max(initial=0.0) if scale is None else scale, _TINY)
    cuts = tuple(int(np.count_nonzero(energy > tolerance * largest)) for tolerance in NUMERIC_RANKS)
    return directions[: cuts[0]], cuts


def gradient_span(gradient: Float64, columns: Int64, *, zeroed: bool = False) -> Span:
    """Span of an exact gradient of A, of which only some columns are known: what a server sees that is sent A itself.

    Args:
        gradient: float64[r, n].
        columns: the columns that are not hidden.
        zeroed: take hidden columns for zeros instead of leaving them out.
    """
    return _spread(*strongest(gradient[:, columns]), columns, gradient.shape[1], zeroed)


def right_span(sight: Sight, columns: Int64, start: Float64 | None, *, zeroed: bool = False) -> Span:
    """Span of the plain right columns on the wire.

    Args:
        sight: what the aggregator holds.
        columns: for every wire position that is sent, the column that the attacker takes it for.
        start: float64[r, n], the A that the agent started from, if the attacker knows it; its span is part of every
            update, so it is split off and added whole.
        zeroed: take hidden columns for zeros instead of leaving them out.
    """
    rows = np.linalg.norm(sight.left, axis=0)[:, None] * sight.right
    if start is None:
        return _spread(*strongest(rows), columns, sight.width, zeroed)
    return _spread(*_beyond(start[:, columns], rows), columns, sight.width, zeroed)


def join(spans: Sequence[Span]) -> Span:
    """The sum of exact spaces on the columns that all of them have, for modules that read the same input."""
    mask = np.logical_and.reduce([span.mask for span in spans])
    rows, cuts = strongest(np.vstack([span.rows[: span.cuts[0], mask] for span in spans]))
    return _spread(rows, cuts[:1], np.flatnonzero(mask), mask.size, False)


def distances(candidates: Float32, span: Span, dimensions: int | None = None) -> list[Float32]:
    """Relative distances of all candidates to each version of a span.

    Args:
        candidates: float32[places, vocabulary, n].
        span: of width n.
        dimensions: of the space that all candidates lie in; None takes the number of compared columns.

    Returns:
        float32[places, vocabulary] a version, 0 to 1; all 1 where the span fills that space, so that every candidate
        lies in it.
    """
    compared = min(int(span.mask.sum()), span.mask.size if dimensions is None else dimensions)
    energy = np.maximum(np.square(candidates) @ span.mask.astype(np.float32), _TINY, dtype=np.float32)
    most = max((cut for cut in span.cuts if cut < compared), default=0)
    inside = candidates @ np.ascontiguousarray(span.rows[:most].T, dtype=np.float32)
    np.square(inside, out=inside)
    sums, summed, done = {0: np.zeros_like(energy)}, np.zeros_like(energy), 0
    for cut in sorted({cut for cut in span.cuts if 0 < cut < compared}):
        summed = summed + inside[..., done:cut].sum(axis=-1)
        sums[cut], done = summed, cut
    return [
        np.sqrt(np.clip(1 - sums[cut] / energy, 0, 1), dtype=np.float32) if cut < compared else np.ones_like(energy)
        for cut in span.cuts
    ]


def gram(sight: Sight) -> Float64:
    """Gram matrix of the hidden columns, which orthonormal rows give away: I - right @ right.T, float64[r, r]."""
    return np.eye(sight.rank) - sight.right @ sight.right.T


def sketch(candidates: Float32, start: Float64) -> Float32:
    """What tokens look like in a first-round update, for an attacker who knows the A of the start.

    With B = 0 at the start one gradient step leaves A as it is and makes B's rows mixes of x A^T. So the rows of B A
    lie in the span of x A^T A: T dimensions for T tokens, however few columns are plain.

    Args:
        candidates: float32[places, vocabulary, n].
        start: float64[r, n].

    Returns:
        float32[places, vocabulary, n], to be compared with `right_span` without a start.
    """
    rows = start.astype(np.float32)
    return np.asarray((candidates @ rows.T) @ rows, dtype=np.float32)


def hidden_column(sight: Sight) -> Float64:
    """The only hidden column up to its sign, float64[r], from the Gram matrix of rank one."""
    values, vectors = np.linalg.eigh(gram(sight))
    column: Float64 = vectors[:, -1] * np.sqrt(max(float(values[-1]), 0.0))
    return column


def gram_distances(candidates: Float32, sight: Sight, columns: Int64, start: Float64 | None) -> Float32:
    """Distances that also check lengths: a candidate's hidden part must be as long as the Gram matrix says.

    A vector x in the span is a @ right (+ b @ start); the visible columns give a and b, and then the length of the
    hidden part is known without knowing the hidden columns.

    Args:
        candidates: float32[places, vocabulary, n].
        sight: what the aggregator holds.
        columns: as in `right_span`; the attacker knows the order.
        start: as in `right_span`.

    Returns:
        float32[places, vocabulary]; all 1 where the visible columns do not determine the coefficients.
    """
    known = np.zeros((0, sight.width)) if start is None else start
    visible = np.vstack([sight.right, known[:, columns]])
    if visible.shape[0] > visible.shape[1]:
        return np.ones(candidates.shape[:2], dtype=np.float32)
    hidden = np.setdiff1d(np.arange(sight.width), columns)
    inverse = np.linalg.pinv(visible, rcond=1e-7)
    leak = gram(sight)
    found = np.empty(candidates.shape[:2], dtype=np.float32)
    for place, vectors in enumerate(candidates.astype(np.float64)):
        weights = vectors[:, columns] @ inverse
        residual = np.square(vectors[:, columns] - weights @ visible).sum(axis=1)
        ours, theirs = weights[:, : sight.rank], weights[:, sight.rank :]
        expected = np.square(vectors[:, hidden] - theirs @ known[:, hidden]).sum(axis=1)
        mismatch = np.abs(np.einsum("vi,ij,vj->v", ours, leak, ours) - expected)
        found[place] = np.sqrt((residual + mismatch) / np.maximum(np.square(vectors).sum(axis=1), _TINY))
    return np.minimum(found, 1)


def left_distances(left: Float64, vectors: Float32, heads: int, start: Float64 | None = None) -> list[Float32]:
    """Check the left factor of a query (key) projection against keys (queries), head by head.

    The gradient at a head's queries is a mix of the keys of the text, weights summing to 0, and the gradient at its
    keys a mix of the queries. So in the first round, where B starts at 0, these rows of the left factor span what the
    tokens project to, and no right factor is needed.

    Args:
        left: float64[m, r], rows of one projection.
        vectors: float32[places, vocabulary, m], the other projection's outputs, for the query's gradient less that of
            the first token.
        heads: attention heads, m / heads rows each.
        start: float64[m, r], the same rows of the B that the agent started from, if the attacker knows it.

    Returns:
        float32[places, vocabulary] a numeric rank, the mean over the heads whose span is not full; all 1 without such a
        head.
    """
    width = left.shape[0] // heads
    totals: list[Float32] = [np.zeros(vectors.shape[:2], dtype=np.float32) for _ in NUMERIC_RANKS]
    used = [0] * len(NUMERIC_RANKS)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        rows = left[part].T
        found_rows, cuts = strongest(rows) if start is None else _beyond(start[part].T, rows)
        span = Span(found_rows, cuts, np.ones(width, dtype=bool))
        for version, found in enumerate(distances(np.ascontiguousarray(vectors[:, :, part]), span)):
            if span.cuts[version] < width:
                totals[version] += found
                used[version] += 1
    return [
        np.divide(total, count, dtype=np.float32) if count else np.ones_like(total)
        for total, count in zip(totals, used, strict=True)
    ]


def _beyond(known: Float64, rows: Float64) -> tuple[Float64, tuple[int, ...]]:
    """Directions of known rows, then those that other rows add to them, with the cuts of `strongest`."""
    given, counts = strongest(known)
    given = given[: counts[0]]
    largest = float(np.linalg.norm(rows, 2)) if rows.size else 0.0
    new, cuts = strongest(rows - (rows @ given.T) @ given, largest)
    return np.vstack([given, new]), tuple(len(given) + cut for cut in cuts)


def _spread(rows: Float64, cuts: tuple[int, ...], columns: Int64, width: int, zeroed: bool) -> Span:
    """Rows over some columns as rows over all."""
    wide = np.zeros((rows.shape[0], width))
    wide[:, columns] = rows
    mask = np.ones(width, dtype=bool)
    if not zeroed:
        mask[:] = False
        mask[columns] = True
    return Span(wide, cuts, mask)
