"""`shelora-keymanager`: set up and run a federation's key manager; commands for its own host."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from services.common.audit import AuditRecord
from services.common.clock import SystemClock
from services.common.config import load_config
from services.common.enrolment import Enrolment
from services.common.files import check_writable
from services.common.grpc_errors import translate
from services.common.identity import Identity, Role
from services.common.lifecycle import run_until_signalled
from services.common.logs import configure_logs
from services.keymanager.config import KeyManagerConfig
from services.keymanager.domain import Epoch
from services.keymanager.host import initialise, opened
from services.keymanager.host import serve as serve_until
from services.keymanager.service import KeyManager
from shelora.errors import SheLoraError, Unavailable

EXIT_REFUSED: Final = 1
EXIT_UNREACHABLE: Final = 3
_PIPE_WIDTH_CHARACTERS: Final = 200

app = typer.Typer(
    name="shelora-keymanager",
    help="Key manager: certificate authority, key epochs, audit log. The commands other than serve work on the state "
    "directly, also while it serves. Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 database busy.",
    no_args_is_help=True,
    add_completion=False,
)
T = TypeVar("T")

ConfigOption = Annotated[Path, typer.Option("--config", metavar="FILE", help="The key manager's configuration file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RoleOption = Annotated[Role, typer.Option(help="agent, aggregator or operator.")]
NameOption = Annotated[str, typer.Option(help="Name inside the role, for example agent-1.")]
ReasonOption = Annotated[str, typer.Option(help="Why, for the audit log.")]


@app.command()
def init(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Make what is missing: key-encryption key, database, certificate authority, first epoch. Safe to repeat."""

    async def run(loaded: KeyManagerConfig) -> int:
        return await initialise(loaded, SystemClock())

    loaded, epoch = _run(config, run)
    fields = {"federation": loaded.federation, "epoch": epoch, "database": str(loaded.database_path)}
    _show(fields, f"key manager of {loaded.federation} is set up; current epoch {epoch}", as_json)


@app.command()
def serve(
    config: ConfigOption,
    ready_file: Annotated[Path | None, typer.Option(help="Written once all ports serve.")] = None,
) -> None:
    """Serve until SIGTERM."""

    def run() -> None:
        loaded = load_config(KeyManagerConfig, config)
        configure_logs("keymanager", level=loaded.log_level)
        run_until_signalled(lambda stop: serve_until(loaded, SystemClock(), stop, ready_file))

    _guarded(run)


@app.command()
def token(
    config: ConfigOption,
    role: RoleOption,
    name: NameOption,
    out: Annotated[
        Path | None, typer.Option(help="Enrolment file to write (mode 0600); without it, printed as JSON.")
    ] = None,
    server_name: Annotated[
        list[str] | None, typer.Option(help="DNS name or IP address of an aggregator; may be repeated.")
    ] = None,
    ttl: Annotated[int, typer.Option(help="Validity in seconds, 60 to 2,592,000.")] = 86_400,
) -> None:
    """Make a one-time enrolment token and the enrolment file around it."""

    async def make(keymanager: KeyManager, loaded: KeyManagerConfig) -> Enrolment:
        if out is not None:
            check_writable(out, "enrolment file")
        made = await keymanager.create_token(None, role, name, ttl, tuple(server_name or ()))
        return Enrolment.around(made, Identity(loaded.federation, role, name))

    enrolment = _act(config, make)
    if out is None:
        _console().out(json.dumps({**asdict(enrolment), "role": role.value}, sort_keys=True), highlight=False)
        return
    _guarded(lambda: enrolment.save(out))
    _console().print(f"enrolment file for {enrolment.identity.uri} in {out}; it works once, keep it secret")


@app.command()
def epochs(config: ConfigOption, as_json: JsonOption = False) -> None:
    """List the key epochs, newest first."""
    found = _act(config, lambda keymanager, _: keymanager.list_epochs(None))
    table = Table("epoch", "state", "made", "parameters")
    for epoch in found:
        table.add_row(
            str(epoch.number), epoch.state.value, _when(epoch.created_at_ms), epoch.parameters.digest().hex()[:16]
        )
    _show([_epoch_fields(epoch) for epoch in found], table, as_json)


@app.command()
def rotate(config: ConfigOption, reason: ReasonOption, as_json: JsonOption = False) -> None:
    """Make a new epoch with new keys and a new seed; the one before stays readable until it is retired."""
    epoch = _act(config, lambda keymanager, _: keymanager.rotate_epoch(None, reason))
    _show(_epoch_fields(epoch), f"epoch {epoch.number} is current", as_json)


@app.command()
def retire(
    config: ConfigOption,
    epoch: Annotated[int, typer.Argument(help="Number of a superseded epoch.")],
    as_json: JsonOption = False,
) -> None:
    """Destroy the secrets of an old epoch for good."""
    retired = _act(config, lambda keymanager, _: keymanager.retire_epoch(None, epoch))
    _show(_epoch_fields(retired), f"epoch {retired.number} is retired, its secrets are destroyed", as_json)


@app.command()
def revoke(
    config: ConfigOption, role: RoleOption, name: NameOption, reason: ReasonOption, as_json: JsonOption = False
) -> None:
    """Bar an identity for good and rotate the epoch."""
    epoch = _act(config, lambda keymanager, _: keymanager.revoke(None, role, name, reason))
    _show(_epoch_fields(epoch), f"{role.value} {name} is revoked; it never sees epoch {epoch.number}", as_json)


@app.command()
def revocations(config: ConfigOption, as_json: JsonOption = False) -> None:
    """List revoked identities, oldest first."""
    found = _act(config, lambda keymanager, _: keymanager.revocations(None))
    table = Table("identity", "revoked", "epoch")
    for revocation in found:
        table.add_row(revocation.identity.uri, _when(revocation.at_ms), str(revocation.epoch))
    fields = [{"identity": one.identity.uri, "at_ms": one.at_ms, "epoch": one.epoch} for one in found]
    _show(fields, table, as_json)


@app.command()
def audit(
    config: ConfigOption,
    verify: Annotated[bool, typer.Option("--verify", help="Check the whole log instead of showing it.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only records after this sequence number.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most this many.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Show the audit log, oldest first, or check it: no record changed, removed, cut off or put in."""
    if verify:
        count = _act(config, lambda keymanager, _: keymanager.verify_audit())
        _show({"intact": True, "records": count}, f"the audit log is intact: {count} records", as_json)
        return
    records = _act(config, lambda keymanager, _: keymanager.audit_records(None, after, limit))
    table = Table("#", "when", "who", "what", "on", "outcome")
    for record in records:
        outcome = Text(record.outcome, style="" if record.outcome == "granted" else "red")
        row = (str(record.sequence), _when(record.at_ms), record.actor, record.action, record.subject)
        table.add_row(*(Text(cell) for cell in row), outcome)
    _show([_record_fields(record) for record in records], table, as_json)


@app.command()
def reseal(config: ConfigOption, as_json: JsonOption = False) -> None:
    """Encrypt everything stored under the first key-encryption key; afterwards the other keys can go."""
    count = _act(config, lambda keymanager, _: keymanager.reseal())
    _show({"epochs_changed": count}, f"sealed under the first key: authority, audit log, {count} epochs", as_json)


def main() -> None:
    """Entry point of `shelora-keymanager`."""
    app()


def _act(config: Path, action: Callable[[KeyManager, KeyManagerConfig], Awaitable[T]]) -> T:
    """Open the state, act, close."""

    async def run(loaded: KeyManagerConfig) -> T:
        async with opened(loaded, SystemClock()) as keymanager:
            return await action(keymanager, loaded)

    return _run(config, run)[1]


def _run(config: Path, action: Callable[[KeyManagerConfig], Coroutine[Any, Any, T]]) -> tuple[KeyManagerConfig, T]:
    def run() -> tuple[KeyManagerConfig, T]:
        configure_logs("keymanager", level="error")
        loaded = load_config(KeyManagerConfig, config)
        return loaded, asyncio.run(action(loaded))

    return _guarded(run)


def _guarded(work: Callable[[], T]) -> T:
    """Run; errors of the tree become one clear line on standard error and an exit code."""
    try:
        return work()
    except Exception as error:
        known = translate(error)
        if known is None:
            raise
        _show_error(known)
        raise typer.Exit(EXIT_UNREACHABLE if isinstance(known, Unavailable) else EXIT_REFUSED) from error


def _show_error(error: SheLoraError) -> None:
    console = Console(stderr=True, soft_wrap=True)
    console.print(Text.assemble((error.code, "bold red"), f": {error.message}"))
    if error.hint:
        console.print(Text(f"  what to do: {error.hint}"))


def _show(fields: Any, rendered: Any, as_json: bool) -> None:
    if as_json:
        _console().out(json.dumps(fields, sort_keys=True), highlight=False)
    else:
        _console().print(rendered)


def _console() -> Console:
    """Standard output; wide when it is no terminal, so that nothing is cut in a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=_PIPE_WIDTH_CHARACTERS)


def _epoch_fields(epoch: Epoch) -> dict[str, Any]:
    return {
        "number": epoch.number,
        "state": epoch.state.value,
        "created_at_ms": epoch.created_at_ms,
        "parameters_digest": epoch.parameters.digest().hex(),
    }


def _record_fields(record: AuditRecord) -> dict[str, Any]:
    return {**asdict(record), "digest": record.digest.hex()}


def _when(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")


if __name__ == "__main__":
    main()
