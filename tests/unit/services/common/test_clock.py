from __future__ import annotations

import time

import anyio
import anyio.lowlevel
import pytest

from services.common.clock import Clock, SystemClock
from support.clock import FakeClock


async def test_the_system_clock_follows_the_machine() -> None:
    clock: Clock = SystemClock()
    assert abs(clock.now_ms() - time.time() * 1000) < 5_000
    before_s = clock.monotonic_s()
    await clock.sleep(0.01)
    await clock.sleep(-1)
    assert clock.monotonic_s() - before_s >= 0.01


async def test_sleepers_wake_when_their_time_has_come() -> None:
    clock = FakeClock(start_ms=1_000)
    woken: list[str] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(name)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleeper, "late", 2.0)
        tasks.start_soon(sleeper, "early", 1.0)
        tasks.start_soon(sleeper, "never-waits", 0.0)
        await clock.advance(0)
        assert woken == ["never-waits"]
        assert clock.sleepers == 2
        await clock.advance(1.0)
        assert woken == ["never-waits", "early"]
        assert (clock.now_ms(), clock.monotonic_s()) == (2_000, 1.0)
        await clock.advance_to_next()
    assert woken[-1] == "late"
    assert clock.now_ms() == 3_000
    clock.advance_to_next()
    assert clock.now_ms() == 3_000


@pytest.mark.parametrize("clock", [SystemClock(), FakeClock()], ids=["system", "fake"])
async def test_alarms_ring_when_their_time_has_come_unless_cancelled(clock: Clock) -> None:
    rung: list[str] = []
    clock.alarm(0.2, lambda: rung.append("late"))
    clock.alarm(0.1, lambda: rung.append("early"))
    clock.alarm(0.1, lambda: rung.append("cancelled")).cancel()
    clock.alarm(0, lambda: rung.append("at once"))
    assert rung == []
    with anyio.fail_after(5):
        while not rung:
            await anyio.lowlevel.checkpoint()
        assert rung == ["at once"]
        if isinstance(clock, FakeClock):
            await clock.advance(0.2)
        while len(rung) < 3:
            await anyio.lowlevel.checkpoint()
    assert rung == ["at once", "early", "late"]


async def test_a_plain_advance_wakes_without_waiting() -> None:
    clock = FakeClock()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(clock.sleep, 5.0)
        await clock.advance(0)
        clock.advance(5)
    assert clock.sleepers == 0


async def test_cancelled_sleepers_are_forgotten() -> None:
    clock = FakeClock()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(clock.sleep, 5.0)
        await clock.advance(0)
        tasks.cancel_scope.cancel()
    assert clock.sleepers == 0


def test_wall_clock_jumps_alone_and_time_never_goes_back() -> None:
    clock = FakeClock(start_ms=10_000)
    clock.advance(1)
    clock.set_wall(500)
    assert (clock.now_ms(), clock.monotonic_s()) == (500, 1.0)
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-1)
