"""Errors against rounds computed with and without rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest

from services.operators.planning import USUAL_PARAMETERS, Terms, explain, imagine, parse_shapes
from services.operators.planning.precision import precision_of
from shelora.lora import basis, canonical, cipher_part, project
from shelora.plan import Packing, agree_ranges, dense_error, dequantise, quantise

SHAPES = parse_shapes("1*160x240")


def round_of(packing: Packing, members: int, rank: int) -> tuple[float, float, float]:
    """Frobenius error over the norm of the average, largest error of an entry, and E of a round without HE noise."""
    rng = np.random.default_rng(11)
    common = rng.normal(size=(160, rank)), rng.normal(size=(rank, 240))
    factors = [
        canonical(common[0] + 0.3 * rng.normal(size=(160, rank)), common[1] + 0.3 * rng.normal(size=(rank, 240)), 0.01)
        for _ in range(members)
    ]
    weight = 1 / members
    lefts = [one.left.astype(np.float32) for one in factors]
    directions = basis(lefts, [weight] * members, rank * members).astype(np.float32)
    projections = [project(directions, left).astype(np.float32) for left in lefts]
    parts = [
        cipher_part(one.astype(np.float64), own.right, weight) for one, own in zip(projections, factors, strict=True)
    ]
    if packing is Packing.DENSE:
        ranges = agree_ranges(projections, [weight] * members)
        whole = [quantise("m", part, one, weight, ranges) for part, one in zip(parts, projections, strict=True)]
        core = dequantise("m", np.sum(whole, axis=0), ranges)
    else:
        core = np.sum(parts, axis=0)
    wanted = sum(weight * one.left @ one.right for one in factors)
    difference = directions.astype(np.float64) @ core - wanted
    energy = sum(weight * float(np.linalg.norm(one.left)) for one in factors)
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted)), float(np.abs(difference).max()), energy


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize(("members", "rank"), [(4, 4), (16, 8)])
def test_a_round_stays_within_the_bound_and_near_what_is_usual(packing, members, rank) -> None:
    relative, entry, energy = round_of(packing, members, rank)
    said = precision_of(SHAPES, (rank * members,), packing, USUAL_PARAMETERS, members)
    assert entry <= said.bound * energy
    assert said.typical / 3 < relative < 3 * said.typical


def test_figures_of_the_method_page() -> None:
    """docs/method.md section 8: 1e-6 E for float32 at s = 64, 1.6e-10 and 1e-8 for CKKS, 5.0e-6 for dense packing."""
    shapes = parse_shapes("1*3200x3200,dense*10")
    exact = precision_of(shapes, (64,), Packing.EXACT, USUAL_PARAMETERS, 1)
    assert exact.bound == pytest.approx(2.0**-24 * 20)
    assert exact.bound == pytest.approx(1.2e-6, rel=0.01)
    assert exact.dense_tensor_bound == pytest.approx(1.6e-10, rel=0.02)
    assert exact.cipher_bound == pytest.approx(8 * exact.dense_tensor_bound)
    dense = precision_of(shapes, (16,), Packing.DENSE, USUAL_PARAMETERS, 4)
    assert dense.bound == pytest.approx(2 * dense_error(USUAL_PARAMETERS, 4) + 2.0**-24 * 12)
    assert dense.cipher_bound == 0.0
    assert 7.9e-5 / 2 < dense.typical < 7.9e-5 * 2, "measured there through the real cipher"


def test_nothing_but_dense_tensors_has_the_cipher_error_alone() -> None:
    said = precision_of(parse_shapes("dense*10"), (), Packing.EXACT, USUAL_PARAMETERS, 3)
    assert (said.bound, said.typical, said.cipher_bound) == (0.0, 0.0, 0.0)
    assert said.dense_tensor_bound == USUAL_PARAMETERS.error_bound(3)


@pytest.mark.parametrize(
    ("ranks", "cap", "kept", "excess", "words"),
    [
        ([4] * 4, 0, 1.0, None, "the average is exact"),
        (
            [4] * 8,
            0,
            0.5,
            (0.0015, 0.003),
            "the 16 strongest of up to 32 directions; of 20 correlated agents a fit at 4 x the largest rank was 0.15%",
        ),
        ([4] * 8, 24, 0.75, (0.0015, 0.003), "fit at 4 x"),
        ([8] * 8, 31, 31 / 64, (0.005, 0.016), "fit at 3 x"),
        ([8] * 8, 16, 0.25, (0.019, 0.060), "fit at 2 x"),
        ([8] * 8, 8, 0.125, None, "not measured below"),
        ([4] * 8, 32, 1.0, None, "exact"),
    ],
)
def test_what_a_cap_costs(ranks, cap, kept, excess, words) -> None:
    found = explain(SHAPES, imagine(SHAPES, ranks, ["full"]), Terms(cap=cap)).basis
    assert found.exact is (kept == 1.0)
    assert found.kept_share == pytest.approx(kept)
    assert found.excess == excess
    assert words in found.verdict
    assert found.rank_sum == sum(ranks)


def test_a_narrow_module_needs_no_more_directions_than_it_has() -> None:
    shapes = parse_shapes("8x16")
    assert explain(shapes, imagine(shapes, [8, 8], ["full"])).basis.exact
    assert math.isclose(explain(shapes, imagine(shapes, [8, 8], ["full"])).basis.rows[0], 8)
