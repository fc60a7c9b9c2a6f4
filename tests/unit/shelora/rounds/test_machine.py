from __future__ import annotations

import pytest

from shelora.errors import (
    ConflictingResend,
    CorruptState,
    FederationEnded,
    NotInCohort,
    StalePlan,
    UnknownAgent,
    UnknownRound,
    WrongEpoch,
    WrongPhase,
)
from shelora.plan import Negotiation
from shelora.rounds import (
    AgentLeft,
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
    pending,
    task_for,
    vote_columns,
)
from shelora.rounds.step import Step
from unit.shelora.rounds.game import CIPHER_MS, GATHER_MS, NEGOTIATE_MS, OPE, TRAIN_MS, WIDTH, Game, rules


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
    assert game.last_effect() == FoldResidues(1, ("a",))
    game.cipher("b", "c")
    assert game.phase() is RoundPhase.SUM
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


def test_cohort_closes_at_the_target_and_late_factors_are_refused():
    game = Game().started("a", "b", "c").register("d").factors("a", "b", "c")
    assert [member.agent for member in game.round.cohort] == ["a", "b", "c"]
    assert task_for(game.state, "d") is AgentTask.WAIT
    with pytest.raises(WrongPhase, match="takes factors"):
        game.factors("d")


def test_cohort_closes_when_all_have_answered():
    game = Game(rules(target_agents=5)).started("a", "b", "c").wait(GATHER_MS).do(Ticked())
    game.factors("a").do(AgentLeft(1, "b", "no memory"))
    assert game.phase() is RoundPhase.FACTORS
    game.factors("c")
    assert game.phase() is RoundPhase.BASIS
    assert [member.agent for member in game.round.cohort] == ["a", "c"]
    assert game.round.members["b"].left_reason == "no memory"


def test_member_that_leaves_after_its_factors_is_not_in_the_cohort():
    game = Game(rules(target_agents=5)).started("a", "b", "c").wait(GATHER_MS).do(Ticked())
    game.factors("a", "b").do(AgentLeft(1, "a", "")).factors("c")
    assert [member.agent for member in game.round.cohort] == ["b", "c"]
    assert game.round.members["a"].left_reason == "no reason given"
    with pytest.raises(NotInCohort):
        game.basis().cipher("a")


def test_agent_that_left_cannot_come_back_into_the_round():
    game = Game().started("a", "b", "c").do(AgentLeft(1, "a", "busy"))
    assert task_for(game.state, "a") is AgentTask.WAIT
    with pytest.raises(NotInCohort, match="busy"):
        game.factors("a")


def test_deadline_closes_the_cohort_with_a_quorum_and_abandons_without():
    game = Game().started("a", "b", "c").factors("a", "b").wait(TRAIN_MS - 1).do(Ticked())
    assert game.phase() is RoundPhase.FACTORS
    assert game.wait(1).do(Ticked()).round.phase is RoundPhase.BASIS
    game = Game().started("a", "b", "c").factors("a").wait(TRAIN_MS).do(Ticked())
    assert (game.number, game.round.phase) == (2, RoundPhase.TRAIN)
    ended = next(effect.round for effect in game.effects if isinstance(effect, RoundEnded))
    assert ended.phase is RoundPhase.ABANDONED
    assert "quorum is 2" in ended.reason
    assert ended.ended_at_ms == game.now_ms


def test_train_keeps_one_deadline_over_both_phases():
    game = Game().started("a", "b", "c").wait(TRAIN_MS - 1).factors("a")
    assert game.state.next_deadline_ms == game.now_ms + 1


def test_too_many_abandoned_rounds_in_a_row_stop_the_federation():
    game = Game(rules(max_abandoned=2), rounds=9).started("a", "b", "c").wait(TRAIN_MS).do(Ticked())
    game.play_round("a", "b", "c")
    assert game.state.abandoned_in_a_row == 0
    for _ in range(2):
        game.wait(TRAIN_MS).do(Ticked())
    assert game.stage() is FederationState.STOPPED
    assert "no factors came" in game.state.reason
    assert Game().state.rules.abandoned_limit == 3


def test_members_without_ciphertext_at_the_deadline_do_not_count():
    game = (
        Game().started("a", "b", "c").factors("a", examples=100).factors("b", examples=300).factors("c", examples=400)
    )
    game.basis().cipher("a", "c").wait(CIPHER_MS).do(Ticked())
    assert [member.agent for member in game.round.counted] == ["a", "c"]
    assert game.round.weights() == {"a": 0.125, "b": 0.375, "c": 0.5}
    assert game.round.total_weight() == 0.625
    with pytest.raises(WrongPhase):
        game.cipher("b")


def test_ciphertexts_below_the_quorum_at_the_deadline_abandon():
    game = Game().started("a", "b", "c").factors("a", "b", "c").basis().cipher("a").wait(CIPHER_MS).do(Ticked())
    assert game.number == 2
    assert game.state.abandoned_in_a_row == 1


def test_round_is_abandoned_as_soon_as_the_quorum_is_out_of_reach():
    game = Game().started("a", "b", "c").factors("a", "b", "c").basis()
    game.do(AgentLeft(1, "a", "disk full"), AgentLeft(1, "b", "disk full"))
    assert game.number == 2


def test_round_goes_on_without_members_that_left():
    game = Game().started("a", "b", "c").factors("a", "b", "c").basis().cipher("a", "b")
    game.do(AgentLeft(1, "a", "too late to matter"))
    assert not game.round.members["a"].left
    game.do(AgentLeft(1, "c", "disk full"))
    assert game.phase() is RoundPhase.SUM
    game.do(AgentLeft(1, "b", "after the members are fixed"))
    assert [member.agent for member in game.round.counted] == ["a", "b"]
    with pytest.raises(WrongPhase):
        game.cipher("c")


def test_member_that_left_cannot_send_its_ciphertext():
    game = Game().started("a", "b", "c").factors("a", "b", "c").basis().do(AgentLeft(1, "c", "disk full"))
    assert task_for(game.state, "c") is AgentTask.WAIT
    with pytest.raises(NotInCohort, match="disk full"):
        game.cipher("c")


def test_leaving_what_is_over_or_not_joined_changes_nothing():
    game = Game(rules(target_agents=2)).started("a", "b", "c").play_round("a", "b")
    before = game.state
    assert game.do(AgentLeft(1, "a", "late")).state is before
    game.factors("a", "b")
    before = game.state
    assert game.do(AgentLeft(2, "c", "not a member")).state is before
    game.basis().do(AgentLeft(2, "a", "x"))
    with pytest.raises(UnknownRound):
        game.do(AgentLeft(99, "a", "x"))
    with pytest.raises(UnknownAgent):
        game.do(AgentLeft(2, "z", "x"))


def test_leaving_twice_keeps_the_first_reason():
    game = Game().started("a", "b", "c").do(AgentLeft(1, "a", "first"), AgentLeft(1, "a", "second"))
    assert game.round.members["a"].left_reason == "first"


def test_uploads_that_are_not_welcome():
    game = Game().started("a", "b", "c")
    with pytest.raises(UnknownAgent):
        game.factors("z")
    with pytest.raises(WrongPhase, match="takes cipher"):
        game.cipher("a")
    for number in (0, 2):
        with pytest.raises(UnknownRound):
            game.do(FactorsReceived(number, "a", 1))
    with pytest.raises(UnknownRound):
        Game().register("a").do(FactorsReceived(1, "a", 1))
    game.factors("a")
    with pytest.raises(ConflictingResend):
        game.factors("a")
    game.register("d").factors("b", "c").basis()
    with pytest.raises(NotInCohort):
        game.cipher("d")
    game.cipher("a")
    with pytest.raises(ConflictingResend):
        game.cipher("a")
    game.cipher("b", "c").fold().average()
    with pytest.raises(WrongPhase, match="over"):
        game.do(CipherReceived(1, "b"))


def test_tasks_of_a_round():
    game = Game().started("a", "b", "c")
    assert {task_for(game.state, agent) for agent in "abc"} == {AgentTask.FACTORS}
    assert task_for(game.state, "z") is AgentTask.WAIT
    game.factors("a")
    assert [task_for(game.state, agent) for agent in "ab"] == [AgentTask.WAIT, AgentTask.FACTORS]
    game.factors("b", "c")
    assert task_for(game.state, "a") is AgentTask.WAIT
    game.basis()
    assert task_for(game.state, "a") is AgentTask.CIPHER
    game.cipher("a")
    assert [task_for(game.state, agent) for agent in "ab"] == [AgentTask.WAIT, AgentTask.CIPHER]
    assert task_for(Game().register("a").state, "a") is AgentTask.WAIT


def test_results_are_accepted_once_and_only_when_waited_for():
    game = Game().started("a", "b", "c")
    with pytest.raises(WrongPhase):
        game.basis()
    game.factors("a", "b", "c").basis()
    with pytest.raises(WrongPhase):
        game.basis()
    game.cipher("a", "b")
    assert awaits(game.state, FoldResidues(1, ("a",)))
    game.do(Computed(FoldResidues(1, ("a",))))
    assert pending(game.state) == (FoldResidues(1, ("b",)),)
    with pytest.raises(WrongPhase):
        game.do(Computed(FoldResidues(1, ("a", "b"))))
    assert not awaits(game.state, FoldResidues(2, ("b",)))
    game.cipher("c")
    with pytest.raises(WrongPhase):
        game.average()


def test_computation_that_fails_for_good_abandons_the_round():
    game = Game().started("a", "b", "c").factors("a", "b", "c")
    game.do(ComputationFailed(ComputeBasis(1), "bytes rotted"))
    assert game.number == 2
    before = game.state
    assert game.do(ComputationFailed(ComputeBasis(1), "again")).state is before


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


def test_phase_times_add_up_to_the_round():
    game = Game().started("a", "b", "c").wait(10).factors("a").wait(20).factors("b", "c").wait(30).basis()
    game.wait(40).cipher("a", "b", "c").wait(50).fold().average()
    ended = next(effect.round for effect in game.effects if isinstance(effect, RoundEnded))
    assert list(ended.phase_ms.values()) == [10, 20, 30, 40, 50]
    assert sum(ended.phase_ms.values()) == ended.ended_at_ms - ended.started_at_ms


def test_step_refuses_to_touch_a_round_that_is_not_there():
    with pytest.raises(CorruptState):
        Step(Game().state, 0).round  # noqa: B018 - the property raises
    with pytest.raises(CorruptState):
        Step(Game().state, 0).negotiation  # noqa: B018 - the property raises
