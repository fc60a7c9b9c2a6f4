from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import InternalFault, SelfTestFailed
from shelora.he.secret.template import ResidueTemplate

N = 64
Q = 1152921504606830593


def serialize(seed: int, *, head: bytes = b"head", gap: bytes = b"gap", modulus: int = Q, regions: int = 2) -> bytes:
    """What the library writes, in small: count, residues, modulus, fixed bytes; the count is in the head too."""
    residues = np.random.default_rng(seed).integers(0, Q, (regions, N), dtype=np.uint64)
    marker, end = N.to_bytes(8, "little"), modulus.to_bytes(8, "little")
    return marker + head + gap.join(marker + region.tobytes() + end for region in residues) + b"tail"


def find(first: bytes, second: bytes, regions: int = 2) -> ResidueTemplate:
    return ResidueTemplate.find(first, second, ring_dimension=N, regions=regions)


@settings(max_examples=50, deadline=None)
@given(
    head=st.binary(max_size=40),
    gap=st.binary(max_size=20),
    regions=st.integers(1, 3),
    seed=st.integers(0, 2**32),
)
def test_regions_are_found_and_survive_the_round_trip(head: bytes, gap: bytes, regions: int, seed: int) -> None:
    one, other, third = (serialize(seed + i, head=head, gap=gap, regions=regions) for i in range(3))
    template = find(one, other, regions)
    assert template.modulus == Q
    assert template.length_bytes == len(one)
    out = np.empty((regions, N), dtype=np.uint64)
    template.extract(third, out)
    np.testing.assert_array_equal(out, np.random.default_rng(seed + 2).integers(0, Q, (regions, N), dtype=np.uint64))
    assert template.splice(out) == third
    assert template.splice(np.asfortranarray(out)) == third


def test_template_keeps_no_residues() -> None:
    template = find(serialize(1), serialize(2))
    assert sum(map(len, template.pieces)) == template.length_bytes - 2 * template.region_bytes


@pytest.mark.parametrize(
    "second",
    [
        serialize(1),
        serialize(2) + b"x",
        serialize(2, regions=1),
        serialize(2, head=b"other"),
        serialize(2, modulus=Q + 2),
        serialize(2)[: N * 8],
        b"",
    ],
    ids=["equal", "longer", "one-region", "shifted", "other-modulus", "cut", "empty"],
)
def test_unexpected_structure_is_refused(second: bytes) -> None:
    with pytest.raises(SelfTestFailed, match="serialized objects: expected equal lengths and 2 residue regions"):
        find(serialize(1), second)


def test_changing_header_is_refused() -> None:
    with pytest.raises(SelfTestFailed, match="identical bytes around the residues"):
        find(serialize(1, head=b"tag1"), serialize(2, head=b"tag2"))


def test_two_moduli_are_refused() -> None:
    first, second = serialize(1), serialize(2)
    cut = len(first) - len(b"tail") - 8
    changed = [data[:cut] + (Q + 2).to_bytes(8, "little") + b"tail" for data in (first, second)]
    with pytest.raises(SelfTestFailed, match="one modulus"):
        find(changed[0], changed[1])


@pytest.mark.parametrize(
    "serialized",
    [serialize(3) + b"x", serialize(3)[:-1], serialize(3, head=b"HEAD"), serialize(3, gap=b"GAP"), b""],
    ids=["longer", "shorter", "head", "gap", "empty"],
)
def test_objects_of_another_layout_are_not_read(serialized: bytes) -> None:
    template = find(serialize(1), serialize(2))
    out = np.zeros((2, N), dtype=np.uint64)
    with pytest.raises(InternalFault, match="layout found at start-up"):
        template.extract(serialized, out)
    assert not out.any()


def test_template_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        find(serialize(1), serialize(2)).modulus = 3  # type: ignore[misc]
