"""Time as a constructor argument."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import anyio


class Alarm(Protocol):
    """A call that is going to be made."""

    def cancel(self) -> object:
        """Make it not; fine when it was made already."""
        ...


class Clock(Protocol):
    """What the services ask about time."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch, UTC; may jump when the machine's clock is set."""
        ...

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start; never goes back. For durations and deadlines inside one process."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Suspend the calling task for at least this many seconds (0 or less: yield once)."""
        ...

    def alarm(self, seconds: float, ring: Callable[[], object]) -> Alarm:
        """Have a function called on the event loop after at least this many seconds; cheaper than a sleeping task."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch, UTC."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Seconds on the machine's monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Suspend the calling task."""
        await anyio.sleep(max(0.0, seconds))

    def alarm(self, seconds: float, ring: Callable[[], object]) -> Alarm:
        """Have a function called on the event loop."""
        return asyncio.get_running_loop().call_later(max(0.0, seconds), ring)
