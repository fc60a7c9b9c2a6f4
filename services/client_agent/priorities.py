"""Column priorities of every plan version: measured, told in hidden form, fetched as agreed, kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.client_agent import negotiation
from services.client_agent.adapter import AdapterState
from services.client_agent.domain import Activity, PayloadKind, Upload
from services.client_agent.keys import EpochKeys
from services.client_agent.kit import Kit
from services.client_agent.round import wire_orders
from services.client_agent.state import load_tensors, write_file, write_tensors
from shelora.plan import Negotiation, Plan

Int64 = npt.NDArray[np.int64]


class ColumnPriorities:
    """The agent's part in negotiations, and their outcome."""

    def __init__(self, kit: Kit) -> None:
        """Work with these tools."""
        self._kit = kit
        self._ordered: tuple[tuple[bytes, int], tuple[Int64, ...]] | None = None

    def told(self, plan: Plan) -> Upload | None:
        """The payload that was made for a plan version, None before it was."""
        path = self._told_path(plan)
        if not path.exists() or self._kit.state.read_json(path.with_suffix(".json")) != _marker(plan):
            return None
        return Upload(_kind(plan), path, 0, plan)

    async def tell(self, plan: Plan, keys: EpochKeys, adapter: AdapterState, vote_columns: tuple[int, ...]) -> Upload:
        """Measure column sensitivity with an adapter and write the payload that tells it in the plan's form."""
        kit = self._kit
        path = self._told_path(plan)
        report = kit.board.begin(Activity.CALIBRATING, "column sensitivity")

        def work() -> None:
            kit.load(adapter)
            norms = kit.trainer.activation_norms(report)
            scores = negotiation.sensitivities(norms, adapter.right_factors())
            if plan.negotiation is Negotiation.OPE:
                write_tensors(path, negotiation.vote_tensors(keys.seed, plan, scores, vote_columns))
            else:
                write_file(path, negotiation.encrypted_scores(keys, plan.shapes, scores))
            kit.state.write_json(path.with_suffix(".json"), _marker(plan))

        await kit.blocking.run(work)
        return Upload(_kind(plan), path, 0, plan)

    async def agreed(self, plan: Plan, keys: EpochKeys) -> list[Int64]:
        """Column priorities per module, from disk or from the aggregator's negotiated result."""
        if plan.negotiation is Negotiation.NONE:
            return negotiation.natural_priorities(plan.shapes)
        folder = self._kit.state.plan(plan.version)
        path = folder / f"priority-{plan.digest().hex()[:16]}.safetensors"
        if not path.exists():
            found = await self._fetch(plan, keys, folder)
            write_tensors(path, {str(index): order for index, order in enumerate(found)})
        tensors = load_tensors(path)
        return [tensors[str(index)] for index in range(len(plan.shapes.modules))]

    async def orders(self, plan: Plan, keys: EpochKeys, number: int) -> tuple[Int64, ...]:
        """Secret column order of every module in one round; the last one is remembered, a round asks several times."""
        wanted = plan.digest(), number
        if self._ordered is None or self._ordered[0] != wanted:
            agreed = await self.agreed(plan, keys)
            orders = await self._kit.blocking.run(lambda: wire_orders(keys.seed, plan, number, agreed))
            self._ordered = wanted, orders
        return self._ordered[1]

    async def _fetch(self, plan: Plan, keys: EpochKeys, folder: Path) -> list[Int64]:
        kit = self._kit
        report = kit.board.begin(Activity.TRANSFERRING, "column priorities")
        kind = _kind(plan)
        received = await kit.aggregator.download(
            kind, folder / f"{kind.value}.download", report, plan_version=plan.version
        )
        if plan.negotiation is Negotiation.OPE:
            return negotiation.priorities_from_ranking(keys.seed, plan, load_tensors(received.path))
        payload = received.path.read_bytes()
        return await kit.blocking.run(lambda: negotiation.priorities_from_sum(keys, plan, payload))

    def _told_path(self, plan: Plan) -> Path:
        return self._kit.state.plan(plan.version) / f"{_kind(plan).value}.upload"


def _kind(plan: Plan) -> PayloadKind:
    return PayloadKind.VOTES if plan.negotiation is Negotiation.OPE else PayloadKind.SENSITIVITY


def _marker(plan: Plan) -> dict[str, str]:
    return {"plan_digest": plan.digest().hex()}
