"""Who may call what: certificates, roles, revocations, and a walk over every RPC of the contract."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.aggregator.servicer import FederationServicer, RoundServicer
from services.common.channel import call, receive_stream, send_stream
from services.common.identity import Role
from services.common.tls import channel_credentials
from shelora import errors
from shelora.v1 import aggregator_pb2 as wire
from shelora.v1 import aggregator_pb2_grpc
from support.aggregator import FEDERATION, Member
from support.authority import ThrowawayAuthority

SERVICES = wire.DESCRIPTOR.services_by_name
METHODS = [(service, method) for service in SERVICES.values() for method in service.methods]
AGENT_METHODS = {method.name for method in SERVICES["RoundService"].methods}
OPERATOR_METHODS = {method.name for method in SERVICES["FederationService"].methods}


def request_for(method) -> object:
    """A request of the right type that names the federation wherever it can be named."""
    message = getattr(wire, method.input_type.name)()
    for path in ("federation", "spec.federation", "header.federation"):
        *parents, last = path.split(".")
        target = message
        for parent in parents:
            target = getattr(target, parent, None)
        if target is not None and last in target.DESCRIPTOR.fields_by_name:
            setattr(target, last, FEDERATION)
    return message


async def attempt(channel: grpc.aio.Channel, service, method) -> object:
    """Call one RPC; for streams the first answer counts."""
    stub = getattr(getattr(aggregator_pb2_grpc, f"{service.name}Stub")(channel), method.name)
    request = request_for(method)
    if method.client_streaming:

        async def requests() -> AsyncIterator[object]:
            yield request

        return await send_stream(stub, requests(), timeout_s=20)
    if method.server_streaming:
        async with contextlib.aclosing(receive_stream(stub, request, timeout_s=20)) as stream:
            async for message in stream:
                return message
        return None
    return await call(stub, request, timeout_s=20)


@pytest.mark.parametrize(("service", "method"), METHODS, ids=lambda value: value.name)
def test_every_rpc_has_a_handler(service, method):
    servicer = {"FederationService": FederationServicer, "RoundService": RoundServicer}[service.name]
    base = getattr(aggregator_pb2_grpc, f"{service.name}Servicer")
    assert getattr(servicer, method.name) is not getattr(base, method.name)


@pytest.mark.parametrize("role", list(Role))
async def test_every_rpc_admits_its_roles_and_no_others(aggregator, role):
    refused, texts = [], []
    async with aggregator.channel(channel_credentials(aggregator.authority.issue(role, "caller"))) as channel:
        for service, method in METHODS:
            try:
                await attempt(channel, service, method)
            except errors.RoleDenied as error:
                refused.append(method.name)
                texts.append(error.message)
            except (errors.MalformedInput, errors.NotFound, errors.VersionMismatch):
                continue  # Past the door; there is no federation yet.
    allowed = {Role.AGENT: AGENT_METHODS, Role.OPERATOR: OPERATOR_METHODS}.get(role, set())
    assert set(refused) == {method.name for _, method in METHODS} - allowed
    assert all(f"got {role.value}" in text for text in texts)


async def test_every_rpc_refuses_another_federation(aggregator):
    files = aggregator.authority.issue(Role.AGENT, "caller", federation="elsewhere")
    async with aggregator.channel(channel_credentials(files)) as channel:
        for service, method in METHODS:
            with pytest.raises(errors.RoleDenied):
                await attempt(channel, service, method)


@pytest.mark.parametrize("uris", [(), ("spiffe://ward/agent/a", "spiffe://ward/agent/b"), ("https://ward/agent/a",)])
async def test_certificates_without_one_identity_are_refused(aggregator, uris):
    async with aggregator.member(Role.AGENT, "caller", uris=uris) as member:
        with pytest.raises(errors.NotAuthenticated, match="identity"):
            await member.register(2, (10, 6))


async def test_no_certificate_no_call(aggregator):
    credentials = grpc.ssl_channel_credentials(aggregator.authority.pem)
    async with aggregator.channel(credentials) as channel:
        with pytest.raises(errors.PeerUnreachable):
            await call(aggregator_pb2_grpc.RoundServiceStub(channel).LeaveRound, wire.LeaveRoundRequest(), timeout_s=3)


async def test_certificates_of_a_foreign_authority_are_refused(aggregator, tmp_path):
    files = ThrowawayAuthority(tmp_path / "foreign", FEDERATION).issue(Role.AGENT, "agent-1")
    key, certificate, _ = files.read()
    credentials = grpc.ssl_channel_credentials(aggregator.authority.pem, key, certificate)
    async with aggregator.channel(credentials) as channel:
        with pytest.raises(errors.PeerUnreachable):
            await call(aggregator_pb2_grpc.RoundServiceStub(channel).LeaveRound, wire.LeaveRoundRequest(), timeout_s=3)


async def test_members_refuse_an_aggregator_of_a_foreign_authority(aggregator, tmp_path):
    files = ThrowawayAuthority(tmp_path / "foreign", FEDERATION).issue(Role.AGENT, "agent-1")
    async with aggregator.channel(channel_credentials(files)) as channel:
        with pytest.raises(errors.PeerUnreachable):
            await Member("agent-1", channel).register(2, (10, 6))


async def test_health_and_reflection_are_served(aggregator):
    async with aggregator.channel(channel_credentials(aggregator.authority.issue(Role.AGENT, "a"))) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "shelora.v1.FederationService", "shelora.v1.RoundService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
