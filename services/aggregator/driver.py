"""Keeps federations going: computations they wait for, deadlines, bytes they need no more.

It remembers nothing: what there is to do is read off the stored state, so a restart continues where the last process
was, and a step that is done twice counts once.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import anyio
import anyio.abc
import structlog

from services.aggregator.events import ANY, Hub
from services.aggregator.ledger import Ledger
from services.aggregator.ports import Compute
from services.aggregator.sweeping import Sweeper
from services.aggregator.works import Works
from services.common.blobs import BlobStore
from services.common.clock import Clock
from shelora.errors import InternalFault, SheLoraError
from shelora.rounds import ComputationFailed, Resumed, Ticked, Work, pending

_log = structlog.get_logger(__name__)

_MILLISECONDS: Final = 1000
_LONGEST_SLEEP_S: Final = 60.0
_FIRST_WAIT_S: Final = 1.0
_LONGEST_WAIT_S: Final = 30.0
_ATTEMPTS: Final = 3
_MOST_DOUBLINGS: Final = 10


@dataclass(frozen=True)
class DriverOptions:
    """What the operator of the aggregator decides.

    Attributes:
        keep_rounds: published rounds whose average and ciphertext sum stay, 0 for all.
        resume_grace_s: after a restart agents get at least this long before the running deadline.
    """

    keep_rounds: int = 0
    resume_grace_s: int = 30


def fresh_token() -> str:
    """A word that no attempt had before."""
    return secrets.token_hex(8)


class Driver:
    """Keeps all federations going.

    Args:
        ledger: the service's.
        hub: the service's.
        blobs: where payloads are.
        compute: does the arithmetic.
        clock: time.
        options: what the operator decides.
        token: a fresh word of a-z 0-9 for every attempt at a computation.
    """

    def __init__(
        self,
        ledger: Ledger,
        hub: Hub,
        blobs: BlobStore,
        compute: Compute,
        clock: Clock,
        options: DriverOptions | None = None,
        token: Callable[[], str] = fresh_token,
    ) -> None:
        self._options = options or DriverOptions()
        self._ledger = ledger
        self._hub = hub
        self._clock = clock
        self._works = Works(ledger, blobs, compute, token)
        self._sweeper = Sweeper(ledger, blobs, self._options.keep_rounds)
        self._failures: dict[tuple[str, Work], int] = {}

    async def recover(self) -> None:
        """Take over what the last process left; call it once, before `run` and before any request is served."""
        await self._sweeper.collect_orphans()
        for name in await self._ledger.names():
            await self._ledger.emit("resume", name, Resumed(self._options.resume_grace_s * _MILLISECONDS))

    async def run(self) -> None:
        """Keep all federations going, those created later included, until cancelled."""
        known: set[str] = set()
        async with anyio.create_task_group() as group:
            while True:
                created = self._hub.signal(ANY)
                for name in await self._ledger.names():
                    if name not in known:
                        known.add(name)
                        group.start_soon(self._repeat, name, self.advance)
                        group.start_soon(self._repeat, name, self.tick)
                await self._hub.wait(created, timeout_s=None)

    async def advance(self, name: str) -> float | None:
        """Do one thing that a federation waits for.

        Returns:
            0 when there may be more to do, the seconds after which to look again, or None to wait for a change.
        """
        # Every change of a large fleet asks this; the database is asked only when there is something to do.
        if not pending((await self._ledger.glance(name)).state):
            await self._sweeper.sweep(name)
            return None
        stored = await self._ledger.read(name)
        works = pending(stored.state)
        if not works:
            return 0.0
        work = works[0]
        try:
            await self._works.run(stored, work)
        except SheLoraError as error:
            return await self._failed(name, work, error)
        except Exception as error:
            _log.exception("computation broke", federation=name, work=type(work).__name__)
            return await self._failed(name, work, InternalFault(f"{type(error).__name__} in a computation"))
        self._failures.pop((name, work), None)
        return 0.0

    async def tick(self, name: str) -> float | None:
        """Apply the deadline when it is over.

        Returns:
            0 when it was, else the seconds until then, or None to wait for a change.
        """
        deadline_ms = (await self._ledger.glance(name)).state.next_deadline_ms
        if not deadline_ms:
            return None
        left_ms = deadline_ms - self._clock.now_ms()
        if left_ms > 0:
            # The wall clock may jump, so long waits are taken in pieces.
            return min(left_ms / _MILLISECONDS, _LONGEST_SLEEP_S)
        await self._ledger.emit("apply_deadline", name, Ticked())
        return 0.0

    async def _failed(self, name: str, work: Work, error: SheLoraError) -> float:
        """Try again what may pass, and a defect a few times; then give the round up with the reason."""
        failures = self._failures.get((name, work), 0) + 1
        self._failures[name, work] = failures
        _log.warning("computation failed", federation=name, work=type(work).__name__, code=error.code, tries=failures)
        if error.retryable or failures < _ATTEMPTS:
            return min(_FIRST_WAIT_S * 2.0 ** min(failures - 1, _MOST_DOUBLINGS), _LONGEST_WAIT_S)
        del self._failures[name, work]
        await self._ledger.emit("give_up", name, ComputationFailed(work, f"{error.code}: {error.message}"))
        return 0.0

    async def _repeat(self, name: str, act: Callable[[str], Awaitable[float | None]]) -> None:
        """Act again and again; what goes wrong is logged and tried again later, it never ends the aggregator."""
        wait_s = _FIRST_WAIT_S
        while True:
            signal = self._hub.signal(name)
            try:
                pause_s = await act(name)
                wait_s = _FIRST_WAIT_S
            except Exception:
                _log.exception("federation cannot go on", federation=name, retry_s=wait_s)
                pause_s, wait_s = wait_s, min(2 * wait_s, _LONGEST_WAIT_S)
                await self._clock.sleep(pause_s)
                continue
            if pause_s != 0.0:
                await self._hub.wait(signal, pause_s)
