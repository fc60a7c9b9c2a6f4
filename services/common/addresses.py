"""Addresses as text: host:port, [v6]:port, or unix:path."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from shelora.errors import InvalidConfiguration

_UNIX = "unix:"


def check_address(text: str) -> str:
    """Check an address.

    Args:
        text: "host:port" (an IPv6 host in brackets, port 0 to 65535, 0 for any free port) or "unix:path".

    Returns:
        The same text.

    Raises:
        InvalidConfiguration: another form.
    """
    if unix_path(text) is None:
        split_address(text)
    return text


def unix_path(text: str) -> Path | None:
    """The path of a unix: address, or None for host:port.

    Raises:
        InvalidConfiguration: unix: without a path.
    """
    if not text.startswith(_UNIX):
        return None
    path = text[len(_UNIX) :]
    if path.startswith("//"):
        path = path[2:]
    if not path:
        raise InvalidConfiguration(f"address: expected unix:path, got {text!r}")
    return Path(path)


def split_address(text: str) -> tuple[str, int]:
    """Host (without brackets) and port of a host:port address.

    Raises:
        InvalidConfiguration: another form.
    """
    host, separator, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    inner = host[1:-1] if bracketed else host
    good_host = bool(inner) and not any(character in inner for character in "/@ []") and (bracketed or ":" not in inner)
    if not separator or not good_host or not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise InvalidConfiguration(
            f"address: expected host:port or unix:path, got {text[:200]!r}",
            hint="write for example 127.0.0.1:7443, [::1]:7443 or unix:state/control.sock",
        )
    return inner, int(port)


def is_local(text: str) -> bool:
    """Whether only processes of this machine can reach the address: a Unix socket or a loopback host.

    Raises:
        InvalidConfiguration: not an address.
    """
    if unix_path(text) is not None:
        return True
    host, _ = split_address(text)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_local(text: str, what: str) -> None:
    """Refuse to use an address without TLS unless it stays on this machine.

    Raises:
        InvalidConfiguration: the address can be reached from elsewhere.
    """
    if not is_local(text):
        raise InvalidConfiguration(
            f"{what}: expected a Unix socket or a loopback address because no TLS credentials were given, got {text!r}",
            hint="give TLS credentials, or use unix:path or 127.0.0.1:port",
        )
