from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from shelora.errors import InternalFault, SelfTestFailed
from shelora.he.secret import CkksContext, self_test
from shelora.he.secret.library import CkksLibrary, Handle


class RepeatingLibrary(CkksLibrary):
    """Encrypts equal values to equal ciphertexts, as a broken generator would."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[bytes, Handle] = {}

    def encrypt(self, public: Handle, slots: NDArray[np.complex128]) -> Handle:
        if not slots.any():
            return super().encrypt(public, slots)
        return self.known.setdefault(slots.tobytes(), super().encrypt(public, slots))


class ForgetfulLibrary(CkksLibrary):
    """Adds by returning the first term."""

    def add(self, first: Handle, second: Handle) -> Handle:
        return first


class UnstableLibrary(CkksLibrary):
    """Decrypts the same ciphertext to another number each time."""

    calls = 0

    def decrypt(self, secret: Handle, ciphertext: Handle) -> NDArray[np.complex128]:
        self.calls += 1
        return super().decrypt(secret, ciphertext) + 1e-12 * self.calls


class InaccurateLibrary(CkksLibrary):
    """Decrypts with an error above the documented bound."""

    def decrypt(self, secret: Handle, ciphertext: Handle) -> NDArray[np.complex128]:
        return super().decrypt(secret, ciphertext) + 1e-8


class FailingLibrary(CkksLibrary):
    """Cannot add at all."""

    def add(self, first: Handle, second: Handle) -> Handle:
        raise InternalFault("the HE library could not add: RuntimeError")


def test_healthy_context_passes_again_and_again(context: CkksContext) -> None:
    for _ in range(3):
        self_test(context)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (RepeatingLibrary, "two encryptions of the same values to differ"),
        (ForgetfulLibrary, "agree bit for bit"),
        (UnstableLibrary, "decrypt to the same numbers"),
        (InaccurateLibrary, "an error of at most 2.2e-10"),
        (FailingLibrary, "internal_fault: the HE library could not add"),
    ],
)
def test_every_deviation_stops_the_process(library: type[CkksLibrary], message: str) -> None:
    with pytest.raises(SelfTestFailed, match=message) as caught:
        self_test(CkksContext(library()))
    assert caught.value.hint
