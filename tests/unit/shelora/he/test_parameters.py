from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import InvalidConfiguration, ValueOutOfRange
from shelora.he import CkksParameters
from shelora.he.parameters import standard_security_bits

MODULUS = 1152921504606830593
SMALL_MODULUS = 132120577  # 27 bits, 1 modulo 2048
WIDE_MODULUS = (1 << 60) - (1 << 14) + 1  # 60 bits, 1 modulo 16384


def build(**changes: Any) -> CkksParameters:
    return CkksParameters(**{"modulus": MODULUS, **changes})


def small() -> CkksParameters:
    return CkksParameters(modulus=SMALL_MODULUS, ring_dimension=1024, modulus_bits=27, scale_bits=20)


def test_sizes_follow_from_the_ring() -> None:
    parameters = build()
    assert parameters.values_per_block == 4096
    assert parameters.block_bytes == 65536
    assert parameters.key_residue_bytes == 32768
    assert parameters.max_abs_value == 256.0


def test_range_leaves_room_below_half_the_modulus_and_is_the_largest_power_of_two() -> None:
    for parameters in (build(), build(scale_bits=40), small()):
        largest = math.sqrt(2.0) * parameters.max_abs_value * 2.0**parameters.scale_bits
        assert largest < parameters.modulus / 2 <= 2.0 * largest


@given(count=st.integers(0, 10**9))
def test_blocks_hold_all_values_and_no_block_is_empty(count: int) -> None:
    blocks = build().blocks_for(count)
    assert blocks * 4096 >= count
    assert (blocks - 1) * 4096 < max(count, 1)


def test_negative_count_is_refused() -> None:
    with pytest.raises(ValueOutOfRange, match="got -1"):
        build().blocks_for(-1)


def test_documented_error_bounds() -> None:
    parameters = build()
    assert parameters.noise_deviation() == pytest.approx(9.5e-12, rel=0.01)
    assert parameters.noise_deviation(100) == pytest.approx(10 * parameters.noise_deviation())
    assert parameters.error_bound() == pytest.approx(1.6e-10, rel=0.01)
    assert parameters.error_bound(4000) < 1e-8


def test_digest_depends_on_every_field() -> None:
    digests = {
        parameters.digest()
        for parameters in (
            build(),
            build(scale_bits=49),
            build(modulus=MODULUS - 8192),
            build(ring_dimension=8192, modulus=WIDE_MODULUS),
            build(ring_dimension=8192, modulus=WIDE_MODULUS, security_bits=192),
            small(),
        )
    }
    assert len(digests) == 6
    assert all(len(digest) == 32 for digest in digests)
    assert build().digest() == build().digest()


def test_digest_is_stable_across_releases() -> None:
    assert build().digest().hex() == "4f4594c5932b93742b5ec6d538dce65df575664abb9b3e758c8ea7a66a22db9f"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("security_bits", {"security_bits": 100}),
        ("ring_dimension", {"ring_dimension": 4095}),
        ("ring_dimension", {"ring_dimension": 0}),
        ("ring_dimension", {"ring_dimension": 1 << 40}),
        ("modulus_bits", {"modulus_bits": 61}),
        ("modulus_bits", {"modulus_bits": 1}),
        ("modulus_bits", {"ring_dimension": 2048}),
        ("modulus_bits", {"security_bits": 256}),
        ("modulus", {"modulus": 0}),
        ("modulus", {"modulus": -MODULUS}),
        ("modulus", {"modulus": MODULUS // 2}),
        ("modulus", {"modulus": MODULUS - 2}),
        ("scale_bits", {"scale_bits": 0}),
        ("scale_bits", {"scale_bits": 60}),
        ("scale_bits", {"scale_bits": 59}),
        ("depth", {"depth": 1}),
    ],
)
def test_impossible_fields_are_refused_by_name(field: str, changes: dict[str, int]) -> None:
    with pytest.raises(InvalidConfiguration, match=f"CKKS parameter {field}: expected .* got ") as caught:
        build(**changes)
    assert caught.value.context == {"field": field}
    assert caught.value.hint


@pytest.mark.parametrize(
    ("ring_dimension", "modulus_bits", "bits"),
    [(4096, 60, 192), (4096, 58, 256), (4096, 75, 192), (4096, 76, 128), (4096, 110, 0), (2048, 54, 128), (4095, 1, 0)],
)
def test_the_standard_says_how_secure_a_modulus_is(ring_dimension: int, modulus_bits: int, bits: int) -> None:
    assert standard_security_bits(ring_dimension, modulus_bits) == bits
