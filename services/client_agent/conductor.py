"""From views to work: one task at a time, always the one that the newest view asks for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from services.client_agent.domain import Activity, View
from services.client_agent.ports import Aggregator
from services.client_agent.progress import StatusBoard
from services.client_agent.worker import RoundWorker
from services.common.clock import Clock
from services.common.retry import Backoff
from shelora.errors import (
    FederationEnded,
    NotInCohort,
    SheLoraError,
    StalePlan,
    UnknownRound,
    WrongEpoch,
    WrongPhase,
)
from shelora.rounds.phases import AgentTask, FederationState, RoundPhase

log = structlog.get_logger(__name__)

WENT_ON = (WrongPhase, WrongEpoch, StalePlan, NotInCohort, UnknownRound, FederationEnded)
"""The aggregator is elsewhere by now; the next view says where."""

_REASON_BYTES = 200


@dataclass
class _Work:
    """The task at hand, or the last one."""

    view: View
    task: asyncio.Task[None]

    @property
    def running(self) -> bool:
        return not self.task.done()


class Conductor:
    """Keeps one task going that fits the newest view, and drops it when a view asks for something else."""

    def __init__(
        self, worker: RoundWorker, aggregator: Aggregator, board: StatusBoard, clock: Clock, resumed: asyncio.Event
    ) -> None:
        """`resumed` is cleared while nothing new may begin."""
        self._worker = worker
        self._aggregator = aggregator
        self._board = board
        self._clock = clock
        self._resumed = resumed
        self._work: _Work | None = None

    @property
    def busy(self) -> bool:
        """Whether a task is running."""
        return self._work is not None and self._work.running

    @property
    def round(self) -> int:
        """Round of the last task that was begun, 0 if none."""
        return self._work.view.round if self._work is not None else 0

    async def follow(self, view: View) -> bool:
        """Bring the work at hand in line with a view; true when the federation is over and its last average applied."""
        self._board.update(round=view.round, rounds=view.rounds)
        if view.task is AgentTask.LEAVE:
            await self.drop()
            await self._finish(view)
            return True
        if self._work is not None and self._work.running and self._superseded(self._work.view, view):
            await self.drop()
        if self.busy:
            return False
        if view.task is AgentTask.WAIT:
            self._board.begin(Activity.WAITING, _waiting_for(view))
        elif self._work is None or self._work.view.assignment != view.assignment:
            self._work = _Work(view, asyncio.ensure_future(self._perform(view)))
        return False

    async def drop(self) -> None:
        """Cancel the task at hand and wait until it is gone."""
        work, self._work = self._work, None
        if work is not None and work.running:
            work.task.cancel()
            await asyncio.gather(work.task, return_exceptions=True)

    def _superseded(self, running: View, view: View) -> bool:
        if view.task is AgentTask.WAIT and view.round == running.round:
            # An upload that was just accepted shows as WAIT before its answer arrives; training alone can be in vain.
            late = view.phase not in (RoundPhase.TRAIN, RoundPhase.FACTORS, None)
            return late and running.task is AgentTask.FACTORS and not self._worker.sending_factors
        return view.assignment != running.assignment

    async def _perform(self, view: View) -> None:
        """Work on a view's task until it is done, refused, or can never be done; transient failures are no reason."""
        steps: dict[AgentTask, Callable[[View], Awaitable[None]]] = {
            AgentTask.NEGOTIATE: self._worker.negotiate,
            AgentTask.FACTORS: self._worker.factors,
            AgentTask.CIPHER: self._worker.cipher,
        }
        backoff = Backoff()
        if not self._resumed.is_set():
            self._board.begin(Activity.IDLE, "paused")
            await self._resumed.wait()
        while True:
            try:
                await steps[view.task](view)
                self._board.update(last_error="")
                return
            except WENT_ON as error:
                log.info("the round went on without this agent", round=view.round, code=error.code)
                self._board.failed(error)
                self._board.begin(Activity.WAITING, "waiting for the next round")
                return
            except SheLoraError as error:
                self._board.failed(error)
                if not error.retryable:
                    await self._give_up(view, f"{error.code}: {error.message}")
                    return
                log.warning("step failed, trying again", round=view.round, task=view.task.value, code=error.code)
                await self._clock.sleep(backoff.next_s(error))
            except Exception as error:
                log.exception("step failed", round=view.round, task=view.task.value)
                self._board.failed(error)
                await self._give_up(view, type(error).__name__)
                return

    async def _give_up(self, view: View, reason: str) -> None:
        """Tell the aggregator not to wait; the agent is back in the next round."""
        log.error("giving up the round", round=view.round, task=view.task.value, reason=reason)
        self._board.begin(Activity.WAITING, "waiting for the next round")
        backoff = Backoff()
        while view.round:
            try:
                await self._aggregator.leave_round(view.round, clipped(reason))
                return
            except SheLoraError as error:
                log.warning("leaving the round was not acknowledged", round=view.round, code=error.code)
                if not error.retryable:
                    return
                await self._clock.sleep(backoff.next_s(error))

    async def _finish(self, view: View) -> None:
        """Apply the last average.

        Raises: FederationEnded when the federation was stopped.
        """
        backoff = Backoff()
        stopped = view.state is FederationState.STOPPED
        while True:
            try:
                await self._worker.apply(view.last_published_round)
                self._board.update(last_error="")
                break
            except SheLoraError as error:
                self._board.failed(error)
                if error.retryable:
                    await self._clock.sleep(backoff.next_s(error))
                elif stopped:
                    log.warning("the last average was not applied", code=error.code, reason=error.message)
                    break
                else:
                    raise
        if stopped:
            raise FederationEnded(
                f"the federation was stopped: {view.reason or 'no reason given'}", hint="ask its operator"
            )


def clipped(reason: str) -> str:
    """At most as many bytes as the wire takes."""
    return reason.encode()[:_REASON_BYTES].decode(errors="ignore")


def _waiting_for(view: View) -> str:
    if view.state in (FederationState.CREATED, FederationState.GATHERING):
        return "waiting for the federation to start"
    return f"round {view.round}, {view.phase.value}" if view.phase else "waiting"
