"""Large immutable bytes by key: whole or absent, durable before they are named."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from services.common.blob_store import Blob, BlobStore, BlobWriter, Staging, check_key
from services.common.disk import begin_writing, set_aside
from services.common.files import full_disk_refused, make_folders, sync_folder
from services.common.seals import Seal, Sealing, SealKey, measure
from services.common.staging import DirectoryStaging, StagingArea
from services.common.threads import in_thread
from shelora.errors import StoredBytesCorrupt, UnknownBlob

__all__ = ["Blob", "BlobStore", "BlobWriter", "DirectoryBlobStore", "Staging", "check_key"]


class DirectoryBlobStore:
    """Blobs as files below one folder of a local file system.

    Args:
        root: the folder; made if missing. It gets the subfolders objects, staging and temporary.

    Raises:
        StorageFull: the disk takes no more.
    """

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._temporary = root / "temporary"
        self._key = SealKey()
        self._seals: dict[str, tuple[bytes, Seal]] = {}
        with full_disk_refused("blob store"):
            for folder in (self._objects, self._temporary):
                make_folders(folder, mode=0o700)
            self._stagings = StagingArea(root / "staging", self._key)

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
        self._seals.pop(key, None)

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
    def writer(self, key: str, size_bytes: int = 0) -> Iterator[DirectoryBlobWriter]:
        """Store a blob from a compute thread; nothing is stored unless commit() is called.

        Args:
            key: where.
            size_bytes: length it is going to have, if known; its space is set aside on the disk.

        Raises:
            InvalidIdentifier: the key breaks the rule for keys.
            StorageFull: the disk takes no more.
        """
        check_key(key)
        temporary = self._temporary / secrets.token_hex(12)
        try:
            with full_disk_refused(f"blob {key}"), temporary.open("xb+") as file:
                set_aside(file.fileno(), size_bytes)
                yield DirectoryBlobWriter(key, file, temporary, self)
        finally:
            temporary.unlink(missing_ok=True)

    async def verify(self, blob: Blob) -> None:
        """Read the whole blob and compare size and digest.

        Raises:
            UnknownBlob: nothing is stored under the key.
            StoredBytesCorrupt: the stored bytes are not the ones that were written.
        """
        await in_thread(self._verified, blob)

    def seal(self, blob: Blob) -> Seal:
        """What proves the blob's bytes faster than its digest; made by `verify` unless this process has it already.

        Raises:
            UnknownBlob: nothing is stored under the key.
            StoredBytesCorrupt: the stored bytes are not the ones that were written.
        """
        known, seal = self._seals.get(blob.key, (b"", None))
        if seal is not None and (seal.size_bytes, known) == (blob.size_bytes, blob.digest):
            return seal
        return self._verified(blob)

    def _verified(self, blob: Blob) -> Seal:
        try:
            measured = measure(self.path(blob.key), self._key)
        except FileNotFoundError as error:
            raise UnknownBlob(f"blob: expected {blob.key}, got nothing under this key") from error
        size, digest = measured.size_bytes, measured.digest()
        if (size, digest) != (blob.size_bytes, blob.digest):
            raise StoredBytesCorrupt(
                f"blob {blob.key}: expected {blob.size_bytes} bytes with digest {blob.digest.hex()[:16]}, "
                f"got {size} bytes with digest {digest.hex()[:16]}",
                hint="check the disk and restore the state folder from a backup",
                context={"blob": blob.key},
            )
        seal = measured.seal()
        if seal is None:
            raise AssertionError("a file is read in whole pieces")
        self._remember(blob, seal)
        return seal

    def staging(self, upload_id: str, size_bytes: int = 0) -> DirectoryStaging:
        """The staged bytes of an upload, empty when it is new.

        Args:
            upload_id: follows the rule for keys, at most 200 characters.
            size_bytes: length it is going to have, if known; the first bytes are taken only if there is room for all.

        Raises:
            InvalidIdentifier: the id breaks the rule.
        """
        return self._stagings.staging(upload_id, self.adopt, size_bytes)

    def discard_stagings(self, prefix: str) -> int:
        """Forget all stagings whose id begins with the prefix; answers how many."""
        return self._stagings.discard(prefix)

    def discard_temporary(self) -> None:
        """Remove what writers of a dead process left behind; call it at start, while nobody else uses the folder."""
        shutil.rmtree(self._temporary)
        make_folders(self._temporary, mode=0o700)

    def adopt(self, file: Path, key: str, measured: Sealing | None = None) -> Blob:
        """Move a complete, synced file of this store's file system to its key, durably.

        Args:
            file: the file.
            key: where to.
            measured: what went into the file; None reads it.
        """
        found = measured or measure(file, self._key)
        target = self.path(key)
        make_folders(target.parent, mode=0o700)
        os.replace(file, target)
        sync_folder(target.parent)
        blob = Blob(key, found.size_bytes, found.digest())
        self._remember(blob, found.seal())
        return blob

    def sealing(self) -> Sealing:
        """For bytes that are about to be stored."""
        return Sealing(self._key)

    def _remember(self, blob: Blob, seal: Seal | None) -> None:
        if seal is None:
            self._seals.pop(blob.key, None)
        else:
            self._seals[blob.key] = (blob.digest, seal)


class DirectoryBlobWriter:
    """A blob being written; made by DirectoryBlobStore.writer.

    Attributes:
        file: open for reading and writing in binary mode.
    """

    def __init__(self, key: str, file: BinaryIO, temporary: Path, store: DirectoryBlobStore) -> None:
        self.file = file
        self._key = key
        self._temporary = temporary
        self._store = store
        self._sealing = store.sealing()

    def extend(self, data: bytes | memoryview) -> None:
        """Write the next bytes and hash them on the way; for blobs that are written from front to back.

        Raises:
            StorageFull: the disk takes no more.
        """
        with full_disk_refused(f"blob {self._key}"):
            self.file.write(data)
            begin_writing(self.file.fileno(), self._sealing.size_bytes, self._sealing.size_bytes + len(data))
        self._sealing.add(data)

    def commit(self) -> Blob:
        """Make the blob durable under its key, replacing an older one.

        Raises:
            StorageFull: the disk takes no more; an older blob is untouched.
        """
        with full_disk_refused(f"blob {self._key}"):
            self.file.flush()
            os.fsync(self.file.fileno())
            extended = self._sealing.size_bytes == os.fstat(self.file.fileno()).st_size
            return self._store.adopt(self._temporary, self._key, self._sealing if extended else None)
