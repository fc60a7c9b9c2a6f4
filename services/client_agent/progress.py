"""The agent's status board: written by its work, read by its control interface and its terminal."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import structlog

from services.client_agent.domain import Activity, Status
from shelora.errors import InternalFault, SheLoraError

log = structlog.get_logger(__name__)
Report = Callable[[float, str], None]


class StatusBoard:
    """Holds the present status and wakes everyone who watches it. Writers may be on any thread.

    Attributes:
        connected: whether the agent is registered and its view stream is open.
        connections: how often it became so since the start.
        errors: how often each stable error code came up since the start, those that a retry mended included.
    """

    def __init__(self, status: Status) -> None:
        """Start from a status; call inside a running event loop."""
        self.connected = False
        self.connections = 0
        self.errors: Counter[str] = Counter()
        self._status = status
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._step = 0

    @property
    def status(self) -> Status:
        """The present status."""
        return self._status

    def update(self, **fields: Any) -> None:
        """Change fields of the status, from the event loop's thread."""
        self._status = replace(self._status, **fields)
        self._changed.set()
        self._changed = asyncio.Event()

    def connect(self) -> None:
        """Note that views arrive."""
        self.connections += not self.connected
        self.connected = True

    def disconnect(self) -> None:
        """Note that no more views arrive."""
        self.connected = False

    def failed(self, error: Exception) -> None:
        """Show an error and count its code."""
        if isinstance(error, SheLoraError):
            code, text = error.code, str(error)
        else:
            code, text = InternalFault.code, f"{type(error).__name__}: {error}"
        self.errors[code] += 1
        self.update(last_error=text)

    def readiness(self) -> dict[str, Any]:
        """Whether the agent can do its part, what it is at, and why it cannot; the answer of /readyz."""
        seen = self._status
        found = {
            "ready": self.connected,
            "activity": seen.activity.value,
            "detail": seen.detail,
            "round": seen.round,
            "applied_round": seen.applied_round,
            "paused": seen.paused,
            "last_error": seen.last_error,
        }
        if not self.connected:
            found["reason"] = seen.last_error or f"{seen.activity.value}: {seen.detail}"
        return found

    def begin(self, activity: Activity, detail: str = "") -> Report:
        """Enter an activity; the returned function reports its fraction (0 to 1) and a text, from any thread."""
        if (activity, detail) != (self._status.activity, self._status.detail):
            log.info("activity", activity=activity.value, round=self._status.round, detail=detail)
        self.update(activity=activity, fraction=0.0, detail=detail)
        self._step += 1
        step = self._step

        def show(fraction: float, text: str) -> None:
            if step == self._step:  # a report that comes late says nothing about the activity after it
                self.update(fraction=min(max(fraction, 0.0), 1.0), detail=text or detail)

        def report(fraction: float, text: str) -> None:
            self._loop.call_soon_threadsafe(show, fraction, text)

        return report

    async def watch(self) -> AsyncIterator[Status]:
        """The present status, then every newer one until the agent has ended; slow readers skip to the newest."""
        while True:
            changed, seen = self._changed, self._status
            yield seen
            if seen.activity is Activity.ENDED:
                return
            if self._status is seen:
                await changed.wait()
