"""More agents than an aggregator keeps connected, over the wire."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from dataclasses import replace

import httpx
import pytest

from services.aggregator import servicer
from services.client_agent.connection import Connection
from services.client_agent.domain import PayloadKind, Upload
from services.common.channel import call, receive_stream, send_stream
from services.common.clock import SystemClock
from services.common.codec import plan_from_proto
from services.common.grpc_errors import retry_after_s
from services.common.identity import Role
from services.common.transfer import Piece
from shelora.errors import QuotaExceeded
from shelora.v1 import aggregator_pb2 as wire
from support.aggregator import FEDERATION, running_aggregator, upload_header
from support.deployment import until, until_seen
from support.rounds import send_sensitivities
from support.updates import sensitivities


@pytest.fixture
async def aggregator(tmp_path):
    async with running_aggregator(tmp_path, limits={"connected_agents": 2}) as running:
        yield running


@contextlib.asynccontextmanager
async def uploading(agent, view, payload):
    """An upload that has begun and brings nothing more."""
    begun, over = asyncio.Event(), asyncio.Event()

    async def requests():
        yield wire.UploadRequest(header=upload_header(view, wire.PAYLOAD_KIND_SENSITIVITY, payload))
        await over.wait()

    sending = asyncio.create_task(
        send_stream(agent.rounds.Upload, requests(), timeout_s=None, asked=lambda _metadata: begun.set())
    )
    await asyncio.wait_for(begun.wait(), 10)
    try:
        yield
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def metrics(aggregator) -> str:
    async with httpx.AsyncClient(base_url=aggregator.ops_url, trust_env=False) as http:
        return (await http.get("/metrics")).text


def connection_of(aggregator, name: str) -> Connection:
    files = aggregator.authority.issue(Role.AGENT, name)
    return Connection(FEDERATION, aggregator.address, "127.0.0.1:9", files, SystemClock())


async def test_transfers_wait_for_a_place_and_nothing_is_lost(aggregator, negotiating, agents, tmp_path):
    views = [await agent.until(wire.AGENT_TASK_NEGOTIATE) for agent in agents]
    payload = tmp_path / "sensitivities"
    payload.write_bytes(sensitivities(2))
    async with contextlib.AsyncExitStack() as stack:
        holding = contextlib.AsyncExitStack()
        for agent, view in zip(agents[:2], views, strict=False):
            await holding.enter_async_context(uploading(agent, view, sensitivities()))
        header = upload_header(views[2], wire.PAYLOAD_KIND_SENSITIVITY, payload.read_bytes())
        with pytest.raises(QuotaExceeded, match="2 agents at once") as refused:
            await agents[2].upload(header, payload.read_bytes())
        assert (retry_after_s(refused.value) or 0) >= 0.5
        with pytest.raises(QuotaExceeded):
            await agents[2].download(kind=wire.PAYLOAD_KIND_SENSITIVITY, plan_version=1)
        assert 'shelora_stream_places_taken{kind="transfer"} 2.0' in await metrics(aggregator)
        connection = await stack.enter_async_context(connection_of(aggregator, agents[2].name))
        told: list[Exception] = []
        connection._on_error = told.append
        upload = Upload(PayloadKind.SENSITIVITY, payload, 0, plan_from_proto(views[2].plan))
        sending = asyncio.create_task(connection.upload(upload, lambda *_: None))
        await until(lambda: told, "the upload is refused")
        assert not sending.done()
        await holding.aclose()
        assert await asyncio.wait_for(sending, 20) == len(payload.read_bytes())
    assert {type(error) for error in told} == {QuotaExceeded}
    assert (await agents[2].staged(header)).complete


async def endless(*_):
    """Pieces of a payload that has no end, so that its reader's window is full."""
    data, offset = bytes(1 << 20), 0
    while True:
        yield Piece(offset, data, 0)
        offset += len(data)


async def test_a_download_that_its_reader_left_frees_its_place_at_once(aggregator, negotiating, agents, monkeypatch):
    for index, agent in enumerate(agents):
        await send_sensitivities(agent, sensitivities(index))
    await agents[0].until(wire.AGENT_TASK_FACTORS)
    monkeypatch.setattr(servicer, "_stored_pieces", endless)
    kind = wire.PAYLOAD_KIND_SENSITIVITY
    gc.disable()
    try:
        request = wire.DownloadRequest(federation=FEDERATION, kind=kind, plan_version=1)
        stream = agents[0].rounds.Download(request)
        for _ in range(2):
            await stream.read()
        assert 'shelora_stream_places_taken{kind="transfer"} 1.0' in await metrics(aggregator)
        stream.cancel()

        async def freed() -> bool:
            return 'shelora_stream_places_taken{kind="transfer"} 0.0' in await metrics(aggregator)

        await until_seen(freed, "the place is free", patience_s=10)
    finally:
        gc.enable()


async def test_an_agent_without_a_place_comes_back_over_connections_that_it_closes(aggregator, negotiating, agents):
    request = wire.WatchFederationRequest(federation=FEDERATION)
    async with contextlib.AsyncExitStack() as stack:
        for agent in agents[:2]:
            stream = receive_stream(agent.rounds.WatchFederation, request, timeout_s=60)
            views = await stack.enter_async_context(contextlib.aclosing(stream))
            assert not (await anext(views)).view.come_back_ms
        connection = await stack.enter_async_context(connection_of(aggregator, agents[2].name))
        seen = await stack.enter_async_context(contextlib.aclosing(connection.watch()))
        first = await anext(seen)
        second = await asyncio.wait_for(anext(seen), 10)
        assert replace(first, now_ms=0, come_back_ms=0) == replace(second, now_ms=0, come_back_ms=0)
        assert (second.now_ms - first.now_ms) >= 0.9 * first.come_back_ms >= 450
        third = asyncio.ensure_future(anext(seen))
        await until(lambda: connection._link._channel is None, "the connection is closed")
        await third
        assert 'shelora_stream_places_taken{kind="view"} 2.0' in await metrics(aggregator)


async def test_a_refused_upload_holds_its_connection_no_longer(aggregator, negotiating, agents):
    """A call that waits for the garbage collector keeps the connection of its channel open."""
    made: list[weakref.ref[object]] = []
    view = await agents[0].until(wire.AGENT_TASK_NEGOTIATE)

    def noting(timeout=None):
        begun = agents[0].rounds.Upload(timeout=timeout)
        made.append(weakref.ref(begun))
        return begun

    async def requests():
        yield wire.UploadRequest(header=upload_header(view, wire.PAYLOAD_KIND_CIPHER, b""))

    gc.disable()
    try:
        for _ in range(3):
            with contextlib.suppress(Exception):
                await send_stream(noting, requests(), timeout_s=10)
        terms = wire.GetTermsRequest(federation=FEDERATION)
        await call(agents[0].rounds.GetTerms, terms, timeout_s=10)
        assert [reference() for reference in made] == [None] * 3
    finally:
        gc.enable()
