from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.operators.demo.verify import BOUND, verify_round, verify_rounds
from shelora.errors import NonFiniteValue, StoredBytesCorrupt
from shelora.he.parameters import CkksParameters
from shelora.lora import canonical

M, N, MODULES = 10, 12, 2
AGENTS = {"agent-1": (2, 30.0), "agent-2": (3, 50.0), "agent-3": (4, 20.0)}


class Revealed:
    """Folders as agents write them, with the right average at first."""

    def __init__(self, root: Path, rng: np.random.Generator) -> None:
        self.folders = {agent: root / agent for agent in AGENTS}
        self.factors: dict[str, dict[str, np.ndarray]] = {}
        for agent, (rank, _) in AGENTS.items():
            tensors: dict[str, np.ndarray] = {"dense.0": rng.normal(size=(2, 3)), "dense.1": rng.normal(size=5)}
            for index in range(MODULES):
                update = canonical(rng.normal(size=(M, rank)), rng.normal(size=(rank, N)), 0.5)
                tensors |= {f"{index}.left": update.left, f"{index}.right": update.right}
            self.factors[agent] = tensors

    def average(self, counted: tuple[str, ...]) -> dict[str, np.ndarray]:
        total = sum(AGENTS[agent][1] for agent in counted)
        tensors: dict[str, np.ndarray] = {}
        for index in range(MODULES):
            mean = sum(
                AGENTS[agent][1] / total * self.factors[agent][f"{index}.left"] @ self.factors[agent][f"{index}.right"]
                for agent in counted
            )
            left, energy, right = np.linalg.svd(np.asarray(mean), full_matrices=False)
            tensors |= {f"{index}.basis": np.ascontiguousarray(left), f"{index}.core": energy[:, None] * right}
        for index in range(2):
            tensors[f"dense.{index}"] = np.asarray(
                sum(AGENTS[agent][1] / total * self.factors[agent][f"dense.{index}"] for agent in counted)
            )
        return tensors

    def write(self, number: int, counted: tuple[str, ...], opened_by: tuple[str, ...] = tuple(AGENTS)) -> None:
        for agent, (_, examples) in AGENTS.items():
            self.folders[agent].mkdir(parents=True, exist_ok=True)
            save_file(
                self.factors[agent],
                self.folders[agent] / f"round-{number:03d}-factors.safetensors",
                metadata={"examples": str(int(examples))},
            )
        for agent in opened_by:
            self.write_average(number, agent, self.average(counted), counted)

    def write_average(self, number: int, agent: str, tensors: dict[str, np.ndarray], counted: tuple[str, ...]) -> None:
        save_file(
            tensors,
            self.folders[agent] / f"round-{number:03d}-average.safetensors",
            metadata={"counted": json.dumps(list(counted))},
        )


@pytest.fixture
def revealed(tmp_path: Path) -> Revealed:
    return Revealed(tmp_path, np.random.default_rng(5))


def test_the_right_average_passes_and_every_value_counts(revealed) -> None:
    revealed.write(1, tuple(AGENTS))
    revealed.write(2, ("agent-1", "agent-3"))
    done: list[int] = []
    verification = verify_rounds(revealed.folders, [1, 2], done.append)

    assert done == [1, 2]
    assert verification.passed
    assert verification.max_abs_error < 1e-13
    assert verification.values == 2 * (MODULES * M * N + 6 + 5)
    assert verification.comparisons == 3 * verification.values
    assert verification.rounds[1].counted == ("agent-1", "agent-3")


@pytest.mark.parametrize("name", ["0.core", "1.basis", "dense.1"])
def test_one_wrong_value_at_one_agent_is_found_and_named(revealed, name) -> None:
    counted = tuple(AGENTS)
    revealed.write(1, counted)
    wrong = revealed.average(counted)
    wrong[name] = wrong[name].copy()
    wrong[name].flat[3] += 1e-3
    revealed.write_average(1, "agent-2", wrong, counted)

    check = verify_round(revealed.folders, 1)
    assert check.max_abs_error > BOUND
    assert check.worst.endswith("of agent-2")
    assert not verify_rounds(revealed.folders, [1]).passed


def test_dense_packing_widens_the_bound_by_its_rounding(revealed) -> None:
    """By 2 * 4.3e-6 (two agents) times the weighted norms of the left factors, here of order ten; no further."""
    counted = ("agent-1", "agent-3")
    parameters = CkksParameters(modulus=1152921504606830593)
    for number, error, passes in ((1, 2e-5, True), (2, 1e-3, False)):
        revealed.write(number, counted)
        rounded = revealed.average(counted)
        rounded["0.core"] = rounded["0.basis"] @ rounded["0.core"] + error
        rounded["0.basis"] = np.eye(len(rounded["0.basis"]))
        revealed.write_average(number, "agent-2", rounded, counted)
        verification = verify_rounds(revealed.folders, [number], dense=parameters)
        assert verification.passed is passes
        assert 2e-5 < verification.bound < 1e-3
        assert not verify_rounds(revealed.folders, [number]).passed


def test_an_average_weighted_otherwise_fails(revealed) -> None:
    revealed.write(1, ("agent-1", "agent-2"))
    for agent in AGENTS:
        revealed.write_average(1, agent, revealed.average(tuple(AGENTS)), ("agent-1", "agent-2"))
    assert not verify_rounds(revealed.folders, [1]).passed


def test_nan_never_passes_wherever_it_stands(revealed) -> None:
    counted = tuple(AGENTS)
    for round_number, (agent, name) in enumerate([("agent-1", "dense.0"), ("agent-3", "1.core")], start=1):
        revealed.write(round_number, counted)
        wrong = revealed.average(counted)
        wrong[name] = wrong[name].copy()
        wrong[name].flat[0] = np.nan
        revealed.write_average(round_number, agent, wrong, counted)
    verification = verify_rounds(revealed.folders, [1, 2])
    assert np.isnan(verification.max_abs_error)
    assert [np.isnan(check.max_abs_error) for check in verification.rounds] == [True, True]
    assert not verification.passed


def test_nan_in_clear_factors_is_an_error(revealed) -> None:
    revealed.factors["agent-1"]["0.left"] = np.full((M, 2), np.nan)
    revealed.write(1, ("agent-2", "agent-3"))
    assert verify_rounds(revealed.folders, [1]).passed
    for agent in AGENTS:
        revealed.write_average(1, agent, revealed.average(("agent-2", "agent-3")), tuple(AGENTS))
    with pytest.raises(NonFiniteValue):
        verify_round(revealed.folders, 1)


def test_an_agent_that_missed_a_round_is_not_compared(revealed) -> None:
    revealed.write(1, tuple(AGENTS), opened_by=("agent-2",))
    check = verify_round(revealed.folders, 1)
    assert check.opened_by == ("agent-2",)
    assert check.comparisons == check.values


def test_nothing_to_compare_is_no_success(revealed) -> None:
    revealed.write(1, tuple(AGENTS), opened_by=())
    with pytest.raises(StoredBytesCorrupt, match="opened average of some agent"):
        verify_round(revealed.folders, 1)
    assert not verify_rounds(revealed.folders, []).passed


def test_agents_that_disagree_on_who_counts_are_an_error(revealed) -> None:
    revealed.write(1, tuple(AGENTS))
    revealed.write_average(1, "agent-1", revealed.average(("agent-1",)), ("agent-1",))
    with pytest.raises(StoredBytesCorrupt, match="one list of counted members"):
        verify_round(revealed.folders, 1)


def test_missing_factors_and_missing_tensors_are_errors(revealed) -> None:
    revealed.write(1, tuple(AGENTS))
    (revealed.folders["agent-2"] / "round-001-factors.safetensors").unlink()
    with pytest.raises(StoredBytesCorrupt, match="revealed"):
        verify_round(revealed.folders, 1)
    del revealed.factors["agent-2"]["1.right"]
    save_file(
        revealed.factors["agent-2"],
        revealed.folders["agent-2"] / "round-001-factors.safetensors",
        metadata={"examples": "50"},
    )
    with pytest.raises(StoredBytesCorrupt, match=r"tensor '1.right'"):
        verify_round(revealed.folders, 1)
