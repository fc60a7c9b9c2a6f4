"""Deletes bytes that nobody needs: uploads of rounds that are over, old averages, leftovers of a dead process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import structlog

from services.aggregator.admission import folder_of
from services.aggregator.ledger import Change, Ledger
from services.aggregator.store import Connection, StoredFederation, payloads
from services.aggregator.store.payloads import NEGOTIATED_KINDS, PUBLISHED_KINDS, StoredPayload
from services.common.blobs import BlobStore
from services.common.threads import in_thread
from shelora.rounds import Federation, RoundPhase

_log = structlog.get_logger(__name__)


class _Needed(NamedTuple):
    """What uploads a federation may still need; only when this changes are there others to delete.

    Attributes:
        round: number of the running round, or minus that of the last one that is over.
        plan: newest plan version.
        negotiated: the plan version being negotiated, 0 for none.
    """

    round: int
    plan: int
    negotiated: int


class Sweeper:
    """Deletes bytes.

    A row is marked before its bytes go, so a stop in between leaves bytes without a name, never a name without bytes.

    Args:
        ledger: what is known.
        blobs: where payloads are.
        keep_rounds: published rounds whose average and ciphertext sum stay, 0 for all.
    """

    def __init__(self, ledger: Ledger, blobs: BlobStore, keep_rounds: int = 0) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._keep_rounds = keep_rounds
        self._swept: dict[str, _Needed] = {}

    async def sweep(self, name: str) -> None:
        """Delete what a federation needs no more; does nothing as long as it goes on needing the same."""
        if _needed((await self._ledger.glance(name)).state) == self._swept.get(name):
            return

        async def unswept(change: Change) -> tuple[StoredFederation, dict[int, RoundPhase], list[int]]:
            stored = change.stored
            rounds = await payloads.unswept_rounds(change.connection, name)
            plans = await payloads.unswept_plans(change.connection, name, _needed(stored.state).negotiated)
            return stored, rounds, plans

        stored, rounds, plans = await self._ledger.change("find_unswept", name, unswept)
        for number, phase in rounds.items():
            await self._sweep_round(name, number, phase)
        for version in plans:
            await self._sweep_plan(name, version)
        if rounds and self._keep_rounds:
            await self._drop_outdated(name, stored.state.last_published_round - self._keep_rounds)
        self._swept[name] = _needed(stored.state)

    async def collect_orphans(self) -> int:
        """Delete blobs that no row names; call it at start, before anything else happens. Answers how many."""
        named = await self._ledger.query("present_keys", payloads.present_keys)
        orphans = sorted(set(self._blobs.keys("")) - named)
        for key in orphans:
            self._blobs.delete(key)
        if orphans:
            _log.info("orphaned blobs deleted", count=len(orphans))
        return len(orphans)

    async def _sweep_round(self, name: str, number: int, phase: RoundPhase) -> None:
        kept = PUBLISHED_KINDS if phase is RoundPhase.PUBLISHED else ()

        async def body(connection: Connection) -> list[str]:
            found = await payloads.of_round(connection, name, number)
            return await _forget(connection, (payload for payload in found if payload.key.kind not in kept))

        await self._delete(await self._ledger.query("sweep_round", body))
        await in_thread(self._blobs.discard_stagings, folder_of(name, number))

        async def mark(connection: Connection) -> None:
            await payloads.mark_round_swept(connection, name, number)

        await self._ledger.query("mark_round_swept", mark)

    async def _sweep_plan(self, name: str, version: int) -> None:
        async def body(connection: Connection) -> list[str]:
            found = await payloads.of_plan(connection, name, version)
            return await _forget(connection, (payload for payload in found if payload.key.kind not in NEGOTIATED_KINDS))

        await self._delete(await self._ledger.query("sweep_plan", body))
        await in_thread(self._blobs.discard_stagings, folder_of(name, 0, version))

        async def mark(connection: Connection) -> None:
            await payloads.mark_plan_swept(connection, name, version)

        await self._ledger.query("mark_plan_swept", mark)

    async def _drop_outdated(self, name: str, newest_dropped: int) -> None:
        async def body(connection: Connection) -> list[str]:
            return await _forget(connection, await payloads.outdated(connection, name, newest_dropped))

        await self._delete(await self._ledger.query("drop_outdated", body))

    async def _delete(self, keys: Iterable[str]) -> None:
        def delete() -> None:
            for key in keys:
                self._blobs.delete(key)

        await in_thread(delete)


def _needed(state: Federation) -> _Needed:
    round_, plan, negotiation = state.round, state.plan, state.negotiation
    return _Needed(
        round=0 if round_ is None else -round_.number if round_.ended else round_.number,
        plan=0 if plan is None else plan.version,
        negotiated=0 if negotiation is None else negotiation[0].version,
    )


async def _forget(connection: Connection, found: Iterable[StoredPayload]) -> list[str]:
    present = [payload for payload in found if payload.present]
    await payloads.forget(connection, (payload.key for payload in present))
    return [payload.blob.key for payload in present]
