"""build/demo/report.json: what happened, in numbers."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Final

from services.operators.demo.options import DemoOptions
from services.operators.demo.verify import Verification
from services.operators.domain import Federation, Member, Round
from services.operators.planning import AgentCost, Participant, explain, present_terms
from services.operators.render import plain
from shelora.rounds.phases import RoundPhase

SCHEMA: Final = 1

_PACKAGES: Final = ("shelora", "numpy", "openfhe", "torch", "transformers", "peft", "grpcio", "cryptography")


def published(rounds: Sequence[Round]) -> list[Round]:
    """The rounds with an average."""
    return [found for found in rounds if found.phase is RoundPhase.PUBLISHED]


def accuracies(rounds: Sequence[Round], agents: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Per agent the accuracy of its adapter at the start and after the last round; None where it reported none."""
    before: dict[str, float | None] = dict.fromkeys(agents)
    after: dict[str, float | None] = dict.fromkeys(agents)
    for found in published(rounds):
        for member in found.members:
            if member.agent not in before:
                continue
            if before[member.agent] is None:
                before[member.agent] = member.metrics.get("accuracy_before")
            after[member.agent] = member.metrics.get("accuracy_after", after[member.agent])
    return {"before": before, "after": after}


def predicted_costs(federation: Federation, found: Round) -> dict[str, AgentCost]:
    """What each member's bytes should be by docs/method.md; empty when a member was left out or no plan is known."""
    if federation.plan is None or not all(member.counted for member in found.members):
        return {}
    participants = [Participant(member.agent, member.rank, "", member.columns) for member in found.members]
    explained = explain(federation.plan.shapes, participants, present_terms(federation))
    return {cost.agent: cost for cost in explained.agents}


def byte_ratios(federation: Federation, rounds: Sequence[Round]) -> list[float]:
    """Measured bytes over those of the formulas, up and down, of all members of all rounds that have both."""
    ratios: list[float] = []
    for found in published(rounds):
        predicted = predicted_costs(federation, found)
        for member in found.members:
            if member.agent not in predicted:
                continue
            cost = predicted[member.agent]
            expected = {"bytes_up": cost.up_bytes, "bytes_down": cost.down_bytes}
            ratios += [member.metrics[name] / count for name, count in expected.items() if name in member.metrics]
    return ratios


def make_report(
    options: DemoOptions,
    federation: Federation,
    rounds: Sequence[Round],
    verification: Verification,
    adapters: Mapping[str, str],
    shares: Mapping[str, Mapping[str, int]],
    test_rows: int,
    seconds: Mapping[str, float],
    comparison: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The whole report.

    Args:
        options: what was chosen.
        federation: its last state.
        rounds: all rounds.
        verification: the check of all published rounds.
        adapters: per agent the folder of its last adapter.
        shares: per agent how many training rows of each label it had.
        test_rows: rows of the test file.
        seconds: of the demonstration's steps.
        comparison: what plaintext averaging gave, or None.
    """
    checks = {check.round: check for check in verification.rounds}
    return {
        "schema": SCHEMA,
        "accuracy": accuracies(rounds, options.names),
        "verification": {
            "max_abs_error": _finite(verification.max_abs_error),
            "values": verification.values,
            "comparisons": verification.comparisons,
            "bound": verification.bound,
            "passed": verification.passed,
        },
        "rounds": [
            _round(federation, found)
            | (
                {"max_abs_error": _finite(checks[found.number].max_abs_error), "values": checks[found.number].values}
                if found.number in checks
                else {}
            )
            for found in rounds
        ],
        "adapters": dict(adapters),
        "agents": {
            name: {
                "rank": rank,
                "budget": budget,
                "columns": list(_columns(rounds, name)),
                "examples": dict(shares[name]),
            }
            for name, rank, budget in zip(options.names, options.ranks, options.budgets, strict=True)
        },
        "plan": _plan(federation),
        "config": plain(options),
        "test_rows": test_rows,
        "seconds": dict(seconds),
        "comparison": dict(comparison) if comparison else None,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of everything that computes."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _round(federation: Federation, found: Round) -> dict[str, Any]:
    members = {member.agent: member for member in found.members}

    def figures(name: str) -> dict[str, int | float | None]:
        return {agent: _number(member, name) for agent, member in members.items()}

    predicted = predicted_costs(federation, found)
    return {
        "round": found.number,
        "phase": found.phase.value if found.phase else None,
        "reason": found.reason,
        "cohort": list(members),
        "counted": list(found.counted),
        "total_weight": found.total_weight,
        "bytes_up": figures("bytes_up"),
        "bytes_down": figures("bytes_down"),
        "cipher_bytes_up": {agent: member.cipher_bytes for agent, member in members.items()},
        "cipher_bytes_down": figures("cipher_bytes_down"),
        "formula_bytes_up": {agent: cost.up_bytes for agent, cost in predicted.items()},
        "formula_bytes_down": {agent: cost.down_bytes for agent, cost in predicted.items()},
        "he_seconds": figures("he_seconds"),
        "accuracy_before": figures("accuracy_before"),
        "accuracy_after": figures("accuracy_after"),
        "seconds": dict(found.phase_seconds),
        "members": {agent: dict(member.metrics) for agent, member in members.items()},
    }


def _number(member: Member, name: str) -> int | float | None:
    value = member.metrics.get(name)
    return int(value) if value is not None and "bytes" in name else value


def _columns(rounds: Sequence[Round], name: str) -> tuple[int, ...]:
    return next((member.columns for found in rounds for member in found.members if member.agent == name), ())


def _plan(federation: Federation) -> dict[str, Any] | None:
    plan = federation.plan
    if plan is None:
        return None
    return {
        "version": plan.version,
        "epoch": plan.epoch,
        "negotiation": plan.negotiation.value,
        "basis_cap": plan.cap,
        "values_per_block": plan.values_per_block,
        "packing": plan.packing.value,
        "modules": [[module.name, module.out_features, module.in_features] for module in plan.shapes.modules],
        "dense": [[tensor.name, list(tensor.shape)] for tensor in plan.shapes.dense],
    }


def _finite(value: float) -> float | None:
    return value if value == value else None  # NaN is no JSON
