"""Files that are whole or absent, whatever instant the process dies."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shelora.errors import InvalidConfiguration, StorageFull

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers that mean: no space, quota used up, file-size limit of the process reached."""


@contextlib.contextmanager
def full_disk_refused(what: str) -> Iterator[None]:
    """Turn a full disk or an exhausted file-system quota inside the block into StorageFull.

    Args:
        what: what was being written, for the message.

    Raises:
        StorageFull: the disk takes no more.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StorageFull(
            f"{what}: expected free space for the write, got a full disk",
            hint="free space on the disk; the call may then be repeated as it is",
        ) from error


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(folder: Path, mode: int = 0o755) -> None:
    """Make a folder and its missing ancestors, durably."""
    missing: list[Path] = []
    ancestor = folder
    while not ancestor.exists():
        missing.append(ancestor)
        ancestor = ancestor.parent
    for path in reversed(missing):
        path.mkdir(mode=mode, exist_ok=True)
        sync_folder(path.parent)


def write_atomically(path: Path, data: bytes | memoryview, mode: int = 0o644, *, synced: bool = True) -> None:
    """Write a whole file: temporary file with the final permissions, fsync, rename, fsync of the folder.

    Args:
        path: final place; its folder is made if missing.
        data: the content.
        mode: permissions, 0o600 for secrets; they hold from the first byte on.
        synced: whether it has to survive the machine's death, too; without, it survives the process's.

    Raises:
        StorageFull: the disk takes no more; the old file is untouched.
    """
    make_folders(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with full_disk_refused(path.name):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                if synced:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if synced:
            sync_folder(path.parent)


def check_writable(path: Path, what: str) -> None:
    """Check that a file can be written, before anything is done that only makes sense with the file.

    A missing folder is not made: where one is expected to be mounted, the file would be lost with the container.

    Args:
        path: the file; one that is there will be replaced.
        what: what it is, for the message.

    Raises:
        InvalidConfiguration: no such folder, no permission, or the path is itself a folder.
    """
    folder = path.parent
    if path.is_dir():
        problem = "a folder of that name"
    elif not folder.is_dir():
        problem = f"no folder {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = f"no permission to write into {folder}"
    else:
        return
    raise InvalidConfiguration(
        f"{what} {path}: expected a place to write, got {problem}",
        hint="make or mount the folder for this user, or name another file",
    )
