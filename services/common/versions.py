"""Software versions, exchanged wherever mixing them could hurt."""

from __future__ import annotations

from typing import Final

from shelora import __version__
from shelora.errors import VersionMismatch
from shelora.v1 import types_pb2

PACKAGE_VERSION: Final = __version__
"""Version of the installed package."""

PROTOCOL: Final = 5
"""Number of the wire protocol; peers with different numbers refuse each other."""

_SHOWN_CHARACTERS = 32


def own_version() -> types_pb2.SoftwareVersion:
    """This process's version as a message."""
    return types_pb2.SoftwareVersion(package=PACKAGE_VERSION, protocol=PROTOCOL)


def check_peer_version(message: types_pb2.SoftwareVersion) -> None:
    """Refuse a peer that speaks another wire protocol; other package versions with the same protocol are welcome.

    Raises:
        VersionMismatch: naming both versions.
    """
    if message.protocol != PROTOCOL:
        package = message.package[:_SHOWN_CHARACTERS] or "unnamed"
        raise VersionMismatch(
            f"software version: expected protocol {PROTOCOL} (package {PACKAGE_VERSION} here), "
            f"got protocol {message.protocol} (package {package} there)",
            hint="install the same release on both sides",
            context={"own_package": PACKAGE_VERSION, "peer_package": package},
        )
