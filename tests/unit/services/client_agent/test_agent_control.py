"""What ends an agent, what pauses it, and what it can be asked; no wait takes real time."""

from __future__ import annotations

import asyncio

import pytest

from services.client_agent.agent import Agent
from services.client_agent.domain import Activity, PayloadKind
from shelora.errors import (
    AgentRevoked,
    FederationEnded,
    InvalidConfiguration,
    ModelMismatch,
    PeerUnreachable,
    UnknownRound,
)
from shelora.rounds import FederationState, Started, Stopped


async def test_pause_begins_nothing_and_resume_goes_on(ward):
    agent = ward.start("a")
    agent.pause()
    ward.start("b")
    ward.start("c")
    await ward.until(lambda: ward.federation.factors == 2)
    await ward.until(lambda: agent.board.status.activity is Activity.IDLE)
    assert agent.board.status.paused
    assert ward.trainers["a"].trained == []
    agent.resume()
    await ward.finish()
    assert not agent.board.status.paused
    assert ward.verify(1).counted == ("a", "b", "c")


async def test_the_step_at_hand_is_finished_after_a_pause(ward):
    gate = ward.trainers["a"].gate
    gate.clear()
    ward.start_all()
    await ward.until(lambda: ward.trainers["a"].training.is_set())
    ward.agents["a"].pause()
    gate.set()
    await ward.until(lambda: ward.federation.ciphers == 2)
    await ward.until(lambda: ward.agents["a"].board.status.activity is Activity.IDLE)
    ward.federation.expire()
    await ward.until(lambda: ward.federation.state.last_published_round == 1)
    ward.agents["a"].resume()
    await ward.finish()
    assert ward.verify(1).counted == ("b", "c")
    assert ward.verify(2).counted == ("a", "b", "c")


async def test_stop_leaves_the_round_and_ends_the_agent(ward):
    ward.trainers["a"].gate.clear()
    ward.start_all()
    await ward.until(lambda: ward.trainers["a"].training.is_set())
    await ward.agents["a"].stop("the battery is low " * 20)
    status = await asyncio.wait_for(ward.lives["a"], 10)
    assert status.activity is Activity.ENDED
    (number, agent, reason), *_ = ward.federation.left
    assert (number, agent) == (1, "a")
    assert reason.startswith("the battery is low")
    assert len(reason.encode()) == 200
    await ward.until(lambda: all(ward.agents[name].board.status.applied_round == 1 for name in "bc"))
    assert ward.verify(1).counted == ("b", "c")


async def test_stop_works_while_the_aggregator_is_away(ward):
    ward.trainers["a"].gate.clear()
    ward.start_all()
    await ward.until(lambda: ward.trainers["a"].training.is_set())
    ward.federation.before["a", "leave"].append(PeerUnreachable("away"))
    await ward.agents["a"].stop("")
    assert (await asyncio.wait_for(ward.lives["a"], 10)).activity is Activity.ENDED


async def test_a_stopped_federation_ends_its_agents_with_the_reason(ward):
    ward.trainers["a"].gate.clear()
    ward.start_all()
    await ward.until(lambda: ward.trainers["a"].training.is_set())
    ward.federation.emit(Stopped("maintenance"))
    results = await asyncio.wait_for(asyncio.gather(*ward.lives.values(), return_exceptions=True), 30)
    for agent, error in zip(ward.agents.values(), results, strict=True):
        assert isinstance(error, FederationEnded)
        assert "stopped: maintenance" in error.message
        assert agent.board.status.activity is Activity.ENDED
        assert "maintenance" in agent.board.status.last_error


async def test_a_stopped_federation_is_told_even_if_the_last_average_is_gone(ward):
    hold = ward.federation.holds["a", PayloadKind.FACTORS] = asyncio.Event()
    hold.set()
    ward.start_all()
    await ward.until(lambda: ward.federation.state.last_published_round == 1)
    await ward.kill("a")
    ward.federation.emit(Stopped("maintenance"))
    ward.federation.before["a", "download average"].append(UnknownRound("collected"))
    (ward.folder / "a" / "state.json").unlink(missing_ok=True)
    ward.start("a")
    with pytest.raises(FederationEnded, match="maintenance"):
        await asyncio.wait_for(ward.lives["a"], 30)


async def test_an_agent_that_stays_goes_on_when_rounds_are_added(ward):
    for name in "abc":
        ward.start(name, exit_when_finished=False)
    await ward.until(lambda: all(agent.board.status.applied_round == 2 for agent in ward.agents.values()))
    assert not any(life.done() for life in ward.lives.values())
    ward.federation.emit(Started(more_rounds=1))
    await ward.until(lambda: all(agent.board.status.applied_round == 3 for agent in ward.agents.values()))
    assert ward.verify(3).counted == ("a", "b", "c")
    ward.federation.emit(Started(more_rounds=1))
    ward.federation.emit(Stopped("enough"))
    await ward.until(lambda: ward.federation.state.state is FederationState.STOPPED)
    assert not any(life.done() for life in ward.lives.values())


@pytest.mark.parametrize("refusal", [ModelMismatch("another base model"), AgentRevoked("revoked")])
async def test_refusals_that_waiting_does_not_mend_end_the_agent(ward, refusal):
    ward.federation.before["a", "register"].append(refusal)
    agent = ward.start("a")
    with pytest.raises(type(refusal)):
        await asyncio.wait_for(ward.lives["a"], 10)
    assert agent.board.status.activity is Activity.ENDED
    assert refusal.message in agent.board.status.last_error


async def test_a_model_that_does_not_load_ends_the_agent(ward):
    agent = ward.start("a")
    await ward.kill("a")

    def broken(*_: object):
        raise InvalidConfiguration("model.source: no such folder")

    agent = Agent(agent.config, trainer_factory=broken, connector=agent._connector)
    with pytest.raises(InvalidConfiguration, match="no such folder"):
        await agent.run()


async def test_two_agents_never_share_a_folder(ward):
    ward.start("a")
    await ward.until(lambda: bool(ward.federation.state.agents))
    first = ward.lives["a"]
    ward.start("a")
    with pytest.raises(InvalidConfiguration, match="another agent"):
        await ward.lives["a"]
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_the_newest_figures_are_shown_after_a_restart(ward):
    ward.start_all()
    await ward.finish()
    again = ward.start("a")
    assert again.board.status.applied_round == 2
    assert again.board.status.metrics == ward.federation.metrics[2]["a"]
    assert (await ward.lives["a"]).activity is Activity.ENDED
    assert ward.trainers["a"].trained == [1, 2]


async def test_adapters_are_exported(ward, tmp_path):
    agent = ward.start("a")
    with pytest.raises(UnknownRound, match="saved rounds: none"):
        agent.export_adapter(0, tmp_path / "out")
    ward.start("b")
    ward.start("c")
    await ward.finish()
    assert agent.export_adapter(0, tmp_path / "newest") == (tmp_path / "newest", 2)
    assert agent.export_adapter(1, tmp_path / "first") == (tmp_path / "first", 1)
    assert (tmp_path / "first" / "adapter_config.json").exists()
    with pytest.raises(InvalidConfiguration, match="not empty"):
        agent.export_adapter(0, tmp_path / "first")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidConfiguration, match="cannot be written"):
        agent.export_adapter(0, tmp_path / "file")
    with pytest.raises(UnknownRound, match=r"saved rounds: \[0, 1, 2\]"):
        agent.export_adapter(9, tmp_path / "ninth")
