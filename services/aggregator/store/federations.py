"""Load and save whole federations; only what changed is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sqlalchemy as sa

from services.aggregator.domain import FederationSpec, Registration
from services.aggregator.store import by_key, rows, tables
from services.aggregator.store.rows import StoredFederation
from services.common.database import Connection
from shelora.errors import Unavailable, UnknownFederation
from shelora.rounds import Ballot, Federation, FederationState, Participant, PlanOutline, Round, differing

_REVISION = sa.select(tables.federations.c.revision).where(tables.federations.c.name == sa.bindparam("name"))


async def names(connection: Connection) -> list[str]:
    """All federations by name."""
    found = await connection.execute(sa.select(tables.federations.c.name).order_by(tables.federations.c.name))
    return list(found.scalars())


async def create(connection: Connection, stored: StoredFederation) -> None:
    """Insert a new federation."""
    row = {
        **rows.spec_row(stored.spec),
        **rows.state_row(stored.state),
        **rows.signature_row(stored.signature),
        "revision": stored.revision,
        "next_sequence": stored.next_sequence,
        "created_at_ms": stored.created_at_ms,
    }
    await by_key.insert(connection, tables.federations, row)
    await insert_epoch(connection, stored.spec)


async def insert_epoch(connection: Connection, spec: FederationSpec) -> None:
    """Remember the parameters of the specification's epoch."""
    row = {"federation": spec.federation, "epoch": spec.epoch, **rows.parameters_row(spec.parameters)}
    await by_key.insert(connection, tables.epochs, row)


async def revision(connection: Connection, name: str) -> int:
    """Revision of a federation.

    Raises:
        UnknownFederation: there is none of that name.
    """
    found = (await connection.execute(_REVISION, {"name": name})).scalar_one_or_none()
    if found is None:
        raise UnknownFederation(
            f"expected a federation that was created here, got {name!r}",
            hint="create it first",
            context={"federation": name},
        )
    return int(found)


async def load(connection: Connection, name: str) -> StoredFederation:
    """The whole federation.

    Raises:
        UnknownFederation: there is none of that name.
    """
    await revision(connection, name)
    row = (await by_key.select(connection, tables.federations, name=name)).one()
    parameters = {
        epoch["epoch"]: rows.read_parameters(epoch)
        for epoch in await by_key.select(connection, tables.epochs, federation=name)
    }
    spec = rows.read_spec(row, parameters)
    state = rows.read_state(row, spec)
    state = replace(
        state,
        agents=await _load_agents(connection, name),
        plan=await load_plan(connection, name, row["plan_version"]),
        round=await load_round(connection, name, row["round"]),
    )
    if state.plan is not None and state.state is FederationState.NEGOTIATING:
        state = replace(state, ballot=await _load_ballot(connection, name, state.plan.version))
    return StoredFederation(
        spec=spec,
        state=state,
        parameters=parameters,
        signature=rows.read_signature(row),
        revision=row["revision"],
        next_sequence=row["next_sequence"],
        created_at_ms=row["created_at_ms"],
    )


async def save(
    connection: Connection, before: StoredFederation, after: StoredFederation, ended: Sequence[Round] = ()
) -> None:
    """Write what changed, `ended` being rounds that the new state may no longer hold.

    Registrations are written by `save_registration` in the same transaction.

    Raises:
        Unavailable: somebody else changed the federation in between; retry.
    """
    name = before.name
    row = {
        **rows.state_row(after.state),
        **rows.signature_row(after.signature),
        "revision": after.revision,
        "next_sequence": after.next_sequence,
    }
    unchanged = {"name": name, "revision": before.revision}
    if await by_key.update(connection, tables.federations, unchanged, row) != 1:
        raise Unavailable(
            f"expected revision {before.revision} of {name}, got a newer one",
            hint="try again",
            context={"federation": name},
        )
    await _save_plan(connection, before.state, after.state)
    earlier = before.state.round
    latest = () if after.state.round is None else (after.state.round,)
    for round_ in (*ended, *latest):
        await _save_round(connection, earlier, round_, name)
        earlier = round_


async def save_registration(
    connection: Connection, agent: str, registration: Registration, *, selective: bool, now_ms: int
) -> None:
    """Write a registration, replacing an older one of the same agent."""
    key = {"federation": registration.federation, "agent": agent}
    await by_key.put(connection, tables.agents, {**key, **rows.registration_row(registration, selective, now_ms)})


async def load_plan(connection: Connection, name: str, version: int) -> PlanOutline | None:
    """One plan version, None when there is none."""
    row = (await by_key.select(connection, tables.plans, federation=name, version=version)).one_or_none()
    return None if row is None else rows.read_plan(row)


async def load_round(connection: Connection, name: str, number: int) -> Round | None:
    """One round with its members, None when there is none."""
    row = (await by_key.select(connection, tables.rounds, federation=name, number=number)).one_or_none()
    if row is None:
        return None
    found = await by_key.select(connection, tables.members, federation=name, round=number)
    return rows.read_round(row, {member["agent"]: rows.read_member(member) for member in found})


async def load_registrations(connection: Connection, name: str) -> list[rows.Row]:
    """All registrations by agent name."""
    query = sa.select(tables.agents).where(tables.agents.c.federation == name).order_by(tables.agents.c.agent)
    return list((await connection.execute(query)).mappings())


async def _load_agents(connection: Connection, name: str) -> dict[str, Participant]:
    found = await by_key.select(connection, tables.agents, federation=name)
    return {
        row["agent"]: Participant(row["agent"], row["rank"], tuple(row["columns"]), row["selective"]) for row in found
    }


async def _load_ballot(connection: Connection, name: str, version: int) -> Ballot:
    plan = (await by_key.select(connection, tables.plans, federation=name, version=version)).one()
    found = list(await by_key.select(connection, tables.ballots, federation=name, plan_version=version))
    return Ballot(
        attempt=plan["attempt"],
        invited=frozenset(row["agent"] for row in found if row["invited"]),
        received=frozenset(row["agent"] for row in found if row["received"]),
        contributors=tuple(sorted(row["agent"] for row in found if row["contributes"])),
    )


async def _save_plan(connection: Connection, before: Federation, after: Federation) -> None:
    if after.plan is None or (after.plan == before.plan and after.ballot == before.ballot):
        return
    key = {"federation": after.name, "version": after.plan.version}
    values = rows.plan_row(after.plan, 0 if after.ballot is None else after.ballot.attempt)
    if before.plan is None or before.plan.version != after.plan.version:
        await by_key.insert(connection, tables.plans, {**key, **values, "swept": False})
    else:
        await by_key.update(connection, tables.plans, key, values)
    if after.ballot is not None:
        same = before.plan is not None and before.plan.version == after.plan.version
        contributors = frozenset(after.ballot.contributors)
        for agent in _changed(before.ballot if same else None, after.ballot):
            row = {
                "federation": after.name,
                "plan_version": after.plan.version,
                "agent": agent,
                "invited": agent in after.ballot.invited,
                "received": agent in after.ballot.received,
                "contributes": agent in contributors,
            }
            await by_key.put(connection, tables.ballots, row)


def _changed(before: Ballot | None, after: Ballot) -> list[str]:
    """Agents of a ballot that are in it in another way than before."""
    if before is None:
        return sorted(after.invited | after.received)
    contributors = set(before.contributors) ^ set(after.contributors)
    return sorted((before.invited ^ after.invited) | (before.received ^ after.received) | contributors)


async def _save_round(connection: Connection, before: Round | None, after: Round, name: str) -> None:
    if after == before:
        return
    key = {"federation": name, "number": after.number}
    known = before is not None and before.number == after.number
    if not known:
        await by_key.insert(connection, tables.rounds, {**key, **rows.round_row(after), "swept": False})
    else:
        await by_key.update(connection, tables.rounds, key, rows.round_row(after))
    earlier = before.members if known and before is not None else {}
    for agent in differing(earlier, after.members):
        member_key = {"federation": name, "round": after.number, "agent": agent}
        await by_key.put(connection, tables.members, {**member_key, **rows.member_row(after.members[agent])})
