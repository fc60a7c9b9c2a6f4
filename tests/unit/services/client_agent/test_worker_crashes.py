"""An agent that dies at any instant: a new worker on the same folder goes on, and nothing is sent or trained twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from services.client_agent import adapter as adapter_module
from services.client_agent import state as state_module
from services.client_agent.domain import PayloadKind
from services.client_agent.state import load_tensors
from services.common import files
from shelora.errors import PeerUnreachable
from shelora.rounds import AgentTask, FederationState
from support.crew import Hand, run_to_end
from support.linear_trainer import LinearTrainer
from support.memory_federation import MemoryFederation, MemoryKeyManager
from support.revealed import verify_round

COLUMNS = {"a": (12, 9), "b": (6, 0)}


class Killed(BaseException):
    """The process dies here."""


class DyingDisk:
    """Stands before the function that makes files durable and kills the caller at one write, before or after it."""

    def __init__(self, deadly_write: int, *, after: bool) -> None:
        self.deadly_write = deadly_write
        self.after = after
        self.writes = 0
        self.armed = False

    def __call__(self, path: Path, data: bytes | memoryview, mode: int = 0o644, *, synced: bool = True) -> None:
        deadly = False
        if self.armed:
            self.writes += 1
            deadly = self.writes == self.deadly_write
        if deadly and not self.after:
            raise Killed(path.name)
        files.write_atomically(path, data, mode, synced=synced)
        if deadly:
            raise Killed(path.name)


@pytest.fixture(scope="module")
def keymanager() -> MemoryKeyManager:
    return MemoryKeyManager()


@pytest.fixture
def make_pair(keymanager: MemoryKeyManager, tmp_path: Path) -> Callable[..., tuple[MemoryFederation, list[Hand]]]:
    counter = itertools.count()

    def make(rounds: int = 1, sent_rank: int | None = None) -> tuple[MemoryFederation, list[Hand]]:
        folder = tmp_path / str(next(counter))
        federation = MemoryFederation(keymanager, agents=2, rounds_=rounds)
        hands = [
            Hand(federation, name, folder / name, LinearTrainer(seed, rank=3, sent_rank=sent_rank), columns)
            for seed, (name, columns) in enumerate(COLUMNS.items())
        ]
        return federation, hands

    return make


async def run_with_deaths(federation: MemoryFederation, hands: list[Hand], disk: DyingDisk) -> bool:
    """Run to the end; agent a dies at the disk's write and is started again. Whether it died."""
    died = False
    mortal, other = hands
    for _ in range(60):
        disk.armed = True
        try:
            task = await mortal.step()
        except Killed:
            died = True
            mortal.start()
            continue
        finally:
            disk.armed = False
        if await other.step() is AgentTask.LEAVE and task is AgentTask.LEAVE:
            return died
    raise AssertionError("no end in sight")


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_death_at_every_durable_write(make_pair, monkeypatch, after):
    repeated = 0
    for deadly in itertools.count(1):
        federation, hands = make_pair()
        for hand in hands:
            await hand.register()
        disk = DyingDisk(deadly, after=after)
        monkeypatch.setattr(state_module, "write_atomically", disk)
        monkeypatch.setattr(adapter_module, "write_atomically", disk)
        died = await run_with_deaths(federation, hands, disk)
        assert federation.state.state is FederationState.FINISHED
        found = verify_round({hand.name: hand.reveal for hand in hands}, 1)
        assert found.counted == found.openings == ("a", "b")
        assert found.difference <= 1e-6
        repeated += len(hands[0].trainer.trained) - 1
        assert hands[0].state.applied_round() == 1
        if not died:
            break
    assert deadly > 15
    # Training is repeated only if the agent died before its result was durable.
    assert repeated == (0 if after else 1)


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_death_at_every_durable_write_with_a_residual(make_pair, monkeypatch, after):
    """The second round starts from a residual: whenever the agent dies, it ends with what it ends with undisturbed."""
    federation, hands = make_pair(2, 6)
    for hand in hands:
        await hand.register()
    await run_to_end(hands)
    undisturbed = [load_tensors(hands[0].state.adapter_state(2)), load_tensors(revealed(hands[0]))]
    assert "residual.1.left" in undisturbed[0]
    for deadly in itertools.count(1):
        federation, hands = make_pair(2, 6)
        for hand in hands:
            await hand.register()
        disk = DyingDisk(deadly, after=after)
        monkeypatch.setattr(state_module, "write_atomically", disk)
        monkeypatch.setattr(adapter_module, "write_atomically", disk)
        died = await run_with_deaths(federation, hands, disk)
        assert federation.state.state is FederationState.FINISHED
        for number in (1, 2):
            assert verify_round({hand.name: hand.reveal for hand in hands}, number).difference <= 1e-6
        found = [load_tensors(hands[0].state.adapter_state(2)), load_tensors(revealed(hands[0]))]
        for before, now in zip(undisturbed, found, strict=True):
            assert before.keys() == now.keys()
            for name in before:
                np.testing.assert_allclose(now[name], before[name], atol=1e-5)
        if not died:
            break
    assert deadly > 25


def revealed(hand: Hand) -> Path:
    return hand.reveal / "round-002-factors.safetensors"


@pytest.mark.parametrize("kind", [PayloadKind.SENSITIVITY, PayloadKind.FACTORS, PayloadKind.CIPHER])
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_restarted_agent_sends_the_same_bytes(make_pair, kind, moment):
    federation, hands = make_pair()
    for hand in hands:
        await hand.register()
    getattr(federation, moment)["a", kind].append(PeerUnreachable("cut"))
    deaths = 0
    for _ in range(60):
        try:
            tasks = [await hands[0].step()]
        except PeerUnreachable:
            deaths += 1
            sent = next(hands[0].state.root.rglob(f"{kind.value}.upload")).read_bytes()
            hands[0].start()
            view = federation.view("a")
            if moment == "after" and view.task is AgentTask.WAIT:
                continue
            await hands[0].step()
            number = next(key[1] for key in federation.accepted if key[0] is kind)
            assert federation.accepted[kind, number, "a"] == sent
            continue
        tasks.append(await hands[1].step())
        if set(tasks) == {AgentTask.LEAVE}:
            break
    assert deaths == 1
    assert federation.state.state is FederationState.FINISHED
    assert hands[0].trainer.trained == [1]
    assert verify_round({hand.name: hand.reveal for hand in hands}, 1).difference <= 1e-6


async def test_a_lost_answer_leads_to_a_recognised_resend(make_pair):
    """The upload was accepted, the answer got lost, the view was old: the same bytes again are no conflict."""
    federation, hands = make_pair()
    for hand in hands:
        await hand.register()
    for hand in hands:
        await hand.step()
    view = federation.view("a")
    assert view.task is AgentTask.FACTORS
    await hands[0].worker.factors(view)
    hands[0].start()
    await hands[0].worker.factors(view)
    assert federation.resent[PayloadKind.FACTORS, 1, "a"] == 1
    await hands[1].step()
    view = federation.view("a")
    assert view.task is AgentTask.CIPHER
    await hands[0].worker.cipher(view)
    hands[0].start()
    await hands[0].worker.cipher(view)
    assert federation.resent[PayloadKind.CIPHER, 1, "a"] == 1
    await run_to_end(hands)
    assert hands[0].trainer.trained == [1]
