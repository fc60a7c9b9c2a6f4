"""`shelora plan`: explain."""

from __future__ import annotations

from typing import Annotated

import typer

from services.operators.commands.frame import (
    JsonOption,
    ProfileOption,
    guarded,
    make_group,
    perform,
    show,
    wants_json,
)
from services.operators.domain import Federation, RegisteredAgent
from services.operators.explain import (
    ENCRYPT_VALUES_PER_S,
    UPLOAD_BYTES_PER_S,
    VALUES_PER_BLOCK,
    Explanation,
    Participant,
    explain,
    hypothetical,
    parse_budgets,
    parse_ranks,
    parse_shapes,
)
from services.operators.render import explanation_table
from services.operators.session import Session
from shelora.errors import InvalidPlan, SheLoraError
from shelora.plan import HeRate, ModelShapes, Packing

app = make_group("plan", "What a plan costs.")


@app.callback()
def group() -> None:
    """Keep `explain` a command of its own."""


@app.command("explain")
def explain_plan(
    context: typer.Context,
    ranks: Annotated[str | None, typer.Option(help="LoRA ranks of agents to imagine, for example 4,8,16,32.")] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Their budgets, repeated over the ranks, for example full,25%,5%,auto.")
    ] = None,
    model_shapes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|TEXT", help="What is trained: a JSON file, or for example 104*3200x3200,dense*2048."
        ),
    ] = None,
    basis_cap: Annotated[
        int | None, typer.Option(min=0, max=4096, help="Most basis rows; 0: 4 x largest rank.")
    ] = None,
    packing: Annotated[
        Packing | None, typer.Option(help="How ciphertexts are packed; without it as the federation does, else exact.")
    ] = None,
    encrypt_rate: Annotated[
        float, typer.Option(min=1, help="Values an agent encrypts per second, for budget auto and the seconds.")
    ] = ENCRYPT_VALUES_PER_S,
    upload_rate: Annotated[float, typer.Option(min=1, help="Bytes an agent uploads per second.")] = UPLOAD_BYTES_PER_S,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Show for each agent how much it encrypts, sends and receives in a round, by the formulas of docs/method.md.

    Without options: the plan in force with its registered agents. With --ranks (and --budgets): agents to imagine, on
    the federation's model or on --model-shapes; the latter needs no profile and no running service.
    """
    if ranks is None and (budgets is not None or model_shapes is not None):
        raise typer.BadParameter("expected --ranks together with --budgets or --model-shapes", param_hint="--ranks")
    rate = HeRate(encrypt_rate, upload_rate)
    if ranks is None:
        federation, agents = perform(context, profile, json, _plan_in_force)
        found = guarded(lambda: _explain_registered(federation, agents, basis_cap, rate, packing), json)
    else:
        try:
            wanted = parse_ranks(ranks), parse_budgets(budgets or "full")
            shapes = parse_shapes(model_shapes) if model_shapes is not None else None
        except SheLoraError as error:
            raise typer.BadParameter(str(error)) from error
        cap, block, packed = basis_cap or 0, VALUES_PER_BLOCK, packing or Packing.EXACT
        if shapes is None:
            federation, _ = perform(context, profile, json, _plan_in_force)
            shapes = guarded(lambda: _shapes(federation), json)
            cap = federation.spec.basis_cap if basis_cap is None else basis_cap
            block = federation.spec.parameters.values_per_block
            packed = packing or federation.spec.packing
        chosen = shapes

        def imagine() -> Explanation:
            participants = hypothetical(chosen, *wanted, cap=cap, rate=rate, packing=packed)
            return explain(chosen, participants, cap=cap, values_per_block=block, rate=rate, packing=packed)

        found = guarded(imagine, wants_json(context, json))
    show(found, explanation_table(found), wants_json(context, json))


async def _plan_in_force(session: Session) -> tuple[Federation, list[RegisteredAgent]]:
    name = session.profile.federation
    return await session.federations.get(name), await session.federations.agents(name)


def _explain_registered(
    federation: Federation,
    agents: list[RegisteredAgent],
    basis_cap: int | None,
    rate: HeRate,
    packing: Packing | None,
) -> Explanation:
    shapes = _shapes(federation)
    cap = (
        basis_cap if basis_cap is not None else (federation.plan.cap if federation.plan else federation.spec.basis_cap)
    )
    participants = [Participant(agent.name, agent.rank, agent.budget, agent.columns) for agent in agents]
    block = federation.plan.values_per_block if federation.plan else federation.spec.parameters.values_per_block
    packed = packing or federation.spec.packing
    return explain(shapes, participants, cap=cap, values_per_block=block, rate=rate, packing=packed)


def _shapes(federation: Federation) -> ModelShapes:
    shapes = federation.plan.shapes if federation.plan else federation.shapes
    if shapes is None:
        raise InvalidPlan(
            f"federation {federation.spec.federation}: expected a plan or a registered agent, got neither",
            hint="wait for an agent, or name --model-shapes",
        )
    return shapes
