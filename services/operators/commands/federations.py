"""`shelora federation`: create, start, status, stop, adopt, list, rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from services.common.clock import SystemClock
from services.operators.commands.frame import (
    EXIT_STOPPED,
    JsonOption,
    ProfileOption,
    make_group,
    out,
    perform,
    show,
    wants_json,
)
from services.operators.domain import Federation, FederationSpec, RegisteredAgent
from services.operators.planning import Preflight, check_terms, preflight, terms_of, unsafe_registered
from services.operators.render import (
    agents_table,
    as_json,
    federation_table,
    federations_table,
    names,
    plain,
    round_line,
    round_members_table,
    rounds_table,
)
from services.operators.session import Session
from shelora.errors import Unavailable
from shelora.plan import Negotiation, Packing
from shelora.rounds.phases import FederationState

app = make_group("federation", "Create, start, watch and stop the federation of the profile.")
_LOOK_AGAIN_S = 0.5
_ENDED = (FederationState.FINISHED, FederationState.STOPPED)


class NegotiationChoice(str, Enum):
    """How the encrypted columns are agreed."""

    AUTO = "auto"
    NONE = "none"
    ENCRYPTED = "encrypted"
    OPE = "ope"


Look = tuple[Federation, list[RegisteredAgent]]
Timeout = Annotated[int, typer.Option(min=1, max=2_592_000)]


@app.command()
def create(
    context: typer.Context,
    rounds: Annotated[int, typer.Option(min=1, max=10_000, help="Rounds to run.")],
    agents: Annotated[int, typer.Option(min=2, max=100_000, help="Agents whose factors close a cohort at once.")],
    quorum: Annotated[int, typer.Option(min=2, max=100_000, help="Fewest agents for a valid average.")] = 2,
    negotiation: Annotated[
        NegotiationChoice, typer.Option(help="How the encrypted columns are agreed; auto leaves it to the aggregator.")
    ] = NegotiationChoice.AUTO,
    renegotiate_every: Annotated[int, typer.Option(min=0, help="Rounds between negotiations; 0: never again.")] = 0,
    basis_cap: Annotated[
        int, typer.Option(min=0, max=4096, help="Most basis rows per module; 0: 4 x the largest rank.")
    ] = 0,
    packing: Annotated[
        Packing, typer.Option(help="dense: half the ciphertext bytes, an error of about 1e-4; up to 4,096 agents.")
    ] = Packing.EXACT,
    epoch: Annotated[int, typer.Option(min=0, help="Key epoch; 0: the current one.")] = 0,
    gather_timeout_s: Timeout = 600,
    negotiate_timeout_s: Timeout = 600,
    train_timeout_s: Timeout = 3600,
    cipher_timeout_s: Timeout = 600,
    max_abandoned: Annotated[int, typer.Option(min=0, max=100, help="Abandoned rounds in a row; 0: 3.")] = 0,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Create the federation with the HE parameters of a key epoch. The same options again change nothing."""
    if quorum > agents:
        raise typer.BadParameter(f"expected at most --agents {agents}, got {quorum}", param_hint="--quorum")

    async def action(session: Session) -> Federation:
        found = await session.epoch(epoch)
        spec = FederationSpec(
            federation=session.profile.federation,
            rounds=rounds,
            target_agents=agents,
            quorum=quorum,
            epoch=found.number,
            parameters=found.parameters,
            negotiation=None if negotiation is NegotiationChoice.AUTO else Negotiation(negotiation.value),
            renegotiate_every=renegotiate_every,
            gather_timeout_s=gather_timeout_s,
            negotiate_timeout_s=negotiate_timeout_s,
            train_timeout_s=train_timeout_s,
            cipher_timeout_s=cipher_timeout_s,
            basis_cap=basis_cap,
            max_abandoned=max_abandoned,
            packing=packing,
        )
        check_terms(terms_of(spec), agents)
        return await session.federations.create(spec)

    made = perform(context, profile, json, action)
    show(made, federation_table(made), wants_json(context, json))


@app.command()
def start(
    context: typer.Context,
    more_rounds: Annotated[
        int, typer.Option(min=0, max=10_000, help="Rounds to add after it finished; 0 keeps the number.")
    ] = 0,
    wait_s: Annotated[
        int, typer.Option(min=0, max=2_592_000, help="Seconds to wait until all agents have registered.")
    ] = 0,
    allow_unsafe: Annotated[
        bool, typer.Option("--allow-unsafe", help="Start although settings are unsafe, as plan explain tells.")
    ] = False,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Start the federation; start it again after it was stopped, or with more rounds after it finished.

    Before, the plan of the agents that have registered is checked as plan explain does it: what cannot work is refused,
    what is unsafe as well unless it is allowed. Agents that register later are not part of the check; status names
    those of them that are unsafe.
    """

    async def action(session: Session) -> tuple[Preflight, Federation]:
        checked = preflight(*await _gathered(session, wait_s), allow_unsafe=allow_unsafe)
        return checked, await session.federations.start(session.profile.federation, more_rounds)

    checked, started = perform(context, profile, json, action)
    value = plain(started) | {"preflight": plain(checked) | {"summary": checked.summary}}
    show(value, Group(Text(checked.summary), federation_table(started)), wants_json(context, json))


@app.command()
def status(
    context: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it until it is over.")] = False,
    interval_s: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between looks with --watch.")] = 1.0,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Show state, plan, running round, agents and whose settings are unsafe. Exit code 4 when it was stopped."""
    as_lines = wants_json(context, json)
    if watch:
        final = perform(context, profile, json, lambda session: _watch(session, interval_s, as_lines))
    else:
        final, agents = perform(context, profile, json, _look)
        value = {"federation": final, "agents": agents, "unsafe": unsafe_registered(final, agents)}
        show(value, _status(final, agents), as_lines)
    if final.state is FederationState.STOPPED:
        raise typer.Exit(EXIT_STOPPED)


@app.command()
def stop(
    context: typer.Context,
    reason: Annotated[str, typer.Option(help="Told to the agents.")] = "stopped by its operator",
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Stop the federation; agents are told to leave."""
    stopped = perform(
        context, profile, json, lambda session: session.federations.stop(session.profile.federation, reason)
    )
    show(stopped, federation_table(stopped), wants_json(context, json))


@app.command()
def adopt(
    context: typer.Context,
    epoch: Annotated[int, typer.Option(min=0, help="Key epoch; 0: the current one.")] = 0,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Move the federation to another key epoch at the next round boundary."""

    async def action(session: Session) -> Federation:
        found = await session.epoch(epoch)
        return await session.federations.adopt(session.profile.federation, found.number, found.parameters)

    moved = perform(context, profile, json, action)
    show(moved, federation_table(moved), wants_json(context, json))


@app.command("list")
def list_federations(context: typer.Context, profile: ProfileOption = None, json: JsonOption = False) -> None:
    """List the federations of the aggregator."""
    found = perform(context, profile, json, lambda session: session.federations.list_all())
    show(found, federations_table(found), wants_json(context, json))


@app.command()
def rounds(
    context: typer.Context,
    number: Annotated[int, typer.Option("--round", min=0, help="Show the members of one round; 0: all rounds.")] = 0,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """List the rounds so far, or one round's members with the figures they reported."""
    found = perform(context, profile, json, lambda session: session.federations.rounds(session.profile.federation))
    if not number:
        show(found, rounds_table(found), wants_json(context, json))
        return
    chosen = next((one for one in found if one.number == number), None)
    if chosen is None:
        raise typer.BadParameter(f"expected one of the {len(found)} rounds so far, got {number}", param_hint="--round")
    show(chosen, round_members_table(chosen), wants_json(context, json))


async def _gathered(session: Session, wait_s: int) -> Look:
    """The federation once all its agents have registered, or as it is after so many seconds."""
    clock = SystemClock()
    until_s = clock.monotonic_s() + wait_s
    while True:
        look = await _look(session)
        if len(look[1]) >= look[0].spec.target_agents or clock.monotonic_s() >= until_s:
            return look
        await clock.sleep(_LOOK_AGAIN_S)


async def _look(session: Session) -> Look:
    name = session.profile.federation
    return await session.federations.get(name), await session.federations.agents(name)


def _status(federation: Federation, agents: Sequence[RegisteredAgent]) -> RenderableType:
    parts: list[RenderableType] = [federation_table(federation)]
    if agents:
        parts.append(agents_table(agents))
    if unsafe := unsafe_registered(federation, agents):
        parts.append(Text(f"unsafe settings: {names(unsafe)}; see shelora plan explain", style="red"))
    return Group(*parts)


async def _watch(session: Session, interval_s: float, as_lines: bool) -> Federation:
    """Follow a federation to its end; an aggregator that is away for a while only shows as such."""
    console = out()
    if as_lines or not console.is_terminal:
        return await _print_changes(session, interval_s, console, as_lines)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            seen = await _try_to_look(session)
            if isinstance(seen, Unavailable):
                live.update(Text(f"aggregator away, trying again: {seen.message}", style="yellow"), refresh=True)
            else:
                live.update(_status(*seen), refresh=True)
                if seen[0].state in _ENDED:
                    return seen[0]
            await asyncio.sleep(interval_s)


async def _print_changes(session: Session, interval_s: float, console: Console, as_lines: bool) -> Federation:
    last = ""
    while True:
        seen = await _try_to_look(session)
        if isinstance(seen, Unavailable):
            line = as_json({"unavailable": seen.message}, indent=None) if as_lines else f"away: {seen.message}"
        else:
            value = {"federation": seen[0], "agents": seen[1]}
            line = as_json(value, indent=None) if as_lines else _line(seen[0])
        if line != last:
            console.out(line, highlight=False)
            last = line
        if not isinstance(seen, Unavailable) and seen[0].state in _ENDED:
            return seen[0]
        await asyncio.sleep(interval_s)


async def _try_to_look(session: Session) -> Look | Unavailable:
    try:
        return await _look(session)
    except Unavailable as error:
        return error


def _line(federation: Federation) -> str:
    where = f", round {round_line(federation.round)}" if federation.round else ""
    return f"{federation.spec.federation}: {federation.state.value}{where}"
