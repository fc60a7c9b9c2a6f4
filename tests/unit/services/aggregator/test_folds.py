"""Ciphertexts added to a running sum: exactly, range by range, and only those that are what was accepted."""

from __future__ import annotations

from dataclasses import replace

import anyio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.aggregator import compute as compute_module
from services.aggregator.compute import LocalCompute
from services.common.blobs import DirectoryBlobStore
from services.common.seals import PIECE_BYTES
from services.common.threads import WorkerPool
from shelora.errors import SizeMismatch, StoredBytesCorrupt, UnknownBlob
from shelora.he.residues import sum_residues
from support.updates import PARAMETERS, open_residues, to_residues


def random_blocks(rng, blocks):
    return rng.integers(0, PARAMETERS.modulus, size=(blocks, 2, PARAMETERS.ring_dimension), dtype=np.uint64)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 2**32), st.data())
def test_fold_equals_the_exact_sum(tmp_path_factory, lengths, seed, data):
    rng = np.random.default_rng(seed)
    blobs = DirectoryBlobStore(tmp_path_factory.mktemp("fold"))
    parts = [random_blocks(rng, length) for length in lengths]
    blocks = max(lengths) + data.draw(st.integers(0, 2))
    cut = data.draw(st.integers(0, len(parts)))

    async def fold():
        compute = LocalCompute(blobs, WorkerPool(1))
        terms = [await blobs.write(f"term-{index}", [part.tobytes()]) for index, part in enumerate(parts)]
        total = await compute.fold_residues(None, terms[:cut], blocks, PARAMETERS, "sum-1")
        return await compute.fold_residues(total, terms[cut:], blocks, PARAMETERS, "sum-2")

    total = anyio.run(fold)

    wanted = np.zeros((blocks, 2, PARAMETERS.ring_dimension), dtype=np.uint64)
    exact = sum_residues([wanted, *parts], PARAMETERS.modulus)
    assert blobs.path(total.key).read_bytes() == exact.tobytes()
    assert blobs.exists("sum-1")


async def test_fold_walks_through_ranges(blobs, pool, monkeypatch):
    monkeypatch.setattr(compute_module, "STRETCH_BYTES", 2 * PIECE_BYTES)
    values = np.arange(5 * PARAMETERS.ring_dimension, dtype=float) / 1024
    long = await blobs.write("long", [to_residues(values)])
    short = await blobs.write("short", [to_residues(values[: 3 * PARAMETERS.ring_dimension])])

    total = await LocalCompute(blobs, pool).fold_residues(long, [short, long], 5, PARAMETERS, "sum")

    wanted = 2 * values
    wanted[: 3 * PARAMETERS.ring_dimension] *= 1.5
    np.testing.assert_array_equal(open_residues(blobs.path(total.key).read_bytes(), len(values)), wanted)


async def test_fold_refuses_what_does_not_fit(blobs, pool):
    compute = LocalCompute(blobs, pool)
    two = await blobs.write("two", [to_residues(np.ones(2 * PARAMETERS.ring_dimension))])
    odd = await blobs.write("odd", [b"x" * 8])

    with pytest.raises(SizeMismatch, match="residue term two"):
        await compute.fold_residues(None, [two], 1, PARAMETERS, "sum")
    with pytest.raises(SizeMismatch, match="residue term odd"):
        await compute.fold_residues(None, [odd], 1, PARAMETERS, "sum")
    with pytest.raises(SizeMismatch, match="residue sum two"):
        await compute.fold_residues(two, [], 3, PARAMETERS, "sum")
    with pytest.raises(UnknownBlob):
        await compute.fold_residues(None, [replace(two, key="gone")], 2, PARAMETERS, "sum")
    assert not blobs.exists("sum")


async def test_fold_notices_damaged_terms(blobs, pool):
    compute = LocalCompute(blobs, pool)
    good = await blobs.write("good", [to_residues(np.ones(10))])
    bad = await blobs.write("bad", [to_residues(np.ones(10))])
    data = bytearray(blobs.path("bad").read_bytes())
    data[100] ^= 1
    blobs.path("bad").write_bytes(data)

    with pytest.raises(StoredBytesCorrupt, match="blob bad"):
        await compute.fold_residues(None, [good, bad], 1, PARAMETERS, "sum")
    blobs.path("bad").write_bytes(data[:-8])
    with pytest.raises(StoredBytesCorrupt, match="bad"):
        await compute.fold_residues(None, [good, bad], 1, PARAMETERS, "sum")
    assert not blobs.exists("sum")


async def test_fold_of_nothing_is_empty(blobs, pool):
    total = await LocalCompute(blobs, pool).fold_residues(None, [], 0, PARAMETERS, "sum")

    assert total.size_bytes == 0
