from __future__ import annotations

import pytest

from services.operators.planning import USUAL_PARAMETERS, imagined_parameters
from services.operators.planning.security import security_of
from shelora.errors import InvalidConfiguration
from shelora.he.secret import CkksContext


def test_the_usual_parameters_are_those_of_the_library() -> None:
    assert CkksContext.create().parameters == USUAL_PARAMETERS
    assert imagined_parameters(4096, 60, 50) is USUAL_PARAMETERS


def test_security_comes_from_ring_and_modulus() -> None:
    found = security_of(USUAL_PARAMETERS)
    assert (found.bits, found.standard_bits) == (128, 192), "75 bits are listed for this ring at 192, 58 at 256"
    assert (found.ring_dimension, found.modulus_bits, found.scale_bits) == (4096, 60, 50)
    assert found.largest_value == 256
    assert security_of(imagined_parameters(2048, 54, 40)).standard_bits == 128
    assert security_of(imagined_parameters(8192, 60, 50)).standard_bits == 256


@pytest.mark.parametrize(("ring", "bits"), [(2048, 60), (1024, 28), (4096, 110), (4095, 60), (512, 20)])
def test_sets_below_128_bits_are_refused(ring, bits) -> None:
    with pytest.raises(InvalidConfiguration, match=f"at least 128 bits of security, got a ring of dimension {ring}"):
        imagined_parameters(ring, bits, 10)


def test_impossible_sets_are_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="modulus_bits"):
        imagined_parameters(8192, 61, 50)
    with pytest.raises(InvalidConfiguration, match="scale_bits"):
        imagined_parameters(4096, 40, 40)
