"""Large immutable bytes by key: whole or absent, durable before they are named."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from services.common.blob_store import Blob, BlobStore, BlobWriter, Staging, check_key
from services.common.files import full_disk_refused, make_folders, sync_folder
from services.common.threads import in_thread
from shelora.errors import (
    ChecksumMismatch,
    OffsetMismatch,
    SizeMismatch,
    StoredBytesCorrupt,
    UnknownBlob,
)

__all__ = ["Blob", "BlobStore", "BlobWriter", "DirectoryBlobStore", "Staging", "check_key"]

_STAGING_CHARACTERS = 200
_READ_BYTES = 4 << 20


class DirectoryBlobStore:
    """Blobs as files below one folder of a local file system.

    Args:
        root: the folder; made if missing. It gets the subfolders objects, staging and temporary.

    Raises:
        StorageFull: the disk takes no more.
    """

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._staging = root / "staging"
        self._temporary = root / "temporary"
        with full_disk_refused("blob store"):
            for folder in (self._objects, self._staging, self._temporary):
                make_folders(folder, mode=0o700)

    def path(self, key: str) -> Path:
        """Local file of the blob, for reading; it need not exist.

        Raises:
            InvalidIdentifier: the key breaks the rule for keys.
        """
        return self._objects / check_key(key)

    def exists(self, key: str) -> bool:
        """Whether the key is there."""
        return self.path(key).is_file()

    def keys(self, prefix: str = "") -> list[str]:
        """All keys that begin with the prefix, sorted."""
        # Only the folder that the prefix names can hold matches.
        folder = prefix.rpartition("/")[0]
        top = self._objects / check_key(folder) if folder else self._objects
        found = (
            os.path.relpath(os.path.join(parent, name), self._objects)
            for parent, _, names in os.walk(top)
            for name in names
        )
        return sorted(key for key in found if key.startswith(prefix))

    def delete(self, key: str) -> None:
        """Remove one blob; a missing one is fine."""
        self.path(key).unlink(missing_ok=True)

    def delete_prefix(self, prefix: str) -> int:
        """Remove all blobs whose key begins with the prefix; answers how many."""
        keys = self.keys(prefix)
        folders = {self.path(key).parent for key in keys}
        for key in keys:
            self.delete(key)
        for folder in sorted(folders, reverse=True):
            self._remove_empty(folder)
        return len(keys)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self._objects:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    async def write(self, key: str, chunks: Iterable[bytes]) -> Blob:
        """Store a blob, replacing an older one.

        Args:
            key: where.
            chunks: the content; taken from a worker thread.

        Returns:
            Its name, size and digest; the bytes are durable.

        Raises:
            InvalidIdentifier: the key breaks the rule for keys.
            StorageFull: the disk takes no more; an older blob is untouched.
        """
        check_key(key)

        def store() -> Blob:
            with self.writer(key) as writer:
                writer.file.writelines(chunks)
                return writer.commit()

        return await in_thread(store)

    @contextlib.contextmanager
    def writer(self, key: str) -> Iterator[DirectoryBlobWriter]:
        """Store a blob from a compute thread; nothing is stored unless commit() is called.

        Raises:
            InvalidIdentifier: the key breaks the rule for keys.
            StorageFull: the disk takes no more.
        """
        temporary = self._temporary / secrets.token_hex(12)
        target = self.path(key)
        try:
            with full_disk_refused(f"blob {key}"), temporary.open("xb+") as file:
                yield DirectoryBlobWriter(key, file, temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    async def verify(self, blob: Blob) -> None:
        """Read the whole blob and compare size and digest.

        Raises:
            UnknownBlob: nothing is stored under the key.
            StoredBytesCorrupt: the stored bytes are not the ones that were written.
        """
        path = self.path(blob.key)
        try:
            size, digest = await in_thread(_measure, path)
        except FileNotFoundError as error:
            raise UnknownBlob(f"blob: expected {blob.key}, got nothing under this key") from error
        if (size, digest) != (blob.size_bytes, blob.sha256):
            raise StoredBytesCorrupt(
                f"blob {blob.key}: expected {blob.size_bytes} bytes with digest {blob.sha256.hex()[:16]}, "
                f"got {size} bytes with digest {digest.hex()[:16]}",
                hint="check the disk and restore the state folder from a backup",
                context={"blob": blob.key},
            )

    def staging(self, upload_id: str) -> DirectoryStaging:
        """The staged bytes of an upload, empty when it is new.

        Args:
            upload_id: follows the rule for keys, at most 200 characters.

        Raises:
            InvalidIdentifier: the id breaks the rule.
        """
        # "~" is in no key, so the file name is unambiguous and one folder is enough.
        name = check_key(upload_id, _STAGING_CHARACTERS).replace("/", "~")
        return DirectoryStaging(upload_id, self._staging / name, self)

    def discard_stagings(self, prefix: str) -> int:
        """Forget all stagings whose id begins with the prefix; answers how many."""
        count = 0
        for file in self._staging.iterdir():
            if file.name.startswith(prefix.replace("/", "~")):
                file.unlink(missing_ok=True)
                count += 1
        return count

    def discard_temporary(self) -> None:
        """Remove what writers of a dead process left behind; call it at start, while nobody else uses the folder."""
        shutil.rmtree(self._temporary)
        make_folders(self._temporary, mode=0o700)

    def adopt(self, file: Path, key: str) -> None:
        """Move a complete, synced file of this store's file system to its key, durably."""
        target = self.path(key)
        make_folders(target.parent, mode=0o700)
        os.replace(file, target)
        sync_folder(target.parent)


class DirectoryBlobWriter:
    """A blob being written; made by DirectoryBlobStore.writer.

    Attributes:
        file: open for reading and writing in binary mode.
    """

    def __init__(self, key: str, file: BinaryIO, temporary: Path, target: Path) -> None:
        self.file = file
        self._key = key
        self._temporary = temporary
        self._target = target

    def commit(self) -> Blob:
        """Make the blob durable under its key, replacing an older one.

        Raises:
            StorageFull: the disk takes no more; an older blob is untouched.
        """
        with full_disk_refused(f"blob {self._key}"):
            self.file.flush()
            os.fsync(self.file.fileno())
            size, digest = _measure(self._temporary)
            make_folders(self._target.parent, mode=0o700)
            os.replace(self._temporary, self._target)
            sync_folder(self._target.parent)
        return Blob(self._key, size, digest)


class DirectoryStaging:
    """The bytes of an upload that is not complete; made by DirectoryBlobStore.staging."""

    def __init__(self, upload_id: str, file: Path, store: DirectoryBlobStore) -> None:
        self._upload_id = upload_id
        self._file = file
        self._store = store

    @property
    def size_bytes(self) -> int:
        """Bytes staged so far."""
        try:
            return self._file.stat().st_size
        except FileNotFoundError:
            return 0

    def append(self, offset: int, data: bytes) -> None:
        """Add bytes at the end; they survive the death of the process (not of the machine) as soon as this returns.

        Args:
            offset: position of the first byte in the upload.
            data: the bytes.

        Raises:
            OffsetMismatch: the offset is not the number of bytes staged so far.
            StorageFull: the disk takes no more; what was staged before stays.
        """
        size = self.size_bytes
        if offset != size:
            raise OffsetMismatch(
                f"upload: expected the next byte at offset {size}, got offset {offset}",
                hint="ask with GetUpload how many bytes are staged and continue there",
                context={"staged_bytes": str(size)},
            )
        with full_disk_refused("upload"):
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            except OSError:
                os.ftruncate(descriptor, offset)
                raise
            finally:
                os.close(descriptor)

    async def commit(self, key: str, expected_size: int, expected_sha256: bytes) -> Blob:
        """Check the staged bytes and turn them into a blob.

        Args:
            key: where.
            expected_size: length in bytes that the header announced.
            expected_sha256: digest that the header announced, 32 bytes.

        Returns:
            The blob; its bytes are durable and the staging is gone.

        Raises:
            SizeMismatch: another length; the staging is discarded.
            ChecksumMismatch: another digest; the staging is discarded.
            StorageFull: the disk takes no more.
        """
        check_key(key)
        return await in_thread(self._commit, key, expected_size, expected_sha256)

    def _commit(self, key: str, expected_size: int, expected_sha256: bytes) -> Blob:
        with full_disk_refused("upload"):
            if not self._file.exists():
                self._file.touch(mode=0o600)
            size, digest = _measure(self._file, sync=True)
            if size != expected_size:
                self.discard()
                raise SizeMismatch(
                    f"upload: expected {expected_size} bytes, got {size}",
                    hint="send the payload again from its beginning",
                )
            if digest != expected_sha256:
                self.discard()
                raise ChecksumMismatch(
                    f"upload: expected SHA-256 {expected_sha256.hex()[:16]}..., got {digest.hex()[:16]}...",
                    hint="send the payload again from its beginning",
                )
            self._store.adopt(self._file, key)
        return Blob(key, size, digest)

    def discard(self) -> None:
        """Forget the staged bytes; none is fine."""
        self._file.unlink(missing_ok=True)


def _measure(path: Path, *, sync: bool = False) -> tuple[int, bytes]:
    """Length and SHA-256 of a file, read in pieces; optionally synced to the disk first."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return size, digest.digest()
