"""Adapter folders in PEFT's own format, written whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from services.common.files import full_disk_refused, make_folders, sync_folder, write_atomically

WEIGHTS_FILE: Final = "adapter_model.safetensors"
CONFIG_FILE: Final = "adapter_config.json"


def write_adapter_folder(folder: Path, arrays: Mapping[str, NDArray[Any]], write_rest: Callable[[Path], None]) -> None:
    """Write weights and whatever belongs to them; after a crash the folder is complete or not there.

    Args:
        folder: where to; an old one is replaced.
        arrays: by PEFT's names; stored as float32.
        write_rest: writes configuration and further files into the folder it is given.

    Raises:
        StorageFull: the disk takes no more.
    """
    tensors = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in arrays.items()}
    make_folders(folder.parent)
    written = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(written, ignore_errors=True)
    with full_disk_refused(folder.name):
        write_atomically(written / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        write_rest(written)
        _replace_folder(written, folder)


def _replace_folder(written: Path, folder: Path) -> None:
    """Put a complete folder in place of another; a folder cannot be renamed over one that has files."""
    for path in written.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(written)
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    written.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
