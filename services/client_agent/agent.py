"""The client agent: joins a federation and does what its view asks for, until it ends or is stopped.

The agent is level-triggered. The aggregator streams the agent's whole view; the agent keeps one task going that fits
the newest view and drops it when the view asks for something else. A restarted or reconnected agent therefore needs no
memory but its disk state.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import structlog

from services.client_agent.budget import default_threads, resolve_budget
from services.client_agent.conductor import Conductor, clipped
from services.client_agent.config import AgentConfig
from services.client_agent.connection import connect
from services.client_agent.domain import Activity, Registration, Status, View
from services.client_agent.figures import RoundFigures
from services.client_agent.keys import KeyRing
from services.client_agent.kit import Kit
from services.client_agent.metrics import AgentMetrics
from services.client_agent.ports import Membership, Trainer
from services.client_agent.progress import StatusBoard
from services.client_agent.reveal import Reveal
from services.client_agent.state import AgentState
from services.client_agent.worker import RoundWorker
from services.common.clock import Clock, SystemClock
from services.common.retry import Backoff
from shelora.errors import (
    FederationEnded,
    InvalidConfiguration,
    SheLoraError,
    Unavailable,
    UnknownAgent,
    UnknownFederation,
    UnknownRound,
    WrongEpoch,
)

log = structlog.get_logger(__name__)
TrainerFactory = Callable[[AgentConfig, Callable[[float, str], None]], Trainer]
Connector = Callable[[AgentConfig, AgentState, Clock, Callable[[SheLoraError], None]], Awaitable[Membership]]
"""Enrols if needed; the membership tells of every error that it mends by trying again."""

_NOT_YET = (UnknownFederation, UnknownAgent, WrongEpoch)
"""Refusals that pass: the federation is not created yet, its database was restored, or it is moving to a new epoch."""


def load_trainer(config: AgentConfig, report: Callable[[float, str], None]) -> Trainer:
    """The trainer for a configuration; the only place that brings in torch."""
    from services.client_agent.training.trainer import Trainer as LoraTrainer  # control and CLI start without torch

    report(0.0, "loading model and data")
    return LoraTrainer.load(config)


class Agent:
    """One client agent. `run` is the whole life; the other methods may be called while it runs.

    Example:
        agent = Agent(load_config(AgentConfig, path))
        status = await agent.run()
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        clock: Clock | None = None,
        trainer_factory: TrainerFactory = load_trainer,
        connector: Connector = connect,
    ) -> None:
        """Take the configuration; nothing is begun before `run`. Construct inside a running event loop."""
        self.config = config
        self._clock = clock or SystemClock()
        self._trainer_factory = trainer_factory
        self._connector = connector
        self.state = AgentState(config.state_dir)
        self.metrics = AgentMetrics()
        self._figures = RoundFigures(self.state, self.metrics.count)
        applied = self.state.applied_round()
        self.board = StatusBoard(
            Status(
                name="",
                federation=config.federation,
                rank=config.lora.rank,
                sent_rank=config.lora.effective_sent_rank,
                budget=config.encryption.budget,
                applied_round=applied,
                metrics=self._figures.get(applied) if applied else {},
            )
        )
        self.metrics.watch(self.board, self.state)
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._ended = asyncio.Event()
        self._membership: Membership | None = None
        self._conductor: Conductor | None = None

    async def run(self) -> Status:
        """Enrol, load, register, take part; returns the last status when the federation is over or `stop` was called.

        Raises:
            FederationEnded: the federation was stopped.
            SheLoraError: something else that waiting does not mend (configuration, identity, model mismatch).
        """
        life = asyncio.ensure_future(self._live())
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait([life, ended], return_when=asyncio.FIRST_COMPLETED)
            if life.done():
                life.result()
        except SheLoraError as error:
            self.board.failed(error)
            raise
        finally:
            self.board.disconnect()
            for task in (life, ended):
                task.cancel()
            await asyncio.gather(life, ended, return_exceptions=True)
            self.board.begin(Activity.ENDED)
        return self.board.status

    def pause(self) -> None:
        """Begin nothing new until `resume`."""
        self._resumed.clear()
        self.board.update(paused=True)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._resumed.set()
        self.board.update(paused=False)

    async def stop(self, reason: str) -> None:
        """Leave the running round and end `run`."""
        if self._membership is not None and self._conductor is not None and self._conductor.round:
            try:
                await self._membership.leave_round(self._conductor.round, clipped(reason) or "stopped on its device")
            except SheLoraError as error:
                log.warning("leaving the round was not acknowledged", code=error.code)
        self._ended.set()

    def export_adapter(self, round_number: int, folder: Path) -> tuple[Path, int]:
        """Copy a saved PEFT adapter into a folder that is empty or absent; round 0 means the newest.

        Raises:
            UnknownRound: no such adapter is saved.
            InvalidConfiguration: the folder holds something, or cannot be written.
        """
        saved = self.state.adapter_rounds()
        chosen = round_number or (saved[-1] if saved else 0)
        if chosen not in saved:
            raise UnknownRound(
                f"no adapter of round {chosen} is saved here; saved rounds: {saved or 'none'}",
                hint="ask for one of them, or for 0 to get the newest",
            )
        try:
            if folder.exists() and any(folder.iterdir()):
                raise InvalidConfiguration(f"{folder} is not empty", hint="name a new folder")
            shutil.copytree(self.state.adapter(chosen), folder, dirs_exist_ok=True)
        except OSError as error:
            raise InvalidConfiguration(
                f"{folder} cannot be written: {error}", hint="name a new folder that the agent may write"
            ) from error
        return folder, chosen

    def watch(self) -> AsyncIterator[Status]:
        """The status now and after every change, until the agent has ended."""
        return self.board.watch()

    async def _live(self) -> None:
        report = self.board.begin(Activity.PREPARING, "loading model and data")
        with self.state.exclusive():
            loading = asyncio.ensure_future(asyncio.to_thread(self._trainer_factory, self.config, report))
            try:
                membership = await self._connector(self.config, self.state, self._clock, self.board.failed)
                async with membership:
                    self._membership = membership
                    self.board.update(name=membership.name, last_error="")
                    await self._join(membership, await loading)
            finally:
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)

    async def _join(self, membership: Membership, trainer: Trainer) -> None:
        """Take part with keys that are closed at the end."""
        threads = self.config.encryption.threads or default_threads()
        keys = KeyRing(self.state, self.config.federation, membership.name, membership.fetch_epoch, threads)
        try:
            await self._take_part(membership, trainer, keys)
        finally:
            if self._conductor is not None:
                await self._conductor.drop()
            keys.close()

    async def _take_part(self, membership: Membership, trainer: Trainer, keys: KeyRing) -> None:
        """Register and follow the views, again and again, until the federation is over."""
        backoff = Backoff()
        while True:
            try:
                conductor = await self._register(membership, trainer, keys)
                async with contextlib.aclosing(membership.watch()) as views:
                    async for view in views:
                        backoff.reset()
                        self.board.connect()
                        if await self._follow(conductor, view):
                            return
                raise Unavailable("the aggregator closed the view stream")
            except SheLoraError as error:
                self.board.disconnect()
                if not (error.retryable or isinstance(error, _NOT_YET)):
                    raise
                self.board.failed(error)
                if self._conductor is None or not self._conductor.busy:
                    self.board.begin(Activity.RECONNECTING, error.message)
                await self._clock.sleep(backoff.next_s(error))

    async def _follow(self, conductor: Conductor, view: View) -> bool:
        """Follow one view; true when the agent has no more to do, ever."""
        try:
            if not await conductor.follow(view):
                return False
        except FederationEnded:
            if self.config.exit_when_finished:
                raise
        if self.config.exit_when_finished:
            return True
        self.board.begin(Activity.WAITING, f"federation {view.state.value}")
        return False

    async def _register(self, membership: Membership, trainer: Trainer, keys: KeyRing) -> Conductor:
        """Register with the keys of the federation's present epoch."""
        if self._conductor is None:
            self.board.begin(Activity.PREPARING, "fetching keys")
        terms = await membership.terms()
        epoch = await keys.epoch(terms.epoch)
        columns = await resolve_budget(self.config, self.state, trainer.signature.shapes, epoch, terms)
        if self._conductor is None:
            self._conductor = self._make_conductor(membership, trainer, keys, columns)
        await membership.register(
            Registration(
                rank=trainer.sent_rank,
                columns=columns,
                budget=self.config.encryption.budget,
                signature=trainer.signature,
                epoch=epoch.number,
                parameters_digest=epoch.parameters.digest(),
                examples=trainer.examples,
            )
        )
        return self._conductor

    def _make_conductor(
        self, membership: Membership, trainer: Trainer, keys: KeyRing, columns: tuple[int, ...]
    ) -> Conductor:
        reveal_dir = self.config.reveal_dir
        if reveal_dir:
            log.warning("clear factors are written for verification", folder=str(reveal_dir))
        kit = Kit(
            state=self.state,
            keys=keys,
            trainer=trainer,
            aggregator=membership,
            board=self.board,
            clock=self._clock,
            figures=self._figures,
            columns=columns,
            evaluate=self.config.evaluate,
            reveal=Reveal(reveal_dir) if reveal_dir else None,
        )
        return Conductor(RoundWorker(kit), membership, self.board, self._clock, self._resumed)
