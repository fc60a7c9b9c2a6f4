"""A clock whose sleepers never wait: time passes because somebody sleeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from services.common.clock import Alarm


class HurriedClock:
    """A Clock for code that waits between tries; a sleep moves the time on and gives other tasks a turn."""

    def __init__(self, start_ms: int = 1_700_000_000_000) -> None:
        self._start_ms = start_ms
        self._elapsed_s = 0.0
        self.sleeps: list[float] = []

    def now_ms(self) -> int:
        return self._start_ms + int(self._elapsed_s * 1000)

    def monotonic_s(self) -> float:
        return self._elapsed_s

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self._elapsed_s += max(seconds, 0.0)
        await asyncio.sleep(0)

    def alarm(self, seconds: float, ring: Callable[[], object]) -> Alarm:
        self._elapsed_s += max(seconds, 0.0)
        return asyncio.get_running_loop().call_soon(ring)
