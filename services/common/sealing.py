"""Hybrid public-key encryption of epoch secrets to one agent: HPKE with ML-KEM-768 + X25519 (RFC 9180).

TLS protects the same bytes in flight. The second envelope is post-quantum, so recorded traffic does not open later, and
it ends at the agent's own key, so nothing between the two processes sees the clear text.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519

from shelora.errors import MalformedPayload

_SEED_BYTES = 64
_X25519_BYTES = 32
_MLKEM_PUBLIC_BYTES = 1184
PUBLIC_KEY_BYTES = _MLKEM_PUBLIC_BYTES + _X25519_BYTES
PRIVATE_KEY_BYTES = _SEED_BYTES + _X25519_BYTES
_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class SealingKey:
    """An agent's HPKE key pair. Redacts itself and refuses pickling; `to_bytes` is for a file with mode 0600 only."""

    __slots__ = ("_mlkem", "_x25519")

    def __init__(self, mlkem_key: mlkem.MLKEM768PrivateKey, x25519_key: x25519.X25519PrivateKey) -> None:
        """Join the two halves of the hybrid key."""
        self._mlkem = mlkem_key
        self._x25519 = x25519_key

    @classmethod
    def generate(cls) -> SealingKey:
        """A fresh key from the operating system's randomness."""
        return cls(mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, data: bytes) -> SealingKey:
        """Inverse of `to_bytes`.

        Raises: MalformedPayload on any other length than 96 bytes.
        """
        if len(data) != PRIVATE_KEY_BYTES:
            raise MalformedPayload(
                f"a sealing key has {PRIVATE_KEY_BYTES} bytes, got {len(data)}",
                hint="restore the file or delete it to make a new key",
            )
        return cls(
            mlkem.MLKEM768PrivateKey.from_seed_bytes(data[:_SEED_BYTES]),
            x25519.X25519PrivateKey.from_private_bytes(data[_SEED_BYTES:]),
        )

    def to_bytes(self) -> bytes:
        """96 secret bytes: the ML-KEM seed (64), then the X25519 scalar (32)."""
        return self._mlkem.private_bytes_raw() + self._x25519.private_bytes_raw()

    def public_bytes(self) -> bytes:
        """1,216 public bytes: the ML-KEM encapsulation key (1,184), then the X25519 point (32)."""
        return self._mlkem.public_key().public_bytes_raw() + self._x25519.public_key().public_bytes_raw()

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Open what `seal` made for this key with the same info.

        Raises: MalformedPayload when key, info or bytes differ; nothing more is told.
        """
        private = hpke.MLKEM768X25519PrivateKey(self._mlkem, self._x25519)
        try:
            return _SUITE.decrypt(sealed, private, info)
        except (InvalidTag, ValueError) as error:
            raise MalformedPayload(
                "a sealed secret does not open with this agent's key",
                hint="fetch the epoch again; if it persists the sealing key was replaced: delete the epoch cache",
            ) from error

    def __repr__(self) -> str:
        """Never the key."""
        return "SealingKey(<secret>)"

    def __reduce__(self) -> str | tuple[object, ...]:
        """Refuse pickling and copying."""
        raise TypeError("a SealingKey cannot be pickled or copied")


def seal(public_key: bytes, plaintext: bytes, info: bytes) -> bytes:
    """Seal plaintext to a public key of `SealingKey.public_bytes`; `info` binds the context and is not sent.

    Raises: MalformedPayload when the public key is not a valid one.
    """
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise MalformedPayload(
            f"an HPKE public key has {PUBLIC_KEY_BYTES} bytes, got {len(public_key)}",
            hint="send the raw ML-KEM-768 key followed by the raw X25519 key",
        )
    try:
        key = hpke.MLKEM768X25519PublicKey(
            mlkem.MLKEM768PublicKey.from_public_bytes(public_key[:_MLKEM_PUBLIC_BYTES]),
            x25519.X25519PublicKey.from_public_bytes(public_key[_MLKEM_PUBLIC_BYTES:]),
        )
        return _SUITE.encrypt(plaintext, key, info)
    except ValueError as error:
        raise MalformedPayload("the HPKE public key is not valid", hint="generate a fresh key pair") from error


def epoch_info(federation: str, epoch: int, agent: str) -> bytes:
    """The HPKE info string that binds sealed secrets to their federation, epoch and agent."""
    return f"shelora/v1/epoch-secrets\x00{federation}\x00{epoch}\x00{agent}".encode()
