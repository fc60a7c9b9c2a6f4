"""Where the residues sit in a serialized key or ciphertext, found by looking at two of them.

Everything but the residues is identical for all fresh objects of one kind in one context. A template keeps those fixed
pieces, takes residues out of serialized objects and puts checked residues back between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shelora.errors import InternalFault, SelfTestFailed
from shelora.he.parameters import RESIDUE_BYTES

# Independent uniform residues differ in nearly all bytes; equal headers and zeros differ in none.
_LEAST_DIFFERENCE: Final = 0.5


@dataclass(frozen=True)
class ResidueTemplate:
    """The fixed pieces of one kind of serialized object.

    Attributes:
        pieces: bytes before, between and after the residue regions; one more than there are regions.
        offsets: start of each region in the serialized object, in bytes.
        ring_dimension: residues per region.
        modulus: the exact modulus, as written after each region.
    """

    pieces: tuple[bytes, ...]
    offsets: tuple[int, ...]
    ring_dimension: int
    modulus: int

    @property
    def region_bytes(self) -> int:
        """Length of one region."""
        return self.ring_dimension * RESIDUE_BYTES

    @property
    def length_bytes(self) -> int:
        """Length of the serialized object."""
        return self.offsets[-1] + self.region_bytes + len(self.pieces[-1])

    @classmethod
    def find(cls, first: bytes, second: bytes, *, ring_dimension: int, regions: int) -> ResidueTemplate:
        """Locate the residue regions by comparing two independent serialized objects.

        A region is preceded by its element count and followed by the modulus, as 64-bit integers, and differs between
        the two objects; nothing else may differ.

        Args:
            first: one serialized object.
            second: another one of the same kind and context.
            ring_dimension: N, the element count of a region.
            regions: how many regions there must be.

        Returns:
            The template.

        Raises:
            SelfTestFailed: the two objects do not have this structure.
        """
        offsets = _region_offsets(first, second, ring_dimension)
        if len(first) != len(second) or len(offsets) != regions:
            raise SelfTestFailed(
                f"serialized objects: expected equal lengths and {regions} residue regions, "
                f"got {len(first)} and {len(second)} bytes with {len(offsets)} regions",
                hint="this OpenFHE build writes another layout; install the pinned version",
            )
        pieces, moduli = _split(first, offsets, ring_dimension)
        if (pieces, moduli) != _split(second, offsets, ring_dimension) or len(set(moduli)) != 1:
            raise SelfTestFailed(
                "serialized objects: expected identical bytes around the residues and one modulus, got different ones",
                hint="this OpenFHE build writes another layout; install the pinned version",
            )
        return cls(pieces=pieces, offsets=offsets, ring_dimension=ring_dimension, modulus=moduli[0])

    def extract(self, serialized: bytes, out: NDArray[np.uint64]) -> None:
        """Copy the residues out of a serialized object.

        Args:
            serialized: an object of this kind, written by this process.
            out: uint64[regions, N], C-contiguous; overwritten.

        Raises:
            InternalFault: the object does not fit the template.
        """
        starts = (0, *(offset + self.region_bytes for offset in self.offsets))
        ends = (*self.offsets, self.length_bytes)
        around = tuple(serialized[start:end] for start, end in zip(starts, ends, strict=True))
        if len(serialized) != self.length_bytes or around != self.pieces:
            raise InternalFault(
                f"serialized object: expected the {self.length_bytes} byte layout found at start-up, "
                f"got {len(serialized)} bytes or another layout",
                hint="restart the process; if it happens again, reinstall the pinned OpenFHE version",
            )
        # As bytes, because the regions are not aligned to 8 in the serialized object.
        for region, offset in zip(out.view(np.uint8), self.offsets, strict=True):
            region[:] = np.frombuffer(serialized, np.uint8, self.region_bytes, offset)

    def splice(self, residues: NDArray[np.uint64]) -> bytes:
        """Make a serialized object with the given residues.

        Args:
            residues: uint64[regions, N], every one below the modulus (`check_residues`); nothing is checked here.

        Returns:
            bytes[length_bytes].
        """
        parts: list[bytes | memoryview] = [self.pieces[0]]
        for region, piece in zip(residues, self.pieces[1:], strict=True):
            parts += (np.ascontiguousarray(region).data.cast("B"), piece)
        return b"".join(parts)


def _region_offsets(first: bytes, second: bytes, ring_dimension: int) -> tuple[int, ...]:
    """Starts of the regions that follow an element count and differ between the two objects."""
    marker = ring_dimension.to_bytes(RESIDUE_BYTES, "little")
    region_bytes = ring_dimension * RESIDUE_BYTES
    last = min(len(first), len(second)) - region_bytes - RESIDUE_BYTES
    offsets = []
    position = first.find(marker)
    while position >= 0:
        start = position + len(marker)
        end = start + region_bytes
        # The ring dimension stands in the header too; only a true region ends where both objects agree again.
        if (
            start <= last
            and first[end : end + RESIDUE_BYTES] == second[end : end + RESIDUE_BYTES]
            and _differ(first, second, start, region_bytes)
        ):
            offsets.append(start)
            start = end
        position = first.find(marker, start)
    return tuple(offsets)


def _differ(first: bytes, second: bytes, start: int, length: int) -> bool:
    """Whether two objects differ in most bytes of a region."""
    one = np.frombuffer(first, np.uint8, length, start)
    other = np.frombuffer(second, np.uint8, length, start)
    return float(np.mean(one != other)) > _LEAST_DIFFERENCE


def _split(
    serialized: bytes, offsets: tuple[int, ...], ring_dimension: int
) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """The bytes around the regions, and the 64-bit number after each."""
    region_bytes = ring_dimension * RESIDUE_BYTES
    starts = (0, *(offset + region_bytes for offset in offsets))
    pieces = tuple(serialized[start:end] for start, end in zip(starts, (*offsets, len(serialized)), strict=True))
    return pieces, tuple(int.from_bytes(piece[:RESIDUE_BYTES], "little") for piece in pieces[1:])
