"""What a federation's own settings give away, from bounds that were argued and figures that were measured.

The figures are in leakage.json, which `make audit PUBLISH=1` writes; docs/privacy.md explains them. A verdict speaks
about the attacks that were run, on the model and texts of that run: it proves nothing about better ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final

from shelora.errors import InvalidConfiguration, StoredBytesCorrupt

TABLE: Final = Path(__file__).with_name("leakage.json")

DEFAULT_EXAMPLES: Final = 480
DEFAULT_BATCH: Final = 16
DEFAULT_STEPS: Final = 30

VISIBLE_LEAKAGE: Final = 0.03
"""Tokens beyond chance, as a share, from which on left factors are called leaky."""

VISIBLE_MEMBERSHIP: Final = 0.65
"""AUC of a loss threshold from which on membership is called visible; 0.5 is guessing."""

_MOST_TOKENS: Final = 0.75
_LITTLE_HIDDEN: Final = 0.009
_FEW_TEXTS_A_STEP: Final = 4
_FEW_STEPS: Final = 5
_ALIKE: Final = 0.2
"""Settings whose passes differ by less, as a logarithm, are one; the worst counts."""

Table = Mapping[str, Any]


class Level(Enum):
    """How bad it is, best first."""

    SAFE = "safe"
    CAUTION = "caution"
    UNSAFE = "unsafe"


class Basis(Enum):
    """Where a remark comes from."""

    MEASURED = "measured"
    ARGUED = "argued"


@dataclass(frozen=True)
class Settings:
    """What decides the leakage of one agent.

    Attributes:
        agent: its name.
        rank: LoRA rank.
        widths, columns: input width n and encrypted columns k, a module each; none where all tensors are trained whole.
        agents: agents in the federation.
        examples: local texts.
        batch_size: texts a step.
        steps: optimizer steps a round.
    """

    agent: str
    rank: int
    widths: tuple[int, ...]
    columns: tuple[int, ...]
    agents: int
    examples: int = DEFAULT_EXAMPLES
    batch_size: int = DEFAULT_BATCH
    steps: int = DEFAULT_STEPS

    def __post_init__(self) -> None:
        """Check that there is something to judge."""
        counts = (self.rank, self.agents, self.examples, self.batch_size, self.steps)
        if min(counts) < 1 or len(self.widths) != len(self.columns):
            raise InvalidConfiguration(
                f"audit of {self.agent}: expected at least 1 agent, text and step, got {counts} and "
                f"{len(self.columns)} column counts for {len(self.widths)} modules",
                hint="name ranks, model shapes and texts above 0",
            )

    @property
    def plain(self) -> int:
        """Most plain columns of a module, 0 without modules."""
        return max((width - count for width, count in zip(self.widths, self.columns, strict=True)), default=0)

    @property
    def hidden_share(self) -> float:
        """Encrypted columns over all, in the module that encrypts least."""
        return min(count / width for width, count in zip(self.widths, self.columns, strict=True))

    @property
    def passes(self) -> float:
        """Passes over the local texts in one round."""
        return self.steps * min(self.batch_size, self.examples) / self.examples


@dataclass(frozen=True)
class Remark:
    """One sentence of a verdict."""

    level: Level
    basis: Basis
    text: str


@dataclass(frozen=True)
class Verdict:
    """What one agent's settings give away; `level` is that of the worst remark."""

    agent: str
    level: Level
    remarks: tuple[Remark, ...]


def judge(settings: Settings, table: Table | None = None) -> Verdict:
    """Judge one agent's settings.

    Args:
        settings: the agent's.
        table: the measured figures; None reads the published ones.

    Raises:
        StoredBytesCorrupt: the published table cannot be read.
    """
    figures = load_table() if table is None else table
    remarks = (
        *_factors(settings, figures),
        _membership(settings, figures),
        *_cohort(settings),
    )
    order = list(Level)
    return Verdict(settings.agent, max((remark.level for remark in remarks), key=order.index), remarks)


@cache
def load_table(path: Path = TABLE) -> Table:
    """The published figures.

    Raises:
        StoredBytesCorrupt: missing or not JSON.
    """
    try:
        found: Table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoredBytesCorrupt(
            f"{path.name}: expected the published figures of the audit, got {type(error).__name__}",
            hint="install the package again, or write the file with make audit PUBLISH=1",
        ) from error
    return found


def _factors(settings: Settings, table: Table) -> Iterable[Remark]:
    """Factors of LoRA pairs; tensors that are trained whole are always encrypted."""
    if settings.widths:
        yield from _right(settings, table)
        yield from _left(settings, table)


def _right(settings: Settings, table: Table) -> Iterable[Remark]:
    """Plain columns of the right factor."""
    if settings.plain == 0:
        yield Remark(
            Level.SAFE,
            Basis.ARGUED,
            "Every right column is encrypted: span checks on right factors have nothing to look at.",
        )
        return
    if any(count == 1 for count in settings.columns):
        yield Remark(
            Level.UNSAFE,
            Basis.MEASURED,
            "A single encrypted column is known up to its sign, from the plain ones, to within "
            f"{table['single_column_error']:.0e}. Encrypt all columns.",
        )
    share = f"{settings.hidden_share:.1%} of the columns encrypted, up to {settings.plain} plain"
    if settings.plain <= settings.rank:
        yield Remark(
            Level.CAUTION,
            Basis.ARGUED,
            f"{share}: no more than the rank ({settings.rank}), so a span check of a later round has nothing "
            "to compare. A first round on fewer tokens still tells them to whoever knows the order and the initial A.",
        )
        return
    leaking = [row for row in table["budgets"] if row["wire"] >= _MOST_TOKENS]
    limit = max(leaking, key=lambda row: row["hidden"])
    zeroed = max(row["zeroed"] for row in leaking if row["zeroed"] is not None and row["hidden"] >= _LITTLE_HIDDEN)
    yield Remark(
        Level.UNSAFE,
        Basis.MEASURED,
        f"{share}: only the secret order protects these. With the order and the start a span check "
        "works while more columns are plain than the update has dimensions, which are never more than twice the "
        f"rank ({2 * settings.rank}). One plain gradient step on two texts gave back {limit['wire']:.0%} of the tokens "
        f"with {limit['hidden']:.0%} encrypted at rank {limit['rank']}. That taking hidden columns for zeros finds "
        f"{zeroed:.0%} from 1 % on proves nothing.",
    )
    yield Remark(
        Level.CAUTION,
        Basis.MEASURED,
        f"The order is an obfuscation: by content {table['orders']['linked']:.0%} of the columns were linked from "
        "round to round, and the token that opens a very short text gave away up to "
        f"{table['orders']['placed_at_best']:.0%} of the order in a gradient of A.",
    )


def _left(settings: Settings, table: Table) -> Iterable[Remark]:
    """Left factors, plain at every budget."""
    near = _nearest(table["trainings"], settings.examples, "texts", logarithmic=True)
    leaky = near["left"] > max(VISIBLE_LEAKAGE, 2 * near["left_error"])
    yield Remark(
        Level.CAUTION if leaky else Level.SAFE,
        Basis.MEASURED,
        f"Left factors are plain at every budget. An agent with {near['texts']} texts, rank {near['rank']} and "
        f"{near['steps']} steps gave away {max(near['left'], 0):.1%} of its tokens through them beyond chance "
        f"(standard error {near['left_error']:.1%}); the published check found {near['left_below']:.0%}."
        + (" Give the agent more texts." if leaky else ""),
    )
    if settings.batch_size < _FEW_TEXTS_A_STEP and settings.steps < _FEW_STEPS:
        yield Remark(
            Level.CAUTION,
            Basis.MEASURED,
            f"{settings.batch_size} texts a step, {settings.steps} steps: after one plain gradient step on one short "
            f"text left factors alone gave back {table['plain_step_left']:.0%} of it, whatever was encrypted. Only the "
            "optimizer stands between: after a step of AdamW the attack found nothing. Train longer.",
        )


def _membership(settings: Settings, table: Table) -> Remark:
    """What a published average tells the agents who hold it."""
    nearest = _nearest(table["membership"], settings.passes, "passes", logarithmic=True)
    alike = [row for row in table["membership"] if abs(math.log(row["passes"] / nearest["passes"])) < _ALIKE]
    near = max(alike, key=lambda row: row["average"])
    visible = near["average"] > VISIBLE_MEMBERSHIP
    return Remark(
        Level.CAUTION if visible else Level.SAFE,
        Basis.MEASURED,
        f"{settings.passes:.1f} passes over {settings.examples} texts a round: after {near['passes']:.1f} passes over "
        f"{near['texts']} texts their losses in the average of two agents told them from others with an AUC of "
        f"{near['average']:.2f} (0.5 is guessing). All agents hold the averages."
        + (" Take fewer steps or more texts." if visible else ""),
    )


def _cohort(settings: Settings) -> Iterable[Remark]:
    """What follows from how many take part."""
    if settings.agents <= 2:
        yield Remark(
            Level.CAUTION,
            Basis.ARGUED,
            f"{settings.agents} agents: each can subtract itself from the average and has the other's update.",
        )
    yield Remark(
        Level.SAFE,
        Basis.ARGUED,
        "All of this holds while no agent hands its key to the aggregator, which would open every encrypted column.",
    )


def _nearest(rows: Sequence[Table], value: float, key: str, *, logarithmic: bool = False) -> Table:
    """The measured row whose figure is nearest."""
    if not logarithmic:
        return min(rows, key=lambda row: abs(row[key] - value))
    return min(rows, key=lambda row: abs(math.log(row[key]) - math.log(value)))
