"""What a blob store is, whatever holds the bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from services.common.digests import Buffer
from services.common.seals import Seal
from shelora.errors import InvalidIdentifier

_KEY = re.compile(r"[a-z0-9._-]+(?:/[a-z0-9._-]+)*")
_KEY_CHARACTERS = 400
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Blob:
    """Names stored bytes.

    Attributes:
        key: relative path in the store.
        size_bytes: length.
        digest: BLAKE3 digest of the content, 32 bytes.
    """

    key: str
    size_bytes: int
    digest: bytes


class BlobWriter(Protocol):
    """A blob being written by a compute thread."""

    @property
    def file(self) -> BinaryIO:
        """Where to write; may be written at any position."""
        ...

    def extend(self, data: bytes | memoryview) -> None:
        """Write the next bytes; a blob that is written by this alone need not be read again for its digest."""
        ...

    def commit(self) -> Blob:
        """Make the blob durable under its key, replacing an older one."""
        ...


class Staging(Protocol):
    """The bytes of an upload that is not complete. One writer at a time."""

    @property
    def path(self) -> Path:
        """Local file of the staged bytes, for reading; it need not exist."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes staged so far."""
        ...

    def append(self, offset: int, data: Buffer) -> None:
        """Add bytes at the end; they survive the death of the process as soon as this returns."""
        ...

    def sync(self) -> None:
        """Make what is staged durable."""
        ...

    async def verify(self, expected_size: int, expected_digest: bytes) -> None:
        """Check that the staged bytes are those that were announced."""
        ...

    async def commit(self, key: str, expected_size: int, expected_digest: bytes) -> Blob:
        """Check the staged bytes and turn them into a blob."""
        ...

    def discard(self) -> None:
        """Forget the staged bytes."""
        ...


class BlobStore(Protocol):
    """A place for blobs. Keys are relative paths of a-z 0-9 . _ - with slashes between; none is a folder of another."""

    def path(self, key: str) -> Path:
        """Local file of the blob, for reading; it need not exist."""
        ...

    def exists(self, key: str) -> bool:
        """Whether the key is there."""
        ...

    def keys(self, prefix: str = "") -> list[str]:
        """All keys that begin with the prefix, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove one blob; a missing one is fine."""
        ...

    def delete_prefix(self, prefix: str) -> int:
        """Remove all blobs whose key begins with the prefix; answers how many."""
        ...

    async def write(self, key: str, chunks: Iterable[bytes]) -> Blob:
        """Store a blob, replacing an older one."""
        ...

    def writer(self, key: str, size_bytes: int = 0) -> AbstractContextManager[BlobWriter]:
        """Store a blob, whose length may be known, from a thread; nothing is stored unless commit() is called."""
        ...

    async def verify(self, blob: Blob) -> None:
        """Read the whole blob and compare size and digest."""
        ...

    def seal(self, blob: Blob) -> Seal:
        """What proves the blob's bytes faster than its digest; reads the whole blob once unless it has it already."""
        ...

    def staging(self, upload_id: str, size_bytes: int = 0) -> Staging:
        """The staged bytes of an upload, empty when it is new; its length, if known, is set aside on the disk."""
        ...

    def discard_stagings(self, prefix: str) -> int:
        """Forget all stagings whose id begins with the prefix; answers how many."""
        ...


def check_key(key: str, limit: int = _KEY_CHARACTERS) -> str:
    """Check a key or an upload id.

    Raises:
        InvalidIdentifier: characters other than a-z 0-9 . _ - /, an empty, "." or ".." segment, or too long.
    """
    good = len(key) <= limit and _KEY.fullmatch(key) is not None
    if not good or any(segment in {".", ".."} or len(segment) > 200 for segment in key.split("/")):
        raise InvalidIdentifier(
            f"blob key: expected at most {limit} characters a-z 0-9 . _ - in segments parted by /, "
            f"got {key[:_SHOWN_CHARACTERS]!r}"
        )
    return key
