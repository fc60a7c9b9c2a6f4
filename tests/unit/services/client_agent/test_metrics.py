from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from services.client_agent.domain import Activity, Status
from services.client_agent.figures import RoundFigures
from services.client_agent.metrics import AgentMetrics
from services.client_agent.progress import StatusBoard
from services.client_agent.state import AgentState
from shelora.errors import PeerUnreachable


@pytest.fixture
def state(tmp_path):
    return AgentState(tmp_path / "state")


@pytest.fixture
async def board(state):
    return StatusBoard(Status("clinic-7", "ward", 4, "30%"))


@pytest.fixture
async def registry(board, state) -> CollectorRegistry:
    metrics = AgentMetrics()
    metrics.watch(board, state)
    return metrics.registry


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"shelora_agent_{name}", labels)


async def test_the_board_is_shown_as_it_is(board, registry):
    about = {"agent": "clinic-7", "federation": "ward", "rank": "4", "budget": "30%"}
    assert value(registry, "info", **about) == 1
    assert value(registry, "connected") == value(registry, "paused") == 0
    board.connect()
    board.begin(Activity.TRAINING, "round 3")
    board.update(round=3, rounds=10, applied_round=2, paused=True)
    shown = {activity.value: value(registry, "activity", activity=activity.value) for activity in Activity}
    assert {name for name, found in shown.items() if found} == {"training"}
    assert len(shown) == len(Activity)
    assert (value(registry, "connected"), value(registry, "paused")) == (1, 1)
    assert [value(registry, name) for name in ("round", "rounds", "applied_round")] == [3, 10, 2]


async def test_errors_and_reconnects_are_counted(board, registry):
    board.connect()
    board.connect()
    assert value(registry, "reconnects_total") == 0
    for _ in range(2):
        board.disconnect()
        board.failed(PeerUnreachable("gone"))
        board.connect()
    board.failed(ValueError("a defect"))
    assert value(registry, "reconnects_total") == 2
    assert value(registry, "errors_total", code="peer_unreachable") == 2
    assert value(registry, "errors_total", code="internal_fault") == 1


async def test_figures_of_the_last_applied_round_are_shown(board, registry):
    assert value(registry, "accuracy_ratio", when="after") is None
    figures = {
        "accuracy_before": 0.5,
        "accuracy_after": 0.75,
        "loss": 1.5,
        "loss_after": 1.25,
        "seconds_he_encrypt": 2.0,
    }
    board.update(applied_round=1, metrics=figures)
    assert value(registry, "accuracy_ratio", when="before") == 0.5
    assert value(registry, "accuracy_ratio", when="after") == 0.75
    assert value(registry, "loss", when="training") == 1.5
    assert value(registry, "loss", when="after") == 1.25
    assert value(registry, "round_seconds", step="he_encrypt") == 2.0


async def test_every_step_is_measured_and_every_payload_counted_once(state):
    metrics = AgentMetrics()
    figures = RoundFigures(state, metrics.count)
    assert value(metrics.registry, "step_seconds_count", step="train") == 0
    assert value(metrics.registry, "uploaded_bytes_total", kind="cipher") == 0
    figures.add(1, seconds_train=3.0, loss=0.5, examples=12)
    for _ in range(2):  # the answer got lost, so it is sent again
        figures.add(1, cipher_bytes_up=1000, seconds_cipher_upload=0.5)
    figures.add(2, cipher_bytes_up=1000, average_bytes_down=70, cipher_bytes_down=80, projection_bytes_down=90)
    found = metrics.registry
    assert value(found, "step_seconds_sum", step="train") == 3.0
    assert value(found, "step_seconds_count", step="cipher_upload") == 2
    assert value(found, "uploaded_bytes_total", kind="cipher") == 2000
    assert value(found, "uploaded_bytes_total", kind="factors") == 0
    assert [value(found, "downloaded_bytes_total", kind=kind) for kind in ("average", "cipher", "projection")] == [
        70,
        80,
        90,
    ]


async def test_a_restarted_agent_counts_from_0_and_only_what_is_new(state):
    RoundFigures(state).add(1, factors_bytes_up=500)
    metrics = AgentMetrics()
    figures = RoundFigures(state, metrics.count)
    figures.add(1, factors_bytes_up=500)
    assert value(metrics.registry, "uploaded_bytes_total", kind="factors") == 0
    figures.add(1, cipher_bytes_up=7)
    assert value(metrics.registry, "uploaded_bytes_total", kind="cipher") == 7
