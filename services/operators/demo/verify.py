"""The check of the whole method: what agents decrypted against float64 averages of their clear factors.

Agents of a demonstration write both to a folder of theirs (never anywhere else). One module is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from shelora.errors import StoredBytesCorrupt
from shelora.he.parameters import CkksParameters
from shelora.lora import Factors, plaintext_average
from shelora.plan import dense_error

BOUND: Final = 1e-6
"""Largest difference that passes with exact packing."""

_VALUES_AT_ONCE: Final = 4_000_000

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Largest difference between what one agent opened and the reference, in one tensor."""

    agent: str
    tensor: str
    values: int
    error: float


@dataclass(frozen=True)
class RoundCheck:
    """The verification of one round.

    Attributes:
        round: its number.
        counted: members of the average.
        opened_by: agents that opened it; each was compared.
        values: averaged values of the round.
        comparisons: values compared, over all agents that opened it.
        max_abs_error: largest difference found.
        worst: where it was found.
        bound: largest difference that passes.
    """

    round: int
    counted: tuple[str, ...]
    opened_by: tuple[str, ...]
    values: int
    comparisons: int
    max_abs_error: float
    worst: str
    bound: float = BOUND


@dataclass(frozen=True)
class Verification:
    """The verification of all rounds."""

    rounds: tuple[RoundCheck, ...]

    @property
    def max_abs_error(self) -> float:
        """Largest difference of all rounds."""
        return float(np.max([check.max_abs_error for check in self.rounds])) if self.rounds else float("nan")

    @property
    def bound(self) -> float:
        """Largest difference that passes, of all rounds."""
        return max((check.bound for check in self.rounds), default=BOUND)

    @property
    def values(self) -> int:
        """Averaged values of all rounds."""
        return sum(check.values for check in self.rounds)

    @property
    def comparisons(self) -> int:
        """Values compared, over all agents and rounds."""
        return sum(check.comparisons for check in self.rounds)

    @property
    def passed(self) -> bool:
        """Whether there was something to compare and every difference is within the bound."""
        held = all(check.max_abs_error <= check.bound for check in self.rounds)
        return bool(self.rounds) and self.values > 0 and held


def verify_rounds(
    folders: Mapping[str, Path],
    rounds: Sequence[int],
    progress: Callable[[int], None] = lambda _: None,
    dense: CkksParameters | None = None,
) -> Verification:
    """Verify some rounds.

    Args:
        folders: per agent the folder it revealed its numbers to.
        rounds: numbers of published rounds.
        progress: told each number when it is done.
        dense: with dense packing the CKKS parameters, whose rounding the bound then includes.

    Raises:
        StoredBytesCorrupt: a needed file is missing or does not fit the others.
    """
    checks = []
    for number in rounds:
        checks.append(verify_round(folders, number, dense))
        progress(number)
    return Verification(tuple(checks))


def verify_round(folders: Mapping[str, Path], number: int, dense: CkksParameters | None = None) -> RoundCheck:
    """Verify one round: every agent's opened average against the average of the counted members' clear factors.

    Raises:
        StoredBytesCorrupt: a needed file is missing or does not fit the others.
    """
    opened = {
        agent: _Tensors(folder / f"round-{number:03d}-average.safetensors")
        for agent, folder in sorted(folders.items())
        if (folder / f"round-{number:03d}-average.safetensors").is_file()
    }
    if not opened:
        raise StoredBytesCorrupt(f"round {number}: expected an opened average of some agent, got none")
    counted = _counted(number, opened)
    unknown = sorted(set(counted) - set(folders))
    if unknown:
        raise StoredBytesCorrupt(f"round {number}: expected only known agents in the average, got {', '.join(unknown)}")
    members = [_Tensors(folders[agent] / f"round-{number:03d}-factors.safetensors") for agent in counted]
    weights = [float(member.metadata["examples"]) for member in members]
    first = next(iter(opened.values()))
    differences: list[Difference] = []
    for index in range(first.count(".core")):
        differences += _module_differences(index, members, weights, opened)
    for index in range(first.count("dense.")):
        name = f"dense.{index}"
        mean = np.asarray(sum(w * m.get(name) for w, m in zip(weights, members, strict=True)) / sum(weights))
        for agent, average in opened.items():
            differences.append(Difference(agent, name, mean.size, _largest(average.get(name), mean)))
    errors = np.array([difference.error for difference in differences])
    comparisons = sum(difference.values for difference in differences)
    worst = differences[int(np.argmax(errors))] if differences else None  # argmax finds NaN first
    return RoundCheck(
        round=number,
        counted=counted,
        opened_by=tuple(opened),
        values=comparisons // len(opened),
        comparisons=comparisons,
        max_abs_error=worst.error if worst else float("nan"),
        worst=f"{worst.tensor} of {worst.agent}" if worst else "",
        bound=BOUND if dense is None else BOUND + _packing_bound(folders, number, sum(weights), len(members), dense),
    )


def _packing_bound(
    folders: Mapping[str, Path], number: int, counted_examples: float, counted: int, parameters: CkksParameters
) -> float:
    """What dense packing may add to an entry of an average, in its largest module: docs/method.md section 8."""
    paths = [folder / f"round-{number:03d}-factors.safetensors" for folder in folders.values()]
    sent = [_Tensors(path) for path in paths if path.is_file()]
    energies = [
        sum(float(one.metadata["examples"]) * float(np.linalg.norm(one.get(f"{index}.left"))) for one in sent)
        for index in range(sent[0].count(".left"))
    ]
    return 2.0 * dense_error(parameters, counted) * max(energies, default=0.0) / counted_examples


def _module_differences(
    index: int, members: Sequence[_Tensors], weights: Sequence[float], opened: Mapping[str, _Tensors]
) -> list[Difference]:
    """One module, per agent; some rows are compared at a time."""
    factors = [Factors(member.get(f"{index}.left"), member.get(f"{index}.right")) for member in members]
    rows, width = factors[0].left.shape[0], factors[0].right.shape[1]
    averages = {agent: (each.get(f"{index}.basis"), each.get(f"{index}.core")) for agent, each in opened.items()}
    largest = dict.fromkeys(opened, 0.0)
    step = max(1, _VALUES_AT_ONCE // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        mean = plaintext_average([Factors(one.left[part], one.right) for one in factors], weights)
        for agent, (basis, core) in averages.items():
            largest[agent] = float(np.maximum(largest[agent], _largest(basis[part] @ core, mean)))
    return [Difference(agent, f"module {index}", rows * width, error) for agent, error in largest.items()]


def _largest(found: Float64, expected: Float64) -> float:
    """Largest difference; NaN when any value is not a number, so that no bound holds."""
    if found.shape != expected.shape:
        raise StoredBytesCorrupt(f"revealed tensors: expected shape {expected.shape}, got {found.shape}")
    return float(np.max(np.abs(found - expected), initial=0.0))


def _counted(number: int, opened: Mapping[str, _Tensors]) -> tuple[str, ...]:
    lists = {tuple(json.loads(average.metadata["counted"])) for average in opened.values()}
    if len(lists) != 1:
        raise StoredBytesCorrupt(
            f"round {number}: expected one list of counted members at all agents, got {len(lists)}"
        )
    return next(iter(lists))


class _Tensors:
    """A safetensors file whose tensors are read one by one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="numpy") as file:
                self._names = frozenset(file.keys())
                self.metadata: dict[str, Any] = dict(file.metadata() or {})
        except (OSError, SafetensorError) as error:
            raise StoredBytesCorrupt(
                f"{path}: expected a file the agent revealed, got {type(error).__name__}",
                hint="read the agent's log",
            ) from error

    def count(self, part: str) -> int:
        return sum(part in name for name in self._names)

    def get(self, name: str) -> Float64:
        if name not in self._names:
            raise StoredBytesCorrupt(f"{self._path}: expected a tensor {name!r}, got none of that name")
        with safe_open(self._path, framework="numpy") as file:
            return np.asarray(file.get_tensor(name), dtype=np.float64)
