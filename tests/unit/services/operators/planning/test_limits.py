"""Settings that cannot work are refused with the reason."""

from __future__ import annotations

import pytest

from services.operators.planning import Participant, Rates, Terms, check_terms, explain, imagine, parse_shapes
from services.operators.planning.limits import check_negotiation
from services.operators.planning.security import USUAL_PARAMETERS, imagined_parameters
from shelora.errors import (
    InvalidConfiguration,
    InvalidPlan,
    PayloadTooLarge,
    RankMismatch,
    SheLoraError,
    ValueOutOfRange,
)
from shelora.plan import Negotiation, Packing
from shelora.plan.negotiation import MAX_PACKED_VALUE

SHAPES = parse_shapes("2*64x48,dense*5000")


def agent(**changes: object) -> Participant:
    fields: dict[str, object] = {"name": "a", "rank": 4, "budget": "full", "columns": (48, 48)}
    return Participant(**{**fields, **changes})  # type: ignore[arg-type]  # what a test wants to break


@pytest.mark.parametrize(
    ("participants", "terms", "error", "message"),
    [
        ([], Terms(), InvalidConfiguration, "at least one agent"),
        (
            [agent(rank=49)],
            Terms(),
            RankMismatch,
            "rank of 1 to 48, the smaller side of 'module-1', got 49",
        ),
        ([agent(rank=0)], Terms(), RankMismatch, "got 0"),
        ([agent(examples=10**12 + 1)], Terms(), ValueOutOfRange, "local texts"),
        ([agent(rank=8)], Terms(cap=7), InvalidPlan, r"cap of at least the largest rank \(8\), got 7"),
        ([agent()], Terms(cap=4097), InvalidPlan, "basis cap of 0 to 4096, got 4097"),
        ([agent()], Terms(target_agents=100_001), InvalidPlan, "1 to 100000 agents"),
        ([agent()], Terms(packing=Packing.DENSE, target_agents=4097), InvalidPlan, "at most 4096 target agents"),
        (
            [agent()],
            Terms(packing=Packing.DENSE, parameters=imagined_parameters(8192, 50, 45)),
            InvalidPlan,
            "values up to 256",
        ),
        ([agent()], Terms(negotiation=Negotiation.ENCRYPTED, target_agents=4096), InvalidPlan, "at most 4,095 agents"),
        ([agent(columns=(48, 20))], Terms(target_agents=4096), InvalidPlan, "at most 4,095 agents"),
        (
            [agent(columns=(48, 20), budget="20 columns")],
            Terms(negotiation=Negotiation.NONE),
            InvalidPlan,
            "nothing is negotiated, got 20 columns",
        ),
        ([agent()], Terms(payload_limit_bytes=65_535), PayloadTooLarge, "a: expected ciphertext of at most 0 MB"),
        ([agent(columns=(0, 0))], Terms(payload_limit_bytes=3500), PayloadTooLarge, "factors"),
        ([agent(budget="auto:0.001s", columns=(0, 0))], Terms(), InvalidPlan, "5,000 dense values take"),
    ],
)
def test_what_cannot_work_is_refused(participants, terms, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        explain(SHAPES, participants, terms)
    assert isinstance(caught.value, SheLoraError)


def test_the_limits_themselves_are_allowed() -> None:
    full = [agent(rank=48)]
    assert explain(SHAPES, full, Terms(cap=48)).cap == 48
    assert explain(SHAPES, full, Terms(packing=Packing.DENSE, target_agents=4096)).level.value == "safe"
    assert explain(SHAPES, full, Terms(target_agents=100_000)).basis.exact, "full budgets negotiate nothing"
    partly = [agent(columns=(48, 20))]
    assert explain(SHAPES, partly, Terms(target_agents=4095)).unsafe == ("a",)
    assert explain(SHAPES, partly, Terms(target_agents=4096, negotiation=Negotiation.OPE)).unsafe == ("a",)


def test_only_dense_tensors_limit_no_rank_but_the_largest() -> None:
    shapes = parse_shapes("dense*10")
    assert explain(shapes, [agent(rank=1024, columns=())], Terms()).modules == 0
    with pytest.raises(RankMismatch, match="a rank of 1 to 1024, got 1025"):
        explain(shapes, [agent(rank=1025, columns=())])


def test_auto_with_enough_seconds_is_allowed() -> None:
    """Two blocks of dense values, 131,072 bytes: half a second for each of encryption and upload."""
    rates = Rates(encrypt_values_per_s=16_384, upload_bytes_per_s=262_144)
    [enough] = imagine(SHAPES, [4], ["auto:1.01s"], rates=rates)
    assert explain(SHAPES, [enough], rates=rates).agents[0].blocks == 2
    [little] = imagine(SHAPES, [4], ["auto:0.99s"], rates=rates)
    with pytest.raises(InvalidPlan, match="at least 1 s"):
        explain(SHAPES, [little], rates=rates)
    quick = Participant("a", 4, "auto:0.99s", (0, 0), rates=Rates())
    assert explain(SHAPES, [quick], rates=rates).agents[0].blocks == 2


def test_what_registered_agents_call_their_budget_is_taken_as_it_is() -> None:
    """An agent that encrypts columns has measured that it can; others may register any text."""
    assert explain(SHAPES, [agent(budget="auto:0.001s")]).agents[0].budget == "auto:0.001s"
    assert explain(SHAPES, [agent(budget="as much as I can")]).agents[0].encrypted_share == 1.0


def test_terms_alone_can_be_checked() -> None:
    check_terms(Terms(), 2)
    with pytest.raises(InvalidPlan):
        check_terms(Terms(), 0)


def test_sensitivities_fit_exactly_as_many_agents_as_their_packing_says() -> None:
    assert 4095 * MAX_PACKED_VALUE < USUAL_PARAMETERS.max_abs_value <= 4096 * MAX_PACKED_VALUE
    check_negotiation(USUAL_PARAMETERS, 4095)
    noisy = imagined_parameters(8192, 50, 30)
    assert noisy.max_abs_value > 1024
    with pytest.raises(InvalidPlan):
        check_negotiation(noisy, 10)
