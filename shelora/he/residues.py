"""Ciphertexts as plain integers: blocks of residues modulo q, checked and added without any HE library.

A block is uint64[2, N]. Adding two blocks residue by residue modulo q gives bit for bit what the HE library's own
addition gives, which `shelora.he.secret` proves at every start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shelora.errors import MalformedPayload, ResidueOutOfRange, ShapeMismatch, SizeMismatch
from shelora.he.parameters import POLYNOMIALS, CkksParameters

Blocks: TypeAlias = NDArray[np.uint64]
"""uint64[blocks, 2, ring_dimension]."""

Residues: TypeAlias = NDArray[np.uint64]
"""uint64[n], residues of any polynomials one after the other."""

_CHUNK_BLOCKS: Final = 4
_BYTE_FORMATS: Final = frozenset({"B", "b", "c", "L", "Q", "<L", "<Q"})


def as_blocks(
    payload: bytes | bytearray | memoryview | NDArray[np.uint8] | Blocks, parameters: CkksParameters
) -> Blocks:
    """View a payload as blocks, without copying.

    Only the length is checked here; values are the business of `check_residues`.

    Args:
        payload: little-endian residues, block after block: contiguous bytes or a contiguous array of bytes or
            of uint64.
        parameters: the parameter set of the key epoch.

    Returns:
        uint64[blocks, 2, N] on the same memory; read-only when the payload is.

    Raises:
        SizeMismatch: the length is not a whole number of blocks.
        MalformedPayload: the memory is not contiguous, or an array of another dtype.
    """
    view = payload.data if isinstance(payload, np.ndarray) else memoryview(payload)
    if not view.c_contiguous or view.format not in _BYTE_FORMATS:
        raise MalformedPayload(
            f"ciphertext payload: expected contiguous bytes or uint64 numbers, "
            f"got format {view.format!r} with strides {view.strides}",
            hint="copy the payload with numpy.ascontiguousarray first",
        )
    if view.nbytes % parameters.block_bytes:
        raise SizeMismatch(
            f"ciphertext payload: expected a multiple of {parameters.block_bytes} bytes, got {view.nbytes}",
            hint="send whole blocks; the layout says how many",
        )
    return np.frombuffer(view, dtype="<u8").reshape(-1, POLYNOMIALS, parameters.ring_dimension)


def check_blocks(blocks: Blocks, ring_dimension: int, *, name: str = "blocks") -> None:
    """Check dtype and shape of an array of blocks.

    Args:
        blocks: what should be uint64[blocks, 2, ring_dimension].
        ring_dimension: N.
        name: what the array is, for the error message.

    Raises:
        ShapeMismatch: any other dtype or shape.
    """
    if blocks.dtype != np.uint64 or blocks.ndim != 3 or blocks.shape[1:] != (POLYNOMIALS, ring_dimension):
        raise ShapeMismatch(
            f"{name}: expected uint64[any, {POLYNOMIALS}, {ring_dimension}], got {blocks.dtype}{list(blocks.shape)}",
            hint="make blocks with as_blocks",
        )


def check_residues(blocks: Blocks, parameters: CkksParameters) -> None:
    """Check that every residue is below the modulus.

    Args:
        blocks: uint64[blocks, 2, N].
        parameters: the parameter set of the key epoch.

    Raises:
        ShapeMismatch: not an array of blocks.
        ResidueOutOfRange: naming the first block, polynomial and position that is not below the modulus.
    """
    check_blocks(blocks, parameters.ring_dimension)
    limit = np.uint64(parameters.modulus)
    for start in range(0, len(blocks), _CHUNK_BLOCKS):
        chunk = blocks[start : start + _CHUNK_BLOCKS]
        if chunk.max() >= limit:
            block, polynomial, position = np.unravel_index(int(np.argmax(chunk >= limit)), chunk.shape)
            raise ResidueOutOfRange(
                f"ciphertext block {start + int(block)}, polynomial {int(polynomial)}, position {int(position)}: "
                f"expected a residue below {parameters.modulus}, got a larger one",
                hint="encrypt again with the parameters of the current key epoch",
                context={"block": str(start + int(block)), "position": str(int(position))},
            )


def add_residues(total: Blocks, term: Blocks, modulus: int) -> None:
    """Add one ciphertext vector to a running sum, in place.

    A term with fewer blocks is added to the first blocks of the sum: an agent with a smaller budget fills a prefix of
    the layout. Temporary memory is four blocks, whatever the sizes.

    Args:
        total: uint64[blocks, 2, N], writable; every residue below the modulus. Overwritten with the sum.
        term: uint64[at most blocks, 2, N]; every residue below the modulus (`check_residues`).
        modulus: q, at most 63 bits.

    Raises:
        ShapeMismatch: not arrays of blocks of the same ring dimension.
        SizeMismatch: the term has more blocks than the sum.
    """
    ring_dimension = total.shape[-1] if total.ndim else 0
    check_blocks(total, ring_dimension, name="sum")
    check_blocks(term, ring_dimension, name="term")
    if len(term) > len(total):
        raise SizeMismatch(
            f"residue sum: expected at most {len(total)} blocks, got {len(term)}",
            hint="allocate the sum for the largest budget of the plan",
        )
    limit = np.uint64(modulus)
    scratch = np.empty((min(_CHUNK_BLOCKS, len(term)), POLYNOMIALS, ring_dimension), dtype=np.uint64)
    for start in range(0, len(term), _CHUNK_BLOCKS):
        part = term[start : start + _CHUNK_BLOCKS]
        target = total[start : start + len(part)]
        reduced = scratch[: len(part)]
        np.add(target, part, out=target)
        # Below q the subtraction wraps around to a huge number, so the smaller of the two is the reduced sum.
        np.subtract(target, limit, out=reduced)
        np.minimum(target, reduced, out=target)


class ResidueSum:
    """A sum of many terms that is reduced modulo q only as often as 64 bits demand: every 15 terms of 60 bits.

    Args:
        total: uint64[n], writable, contiguous; every residue below the modulus. Overwritten with the sum.
        modulus: q, at most 63 bits.
    """

    def __init__(self, total: Residues, modulus: int) -> None:
        self._total = total
        self._modulus = modulus
        self._most = (2**64 - 1) // max(1, modulus - 1)
        self._held = 1
        self._scratch: Residues | None = None

    def add(self, term: Residues) -> None:
        """Add a term to the beginning of the sum.

        Args:
            term: uint64[at most n]; every residue below the modulus.

        Raises:
            SizeMismatch: the term is longer than the sum.
        """
        if len(term) > len(self._total):
            raise SizeMismatch(f"residue sum: expected at most {len(self._total)} residues, got {len(term)}")
        if self._held == self._most:
            self.reduce()
        target = self._total[: len(term)]
        np.add(target, term, out=target)
        self._held += 1

    def reduce(self) -> None:
        """Bring every residue of the sum below the modulus; to be called after the last term."""
        if self._held == 1:
            return
        scratch = np.empty_like(self._total) if self._scratch is None else self._scratch
        self._scratch = scratch
        # Residues are below held * q. Halving the bound: where a multiple of q is too much, the difference wraps around
        # to a huge number, so the smaller of the two is right.
        for power in reversed(range((self._held - 1).bit_length())):
            np.subtract(self._total, np.uint64(self._modulus << power), out=scratch)
            np.minimum(self._total, scratch, out=self._total)
        self._held = 1


def sum_residues(terms: Iterable[Blocks], modulus: int) -> Blocks:
    """Add ciphertext vectors of possibly different lengths.

    Args:
        terms: uint64[b_i, 2, N] each, checked; read once, one at a time; none is modified.
        modulus: q, at most 63 bits.

    Returns:
        uint64[max b_i, 2, N], a new array.

    Raises:
        SizeMismatch: there are no terms.
        ShapeMismatch: not arrays of blocks of one ring dimension.
    """
    total: Blocks | None = None
    for term in terms:
        if total is None:
            check_blocks(term, term.shape[-1] if term.ndim else 0, name="term")
            total = term.copy()
        elif len(term) > len(total):
            grown = term.copy()
            add_residues(grown, total, modulus)
            total = grown
        else:
            add_residues(total, term, modulus)
    if total is None:
        raise SizeMismatch("residue sum: expected at least one term, got none", hint="a cohort has at least one member")
    return total
