"""Encryption at rest: AES-256-GCM under the key-encryption key, bound to what the bytes are."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn, SupportsIndex

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.common.files import write_atomically
from shelora.errors import InvalidConfiguration, StoredBytesCorrupt

KEY_BYTES: Final = 32
_VERSION: Final = b"\x01"
_KEY_ID_BYTES: Final = 8
_NONCE_BYTES: Final = 12
_HEADER_BYTES: Final = len(_VERSION) + _KEY_ID_BYTES + _NONCE_BYTES
_CONTEXT: Final = b"shelora keymanager at rest v1\x00"
_MAX_KEYS: Final = 16
# Others must not read it; its group may: mounted secrets of an orchestrator belong to root and the service's group.
_FORBIDDEN_MODE: Final = 0o037


class Vault:
    """Encrypts what the database holds: the first key encrypts, every key decrypts.

    Sealed form: version (1 byte), key id (8), nonce (12), AES-GCM ciphertext and tag. The purpose, a text such as
    "epoch 3 secret key", is authenticated and not stored, so that no row can stand in for another.
    """

    __slots__ = ("_first", "_keys")

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not 1 <= len(keys) <= _MAX_KEYS or any(len(key) != KEY_BYTES for key in keys):
            raise InvalidConfiguration(
                f"key-encryption keys: expected 1 to {_MAX_KEYS} keys of {KEY_BYTES} bytes, "
                f"got lengths {[len(key) for key in keys]}",
                hint="write one base64 line a key; `shelora-keymanager init` makes a missing file",
            )
        self._keys = {_key_id(key): AESGCM(key) for key in keys}
        self._first = _key_id(keys[0])

    def seal(self, plaintext: bytes, purpose: str) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        header = _VERSION + self._first + nonce
        return header + self._keys[self._first].encrypt(nonce, plaintext, _associated(header, purpose))

    def open(self, sealed: bytes, purpose: str) -> bytes:
        header, body = sealed[:_HEADER_BYTES], sealed[_HEADER_BYTES:]
        if len(header) != _HEADER_BYTES or header[:1] != _VERSION:
            raise StoredBytesCorrupt(
                f"{purpose}: expected sealed bytes of version {_VERSION[0]}, got {len(sealed)} other bytes",
                hint="restore the database from a backup",
            )
        key = self._keys.get(header[1 : 1 + _KEY_ID_BYTES])
        if key is None:
            raise StoredBytesCorrupt(
                f"{purpose}: expected one of the key-encryption keys {self.key_ids()}, "
                f"got bytes sealed under key {header[1 : 1 + _KEY_ID_BYTES].hex()}",
                hint="add the missing key to the key-encryption key file, after the first line",
            )
        try:
            return key.decrypt(header[-_NONCE_BYTES:], body, _associated(header, purpose))
        except InvalidTag as error:
            raise StoredBytesCorrupt(
                f"{purpose}: the stored bytes fail their authentication tag",
                hint="the row was altered or moved: restore the database from a backup",
            ) from error

    def is_current(self, sealed: bytes) -> bool:
        """Whether the bytes are sealed under the first key."""
        return sealed[1 : 1 + _KEY_ID_BYTES] == self._first

    def key_ids(self) -> list[str]:
        """Public identifiers of the keys, the encrypting one first."""
        return [self._first.hex(), *(key.hex() for key in self._keys if key != self._first)]

    def __repr__(self) -> str:
        return f"Vault(<redacted>, key_ids={self.key_ids()})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a Vault cannot be pickled or copied")


def parse_keys(text: str, source: str) -> list[bytes]:
    """Key-encryption keys out of base64 words, separated by spaces or lines; lines that begin with # are skipped."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    try:
        keys = [base64.b64decode(word, validate=True) for line in lines for word in line.split()]
    except (binascii.Error, ValueError) as error:
        raise InvalidConfiguration(
            f"{source}: expected base64 lines of {KEY_BYTES} bytes each, got other text",
            hint="make a key with: head -c 32 /dev/urandom | base64",
        ) from error
    if not keys or any(len(key) != KEY_BYTES for key in keys):
        raise InvalidConfiguration(
            f"{source}: expected base64 lines of {KEY_BYTES} bytes each, got lengths {[len(key) for key in keys]}",
            hint="make a key with: head -c 32 /dev/urandom | base64",
        )
    return keys


def read_key_file(path: Path) -> list[bytes]:
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise InvalidConfiguration(
            f"key-encryption key file {path}: expected readable base64 lines, got {type(error).__name__}",
            hint="run `shelora-keymanager init` once, or restore the file; without it nothing stored can be opened",
        ) from error
    if mode & _FORBIDDEN_MODE:
        raise InvalidConfiguration(
            f"key-encryption key file {path}: expected mode 0600, got {mode:04o}", hint=f"chmod 600 {path}"
        )
    return parse_keys(text, f"key-encryption key file {path}")


def make_key_file(path: Path) -> None:
    """Write a fresh key with mode 0600 unless the file exists."""
    if not os.path.lexists(path):
        write_atomically(path, base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n", mode=0o600)


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"shelora key id v1\x00" + key).digest()[:_KEY_ID_BYTES]


def _associated(header: bytes, purpose: str) -> bytes:
    return _CONTEXT + header + purpose.encode()
