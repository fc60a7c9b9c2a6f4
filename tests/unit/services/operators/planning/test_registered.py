"""Plans of federations: what is in force, what is checked before the start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.operators.domain import RegisteredAgent
from services.operators.planning import Rates, explain_registered, preflight, present_terms, terms_of, unsafe_registered
from shelora.errors import InvalidPlan, RankMismatch, UnsafePlan
from shelora.plan import Packing
from support.operators import make_federation, make_member, make_round


def registered(name: str, k: int = 32, rank: int = 4, examples: int = 480) -> RegisteredAgent:
    return RegisteredAgent(name, rank, (k, k), "full" if k == 32 else f"{k} columns", "0.1.0", 0, True, None, examples)


FEDERATION = make_federation(planned=False)


def test_the_plan_in_force_has_its_own_cap() -> None:
    assert terms_of(FEDERATION.spec).cap == present_terms(FEDERATION).cap == 0
    assert present_terms(make_federation()).cap == 32
    agents = [registered("a"), registered("b")]
    assert explain_registered(make_federation(), agents).cap == 32
    assert explain_registered(FEDERATION, agents).cap == 16
    assert explain_registered(make_federation(), agents, terms=terms_of(FEDERATION.spec)).cap == 16


def test_agents_bring_their_texts_and_their_figures() -> None:
    agents = [registered("agent-1", examples=4), registered("agent-2", examples=0)]
    figures = make_round(1, make_member("agent-1", 4, 32, seconds_he_encrypt=2.0))
    found = explain_registered(FEDERATION, agents, [figures], rates=Rates(encrypt_values_per_s=4096))
    assert [cost.measured for cost in found.agents] == [True, False]
    assert [cost.encrypt_s for cost in found.agents] == [2.0, 1.0]
    assert "An agent with 4 texts" in " ".join(remark.text for remark in found.verdicts[0].remarks)


def test_before_anybody_has_registered_only_the_terms_are_checked() -> None:
    found = preflight(FEDERATION, [], allow_unsafe=False)
    assert (found.registered, found.target, found.explanation) == (0, 2, None)
    assert "no agent of 2 has registered" in found.summary
    large = replace(FEDERATION, spec=replace(FEDERATION.spec, packing=Packing.DENSE, target_agents=4097))
    with pytest.raises(InvalidPlan, match="4096"):
        preflight(large, [], allow_unsafe=True)


def test_a_safe_federation_may_start() -> None:
    federation = replace(FEDERATION, spec=replace(FEDERATION.spec, target_agents=3))
    found = preflight(federation, [registered("a"), registered("b")], allow_unsafe=False)
    assert found.explanation is not None
    assert found.summary.startswith("plan: 2 agents, ")
    assert "leakage: safe" in found.summary
    assert found.summary.endswith("; 1 more agents are not part of this")
    assert "more agents" not in preflight(FEDERATION, [registered("a"), registered("b")], allow_unsafe=False).summary


def test_an_unsafe_federation_starts_only_when_that_is_allowed() -> None:
    agents = [registered("a"), registered("b", k=8)]
    with pytest.raises(UnsafePlan, match="for b: "):
        preflight(FEDERATION, agents, allow_unsafe=False)
    allowed = preflight(FEDERATION, agents, allow_unsafe=True)
    assert "leakage: unsafe for b" in allowed.summary


def test_whoever_came_later_is_judged_all_the_same() -> None:
    assert unsafe_registered(replace(FEDERATION, shapes=None), []) == ()
    assert unsafe_registered(FEDERATION, [registered("a"), registered("b", k=8)]) == ("b",)
    assert unsafe_registered(make_federation(), [registered("a"), registered("b")]) == ()


def test_what_cannot_work_never_starts() -> None:
    with pytest.raises(RankMismatch):
        preflight(FEDERATION, [registered("a", rank=25)], allow_unsafe=True)
    with pytest.raises(InvalidPlan, match="neither"):
        explain_registered(replace(FEDERATION, shapes=None), [registered("a")])
