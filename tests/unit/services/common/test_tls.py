from __future__ import annotations

import asyncio
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from cryptography import x509

from services.common.channel import call, open_channel
from services.common.identity import Identity, Role, require_role
from services.common.server import GrpcServer
from services.common.tls import (
    IdentityFiles,
    channel_credentials,
    channel_credentials_for_enrolment,
    server_credentials,
)
from shelora.errors import InvalidConfiguration, NotAuthenticated, PeerUnreachable, RoleDenied

KEYMANAGER = "spiffe://fed/keymanager/km"
AGENT = "spiffe://fed/agent/agent-1"


class WhoAmI:
    """Answers the caller's identity; agents of fed only."""

    def register(self, server: grpc.aio.Server) -> None:
        handler: Any = grpc.unary_unary_rpc_method_handler(self.who)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.WhoAmI", {"who": handler}),))

    async def who(self, request: bytes, context: Any) -> bytes:
        return require_role(context, Role.AGENT, federation="fed").uri.encode()


async def who(channel: grpc.aio.Channel) -> str:
    try:
        answer = await call(channel.unary_unary("/test.WhoAmI/who"), b"", timeout_s=10)
    finally:
        await channel.close()
    return bytes(answer).decode()


@pytest.fixture
def server_files(authority: Any, tmp_path: Path) -> IdentityFiles:
    return authority.issue(tmp_path / "server", KEYMANAGER)


@pytest.fixture
async def port(server_files: IdentityFiles) -> AsyncIterator[int]:
    server = GrpcServer("127.0.0.1:0", server_credentials(server_files, True), WhoAmI().register)
    yield await server.start()
    await server.drain(0)


async def test_a_member_is_known_by_its_certificate(authority: Any, tmp_path: Path, port: int) -> None:
    files = authority.issue(tmp_path / "agent", AGENT)
    assert await who(open_channel(f"127.0.0.1:{port}", channel_credentials(files))) == AGENT
    assert await who(open_channel(f"localhost:{port}", channel_credentials(files))) == AGENT


async def test_other_roles_and_federations_are_denied(authority: Any, tmp_path: Path, port: int) -> None:
    for name, uri in (("a", "spiffe://fed/operator/o"), ("b", "spiffe://other/agent/agent-1")):
        files = authority.issue(tmp_path / name, uri)
        with pytest.raises(RoleDenied):
            await who(open_channel(f"127.0.0.1:{port}", channel_credentials(files)))


async def test_a_certificate_without_identity_is_refused(authority: Any, tmp_path: Path, port: int) -> None:
    files = authority.issue(tmp_path / "agent")
    with pytest.raises(NotAuthenticated):
        await who(open_channel(f"127.0.0.1:{port}", channel_credentials(files)))


async def test_no_certificate_or_one_of_another_authority_gets_no_connection(
    authority: Any, tmp_path: Path, port: int
) -> None:
    stranger = type(authority)("another authority").issue(tmp_path / "stranger", AGENT)
    (tmp_path / "stranger" / "authority.pem").write_bytes(authority.pem)
    for credentials in (channel_credentials_for_enrolment(authority.pem), channel_credentials(stranger)):
        with pytest.raises(PeerUnreachable):
            await who(open_channel(f"127.0.0.1:{port}", credentials))


async def test_a_server_of_another_authority_or_name_is_refused(authority: Any, tmp_path: Path, port: int) -> None:
    other = type(authority)("another authority").issue(tmp_path / "other", AGENT)
    with pytest.raises(PeerUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
        await who(open_channel(f"127.0.0.1:{port}", channel_credentials(other)))
    files = authority.issue(tmp_path / "agent", AGENT)
    with pytest.raises(PeerUnreachable):
        await who(open_channel(f"127.0.0.1:{port}", channel_credentials(files), server_name="elsewhere.example"))
    named = open_channel(f"127.0.0.1:{port}", channel_credentials(files), server_name="localhost")
    assert await who(named) == AGENT


async def test_enrolment_needs_no_client_certificate(authority: Any, server_files: IdentityFiles) -> None:
    server = GrpcServer("127.0.0.1:0", server_credentials(server_files, False), WhoAmI().register)
    port = await server.start()
    with pytest.raises(NotAuthenticated, match="got none"):
        await who(open_channel(f"127.0.0.1:{port}", channel_credentials_for_enrolment(authority.pem)))
    await server.drain(0)


def served_certificate(port: int, files: IdentityFiles) -> x509.Certificate:
    """The certificate that a new connection is shown."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(files.authority)
    context.load_cert_chain(files.certificate, files.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        shown = secured.getpeercert(binary_form=True)
        assert shown is not None
        return x509.load_der_x509_certificate(shown)


async def test_a_renewed_certificate_serves_without_restart(
    authority: Any, tmp_path: Path, server_files: IdentityFiles, port: int
) -> None:
    agent = authority.issue(tmp_path / "agent", AGENT)
    lasting = open_channel(f"127.0.0.1:{port}", channel_credentials(agent))
    assert bytes(await call(lasting.unary_unary("/test.WhoAmI/who"), b"", timeout_s=10)).decode() == AGENT
    old = x509.load_pem_x509_certificate(server_files.certificate.read_bytes())
    assert await asyncio.to_thread(served_certificate, port, agent) == old

    authority.issue(server_files.folder, KEYMANAGER)
    new = x509.load_pem_x509_certificate(server_files.certificate.read_bytes())
    assert new != old
    assert await asyncio.to_thread(served_certificate, port, agent) == new
    assert await who(open_channel(f"127.0.0.1:{port}", channel_credentials(agent))) == AGENT
    # The connection made before the renewal goes on.
    assert await who(lasting) == AGENT


async def test_a_renewed_authority_admits_its_members(
    authority: Any, tmp_path: Path, server_files: IdentityFiles, port: int
) -> None:
    successor = type(authority)("successor")
    agent = successor.issue(tmp_path / "agent", AGENT)
    with pytest.raises(PeerUnreachable):
        await who(open_channel(f"127.0.0.1:{port}", channel_credentials(agent)))
    successor.issue(server_files.folder, KEYMANAGER)
    assert await who(open_channel(f"127.0.0.1:{port}", channel_credentials(agent))) == AGENT


async def test_a_broken_renewal_keeps_the_old_certificate(
    authority: Any, tmp_path: Path, server_files: IdentityFiles, port: int
) -> None:
    agent = authority.issue(tmp_path / "agent", AGENT)
    good = server_files.certificate.read_bytes()
    for broken in (b"no certificate", agent.certificate.read_bytes()):
        server_files.certificate.write_bytes(broken)
        with structlog.testing.capture_logs() as logs:
            shown = await asyncio.to_thread(served_certificate, port, agent)
        assert shown == x509.load_pem_x509_certificate(good)
        assert [line["event"] for line in logs] == ["renewed certificate not usable, the old one stays"]
    server_files.certificate.unlink()
    assert await asyncio.to_thread(served_certificate, port, agent) == x509.load_pem_x509_certificate(good)


def test_identity_files(authority: Any, tmp_path: Path) -> None:
    files = IdentityFiles(tmp_path / "new")
    assert not files.complete()
    with pytest.raises(InvalidConfiguration, match="FileNotFoundError"):
        files.read()
    for make in (channel_credentials, lambda f: server_credentials(f, True)):
        with pytest.raises(InvalidConfiguration):
            make(files)
    authority.issue(files.folder, AGENT)
    assert files.complete()
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    assert files.identity() == Identity("fed", Role.AGENT, "agent-1")
    begin_ms, end_ms = files.validity_ms()
    assert end_ms - begin_ms == 2 * 24 * 3600 * 1000
    other = authority.issue(tmp_path / "other", AGENT)
    files.write_certificate(other.certificate.read_bytes(), authority.pem)
    with pytest.raises(InvalidConfiguration, match="another key"):
        files.read()
    with pytest.raises(InvalidConfiguration, match="CA certificate"):
        channel_credentials_for_enrolment(b"")


async def test_channels_and_servers_without_tls_stay_on_the_machine() -> None:
    for make in (
        lambda: open_channel("192.0.2.1:1", None),
        lambda: open_channel("nonsense", None),
        lambda: GrpcServer("192.0.2.1:1", None, WhoAmI().register),
    ):
        with pytest.raises(InvalidConfiguration):
            make()


async def test_a_unix_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    server = GrpcServer(f"unix:{path}", None, WhoAmI().register)
    await server.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    channel = open_channel(f"unix:{path}", None)
    with pytest.raises(NotAuthenticated):
        await who(channel)
    await server.drain(0)
