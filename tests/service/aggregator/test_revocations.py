"""Revoked members are shut out while their certificates are still valid; senders that fall silent are let go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from services.aggregator.payloads import UploadChecks
from services.aggregator.revocations import REFRESH_S, Revocations, follow
from services.aggregator.service import AggregatorService
from services.aggregator.servicer import registration
from services.aggregator.store import MIGRATIONS
from services.common.blobs import DirectoryBlobStore
from services.common.channel import open_channel, receive_stream
from services.common.clock import SystemClock
from services.common.database import Database, migrate
from services.common.grpc_errors import error_from_rpc
from services.common.identity import Identity, Role
from services.common.server import GrpcServer
from services.common.threads import WorkerPool
from services.common.tls import channel_credentials, server_credentials
from shelora import errors
from shelora.v1 import aggregator_pb2 as wire
from support.aggregator import FEDERATION, Member, upload_header
from support.authority import ThrowawayAuthority
from support.clock import FakeClock
from support.keymanager import serving_keymanager
from support.rounds import BUDGETS
from support.updates import sensitivities


@pytest.fixture
def revocations():
    return Revocations()


@pytest.fixture
async def server(tmp_path, revocations):
    """The aggregator's front without its driver; it waits a fifth of a second for a silent sender."""
    authority = ThrowawayAuthority(tmp_path / "identities")
    url = f"sqlite:///{tmp_path / 'state.db'}"
    await asyncio.to_thread(migrate, url, MIGRATIONS)
    database, blobs = Database(url), DirectoryBlobStore(tmp_path / "blobs")
    service = AggregatorService(database, blobs, UploadChecks(WorkerPool(1)), SystemClock())
    files = authority.issue(Role.AGGREGATOR, "aggregator")
    register = registration(service, blobs, revocations, silence_s=0.2)
    server = GrpcServer("127.0.0.1:0", server_credentials(files, require_client=True), register)
    port = await server.start()

    @contextlib.asynccontextmanager
    async def member(role: Role, name: str) -> AsyncIterator[Member]:
        channel = open_channel(f"127.0.0.1:{port}", channel_credentials(authority.issue(role, name)))
        try:
            yield Member(name, channel)
        finally:
            await channel.close()

    try:
        yield member
    finally:
        await service.close()
        await server.drain(1.0)
        await database.close()


async def test_a_revoked_agent_is_refused_and_its_stream_ends(server, revocations):
    async with server(Role.OPERATOR, "olga") as operator, server(Role.AGENT, "agent-1") as agent:
        await operator.create()
        await agent.register(2, (10, 6))
        request = wire.WatchFederationRequest(federation=FEDERATION)
        async with contextlib.aclosing(receive_stream(agent.rounds.WatchFederation, request, timeout_s=20)) as views:
            assert (await anext(views)).view.task == wire.AGENT_TASK_WAIT
            revocations.replace([Identity(FEDERATION, Role.AGENT, "agent-1").uri])
            await operator.start()
            with pytest.raises(errors.AgentRevoked, match="spiffe://ward/agent/agent-1"):
                await anext(views)
        with pytest.raises(errors.AgentRevoked):
            await agent.register(2, (10, 6))
        revocations.replace([])
        await agent.register(2, (10, 6))


async def test_a_silent_sender_is_let_go_and_may_continue(server):
    async with contextlib.AsyncExitStack() as stack:
        operator = await stack.enter_async_context(server(Role.OPERATOR, "olga"))
        await operator.create(target_agents=2)
        agents = [await stack.enter_async_context(server(Role.AGENT, name)) for name in ("agent-1", "agent-2")]
        for agent in agents:
            await agent.register(*BUDGETS[agent.name])
        await operator.start()
        view = await agents[0].until(wire.AGENT_TASK_NEGOTIATE)
        header = upload_header(view, wire.PAYLOAD_KIND_SENSITIVITY, sensitivities())
        call = agents[0].rounds.Upload(timeout=20)
        await call.write(wire.UploadRequest(header=header))

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        error = error_from_rpc(caught.value)
        assert type(error) is errors.Unavailable
        assert "expected the next chunk within 0.2 s" in error.message
        await agents[0].upload(header, sensitivities())


async def test_the_key_managers_list_is_followed(tmp_path):
    async with serving_keymanager(tmp_path) as keymanager, contextlib.AsyncExitStack() as stack:
        aggregator = await keymanager.member(Role.AGGREGATOR, "aggregator")
        operator = await stack.enter_async_context(keymanager.client(await keymanager.member(Role.OPERATOR, "olga")))
        agent = (await keymanager.member(Role.AGENT, "agent-1")).identity()
        clock, revocations = FakeClock(), Revocations()
        task = asyncio.create_task(follow(revocations, keymanager.membership_address, aggregator, clock))
        stack.callback(task.cancel)
        await _asleep(clock)
        revocations.check(agent)
        await operator.revoke(Role.AGENT, "agent-1", "stolen")
        clock.advance(REFRESH_S)
        await _asleep(clock)
        with pytest.raises(errors.AgentRevoked):
            revocations.check(agent)

    # The key manager is gone: the list stays.
    stranded = asyncio.create_task(follow(revocations, keymanager.membership_address, aggregator, clock))
    await _asleep(clock)
    stranded.cancel()
    with pytest.raises(errors.AgentRevoked):
        revocations.check(agent)


async def _asleep(clock: FakeClock) -> None:
    for _ in range(3000):
        if clock.sleepers:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the task never slept")
