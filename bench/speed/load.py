"""What a measured federation works on: sizes, ranks, budgets; read from data files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shelora.errors import InvalidConfiguration
from shelora.plan import ModelShapes, ModuleShape, Packing, parse_budget


@dataclass(frozen=True)
class Run:
    """One federation to measure.

    Attributes:
        agents: number of agents.
        modules: LoRA modules, all of one size.
        out_features, in_features: m and n of every module.
        ranks, budgets: repeated over the agents.
        packing: how ciphertexts are packed.
        rounds: measured rounds.
        cap: basis rows at most; 0 is the product's choice.
    """

    agents: int
    modules: int
    out_features: int
    in_features: int
    ranks: tuple[int, ...]
    budgets: tuple[str, ...]
    packing: Packing = Packing.EXACT
    rounds: int = 3
    cap: int = 0

    def __post_init__(self) -> None:
        """Refuse what no federation can be."""
        sizes = (self.agents, self.modules, self.out_features, self.in_features, self.rounds, *self.ranks)
        if not self.ranks or not self.budgets or min(sizes) < 1:
            raise InvalidConfiguration(f"workload: expected ranks, budgets and sizes above 0, got {self}")
        for budget in self.budgets:
            parse_budget(budget)

    @property
    def shapes(self) -> ModelShapes:
        """What every agent trains."""
        names = (f"layers.{index}.projection" for index in range(self.modules))
        return ModelShapes(tuple(ModuleShape(name, self.out_features, self.in_features) for name in names), ())

    def rank(self, index: int) -> int:
        """Rank of an agent."""
        return self.ranks[index % len(self.ranks)]

    def budget(self, index: int) -> str:
        """Budget of an agent."""
        return self.budgets[index % len(self.budgets)]

    def save(self, path: Path) -> None:
        """Write it for another process."""
        path.write_text(json.dumps({**asdict(self), "packing": self.packing.value}), encoding="utf-8")

    @property
    def lora_bytes(self) -> int:
        """Bytes of the first agent's adapter in float32: what averaging without encryption sends each way."""
        return 4 * self.modules * self.rank(0) * (self.out_features + self.in_features)


def read_run(path: Path) -> Run:
    """What `Run.save` wrote."""
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    ranks, budgets = tuple(fields["ranks"]), tuple(fields["budgets"])
    return Run(**{**fields, "ranks": ranks, "budgets": budgets, "packing": Packing(fields["packing"])})


@dataclass(frozen=True)
class Workload:
    """The published workload.

    Attributes:
        runs: federations, by a name such as "0.125% exact".
        pairs, columns: what the re-created baseline measures of each run before it is scaled.
        published: the published implementation's own figures by budget.
    """

    runs: Mapping[str, Run]
    pairs: int
    columns: int
    published: Mapping[str, Mapping[str, float]]


def read_workload(path: Path) -> Workload:
    """Read a data file.

    Raises:
        InvalidConfiguration: fields that are missing or cannot be.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sizes = {key: int(found[key]) for key in ("agents", "modules", "out_features", "in_features")}
        ranks = tuple(int(rank) for rank in found["ranks"])
        runs = {}
        for run in found["runs"]:
            name = f"{run['budget']} {run['packing']}"
            rounds, packing = int(run["rounds"]), Packing(run["packing"])
            runs[name] = Run(**sizes, ranks=ranks, budgets=(str(run["budget"]),), packing=packing, rounds=rounds)
        baseline = found["baseline"]
        return Workload(runs, int(baseline["pairs"]), int(baseline["columns"]), found["published"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidConfiguration(
            f"workload {path}: expected sizes, ranks, runs and a baseline, got {type(error).__name__}: {error}",
            hint="compare it with bench/speed/published.json",
        ) from error


@dataclass(frozen=True)
class Scale:
    """How the aggregator's computations are scaled: one size at a time, the others as in `base`.

    Attributes:
        base: where every sweep starts from.
        sweeps: values by "agents", "rank", "width" or "modules".
    """

    base: Run
    sweeps: Mapping[str, tuple[int, ...]]

    def at(self, sweep: str, value: int) -> Run:
        """The run at one value of a sweep."""
        changed: dict[str, dict[str, Any]] = {
            "agents": {"agents": value},
            "rank": {"ranks": (value,)},
            "width": {"out_features": value, "in_features": value},
            "modules": {"modules": value},
        }
        return replace(self.base, **changed[sweep])


def read_scale(path: Path) -> Scale:
    """Read a data file.

    Raises:
        InvalidConfiguration: fields that are missing or cannot be.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        fields = {**found["base"], "ranks": tuple(found["base"]["ranks"]), "budgets": (found["base"]["budget"],)}
        del fields["budget"]
        sweeps = {name: tuple(int(value) for value in values) for name, values in found["sweeps"].items()}
        scale = Scale(Run(**fields), sweeps)
        for name, values in sweeps.items():
            scale.at(name, values[0])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InvalidConfiguration(
            f"scale {path}: expected a base and sweeps, got {type(error).__name__}: {error}",
            hint="compare it with bench/speed/scale.json",
        ) from error
    return scale
