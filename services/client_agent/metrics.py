"""Figures of an agent for Prometheus; names begin with shelora_agent_.

What the status board shows is read at every scrape. Seconds and bytes are counted as the round figures come in, from
the start of the process; the figures themselves stay on disk, so bytes of a payload that a restarted agent sends again
are not counted a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from services.client_agent.domain import Activity
from services.client_agent.figures import FETCHED, SENT, STEPS
from services.client_agent.progress import StatusBoard
from services.client_agent.state import AgentState
from services.common.metrics import bytes_counter, new_registry, seconds_histogram, watch_certificates, watch_disk
from services.common.tls import IdentityFiles

_SECONDS: Final = "seconds_"
_UP: Final = "_bytes_up"
_DOWN: Final = "_bytes_down"
_ACCURACY: Final = {"before": "accuracy_before", "after": "accuracy_after"}
_LOSS: Final = {"training": "loss", "after": "loss_after"}


class AgentMetrics:
    """All figures of one agent.

    Attributes:
        registry: where they are.
    """

    def __init__(self) -> None:
        """Nothing is counted yet."""
        self.registry = new_registry("agent")
        self._seconds = seconds_histogram(
            self.registry,
            "shelora_agent_step_seconds",
            "Duration of steps of a round; encrypt contains he_encrypt, apply contains he_decrypt.",
            ("step",),
        )
        self._up = bytes_counter(
            self.registry, "shelora_agent_uploaded_bytes", "Bytes of payloads sent, each payload once.", ("kind",)
        )
        self._down = bytes_counter(
            self.registry, "shelora_agent_downloaded_bytes", "Bytes of payloads fetched, each payload once.", ("kind",)
        )
        # From 0 on, so that Prometheus sees the first of each as an increase.
        for metric, labels in ((self._seconds, STEPS), (self._up, SENT), (self._down, FETCHED)):
            for label in labels:
                metric.labels(label)

    def watch(self, board: StatusBoard, state: AgentState) -> None:
        """Show a status board, the agent's certificate and its disk; once."""
        self.registry.register(_BoardCollector(board))
        watch_certificates(self.registry, {"agent": lambda: IdentityFiles(state.identity).validity_ms()[1]})
        watch_disk(self.registry, state.root)

    def count(self, before: Mapping[str, float], figures: Mapping[str, float]) -> None:
        """Count figures that were added to a round's; `before` are the round's figures until then."""
        for name, value in figures.items():
            if name.startswith(_SECONDS):
                self._seconds.labels(name.removeprefix(_SECONDS)).observe(value)
            elif name.endswith(_UP):
                self._up.labels(name.removesuffix(_UP)).inc(max(0.0, value - before.get(name, 0.0)))
            elif name.endswith(_DOWN):
                self._down.labels(name.removesuffix(_DOWN)).inc(max(0.0, value - before.get(name, 0.0)))


class _BoardCollector(Collector):
    """The status board as it is when Prometheus asks."""

    def __init__(self, board: StatusBoard) -> None:
        self._board = board

    def collect(self) -> Iterator[Metric]:
        board, seen = self._board, self._board.status
        about = InfoMetricFamily("shelora_agent", "Who the agent is; always 1.")
        about.add_metric(
            [],
            {"agent": seen.name, "federation": seen.federation, "rank": str(seen.rank), "budget": seen.budget},
        )
        yield about
        activities = _gauge("activity", "1 for what the agent is doing.", "activity")
        for activity in Activity:
            activities.add_metric([activity.value], float(activity is seen.activity))
        yield activities
        yield _gauge("connected", "1 while it is registered and its view stream is open.", value=board.connected)
        yield _gauge("paused", "1 while its fleet manager has paused it.", value=seen.paused)
        yield _gauge("round", "Round it works on or waits in.", value=seen.round)
        yield _gauge("rounds", "Rounds in all.", value=seen.rounds)
        yield _gauge("applied_round", "Last round whose average it has applied.", value=seen.applied_round)
        yield from _round_figures(seen.metrics)
        errors = CounterMetricFamily(
            "shelora_agent_errors", "Errors by stable code, those that a retry mended included.", labels=["code"]
        )
        for code, count in sorted(board.errors.items()):
            errors.add_metric([code], count)
        yield errors
        yield CounterMetricFamily(
            "shelora_agent_reconnects",
            "How often the lost view stream was opened again.",
            value=max(0, board.connections - 1),
        )


def _round_figures(figures: Mapping[str, float]) -> Iterator[Metric]:
    """Figures of the round whose average was applied last."""
    accuracy = _gauge("accuracy_ratio", "Accuracy in the last applied round, around its average.", "when")
    loss = _gauge("loss", "Loss in the last applied round.", "when")
    for family, names in ((accuracy, _ACCURACY), (loss, _LOSS)):
        for when, name in names.items():
            if name in figures:
                family.add_metric([when], figures[name])
        yield family
    seconds = _gauge("round_seconds", "Duration of the steps of the last applied round.", "step")
    for name, value in figures.items():
        if name.startswith(_SECONDS):
            seconds.add_metric([name.removeprefix(_SECONDS)], value)
    yield seconds


def _gauge(name: str, text: str, *labels: str, value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"shelora_agent_{name}", text, value=value, labels=labels or None)
