from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.common.channel import open_channel
from services.common.health import REFRESH_S, HealthServer, Readiness, look
from services.common.server import NOT_SERVING, SERVING, GrpcServer
from shelora.errors import InvalidConfiguration, StoredBytesCorrupt
from shelora.v1 import agent_pb2_grpc
from support.clock import FakeClock


@contextlib.asynccontextmanager
async def served(server: HealthServer | GrpcServer) -> AsyncIterator[Any]:
    """A stub of the health service of a server that runs."""
    port = await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", None) as channel:
            yield health_pb2_grpc.HealthStub(channel)
    finally:
        await server.drain(0)


async def status(stub: Any, service: str) -> int:
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return int(answer.status)


class Service:
    """A readiness check whose answer a test chooses."""

    def __init__(self) -> None:
        self.answer: Mapping[str, Any] | Exception = {"epoch": 1}

    async def ready(self) -> Mapping[str, Any]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def test_a_health_server_answers_without_tls_on_every_address() -> None:
    server = HealthServer("0.0.0.0:0")
    async with served(server) as stub:
        assert [await status(stub, name) for name in ("", "liveness", "readiness")] == [SERVING, SERVING, NOT_SERVING]
        await server.report_ready(True)
        assert await status(stub, "readiness") == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await status(stub, "shelora.v1.KeyManagerService")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"), timeout=20)
        assert (await watch.read()).status == SERVING
        await server.report_ready(False)
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_a_health_server_serves_nothing_else() -> None:
    server = HealthServer("127.0.0.1:0")
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}", None) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", channel))

        async def requests() -> AsyncIterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.ServerReflectionInfo(requests(), timeout=10)))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.drain(0)


async def test_a_health_server_tells_its_end_and_frees_its_address(tmp_path: Path) -> None:
    server = HealthServer("127.0.0.1:0")
    port = await server.start()
    with pytest.raises(InvalidConfiguration, match="expected a free address"):
        await HealthServer(f"127.0.0.1:{port}").start()
    async with open_channel(f"127.0.0.1:{port}", None) as channel:
        watch = cast("Any", health_pb2_grpc.HealthStub(channel)).Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert (await watch.read()).status == SERVING
        drained = asyncio.create_task(server.drain(20))
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        await drained
    await server.drain(0)
    async with served(HealthServer(f"127.0.0.1:{port}")) as stub:
        assert await status(stub, "") == SERVING
    socket = tmp_path / "health.sock"
    private = HealthServer(f"unix:{socket}")
    await private.start()
    assert socket.stat().st_mode & 0o777 == 0o600
    await private.drain(0)


async def test_all_servers_follow_one_check_both_ways() -> None:
    service, clock = Service(), FakeClock()
    health = HealthServer("127.0.0.1:0")

    def register(server: grpc.aio.Server) -> None:
        servicer: Any = agent_pb2_grpc.AgentControlServiceServicer
        agent_pb2_grpc.add_AgentControlServiceServicer_to_server(servicer(), server)

    main = GrpcServer("127.0.0.1:0", None, register)
    async with served(health) as probe, served(main) as stub:

        async def states() -> set[int]:
            return {
                await status(probe, "readiness"),
                await status(stub, ""),
                await status(stub, "shelora.v1.AgentControlService"),
            }

        async with Readiness(service.ready, (health, main), clock).followed():
            assert await states() == {SERVING}
            for answer in (StoredBytesCorrupt("seal: does not open"), {"ready": False}, ValueError("surprise")):
                service.answer = answer
                await clock.advance(REFRESH_S / 2)
                assert await states() == {SERVING}
                await clock.advance(REFRESH_S / 2)
                assert await states() == {NOT_SERVING}
                service.answer = {"ready": True}
                await clock.advance(REFRESH_S)
                assert await states() == {SERVING}
            assert await status(probe, "liveness") == SERVING
        assert clock.sleepers == 0
        assert await states() == {NOT_SERVING}
        assert [await status(probe, name) for name in ("", "liveness")] == [SERVING, SERVING]


async def test_what_cannot_work_from_the_start_is_never_serving() -> None:
    service, health = Service(), HealthServer("127.0.0.1:0")
    service.answer = {"ready": False}
    async with served(health) as probe, Readiness(service.ready, (health,), FakeClock()).followed():
        assert await status(probe, "readiness") == NOT_SERVING


async def test_listeners_hear_of_the_end_even_while_a_check_hangs() -> None:
    asked, clock, health = asyncio.Event(), FakeClock(), HealthServer("127.0.0.1:0")

    async def ready() -> Mapping[str, Any]:
        if asked.is_set():
            await asyncio.Event().wait()
        asked.set()
        return {}

    async with served(health) as probe:
        async with Readiness(ready, (health,), clock).followed():
            await clock.advance(REFRESH_S)
            assert await status(probe, "readiness") == SERVING
        assert await status(probe, "readiness") == NOT_SERVING


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"epoch": 3}, {"ready": True, "epoch": 3}),
        ({"ready": False, "epoch": 3}, {"ready": False, "epoch": 3}),
        (
            StoredBytesCorrupt("no key", hint="restore it"),
            {"ready": False, "code": "stored_bytes_corrupt", "message": "no key (restore it)"},
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), {"ready": False, "code": "storage_full"}),
        (
            ValueError("secret"),
            {"ready": False, "code": "internal_fault", "message": "ValueError in the readiness check"},
        ),
    ],
)
async def test_a_look_says_what_readyz_says(answer: Any, expected: dict[str, Any]) -> None:
    service = Service()
    service.answer = answer
    found = await look(service.ready)
    assert {name: found[name] for name in expected} == expected


async def test_a_check_that_hangs_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.health.CHECK_TIMEOUT_S", 0.05)

    async def ready() -> Mapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    assert await look(ready) == {"ready": False, "code": "unavailable", "message": "no answer in time"}
