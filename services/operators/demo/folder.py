"""The demonstration's folder: nothing outside it is ever written or deleted."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shelora.errors import Conflict, InvalidConfiguration

MARKER: Final = ".shelora-demo"
"""File that says: a demonstration made this folder and may replace what is in it."""


class DemoFolder:
    """Paths inside the folder.

    Attributes:
        root: the folder, absolute.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def keymanager(self) -> Path:
        return self.root / "keymanager"

    @property
    def aggregator(self) -> Path:
        return self.root / "aggregator"

    @property
    def operator(self) -> Path:
        return self.root / "operator"

    @property
    def profile(self) -> Path:
        """Profile for the `shelora` command line."""
        return self.root / "operator.yaml"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    @property
    def comparison(self) -> Path:
        return self.root / "plaintext.json"

    def agent(self, name: str) -> Path:
        """Everything of one agent."""
        return self.root / "agents" / name

    def agent_config(self, name: str) -> Path:
        return self.agent(name) / "agent.yaml"

    def revealed(self, name: str) -> Path:
        """Clear factors and opened averages of one agent, for the verification."""
        return self.agent(name) / "revealed"

    def adapter(self, name: str, round_number: int) -> Path:
        """PEFT adapter of one agent after a round; 0 is the start."""
        return self.agent(name) / "state" / "adapters" / f"round-{round_number:03d}"


@contextlib.contextmanager
def take_folder(root: Path) -> Iterator[DemoFolder]:
    """Empty the folder of an earlier demonstration, or make a new one, and keep others out while this one runs.

    Raises:
        InvalidConfiguration: the folder holds files that no demonstration wrote, or cannot be used.
        Conflict: another demonstration runs in it.
    """
    absolute = root.absolute()
    marker = absolute / MARKER
    try:
        if absolute.is_symlink() or (absolute.exists() and not absolute.is_dir()):
            raise InvalidConfiguration(f"out: expected a folder, got {absolute}, which is something else")
        if absolute.is_dir() and not marker.is_file() and any(absolute.iterdir()):
            raise InvalidConfiguration(
                f"out: expected a new folder or one of an earlier demonstration, got {absolute} with other files in it",
                hint="name another folder; nothing was changed",
            )
        absolute.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise InvalidConfiguration(
            f"out: cannot use {absolute} ({error.strerror})", hint="name another folder"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"out: another demonstration runs in {absolute}", hint="wait for it, or name another folder"
            ) from error
        _clear(absolute)
        folder = DemoFolder(absolute)
        for path in (folder.logs, folder.data, folder.keymanager, folder.aggregator, folder.operator):
            path.mkdir(mode=0o700)
        yield folder
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Delete everything in the folder but the marker; links are deleted, never followed."""
    for path in folder.iterdir():
        if path.name == MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
