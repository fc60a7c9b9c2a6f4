"""What the tasks of an agent share: its ports, its disk state, and one place for work that blocks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from services.client_agent.adapter import AdapterState
from services.client_agent.domain import Received
from services.client_agent.figures import RoundFigures
from services.client_agent.keys import EpochKeys, KeyRing, check_parameters
from services.client_agent.ports import Aggregator, Trainer
from services.client_agent.progress import StatusBoard
from services.client_agent.reveal import Reveal
from services.client_agent.state import AgentState
from services.common.clock import Clock
from shelora.errors import DigestMismatch
from shelora.plan import Plan, SlotLayout

Result = TypeVar("Result")


class BlockingWork:
    """Runs blocking work on a thread, so that the event loop stays awake."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._stop = threading.Event()

    def stopping(self) -> bool:
        """Whether the running work was cancelled; long work asks between its steps."""
        return self._stop.is_set()

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run one piece of work; when cancelled, wait for its thread so that no two ever share the model."""
        self._stop.clear()
        running = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self._stop.set()
            while not running.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            if not running.cancelled():
                running.exception()  # its failure is of no interest any more
            raise


@dataclass(frozen=True, eq=False)
class Kit:
    """Everything an agent's tasks work with.

    Attributes:
        figures: figures of all rounds.
        columns: the agent's encrypted k per module.
        evaluate: whether accuracy is measured.
        reveal: for verification runs only.
    """

    state: AgentState
    keys: KeyRing
    trainer: Trainer
    aggregator: Aggregator
    board: StatusBoard
    clock: Clock
    figures: RoundFigures
    columns: tuple[int, ...]
    evaluate: bool
    reveal: Reveal | None = None
    blocking: BlockingWork = field(default_factory=BlockingWork)

    async def epoch(self, plan: Plan) -> EpochKeys:
        """Keys of a plan's epoch.

        Raises:
            UnknownEpoch, PeerUnreachable: they cannot be had.
            DigestMismatch: they belong to other parameters than the plan.
        """
        keys = await self.keys.epoch(plan.epoch)
        check_parameters(keys, plan.parameters_digest)
        return keys

    def load(self, adapter: AdapterState) -> None:
        """Put an adapter and its residual into the model; blocks."""
        self.trainer.set_residual(adapter.residual or None)
        self.trainer.set_adapter(adapter)


def agreed_layout(plan: Plan, received: Received) -> SlotLayout:
    """The slot layout of a received payload's cohort.

    Raises: DigestMismatch when both sides derive different ones.
    """
    layout = plan.layout([member.rank for member in received.cohort])
    if layout.digest() != received.layout_digest:
        raise DigestMismatch(
            f"slot layout: derived {layout.digest().hex()[:16]}, the aggregator {received.layout_digest.hex()[:16]}",
            hint="both sides must run the same version of shelora",
        )
    return layout
