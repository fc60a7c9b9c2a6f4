"""A real PostgreSQL server for one test session, on a Unix socket in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

_DEBIAN = Path("/usr/lib/postgresql")
# PostgreSQL refuses to run as root. In a user namespace of its own it sees another user id.
_AS_SOMEBODY = ("unshare", "--user", "--map-user=1000", "--map-group=1000")


def binaries() -> Path | None:
    """The folder with initdb and pg_ctl, or None when PostgreSQL cannot be run here."""
    if os.geteuid() == 0 and not _namespaces():
        return None
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(_DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return versions[-1].parent if versions else None


def _namespaces() -> bool:
    return shutil.which("unshare") is not None and subprocess.run([*_AS_SOMEBODY, "true"], check=False).returncode == 0


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """Start a server and stop it at the end.

    Args:
        folder: the installation's binaries.

    Yields:
        The SQLAlchemy URL of an empty database.
    """
    prefix = _AS_SOMEBODY if os.geteuid() == 0 else ()
    # Not pytest's own folder: the path of a socket is at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="shelora-pg-") as home:
        data = f"{home}/data"

        def run(program: str, *arguments: str) -> None:
            command = [*prefix, str(folder / program), "-D", data, *arguments]
            subprocess.run(command, check=True, timeout=100, cwd=home, stdout=subprocess.DEVNULL)

        run("initdb", "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-k {home} -c listen_addresses='' -c fsync=off"
        run("pg_ctl", "-w", "-t", "60", "-l", f"{home}/log", "-o", options, "start")
        try:
            yield f"postgresql+asyncpg://tester@/postgres?host={home}"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
