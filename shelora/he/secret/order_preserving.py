"""The agent's side of the `ope` negotiation: scores whose order the aggregator may see, and nothing else."""

from __future__ import annotations

from typing import Final, NoReturn, SupportsIndex

import numpy as np
from numpy.typing import NDArray
from pyope.ope import OPE, ValueRange

from shelora.errors import InvalidConfiguration, ShapeMismatch, ValueOutOfRange

SCORE_BITS: Final = 10
"""Quantised scores are 0 .. 1023."""

TOKEN_BITS: Final = 40
"""Encrypted scores are 0 .. 2**40 - 1."""

_MIN_KEY_BYTES: Final = 32


class OrderPreservingScores:
    """Order-preserving encryption of quantised scores (Boldyreva et al. 2009, as implemented by pyope).

    Deterministic and strictly increasing under one key: equal scores of different agents give equal results, larger
    scores larger ones. One distinct score costs about a millisecond the first time and is remembered.

    Raises:
        InvalidConfiguration: the key is shorter than 32 bytes.
    """

    __slots__ = ("_cache", "_scheme")

    def __init__(self, key: bytes) -> None:
        """Set the scheme up.

        Args:
            key: at least 32 bytes, the same for all agents of a plan version; derive it from the federation seed.
        """
        if len(key) < _MIN_KEY_BYTES:
            raise InvalidConfiguration(
                f"order-preserving key: expected at least {_MIN_KEY_BYTES} bytes, got {len(key)}",
                hint="derive the key from the federation seed",
            )
        self._scheme = OPE(bytes(key), ValueRange(0, 2**SCORE_BITS - 1), ValueRange(0, 2**TOKEN_BITS - 1))
        self._cache: dict[int, int] = {}

    def encrypt(self, quantised: NDArray[np.integer]) -> NDArray[np.int64]:
        """Encrypt scores.

        Args:
            quantised: integer array of any shape, each entry in 0 .. 1023.

        Returns:
            int64 array of the same shape, each entry in 0 .. 2**40 - 1, strictly monotone in the input.

        Raises:
            ShapeMismatch: not an integer array.
            ValueOutOfRange: an entry is outside 0 .. 1023.
        """
        if quantised.dtype.kind not in "iu":
            raise ShapeMismatch(
                f"scores: expected an integer array, got {quantised.dtype}", hint="quantise the scores first"
            )
        if quantised.size and not (int(quantised.min()) >= 0 and int(quantised.max()) < 2**SCORE_BITS):
            raise ValueOutOfRange(
                f"scores: expected integers from 0 to {2**SCORE_BITS - 1}, got smaller or larger ones",
                hint=f"quantise the scores to {SCORE_BITS} bits first",
            )
        distinct, places = np.unique(quantised, return_inverse=True)
        encrypted = np.array([self._encrypt_one(int(score)) for score in distinct], dtype=np.int64)
        return encrypted[places].reshape(quantised.shape)

    def _encrypt_one(self, score: int) -> int:
        """One score, remembered."""
        if score not in self._cache:
            self._cache[score] = int(self._scheme.encrypt(score))
        return self._cache[score]

    def __repr__(self) -> str:
        return "OrderPreservingScores(<redacted>)"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse pickling and copying: the object holds a key.

        Raises:
            TypeError: always, the exception the pickle and copy protocols define.
        """
        raise TypeError("OrderPreservingScores cannot be pickled or copied; build one from the key")
