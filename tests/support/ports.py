"""Ports for servers that a test starts."""

from __future__ import annotations

import contextlib
import secrets
import socket
from typing import Final

_PORTS: Final = range(20_000, 32_000)
"""Below those that the system gives to connections: one of them could be taken before the server binds it."""


def free_port() -> int:
    """A loopback port that was free just now."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
