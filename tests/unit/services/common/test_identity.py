from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from services.common.identity import Identity, Role, check_name, peer_identity, require_role
from shelora.errors import InvalidIdentifier, NotAuthenticated, RoleDenied

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)


@given(federation=NAMES, role=st.sampled_from(Role), name=NAMES)
def test_identity_survives_its_uri(federation: str, role: Role, name: str) -> None:
    identity = Identity(federation, role, name)
    assert identity.uri == f"spiffe://{federation}/{role.value}/{name}"
    assert Identity.parse(identity.uri) == identity


@given(text=st.text(max_size=80))
def test_arbitrary_text_is_a_name_or_refused(text: str) -> None:
    try:
        assert check_name(text, "agent") == text
    except InvalidIdentifier:
        return
    assert 1 <= len(text) <= 63
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not text.startswith("-")
    assert not text.endswith("-")


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "a/b", "a" * 64, "a\n", "é"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidIdentifier, match="federation name: expected 1 to 63"):
        check_name(name, "federation")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://",
        "spiffe://fed/agent",
        "spiffe://fed/agent/a/b",
        "https://fed/agent/a",
        "spiffe://fed/admin/a",
        "spiffe://FED/agent/a",
        "spiffe://fed/agent/",
        "spiffe:/fed/agent/a",
    ],
)
def test_bad_uris_are_refused(uri: str) -> None:
    with pytest.raises(InvalidIdentifier):
        Identity.parse(uri)


class Context:
    """The one method of a servicer context that identities come from."""

    def __init__(self, *pems: bytes) -> None:
        self._auth: dict[str, list[bytes]] = {"x509_pem_cert": list(pems)} if pems else {}

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._auth


def context(*pems: bytes) -> Any:
    return cast("Any", Context(*pems))


def pem(authority: Any, *uris: str) -> bytes:
    certificate = authority.sign(ec.generate_private_key(ec.SECP256R1()), list(uris))
    return cast("bytes", certificate.public_bytes(Encoding.PEM))


def test_the_caller_is_who_the_certificate_says(authority: Any) -> None:
    caller = context(pem(authority, "spiffe://fed/agent/agent-1"))
    assert peer_identity(caller) == Identity("fed", Role.AGENT, "agent-1")
    assert require_role(caller, Role.OPERATOR, Role.AGENT, federation="fed").name == "agent-1"
    assert require_role(caller, Role.AGENT, federation=None).federation == "fed"


def test_another_role_is_denied(authority: Any) -> None:
    with pytest.raises(RoleDenied, match="expected operator or aggregator, got agent"):
        require_role(context(pem(authority, "spiffe://fed/agent/a")), Role.OPERATOR, Role.AGGREGATOR, federation="fed")


def test_another_federation_is_denied(authority: Any) -> None:
    with pytest.raises(RoleDenied, match="expected other, got fed"):
        require_role(context(pem(authority, "spiffe://fed/agent/a")), Role.AGENT, federation="other")


@pytest.mark.parametrize(
    "uris", [(), ("spiffe://fed/agent/a", "spiffe://fed/operator/a"), ("spiffe://fed/nobody/a",), ("urn:x",)]
)
def test_certificates_without_exactly_one_identity_are_refused(authority: Any, uris: tuple[str, ...]) -> None:
    with pytest.raises(NotAuthenticated):
        peer_identity(context(pem(authority, *uris)))


def test_no_certificate_and_no_pem_are_refused() -> None:
    with pytest.raises(NotAuthenticated, match="got none"):
        peer_identity(context())
    with pytest.raises(NotAuthenticated, match="unreadable"):
        peer_identity(context(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))


def test_roles_show_as_their_value() -> None:
    assert f"{Role.KEYMANAGER}" == "keymanager"
    assert SimpleNamespace(role=Role.AGENT).role == "agent"
