"""How hard it is to open a ciphertext without the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shelora.errors import InvalidConfiguration
from shelora.he.parameters import CkksParameters, standard_security_bits

LEAST_BITS: Final = 128
"""Classical security below which no service takes a parameter set."""

USUAL_PARAMETERS: Final = CkksParameters(modulus=1152921504606830593)
"""What key managers make: the prime is the one that OpenFHE chooses."""


@dataclass(frozen=True)
class Security:
    """Security of a parameter set against classical attacks.

    Attributes:
        bits: what the parameter set claims.
        standard_bits: highest level at which the HomomorphicEncryption.org standard (2018) lists the modulus for the
            ring; at least `bits`.
        ring_dimension, modulus_bits, scale_bits: of the parameter set.
        largest_value: what every value and every sum must stay below, hence largest singular value of an update.
    """

    bits: int
    standard_bits: int
    ring_dimension: int
    modulus_bits: int
    scale_bits: int
    largest_value: float


def security_of(parameters: CkksParameters) -> Security:
    """The security of a parameter set; the set itself refuses to be below its level."""
    return Security(
        bits=parameters.security_bits,
        standard_bits=standard_security_bits(parameters.ring_dimension, parameters.modulus_bits),
        ring_dimension=parameters.ring_dimension,
        modulus_bits=parameters.modulus_bits,
        scale_bits=parameters.scale_bits,
        largest_value=parameters.max_abs_value,
    )


def imagined_parameters(ring_dimension: int, modulus_bits: int, scale_bits: int) -> CkksParameters:
    """A parameter set that no key manager has made; its modulus stands for the prime that a library would choose.

    Raises:
        InvalidConfiguration: below 128 bits of security, or impossible.
    """
    usual = USUAL_PARAMETERS
    if (ring_dimension, modulus_bits, scale_bits) == (usual.ring_dimension, usual.modulus_bits, usual.scale_bits):
        return usual
    bits = standard_security_bits(ring_dimension, modulus_bits)
    if bits < LEAST_BITS:
        raise InvalidConfiguration(
            f"HE parameters: expected at least {LEAST_BITS} bits of security, got a ring of dimension {ring_dimension} "
            f"with a modulus of {modulus_bits} bits, which is unsafe or not in the standard's table",
            hint="take a larger ring or a shorter modulus; no service accepts less, whatever is allowed here",
        )
    modulus = (1 << modulus_bits) - 2 * ring_dimension + 1
    return CkksParameters(
        modulus=modulus, ring_dimension=ring_dimension, modulus_bits=modulus_bits, scale_bits=scale_bits
    )
