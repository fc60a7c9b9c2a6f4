"""Figures of federations for Prometheus; names begin with shelora_federation_.

Everything here is read off the database every `REFRESH_S` seconds, so a restart changes no figure: what is history
(rounds that ended, their seconds and bytes) comes as counters that begin where they were, because they are counted
anew from the first round.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from services.aggregator import store
from services.aggregator.service import AggregatorService
from services.aggregator.store import Connection, StoredFederation
from services.aggregator.store.tallies import EndedRound
from services.common.clock import Clock
from shelora.errors import error_classes
from shelora.rounds import AgentTask, FederationState, RoundPhase, task_for

REFRESH_S: Final = 10.0
"""How old the figures of federations may be."""

AWAY: Final = "away"
"""State of an agent without an open view stream; the others are in the state of their task."""

REASONS: Final = {
    "no factors came": "no_factors",
    "factors of ": "too_few_factors",
    "ciphertexts of ": "too_few_ciphertexts",
    "the federation was stopped": "federation_stopped",
}
"""How the reasons of abandoned rounds begin, and their stable codes; a failed computation has its error's code."""

OTHER_REASON: Final = "other"

_MILLISECONDS: Final = 1000
_STEPS: Final = ("train", "encrypt", "he_encrypt", "factors_upload", "cipher_upload", "download", "he_decrypt", "apply")
_ACCURACY: Final = {"before": "accuracy_before", "after": "accuracy_after"}
_LOSS: Final = {"training": "loss", "after": "loss_after"}

_log = structlog.get_logger(__name__)


class FederationMetrics:
    """Where every federation stands.

    Args:
        service: the use cases.
        registry: where the figures go.
        clock: waits.
    """

    def __init__(self, service: AggregatorService, registry: CollectorRegistry, clock: Clock) -> None:
        self._service = service
        self._clock = clock
        self._present = _Present(registry)
        self._history = _History(registry)
        self._reported = _Reported(registry)
        self._database_up = Gauge(
            "shelora_database_up", "1 when the database answered the last time it was asked.", registry=registry
        )

    async def run(self) -> None:
        """Refresh until cancelled; a database that does not answer leaves the figures as they were."""
        while True:
            try:
                await self.refresh()
                self._database_up.set(1)
            except Exception as error:
                # Whatever it is, the rounds matter more than the figures about them.
                self._database_up.set(0)
                _log.warning("figures of federations are old", reason=str(error), kind=type(error).__name__)
            await self._clock.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Read every federation once."""
        for name in await self._service.ledger.names():
            await self._refresh(name, await self._service.ledger.read(name))

    async def _refresh(self, name: str, stored: StoredFederation) -> None:
        published = stored.state.last_published_round

        async def body(connection: Connection) -> tuple[list[EndedRound], dict[str, int], list[dict[str, float]]]:
            ended = await store.tallies.ended_rounds(connection, name, self._history.last_counted(name))
            present = await store.tallies.present_bytes(connection, name)
            reports = await store.history.figures_of(connection, name, published) if published else {}
            return ended, present, list(reports.values())

        ended, present_bytes, reports = await self._service.ledger.query("tally_federation", body)
        connected = {agent for agent in stored.state.agents if self._service.presence.connected(name, agent)}
        self._present.show(stored, connected, present_bytes)
        self._history.count(name, ended)
        self._reported.show(name, reports)


class _Present:
    """What is the case now."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._state = _gauge(registry, "state", "1 for the state it is in.", "state")
        self._phase = _gauge(registry, "phase", "1 for the phase of the running or last round.", "phase")
        self._round = _gauge(registry, "round", "Running or last round.")
        self._published = _gauge(registry, "published_rounds", "Last published round.")
        self._rounds = _gauge(registry, "rounds", "Rounds in all.")
        self._target = _gauge(registry, "target_agents", "Agents that a round waits for.")
        self._quorum = _gauge(registry, "quorum", "Agents that a round needs.")
        self._agents = _gauge(registry, "agents", "Registered agents.")
        self._connected = _gauge(registry, "connected_agents", "Agents with an open view stream, or expected back.")
        self._by_state = _gauge(registry, "agents_by_state", "Registered agents: away, or by their task.", "state")
        self._members = _gauge(
            registry,
            "round_members",
            "Agents in the running or last round: factors came, in the cohort, ciphertext complete, counted, left.",
            "state",
        )
        self._stored = _gauge(registry, "stored_bytes", "Bytes of payloads in the blob store.", "kind")
        self._kinds: dict[str, set[str]] = {}

    def show(self, stored: StoredFederation, connected: Set[str], present_bytes: Mapping[str, int]) -> None:
        name, spec, state = stored.name, stored.present_spec, stored.state
        latest = state.round
        for stage in FederationState:
            self._state.labels(name, stage.value).set(stage is state.state)
        for phase in RoundPhase:
            self._phase.labels(name, phase.value).set(latest is not None and phase is latest.phase)
        self._round.labels(name).set(0 if latest is None else latest.number)
        self._published.labels(name).set(state.last_published_round)
        self._rounds.labels(name).set(spec.rounds)
        self._target.labels(name).set(spec.target_agents)
        self._quorum.labels(name).set(spec.quorum)
        self._agents.labels(name).set(len(state.agents))
        self._connected.labels(name).set(len(connected))
        states = Counts(task_for(state, agent).value if agent in connected else AWAY for agent in state.agents)
        for known in (AWAY, *(task.value for task in AgentTask)):
            self._by_state.labels(name, known).set(states[known])
        members = () if latest is None else tuple(latest.members.values())
        self._members.labels(name, "factors").set(sum(member.uploaded for member in members))
        self._members.labels(name, "cohort").set(sum(member.in_cohort for member in members))
        self._members.labels(name, "complete").set(sum(member.complete for member in members))
        self._members.labels(name, "counted").set(sum(member.counted for member in members))
        self._members.labels(name, "left").set(sum(member.left for member in members))
        kinds = self._kinds.setdefault(name, set())
        kinds.update(present_bytes)
        for kind in kinds:  # one that is gone is 0
            self._stored.labels(name, kind).set(present_bytes.get(kind, 0))


class _History:
    """What happened since the federation was created, counted from the database."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._last: dict[str, int] = {}
        self._ended = _counter(registry, "ended_rounds", "Rounds that are over, by how and why.", "outcome", "reason")
        self._seconds = _counter(registry, "phase_seconds", "Time spent in the phases of published rounds.", "phase")
        self._bytes = _counter(registry, "payload_bytes", "Bytes of the payloads of rounds that are over.", "kind")
        self._published_at = _gauge(
            registry,
            "published_timestamp_seconds",
            "When the last round was published, in seconds since the Unix epoch.",
        )
        self._phases = _gauge(
            registry, "published_phase_seconds", "Time spent in the phases of the last published round.", "phase"
        )
        self._members = _gauge(
            registry,
            "published_members",
            "Agents whose factors came in the last published round: counted in its average, or left out.",
            "outcome",
        )

    def last_counted(self, federation: str) -> int:
        """The newest round that is counted."""
        return self._last.get(federation, 0)

    def count(self, federation: str, ended: Iterable[EndedRound]) -> None:
        """Count rounds that are newer than the last counted one."""
        if federation not in self._last:
            # From 0 on, so that Prometheus sees the first one as an increase.
            self._last[federation] = 0
            self._ended.labels(federation, RoundPhase.PUBLISHED.value, "")
            for reason in REASONS.values():
                self._ended.labels(federation, RoundPhase.ABANDONED.value, reason)
        for found in ended:
            self._last[federation] = found.number
            self._ended.labels(federation, found.phase.value, reason_code(found.reason)).inc()
            for kind, size in found.payload_bytes.items():
                self._bytes.labels(federation, kind).inc(size)
            if found.phase is RoundPhase.PUBLISHED:
                self._show_published(federation, found)

    def _show_published(self, federation: str, found: EndedRound) -> None:
        for phase, spent_ms in found.phase_ms.items():
            self._seconds.labels(federation, phase.value).inc(spent_ms / _MILLISECONDS)
            self._phases.labels(federation, phase.value).set(spent_ms / _MILLISECONDS)
        self._published_at.labels(federation).set(found.ended_at_ms / _MILLISECONDS)
        self._members.labels(federation, "counted").set(found.counted)
        self._members.labels(federation, "left_out").set(found.left_out)


class _Reported:
    """Means of what the agents report about the last published round. Only figures known here: agents name them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._agents = _gauge(registry, "reports", "Agents that reported figures of the last published round.")
        self._accuracy = _gauge(
            registry, "reported_accuracy_ratio", "Mean accuracy of the agents around the last average.", "when"
        )
        self._loss = _gauge(registry, "reported_loss", "Mean loss of the agents around the last average.", "when")
        self._seconds = _gauge(
            registry, "reported_seconds", "Mean duration of the agents' steps in the last published round.", "step"
        )

    def show(self, federation: str, reports: Sequence[Mapping[str, float]]) -> None:
        """Show the figures of one round, one mapping an agent."""
        self._agents.labels(federation).set(len(reports))
        for gauge, names in (
            (self._accuracy, _ACCURACY),
            (self._loss, _LOSS),
            (self._seconds, {step: f"seconds_{step}" for step in _STEPS}),
        ):
            for label, name in names.items():
                values = [figures[name] for figures in reports if name in figures]
                if values:
                    gauge.labels(federation, label).set(sum(values) / len(values))
                else:
                    gauge.remove(federation, label)


def reason_code(reason: str) -> str:
    """The stable code of the reason for which a round was abandoned; empty for a round that was not."""
    code = reason.partition(":")[0]
    if not reason or code in error_classes():
        return code
    return next((known for start, known in REASONS.items() if reason.startswith(start)), OTHER_REASON)


def _gauge(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"shelora_federation_{name}", text, ("federation", *labels), registry=registry)


def _counter(registry: CollectorRegistry, name: str, text: str, *labels: str) -> Counter:
    return Counter(f"shelora_federation_{name}", text, ("federation", *labels), registry=registry)
