"""What probes hear: the same truth on every port, while it works, while it cannot, and while it drains."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.channel import open_channel
from services.common.clock import SystemClock
from services.common.health import REFRESH_S
from services.common.identity import Role
from services.common.server import NOT_SERVING, SERVING
from services.keymanager.domain import StoredAuthority
from services.keymanager.store import Records
from support.clock import FakeClock
from support.keymanager import Running, raw_store, serving_keymanager

PORTS = {
    "grpc": ("", "shelora.v1.KeyManagerService", "shelora.v1.MembershipService"),
    "membership": ("", "shelora.v1.MembershipService"),
    "enrolment": ("", "shelora.v1.EnrolmentService"),
    "health": ("readiness",),
}


@dataclass
class Probes:
    """Open watches on the health of all ports, and the HTTP that says the same."""

    running: Running
    clock: FakeClock
    stubs: dict[str, Any]
    watches: dict[tuple[str, str], Any]

    async def hear(self, expected: int) -> None:
        """The next state on every port, while time goes on."""
        heard = asyncio.gather(*(watch.read() for watch in self.watches.values()))
        for _ in range(1000):
            if heard.done():
                break
            await self.clock.advance(REFRESH_S)
            await asyncio.sleep(0.02)
        states = {which: answer.status for which, answer in zip(self.watches, heard.result(), strict=True)}
        assert states == dict.fromkeys(self.watches, expected)

    async def check(self, port: str, service: str) -> int:
        answer = await self.stubs[port].Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        return int(answer.status)

    async def readyz(self) -> tuple[int, Any]:
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = await client.get(f"http://127.0.0.1:{self.running.ops_port}/readyz", timeout=10)
        return answer.status_code, json.loads(answer.text)


@contextlib.asynccontextmanager
async def probed(running: Running, clock: FakeClock) -> AsyncIterator[Probes]:
    files = await running.member(Role.AGGREGATOR, "main")
    async with contextlib.AsyncExitStack() as stack:
        channels = {
            "grpc": await stack.enter_async_context(running.channel(files)),
            "membership": await stack.enter_async_context(running.channel(files, running.membership_address)),
            "enrolment": await stack.enter_async_context(running.enrolment_channel(files.authority.read_text())),
            "health": await stack.enter_async_context(open_channel(f"127.0.0.1:{running.ports['health']}", None)),
        }
        stubs: dict[str, Any] = {name: health_pb2_grpc.HealthStub(channel) for name, channel in channels.items()}
        watches = {
            (port, service): stubs[port].Watch(health_pb2.HealthCheckRequest(service=service))
            for port, services in PORTS.items()
            for service in services
        }
        yield Probes(running, clock, stubs, watches)
        for watch in watches.values():
            watch.cancel()


async def put_authority(running: Running, stored: StoredAuthority) -> None:
    async with raw_store(running.config) as (store, _):
        await store.run_tx("test", lambda records: records.put_authority(stored))


async def test_every_port_follows_readiness_both_ways_and_tells_the_end(tmp_path: Path) -> None:
    clock = FakeClock(SystemClock().now_ms())
    async with contextlib.AsyncExitStack() as serving:
        changes = {"health_listen": "127.0.0.1:0"}
        running = await serving.enter_async_context(serving_keymanager(tmp_path, clock, **changes))
        async with raw_store(running.config) as (store, _):
            stored = await store.run_tx("test", Records.authority)
        assert stored is not None
        async with probed(running, clock) as probes:
            await probes.hear(SERVING)
            assert (await probes.readyz())[0] == 200

            # As if another database had been restored: the key-encryption key opens the authority's key no longer.
            await put_authority(running, replace(stored, sealed_key=stored.sealed_key[:-1] + b"\x00"))
            await probes.hear(NOT_SERVING)
            status, body = await probes.readyz()
            assert (status, body["ready"], body["code"]) == (503, False, "stored_bytes_corrupt")
            assert [await probes.check("health", name) for name in ("", "liveness")] == [SERVING, SERVING]

            await put_authority(running, stored)
            await probes.hear(SERVING)

            # The watches are calls that run: the ports wait for them, and are alive until they end.
            ending = asyncio.create_task(serving.aclose())
            await probes.hear(NOT_SERVING)
            assert (await probes.readyz())[0] == 503
            assert [await probes.check("health", name) for name in ("", "liveness")] == [SERVING, SERVING]
            with pytest.raises(grpc.aio.AioRpcError):
                await probes.check("grpc", "")
            for watch in probes.watches.values():
                watch.cancel()
            await ending
            with pytest.raises(grpc.aio.AioRpcError):
                await probes.check("health", "liveness")


async def test_no_health_port_unless_asked_for(running: Running) -> None:
    assert sorted(running.ports) == ["enrolment", "grpc", "membership", "ops", "pid"]
