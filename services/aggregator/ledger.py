"""The one place where events become stored state.

A change is one transaction: load, let the body decide and emit events, save what differs, append the history. It is
acknowledged when the transaction is committed, and only then do others hear of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

from services.aggregator import store
from services.aggregator.domain import Event
from services.aggregator.events import ANY, Hub
from services.aggregator.store import Connection, StoredFederation
from services.common.clock import Clock
from services.common.database import Database
from shelora.rounds import Event as MachineEvent
from shelora.rounds import Record, Round, RoundEnded, concerned, transition

Result = TypeVar("Result")

DETAIL_BYTES: Final = 500
"""Longest detail of an event, as the wire contract has it."""


class Change:
    """One federation inside one transaction.

    Attributes:
        connection: for further queries in the same transaction.
        before: the federation as it was loaded.
        stored: the federation as it is by now.
        now_ms: one time for everything that happens in this change.
    """

    def __init__(self, connection: Connection, before: StoredFederation, now_ms: int) -> None:
        self.connection = connection
        self.before = before
        self.stored = before
        self.now_ms = now_ms
        self._records: list[Record] = []
        self._ended: list[Round] = []

    def emit(self, event: MachineEvent) -> None:
        """Apply an event to the state machine.

        Raises:
            SheLoraError: the event is not welcome; nothing has changed.
        """
        state, effects = transition(self.stored.state, event, self.now_ms)
        self.stored = replace(self.stored, state=state)
        self._records += [effect for effect in effects if isinstance(effect, Record)]
        self._ended += [effect.round for effect in effects if isinstance(effect, RoundEnded)]

    def set(self, **fields: Any) -> None:
        """Replace fields of the stored federation that the state machine does not know."""
        self.stored = replace(self.stored, **fields)

    @property
    def changed(self) -> bool:
        """Whether there is something to save."""
        return self.stored != self.before

    async def save(self) -> None:
        """Write the difference and the history."""
        first = self.before.next_sequence
        history = [
            Event(first + index, self.now_ms, record.kind, record.round, record.agent, _shortened(record.detail))
            for index, record in enumerate(self._records)
        ]
        self.set(revision=self.before.revision + 1, next_sequence=first + len(history))
        await store.federations.save(self.connection, self.before, self.stored, self._ended)
        await store.history.append_events(self.connection, self.before.name, history)


class Ledger:
    """Reads and changes federations.

    Args:
        database: where they are stored.
        clock: tells the time of every change.
        hub: is told about every change.
    """

    def __init__(self, database: Database, clock: Clock, hub: Hub) -> None:
        self._database = database
        self._clock = clock
        self._hub = hub
        self._latest: dict[str, StoredFederation] = {}

    async def change(self, label: str, name: str, body: Callable[[Change], Awaitable[Result]]) -> Result:
        """Run a body on one federation and save what it changed.

        Args:
            label: constant name of the transaction.
            name: federation.
            body: may be run several times; its only effects are those on the change.

        Returns:
            What the body returned in the committed run.

        Raises:
            UnknownFederation: there is none of that name.
            SheLoraError: whatever the body refuses; nothing has changed.
        """

        async def transaction(connection: Connection) -> tuple[Result, Change]:
            change = Change(connection, await self._load(connection, name), self._clock.now_ms())
            result = await body(change)
            if change.changed:
                await change.save()
            return result, change

        try:
            result, change = await self._database.run_tx(label, transaction)
        except asyncio.CancelledError:
            # It may be committed all the same.
            self._latest.pop(name, None)
            self._hub.notify(name)
            raise
        self._remember(change.stored)
        if change.changed:
            self._hub.notify(name, _concerned(change.before, change.stored))
        return result

    async def emit(self, label: str, name: str, event: MachineEvent) -> StoredFederation:
        """Apply one event and nothing else; answers the federation afterwards."""

        async def body(change: Change) -> StoredFederation:
            change.emit(event)
            return change.stored

        return await self.change(label, name, body)

    async def create(self, fresh: StoredFederation) -> StoredFederation:
        """Insert a federation unless one of that name exists; answers the one that is there afterwards."""

        async def body(connection: Connection) -> StoredFederation:
            if fresh.name not in await store.federations.names(connection):
                created = Event(fresh.next_sequence, fresh.created_at_ms, "federation_created")
                await store.federations.create(connection, replace(fresh, next_sequence=created.sequence + 1))
                await store.history.append_events(connection, fresh.name, [created])
            return await store.federations.load(connection, fresh.name)

        stored = await self._database.run_tx("create_federation", body)
        self._remember(stored)
        self._hub.notify(fresh.name)
        self._hub.notify(ANY)
        return stored

    async def read(self, name: str) -> StoredFederation:
        """The federation as it is stored now.

        Raises:
            UnknownFederation: there is none of that name.
        """

        async def body(connection: Connection) -> StoredFederation:
            return await self._load(connection, name)

        stored = await self._database.run_tx("read_federation", body)
        self._remember(stored)
        return stored

    async def glance(self, name: str) -> StoredFederation:
        """The federation as this process last saw it: no transaction.

        For views and for whether there is anything to do, never for what becomes state.
        """
        return self.latest(name) or await self.read(name)

    def latest(self, name: str) -> StoredFederation | None:
        """The same at once, None when this process has not seen it."""
        return self._latest.get(name)

    async def query(self, label: str, body: Callable[[Connection], Awaitable[Result]]) -> Result:
        """Run a transaction that reads, or writes what no state depends on."""
        return await self._database.run_tx(label, body)

    async def names(self) -> list[str]:
        """All federations by name."""
        return await self._database.run_tx("list_federations", store.federations.names)

    async def _load(self, connection: Connection, name: str) -> StoredFederation:
        known = self._latest.get(name)
        if known is not None and known.revision == await store.federations.revision(connection, name):
            return known
        return await store.federations.load(connection, name)

    def _remember(self, stored: StoredFederation) -> None:
        known = self._latest.get(stored.name)
        if known is None or stored.revision >= known.revision:
            self._latest[stored.name] = stored


def _concerned(before: StoredFederation, after: StoredFederation) -> frozenset[str] | None:
    """Agents whose views a change may alter, None for all."""
    but_for_state = replace(after, state=before.state, revision=before.revision, next_sequence=before.next_sequence)
    return concerned(before.state, after.state) if but_for_state == before else None


def _shortened(text: str) -> str:
    return text.encode()[:DETAIL_BYTES].decode(errors="ignore")
