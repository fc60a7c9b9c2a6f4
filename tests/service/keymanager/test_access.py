"""Who reaches what through real TLS: above all, that nobody but an agent ever receives a secret."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.audit import check_chain
from services.common.channel import open_channel
from services.common.clock import SystemClock
from services.common.grpc_errors import error_from_rpc
from services.common.identity import Identity, Role
from services.common.keymanager_client import KeyManagerClient, open_secrets
from services.common.sealing import SealingKey
from services.common.tls import IdentityFiles, channel_credentials
from services.common.versions import PROTOCOL, own_version
from services.keymanager.ca import Authority
from shelora.errors import AgentRevoked, PeerUnreachable, RoleDenied, SheLoraError, UnknownAgent, VersionMismatch
from shelora.v1 import keymanager_pb2 as pb
from support.keymanager import FEDERATION, Running, signing_request, stored_secrets

SERVICES = ("EnrolmentService", "KeyManagerService", "MembershipService")
HPKE = SealingKey.generate()


@dataclass(frozen=True)
class Answer:
    """All that came back of one call: the message, or status text and trailers."""

    method: str
    data: bytes
    message: Message | None
    error: SheLoraError | None


def every_request(token: str) -> dict[str, list[Message]]:
    """For every RPC the requests a greedy caller would try."""
    key = HPKE.public_bytes()
    request = signing_request()
    return {
        "Enrol": [
            pb.EnrolRequest(),
            pb.EnrolRequest(federation=FEDERATION, token=token, csr_der=request, version=own_version()),
            pb.EnrolRequest(federation=FEDERATION, token="x" * 43, csr_der=request, version=own_version()),
        ],
        "RenewCertificate": [pb.RenewCertificateRequest(), pb.RenewCertificateRequest(csr_der=request)],
        "FetchEpoch": [
            pb.FetchEpochRequest(epoch=epoch, hpke_public_key=hpke)
            for epoch in range(4)
            for hpke in (b"", key, key[:9])
        ],
        "ListEpochs": [pb.ListEpochsRequest()],
        "RotateEpoch": [pb.RotateEpochRequest(reason="because")],
        "RetireEpoch": [pb.RetireEpochRequest(epoch=epoch) for epoch in range(4)],
        "CreateEnrolmentToken": [
            pb.CreateEnrolmentTokenRequest(),
            *(pb.CreateEnrolmentTokenRequest(role=role, name="spare") for role in pb.Role.values()),
        ],
        "RevokeIdentity": [
            pb.RevokeIdentityRequest(),
            pb.RevokeIdentityRequest(role=pb.ROLE_AGENT, name="agent-1", reason="because"),
        ],
        "ListRevocations": [pb.ListRevocationsRequest()],
        "ListAuditRecords": [pb.ListAuditRecordsRequest(limit=1000), pb.ListAuditRecordsRequest(limit=5000)],
    }


async def walk(channel: grpc.aio.Channel, token: str) -> AsyncIterator[Answer]:
    """Call every method of all services with every request."""
    requests = every_request(token)
    for service in SERVICES:
        descriptor = pb.DESCRIPTOR.services_by_name[service]
        for method in descriptor.methods:
            call: Any = channel.unary_unary(
                f"/{descriptor.full_name}/{method.name}", request_serializer=lambda message: message.SerializeToString()
            )
            parse = getattr(pb, method.output_type.name).FromString
            for request in requests[method.name]:
                yield await _answer(call, request, method.name, parse)


async def _answer(call: Any, request: Message, method: str, parse: Callable[[bytes], Message]) -> Answer:
    try:
        data = await call(request, timeout=20)
    except grpc.aio.AioRpcError as error:
        trailers = repr(error.trailing_metadata()).encode() + repr(error.details()).encode()
        raw = b"".join(value for _, value in error.trailing_metadata() or () if isinstance(value, bytes))
        return Answer(method, trailers + raw, None, error_from_rpc(error))
    return Answer(method, data, parse(data), None)


def test_the_walk_covers_the_whole_contract() -> None:
    methods = [method.name for name in SERVICES for method in pb.DESCRIPTOR.services_by_name[name].methods]
    assert sorted(every_request("")) == sorted(methods)
    assert sorted(pb.DESCRIPTOR.services_by_name) == sorted(SERVICES)


@pytest.mark.parametrize("role", [Role.AGGREGATOR, Role.OPERATOR])
async def test_no_answer_to_aggregator_or_operator_contains_a_secret(running: Running, role: Role) -> None:
    files = await running.member(role, "one")
    agent = await running.member(Role.AGENT, "agent-1")
    token = (await running.enrolment(Role.AGENT, "agent-2")).token
    secrets = await stored_secrets(running.config)
    answers: list[Answer] = []
    async with (
        running.channel(files) as members,
        running.channel(files, running.membership_address) as membership,
        running.enrolment_channel(files.authority.read_text()) as enrolment,
    ):
        for channel in (members, membership, enrolment):
            answers += [answer async for answer in walk(channel, token)]
    # Epochs made during the walk count as well; those retired by it are in the first list.
    secrets += await stored_secrets(running.config)
    assert len(secrets) >= 4
    for answer in answers:
        for secret in secrets:
            assert not any(secret[at : at + 16] in answer.data for at in range(0, len(secret), 16)), answer.method
        if isinstance(answer.message, pb.FetchEpochResponse):
            assert answer.message.sealed_secrets == b""
    asked = [answer for answer in answers if answer.method == "FetchEpoch" and isinstance(answer.error, RoleDenied)]
    assert len(asked) == 8
    granted = {answer.method for answer in answers if answer.message is not None}
    reads = {"Enrol", "RenewCertificate", "FetchEpoch", "ListEpochs", "ListRevocations"}
    if role is Role.AGGREGATOR:
        assert granted == reads
    else:
        assert granted == set(every_request(""))
    await _agent_is_answered(running, agent, secrets, revoked=role is Role.OPERATOR)


async def _agent_is_answered(running: Running, agent: IdentityFiles, secrets: list[bytes], revoked: bool) -> None:
    """The control experiment: what the walk looked for is what an agent does receive."""
    async with running.client(agent) as client:
        if revoked:
            with pytest.raises(AgentRevoked):
                await client.fetch_epoch(0, HPKE.public_bytes())
            return
        epoch = await client.fetch_epoch(0, HPKE.public_bytes())
    opened = open_secrets(epoch.sealed_secrets, HPKE, FEDERATION, epoch.number, "agent-1")
    assert set(opened) <= set(secrets)
    with pytest.raises(SheLoraError, match="does not open"):
        open_secrets(epoch.sealed_secrets, SealingKey.generate(), FEDERATION, epoch.number, "agent-1")


async def test_the_enrolment_port_serves_no_member_calls(running: Running) -> None:
    files = await running.member(Role.OPERATOR, "alice")
    async with running.enrolment_channel(files.authority.read_text()) as channel:
        with pytest.raises(VersionMismatch):
            await KeyManagerClient(channel).list_epochs()


async def test_without_a_certificate_the_members_port_does_not_answer(running: Running) -> None:
    files = await running.member(Role.OPERATOR, "alice")
    async with running.enrolment_channel(files.authority.read_text(), running.address) as channel:
        with pytest.raises(PeerUnreachable):
            await KeyManagerClient(channel, deadline_s=5).list_epochs()


def foreign_identity(folder: Path, trusted: IdentityFiles) -> IdentityFiles:
    """The identity of an agent, signed by somebody else's authority; it trusts the right one."""
    clock, key = SystemClock(), ec.generate_private_key(ec.SECP256R1())
    foreign = Authority.create(FEDERATION, clock.now_ms())
    issued = foreign.issue(
        Identity(FEDERATION, Role.AGENT, "agent-1"), key.public_key(), now_ms=clock.now_ms(), lifetime_s=3600
    )
    files = IdentityFiles(folder)
    files.write_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    files.write_certificate(issued.certificate_pem.encode(), trusted.authority.read_bytes())
    return files


async def test_a_certificate_of_a_foreign_authority_is_refused_in_the_handshake(
    running: Running, tmp_path: Path
) -> None:
    trusted = await running.member(Role.AGENT, "agent-1")
    channel = open_channel(running.address, channel_credentials(foreign_identity(tmp_path / "foreign", trusted)))
    with pytest.raises(PeerUnreachable):
        await KeyManagerClient(channel, deadline_s=5).fetch_epoch(0, HPKE.public_bytes())
    await channel.close()


async def test_a_client_refuses_a_key_manager_of_a_foreign_authority(running: Running) -> None:
    foreign = Authority.create(FEDERATION, SystemClock().now_ms())
    async with running.enrolment_channel(foreign.pem) as channel:
        with pytest.raises(PeerUnreachable):
            await KeyManagerClient(channel, deadline_s=5).list_epochs()


async def test_a_whole_life_through_the_client(running: Running) -> None:
    operator = await running.member(Role.OPERATOR, "alice")
    agent = await running.member(Role.AGENT, "agent-1")
    aggregator = await running.member(Role.AGGREGATOR, "main")
    async with running.client(operator) as boss, running.client(agent) as device, running.client(aggregator) as server:
        first = await device.fetch_epoch()
        assert (first.federation, first.number, first.state, first.sealed_secrets) == (FEDERATION, 1, "current", b"")
        assert len(first.public_key) == 65_536
        second = await boss.rotate_epoch("scheduled")
        assert (second.number, second.state) == (2, "current")
        assert [(epoch.number, epoch.state) for epoch in await server.list_epochs()] == [
            (2, "current"),
            (1, "superseded"),
        ]
        assert (await boss.retire_epoch(1)).state == "retired"
        assert (await device.fetch_epoch(1)).state == "retired"
        token = await boss.create_token(Role.AGENT, "agent-2", 120)
        assert len(token.token) >= 43
        assert token.authority_pem == agent.authority.read_text()
        assert token.expires_at_ms > SystemClock().now_ms()
        assert (token.keymanager, token.enrolment) == running.config.advertised(Role.AGENT)
        token = await boss.create_token(Role.AGGREGATOR, "second", 120, ("localhost",))
        assert (token.keymanager, token.enrolment) == running.config.advertised(Role.AGGREGATOR)
        assert (await boss.revoke(Role.AGENT, "agent-1", "lost")).number == 3
        assert await server.revocations() == [f"spiffe://{FEDERATION}/agent/agent-1"]
        with pytest.raises(AgentRevoked) as caught:
            await device.fetch_epoch(0, HPKE.public_bytes())
        assert "another name" in caught.value.hint
        with pytest.raises(UnknownAgent):
            await boss.revoke(Role.AGENT, "nobody", "")
        with pytest.raises(RoleDenied, match="expected operator, got aggregator"):
            await server.audit()
        records = await boss.audit(limit=1000)
        check_chain(records)
        denied = [(record.actor, record.outcome) for record in records if record.action == "denied"]
        assert denied == [
            (f"spiffe://{FEDERATION}/agent/agent-1", "agent_revoked"),
            (f"spiffe://{FEDERATION}/operator/alice", "unknown_agent"),
            (f"spiffe://{FEDERATION}/aggregator/main", "role_denied"),
        ]
        assert [record.sequence for record in await boss.audit(after=2, limit=2)] == [3, 4]


async def test_health_and_readiness_tell_the_truth(running: Running) -> None:
    files = await running.member(Role.OPERATOR, "alice")
    async with running.channel(files) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "shelora.v1.KeyManagerService"):
            health = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert health.status == health_pb2.HealthCheckResponse.SERVING

    def read(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{running.ops_port}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    ready = json.loads(await anyio.to_thread.run_sync(read, "/readyz"))
    assert (ready["ready"], ready["federation"], ready["epoch"]) == (True, FEDERATION, 1)
    metrics = await anyio.to_thread.run_sync(read, "/metrics")
    assert f'shelora_build_info{{protocol="{PROTOCOL}",service="keymanager"' in metrics
    assert "shelora_rpc_seconds" in metrics
