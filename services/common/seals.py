"""Proof, faster than any digest, that bytes are still those whose digest this process has checked.

A seal is made over the very bytes in memory that go into a digest: one AES-GMAC tag a piece under a key that lives and
dies with the process, and the digest of all tags. It says nothing to anybody else; after a restart the digest that the
database holds is compared once more, and a new seal made meanwhile.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.common.digests import Buffer, digester

PIECE_BYTES: Final = 256 << 10
"""Bytes under one tag: they stay in a core's cache from the read to the last use."""

_KEY_BITS: Final = 256
_READ_BYTES: Final = 4 * PIECE_BYTES
_PREFIX_BYTES: Final = 8
_INDEX_BYTES: Final = 4


class SealKey:
    """Makes and checks tags; drawn afresh by every process."""

    __slots__ = ("_cipher",)

    def __init__(self) -> None:
        self._cipher = AESGCM(AESGCM.generate_key(_KEY_BITS))

    def tag(self, prefix: bytes, index: int, piece: Buffer) -> bytes:
        """The tag of one piece.

        Args:
            prefix: random, of one seal; with the index it is a nonce that never comes twice for other bytes.
            index: number of the piece.
            piece: its bytes.
        """
        return self._cipher.encrypt(prefix + index.to_bytes(_INDEX_BYTES, "big"), b"", piece)

    def __repr__(self) -> str:
        return "SealKey(<redacted>)"


@dataclass(frozen=True)
class Seal:
    """What proves stored bytes.

    Attributes:
        size_bytes: their length.
    """

    size_bytes: int
    _prefix: bytes = field(repr=False)
    _digest: bytes = field(repr=False)
    _key: SealKey = field(repr=False)

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return -(-self.size_bytes // PIECE_BYTES)

    def tag(self, index: int, piece: Buffer) -> bytes:
        """The tag of the piece at `index` as it was read; may be called from several threads at once."""
        return self._key.tag(self._prefix, index, piece)

    def holds(self, tags: Sequence[bytes]) -> bool:
        """Whether these are the tags of all pieces, in order."""
        return secrets.compare_digest(hashlib.sha256(b"".join(tags)).digest(), self._digest)


class Sealing:
    """Digest and seal of bytes that come from front to back.

    Args:
        key: of this process.

    Attributes:
        size_bytes: bytes so far.
    """

    def __init__(self, key: SealKey) -> None:
        self.size_bytes = 0
        self._key = key
        self._prefix = secrets.token_bytes(_PREFIX_BYTES)
        self._content = digester()
        self._tags = hashlib.sha256()
        self._whole_pieces = True

    def add(self, data: Buffer) -> None:
        """Take the next bytes. Every addition but the last must be whole pieces, or there will be no seal."""
        view = memoryview(data)
        self._whole_pieces = self._whole_pieces and self.size_bytes % PIECE_BYTES == 0
        self._content.update(view)
        if self._whole_pieces:
            first = self.size_bytes // PIECE_BYTES
            for start in range(0, len(view), PIECE_BYTES):
                piece = view[start : start + PIECE_BYTES]
                self._tags.update(self._key.tag(self._prefix, first + start // PIECE_BYTES, piece))
        self.size_bytes += len(view)

    def digest(self) -> bytes:
        """Digest of all bytes so far."""
        digest: bytes = self._content.digest()
        return digest

    def seal(self) -> Seal | None:
        """Seal of all bytes so far, None when they came in other cuts."""
        if not self._whole_pieces:
            return None
        return Seal(self.size_bytes, self._prefix, self._tags.digest(), self._key)


def measure(path: Path, key: SealKey) -> Sealing:
    """Read a whole file.

    Raises:
        FileNotFoundError: there is none.
    """
    sealing = Sealing(key)
    buffer = memoryview(bytearray(_READ_BYTES))
    # Without a buffer of the file object's own every read but the last fills ours.
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sealing.add(buffer[:count])
    return sealing
