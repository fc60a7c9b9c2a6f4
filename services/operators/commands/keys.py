"""`shelora keys`: epochs, rotate, retire, audit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.text import Text

from services.common.keymanager_client import FetchedEpoch
from services.operators.commands.frame import JsonOption, ProfileOption, make_group, perform, show, wants_json
from services.operators.render import audit_table, epochs_table
from services.operators.session import Session
from shelora.errors import FederationEnded, SheLoraError, Unavailable, UnknownFederation

app = make_group("keys", "Key epochs and the audit log of the key manager.")


@dataclass(frozen=True)
class Adoption:
    """Whether the federation moves to an epoch at its next round boundary, or why not."""

    adopted: bool
    reason: str = ""


async def adopt_epoch(session: Session, epoch: FetchedEpoch, wanted: bool) -> Adoption:
    """Move the federation to an epoch that was just made.

    Raises:
        SheLoraError: the aggregator refused or cannot be reached; the epoch exists all the same, and the text says so.
    """
    if not wanted:
        return Adoption(False, "not asked for")
    try:
        await session.federations.adopt(session.profile.federation, epoch.number, epoch.parameters)
    except (UnknownFederation, FederationEnded) as error:
        return Adoption(False, error.message)
    except SheLoraError as error:
        done = f"key epoch {epoch.number} was made, but the federation still uses the old one"
        hint = "then run: shelora federation adopt"
        cls = type(error) if isinstance(error, Unavailable) else SheLoraError
        raise cls(f"{done}: {error.message}", hint=f"{error.hint}; {hint}" if error.hint else hint) from error
    return Adoption(True)


def adoption_line(adoption: Adoption) -> str:
    """The end of a sentence about a new epoch."""
    if adoption.adopted:
        return ", used from the next round on"
    return f"; the federation does not use it ({adoption.reason})"


@app.command()
def epochs(context: typer.Context, profile: ProfileOption = None, json: JsonOption = False) -> None:
    """List the key epochs, newest first."""
    found = perform(context, profile, json, lambda session: session.keys.list_epochs())
    show(found, epochs_table(found), wants_json(context, json))


@app.command()
def rotate(
    context: typer.Context,
    reason: Annotated[str, typer.Option(help="Why, for the audit log.")] = "rotated by an operator",
    adopt: Annotated[
        bool, typer.Option("--adopt/--no-adopt", help="Move the federation to the new key epoch as well.")
    ] = True,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Make a new key epoch with new keys and a new seed."""

    async def action(session: Session) -> tuple[FetchedEpoch, Adoption]:
        epoch = await session.keys.rotate_epoch(reason)
        return epoch, await adopt_epoch(session, epoch, adopt)

    epoch, adoption = perform(context, profile, json, action)
    line = Text(f"new key epoch {epoch.number}{adoption_line(adoption)}")
    show({"epoch": epoch, "adoption": adoption}, line, wants_json(context, json))


@app.command()
def retire(
    context: typer.Context,
    number: Annotated[int, typer.Argument(min=1, help="A superseded epoch.")],
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Destroy the secrets of a superseded epoch: what was encrypted under it can never be opened again."""
    retired = perform(context, profile, json, lambda session: session.keys.retire_epoch(number))
    show(retired, epochs_table([retired]), wants_json(context, json))


@app.command()
def audit(
    context: typer.Context,
    after: Annotated[int, typer.Option(min=0, help="Records with a greater number only.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most this many.")] = 100,
    profile: ProfileOption = None,
    json: JsonOption = False,
) -> None:
    """Read the audit log, oldest first."""
    found = perform(context, profile, json, lambda session: session.keys.audit(after, limit))
    show(found, audit_table(found), wants_json(context, json))
