"""Key material as residues, in types that do not leak it by accident."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from typing import NoReturn, SupportsIndex


@dataclass(frozen=True)
class PublicKey:
    """A public key: the residues of its two polynomials.

    Attributes:
        data: little-endian uint64[2, N] as bytes; checked when a context loads it.
    """

    data: bytes = field(repr=False)

    def fingerprint(self) -> str:
        """SHA-256 of the residues in hexadecimal, for logs and comparisons."""
        return hashlib.sha256(self.data).hexdigest()


class SecretKey:
    """A secret key: the residues of its polynomial. Redacts itself, compares in constant time, refuses to be copied."""

    __slots__ = ("_data",)
    __hash__ = None  # type: ignore[assignment]  # a hash of the key in a dict would be a timing oracle

    def __init__(self, data: bytes | bytearray) -> None:
        """Keep the residues.

        Args:
            data: little-endian uint64[N] as bytes; checked when a context loads it.
        """
        self._data = bytes(data)

    def expose(self) -> bytes:
        """The residues themselves, for sealing or storing under a key-encryption key; never for logs or messages."""
        return self._data

    def __repr__(self) -> str:
        return "SecretKey(<redacted>)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecretKey):
            return NotImplemented
        return hmac.compare_digest(self._data, other._data)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse pickling and copying.

        Raises:
            TypeError: always, the exception the pickle and copy protocols define.
        """
        raise TypeError("a SecretKey cannot be pickled or copied; use expose() and seal the result")


@dataclass(frozen=True)
class KeyPair:
    """The keys of one epoch.

    Attributes:
        public: encrypts; every member may hold it.
        secret: decrypts; agents only.
    """

    public: PublicKey
    secret: SecretKey
