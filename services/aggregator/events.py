"""Wakes whoever a change of a federation concerns, and knows which agents are listening."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

import anyio

from services.aggregator.pacing import Places
from services.common.clock import Clock
from shelora.errors import Draining

ANY: Final = ""
"""Stands for federations that do not exist yet."""

ANYBODY: Final = ""
"""Stands for those who wait for all changes of a federation."""

_LATE_S: Final = 10.0


class Hub:
    """Wake-ups for changes of a federation, and for those that concern one agent.

    A waiter takes the signal first, looks at the state, and then waits for that signal: a change in between is never
    missed.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._signals: dict[str, dict[str, anyio.Event]] = {}
        self._closed = False

    def signal(self, name: str, agent: str = ANYBODY) -> anyio.Event:
        """What the next change of this federation sets, or the next one that concerns the agent."""
        signals = self._signals.setdefault(name, {})
        signal = signals.get(agent)
        if signal is None:
            signal = signals[agent] = anyio.Event()
        return signal

    def notify(self, name: str, concerned: Iterable[str] | None = None) -> None:
        """Wake who waits for any change, and the agents it concerns; all of them when none are named."""
        signals = self._signals.get(name, {})
        for waiter in list(signals) if concerned is None else (ANYBODY, *concerned):
            signal = signals.pop(waiter, None)
            if signal is not None:
                signal.set()

    async def wait(self, signal: anyio.Event, timeout_s: float | None) -> None:
        """Wait for the signal, or until the time is over."""
        if timeout_s is None:
            await signal.wait()
            return
        with anyio.CancelScope() as scope:
            alarm = self._clock.alarm(timeout_s, scope.cancel)
            try:
                await signal.wait()
            finally:
                alarm.cancel()

    def close(self) -> None:
        """Wake everybody for the last time; from now on `require_open` refuses."""
        self._closed = True
        for name in list(self._signals):
            self.notify(name)

    def require_open(self) -> None:
        """Tell streams to end.

        Raises:
            Draining: the service is shutting down.
        """
        if self._closed:
            raise Draining("expected a running aggregator, got one that is shutting down", hint="connect again soon")


class Presence:
    """Signs of life of agents, in memory: after a restart they come again within seconds."""

    def __init__(self, clock: Clock, places: Places) -> None:
        """`places` are those of view streams."""
        self._clock = clock
        self._places = places
        self._seen_ms: dict[tuple[str, str], int] = {}
        self._expected_s: dict[tuple[str, str], float] = {}

    def touch(self, federation: str, agent: str) -> None:
        """Note that an agent called."""
        self._seen_ms[federation, agent] = self._clock.now_ms()

    @contextmanager
    def stream(self, federation: str, agent: str) -> Iterator[bool]:
        """Note that an agent's view stream is open as long as the context is; False when there is no place for it."""
        try:
            with self._places.take(federation, agent) as stays:
                yield stays
        finally:
            self.touch(federation, agent)

    def expect(self, federation: str, agent: str, wait_s: float) -> None:
        """Note when an agent was told to come back: until it is late it counts as connected."""
        self._expected_s[federation, agent] = self._clock.monotonic_s() + 2 * wait_s + _LATE_S

    def connected(self, federation: str, agent: str) -> bool:
        """Whether a view stream is open now, or the agent is expected back."""
        expected_s = self._expected_s.get((federation, agent), 0.0)
        return self._places.taken_by(federation, agent) or self._clock.monotonic_s() < expected_s

    def last_seen_ms(self, federation: str, agent: str) -> int:
        """When the agent last showed itself, 0 when not since the start; now while a stream is open."""
        if self._places.taken_by(federation, agent):
            return self._clock.now_ms()
        return self._seen_ms.get((federation, agent), 0)
