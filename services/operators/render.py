"""How values look on a terminal (rich tables) and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from services.common.audit import AuditRecord
from services.common.keymanager_client import FetchedEpoch
from services.operators.domain import Event, Federation, Member, RegisteredAgent, Round
from services.operators.sheet import Sheet
from shelora.rounds.phases import FederationState, RoundPhase

_MEGABYTE: Final = 1e6
_NONE: Final = "-"
_STATE_STYLES: Final[Mapping[FederationState, str]] = {
    FederationState.RUNNING: "green",
    FederationState.FINISHED: "bold green",
    FederationState.STOPPED: "bold red",
}


def plain(value: Any) -> Any:
    """A value as JSON knows it: dataclasses become objects, bytes hexadecimal text, enums their value."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.repr}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes | bytearray):
        return value.hex()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(member) for member in value]
    return value


def as_json(value: Any, *, indent: int | None = 2) -> str:
    """A value as JSON text; secrets of its fields (repr=False) are left out."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def federations_table(federations: Sequence[Federation]) -> Sheet:
    """One line a federation."""
    table = Sheet("federation", "state", "round", "agents", "plan", "epoch", "created")
    for federation in federations:
        table.add(
            federation.spec.federation,
            _state(federation),
            f"{federation.last_published_round} of {federation.spec.rounds}",
            f"{federation.agents} of {federation.spec.target_agents}",
            f"v{federation.plan.version}" if federation.plan else _NONE,
            str(federation.plan.epoch if federation.plan else federation.spec.epoch),
            at(federation.created_at_ms),
        )
    return table


def federation_table(federation: Federation) -> Table:
    """One federation at a glance."""
    spec = federation.spec
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    _add(table, "federation", spec.federation)
    _add(table, "state", _state(federation))
    _add(table, "published", f"{federation.last_published_round} of {spec.rounds} rounds")
    _add(table, "agents", f"{federation.agents} registered, target {spec.target_agents}, quorum {spec.quorum}")
    if federation.round is not None:
        _add(table, "round", round_line(federation.round))
    if federation.plan is not None:
        plan = federation.plan
        dense = sum(tensor.size for tensor in plan.shapes.dense)
        _add(
            table,
            "plan",
            f"version {plan.version}, epoch {plan.epoch}, negotiation {plan.negotiation.value}, basis cap {plan.cap}, "
            f"{plan.packing.value} packing, "
            f"{len(plan.shapes.modules)} modules, {dense:,} dense values",
        )
    return table


def round_line(found: Round) -> str:
    """One round in one line."""
    phase = found.phase.value if found.phase else _NONE
    line = f"{found.number}, {phase}, {found.size} members, {found.complete} ciphertexts"
    return line + (f" ({found.reason})" if found.reason else "")


def agents_table(agents: Sequence[RegisteredAgent]) -> Sheet:
    """One line an agent."""
    table = Sheet("agent", "rank>", "budget", "columns>", "examples>", "task", "seen", "connected", "version")
    for agent in agents:
        table.add(
            agent.name,
            str(agent.rank),
            agent.budget,
            column_range(agent.columns),
            f"{agent.examples:,}",
            agent.task.value if agent.task else _NONE,
            at(agent.last_seen_ms),
            "yes" if agent.connected else "no",
            agent.version,
        )
    return table


def rounds_table(rounds: Sequence[Round]) -> Sheet:
    """One line a round."""
    table = Sheet("round>", "phase", "plan", "cohort", "counted", "seconds>", "plain MB>", "cipher MB>", "reason")
    for found in rounds:
        table.add(
            str(found.number),
            found.phase.value if found.phase else _NONE,
            f"v{found.plan_version}",
            names([member.agent for member in found.members]),
            names(found.counted),
            f"{(found.ended_at_ms - found.started_at_ms) / 1000:.1f}" if found.ended_at_ms else _NONE,
            megabytes(found.average_bytes),
            megabytes(found.cipher_bytes),
            found.reason,
        )
    return table


def round_members_table(found: Round) -> Sheet:
    """One line a member of one round, with the figures it reported."""
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in found.phase_seconds.items())
    counted = f"{len(found.counted)} of {len(found.members)} counted"
    phase = "" if found.phase in (RoundPhase.PUBLISHED, None) else f" [{found.phase.value}]"
    table = Sheet(
        "agent", "rank>", "examples>", "accuracy>", "train s>", "encrypt s>", "transfer s>", "decrypt s>", "apply s>",
        "HE s>", "up MB>", "cipher up MB>", "down MB>", "cipher down MB>",
        title=f"round {found.number}{phase}: {counted}" + (f" | {phases}" if phases else ""),
    )  # fmt: skip
    for member in found.members:
        table.add(*_member_cells(member))
    return table


def _member_cells(member: Member) -> list[str]:
    figures = member.metrics
    transfer = [
        figures[name]
        for name in ("seconds_factors_upload", "seconds_cipher_upload", "seconds_download")
        if name in figures
    ]
    he = figures.get("he_seconds")
    if not member.counted:
        name = f"{member.agent} (left out{': ' + member.left_reason if member.left_reason else ''})"
    else:
        name = member.agent
    return [
        name,
        str(member.rank),
        f"{member.examples:,}",
        accuracy_change(figures),
        seconds(figures.get("seconds_train")),
        seconds(figures.get("seconds_encrypt")),
        seconds(sum(transfer) if transfer else None),
        seconds(figures.get("seconds_he_decrypt", figures.get("seconds_decrypt"))),
        seconds(figures.get("seconds_apply", figures.get("seconds_reparameterize"))),
        f"{he:.3f}" if he is not None else _NONE,
        megabytes(figures.get("bytes_up", member.factors_bytes + member.cipher_bytes)),
        megabytes(member.cipher_bytes),
        megabytes(figures.get("bytes_down")),
        megabytes(figures.get("cipher_bytes_down")),
    ]


def epochs_table(epochs: Sequence[FetchedEpoch]) -> Sheet:
    """One line a key epoch."""
    table = Sheet("epoch>", "state", "ring>", "modulus bits>", "scale bits>", "parameters", "made")
    for epoch in epochs:
        parameters = epoch.parameters
        table.add(
            str(epoch.number),
            epoch.state,
            str(parameters.ring_dimension),
            str(parameters.modulus.bit_length()),
            str(parameters.scale_bits),
            parameters.digest().hex()[:16],
            at(epoch.created_at_ms),
        )
    return table


def audit_table(records: Sequence[AuditRecord]) -> Sheet:
    """One line an audit record."""
    table = Sheet("#>", "when", "who", "action", "on", "outcome")
    for record in records:
        table.add(str(record.sequence), at(record.at_ms), record.actor, record.action, record.subject, record.outcome)
    return table


def event_line(event: Event) -> str:
    """One event in one line."""
    where = f"round {event.round} " if event.round else ""
    return f"{at(event.at_ms)} {where}{event.kind}" + "".join(
        f" {text}" for text in (event.agent, event.detail) if text
    )


def at(moment_ms: int) -> str:
    """A time of day in UTC, or "-" for never."""
    if not moment_ms:
        return _NONE
    return datetime.fromtimestamp(moment_ms / 1000, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")


def megabytes(count: float | None) -> str:
    """Bytes in units of 10^6."""
    return _NONE if count is None else f"{count / _MEGABYTE:.2f}"


def seconds(duration: float | None) -> str:
    """A duration in seconds."""
    return _NONE if duration is None else f"{duration:.1f}"


def accuracy_change(figures: Mapping[str, float]) -> str:
    """Accuracy before and after a round, in percent."""
    before, after = figures.get("accuracy_before"), figures.get("accuracy_after")
    return f"{percent(before)} -> {percent(after)}"


def percent(share: float | None) -> str:
    """A share in percent with one decimal."""
    return _NONE if share is None else f"{share:.1%}"


def column_range(columns: Sequence[int]) -> str:
    """Encrypted columns of all modules: one number, or smallest to largest."""
    if not columns:
        return _NONE
    low, high = min(columns), max(columns)
    return str(low) if low == high else f"{low}..{high}"


def names(found: Sequence[str], most: int = 6) -> str:
    """Some names, and how many more."""
    shown = ", ".join(found[:most])
    return shown + (f" and {len(found) - most} more" if len(found) > most else "") or _NONE


def _add(table: Table, *cells: str | Text) -> None:
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _state(federation: Federation) -> Text:
    text = Text(federation.state.value, style=_STATE_STYLES.get(federation.state, ""))
    return text.append(f" ({federation.reason})", style="") if federation.reason else text
