"""Residue sums against the machine's memory copy: the kernel in memory, and the product's sum from files to a file."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.aggregator.agents import PARAMETERS
from bench.records import Record
from services.aggregator.compute import LocalCompute
from services.common.blobs import Blob, DirectoryBlobStore
from services.common.seals import PIECE_BYTES
from services.common.threads import WorkerPool
from shelora.he.residues import Residues, ResidueSum, add_residues

TERM_BLOCKS: Final = 656
"""Blocks of every summand: 43 MB, a rank-16 adapter with 2.7 million encrypted columns x rows."""

TERMS: Final = (4, 16, 64)
THREADS: Final = (1, 2)
REPEATS: Final = 5

_COPY_BYTES: Final = 256 << 20
_COPY_S: Final = 0.3


def sums(folder: Path) -> Iterator[Record]:
    """Every figure REPEATS times, by turns, so that whatever else the machine does falls on all of them.

    Yields:
        what (copy, kernel, add, fold), terms, threads, repeat, bytes of summands (or copied once), seconds.
    """
    folder.mkdir(parents=True)
    store = DirectoryBlobStore(folder)
    vector = np.random.default_rng(0).integers(0, PARAMETERS.modulus, TERM_BLOCKS * 2 * 4096, dtype=np.uint64)
    blobs = [_stored(store, np.roll(vector, index), index) for index in range(max(TERMS))]
    in_memory = [np.roll(vector, index) for index in range(TERMS[1])]
    # Made once: freed memory may go back to the machine's host, and whoever allocates next would pay for getting it.
    pairs = [(np.ones(_COPY_BYTES // 8), np.ones(_COPY_BYTES // 8)) for _ in range(max(THREADS))]
    try:
        for repeat in range(REPEATS):
            for threads in THREADS:
                alike = {"threads": threads, "repeat": repeat}
                yield {"what": "copy", **_copied(pairs[:threads]), **alike}
                yield {"what": "kernel", "terms": len(in_memory), **_added(in_memory, threads), **alike}
                for terms in TERMS:
                    yield {"what": "fold", "terms": terms, **_folded(store, blobs[:terms], threads), **alike}
            yield {"what": "add", "threads": 1, "repeat": repeat, **_added_one_by_one(in_memory)}
    finally:
        shutil.rmtree(folder)


def _stored(store: DirectoryBlobStore, vector: Residues, index: int) -> Blob:
    with store.writer(f"terms/{index}") as writer:
        writer.extend(vector.data.cast("B"))
        return writer.commit()


def _folded(store: DirectoryBlobStore, blobs: list[Blob], threads: int) -> Record:
    """What the product does once a cohort's ciphertexts are there: read, compare, add, write, hash, sync."""
    pool = WorkerPool(threads)

    async def fold() -> float:
        seconds = 0.0
        # The second of two: memory that was given back to the machine's host would have to come from there again.
        for _ in range(2):
            started = time.perf_counter()
            total = await LocalCompute(store, pool).fold_residues(None, blobs, TERM_BLOCKS, PARAMETERS, "sum")
            seconds = time.perf_counter() - started
            store.delete(total.key)
        return seconds

    seconds = asyncio.run(fold())
    pool.close()
    return {"bytes": sum(blob.size_bytes for blob in blobs), "seconds": seconds}


def _added(terms: list[Residues], threads: int) -> Record:
    """The arithmetic alone, as the product does it: a piece of the sum stays in the cache while all terms go by."""
    total = np.zeros_like(terms[0])
    step = PIECE_BYTES // total.itemsize

    def work(first: int) -> None:
        for start in range(first * step, len(total), threads * step):
            piece = ResidueSum(total[start : start + step], PARAMETERS.modulus)
            for term in terms:
                piece.add(term[start : start + step])
            piece.reduce()

    return {"bytes": sum(term.nbytes for term in terms), "seconds": _seconds(work, threads)}


def _added_one_by_one(terms: list[Residues]) -> Record:
    """`add_residues`: the whole sum goes by for every term."""
    total = np.zeros((TERM_BLOCKS, 2, PARAMETERS.ring_dimension), dtype=np.uint64)

    def work(_: int) -> None:
        for term in terms:
            add_residues(total, term.reshape(total.shape), PARAMETERS.modulus)

    return {"terms": len(terms), "bytes": sum(term.nbytes for term in terms), "seconds": _seconds(work, 1)}


def _copied(pairs: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Record:
    """np.copyto in as many threads as there are pairs of arrays, for as long as a sum takes; bytes are counted once."""
    threads = len(pairs)
    times = 1 + int(_COPY_S / _seconds(lambda index: np.copyto(*pairs[index]), threads))

    def work(index: int) -> None:
        for _ in range(times):
            np.copyto(*pairs[index])

    return {"bytes": threads * times * _COPY_BYTES, "seconds": _seconds(work, threads)}


def _seconds(work: Callable[[int], None], threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        for future in [pool.submit(work, index) for index in range(threads)]:
            future.result()
        return time.perf_counter() - started
