"""Making and proving the CKKS keys of an epoch. The only module here that reaches the HE library."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Protocol

from shelora.errors import DigestMismatch, ResidueOutOfRange, SizeMismatch, StoredBytesCorrupt
from shelora.he.parameters import CkksParameters
from shelora.he.secret import CkksContext, Decryptor, PublicKey, SecretKey


@dataclass(frozen=True)
class CkksKeys:
    """The keys of one epoch.

    Attributes:
        parameters: the parameter set they belong to.
        public_key: residues of the public key.
        secret_key: the secret key.
    """

    parameters: CkksParameters
    public_key: bytes = field(repr=False)
    secret_key: SecretKey


class KeyMaker(Protocol):
    """Where epoch keys come from."""

    def make(self) -> CkksKeys:
        """Draw fresh keys; for a worker thread."""
        ...

    def check(self, keys: CkksKeys) -> None:
        """Prove that stored keys belong together and work here; for a worker thread.

        Raises: StoredBytesCorrupt when they do not, DigestMismatch when this machine's library builds other parameters.
        """
        ...


class CkksKeyMaker:
    """Keys from OpenFHE. The context is built at the first use and shared."""

    def __init__(self) -> None:
        self._context: CkksContext | None = None
        self._lock = threading.Lock()

    def make(self) -> CkksKeys:
        with self._lock:
            if self._context is None:
                self._context = CkksContext.create()
            pair = self._context.generate_keys()
            return CkksKeys(self._context.parameters, pair.public.data, pair.secret)

    def check(self, keys: CkksKeys) -> None:
        with self._lock:
            context = CkksContext.from_parameters(keys.parameters)
            try:
                # A decryptor encrypts and opens a block when it is made.
                Decryptor(context, PublicKey(keys.public_key), keys.secret_key, 1).close()
            except (DigestMismatch, SizeMismatch, ResidueOutOfRange) as error:
                raise StoredBytesCorrupt(
                    f"epoch keys: expected a pair that works, got: {error.message}",
                    hint="restore the database from a backup, or rotate to a new epoch",
                ) from error
