from __future__ import annotations

import pytest

from shelora.errors import (
    ConflictingResend,
    NotInCohort,
    UnknownAgent,
    UnknownRound,
    WrongPhase,
)
from shelora.rounds import (
    FOLD_TERMS,
    AgentLeft,
    AgentTask,
    CipherReceived,
    ComputationFailed,
    ComputeBasis,
    Computed,
    FactorsReceived,
    FederationState,
    FoldResidues,
    Resumed,
    RoundEnded,
    RoundPhase,
    Ticked,
    awaits,
    concerned,
    differing,
    pending,
    task_for,
)
from unit.shelora.rounds.game import CIPHER_MS, GATHER_MS, TRAIN_MS, Game, rules


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


def test_a_step_concerns_those_who_have_something_new_to_know():
    game = Game().started("a", "b", "c")

    def concerns(act, *agents):
        before = game.state
        act(*agents)
        return concerned(before, game.state)

    assert concerned(game.state, game.state) == frozenset()
    assert concerns(game.register, "d") == {"d"}
    assert concerns(game.factors, "a") is None  # The phase is another one now.
    assert concerns(game.factors, "b") == {"b"}
    assert concerns(game.do, AgentLeft(1, "d", "busy")) == {"d"}
    assert concerns(game.factors, "c") is None
    assert concerns(game.basis) is None
    assert concerns(game.cipher, "a") == {"a"}
    assert concerns(game.do, Resumed(10 * CIPHER_MS)) is None


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
    assert game.round.weights == {"a": 0.125, "b": 0.375, "c": 0.5}
    assert game.round.total_weight == 0.625
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
    game.cipher("a", "b", "c")
    assert awaits(game.state, FoldResidues(1, ("a",)))
    game.do(Computed(FoldResidues(1, ("a",))))
    assert pending(game.state) == (FoldResidues(1, ("b", "c")),)
    with pytest.raises(WrongPhase):
        game.do(Computed(FoldResidues(1, ("a", "b"))))
    assert not awaits(game.state, FoldResidues(2, ("b",)))
    with pytest.raises(WrongPhase):
        game.average()


def test_ciphertexts_are_folded_many_at_once_or_at_the_end():
    agents = [f"agent-{index:02d}" for index in range(FOLD_TERMS + 2)]
    game = Game(rules(target_agents=len(agents))).started(*agents).factors(*agents).basis()
    game.cipher(*agents[: FOLD_TERMS - 1])
    assert pending(game.state) == ()
    game.cipher(agents[FOLD_TERMS - 1])
    early = FoldResidues(1, tuple(agents[:FOLD_TERMS]))
    assert pending(game.state) == (early,)
    game.cipher(agents[FOLD_TERMS])
    assert awaits(game.state, early)
    game.do(Computed(early))
    assert pending(game.state) == ()
    game.cipher(agents[FOLD_TERMS + 1])
    assert pending(game.state) == (FoldResidues(1, tuple(agents[FOLD_TERMS:])),)


def test_computation_that_fails_for_good_abandons_the_round():
    game = Game().started("a", "b", "c").factors("a", "b", "c")
    game.do(ComputationFailed(ComputeBasis(1), "bytes rotted"))
    assert game.number == 2
    before = game.state
    assert game.do(ComputationFailed(ComputeBasis(1), "again")).state is before


def test_phase_times_add_up_to_the_round():
    game = Game().started("a", "b", "c").wait(10).factors("a").wait(20).factors("b", "c").wait(30).basis()
    game.wait(40).cipher("a", "b", "c").wait(50).fold().average()
    ended = next(effect.round for effect in game.effects if isinstance(effect, RoundEnded))
    assert list(ended.phase_ms.values()) == [10, 20, 30, 40, 50]
    assert sum(ended.phase_ms.values()) == ended.ended_at_ms - ended.started_at_ms


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, []),
        ({"a": (1,)}, {"a": (1,)}, []),
        ({"a": (1,)}, {"a": (2,)}, ["a"]),
        ({"a": (1,)}, {"a": (1,), "b": (2,)}, ["b"]),
        ({"a": (1,), "b": (2,)}, {"b": (2,)}, ["a"]),
        ({"a": (1,), "b": (2,)}, {"b": (3,), "c": (4,)}, ["a", "b", "c"]),
    ],
)
def test_differing_names_what_is_new_gone_or_changed(before, after, expected):
    assert sorted(differing(before, after)) == expected
    assert differing(before, before) == []
