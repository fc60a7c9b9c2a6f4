"""What can be chosen about a demonstration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.operators.planning import parse_budgets, parse_ranks
from shelora.errors import InvalidConfiguration
from shelora.plan import Packing

EMBEDDED: Final = "embedded"
DEFAULT_AGENTS: Final = 4
DEFAULT_ROUNDS: Final = 3
DEFAULT_RANKS: Final = "4,8,16,32"
DEFAULT_BUDGETS: Final = "full,25%,5%,auto"
DEFAULT_OUT: Final = Path("build/demo")
MOST_AGENTS: Final = 64
MOST_ROUNDS: Final = 1000

_EXAMPLES: Final = Path("examples/data")
_REPOSITORY: Final = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class DemoOptions:
    """A checked choice.

    Attributes:
        data, test: labelled text; test None holds out a fifth of the data.
        model: "embedded", an absolute folder, or a hub id.
        ranks, budgets: one an agent.
        rounds: rounds to run.
        compare: also train with plaintext averaging and print both.
        out: folder for everything the demonstration writes.
        packing: how ciphertexts are packed.
        text_field, label_field: names in the data.
        concentration: of the Dirichlet split; smaller is more skewed.
        seed: of split and training.
    """

    data: Path
    test: Path | None
    model: str
    ranks: tuple[int, ...]
    budgets: tuple[str, ...]
    rounds: int
    compare: bool
    out: Path
    text_field: str = "text"
    label_field: str = "label"
    concentration: float = 2.0
    seed: int = 7
    packing: Packing = Packing.EXACT

    @property
    def agents(self) -> int:
        """Number of agents."""
        return len(self.ranks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the agents."""
        return tuple(f"agent-{index + 1}" for index in range(self.agents))

    @property
    def basis_cap(self) -> int:
        """Cap that keeps every update whole, so that the check against float64 averages is exact.

        0 where the usual one does, which is 4 x the largest rank.
        """
        total = sum(self.ranks)
        return 0 if total <= 4 * max(self.ranks) else min(total, 4096)


def choose(
    *,
    data: Path | None,
    test: Path | None,
    model: str,
    agents: int | None,
    rounds: int,
    ranks: str,
    budgets: str,
    compare: str | None,
    out: Path,
    text_field: str = "text",
    label_field: str = "label",
    concentration: float = 2.0,
    seed: int = 7,
    packing: Packing = Packing.EXACT,
) -> DemoOptions:
    """Check options as they were typed; ranks and budgets are repeated over the agents.

    Raises:
        InvalidConfiguration: an option that cannot be used, with what to write instead.
    """
    rank_list, budget_list = parse_ranks(ranks), parse_budgets(budgets)
    count = agents if agents is not None else max(DEFAULT_AGENTS, len(rank_list), len(budget_list))
    if not 2 <= count <= MOST_AGENTS:
        raise InvalidConfiguration(f"agents: expected 2 to {MOST_AGENTS}, got {count}")
    if not 1 <= rounds <= MOST_ROUNDS:
        raise InvalidConfiguration(f"rounds: expected 1 to {MOST_ROUNDS}, got {rounds}")
    if compare not in (None, "", "plaintext"):
        raise InvalidConfiguration(f"compare: expected plaintext, got {compare!r}")
    if concentration <= 0:
        raise InvalidConfiguration(f"skew: expected a concentration above 0, got {concentration}")
    if data is None and test is not None:
        raise InvalidConfiguration("test: expected data as well", hint="name both, or only the data")
    if data is None:
        folder = _EXAMPLES if _EXAMPLES.is_dir() else _REPOSITORY / _EXAMPLES
        data, test = folder / "routing_train.jsonl", folder / "routing_test.jsonl"
    return DemoOptions(
        data=data.expanduser(),
        test=test.expanduser() if test is not None else None,
        model=_model(model),
        ranks=tuple(rank_list[index % len(rank_list)] for index in range(count)),
        budgets=tuple(budget_list[index % len(budget_list)] for index in range(count)),
        rounds=rounds,
        compare=bool(compare),
        out=out.expanduser(),
        text_field=text_field,
        label_field=label_field,
        concentration=concentration,
        seed=seed,
        packing=packing,
    )


def _model(model: str) -> str:
    """A folder as an absolute path; anything else as it is."""
    folder = Path(model).expanduser()
    if model == EMBEDDED or not folder.is_dir():
        return model
    return str(folder.resolve())
