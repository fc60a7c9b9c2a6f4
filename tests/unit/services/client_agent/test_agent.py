"""Whole agents against a federation in memory: real keys and ciphertexts, the real loop; no wait takes real time."""

from __future__ import annotations

import asyncio

import pytest

from services.client_agent.domain import Activity, PayloadKind
from shelora.errors import (
    ConflictingResend,
    MalformedPayload,
    PeerUnreachable,
    StorageFull,
    UnknownFederation,
    WrongEpoch,
    WrongPhase,
)
from shelora.plan import Negotiation
from shelora.rounds import EpochAdopted, FederationState
from support.memory_federation import MemoryFederation
from support.ward import Ward


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
    await ward.until(lambda: all(agent.board.connections == 2 for agent in ward.agents.values()))
    assert "cut" in ward.agents["c"].board.status.last_error
    assert all(agent.board.connected for agent in ward.agents.values())
    gate.set()
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
