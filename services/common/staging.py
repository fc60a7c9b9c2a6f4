"""Uploads that are not complete: files that grow at their end, hashed while they do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from services.common.blob_store import Blob, check_key
from services.common.digests import Buffer
from services.common.disk import begin_writing, set_aside
from services.common.files import full_disk_refused, make_folders
from services.common.seals import Sealing, SealKey, measure
from services.common.threads import in_thread
from shelora.errors import ChecksumMismatch, OffsetMismatch, SizeMismatch

Adopt = Callable[[Path, str, Sealing], Blob]
"""Moves a complete, synced file to its key."""

_ID_CHARACTERS: Final = 200


class StagingArea:
    """The folder of all staged uploads of a blob store.

    Args:
        folder: made if missing.
        key: makes seals.
    """

    def __init__(self, folder: Path, key: SealKey) -> None:
        make_folders(folder, mode=0o700)
        self._folder = folder
        self._key = key
        self._sealings: dict[Path, Sealing] = {}

    def staging(self, upload_id: str, adopt: Adopt, size_bytes: int) -> DirectoryStaging:
        """One upload, see `DirectoryBlobStore.staging`.

        Raises:
            InvalidIdentifier: the id breaks the rule.
        """
        # "~" is in no key, so the file name is unambiguous and one folder is enough.
        name = check_key(upload_id, _ID_CHARACTERS).replace("/", "~")
        return DirectoryStaging(self._folder / name, self, adopt, size_bytes)

    def discard(self, prefix: str) -> int:
        """Forget all uploads whose id begins with the prefix; answers how many."""
        found = [file for file in self._folder.iterdir() if file.name.startswith(prefix.replace("/", "~"))]
        for file in found:
            self.drop(file)
        return len(found)

    def drop(self, file: Path) -> None:
        """Forget one upload; a missing one is fine."""
        file.unlink(missing_ok=True)
        self._sealings.pop(file, None)

    def note(self, file: Path, offset: int, data: Buffer) -> None:
        """Hash what was just appended; possible as long as this process has seen all bytes before."""
        sealing = Sealing(self._key) if offset == 0 else self._sealings.get(file)
        if sealing is None or sealing.size_bytes != offset:
            self._sealings.pop(file, None)
            return
        sealing.add(data)
        self._sealings[file] = sealing

    def seen(self, file: Path) -> bool:
        """Whether all bytes of the file went by this process, so that their digest is known without reading them."""
        sealing = self._sealings.get(file)
        return sealing is not None and sealing.size_bytes == _size_of(file)

    def measured(self, file: Path) -> Sealing:
        """Digest of the whole file, read once at most, and not at all when its bytes went by this process."""
        if not self.seen(file):
            self._sealings[file] = measure(file, self._key)
        return self._sealings[file]


class DirectoryStaging:
    """The bytes of an upload that is not complete; made by DirectoryBlobStore.staging."""

    def __init__(self, file: Path, area: StagingArea, adopt: Adopt, size_bytes: int) -> None:
        self._file = file
        self._area = area
        self._adopt = adopt
        self._whole_bytes = size_bytes

    @property
    def path(self) -> Path:
        """Local file of the staged bytes, for reading; it need not exist."""
        return self._file

    @property
    def size_bytes(self) -> int:
        """Bytes staged so far."""
        return _size_of(self._file)

    def append(self, offset: int, data: Buffer) -> None:
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
                if offset == 0:
                    set_aside(descriptor, self._whole_bytes)
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                begin_writing(descriptor, offset, offset + len(data))
            except OSError:
                os.ftruncate(descriptor, offset)
                raise
            finally:
                os.close(descriptor)
        self._area.note(self._file, offset, data)

    async def verify(self, expected_size: int, expected_digest: bytes) -> None:
        """Check that the staged bytes are those that were announced; `commit` does so by itself.

        Raises:
            SizeMismatch: another length; the staging is discarded.
            ChecksumMismatch: another digest; the staging is discarded.
            StorageFull: the disk takes no more.
        """
        if self._area.seen(self._file):
            self._verified(expected_size, expected_digest)
            return
        with full_disk_refused("upload"):
            await in_thread(self._verified, expected_size, expected_digest)

    async def commit(self, key: str, expected_size: int, expected_digest: bytes) -> Blob:
        """Check the staged bytes and turn them into a blob.

        Args:
            key: where.
            expected_size: length in bytes that the header announced.
            expected_digest: digest that the header announced, 32 bytes.

        Returns:
            The blob; its bytes are durable and the staging is gone.

        Raises:
            SizeMismatch: another length; the staging is discarded.
            ChecksumMismatch: another digest; the staging is discarded.
            StorageFull: the disk takes no more.
        """
        check_key(key)
        return await in_thread(self._commit, key, expected_size, expected_digest)

    def _commit(self, key: str, expected_size: int, expected_digest: bytes) -> Blob:
        with full_disk_refused("upload"):
            measured = self._verified(expected_size, expected_digest)
            self.sync()
            blob = self._adopt(self._file, key, measured)
        self.discard()
        return blob

    def _verified(self, expected_size: int, expected_digest: bytes) -> Sealing:
        if not self._area.seen(self._file):
            self._file.touch(mode=0o600)
        measured = self._area.measured(self._file)
        if measured.size_bytes != expected_size:
            self.discard()
            raise SizeMismatch(
                f"upload: expected {expected_size} bytes, got {measured.size_bytes}",
                hint="send the payload again from its beginning",
            )
        digest = measured.digest()
        if digest != expected_digest:
            self.discard()
            raise ChecksumMismatch(
                f"upload: expected digest {expected_digest.hex()[:16]}..., got {digest.hex()[:16]}...",
                hint="send the payload again from its beginning",
            )
        return measured

    def sync(self) -> None:
        """Make what is staged durable; may run while more is appended.

        Raises:
            StorageFull: the disk takes no more.
        """
        try:
            descriptor = os.open(self._file, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            with full_disk_refused("upload"):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def discard(self) -> None:
        """Forget the staged bytes; none is fine."""
        self._area.drop(self._file)


def _size_of(file: Path) -> int:
    """Length of a file, 0 when there is none."""
    try:
        return os.stat(file).st_size
    except FileNotFoundError:
        return 0
