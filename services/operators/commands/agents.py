"""`shelora agents`: list, token, revoke."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from services.common.enrolment import Enrolment
from services.common.files import check_writable
from services.common.identity import Role
from services.common.keymanager_client import FetchedEpoch
from services.operators.commands.frame import JsonOption, ProfileOption, make_group, perform, show, wants_json
from services.operators.commands.keys import Adoption, adopt_epoch, adoption_line
from services.operators.render import agents_table, at
from services.operators.session import Session

app = make_group("agents", "The members of the federation: who takes part, who may join, who may no longer.")


class MemberRole(str, Enum):
    """Roles that a token can be made for."""

    AGENT = "agent"
    AGGREGATOR = "aggregator"
    OPERATOR = "operator"


@app.command("list")
def list_agents(context: typer.Context, profile: ProfileOption = None, json: JsonOption = False) -> None:
    """List the registered agents."""
    found = perform(context, profile, json, lambda session: session.federations.agents(session.profile.federation))
    show(found, agents_table(found), wants_json(context, json))


@app.command()
def token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the new member, for example agent-7.")],
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="Enrolment file to write, mode 0600.")],
    role: Annotated[MemberRole, typer.Option(help="What the member will be.")] = MemberRole.AGENT,
    ttl_s: Annotated[int, typer.Option("--ttl", min=60, max=2_592_000, help="Validity in seconds.")] = 86_400,
    server_name: Annotated[
        list[str] | None, typer.Option(help="DNS name or IP address of an aggregator; may be repeated.")
    ] = None,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Write an enrolment file with a one-time token; whoever holds it can become that member."""

    async def action(session: Session) -> tuple[Enrolment, int]:
        check_writable(file, "enrolment file")
        enrolment, expires_at_ms = await session.issue(Role(role.value), name, ttl_s, tuple(server_name or ()))
        enrolment.save(file)
        return enrolment, expires_at_ms

    enrolment, expires_at_ms = perform(context, profile, json, action)
    value = {"identity": enrolment.identity.uri, "file": str(file), "expires_at_ms": expires_at_ms}
    line = Text(f"{enrolment.identity.uri}: enrolment file {file}, valid until {at(expires_at_ms)}")
    show(value, line, wants_json(context, json))


@app.command()
def revoke(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the member.")],
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")],
    role: Annotated[MemberRole, typer.Option(help="Its role.")] = MemberRole.AGENT,
    adopt: Annotated[
        bool, typer.Option("--adopt/--no-adopt", help="Move the federation to the new key epoch as well.")
    ] = True,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Shut a member out for good and rotate the key epoch."""

    async def action(session: Session) -> tuple[FetchedEpoch, Adoption]:
        epoch = await session.keys.revoke(Role(role.value), name, reason)
        return epoch, await adopt_epoch(session, epoch, adopt)

    epoch, adoption = perform(context, profile, json, action)
    value = {"revoked": name, "epoch": epoch.number, "adoption": adoption}
    line = Text(f"{name} is revoked; new key epoch {epoch.number}{adoption_line(adoption)}")
    show(value, line, wants_json(context, json))
