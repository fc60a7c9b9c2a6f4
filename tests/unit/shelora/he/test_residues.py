from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shelora.errors import MalformedPayload, ResidueOutOfRange, ShapeMismatch, SizeMismatch
from shelora.he import CkksParameters, ResidueSum, add_residues, as_blocks, check_residues, sum_residues
from shelora.he.residues import Blocks

PARAMETERS = CkksParameters(modulus=1152921504606830593)
Q = PARAMETERS.modulus
N = PARAMETERS.ring_dimension


def random_blocks(seed: int, count: int) -> Blocks:
    return np.random.default_rng(seed).integers(0, Q, (count, 2, N), dtype=np.uint64)


def add_exactly(*terms: Blocks) -> list[int]:
    """Sums modulo q in Python integers, all terms of one length."""
    return [sum(column) % Q for column in zip(*(term.ravel().tolist() for term in terms), strict=True)]


class TestAsBlocks:
    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_every_kind_of_memory_gives_the_same_view(self, count: int) -> None:
        blocks = random_blocks(1, count)
        data = blocks.tobytes()
        flat = np.frombuffer(data, np.uint8)
        for payload in (data, bytearray(data), memoryview(data), flat, blocks, blocks.reshape(-1)):
            np.testing.assert_array_equal(as_blocks(payload, PARAMETERS), blocks, strict=True)

    def test_no_copy_is_made(self) -> None:
        data = bytearray(PARAMETERS.block_bytes)
        view = as_blocks(data, PARAMETERS)
        data[8] = 7
        assert view[0, 0, 1] == 7
        assert not as_blocks(bytes(data), PARAMETERS).flags.writeable

    @pytest.mark.parametrize("size", [1, 65535, 65537, 98304])
    def test_partial_blocks_are_refused(self, size: int) -> None:
        with pytest.raises(SizeMismatch, match=f"multiple of 65536 bytes, got {size}"):
            as_blocks(bytes(size), PARAMETERS)

    def test_strided_memory_is_refused(self) -> None:
        with pytest.raises(MalformedPayload, match="contiguous"):
            as_blocks(memoryview(bytes(2 * PARAMETERS.block_bytes))[::2], PARAMETERS)
        with pytest.raises(MalformedPayload, match="contiguous"):
            as_blocks(random_blocks(1, 4)[::2], PARAMETERS)

    def test_other_number_formats_are_refused(self) -> None:
        with pytest.raises(MalformedPayload, match="format 'd'"):
            as_blocks(np.zeros((1, 2, N)), PARAMETERS)  # type: ignore[arg-type]


class TestCheckResidues:
    def test_largest_residue_passes(self) -> None:
        check_residues(np.full((9, 2, N), Q - 1, dtype=np.uint64), PARAMETERS)

    def test_no_blocks_pass(self) -> None:
        check_residues(np.empty((0, 2, N), dtype=np.uint64), PARAMETERS)

    @settings(max_examples=25, deadline=None)
    @given(
        block=st.integers(0, 8),
        polynomial=st.integers(0, 1),
        position=st.integers(0, N - 1),
        value=st.integers(Q, 2**64 - 1),
    )
    def test_first_large_residue_is_named(self, block: int, polynomial: int, position: int, value: int) -> None:
        blocks = np.zeros((9, 2, N), dtype=np.uint64)
        blocks[-1, -1, -1] = 2**64 - 1
        blocks[block, polynomial, position] = value
        with pytest.raises(ResidueOutOfRange, match=f"block {block}, polynomial {polynomial}, position {position}:"):
            check_residues(blocks, PARAMETERS)

    @pytest.mark.parametrize(
        "blocks",
        [
            np.zeros((1, 2, N), dtype=np.int64),
            np.zeros((2, N), dtype=np.uint64),
            np.zeros((1, 1, N), dtype=np.uint64),
            np.zeros((1, 2, N - 1), dtype=np.uint64),
            np.array(3, dtype=np.uint64),
        ],
        ids=lambda blocks: f"{blocks.dtype}{blocks.shape}",
    )
    def test_other_arrays_are_refused(self, blocks: Blocks) -> None:
        with pytest.raises(ShapeMismatch, match=r"expected uint64\[any, 2, 4096\]"):
            check_residues(blocks, PARAMETERS)


class TestAddResidues:
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 2**32), count=st.integers(0, 9))
    def test_equals_integer_arithmetic(self, seed: int, count: int) -> None:
        total, term = random_blocks(seed, count), random_blocks(seed + 1, count)
        expected = add_exactly(total, term)
        add_residues(total, term, Q)
        assert total.ravel().tolist() == expected

    def test_edges_of_the_range(self) -> None:
        edges = np.array([0, 1, Q // 2, Q // 2 + 1, Q - 2, Q - 1], dtype=np.uint64)
        total = np.zeros((1, 2, N), dtype=np.uint64)
        term = np.zeros((1, 2, N), dtype=np.uint64)
        total.reshape(-1)[:36] = np.repeat(edges, 6)
        term.reshape(-1)[:36] = np.tile(edges, 6)
        expected = add_exactly(total, term)
        add_residues(total, term, Q)
        assert total.ravel().tolist() == expected

    @pytest.mark.parametrize("short", [0, 1, 4, 5])
    def test_short_term_changes_a_prefix_only(self, short: int) -> None:
        total, term = random_blocks(3, 6), random_blocks(4, short)
        before = total.copy()
        add_residues(total, term, Q)
        np.testing.assert_array_equal(total[short:], before[short:])
        assert total[:short].ravel().tolist() == add_exactly(before[:short], term)

    def test_long_term_is_refused(self) -> None:
        with pytest.raises(SizeMismatch, match="at most 1 blocks, got 2"):
            add_residues(random_blocks(1, 1), random_blocks(2, 2), Q)

    @pytest.mark.parametrize(("total_ndim", "term_ndim"), [(0, 3), (2, 3), (3, 2)])
    def test_other_shapes_are_refused(self, total_ndim: int, term_ndim: int) -> None:
        shaped = {0: np.array(1, dtype=np.uint64), 2: random_blocks(1, 1)[0], 3: random_blocks(1, 1)}
        with pytest.raises(ShapeMismatch):
            add_residues(shaped[total_ndim], shaped[term_ndim], Q)


class TestSumResidues:
    @settings(max_examples=20, deadline=None)
    @given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), seed=st.integers(0, 2**32), data=st.data())
    def test_order_does_not_matter(self, lengths: list[int], seed: int, data: st.DataObject) -> None:
        terms = [random_blocks(seed + index, length) for index, length in enumerate(lengths)]
        shuffled = data.draw(st.permutations(terms))
        total = sum_residues(terms, Q)
        assert len(total) == max(lengths)
        np.testing.assert_array_equal(total, sum_residues(shuffled, Q))

    def test_terms_are_read_once_and_left_alone(self) -> None:
        terms = [random_blocks(seed, blocks) for seed, blocks in ((1, 2), (2, 3), (3, 3))]
        copies = [term.copy() for term in terms]

        def once() -> Iterator[Blocks]:
            yield from terms

        total = sum_residues(once(), Q)
        assert total[:2].ravel().tolist() == add_exactly(*(term[:2] for term in terms))
        for term, copy in zip(terms, copies, strict=True):
            np.testing.assert_array_equal(term, copy)

    def test_no_terms_are_refused(self) -> None:
        with pytest.raises(SizeMismatch, match="at least one"):
            sum_residues([], Q)

    @pytest.mark.parametrize("shape", [(), (N,), (2, N)])
    def test_other_shapes_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ShapeMismatch):
            sum_residues([np.zeros(shape, dtype=np.uint64)], Q)


@pytest.mark.parametrize("modulus", [2, 3, 2**53 + 1, 2**60 - 2**14 + 1, 2**63 - 25])
@pytest.mark.parametrize("terms", [0, 1, 2, 14, 15, 16, 40])
def test_a_lazy_sum_is_exact_for_the_largest_residues(modulus, terms):
    total = np.full(5, modulus - 1, dtype=np.uint64)
    lazy = ResidueSum(total, modulus)
    for _ in range(terms):
        lazy.add(np.full(3, modulus - 1, dtype=np.uint64))
    lazy.reduce()
    wanted = [(terms + 1) * (modulus - 1) % modulus] * 3 + [modulus - 1] * 2
    assert total.tolist() == wanted
    lazy.reduce()
    assert total.tolist() == wanted


def test_a_lazy_sum_goes_on_after_it_was_reduced():
    total = np.zeros(4, dtype=np.uint64)
    lazy = ResidueSum(total, 7)
    for value in (6, 5, 4):
        lazy.add(np.full(4, value, dtype=np.uint64))
        lazy.reduce()
    assert total.tolist() == [1] * 4


def test_a_lazy_sum_refuses_longer_terms():
    with pytest.raises(SizeMismatch, match="at most 2 residues, got 3"):
        ResidueSum(np.zeros(2, dtype=np.uint64), 7).add(np.zeros(3, dtype=np.uint64))
