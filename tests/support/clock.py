"""A clock that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Generator
from typing import Any

import anyio
import anyio.lowlevel

from services.common.clock import Alarm

_SETTLE_TURNS = 20


class Settling:
    """Awaiting it gives the tasks that were woken some turns of the event loop; ignoring it is fine."""

    def __await__(self) -> Generator[Any, Any, None]:
        return self._settle().__await__()

    @staticmethod
    async def _settle() -> None:
        for _ in range(_SETTLE_TURNS):
            await anyio.lowlevel.checkpoint()


class _Entry:
    """Something that is due at some time."""

    def __init__(self, clock: FakeClock, at_ms: float, order: int, ring: Callable[[], object]) -> None:
        self.due = (at_ms, order)
        self.ring = ring
        self._clock = clock

    def __lt__(self, other: _Entry) -> bool:
        return self.due < other.due

    def cancel(self) -> None:
        self._clock.forget(self)


class FakeClock:
    """A Clock whose time only `advance` moves.

    Wall time and monotonic time move together; `set_wall` makes the wall clock jump alone.
    """

    def __init__(self, start_ms: int = 1_700_000_000_000) -> None:
        self._wall_offset_ms = start_ms
        self._elapsed_ms = 0.0
        self._sleepers: list[_Entry] = []
        self._order = itertools.count()

    def now_ms(self) -> int:
        return self._wall_offset_ms + int(self._elapsed_ms)

    def monotonic_s(self) -> float:
        return self._elapsed_ms / 1000.0

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await anyio.lowlevel.checkpoint()
            return
        over = anyio.Event()
        alarm = self.alarm(seconds, over.set)
        try:
            await over.wait()
        finally:
            alarm.cancel()

    def alarm(self, seconds: float, ring: Callable[[], object]) -> Alarm:
        if seconds <= 0:
            return asyncio.get_running_loop().call_soon(ring)
        entry = _Entry(self, self._elapsed_ms + seconds * 1000.0, next(self._order), ring)
        heapq.heappush(self._sleepers, entry)
        return entry

    def forget(self, entry: _Entry) -> None:
        if entry in self._sleepers:
            self._sleepers.remove(entry)
            heapq.heapify(self._sleepers)

    def advance(self, seconds: float) -> Settling:
        """Move the time and wake every sleeper that is due, earliest first.

        `await clock.advance(5)` also lets the woken tasks run; a plain call only wakes them. A task that sleeps again
        after it woke counts from the new time.
        """
        if seconds < 0:
            raise ValueError(f"a clock cannot go back, got {seconds}")
        self._elapsed_ms += seconds * 1000.0
        while self._sleepers and self._sleepers[0].due[0] <= self._elapsed_ms + 1e-6:
            heapq.heappop(self._sleepers).ring()
        return Settling()

    def advance_to_next(self) -> Settling:
        """Move the time to the earliest sleeper's end; does nothing when nobody sleeps."""
        if self._sleepers:
            return self.advance(max(0.0, (self._sleepers[0].due[0] - self._elapsed_ms) / 1000.0))
        return Settling()

    def set_wall(self, now_ms: int) -> None:
        """Make the wall clock jump without moving the monotonic one or waking anybody."""
        self._wall_offset_ms = now_ms - int(self._elapsed_ms)

    @property
    def sleepers(self) -> int:
        """How many tasks sleep on this clock, and alarms are set."""
        return len(self._sleepers)
