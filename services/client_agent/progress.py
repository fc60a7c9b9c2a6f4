"""The agent's status board: written by its work, read by its control interface and its terminal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from services.client_agent.domain import Activity, Status

Report = Callable[[float, str], None]


class StatusBoard:
    """Holds the present status and wakes everyone who watches it. Writers may be on any thread."""

    def __init__(self, status: Status) -> None:
        """Start from a status; call inside a running event loop."""
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

    def begin(self, activity: Activity, detail: str = "") -> Report:
        """Enter an activity; the returned function reports its fraction (0 to 1) and a text, from any thread."""
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
