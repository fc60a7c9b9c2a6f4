"""The one seam to OpenFHE: every call into the library goes through here, every exception of it stops here.

Two facts about OpenFHE 1.6.1 shape this module. It fills tables lazily and without locks, so a new library object must
be warmed up by one thread before it is shared (`CkksContext.create` does). And every thread has a random generator of
its own, which a fork duplicates: two forked children would encrypt with the same randomness, which opens what they
encrypt. A thread that carries such a copy is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias, cast

import numpy as np
import openfhe
from numpy.typing import NDArray

from shelora.errors import InternalFault

Handle: TypeAlias = Any
"""An object of the library: a key or a ciphertext. Opaque here."""

SCALE_BITS: Final = 50
MODULUS_BITS: Final = 60
SECURITY_BITS: Final = 128
DEPTH: Final = 0

# One fixed tag instead of the random one the library gives each pair: all keys and ciphertexts then serialize alike.
_KEY_TAG: Final = "shelora"


class GeneratorOwnership:
    """Tells whether the calling thread's random generator was copied from another process by a fork."""

    def __init__(self) -> None:
        """Start with no thread known."""
        self._local = threading.local()

    def check(self, native_id: int | None = None) -> None:
        """Remember the calling thread on first use and recognise its copy later.

        A forked thread keeps its thread-local data, random generator included, under another native id. Threads
        started after the fork have fresh data and a freshly seeded generator, and pass.

        Args:
            native_id: the thread's kernel id; asked from the system when None.

        Raises:
            InternalFault: the thread is a forked copy.
        """
        current = threading.get_native_id() if native_id is None else native_id
        known = getattr(self._local, "native_id", None)
        if known is None:
            self._local.native_id = current
        elif known != current:
            raise InternalFault(
                "expected a random generator of this process, got a copy made by a fork",
                hint="start worker processes with the spawn method, or do HE work in one process",
            )


_OWNERSHIP: Final = GeneratorOwnership()


class CkksLibrary:
    """An OpenFHE context with the project's parameters, and the calls the project makes."""

    def __init__(self) -> None:
        """Build the context; tables are not warmed up yet."""
        with self._call("build the context"):
            parameters = openfhe.CCParamsCKKSRNS()
            parameters.SetMultiplicativeDepth(DEPTH)
            parameters.SetScalingModSize(SCALE_BITS)
            parameters.SetFirstModSize(MODULUS_BITS)
            parameters.SetScalingTechnique(openfhe.ScalingTechnique.FIXEDMANUAL)
            parameters.SetKeySwitchTechnique(openfhe.KeySwitchTechnique.BV)
            parameters.SetSecurityLevel(openfhe.SecurityLevel.HEStd_128_classic)
            parameters.SetCKKSDataType(openfhe.COMPLEX)
            self._context = openfhe.GenCryptoContext(parameters)
            self._context.Enable(openfhe.PKESchemeFeature.PKE)
            self._context.Enable(openfhe.PKESchemeFeature.LEVELEDSHE)

    @property
    def ring_dimension(self) -> int:
        """N, as the library chose it for the security level."""
        return int(self._context.GetRingDimension())

    @property
    def rounded_modulus(self) -> float:
        """The modulus rounded to float64: good for a cross-check only."""
        return float(self._context.GetModulus())

    def generate_pair(self) -> tuple[Handle, Handle]:
        """Draw a key pair: (public handle, secret handle)."""
        with self._call("generate keys"):
            pair = self._context.KeyGen()
            pair.publicKey.SetKeyTag(_KEY_TAG)
            pair.secretKey.SetKeyTag(_KEY_TAG)
            return pair.publicKey, pair.secretKey

    def encrypt(self, public: Handle, slots: NDArray[np.complex128]) -> Handle:
        """Encode and encrypt complex128[N / 2]; the values must have been checked, the library accepts NaN."""
        with self._call("encrypt"):
            return self._context.Encrypt(public, self._context.MakeCKKSPackedPlaintext(slots))

    def decrypt(self, secret: Handle, ciphertext: Handle) -> NDArray[np.complex128]:
        """Decrypt and decode to complex128[N / 2]."""
        with self._call("decrypt"):
            plaintext = self._context.Decrypt(secret, ciphertext)
            return cast("NDArray[np.complex128]", plaintext.GetCKKSPackedValueArray())

    def add(self, first: Handle, second: Handle) -> Handle:
        """The library's own homomorphic addition: the reference for residue sums."""
        with self._call("add"):
            return self._context.EvalAdd(first, second)

    def serialize(self, handle: Handle) -> bytes:
        """Binary form of a key or ciphertext."""
        with self._call("serialize"):
            return cast("bytes", openfhe.Serialize(handle, openfhe.BINARY))

    def load_ciphertext(self, serialized: bytes) -> Handle:
        """Read a ciphertext that this process wrote, residues replaced or not; never bytes of a peer."""
        with self._call("read a ciphertext"):
            return openfhe.DeserializeCiphertextString(serialized, openfhe.BINARY)

    def load_public(self, serialized: bytes) -> Handle:
        """Read a public key that this process wrote, residues replaced or not; never bytes of a peer."""
        with self._call("read a public key"):
            return openfhe.DeserializePublicKeyString(serialized, openfhe.BINARY)

    def load_secret(self, serialized: bytes) -> Handle:
        """Read a secret key that this process wrote, residues replaced or not; never bytes of a peer."""
        with self._call("read a secret key"):
            return openfhe.DeserializePrivateKeyString(serialized, openfhe.BINARY)

    @contextmanager
    def _call(self, action: str) -> Iterator[None]:
        """Refuse forked threads, and turn the library's exceptions into ours."""
        _OWNERSHIP.check()
        try:
            yield
        except (RuntimeError, TypeError, ValueError) as cause:
            raise InternalFault(
                f"the HE library could not {action}: {type(cause).__name__}",
                hint="check that the installed OpenFHE wheel is the pinned one for this Python",
            ) from cause
