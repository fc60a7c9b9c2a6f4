"""The port that an aggregator is given: renewals and revocations, and no way to a secret."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.common.clock import SystemClock
from services.common.enrolment import renew_identity
from services.common.identity import Role
from services.common.keymanager_client import KeyManagerClient
from services.operators.profile import OperatorProfile
from services.operators.session import connect
from shelora.errors import PeerUnreachable, RoleDenied
from shelora.v1 import keymanager_pb2 as pb
from support.keymanager import FEDERATION, Running

CLOCK = SystemClock()


async def code_of(channel: grpc.aio.Channel, path: str) -> grpc.StatusCode:
    """The status that a method ends with when it is called with an empty request."""
    call: Any = channel.unary_unary(path)
    try:
        await call(b"", timeout=20)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("role", [Role.AGGREGATOR, Role.AGENT, Role.OPERATOR])
async def test_no_other_call_is_served(running: Running, role: Role) -> None:
    files = await running.member(role, "one")
    others = ("KeyManagerService", "EnrolmentService")
    paths = [
        f"/shelora.v1.{name}/{method.name}"
        for name in others
        for method in pb.DESCRIPTOR.services_by_name[name].methods
    ]
    assert "/shelora.v1.KeyManagerService/FetchEpoch" in paths
    # Where these two used to be.
    paths += [f"/shelora.v1.KeyManagerService/{name}" for name in ("RenewCertificate", "ListRevocations")]
    async with running.channel(files, running.membership_address) as channel:
        found = {path: await code_of(channel, path) for path in paths}
    assert set(found.values()) == {grpc.StatusCode.UNIMPLEMENTED}
    async with running.channel(files) as channel:
        assert await code_of(channel, "/shelora.v1.KeyManagerService/FetchEpoch") is grpc.StatusCode.OK


async def listed_services(channel: grpc.aio.Channel) -> set[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))

    async def requests() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    answers = [answer async for answer in stub.ServerReflectionInfo(requests(), timeout=10)]
    return {service.name for service in answers[0].list_services_response.service}


async def test_reflection_names_what_each_port_serves(running: Running) -> None:
    files = await running.member(Role.AGGREGATOR, "main")
    standard = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    async with running.channel(files, running.membership_address) as channel:
        assert await listed_services(channel) - standard == {"shelora.v1.MembershipService"}
    async with running.channel(files) as channel:
        both = {"shelora.v1.MembershipService", "shelora.v1.KeyManagerService"}
        assert await listed_services(channel) - standard == both
    async with running.enrolment_channel(files.authority.read_text()) as channel:
        assert await listed_services(channel) - standard == {"shelora.v1.EnrolmentService"}


@pytest.mark.parametrize("role", [Role.AGGREGATOR, Role.AGENT, Role.OPERATOR])
async def test_every_member_can_renew_on_both_ports(running: Running, role: Role) -> None:
    files = await running.member(role, "one")
    for address in (running.membership_address, running.address):
        before = files.certificate.read_bytes()
        assert await renew_identity(files, address, CLOCK) == files.validity_ms()[1]
        assert files.certificate.read_bytes() != before


async def test_revocations_are_for_aggregators_and_operators(running: Running) -> None:
    aggregator, agent = await running.member(Role.AGGREGATOR, "main"), await running.member(Role.AGENT, "agent-1")
    async with running.client(await running.member(Role.OPERATOR, "alice")) as operator:
        await operator.revoke(Role.AGENT, "agent-1", "lost")
    stranger = await running.member(Role.AGENT, "agent-2")
    async with running.channel(aggregator, running.membership_address) as channel:
        assert await KeyManagerClient(channel).revocations() == [agent.identity().uri]
    async with running.channel(stranger, running.membership_address) as channel:
        with pytest.raises(RoleDenied, match="expected aggregator or operator, got agent"):
            await KeyManagerClient(channel).revocations()


async def test_without_a_certificate_nobody_is_answered(running: Running) -> None:
    files = await running.member(Role.AGGREGATOR, "main")
    async with running.enrolment_channel(files.authority.read_text(), running.membership_address) as channel:
        with pytest.raises(PeerUnreachable):
            await KeyManagerClient(channel, deadline_s=5).revocations()


async def test_an_operator_hands_out_the_addresses_that_the_key_manager_advertises(
    running: Running, tmp_path: Path
) -> None:
    files = await running.member(Role.OPERATOR, "alice")
    # The address that the operator uses is nobody else's business: a forwarded port, for example.
    profile = OperatorProfile(
        federation=FEDERATION, aggregator="127.0.0.1:9", keymanager=running.address, identity_dir=files.folder
    )
    async with connect(profile, CLOCK) as session:
        aggregator, _ = await session.issue(Role.AGGREGATOR, "main", 600, ("localhost",))
        agent, _ = await session.issue(Role.AGENT, "agent-1", 600, ())
    assert (aggregator.keymanager, aggregator.enrolment) == ("127.0.0.1:3", "127.0.0.1:2")
    assert (agent.keymanager, agent.enrolment) == ("127.0.0.1:1", "127.0.0.1:2")
