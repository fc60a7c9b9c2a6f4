"""Figures of the aggregator for Prometheus: computations, uploads, disk, certificate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.aggregator.domain import UPLOAD_KINDS, BasisResult, CohortMember, ExpectedPayload
from services.aggregator.pacing import Pace
from services.aggregator.ports import Arriving, Compute, PayloadChecks
from services.common.blobs import Blob
from services.common.clock import Clock
from services.common.metrics import bytes_counter, seconds_histogram, watch_certificates, watch_disk
from services.common.threads import WorkerPool
from services.common.tls import IdentityFiles
from shelora.errors import SheLoraError
from shelora.he.parameters import CkksParameters
from shelora.plan.plan import Plan


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
        for step in ("basis", "fold", "average", "rank_votes"):
            self._seconds.labels(step)  # from 0 on, so that Prometheus sees the first one as an increase

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
        for kind in UPLOAD_KINDS:
            self._bytes.labels(kind.value)
        self._refused = Counter(
            "shelora_refused_payloads", "Payloads that are not what the plan says.", ("kind", "code"), registry=registry
        )

    def size_limit_bytes(self, expected: ExpectedPayload) -> int:
        return self._checks.size_limit_bytes(expected)

    def arriving(self, expected: ExpectedPayload) -> Arriving:
        return self._checks.arriving(expected)

    async def check(self, path: Path, expected: ExpectedPayload, good_bytes: int = 0) -> int:
        try:
            size_bytes = await self._checks.check(path, expected, good_bytes)
        except SheLoraError as error:
            self._refused.labels(expected.kind.value, error.code).inc()
            raise
        self._bytes.labels(expected.kind.value).inc(size_bytes)
        return size_bytes


def watch_pool(registry: CollectorRegistry, name: str, pool: WorkerPool) -> None:
    """Show how busy a pool of threads is: shelora_<name>_running and shelora_<name>_waiting."""
    Gauge(f"shelora_{name}_running", "Calls that run in a thread.", registry=registry).set_function(
        lambda: pool.running
    )
    Gauge(f"shelora_{name}_waiting", "Calls that wait for a thread.", registry=registry).set_function(
        lambda: pool.waiting
    )


def watch_pace(registry: CollectorRegistry, pace: Pace) -> None:
    """Show the places of agents' streams and how many are taken: shelora_stream_places{kind} and ..._taken{kind}."""
    places = Gauge("shelora_stream_places", "Agents that may have such streams at once.", ("kind",), registry=registry)
    taken = Gauge("shelora_stream_places_taken", "Agents that have such streams.", ("kind",), registry=registry)
    for kind, known in (("view", pace.views), ("transfer", pace.transfers)):
        places.labels(kind).set(known.number)
        taken.labels(kind).set_function(partial(getattr, known, "taken"))


def watch_host(registry: CollectorRegistry, state_dir: Path, files: IdentityFiles) -> None:
    """Show the disk below the state folder and the end of the aggregator's certificate."""
    watch_disk(registry, state_dir)
    watch_certificates(registry, {"aggregator": lambda: files.validity_ms()[1]})
