"""Figures of the aggregator for Prometheus: computations, uploads, and where every federation stands."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from services.aggregator.domain import BasisResult, CohortMember, ExpectedPayload
from services.aggregator.ports import Compute, PayloadChecks
from services.aggregator.service import AggregatorService
from services.common.blobs import Blob
from services.common.clock import Clock
from services.common.metrics import bytes_counter, seconds_histogram
from services.common.threads import WorkerPool
from shelora.errors import SheLoraError
from shelora.he.parameters import CkksParameters
from shelora.plan.plan import Plan
from shelora.rounds.phases import FederationState

REFRESH_S: Final = 10.0
"""How old the figures of federations may be."""

_log = structlog.get_logger(__name__)


class MeasuredCompute:
    """A Compute that measures another one: shelora_compute_seconds{step}, also of steps that fail.

    Args:
        compute: does the work.
        registry: where the figures go.
        clock: measures.
    """

    def __init__(self, compute: Compute, registry: CollectorRegistry, clock: Clock) -> None:
        self._compute = compute
        self._clock = clock
        self._seconds = seconds_histogram(registry, "shelora_compute_seconds", "Duration of computations.", ("step",))

    async def compute_basis(self, plan: Plan, members: Sequence[CohortMember], prefix: str) -> BasisResult:
        with self._measured("basis"):
            return await self._compute.compute_basis(plan, members, prefix)

    async def fold_residues(
        self, total: Blob | None, terms: Sequence[Blob], blocks: int, parameters: CkksParameters, key: str
    ) -> Blob:
        with self._measured("fold"):
            return await self._compute.fold_residues(total, terms, blocks, parameters, key)

    async def compute_average(self, plan: Plan, basis: Blob, members: Sequence[CohortMember], key: str) -> Blob:
        with self._measured("average"):
            return await self._compute.compute_average(plan, basis, members, key)

    async def rank_votes(self, plan: Plan, votes: Sequence[Blob], columns: Sequence[int], key: str) -> Blob:
        with self._measured("rank_votes"):
            return await self._compute.rank_votes(plan, votes, columns, key)

    @contextlib.contextmanager
    def _measured(self, step: str) -> Iterator[None]:
        started_s = self._clock.monotonic_s()
        try:
            yield
        finally:
            self._seconds.labels(step).observe(self._clock.monotonic_s() - started_s)


class MeasuredChecks:
    """PayloadChecks that count: shelora_checked_bytes{kind} and shelora_refused_payloads{kind, code}.

    Args:
        checks: does the work.
        registry: where the figures go.
    """

    def __init__(self, checks: PayloadChecks, registry: CollectorRegistry) -> None:
        self._checks = checks
        self._bytes = bytes_counter(registry, "shelora_checked_bytes", "Bytes of payloads that passed.", ("kind",))
        self._refused = Counter(
            "shelora_refused_payloads", "Payloads that are not what the plan says.", ("kind", "code"), registry=registry
        )

    def size_limit_bytes(self, expected: ExpectedPayload) -> int:
        return self._checks.size_limit_bytes(expected)

    async def check(self, blob: Blob, expected: ExpectedPayload) -> None:
        try:
            await self._checks.check(blob, expected)
        except SheLoraError as error:
            self._refused.labels(expected.kind.value, error.code).inc()
            raise
        self._bytes.labels(expected.kind.value).inc(blob.size_bytes)


def watch_pool(registry: CollectorRegistry, name: str, pool: WorkerPool) -> None:
    """Show how busy a pool of threads is: shelora_<name>_running and shelora_<name>_waiting."""
    Gauge(f"shelora_{name}_running", "Calls that run in a thread.", registry=registry).set_function(
        lambda: pool.running
    )
    Gauge(f"shelora_{name}_waiting", "Calls that wait for a thread.", registry=registry).set_function(
        lambda: pool.waiting
    )


class FederationGauges:
    """Where every federation stands; read off the service every `REFRESH_S` seconds.

    Args:
        service: the use cases.
        registry: where the figures go.
        clock: waits.
    """

    def __init__(self, service: AggregatorService, registry: CollectorRegistry, clock: Clock) -> None:
        self._service = service
        self._clock = clock
        self._state = _gauge(registry, "state", "1 for the state it is in.", "state")
        self._round = _gauge(registry, "round", "Running or last round.")
        self._published = _gauge(registry, "published_rounds", "Last published round.")
        self._rounds = _gauge(registry, "rounds", "Rounds in all.")
        self._agents = _gauge(registry, "agents", "Registered agents.")
        self._connected = _gauge(registry, "connected_agents", "Agents with an open view stream.")

    async def run(self) -> None:
        """Refresh until cancelled; a database that does not answer leaves the figures as they were."""
        while True:
            try:
                await self.refresh()
            except Exception as error:
                # Whatever it is, the rounds matter more than the figures about them.
                _log.warning("figures of federations are old", reason=str(error), kind=type(error).__name__)
            await self._clock.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Read every federation once."""
        for found in await self._service.list_federations():
            name = found.spec.federation
            for state in FederationState:
                self._state.labels(name, state.value).set(1 if state is found.state else 0)
            self._round.labels(name).set(0 if found.round is None else found.round.number)
            self._published.labels(name).set(found.last_published_round)
            self._rounds.labels(name).set(found.spec.rounds)
            agents = await self._service.list_agents(name)
            self._agents.labels(name).set(len(agents))
            self._connected.labels(name).set(sum(agent.connected for agent in agents))


def _gauge(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"shelora_federation_{name}", text, ("federation", *labels), registry=registry)
