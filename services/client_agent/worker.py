"""An agent's tasks, a method each: negotiate, factors, cipher, apply. Each may be cut at any line and called again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from services.client_agent.adapter import AdapterState
from services.client_agent.averages import Averages
from services.client_agent.domain import Activity, PayloadKind, Received, Upload, View
from services.client_agent.keys import EpochKeys
from services.client_agent.kit import Kit, agreed_layout
from services.client_agent.priorities import ColumnPriorities
from services.client_agent.round import LocalUpdate, cipher_values, factor_tensors, local_update
from services.client_agent.state import load_tensors, write_file, write_tensors
from services.common.digests import digest_of
from shelora.errors import StalePlan, StoredBytesCorrupt
from shelora.plan import Plan, SlotLayout

Float64 = npt.NDArray[np.float64]


class RoundWorker:
    """Carries out what the aggregator's view asks for, with progress on the status board.

    Attributes:
        sending_factors: whether the own factors are on their way or sent, so that nothing of a round is in vain yet.
    """

    def __init__(self, kit: Kit) -> None:
        """Work with these tools."""
        self._kit = kit
        self._priorities = ColumnPriorities(kit)
        self._averages = Averages(kit, self._priorities)
        self.sending_factors = False

    async def negotiate(self, view: View) -> None:
        """Apply the last average, measure column sensitivity, upload it in the form the plan asks for."""
        kit, plan = self._kit, _plan(view)
        keys = await kit.epoch(plan)
        await self.apply(view.last_published_round)
        upload = self._priorities.told(plan)
        if upload is None:
            adapter = await self._averages.newest(plan, keys.seed)
            upload = await self._priorities.tell(plan, keys, adapter, view.vote_columns)
        await kit.aggregator.upload(upload, kit.board.begin(Activity.TRANSFERRING, "sensitivities"))
        kit.board.begin(Activity.WAITING, "waiting for the other agents' sensitivities")

    async def factors(self, view: View) -> None:
        """Apply the last average, train, upload canonical factors; never trains a round twice."""
        kit, plan, number = self._kit, _plan(view), view.round
        self.sending_factors = False
        keys = await kit.epoch(plan)
        await self.apply(view.last_published_round)
        update, metadata = kit.state.load_update(number) or await self._train(plan, keys, number)
        if kit.reveal:
            kit.reveal.factors(number, update, int(metadata["examples"]))
        path = kit.state.round(number) / "factors.upload"
        marker = {"plan_digest": plan.digest().hex()}
        if not path.exists() or kit.state.read_json(path.with_suffix(".json")) != marker:
            orders = await self._priorities.orders(plan, keys, number)
            await kit.blocking.run(lambda: write_tensors(path, factor_tensors(update, orders, kit.columns)))
            kit.state.write_json(path.with_suffix(".json"), marker)
        metrics = {name: float(value) for name, value in metadata["metrics"].items()}
        upload = Upload(PayloadKind.FACTORS, path, number, plan, examples=int(metadata["examples"]), metrics=metrics)
        self.sending_factors = True
        await self._send(upload, "factors")
        kit.board.begin(Activity.WAITING, "waiting for the cohort to close")

    async def cipher(self, view: View) -> None:
        """Fetch the own projection, encrypt the weighted columns, upload them.

        Raises: StoredBytesCorrupt when the own factors are gone.
        """
        kit, plan, number = self._kit, _plan(view), view.round
        keys = await kit.epoch(plan)
        saved = kit.state.load_update(number)
        if saved is None:
            raise StoredBytesCorrupt(
                f"round {number}: this agent's own factors are gone from its disk", hint="it joins the next round"
            )
        started = kit.clock.monotonic_s()
        path = kit.state.round(number) / "cipher.upload"
        report = kit.board.begin(Activity.TRANSFERRING, "projection")
        answer = await kit.aggregator.download(
            PayloadKind.PROJECTION, path.with_name("projection.download"), report, round_number=number
        )
        layout = agreed_layout(plan, answer)
        marker = {"layout_digest": layout.digest().hex()}
        digest = b""
        fresh = not path.exists() or kit.state.read_json(path.with_suffix(".json")) != marker
        if fresh:
            values = await self._values(saved[0], plan, keys, number, answer, layout)
            digest = await self._encrypt(keys, number, values, path)
            kit.state.write_json(path.with_suffix(".json"), marker)
            kit.figures.add(number, seconds_encrypt=kit.clock.monotonic_s() - started)
        kit.figures.add(number, projection_bytes_down=answer.size_bytes)
        encrypted = kit.clock.monotonic_s()
        sent = await self._send(
            Upload(PayloadKind.CIPHER, path, number, plan, layout.digest(), digest=digest), "cipher"
        )
        if fresh:
            self._remember_upload_rate(sent, kit.clock.monotonic_s() - encrypted)
        kit.board.begin(Activity.WAITING, "waiting for the average")

    async def apply(self, number: int) -> None:
        """Bring the adapter up to a published average; nothing to do for one that was applied before."""
        await self._averages.apply(number)

    async def _train(self, plan: Plan, keys: EpochKeys, number: int) -> tuple[LocalUpdate, dict[str, Any]]:
        kit = self._kit
        adapter = await self._averages.newest(plan, keys.seed)
        if kit.evaluate:
            kit.figures.add(number, accuracy_before=await self._averages.accuracy_of(adapter, number))
        report = kit.board.begin(Activity.TRAINING, f"round {number}")
        started = kit.clock.monotonic_s()

        def train() -> tuple[AdapterState, dict[str, float]]:
            kit.load(adapter)
            figures = kit.trainer.train(number, report, kit.blocking.stopping)
            return kit.trainer.get_adapter(), {name: float(value) for name, value in figures.items()}

        trained, metrics = await kit.blocking.run(train)
        metadata = {"examples": kit.trainer.examples, "metrics": metrics}

        sent = kit.trainer.sent_rank

        def keep() -> LocalUpdate:
            update = local_update(trained, kit.trainer.scaling, adapter.residual, sent)
            kit.state.save_update(number, update, metadata)
            return update

        update = await kit.blocking.run(keep)
        seconds = kit.clock.monotonic_s() - started
        kit.figures.add(number, **metrics, seconds_train=seconds, examples=kit.trainer.examples)
        return update, metadata

    async def _values(
        self, update: LocalUpdate, plan: Plan, keys: EpochKeys, number: int, answer: Received, layout: SlotLayout
    ) -> Float64:
        kit = self._kit
        orders = await self._priorities.orders(plan, keys, number)
        return await kit.blocking.run(
            lambda: cipher_values(update, orders, kit.columns, load_tensors(answer.path), answer.weight, layout)
        )

    async def _encrypt(self, keys: EpochKeys, number: int, values: Float64, path: Path) -> bytes:
        """Write the ciphertext; answers the digest of its bytes."""
        kit = self._kit
        report = kit.board.begin(Activity.ENCRYPTING, f"{values.size:,} values")
        total = keys.parameters.blocks_for(values.size)
        started = kit.clock.monotonic_s()
        blocks = await kit.blocking.run(
            lambda: keys.encryptor.encrypt(values, lambda done: report(done / total, f"block {done} of {total}"))
        )
        kit.figures.add(number, seconds_he_encrypt=kit.clock.monotonic_s() - started, cipher_blocks=len(blocks))
        data = blocks.view(np.uint8).data
        await kit.blocking.run(lambda: write_file(path, data))
        return await kit.blocking.run(lambda: digest_of(data))

    async def _send(self, upload: Upload, name: str) -> int:
        """Upload and keep the figures, also when the next view comes before the answer."""
        kit = self._kit
        started = kit.clock.monotonic_s()
        report = kit.board.begin(Activity.TRANSFERRING, upload.kind.value)
        try:
            return await kit.aggregator.upload(upload, report)
        finally:
            size, seconds = upload.path.stat().st_size, kit.clock.monotonic_s() - started
            kit.figures.add(upload.round, **{f"{name}_bytes_up": size, f"seconds_{name}_upload": seconds})

    def _remember_upload_rate(self, sent_bytes: int, seconds: float) -> None:
        if sent_bytes > 1 << 16 and seconds > 0:
            rate = {"upload_bytes_per_s": sent_bytes / seconds}
            self._kit.state.write_json(self._kit.state.root / "link.json", rate, synced=False)


def _plan(view: View) -> Plan:
    if view.plan is None:
        raise StalePlan("the aggregator asks for work without a plan", hint="compare both software versions")
    return view.plan
