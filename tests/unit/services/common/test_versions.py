from __future__ import annotations

import pytest

import shelora
from services.common.versions import PACKAGE_VERSION, PROTOCOL, check_peer_version, own_version
from shelora.errors import VersionMismatch
from shelora.v1 import types_pb2


def test_own_version_is_accepted() -> None:
    message = own_version()
    assert (message.package, message.protocol) == (shelora.__version__, PROTOCOL)
    check_peer_version(message)


def test_another_package_with_the_same_protocol_is_welcome() -> None:
    check_peer_version(types_pb2.SoftwareVersion(package="9.9.9", protocol=PROTOCOL))


@pytest.mark.parametrize("protocol", [0, PROTOCOL + 1])
def test_another_protocol_is_refused_naming_both(protocol: int) -> None:
    with pytest.raises(VersionMismatch) as caught:
        check_peer_version(types_pb2.SoftwareVersion(package="9.9.9", protocol=protocol))
    for part in (PACKAGE_VERSION, "9.9.9", f"protocol {PROTOCOL} ", f"protocol {protocol} "):
        assert part in caught.value.message


def test_a_peer_without_version_is_refused() -> None:
    with pytest.raises(VersionMismatch, match="unnamed"):
        check_peer_version(types_pb2.SoftwareVersion())
