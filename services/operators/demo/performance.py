"""One demonstration from the first file to the last: what happens in which order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from services.common.clock import Clock
from services.operators.demo.compare import comparison_table, run_comparison
from services.operators.demo.folder import DemoFolder
from services.operators.demo.narration import (
    safety_line,
    tell_accuracy,
    tell_bytes,
    tell_end,
    tell_start,
    tell_verification,
)
from services.operators.demo.options import DemoOptions
from services.operators.demo.processes import Crew
from services.operators.demo.report import accuracies, byte_ratios, make_report, published
from services.operators.demo.shares import deal
from services.operators.demo.stage import Stage, environment
from services.operators.demo.verify import Verification, verify_rounds
from services.operators.demo.watch import Board, Display, Progress, follow_federation, following, open_display
from services.operators.domain import Federation, RegisteredAgent, Round
from services.operators.plan_tables import bytes_table
from services.operators.planning import preflight
from services.operators.render import as_json, round_members_table
from shelora.errors import InternalFault
from shelora.plan import Packing


class Performance:
    """Runs the demonstration and tells a console about it.

    Args:
        options: what was chosen.
        folder: where everything lies.
        console: where to tell.
        clock: for waiting and measuring.
    """

    def __init__(self, options: DemoOptions, folder: DemoFolder, console: Console, clock: Clock) -> None:
        self._options = options
        self._folder = folder
        self._console = console
        self._clock = clock
        self.crew = Crew(environment(options, os.environ), folder.logs, clock)
        self._seconds: dict[str, float] = {}

    async def run(self) -> bool:
        """Everything from the data to the report.

        Returns:
            Whether the verification passed.

        Raises:
            SheLoraError: something failed; processes may still run, see `crew`.
        """
        started_s = self._clock.monotonic_s()
        shares = deal(self._options)
        tell_start(self._console, self._options, self._folder, shares)
        shares.write(self._folder)
        stage = Stage(self._options, self._folder, self.crew, self._clock, shares.labels, len(shares.test))
        federation, rounds = await self._federate(stage, started_s)
        tell_bytes(self._console, byte_ratios(federation, rounds))
        verification = await self._verify(federation, rounds)
        final = accuracies(rounds, self._options.names)
        tell_accuracy(self._console, self._options.names, final["before"], final["after"])
        comparison = await self._compare(final["after"]) if self._options.compare else None
        self._seconds["total"] = self._clock.monotonic_s() - started_s
        adapters = {name: str(self._last_adapter(name, rounds)) for name in self._options.names}
        report = make_report(
            self._options,
            federation,
            rounds,
            verification,
            adapters,
            {name: shares.counts(name) for name in self._options.names},
            len(shares.test),
            self._seconds,
            comparison,
        )
        self._folder.report.write_text(as_json(report) + "\n", encoding="utf-8")
        tell_end(self._console, self._folder, adapters, len(shares.labels), self._seconds["total"])
        return verification.passed

    async def _federate(self, stage: Stage, started_s: float) -> tuple[Federation, list[Round]]:
        """All services and all rounds."""
        options = self._options
        descriptions = {
            name: f"rank {rank}, {budget}"
            for name, rank, budget in zip(options.names, options.ranks, options.budgets, strict=True)
        }
        board = Board(descriptions, started_s)
        with open_display(self._console, board, self._clock) as display:
            profile = stage.write()
            _step(board, display, "setting up the key manager: certificate authority, first CKKS key epoch")
            await stage.start_keymanager()
            _step(board, display, "enrolling the operator, inviting aggregator and agents")
            async with stage.operator(profile) as session:
                await stage.invite(session)
                stage.start_agents()
                _step(board, display, "starting aggregator and agents")
                await stage.start_aggregator()
                display.show(f"dashboard while this runs: {stage.dashboard}")
                await stage.start_federation(session)
                self._seconds["start"] = self._clock.monotonic_s() - started_s
                addresses = {name: stage.control_address(name) for name in options.names}
                progress = Progress(
                    on_plan=lambda federation, agents: _show_plan(display, federation, agents),
                    on_round=lambda found: display.show(round_members_table(found)),
                )
                async with following(addresses, board, display, self._clock):
                    rounds = await follow_federation(session, self.crew, board, display, self._clock, progress)
                federation = board.federation
        await self.crew.stop()
        self._seconds["federation"] = self._clock.monotonic_s() - started_s - self._seconds["start"]
        if federation is None or not published(rounds):
            raise InternalFault("no round was published", hint=f"read the logs in {self._folder.logs}")
        return federation, rounds

    async def _verify(self, federation: Federation, rounds: Sequence[Round]) -> Verification:
        started_s = self._clock.monotonic_s()
        folders = {name: self._folder.revealed(name) for name in self._options.names}
        numbers = [found.number for found in published(rounds)]
        with self._console.status("verifying decrypted averages against float64 averages"):
            dense = federation.spec.parameters if federation.spec.packing is Packing.DENSE else None
            verification = await asyncio.to_thread(verify_rounds, folders, numbers, dense=dense)
        self._seconds["verification"] = self._clock.monotonic_s() - started_s
        tell_verification(self._console, verification)
        return verification

    async def _compare(self, encrypted: Mapping[str, float | None]) -> dict[str, Any]:
        started_s = self._clock.monotonic_s()
        with self._console.status("the same training with plaintext m x n averaging, same seeds"):
            comparison = await run_comparison(self._options, self._folder, self.crew)
        self._seconds["comparison"] = self._clock.monotonic_s() - started_s
        self._console.print(comparison_table(encrypted, comparison["accuracy"]["after"]))
        return comparison

    def _last_adapter(self, name: str, rounds: Sequence[Round]) -> Path:
        """The newest adapter that the agent saved."""
        saved = [self._folder.adapter(name, found.number) for found in published(rounds)]
        return next((path for path in reversed(saved) if path.is_dir()), self._folder.adapter(name, 0))


def _step(board: Board, display: Display, text: str) -> None:
    board.step = text
    display.refresh()


def _show_plan(display: Display, federation: Federation, agents: Sequence[RegisteredAgent]) -> None:
    """Show the plan in force; small budgets are part of the demonstration, so they are allowed, and named."""
    checked = preflight(federation, agents, allow_unsafe=True)
    if checked.explanation is not None:
        display.show(bytes_table(checked.explanation))
        display.show(safety_line(checked.explanation))
