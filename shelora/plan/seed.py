"""The federation seed and everything the agents draw from it; the aggregator never holds it.

All draws are pure functions of the seed and their labels: the same numbers on every machine and in every release.
Key derivation is HKDF with SHA-256 (RFC 5869); streams are SHAKE-256 (FIPS 202).
"""

from __future__ import annotations

import hashlib
import hmac
import math
from typing import Final, NoReturn, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from shelora.errors import SizeMismatch, ValueOutOfRange
from shelora.plan.encoding import encode_items

SEED_BYTES: Final = 32
"""Length of the federation seed."""

KEY_BYTES: Final = 32
"""Length of every derived key."""

_MIN_KEY_BYTES: Final = 16
_HASH_BYTES: Final = 32
_MAX_OUTPUT_BYTES: Final = 255 * _HASH_BYTES
_SALT: Final = b"shelora federation seed v1"


def hkdf_sha256(secret: bytes, *, salt: bytes, info: bytes, length: int) -> bytes:
    """Extract-and-expand key derivation, RFC 5869 with SHA-256.

    Args:
        secret: input keying material.
        salt: non-secret domain separator; empty means 32 zero bytes, as in the RFC.
        info: what the output is for.
        length: output length in bytes, 1 to 8160.

    Returns:
        bytes[length].

    Raises:
        ValueOutOfRange: `length` is out of bounds.
    """
    if not 1 <= length <= _MAX_OUTPUT_BYTES:
        raise ValueOutOfRange(
            f"expected 1 to {_MAX_OUTPUT_BYTES} bytes of output, got {length}",
            hint="derive several keys with different labels instead",
        )
    extracted = hmac.digest(salt or bytes(_HASH_BYTES), secret, "sha256")
    output, block = b"", b""
    for counter in range(1, math.ceil(length / _HASH_BYTES) + 1):
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


class FederationSeed:
    """The 32 secret bytes that all agents of one key epoch share.

    It redacts itself, compares in constant time, and cannot be pickled, copied or hashed.

    Raises:
        SizeMismatch: other than 32 bytes.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        """Keep a copy of the bytes."""
        if len(secret) != SEED_BYTES:
            raise SizeMismatch(
                f"expected a federation seed of {SEED_BYTES} bytes, got {len(secret)}",
                hint="fetch the seed of this epoch from the key manager again",
            )
        self._secret = bytes(secret)

    def derive(self, label: str, *parts: str | int) -> bytes:
        """Derive an independent key for one purpose.

        Args:
            label: the purpose.
            parts: what the key is bound to (federation, round, module, ...); every different sequence of label and
                parts gives an unrelated key.

        Returns:
            bytes[32].
        """
        return hkdf_sha256(self._secret, salt=_SALT, info=encode_items((label, *parts)), length=KEY_BYTES)

    def expose(self) -> bytes:
        """The raw bytes, for sealing them to an agent or storing them encrypted; for nothing else."""
        return self._secret

    def __repr__(self) -> str:
        """Show that there is a seed, never which."""
        return "FederationSeed(<redacted>)"

    def __eq__(self, other: object) -> bool:
        """Compare in constant time."""
        if not isinstance(other, FederationSeed):
            return NotImplemented
        return hmac.compare_digest(self._secret, other._secret)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse pickling and copying.

        Raises:
            TypeError: always.
        """
        raise TypeError("a FederationSeed cannot be pickled or copied; pass expose() to the sealing layer instead")


def keyed_permutation(key: bytes, size: int) -> NDArray[np.int64]:
    """A permutation of 0 .. size-1 that is unpredictable without the key.

    Sorts `size` 64-bit numbers of a keyed stream. Two of them are equal with probability below size**2 / 2**65; such
    a pair keeps its order, so the result is always a permutation.

    Args:
        key: at least 16 bytes, derived for this use alone.
        size: number of items, >= 0.

    Returns:
        int64[size].

    Raises:
        SizeMismatch: the key is too short.
        ValueOutOfRange: `size` < 0.
    """
    numbers = _stream(b"permutation", key, size)
    return np.argsort(numbers, kind="stable").astype(np.int64, copy=False)


def uniform_stream(key: bytes, count: int) -> NDArray[np.float64]:
    """The first `count` uniform numbers of a keyed stream; a shorter request is a prefix of a longer one.

    Args:
        key: at least 16 bytes, derived for this use alone.
        count: how many, >= 0.

    Returns:
        float64[count] in [0, 1), multiples of 2**-53.

    Raises:
        SizeMismatch: the key is too short.
        ValueOutOfRange: `count` < 0.
    """
    return (_stream(b"uniform", key, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def fresh_rows(
    seed: FederationSeed, federation: str, epoch: int, module: str, round: int, rank: int, n: int
) -> NDArray[np.float64]:
    """Rows of A for directions that have nothing to continue from: all rows in the first round, missing ones later.

    The rows come one after the other from one stream, so an agent of rank r holds the first r rows of any larger
    rank. Distribution: uniform in [-1/sqrt(n), 1/sqrt(n)), what PEFT draws A from.

    Args:
        seed: the epoch's federation seed.
        federation: federation name.
        epoch: key epoch.
        module: module name.
        round: round number.
        rank: number of rows, >= 0.
        n: number of columns, >= 1.

    Returns:
        float64[rank, n].

    Raises:
        ValueOutOfRange: `rank` < 0 or `n` < 1.
    """
    if rank < 0 or n < 1:
        raise ValueOutOfRange(
            f"expected rank >= 0 and n >= 1, got rank {rank} and n {n}",
            hint="take both from the registered plan",
            context={"module": module},
        )
    key = seed.derive("fresh rows", federation, epoch, module, round)
    uniform = uniform_stream(key, rank * n).reshape(rank, n)
    return (2.0 * uniform - 1.0) / math.sqrt(n)


def _stream(purpose: bytes, key: bytes, count: int) -> NDArray[np.uint64]:
    """The first `count` little-endian 64-bit numbers of SHAKE-256 over purpose and key."""
    if len(key) < _MIN_KEY_BYTES:
        raise SizeMismatch(
            f"expected a key of at least {_MIN_KEY_BYTES} bytes, got {len(key)}",
            hint="take keys from FederationSeed.derive",
        )
    if count < 0:
        raise ValueOutOfRange(f"expected a count >= 0, got {count}", hint="take sizes from the registered plan")
    state = hashlib.shake_256(encode_items((purpose, key)))
    return np.frombuffer(state.digest(8 * count), dtype="<u8").astype(np.uint64, copy=False)
