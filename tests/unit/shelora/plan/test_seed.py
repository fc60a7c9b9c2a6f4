from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from shelora.errors import SizeMismatch, ValueOutOfRange
from shelora.plan import FederationSeed, fresh_rows, hkdf_sha256, keyed_permutation, uniform_stream

KEY = bytes(range(32))
SEED = FederationSeed(KEY)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
parts = st.lists(st.one_of(texts, st.integers(-(2**70), 2**70)), max_size=4)


def test_hkdf_gives_the_output_of_rfc_5869_test_case_1() -> None:
    output = hkdf_sha256(b"\x0b" * 22, salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), length=42)
    assert output.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80), st.integers(1, 200))
def test_hkdf_agrees_with_an_independent_implementation(secret: bytes, salt: bytes, info: bytes, length: int) -> None:
    expected = HKDF(SHA256(), length, salt or None, info).derive(secret)
    assert hkdf_sha256(secret, salt=salt, info=info, length=length) == expected


def test_hkdf_output_length_is_bounded() -> None:
    assert len(hkdf_sha256(KEY, salt=b"", info=b"", length=8160)) == 8160
    for length in (0, 8161):
        with pytest.raises(ValueOutOfRange):
            hkdf_sha256(KEY, salt=b"", info=b"", length=length)


def test_seed_redacts_and_exposes_only_on_request() -> None:
    assert repr(SEED) == str(SEED) == "FederationSeed(<redacted>)"
    assert SEED.expose() == KEY


def test_seed_equality() -> None:
    assert FederationSeed(KEY) == SEED
    assert FederationSeed(KEY[::-1]) != SEED
    assert SEED != KEY


def test_seed_refuses_pickling_copying_and_hashing() -> None:
    for leak in (pickle.dumps, copy.copy, copy.deepcopy, hash):
        with pytest.raises(TypeError):
            leak(SEED)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_seed_has_32_bytes(size: int) -> None:
    with pytest.raises(SizeMismatch, match=f"got {size}"):
        FederationSeed(bytes(size))


def test_seed_keeps_its_own_bytes() -> None:
    buffer = bytearray(KEY)
    seed = FederationSeed(buffer)  # type: ignore[arg-type]  # a caller may hold a buffer it wipes later
    buffer[:] = bytes(32)
    assert seed == SEED


@given(texts, parts, texts, parts)
def test_derive_separates_labels_and_parts(
    label: str, bound: list[str | int], other_label: str, other_bound: list[str | int]
) -> None:
    same = (label, [(type(part), part) for part in bound]) == (
        other_label,
        [(type(part), part) for part in other_bound],
    )
    key = SEED.derive(label, *bound)
    assert len(key) == 32
    assert (key == SEED.derive(other_label, *other_bound)) == same
    assert key != FederationSeed(bytes(32)).derive(label, *bound)


def test_derive_is_frozen() -> None:
    assert SEED.derive("label", "a", 1).hex() == "8ed69bf6d77242b4b01389c2211deba483b4fd985bf220854dd5275693edb8f2"


@given(st.binary(min_size=16, max_size=40), st.integers(0, 300))
def test_permutation_is_a_permutation(key: bytes, size: int) -> None:
    order = keyed_permutation(key, size)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, keyed_permutation(key, size))


def test_permutation_depends_on_the_key() -> None:
    orders = {tuple(keyed_permutation(SEED.derive("x", index), 50).tolist()) for index in range(200)}
    assert len(orders) == 200


def test_permutation_is_uniform() -> None:
    """Each of the 24 orders of 4 items: chi-square with 23 degrees of freedom stays below its 1 - 1e-6 quantile."""
    draws = 4800
    counts: dict[tuple[int, ...], int] = {}
    for index in range(draws):
        order = tuple(keyed_permutation(index.to_bytes(16, "big"), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    expected = draws / 24
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 70.5


def test_permutation_is_frozen() -> None:
    assert keyed_permutation(KEY, 16).tolist() == [3, 4, 11, 7, 2, 14, 8, 1, 10, 5, 15, 12, 6, 9, 0, 13]


def test_short_keys_and_negative_sizes_are_refused() -> None:
    with pytest.raises(SizeMismatch, match="got 15"):
        keyed_permutation(bytes(15), 3)
    with pytest.raises(ValueOutOfRange, match="got -1"):
        keyed_permutation(KEY, -1)
    with pytest.raises(ValueOutOfRange, match="got -1"):
        uniform_stream(KEY, -1)


@given(st.integers(0, 60), st.integers(0, 60))
def test_uniform_stream_prefix(count: int, more: int) -> None:
    assert np.array_equal(uniform_stream(KEY, count), uniform_stream(KEY, count + more)[:count])


def test_uniform_stream_is_uniform() -> None:
    numbers = uniform_stream(KEY, 20_000)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert abs(counts - 1000).max() < 5 * math.sqrt(950)


def test_uniform_stream_is_frozen() -> None:
    expected = ["0x1.e0975dc405c4fp-1", "0x1.6ca2cf8443e08p-4", "0x1.ea4aa0281eddep-1", "0x1.56c2c621d16d8p-3"]
    assert [float(number).hex() for number in uniform_stream(KEY, 4)] == expected


def test_permutation_and_uniform_stream_of_one_key_are_unrelated() -> None:
    assert not np.array_equal(np.argsort(uniform_stream(KEY, 16)), keyed_permutation(KEY, 16))


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 40))
def test_fresh_rows_of_a_rank_are_the_first_rows_of_any_larger_rank(rank: int, more: int, n: int) -> None:
    small = fresh_rows(SEED, "fed", 1, "m", 2, rank, n)
    large = fresh_rows(SEED, "fed", 1, "m", 2, rank + more, n)
    assert small.shape == (rank, n)
    assert np.array_equal(small, large[:rank])


def test_fresh_rows_have_the_distribution_of_peft() -> None:
    n = 400
    rows = fresh_rows(SEED, "fed", 1, "m", 0, 16, n)
    bound = 1 / math.sqrt(n)
    assert np.abs(rows).max() <= bound
    assert abs(rows.std() / (bound / math.sqrt(3)) - 1) < 0.05
    assert abs(rows.mean()) < 5 * bound / math.sqrt(3 * rows.size)


def test_fresh_rows_differ_by_every_label() -> None:
    variants = [
        fresh_rows(SEED, "fed", 1, "m", 2, 1, 3),
        fresh_rows(SEED, "other", 1, "m", 2, 1, 3),
        fresh_rows(SEED, "fed", 2, "m", 2, 1, 3),
        fresh_rows(SEED, "fed", 1, "n", 2, 1, 3),
        fresh_rows(SEED, "fed", 1, "m", 1, 1, 3),
        fresh_rows(FederationSeed(bytes(32)), "fed", 1, "m", 2, 1, 3),
    ]
    assert len({rows.tobytes() for rows in variants}) == len(variants)


def test_fresh_rows_are_frozen() -> None:
    rows = fresh_rows(SEED, "fed", 3, "layer.0.query", 0, 2, 4)
    assert [[float(entry).hex() for entry in row] for row in rows] == [
        ["-0x1.6cff82fc61f98p-2", "0x1.614fb7a78e130p-5", "-0x1.9cd7a1decae90p-3", "-0x1.b0e79a5ac380ep-2"],
        ["0x1.9e1a59285ae7cp-2", "-0x1.27dcf2a12beb6p-2", "0x1.c45ce8d062d04p-3", "0x1.74ad22ee25b30p-4"],
    ]


@pytest.mark.parametrize(("rank", "n"), [(-1, 3), (2, 0)])
def test_fresh_rows_refuse_impossible_shapes(rank: int, n: int) -> None:
    with pytest.raises(ValueOutOfRange):
        fresh_rows(SEED, "fed", 1, "m", 0, rank, n)
