"""The CKKS parameter set: sizes, the range of values, the noise, and the digest both sides compare. No HE library."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from shelora.errors import InvalidConfiguration, ValueOutOfRange

RESIDUE_BYTES: Final = 8
"""A residue travels as a little-endian unsigned 64-bit integer."""

POLYNOMIALS: Final = 2
"""Polynomials in a fresh or summed ciphertext."""

MAX_MODULUS_BITS: Final = 60
"""Longest single-limb modulus of the library; also keeps the sum of two residues inside 64 bits."""

# Largest modulus, in bits, that a ring dimension carries at a classical security level with ternary secrets:
# HomomorphicEncryption.org security standard (2018), table 1.
_STANDARD_MODULUS_BITS: Final[dict[int, dict[int, int]]] = {
    128: {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881},
    192: {1024: 19, 2048: 37, 4096: 75, 8192: 152, 16384: 305, 32768: 611},
    256: {1024: 14, 2048: 29, 4096: 58, 8192: 118, 16384: 237, 32768: 476},
}
_NOISE_DEVIATION: Final = 3.19
_TAIL_DEVIATIONS: Final = 16.0


@dataclass(frozen=True, kw_only=True)
class CkksParameters:
    """One CKKS parameter set with a single modulus and no multiplications.

    A block is one ciphertext: `POLYNOMIALS` x `ring_dimension` residues modulo `modulus`; it carries `ring_dimension`
    real values, two per complex slot.

    Attributes:
        modulus: the exact prime q; 1 modulo 2 * ring_dimension.
        ring_dimension: N, a power of two.
        modulus_bits: bit length of q.
        scale_bits: values are multiplied by 2**scale_bits before they are rounded.
        security_bits: classical security level, 128, 192 or 256.
        depth: multiplicative depth; 0, only additions are ever done.

    Raises:
        InvalidConfiguration: the fields contradict each other or the security level.
    """

    modulus: int
    ring_dimension: int = 4096
    modulus_bits: int = 60
    scale_bits: int = 50
    security_bits: int = 128
    depth: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible parameter sets at construction."""
        self.validate()

    def validate(self) -> None:
        """Check every field against its bounds.

        Raises:
            InvalidConfiguration: naming the field, what was expected and what it holds.
        """
        carried = _STANDARD_MODULUS_BITS.get(self.security_bits)
        _require(carried is not None, "security_bits", "128, 192 or 256", self.security_bits)
        limits = carried or {}
        _require(self.ring_dimension in limits, "ring_dimension", f"one of {sorted(limits)}", self.ring_dimension)
        most_bits = min(limits.get(self.ring_dimension, 0), MAX_MODULUS_BITS)
        _require(2 <= self.modulus_bits <= most_bits, "modulus_bits", f"2 to {most_bits}", self.modulus_bits)
        _require(self.modulus > 0, "modulus", "a positive number", self.modulus)
        _require(
            self.modulus.bit_length() == self.modulus_bits,
            "modulus",
            f"{self.modulus_bits} bits",
            f"{self.modulus.bit_length()} bits",
        )
        remainder = self.modulus % (2 * self.ring_dimension)
        _require(remainder == 1, "modulus", f"1 modulo {2 * self.ring_dimension}", remainder)
        _require(
            1 <= self.scale_bits < self.modulus_bits, "scale_bits", f"1 to {self.modulus_bits - 1}", self.scale_bits
        )
        _require(self._range_exponent >= 0, "scale_bits", "room for values up to 1", self.scale_bits)
        _require(self.depth == 0, "depth", "0", self.depth)

    @property
    def values_per_block(self) -> int:
        """Real values in one block."""
        return self.ring_dimension

    @property
    def block_bytes(self) -> int:
        """Length of one block on the wire."""
        return POLYNOMIALS * self.ring_dimension * RESIDUE_BYTES

    @property
    def key_residue_bytes(self) -> int:
        """Length of one key polynomial: a secret key is one of them, a public key two."""
        return self.ring_dimension * RESIDUE_BYTES

    @property
    def max_abs_value(self) -> float:
        """Bound below which every value, and every sum of values under encryption, must stay in absolute value.

        A polynomial coefficient of the encoding is a mean of rotated slots, so it is at most
        sqrt(2) * value * 2**scale_bits (a slot holds two values); it must stay below q / 2. The bound is the largest
        power of two for which it does: 256 for the default set, which leaves a factor 1.4 that the noise never uses.
        """
        return float(2**self._range_exponent)

    @property
    def _range_exponent(self) -> int:
        """Largest e with 8 * 4**e * 4**scale_bits <= q**2, in exact integers; negative when there is none."""
        return ((self.modulus * self.modulus >> (3 + 2 * self.scale_bits)).bit_length() - 1) // 2

    def blocks_for(self, count: int) -> int:
        """Blocks that `count` values fill.

        Args:
            count: number of values, >= 0.

        Raises:
            ValueOutOfRange: `count` < 0.
        """
        if count < 0:
            raise ValueOutOfRange(
                f"expected a count of values >= 0, got {count}", hint="take sizes from the slot layout"
            )
        return -(-count // self.values_per_block)

    def noise_deviation(self, terms: int = 1) -> float:
        """Standard deviation of a decrypted value around the exact sum of `terms` fresh encryptions.

        A fresh ciphertext carries the noise e0 + v * e + s * e1 with ternary v, s and errors of deviation 3.19, hence
        3.19 * sqrt(1 + 4 N / 3) per coefficient; decoding adds N / 2 of them up: 9.5e-12 for the default set.

        Args:
            terms: number of ciphertexts summed, >= 1.
        """
        coefficient = _NOISE_DEVIATION * math.sqrt(1.0 + 4.0 * self.ring_dimension / 3.0)
        return coefficient * math.sqrt(self.ring_dimension / 2.0 * terms) / 2.0**self.scale_bits

    def error_bound(self, terms: int = 1) -> float:
        """Bound on the absolute error of a decrypted sum of `terms` fresh encryptions.

        Sixteen standard deviations (the products v * e and s * e1 have exponential tails: a value exceeds this with
        probability below 2e-12) plus float64 rounding in encoding and decoding. 1.6e-10 for one ciphertext, below 1e-8
        for 4,000 with the default set.

        Args:
            terms: number of ciphertexts summed, >= 1.
        """
        return _TAIL_DEVIATIONS * self.noise_deviation(terms) + self.max_abs_value * 2.0**-45

    def digest(self) -> bytes:
        """SHA-256 over every field and the slot convention, bytes[32]; equal digests mean exchangeable ciphertexts."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        fields = (
            f"ring_dimension={self.ring_dimension}",
            f"modulus={self.modulus}",
            f"modulus_bits={self.modulus_bits}",
            f"scale_bits={self.scale_bits}",
            f"security_bits={self.security_bits}",
            f"depth={self.depth}",
        )
        return hashlib.sha256("\n".join(("shelora ckks complex interleaved v1", *fields)).encode()).digest()


def standard_security_bits(ring_dimension: int, modulus_bits: int) -> int:
    """Highest classical security level at which the standard lists a modulus for a ring.

    Args:
        ring_dimension: N.
        modulus_bits: bit length of the modulus.

    Returns:
        256, 192 or 128; 0 when the modulus is longer than the ring carries at 128 bits, or the ring is not listed.

    Source: HomomorphicEncryption.org security standard (2018), table 1, ternary secrets.
    """
    levels = (
        level for level, limits in _STANDARD_MODULUS_BITS.items() if modulus_bits <= limits.get(ring_dimension, 0)
    )
    return max(levels, default=0)


def _require(condition: bool, field: str, expected: str, got: object) -> None:
    """Raise InvalidConfiguration for one field unless the condition holds."""
    if not condition:
        raise InvalidConfiguration(
            f"CKKS parameter {field}: expected {expected}, got {got}",
            hint="fetch the parameters of this key epoch from the key manager again",
            context={"field": field},
        )
