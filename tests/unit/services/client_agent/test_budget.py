from __future__ import annotations

from pathlib import Path

import pytest

from services.client_agent.budget import default_threads, resolve_budget
from services.client_agent.config import AgentConfig
from services.client_agent.domain import Terms
from services.client_agent.keys import EpochKeys, KeyRing
from services.client_agent.state import AgentState
from shelora.plan import ModelShapes, ModuleShape, Packing
from support.linear_trainer import SHAPES
from support.memory_federation import FEDERATION, MemoryKeyManager

WIDE = ModelShapes(tuple(ModuleShape(f"layer.{index}", 512, 2048) for index in range(24)), ())
TERMS = Terms(epoch=1, basis_cap=0)


@pytest.fixture
async def epoch(tmp_path: Path) -> EpochKeys:
    keymanager = MemoryKeyManager()

    async def fetch(number, public):
        return await keymanager.fetch("a", number, public)

    return await KeyRing(AgentState(tmp_path / "keys"), FEDERATION, "a", fetch, threads=1).epoch(1)


def config(tmp_path: Path, budget: str, rank: int = 4) -> AgentConfig:
    fields = {
        "federation": FEDERATION,
        "aggregator": "127.0.0.1:1",
        "state_dir": tmp_path / "state",
        "data": {"train": "train.jsonl"},
        "lora": {"rank": rank},
        "encryption": {"budget": budget},
        "evaluate": False,
    }
    return AgentConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("budget", "columns"), [("full", (40, 30)), ("25%", (10, 8)), ("20 columns", (20, 20)), ("0%", (0, 0))]
)
async def test_fixed_budgets(tmp_path, epoch, budget, columns):
    state = AgentState(tmp_path / "state")
    assert await resolve_budget(config(tmp_path, budget), state, SHAPES, epoch, TERMS) == columns


async def test_auto_fits_the_seconds_and_the_measured_link(tmp_path, epoch):
    columns = {}
    for name, seconds, rate in (("fast", 30, 1e8), ("slow", 30, 1e5), ("brief", 1, 1e5)):
        state = AgentState(tmp_path / name)
        state.write_json(state.root / "link.json", {"upload_bytes_per_s": rate})
        columns[name] = sum(await resolve_budget(config(tmp_path, f"auto:{seconds}s"), state, WIDE, epoch, TERMS))
    assert columns["fast"] > columns["slow"] > columns["brief"]


async def test_a_smaller_cap_and_dense_packing_leave_room_for_more_columns(tmp_path, epoch):
    found = []
    for terms in (Terms(1, 64), Terms(1, 64, Packing.DENSE), Terms(1, 4)):
        state = AgentState(tmp_path / f"{terms.basis_cap}-{terms.packing.value}")
        state.write_json(state.root / "link.json", {"upload_bytes_per_s": 2e5})
        found.append(sum(await resolve_budget(config(tmp_path, "auto:5s"), state, WIDE, epoch, terms)))
    assert found[0] < found[1] < found[2]


async def test_a_restarted_agent_keeps_its_columns(tmp_path, epoch):
    state = AgentState(tmp_path / "state")
    state.write_json(state.root / "link.json", {"upload_bytes_per_s": 1e5})
    first = await resolve_budget(config(tmp_path, "auto:10s"), state, WIDE, epoch, TERMS)
    state.write_json(state.root / "link.json", {"upload_bytes_per_s": 1e9})
    again = await resolve_budget(config(tmp_path, "auto:10s"), AgentState(tmp_path / "state"), WIDE, epoch, TERMS)
    assert again == first
    assert await resolve_budget(config(tmp_path, "full"), state, WIDE, epoch, TERMS) == (2048,) * 24
    assert await resolve_budget(config(tmp_path, "full"), state, SHAPES, epoch, TERMS) == (40, 30)


def test_a_thread_a_core():
    assert default_threads() >= 1
