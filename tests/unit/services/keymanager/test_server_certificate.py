from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from cryptography import x509

from services.common.identity import Identity, Role, certificate_identity
from services.keymanager.ca import Authority
from services.keymanager.server_certificate import ServerCertificate
from support.clock import FakeClock

Fetch = Callable[[], Any]
START_MS = 1_700_000_000_000


@pytest.fixture
def configurations(monkeypatch: pytest.MonkeyPatch) -> list[x509.Certificate]:
    """Every certificate that was handed to gRPC, whose configuration objects cannot be read back."""
    seen: list[x509.Certificate] = []
    original = grpc.ssl_server_certificate_configuration

    def spy(chain: Any, roots: bytes) -> Any:
        seen.append(x509.load_pem_x509_certificate(chain[0][1]))
        return original(chain, roots)

    monkeypatch.setattr(grpc, "ssl_server_certificate_configuration", spy)
    return seen


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[Fetch]:
    """What gRPC would ask at every handshake, one function a port."""
    seen: list[Fetch] = []
    original = grpc.dynamic_ssl_server_credentials

    def spy(initial: Any, fetch: Fetch, require_client: bool) -> Any:
        seen.append(fetch)
        return original(initial, fetch, require_client)

    monkeypatch.setattr(grpc, "dynamic_ssl_server_credentials", spy)
    return seen


def test_both_ports_learn_of_a_renewal_once(configurations: list[x509.Certificate], fetches: list[Fetch]) -> None:
    clock = FakeClock(START_MS)
    certificate = ServerCertificate(Authority.create("clinics", START_MS), ("localhost", "::1"), 3000, clock)
    for require_client in (True, False):
        certificate.credentials(require_client=require_client)
    clock.advance(1999)
    assert [fetch() for fetch in fetches] == [None, None]
    clock.advance(1)
    assert all(fetch() is not None for fetch in fetches)
    assert [fetch() for fetch in fetches] == [None, None]
    first, second = configurations
    assert first.public_key() != second.public_key()
    assert certificate_identity(second) == Identity("clinics", Role.KEYMANAGER, "keymanager")
    names = second.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]


def test_a_renewal_that_fails_leaves_the_old_certificate(fetches: list[Fetch]) -> None:
    clock = FakeClock(START_MS)
    certificate = ServerCertificate(Authority.create("clinics", START_MS), ("localhost",), 3000, clock)
    certificate.credentials(require_client=True)
    clock.advance(3653 * 86_400 + 1)
    assert fetches[0]() is None
