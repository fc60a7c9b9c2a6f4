"""Waits that must not last too long, at the price of two assignments each: for loops that wait thousands of times."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Patience:
    """Calls back once one wait lasts too long. Make it, and use it, in the event loop.

    One timer serves all waits: it looks whether the present one began long enough ago, and if not sets itself again.

    Args:
        longest_s: longest wait in seconds.
        give_up: called while the wait goes on; ending the wait is its business.
    """

    def __init__(self, longest_s: float, give_up: Callable[[], object]) -> None:
        self._longest_s = longest_s
        self._give_up = give_up
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> float:
        """A wait begins; answers the event loop's time."""
        self._since = now = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(now + self._longest_s, self._look)
        return now

    def end(self) -> None:
        """The wait is over."""
        self._since = None

    def close(self) -> None:
        """No more waits."""
        self.end()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._since is None:
            return
        at = self._since + self._longest_s
        if self._loop.time() < at:
            self._timer = self._loop.call_at(at, self._look)
        else:
            self._since = None
            self._give_up()
