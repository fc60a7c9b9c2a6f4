"""`shelora audit`: what settings give away."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from services.operators.commands.frame import JsonOption, ProfileOption, guarded, perform, show, wants_json
from services.operators.domain import Federation, RegisteredAgent
from services.operators.leakage import DEFAULT_BATCH, DEFAULT_EXAMPLES, DEFAULT_STEPS, Verdict
from services.operators.plan_tables import verdict_lines
from services.operators.planning import (
    Participant,
    Terms,
    imagine,
    parse_budgets,
    parse_ranks,
    parse_shapes,
    present_terms,
    shapes_of,
    verdicts_of,
)
from services.operators.session import Session
from shelora.errors import InvalidPlan, SheLoraError
from shelora.plan import ModelShapes


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
    show(found, verdict_lines(found), wants_json(context, json))


async def _registered(session: Session) -> tuple[Federation, list[RegisteredAgent]]:
    name = session.profile.federation
    return await session.federations.get(name), await session.federations.agents(name)


def _judge_registered(
    federation: Federation, agents: list[RegisteredAgent], batch_size: int, steps: int
) -> list[Verdict]:
    if not agents:
        raise InvalidPlan(
            f"federation {federation.spec.federation}: expected a registered agent, got none",
            hint="wait for one, or imagine agents with --ranks, --budgets and --model-shapes",
        )
    terms = replace(present_terms(federation), batch_size=batch_size, steps=steps)
    participants = [
        Participant(agent.name, agent.rank, agent.budget, agent.columns, max(agent.examples, 1)) for agent in agents
    ]
    return list(verdicts_of(shapes_of(federation), participants, terms))


def _judge_imagined(
    shapes: ModelShapes, ranks: list[int], budgets: list[str], texts: int, batch_size: int, steps: int
) -> list[Verdict]:
    terms = Terms(batch_size=batch_size, steps=steps)
    return list(verdicts_of(shapes, imagine(shapes, ranks, budgets, terms, examples=texts), terms))
