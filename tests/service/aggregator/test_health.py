"""What probes hear of an aggregator: the truth on both ports, and the end before it comes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.channel import open_channel
from services.common.clock import SystemClock
from services.common.health import REFRESH_S
from services.common.identity import Role
from services.common.server import NOT_SERVING, SERVING
from services.common.tls import IdentityFiles, channel_credentials
from support.aggregator import running_aggregator
from support.clock import FakeClock

NAMES = ("", "shelora.v1.FederationService", "shelora.v1.RoundService")


async def _hear(clock: FakeClock, watches: list[Any], expected: int) -> None:
    """The next state on every watch, while time goes on."""
    heard = asyncio.gather(*(watch.read() for watch in watches))
    for _ in range(1000):
        if heard.done():
            break
        await clock.advance(REFRESH_S)
        await asyncio.sleep(0.02)
    assert [answer.status for answer in heard.result()] == [expected] * len(watches)


async def _ready_status(url: str) -> int:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"{url}/readyz", timeout=10)).status_code


async def test_both_ports_follow_readiness_both_ways_and_tell_the_end(tmp_path):
    begin_ms = SystemClock().now_ms()
    clock = FakeClock(begin_ms)
    async with contextlib.AsyncExitStack() as serving, contextlib.AsyncExitStack() as channels:
        start = running_aggregator(tmp_path, clock, health_listen="127.0.0.1:0")
        running = await serving.enter_async_context(start)
        credentials = channel_credentials(running.authority.issue(Role.AGENT, "a"))
        main: Any = health_pb2_grpc.HealthStub(await channels.enter_async_context(running.channel(credentials)))
        plain = await channels.enter_async_context(open_channel(f"127.0.0.1:{running.ports['health']}", None))
        probe: Any = health_pb2_grpc.HealthStub(plain)
        watches = [main.Watch(health_pb2.HealthCheckRequest(service=name)) for name in NAMES]
        watches.append(probe.Watch(health_pb2.HealthCheckRequest(service="readiness")))
        await _hear(clock, watches, SERVING)
        assert await _ready_status(running.ops_url) == 200

        # Its certificate ends, as it does when the key manager stays away for too long.
        _, end_ms = IdentityFiles(running.config.identity).validity_ms()
        clock.set_wall(end_ms)
        await _hear(clock, watches, NOT_SERVING)
        assert await _ready_status(running.ops_url) == 503

        clock.set_wall(begin_ms)
        await _hear(clock, watches, SERVING)

        ending = asyncio.create_task(serving.aclose())
        await _hear(clock, watches, NOT_SERVING)
        for name in ("", "liveness"):
            answer = await probe.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == SERVING
        assert await _ready_status(running.ops_url) == 503
        for watch in watches:
            watch.cancel()
        await ending
