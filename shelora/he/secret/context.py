"""A warmed-up CKKS context: parameters, keys and the block-level operations everything else is built from."""

from __future__ import annotations

import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shelora.errors import DigestMismatch, ResidueOutOfRange, SelfTestFailed, SizeMismatch
from shelora.he.parameters import POLYNOMIALS, CkksParameters
from shelora.he.secret import library as openfhe_library
from shelora.he.secret.keys import KeyPair, PublicKey, SecretKey
from shelora.he.secret.library import CkksLibrary, Handle
from shelora.he.secret.selftest import self_test
from shelora.he.secret.template import ResidueTemplate

_BUILD_LOCK: Final = threading.Lock()


class CkksContext:
    """The HE side of one process. Thread-safe once `create` has returned it.

    Attributes:
        parameters: the parameter set, with the exact modulus.
        library: the seam to OpenFHE.
        template: layout of a serialized fresh ciphertext.
    """

    def __init__(self, library: CkksLibrary) -> None:
        """Warm the library up and learn its layouts; `create` is the way in, it also locks and self-tests.

        Raises:
            SelfTestFailed: the library's objects do not have the expected structure.
        """
        self.library = library
        ring_dimension = library.ring_dimension
        pairs = (library.generate_pair(), library.generate_pair())
        public = _find_template([library.serialize(key) for key, _ in pairs], ring_dimension, POLYNOMIALS)
        secret = _find_template([library.serialize(key) for _, key in pairs], ring_dimension, 1)
        cipher = _find_template([_serialized_zero(library, key) for key, _ in pairs], ring_dimension, POLYNOMIALS)
        moduli = {public.modulus, secret.modulus, cipher.modulus}
        if len(moduli) != 1 or float(cipher.modulus) != library.rounded_modulus:
            raise SelfTestFailed(
                f"modulus: expected one number that rounds to {library.rounded_modulus:.17g}, got {sorted(moduli)}",
                hint="this OpenFHE build writes another layout; install the pinned version",
            )
        self.template = cipher
        self._public_template = public
        self._secret_template = secret
        self.parameters = CkksParameters(
            modulus=cipher.modulus,
            ring_dimension=ring_dimension,
            modulus_bits=openfhe_library.MODULUS_BITS,
            scale_bits=openfhe_library.SCALE_BITS,
            security_bits=openfhe_library.SECURITY_BITS,
            depth=openfhe_library.DEPTH,
        )

    @classmethod
    def create(cls) -> CkksContext:
        """Build, warm up and self-test a context; other threads that ask meanwhile wait. Takes about 20 ms.

        Returns:
            A context that any number of threads may share.

        Raises:
            SelfTestFailed: residue arithmetic and the library disagree, or a layout is not the expected one.
        """
        with _BUILD_LOCK:
            context = cls(CkksLibrary())
            self_test(context)
        return context

    @classmethod
    def from_parameters(cls, parameters: CkksParameters) -> CkksContext:
        """Build a context and require that it has exactly these parameters.

        Args:
            parameters: those of the key epoch.

        Returns:
            A context whose ciphertexts and keys are exchangeable with the epoch's.

        Raises:
            DigestMismatch: this process builds other parameters.
            SelfTestFailed: as for `create`.
        """
        context = cls.create()
        if context.parameters.digest() != parameters.digest():
            raise DigestMismatch(
                f"CKKS parameters: expected {parameters}, got {context.parameters} from the installed library",
                hint="install the same release on all machines, or rotate to a new key epoch",
            )
        return context

    def generate_keys(self) -> KeyPair:
        """Draw a fresh key pair from the library's generator.

        Returns:
            The pair, as residues: 2 N and N of them.
        """
        public, secret = self.library.generate_pair()
        ring_dimension = self.parameters.ring_dimension
        public_residues = np.empty((POLYNOMIALS, ring_dimension), dtype=np.uint64)
        secret_residues = np.empty((1, ring_dimension), dtype=np.uint64)
        self._public_template.extract(self.library.serialize(public), public_residues)
        self._secret_template.extract(self.library.serialize(secret), secret_residues)
        return KeyPair(public=PublicKey(public_residues.tobytes()), secret=SecretKey(secret_residues.tobytes()))

    def load_public_key(self, key: PublicKey) -> Handle:
        """Check a public key and hand it to the library.

        Raises:
            SizeMismatch: not two polynomials.
            ResidueOutOfRange: not residues of this modulus.
        """
        return self.library.load_public(
            self._public_template.splice(self._key_residues(key.data, POLYNOMIALS, "public"))
        )

    def load_secret_key(self, key: SecretKey) -> Handle:
        """Check a secret key and hand it to the library.

        Raises:
            SizeMismatch: not one polynomial.
            ResidueOutOfRange: not residues of this modulus.
        """
        return self.library.load_secret(self._secret_template.splice(self._key_residues(key.expose(), 1, "secret")))

    def encrypt_block(self, public: Handle, values: NDArray[np.float64], out: NDArray[np.uint64]) -> None:
        """Encrypt one block.

        Args:
            public: a loaded public key.
            values: float64[N], C-contiguous, finite and in range: value 2 j is the real part of slot j, 2 j + 1 its
                imaginary part.
            out: uint64[2, N], C-contiguous; overwritten.
        """
        ciphertext = self.library.encrypt(public, values.view(np.complex128))
        self.template.extract(self.library.serialize(ciphertext), out)

    def decrypt_block(self, secret: Handle, residues: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Decrypt one block.

        Args:
            secret: a loaded secret key.
            residues: uint64[2, N], every one below the modulus.

        Returns:
            float64[N], in the slot order of `encrypt_block`.
        """
        ciphertext = self.library.load_ciphertext(self.template.splice(residues))
        return self.library.decrypt(secret, ciphertext).view(np.float64)

    def _key_residues(self, data: bytes, polynomials: int, kind: str) -> NDArray[np.uint64]:
        """Residues uint64[polynomials, N] of a key, length and range checked."""
        expected = polynomials * self.parameters.key_residue_bytes
        if len(data) != expected:
            raise SizeMismatch(
                f"{kind} key: expected {expected} bytes, got {len(data)}",
                hint="fetch the keys of this epoch from the key manager again",
            )
        residues = np.frombuffer(data, dtype="<u8").reshape(polynomials, self.parameters.ring_dimension)
        if int(residues.max()) >= self.parameters.modulus:
            raise ResidueOutOfRange(
                f"{kind} key: expected residues below {self.parameters.modulus}, got a larger one",
                hint="fetch the keys of this epoch from the key manager again",
            )
        return residues


def _find_template(samples: list[bytes], ring_dimension: int, regions: int) -> ResidueTemplate:
    """The layout that two serialized samples share."""
    first, second = samples
    return ResidueTemplate.find(first, second, ring_dimension=ring_dimension, regions=regions)


def _serialized_zero(library: CkksLibrary, public: Handle) -> bytes:
    """A fresh encryption of zeros, serialized; under the key as read back, whose ciphertexts serialize differently."""
    loaded = library.load_public(library.serialize(public))
    return library.serialize(library.encrypt(loaded, np.zeros(library.ring_dimension // 2, dtype=np.complex128)))
