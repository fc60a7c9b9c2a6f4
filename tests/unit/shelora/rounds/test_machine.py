from __future__ import annotations

import pytest

from shelora.errors import (
    ConflictingResend,
    CorruptState,
    FederationEnded,
    StalePlan,
    UnknownAgent,
    WrongEpoch,
    WrongPhase,
)
from shelora.plan import Negotiation
from shelora.rounds import (
    AgentRegistered,
    AgentTask,
    BallotReceived,
    CipherReceived,
    ComputationFailed,
    ComputeAverage,
    ComputeBasis,
    Computed,
    EpochAdopted,
    FactorsReceived,
    FederationState,
    FoldResidues,
    Participant,
    RankVotes,
    Resumed,
    RoundEnded,
    RoundPhase,
    Started,
    Stopped,
    SumSensitivities,
    Ticked,
    awaits,
    gates,
    pending,
    task_for,
    vote_columns,
)
from shelora.rounds.step import Step
from unit.shelora.rounds.game import GATHER_MS, NEGOTIATE_MS, OPE, TRAIN_MS, WIDTH, Game, rules


def test_whole_federation_of_two_rounds():
    game = Game().started("a", "b", "c")
    assert game.stage() is FederationState.RUNNING
    assert (game.number, game.round.phase) == (1, RoundPhase.TRAIN)
    game.factors("a")
    assert game.phase() is RoundPhase.FACTORS
    game.factors("b", "c")
    assert game.phase() is RoundPhase.BASIS
    assert game.last_effect() == ComputeBasis(1)
    game.basis().cipher("a")
    assert pending(game.state) == ()
    game.cipher("b", "c")
    assert game.phase() is RoundPhase.SUM
    assert game.last_effect() == FoldResidues(1, ("a", "b", "c"))
    game.fold()
    assert game.last_effect() == ComputeAverage(1)
    game.average()
    ended = [effect.round for effect in game.effects if isinstance(effect, RoundEnded)]
    assert [(round_.number, round_.phase) for round_ in ended] == [(1, RoundPhase.PUBLISHED)]
    assert [member.agent for member in ended[0].counted] == ["a", "b", "c"]
    assert (game.number, game.round.phase, game.state.last_published_round) == (2, RoundPhase.TRAIN, 1)
    game.play_round("a", "b", "c")
    assert game.stage() is FederationState.FINISHED
    assert game.state.published == 2
    assert task_for(game.state, "a") is AgentTask.LEAVE
    assert game.kinds[-2:] == ["round_published", "federation_finished"]


def test_gathering_ends_at_the_target_without_waiting():
    game = Game().do(Started()).register("a", "b")
    assert game.stage() is FederationState.GATHERING
    assert game.register("c").state.state is FederationState.RUNNING


def test_gathering_below_the_quorum_is_extended_and_ends_with_it_at_the_next_deadline():
    game = Game().do(Started()).register("a").wait(GATHER_MS).do(Ticked())
    assert game.stage() is FederationState.GATHERING
    assert game.state.next_deadline_ms == game.now_ms + GATHER_MS
    game.register("b")
    assert game.stage() is FederationState.GATHERING
    assert game.wait(GATHER_MS).do(Ticked()).state.state is FederationState.RUNNING


def test_plan_takes_levels_and_cap_from_the_registrations():
    game = Game(rules(negotiation=Negotiation.ENCRYPTED)).do(Started())
    game.register("a", k=3, rank=2).register("b", k=3, rank=8).register("c", k=WIDTH, rank=4)
    plan = game.plan
    assert plan is not None
    assert (plan.version, plan.cap, plan.levels) == (1, 32, ((3, WIDTH), (3, WIDTH)))
    assert Game(rules(basis_cap=5)).started("a", "b", "c").plan.cap == 5


@pytest.mark.parametrize("k", [0, WIDTH])
def test_nothing_is_negotiated_when_no_budget_is_partial(k):
    game = Game().started("a", "b", "c", k=k)
    assert game.plan.negotiation is Negotiation.NONE
    assert game.stage() is FederationState.RUNNING


@pytest.mark.parametrize(("negotiation", "work"), [(Negotiation.ENCRYPTED, SumSensitivities), (OPE, RankVotes)])
def test_negotiation_closes_when_all_invited_have_answered(negotiation, work):
    game = Game(rules(negotiation=negotiation)).started("a", "b", "c", k=4)
    assert game.stage() is FederationState.NEGOTIATING
    assert task_for(game.state, "a") is AgentTask.NEGOTIATE
    assert vote_columns(game.state, (WIDTH, WIDTH)) == (4, 4)
    game.do(BallotReceived(1, "a"), BallotReceived(1, "b"))
    assert task_for(game.state, "a") is AgentTask.WAIT
    assert pending(game.state) == ()
    game.do(BallotReceived(1, "c"))
    assert game.last_effect() == work(1, ("a", "b", "c"))
    assert awaits(game.state, work(1, ("a", "b", "c")))
    with pytest.raises(WrongPhase):
        game.do(BallotReceived(1, "a"))
    game.do(Computed(work(1, ("a", "b", "c"))))
    assert game.plan.settled
    assert game.plan.negotiated_by == 3
    assert game.phase() is RoundPhase.TRAIN
    assert vote_columns(game.state, (WIDTH, WIDTH)) == ()


def test_encrypted_negotiation_closes_with_as_many_as_can_be_added(monkeypatch):
    monkeypatch.setattr(gates, "MAX_SUMMED_AGENTS", 2)
    game = Game(rules(negotiation=Negotiation.ENCRYPTED)).started("a", "b", "c", k=4)
    game.do(BallotReceived(1, "c"), BallotReceived(1, "a"))
    assert pending(game.state) == (SumSensitivities(1, ("a", "c")),)
    with pytest.raises(WrongPhase, match="negotiation that takes payloads"):
        game.do(BallotReceived(1, "b"))
    others = Game(rules(negotiation=OPE)).started("a", "b", "c", k=4)
    others.do(BallotReceived(1, "c"), BallotReceived(1, "a"))
    assert not others.ballot.closed


def test_negotiation_closes_at_the_deadline_with_a_quorum():
    game = Game().started("a", "b", "c", k=4).do(BallotReceived(1, "c"), BallotReceived(1, "a"))
    game.wait(NEGOTIATE_MS).do(Ticked())
    assert pending(game.state) == (SumSensitivities(1, ("a", "c")),)
    assert game.state.next_deadline_ms == 0


def test_agent_that_came_late_to_a_negotiation_may_answer_but_is_not_waited_for():
    game = Game().started("a", "b", "c", k=4).register("d", k=4)
    assert task_for(game.state, "d") is AgentTask.NEGOTIATE
    game.do(*(BallotReceived(1, agent) for agent in "dabc"))
    assert pending(game.state) == (SumSensitivities(1, ("a", "b", "c", "d")),)


def test_negotiation_is_tried_three_times_and_keeps_what_came():
    game = Game().started("a", "b", "c", k=4).do(BallotReceived(1, "a"))
    for attempt in (2, 3):
        game.wait(NEGOTIATE_MS).do(Ticked())
        assert game.ballot.attempt == attempt
        assert game.ballot.received == {"a"}
        assert game.state.next_deadline_ms == game.now_ms + NEGOTIATE_MS
    game.wait(NEGOTIATE_MS).do(Ticked())
    assert game.stage() is FederationState.STOPPED
    assert "quorum of 2" in game.state.reason


def test_ballots_that_are_not_welcome():
    game = Game().register("a")
    with pytest.raises(WrongPhase):
        game.do(BallotReceived(1, "a"))
    game = Game().started("a", "b", "c", k=4).do(BallotReceived(1, "a"))
    with pytest.raises(UnknownAgent):
        game.do(BallotReceived(1, "z"))
    with pytest.raises(StalePlan):
        game.do(BallotReceived(2, "b"))
    with pytest.raises(ConflictingResend):
        game.do(BallotReceived(1, "a"))


def test_negotiation_that_cannot_be_computed_stops_the_federation():
    game = Game().started("a", "b", "c", k=4).do(*(BallotReceived(1, agent) for agent in "abc"))
    game.do(ComputationFailed(SumSensitivities(2, ("a", "b", "c")), "another plan"))
    assert game.stage() is FederationState.NEGOTIATING
    game.do(ComputationFailed(SumSensitivities(1, ("a", "b", "c")), "bytes rotted"))
    assert game.stage() is FederationState.STOPPED
    assert "bytes rotted" in game.state.reason


def test_plan_is_renewed_after_the_agreed_number_of_rounds():
    game = Game(rules(renegotiate_every=2), rounds=4).started("a", "b", "c")
    game.play_round("a", "b", "c")
    assert game.plan.version == 1
    game.play_round("a", "b", "c")
    assert game.plan.version == 2
    assert game.round.plan_version == 2


def test_stop_abandons_the_running_round_and_is_final_until_started_again():
    game = Game().started("a", "b", "c").factors("a").do(Stopped(""))
    assert game.stage() is FederationState.STOPPED
    assert game.phase() is RoundPhase.ABANDONED
    assert game.state.reason == "an operator stopped it"
    before = game.state
    assert game.do(Stopped("again")).state is before
    for event in (FactorsReceived(1, "b", 1), CipherReceived(1, "b"), BallotReceived(1, "b")):
        with pytest.raises(FederationEnded):
            game.do(event)
    game.do(Started())
    assert (game.state.state, game.number, game.state.reason) == (FederationState.RUNNING, 2, "")


def test_federation_that_was_never_started_can_be_stopped():
    assert Game().do(Stopped("not needed")).state.state is FederationState.STOPPED


def test_negotiation_that_was_stopped_begins_anew():
    game = Game().started("a", "b", "c", k=4).do(Stopped("pause"), Started())
    assert game.stage() is FederationState.NEGOTIATING
    assert game.plan.version == 2


def test_start_is_idempotent_and_adds_rounds_only_after_the_end():
    game = Game(rounds=1).started("a", "b", "c")
    before = game.state
    assert game.do(Started()).state is before
    with pytest.raises(WrongPhase):
        game.do(Started(more_rounds=1))
    game.play_round("a", "b", "c")
    with pytest.raises(FederationEnded):
        game.do(Started())
    game.do(Started(more_rounds=2))
    assert (game.state.rounds, game.number, game.plan.version) == (3, 2, 1)


def test_epoch_is_adopted_at_the_round_boundary_with_a_new_plan():
    game = Game().started("a", "b", "c").do(EpochAdopted(3))
    assert (game.state.epoch, game.plan.version) == (1, 1)
    assert game.state.accepted_epochs == {1, 3}
    before = game.state
    assert game.do(EpochAdopted(3)).state is before
    with pytest.raises(WrongEpoch):
        game.do(EpochAdopted(2))
    game.play_round("a", "b", "c")
    assert (game.state.epoch, game.plan.epoch, game.plan.version) == (3, 3, 2)
    assert game.state.accepted_epochs == {3}


def test_epoch_adopted_before_the_start_is_the_first_plan_s():
    game = Game().do(EpochAdopted(2)).started("a", "b", "c")
    assert (game.plan.version, game.plan.epoch) == (1, 2)


def test_epoch_adopted_during_a_negotiation_begins_it_anew():
    game = Game().started("a", "b", "c", k=4).do(BallotReceived(1, "a"), EpochAdopted(2))
    assert (game.plan.version, game.plan.epoch) == (2, 2)
    assert game.ballot.received == frozenset()
    assert (game.ballot.attempt, game.state.next_epoch) == (1, 0)


def test_registration_again_replaces_capabilities_for_the_next_upload():
    game = Game().started("a", "b", "c").factors("a")
    before = game.state
    assert game.register("b").state is before
    game.do(AgentRegistered(Participant("a", 8, (1, 1), selective=True)))
    assert game.round.members["a"].rank == 4
    assert game.state.agents["a"].rank == 8


@pytest.mark.parametrize(
    ("game", "deadline"),
    [
        (lambda: Game().started("a", "b", "c").factors("a"), TRAIN_MS),
        (lambda: Game().do(Started()), GATHER_MS),
    ],
)
def test_time_away_is_given_back(game, deadline):
    away = game().wait(10 * deadline).do(Resumed(500))
    assert away.state.next_deadline_ms == away.now_ms + 500
    back = game().do(Resumed(500))
    assert back.state.next_deadline_ms == back.now_ms + deadline


def test_time_away_means_nothing_without_a_deadline():
    for game in (Game(), Game().started("a", "b", "c").factors("a", "b", "c")):
        before = game.state
        assert game.do(Resumed(500)).state is before


def test_step_refuses_to_touch_a_round_that_is_not_there():
    with pytest.raises(CorruptState):
        Step(Game().state, 0).round  # noqa: B018 - the property raises
    with pytest.raises(CorruptState):
        Step(Game().state, 0).negotiation  # noqa: B018 - the property raises
