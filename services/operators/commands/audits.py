"""`shelora audit`: what settings give away."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from services.operators.commands.frame import JsonOption, ProfileOption, guarded, perform, show, wants_json
from services.operators.domain import Federation, RegisteredAgent
from services.operators.explain import hypothetical, parse_budgets, parse_ranks, parse_shapes
from services.operators.leakage import (
    DEFAULT_BATCH,
    DEFAULT_EXAMPLES,
    DEFAULT_STEPS,
    Level,
    Settings,
    Verdict,
    judge,
)
from services.operators.session import Session
from shelora.errors import InvalidPlan, SheLoraError
from shelora.plan import ModelShapes

_STYLES = {Level.SAFE: "green", Level.CAUTION: "yellow", Level.UNSAFE: "bold red"}


def audit(
    context: typer.Context,
    ranks: Annotated[str | None, typer.Option(help="LoRA ranks of agents to imagine, for example 4,8,16,32.")] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Their budgets, repeated over the ranks, for example full,25%,auto.")
    ] = None,
    model_shapes: Annotated[
        str | None,
        typer.Option(metavar="FILE|TEXT", help="What is trained, as for plan explain, for example 19*384x384."),
    ] = None,
    texts: Annotated[
        int, typer.Option(min=1, help="Local texts of an imagined agent; registered agents say theirs.")
    ] = DEFAULT_EXAMPLES,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts a step; agents decide, nobody else knows.")
    ] = DEFAULT_BATCH,
    steps: Annotated[int, typer.Option(min=1, help="Steps a round; agents decide, nobody else knows.")] = DEFAULT_STEPS,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Say in plain words what each agent's settings give away, from measured attacks (docs/privacy.md).

    Without options: the agents of the federation. With --ranks, --budgets and --model-shapes: agents to imagine,
    without a running service. `make audit` runs the attacks themselves.
    """
    if (ranks is None) != (model_shapes is None) or (ranks is None and budgets is not None):
        raise typer.BadParameter("expected --ranks together with --model-shapes", param_hint="--ranks")
    if ranks is None or model_shapes is None:
        federation, agents = perform(context, profile, json, _registered)
        found = guarded(lambda: _judge_registered(federation, agents, batch_size, steps), json)
    else:
        try:
            wanted, shapes = (parse_ranks(ranks), parse_budgets(budgets or "full")), parse_shapes(model_shapes)
        except SheLoraError as error:
            raise typer.BadParameter(str(error)) from error
        found = guarded(lambda: _judge_imagined(shapes, *wanted, texts, batch_size, steps), wants_json(context, json))
    show(found, render(found), wants_json(context, json))


def render(verdicts: list[Verdict]) -> Group:
    """Verdicts for a terminal: a line an agent, then its reasons, worst first."""
    lines: list[Text] = []
    order = list(Level)
    for verdict in verdicts:
        lines.append(Text.assemble((verdict.agent, "bold"), ": ", (verdict.level.value, _STYLES[verdict.level])))
        for remark in sorted(verdict.remarks, key=lambda remark: -order.index(remark.level)):
            lines.append(
                Text.assemble(
                    "  ", (remark.level.value, _STYLES[remark.level]), f" ({remark.basis.value}): {remark.text}"
                )
            )
    return Group(*lines)


async def _registered(session: Session) -> tuple[Federation, list[RegisteredAgent]]:
    name = session.profile.federation
    return await session.federations.get(name), await session.federations.agents(name)


def _judge_registered(
    federation: Federation, agents: list[RegisteredAgent], batch_size: int, steps: int
) -> list[Verdict]:
    shapes = federation.plan.shapes if federation.plan else federation.shapes
    if shapes is None or not agents:
        raise InvalidPlan(
            f"federation {federation.spec.federation}: expected a registered agent, got none",
            hint="wait for one, or imagine agents with --ranks, --budgets and --model-shapes",
        )
    widths = tuple(module.in_features for module in shapes.modules)
    count = max(len(agents), federation.spec.target_agents)
    return [
        judge(Settings(agent.name, agent.rank, widths, agent.columns, count, max(agent.examples, 1), batch_size, steps))
        for agent in agents
    ]


def _judge_imagined(
    shapes: ModelShapes, ranks: list[int], budgets: list[str], texts: int, batch_size: int, steps: int
) -> list[Verdict]:
    widths = tuple(module.in_features for module in shapes.modules)
    return [
        judge(Settings(agent.name, agent.rank, widths, agent.columns, len(ranks), texts, batch_size, steps))
        for agent in hypothetical(shapes, ranks, budgets)
    ]
