"""Whole agents against a federation in memory: real keys and ciphertexts, the real loop; no wait takes real time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.client_agent.agent import Agent
from services.client_agent.config import AgentConfig
from services.client_agent.domain import Activity, PayloadKind, Status
from shelora.errors import (
    AgentRevoked,
    ConflictingResend,
    FederationEnded,
    InvalidConfiguration,
    MalformedPayload,
    ModelMismatch,
    PeerUnreachable,
    StorageFull,
    UnknownFederation,
    UnknownRound,
    WrongEpoch,
    WrongPhase,
)
from shelora.plan import Negotiation
from shelora.rounds import EpochAdopted, FederationState, Started, Stopped
from support.hurried_clock import HurriedClock
from support.linear_trainer import LinearTrainer
from support.memory_federation import FEDERATION, MemoryFederation, MemoryKeyManager
from support.revealed import verify_round


class Ward:
    """A federation with agents a, b, c as tasks of this test."""

    def __init__(self, folder: Path, federation: MemoryFederation, names: str = "abc") -> None:
        self.folder = folder
        self.federation = federation
        self.trainers = {name: LinearTrainer(seed, rank=2 + seed % 3) for seed, name in enumerate(names)}
        self.agents: dict[str, Agent] = {}
        self.lives: dict[str, asyncio.Task[Status]] = {}
        self.clocks: dict[str, HurriedClock] = {}

    def start(self, name: str, budget: str = "full", **fields: object) -> Agent:
        """A new process of the agent, on the same folder."""
        config = AgentConfig.model_validate(
            {
                "federation": FEDERATION,
                "aggregator": "127.0.0.1:1",
                "state_dir": self.folder / name,
                "data": {"train": "train.jsonl", "test": "test.jsonl"},
                "lora": {"rank": self.trainers[name].rank},
                "encryption": {"budget": budget, "threads": 1},
                "reveal_dir": self.folder / f"{name}-reveal",
                **fields,
            }
        )

        async def connector(*_: object):
            return self.federation.membership(name)

        self.clocks[name] = HurriedClock()
        self.agents[name] = Agent(
            config,
            clock=self.clocks[name],
            trainer_factory=lambda *_: self.trainers[name],
            connector=connector,
        )
        self.lives[name] = asyncio.ensure_future(self.agents[name].run())
        return self.agents[name]

    def start_all(self, budget: str = "full") -> None:
        for name in self.trainers:
            self.start(name, budget)

    async def kill(self, name: str) -> None:
        """End an agent without a word to the federation."""
        self.trainers[name].gate.set()
        self.lives[name].cancel()
        await asyncio.gather(self.lives[name], return_exceptions=True)

    async def until(self, reached: Callable[[], object]) -> None:
        """Look until it is true, for half a minute at most."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + 30
        while not reached():
            assert loop.time() < end_s, f"never reached; {[agent.board.status for agent in self.agents.values()]}"
            await asyncio.sleep(0.002)

    async def finish(self) -> list[Status]:
        return await asyncio.wait_for(asyncio.gather(*self.lives.values()), 60)

    def verify(self, number: int):
        return verify_round({name: self.folder / f"{name}-reveal" for name in self.trainers}, number)


@pytest.fixture(scope="module")
def keymanager() -> MemoryKeyManager:
    return MemoryKeyManager(epochs=2)


@pytest.fixture
async def ward(keymanager: MemoryKeyManager, tmp_path: Path) -> AsyncIterator[Ward]:
    keymanager.away = False
    ward = Ward(tmp_path, MemoryFederation(keymanager, agents=3))
    yield ward
    for name in ward.lives:
        await ward.kill(name)


async def test_three_agents_run_to_the_end(ward):
    ward.start("a", "full")
    ward.start("b", "30%")
    ward.start("c", "5 columns")
    ends = await ward.finish()
    assert ward.federation.state.state is FederationState.FINISHED
    for number in (1, 2):
        found = ward.verify(number)
        assert found.counted == found.openings == ("a", "b", "c")
        assert found.difference <= 1e-6
    for name, status in zip("abc", ends, strict=True):
        assert (status.name, status.activity, status.applied_round) == (name, Activity.ENDED, 2)
        assert status.metrics == ward.federation.metrics[2][name]
        assert (status.last_error, status.rank) == ("", ward.trainers[name].rank)
        assert ward.trainers[name].trained == [1, 2]


@pytest.mark.parametrize(
    "call", ["terms", "register", "watch", PayloadKind.SENSITIVITY, PayloadKind.FACTORS, PayloadKind.CIPHER, "report"]
)
@pytest.mark.parametrize("error", [PeerUnreachable("away"), StorageFull("full")], ids=["unreachable", "full"])
async def test_transient_failures_lose_no_round(ward, call, error):
    ward.federation.before["a", call] += [error, error, error]
    ward.start_all("50%")
    await ward.finish()
    assert not ward.federation.before["a", call]
    for number in (1, 2):
        assert ward.verify(number).counted == ("a", "b", "c")
    assert ward.trainers["a"].trained == [1, 2]
    assert not ward.federation.left
    assert len(ward.clocks["a"].sleeps) >= 3


@pytest.mark.parametrize("kind", [PayloadKind.AVERAGE, PayloadKind.CIPHER, PayloadKind.PROJECTION])
async def test_transient_failures_of_downloads_lose_no_round(ward, kind):
    ward.federation.before["a", f"download {kind.value}"] += [PeerUnreachable("cut")] * 4
    ward.start_all()
    await ward.finish()
    for number in (1, 2):
        assert ward.verify(number).counted == ("a", "b", "c")
        assert ward.verify(number).openings == ("a", "b", "c")


@pytest.mark.parametrize("kind", [PayloadKind.SENSITIVITY, PayloadKind.FACTORS, PayloadKind.CIPHER])
async def test_lost_answers_count_nobody_twice(ward, kind):
    ward.federation.after["a", kind].append(PeerUnreachable("the answer got lost"))
    ward.start_all("50%")
    await ward.finish()
    for number in (1, 2):
        found = ward.verify(number)
        assert found.counted == ("a", "b", "c")
        assert found.difference <= 1e-6


async def test_cut_view_streams_are_opened_again(ward):
    gate = ward.trainers["c"].gate
    gate.clear()
    ward.start_all()
    await ward.until(lambda: ward.federation.factors == 2)
    ward.federation.break_streams()
    await ward.until(lambda: all("cut" in agent.board.status.last_error for agent in ward.agents.values()))
    gate.set()
    await ward.until(lambda: all(agent.board.connected for agent in ward.agents.values()))
    await ward.finish()
    for agent in ward.agents.values():
        assert agent.board.connections == 2
        assert agent.board.errors == {"peer_unreachable": 1}
        assert not agent.board.connected
    assert ward.trainers["c"].trained == [1, 2]


async def test_an_agent_waits_for_its_federation_to_be_created(ward):
    ward.federation.before["a", "terms"] += [UnknownFederation("not created yet")] * 5
    ward.start_all()
    ends = await ward.finish()
    assert ends[0].applied_round == 2


async def test_an_agent_waits_for_keys_it_never_had(ward):
    ward.federation.keymanager.away = True
    ward.start("a")
    await ward.until(lambda: ward.agents["a"].board.status.activity is Activity.RECONNECTING)
    assert not ward.federation.state.agents
    ward.federation.keymanager.away = False
    ward.start("b")
    ward.start("c")
    await ward.finish()


async def test_with_stored_keys_the_key_manager_may_be_away(ward):
    ward.trainers["c"].gate.clear()
    ward.start_all()
    await ward.until(lambda: ward.trainers["c"].training.is_set())
    ward.federation.keymanager.away = True
    await ward.kill("a")
    ward.trainers["c"].gate.set()
    ward.start("a")
    await ward.finish()
    assert ward.verify(2).counted == ("a", "b", "c")


async def test_registration_goes_by_the_epoch_in_force(ward):
    """An agent that comes back after a rotation registers with the new epoch's keys."""
    ward.trainers["c"].gate.clear()
    ward.start_all()
    await ward.until(lambda: ward.trainers["c"].training.is_set())
    ward.federation.emit(EpochAdopted(2))
    ward.trainers["c"].gate.set()
    await ward.until(lambda: ward.federation.state.epoch == 2)
    ward.federation.before["b", "register"].append(WrongEpoch("the epoch is another by now"))
    ward.federation.break_streams()
    await ward.finish()
    assert ward.federation.plan_of(2).epoch == 2
    assert ward.verify(2).counted == ("a", "b", "c")


async def test_a_killed_agent_trains_no_round_twice(ward):
    hold = ward.federation.holds["a", PayloadKind.FACTORS] = asyncio.Event()
    ward.start_all()
    await ward.until(lambda: (ward.folder / "a" / "rounds" / "1" / "factors.upload").exists())
    await ward.kill("a")
    hold.set()
    ward.start("a")
    await ward.finish()
    assert ward.trainers["a"].trained == [1, 2]
    assert ward.verify(1).difference <= 1e-6


async def test_training_that_is_in_vain_is_dropped(ward):
    gate = ward.trainers["c"].gate
    gate.clear()
    ward.start_all()
    await ward.until(lambda: ward.federation.factors == 2)
    ward.federation.expire()
    await ward.until(lambda: ward.federation.state.last_published_round == 1)
    gate.set()
    await ward.finish()
    assert ward.verify(1).counted == ("a", "b")
    assert ward.verify(2).counted == ("a", "b", "c")
    assert ward.trainers["c"].trained == [1, 2]
    assert not ward.federation.left


async def test_an_upload_that_comes_too_late_waits_for_the_next_round(ward):
    hold = ward.federation.holds["c", PayloadKind.FACTORS] = asyncio.Event()
    ward.federation.before["c", PayloadKind.FACTORS].append(WrongPhase("the cohort is closed"))
    ward.start_all()
    await ward.until(lambda: ward.federation.factors == 2)
    await ward.until(lambda: ward.agents["c"].board.status.detail == "factors")
    cipher = ward.federation.holds["b", PayloadKind.CIPHER] = asyncio.Event()
    ward.federation.expire()
    hold.set()
    await ward.until(lambda: "the cohort is closed" in ward.agents["c"].board.status.last_error)
    assert ward.agents["c"].board.status.activity is Activity.WAITING
    cipher.set()
    await ward.finish()
    assert ward.verify(1).counted == ("a", "b")
    assert ward.verify(2).counted == ("a", "b", "c")
    assert not ward.federation.left


@pytest.mark.parametrize(
    "failure", [MalformedPayload("odd"), ConflictingResend("other bytes")], ids=["malformed", "conflict"]
)
async def test_an_agent_that_cannot_go_on_leaves_the_round_and_is_back_in_the_next(ward, failure):
    ward.federation.before["c", PayloadKind.CIPHER].append(failure)
    ward.federation.before["c", "leave"] += [PeerUnreachable("away")] * 2
    ward.start_all()
    await ward.finish()
    assert [(number, agent) for number, agent, _ in ward.federation.left] == [(1, "c")]
    assert failure.code in ward.federation.left[0][2]
    assert ward.verify(1).counted == ("a", "b")
    assert ward.verify(2).counted == ("a", "b", "c")


async def test_a_training_that_fails_costs_one_round(ward):
    ward.trainers["c"].failures.append(RuntimeError("no memory left on the device"))
    ward.start_all()
    await ward.finish()
    assert ward.federation.left == [(1, "c", "RuntimeError")]
    assert ward.verify(2).counted == ("a", "b", "c")
    assert ward.trainers["c"].trained == [1, 2]


async def test_a_refused_leave_is_not_repeated(ward):
    ward.trainers["c"].failures.append(RuntimeError("broken"))
    ward.federation.before["c", "leave"].append(WrongPhase("the round is over"))
    ward.start_all()
    await ward.until(lambda: "broken" in ward.agents["c"].board.status.last_error)
    ward.federation.expire()
    await ward.finish()
    assert ward.verify(2).counted == ("a", "b", "c")


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


async def test_figures_are_complete_whatever_comes_first(ward):
    """The next view may come before the answer to an upload: its bytes and seconds are kept all the same."""
    ward.start_all("50%")
    await ward.finish()
    for number in (1, 2):
        for name in "abc":
            figures = ward.federation.metrics[number][name]
            assert figures["factors_bytes_up"] == len(ward.federation.accepted[PayloadKind.FACTORS, number, name])
            assert figures["cipher_bytes_up"] == len(ward.federation.accepted[PayloadKind.CIPHER, number, name])


async def test_votes_negotiate_too(keymanager, tmp_path):
    ward = Ward(tmp_path, MemoryFederation(keymanager, agents=2, rounds_=1, negotiation=Negotiation.OPE), "ab")
    ward.start("a", "40%")
    ward.start("b", "10%")
    await ward.finish()
    assert ward.verify(1).difference <= 1e-6
    assert {key[0] for key in ward.federation.accepted} >= {PayloadKind.VOTES}
