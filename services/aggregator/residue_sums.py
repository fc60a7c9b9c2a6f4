"""Ciphertexts in files: checked and added block range by block range, without any HE library and without any key."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from services.common.blobs import Blob
from shelora.errors import SizeMismatch, StoredBytesCorrupt
from shelora.he.parameters import CkksParameters
from shelora.he.residues import Blocks, add_residues, as_blocks, check_residues

RANGE_BLOCKS: Final = 64
"""Blocks of one ciphertext vector that are in memory at once (4 MiB at ring dimension 4096)."""


def check_ciphertext(path: Path, blocks: int, parameters: CkksParameters) -> None:
    """Check an uploaded ciphertext vector.

    Args:
        path: the file.
        blocks: exact number of blocks wanted.
        parameters: parameter set of the key epoch.

    Raises:
        SizeMismatch: another length.
        ResidueOutOfRange: a residue is not below the modulus.
    """
    size, wanted = path.stat().st_size, blocks * parameters.block_bytes
    if size != wanted:
        raise SizeMismatch(
            f"ciphertext: expected {blocks} blocks of {parameters.block_bytes} bytes ({wanted} bytes), got {size}",
            hint="compute the layout from the plan and the cohort of this round",
        )
    buffer = bytearray(min(blocks, RANGE_BLOCKS) * parameters.block_bytes)
    with path.open("rb") as file:
        for first in range(0, blocks, RANGE_BLOCKS):
            count = min(RANGE_BLOCKS, blocks - first)
            part = _fill(file, memoryview(buffer)[: count * parameters.block_bytes], path)
            check_residues(as_blocks(part, parameters), parameters)


@dataclass
class Term:
    """One summand: a stored ciphertext vector that is read once from front to back while its digest is computed.

    Attributes:
        blob: what the store says it is.
        path: its file.
    """

    blob: Blob
    path: Path

    def __post_init__(self) -> None:
        """Begin with nothing read."""
        self._digest = hashlib.sha256()
        self._read_bytes = 0

    def read(self, buffer: memoryview) -> memoryview:
        """The next bytes, as many as are left and fit into the buffer."""
        wanted = buffer[: max(0, self.blob.size_bytes - self._read_bytes)]
        if wanted:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                _fill(file, wanted, self.path)
            self._digest.update(wanted)
            self._read_bytes += len(wanted)
        return wanted

    def finish(self) -> None:
        """Check that what was read is what was stored.

        Raises:
            StoredBytesCorrupt: other bytes.
        """
        if self._digest.digest() != self.blob.sha256:
            raise StoredBytesCorrupt(
                f"blob {self.blob.key}: expected bytes with digest {self.blob.sha256.hex()[:16]}, "
                f"got {self._digest.hexdigest()[:16]}",
                hint="check the disk and restore the state folder from a backup",
                context={"blob": self.blob.key},
            )


def add_range(total: Term | None, terms: Sequence[Term], blocks: int, parameters: CkksParameters) -> Blocks:
    """The next `blocks` blocks of the sum; consecutive calls walk through all summands.

    Args:
        total: the sum so far, None for zero.
        terms: what to add; a term that ends before counts as zero from there.
        blocks: length of the range.
        parameters: parameter set of the key epoch.

    Returns:
        uint64[blocks, 2, N].

    Raises:
        SizeMismatch: a summand is no whole number of blocks.
        StoredBytesCorrupt: a summand's file ends early.
    """
    sum_bytes = bytearray(blocks * parameters.block_bytes)
    if total is not None:
        total.read(memoryview(sum_bytes))
    result = as_blocks(sum_bytes, parameters)
    buffer = memoryview(bytearray(len(sum_bytes)))
    for term in terms:
        part = term.read(buffer)
        if part:
            add_residues(result, as_blocks(part, parameters), parameters.modulus)
    return result


def check_lengths(total: Blob | None, terms: Sequence[Blob], blocks: int, parameters: CkksParameters) -> None:
    """Refuse summands that do not fit into a sum of `blocks` blocks.

    Raises:
        SizeMismatch: a sum so far of another length, or a term that is longer or no whole number of blocks.
    """
    wanted = blocks * parameters.block_bytes
    if total is not None and total.size_bytes != wanted:
        raise SizeMismatch(f"residue sum {total.key}: expected {wanted} bytes, got {total.size_bytes}")
    for term in terms:
        if term.size_bytes > wanted or term.size_bytes % parameters.block_bytes:
            raise SizeMismatch(
                f"residue term {term.key}: expected at most {wanted} bytes in blocks of {parameters.block_bytes}, "
                f"got {term.size_bytes}"
            )


def _fill(file: BinaryIO, buffer: memoryview, path: Path) -> memoryview:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]  # files opened in "rb" have it
        if not count:
            raise StoredBytesCorrupt(
                f"ciphertext file {path.name}: expected {len(buffer)} more bytes, got {done}",
                hint="check the disk and restore the state folder from a backup",
            )
        done += count
    return buffer
