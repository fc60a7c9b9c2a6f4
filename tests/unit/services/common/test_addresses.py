from __future__ import annotations

from pathlib import Path

import pytest

from services.common.addresses import check_address, check_local, is_local, split_address, unix_path
from shelora.errors import InvalidConfiguration


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost:1", ("localhost", 1)),
        ("192.0.2.1:7443", ("192.0.2.1", 7443)),
        ("[::1]:65535", ("::1", 65535)),
        ("aggregator.example.org:0", ("aggregator.example.org", 0)),
    ],
)
def test_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert check_address(text) == text
    assert split_address(text) == expected
    assert unix_path(text) is None


def test_unix_paths() -> None:
    assert unix_path("unix:a/b.sock") == Path("a/b.sock")
    assert unix_path("unix:///run/b.sock") == Path("/run/b.sock")
    assert check_address("unix:a") == "unix:a"


@pytest.mark.parametrize(
    "text", ["", "a", ":1", "a:", "a:65536", "a:-1", "a:x", "::1:5", "[]:5", "a b:1", "unix:", "a:²"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match="expected"):
        check_address(text)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("unix:a", True),
        ("localhost:1", True),
        ("127.8.0.1:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("example.org:1", False),
    ],
)
def test_local_addresses(text: str, local: bool) -> None:
    assert is_local(text) is local
    if local:
        check_local(text, "server")
    else:
        with pytest.raises(InvalidConfiguration, match="no TLS credentials"):
            check_local(text, "server")
