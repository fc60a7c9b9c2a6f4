"""What a plan's settings give away, and who may go on with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from services.operators.leakage import Level, Settings, Verdict, judge
from services.operators.planning.terms import Participant, Terms
from shelora.errors import UnsafePlan
from shelora.plan import ModelShapes

_SHOWN: Final = 6
"""Names in a message; more are counted."""


def verdicts_of(shapes: ModelShapes, participants: Sequence[Participant], terms: Terms) -> tuple[Verdict, ...]:
    """Every agent's verdict, by the measured leakage (docs/privacy.md)."""
    widths = tuple(module.in_features for module in shapes.modules)
    agents = max(len(participants), terms.target_agents)
    return tuple(
        judge(
            Settings(
                agent=one.name,
                rank=one.rank,
                widths=widths,
                columns=one.columns,
                agents=agents,
                examples=one.examples,
                batch_size=terms.batch_size,
                steps=terms.steps,
            )
        )
        for one in participants
    )


def unsafe_among(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """Names of the agents whose settings are unsafe."""
    return tuple(verdict.agent for verdict in verdicts if verdict.level is Level.UNSAFE)


def require_safe(verdicts: Sequence[Verdict]) -> None:
    """Refuse a plan in which an agent's settings are unsafe.

    Raises:
        UnsafePlan: naming the agents, with the reason of the first.
    """
    names = unsafe_among(verdicts)
    if not names:
        return
    first = next(verdict for verdict in verdicts if verdict.agent == names[0])
    reason = next(remark.text for remark in first.remarks if remark.level is Level.UNSAFE)
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    raise UnsafePlan(
        f"expected settings under which the measured attacks find nothing, got unsafe ones for {shown}: {reason}",
        hint="give these agents the budget full; --allow-unsafe goes on without",
        context={"agents": ",".join(names[:_SHOWN])},
    )
