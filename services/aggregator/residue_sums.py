"""Ciphertexts in files: checked and added piece by piece, without any HE library and without any key."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from services.common.blobs import Blob
from services.common.digests import Buffer
from services.common.seals import PIECE_BYTES, Seal
from shelora.errors import SizeMismatch, StoredBytesCorrupt
from shelora.he.parameters import CkksParameters
from shelora.he.residues import ResidueSum, as_blocks, check_residues

STRETCH_BYTES: Final = 16 * PIECE_BYTES
"""Bytes of the sum that are made in one step (4 MiB)."""

READ_BYTES: Final = 256 << 10
"""Bytes of an upload that are checked at once: they stay in a core's cache."""

OPEN_FILES: Final = 64
"""Summands that a thread holds open at once."""

_RESIDUE: Final = np.dtype("<u8")


class ArrivingResidues:
    """Looks at a ciphertext while it comes, so that its file need not be read again.

    Args:
        modulus: q.

    Attributes:
        good_bytes: length of the beginning in which every residue is below q. It grows no more from where one is not,
            or where bytes were missed or came in cuts through a residue.
    """

    def __init__(self, modulus: int) -> None:
        self.good_bytes = 0
        self._modulus = np.uint64(modulus)

    def add(self, offset: int, data: Buffer) -> None:
        """Look at the bytes at this position; at offset 0 everything begins again."""
        if offset == 0:
            self.good_bytes = 0
        if offset != self.good_bytes or len(data) % _RESIDUE.itemsize:
            return
        if np.frombuffer(data, dtype=_RESIDUE).max() >= self._modulus:
            return
        self.good_bytes += len(data)


def check_ciphertext(path: Path, blocks: int, parameters: CkksParameters, good_bytes: int = 0) -> None:
    """Check an uploaded ciphertext vector.

    Args:
        path: the file.
        blocks: exact number of blocks wanted.
        parameters: parameter set of the key epoch.
        good_bytes: length of the beginning that was checked while it came; see `ArrivingResidues`.

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
    step = max(1, READ_BYTES // parameters.block_bytes) * parameters.block_bytes
    buffer = memoryview(bytearray(min(size, step)))
    with path.open("rb", buffering=0) as file:
        for start in range(good_bytes // step * step, size, step):
            part = buffer[: min(step, size - start)]
            _fill(file.fileno(), part, start, path)
            check_residues(as_blocks(part, parameters), parameters)


@dataclass(frozen=True)
class Summand:
    """A stored ciphertext vector to be added; every piece of it is read once and tagged as it is read.

    Attributes:
        blob: what the store says it is.
        path: its file.
        seal: what its bytes have to agree with.
    """

    blob: Blob
    path: Path
    seal: Seal
    _tags: list[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Begin with nothing read."""
        object.__setattr__(self, "_tags", [b""] * self.seal.pieces)

    def read(self, descriptor: int, start: int, buffer: memoryview) -> memoryview:
        """The bytes from `start` (the beginning of a piece) on, as many as there are and fit into the buffer."""
        part = buffer[: max(0, self.blob.size_bytes - start)]
        if part:
            _fill(descriptor, part, start, self.path)
            index = start // PIECE_BYTES
            self._tags[index] = self.seal.tag(index, part)
        return part

    def finish(self) -> None:
        """Check that what was read is what was stored.

        Raises:
            StoredBytesCorrupt: other bytes.
        """
        if not self.seal.holds(self._tags):
            raise StoredBytesCorrupt(
                f"blob {self.blob.key}: expected bytes with digest {self.blob.digest.hex()[:16]}, got other bytes",
                hint="check the disk and restore the state folder from a backup",
                context={"blob": self.blob.key},
            )


def sum_stretch(summands: Sequence[Summand], start: int, size: int, modulus: int) -> memoryview:
    """A stretch of the sum; several may be made at once.

    Args:
        summands: what to add; one that ends before counts as zero from there.
        start: first byte of the stretch, the beginning of a piece.
        size: bytes of the stretch.
        modulus: q.

    Returns:
        Its bytes.

    Raises:
        StoredBytesCorrupt: a summand's file ends early.
    """
    total = (np.empty if summands else np.zeros)(size, dtype=np.uint8).data
    buffer = memoryview(bytearray(min(size, PIECE_BYTES)))
    pieces = [total[first : first + PIECE_BYTES] for first in range(0, size, PIECE_BYTES)]
    for batch in range(0, len(summands), OPEN_FILES):
        with _opened(summands[batch : batch + OPEN_FILES]) as opened:
            for index, piece in enumerate(pieces):
                position, rest = start + index * PIECE_BYTES, opened
                if not batch:
                    _begin_piece(piece, position, *opened[0])
                    rest = opened[1:]
                _add_piece(piece, position, rest, buffer, modulus)
    return total


def _begin_piece(piece: memoryview, start: int, summand: Summand, descriptor: int) -> None:
    """The first summand, read to where the sum will be; zeros after its end."""
    part = summand.read(descriptor, start, piece)
    piece[len(part) :] = bytes(len(piece) - len(part))


def _add_piece(
    piece: memoryview,
    start: int,
    opened: Iterable[tuple[Summand, int]],
    buffer: memoryview,
    modulus: int,
) -> None:
    total = ResidueSum(np.frombuffer(piece, dtype=_RESIDUE), modulus)
    for summand, descriptor in opened:
        part = summand.read(descriptor, start, buffer[: len(piece)])
        total.add(np.frombuffer(part, dtype=_RESIDUE))
    total.reduce()


@contextlib.contextmanager
def _opened(summands: Sequence[Summand]) -> Iterator[list[tuple[Summand, int]]]:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(summand.path.open("rb", buffering=0)) for summand in summands]
        yield [(summand, file.fileno()) for summand, file in zip(summands, files, strict=True)]


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


def _fill(descriptor: int, buffer: memoryview, start: int, path: Path) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if not count:
            raise StoredBytesCorrupt(
                f"ciphertext file {path.name}: expected {start + len(buffer)} bytes, got {start + done}",
                hint="check the disk and restore the state folder from a backup",
            )
        done += count
