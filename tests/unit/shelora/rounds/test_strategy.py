from __future__ import annotations

import pytest

from shelora.errors import InvalidPlan
from shelora.rounds import JOINT, Computation, Gate, PhaseRule, RoundPhase, Strategy, Timer, strategy_named
from unit.shelora.rounds.game import Game, rules

TRAIN, FACTORS, BASIS, CIPHER, SUM = (rule for rule in JOINT.rules)


def test_joint_leads_from_training_to_publication():
    assert strategy_named("joint") is JOINT
    assert strategy_named("") is JOINT
    assert JOINT.first is RoundPhase.TRAIN
    assert [rule.phase.name for rule in JOINT.rules] == ["TRAIN", "FACTORS", "BASIS", "CIPHER", "SUM"]
    assert JOINT.rule(RoundPhase.SUM).then is RoundPhase.PUBLISHED


def test_unknown_strategy_is_refused():
    with pytest.raises(InvalidPlan, match="joint"):
        strategy_named("alternating")


@pytest.mark.parametrize("rules_", [(), (TRAIN,), (TRAIN, TRAIN), (FACTORS, TRAIN, BASIS, CIPHER, SUM)])
def test_chains_that_do_not_lead_to_publication_are_refused(rules_):
    with pytest.raises(InvalidPlan):
        Strategy("broken", rules_)


def test_final_phases_have_no_row():
    with pytest.raises(InvalidPlan):
        Strategy("broken", (PhaseRule(RoundPhase.ABANDONED, RoundPhase.PUBLISHED, Gate.COHORT, Timer.NONE),))
    with pytest.raises(InvalidPlan):
        JOINT.rule(RoundPhase.PUBLISHED)


@pytest.mark.parametrize(("gate", "computation"), [(Gate.COMPUTED, None), (Gate.COHORT, Computation.BASIS)])
def test_gate_without_its_computation_is_refused(gate, computation):
    with pytest.raises(InvalidPlan):
        PhaseRule(RoundPhase.BASIS, RoundPhase.CIPHER, gate, Timer.NONE, computation=computation)


@pytest.mark.parametrize(
    "changes",
    [
        {"quorum": 1},
        {"quorum": 4},
        {"gather_timeout_ms": 0},
        {"cipher_timeout_ms": -1},
        {"renegotiate_every": -1},
        {"basis_cap": -1},
        {"max_abandoned": -1},
    ],
)
def test_impossible_rules_are_refused(changes):
    with pytest.raises(InvalidPlan):
        rules(**changes)


def test_another_table_is_another_machine():
    """A strategy without a phase of its own for the first factors: the machine follows the table."""
    patient = PhaseRule(FACTORS.phase, FACTORS.then, FACTORS.gate, Timer.TRAIN, task=FACTORS.task)
    game = Game(rules(strategy=Strategy("patient", (patient, BASIS, CIPHER, SUM))), rounds=1).started("a", "b", "c")
    assert game.round.phase is RoundPhase.FACTORS
    game.play_round("a", "b", "c")
    assert game.state.published == 1
