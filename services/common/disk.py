"""What Linux can be told about a file that grows, and Python has no words for. Elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, Final

from services.common.files import FULL

STRETCH_BYTES: Final = 8 << 20
"""Written bytes with which the disk is told to begin: little is left to wait for at the end."""

_KEEP_SIZE: Final = 1
_WRITE: Final = 2


def _linux(name: str, *arguments: Any) -> Callable[..., int] | None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = arguments
    return function


_fallocate: Final = _linux("fallocate64", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_sync_file_range: Final = _linux("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def set_aside(descriptor: int, size_bytes: int) -> None:
    """Take disk space for a file that will grow to a known length; the length it has stays.

    A full disk shows before anything is written, and appends need about a third less CPU time where the file system
    has not to look for space each time. File systems that cannot do it are left alone.

    Args:
        descriptor: of a file open for writing.
        size_bytes: the length; 0 when it is not known.

    Raises:
        OSError: the disk has not got that much.
    """
    if _fallocate is None or not size_bytes or not _fallocate(descriptor, _KEEP_SIZE, 0, size_bytes):
        return
    number = ctypes.get_errno()
    if number in FULL:
        raise OSError(number, os.strerror(number))


def begin_writing(descriptor: int, before: int, after: int) -> None:
    """Have the disk begin with the stretches that an append completed, without waiting for it.

    Whether they arrive, `os.fsync` says, which has less to wait for.

    Args:
        descriptor: of a file open for writing.
        before: length of the file in bytes before the append.
        after: its length since.
    """
    start, end = (length // STRETCH_BYTES * STRETCH_BYTES for length in (before, after))
    if _sync_file_range is not None and end > start:
        _sync_file_range(descriptor, start, end - start, _WRITE)
