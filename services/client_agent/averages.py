"""Published averages: fetched, opened, re-fitted to the agent's own rank, measured, reported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import structlog

from services.client_agent.adapter import AdapterState
from services.client_agent.domain import Activity, PayloadKind, Received
from services.client_agent.keys import EpochKeys
from services.client_agent.kit import Kit, agreed_layout
from services.client_agent.priorities import ColumnPriorities
from services.client_agent.round import AveragedUpdate, open_modules, refit, starting_adapter
from services.client_agent.state import load_tensors
from shelora.errors import SheLoraError, StoredBytesCorrupt
from shelora.he.residues import as_blocks, check_residues
from shelora.lora import dense_average
from shelora.plan import FederationSeed, Plan, SlotLayout, uniform_stream

log = structlog.get_logger(__name__)


class Averages:
    """The adapters an agent starts its rounds from."""

    def __init__(self, kit: Kit, priorities: ColumnPriorities) -> None:
        """Work with these tools."""
        self._kit = kit
        self._priorities = priorities

    async def apply(self, number: int) -> None:
        """Fetch a published average, re-fit it to the own rank, save the adapter, evaluate, report; once per round."""
        kit = self._kit
        applied = kit.state.applied_round()
        if number < applied or (number == applied and (not applied or kit.state.adapter_state(applied).exists())):
            return
        started = kit.clock.monotonic_s()
        plain = await self._download(PayloadKind.AVERAGE, number)
        cipher = await self._download(PayloadKind.CIPHER, number)
        fetched = kit.clock.monotonic_s()
        await self._open(number, plain, cipher)
        kit.figures.add(
            number,
            average_bytes_down=plain.size_bytes,
            cipher_bytes_down=cipher.size_bytes,
            seconds_download=fetched - started,
            seconds_apply=kit.clock.monotonic_s() - fetched,
        )
        await self._evaluate_applied(number)
        await self._report(number)
        kit.state.set_applied_round(number)
        kit.board.update(applied_round=number, metrics=kit.figures.get(number))
        kit.state.forget_rounds(number)

    async def newest(self, plan: Plan, seed: FederationSeed) -> AdapterState:
        """The adapter of the last applied average, or the common start before the first.

        Raises: StoredBytesCorrupt when the adapter of the last applied average is gone.
        """
        kit = self._kit
        applied = kit.state.applied_round()
        path = kit.state.adapter_state(applied)
        if not path.exists():
            if applied:
                raise StoredBytesCorrupt(
                    f"the adapter of round {applied} is gone from this agent's disk",
                    hint="delete state.json; the agent then fetches the last average again",
                )

            def stream(name: str, count: int) -> npt.NDArray[np.float64]:
                return uniform_stream(seed.derive("dense", plan.federation, plan.epoch, name), count)

            def start() -> None:
                dense = kit.trainer.initial_dense(stream)
                self._save(0, starting_adapter(seed, plan, kit.trainer.rank, dense))

            await kit.blocking.run(start)
        return AdapterState.load(path)

    async def accuracy_of(self, adapter: AdapterState, number: int) -> float:
        """Accuracy before a round; that of an applied average is known already."""
        kit = self._kit
        applied = kit.state.applied_round()
        known = kit.figures.get(applied).get("accuracy_after") if applied else None
        if known is not None:
            return known
        report = kit.board.begin(Activity.EVALUATING, f"before round {number}")
        return (await kit.blocking.run(lambda: self._measure(adapter, report)))[0]

    async def _download(self, kind: PayloadKind, number: int) -> Received:
        kit = self._kit
        report = kit.board.begin(Activity.TRANSFERRING, f"average of round {number}")
        path = kit.state.round(number) / f"{kind.value}.download"
        return await kit.aggregator.download(kind, path, report, round_number=number)

    async def _open(self, number: int, plain: Received, cipher: Received) -> None:
        kit, plan = self._kit, plain.plan
        keys = await kit.epoch(plan)
        orders = await self._priorities.orders(plan, keys, number)
        kit.board.begin(Activity.APPLYING, f"average of round {number}")

        def work() -> float:
            layout = agreed_layout(plan, plain)
            values, seconds = self._decrypt(cipher, keys, layout)
            self._save(number, self._fitted(number, plain, layout, values, keys, orders))
            return seconds

        kit.figures.add(number, seconds_he_decrypt=await kit.blocking.run(work))

    def _decrypt(self, cipher: Received, keys: EpochKeys, layout: SlotLayout) -> tuple[npt.NDArray[np.float64], float]:
        """The opened sum, and the seconds that HE took."""
        blocks = as_blocks(cipher.path.read_bytes(), keys.parameters)
        check_residues(blocks, keys.parameters)
        count = min(len(blocks) * keys.parameters.values_per_block, layout.reals(layout.total_slots))
        started = self._kit.clock.monotonic_s()
        values = keys.decryptor.decrypt(blocks, count)
        return values, self._kit.clock.monotonic_s() - started

    def _fitted(
        self,
        number: int,
        plain: Received,
        layout: SlotLayout,
        values: npt.NDArray[np.float64],
        keys: EpochKeys,
        orders: Sequence[npt.NDArray[np.int64]],
    ) -> AdapterState:
        """The average at the agent's own rank; module after module, unless the whole of it is to be revealed."""
        kit, plan, weight = self._kit, plain.plan, plain.total_weight
        dense, parts = layout.unpack(layout.from_reals(values))
        averaged = [dense_average(part, weight) for part in dense]
        modules: Iterable[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = open_modules(
            load_tensors(plain.path), parts, orders, layout, plain.first_plain, weight
        )
        if kit.reveal:
            modules = list(modules)
            bases, cores = zip(*modules, strict=True) if modules else ((), ())
            opened = AveragedUpdate(bases, cores, tuple(averaged))
            kit.reveal.average(number, opened, [member.agent for member in plain.cohort if member.counted])
        trainer = kit.trainer
        return refit(modules, averaged, keys.seed, plan, number, trainer.rank, trainer.scaling, trainer.sent_rank)

    def _save(self, number: int, adapter: AdapterState) -> None:
        self._kit.trainer.save_adapter(self._kit.state.adapter(number), adapter)
        adapter.save(self._kit.state.adapter_state(number))

    async def _evaluate_applied(self, number: int) -> None:
        kit = self._kit
        if not kit.evaluate:
            return
        adapter = AdapterState.load(kit.state.adapter_state(number))
        report = kit.board.begin(Activity.EVALUATING, f"after round {number}")
        started = kit.clock.monotonic_s()
        accuracy, loss = await kit.blocking.run(lambda: self._measure(adapter, report))
        seconds = kit.clock.monotonic_s() - started
        kit.figures.add(number, accuracy_after=accuracy, loss_after=loss, seconds_evaluate=seconds)

    def _measure(self, adapter: AdapterState, report: Callable[[float, str], None]) -> tuple[float, float]:
        self._kit.load(adapter)
        found = self._kit.trainer.evaluate(report)
        return found.accuracy, found.loss

    async def _report(self, number: int) -> None:
        figures = self._kit.figures.get(number)
        try:
            await self._kit.aggregator.report_round(number, figures)
            log.info("round done", round=number, **{name: round(value, 4) for name, value in figures.items()})
        except SheLoraError as error:
            if error.retryable:
                raise
            log.warning("figures not reported", round=number, code=error.code, reason=error.message)
