"""Deletes bytes that nobody needs: uploads of rounds that are over, old averages, leftovers of a dead process."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from services.aggregator.admission import folder_of
from services.aggregator.ledger import Ledger
from services.aggregator.store import Connection, StoredFederation, payloads
from services.aggregator.store.payloads import NEGOTIATED_KINDS, PUBLISHED_KINDS, StoredPayload
from services.common.blobs import BlobStore
from shelora.rounds import RoundPhase

_log = structlog.get_logger(__name__)


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

    async def sweep(self, stored: StoredFederation) -> None:
        """Delete what this federation needs no more."""
        name = stored.name
        negotiation = stored.state.negotiation
        negotiating = 0 if negotiation is None else negotiation[0].version

        async def unswept(connection: Connection) -> tuple[dict[int, RoundPhase], list[int]]:
            rounds = await payloads.unswept_rounds(connection, name)
            return rounds, await payloads.unswept_plans(connection, name, negotiating)

        rounds, plans = await self._ledger.query("find_unswept", unswept)
        for number, phase in rounds.items():
            await self._sweep_round(name, number, phase)
        for version in plans:
            await self._sweep_plan(name, version)
        if rounds and self._keep_rounds:
            await self._drop_outdated(name, stored.state.last_published_round - self._keep_rounds)

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
            return await _forget(connection, name, (payload for payload in found if payload.key.kind not in kept))

        self._delete(await self._ledger.query("sweep_round", body))
        self._blobs.discard_stagings(folder_of(name, number))

        async def mark(connection: Connection) -> None:
            await payloads.mark_round_swept(connection, name, number)

        await self._ledger.query("mark_round_swept", mark)

    async def _sweep_plan(self, name: str, version: int) -> None:
        async def body(connection: Connection) -> list[str]:
            found = await payloads.of_plan(connection, name, version)
            return await _forget(
                connection, name, (payload for payload in found if payload.key.kind not in NEGOTIATED_KINDS)
            )

        self._delete(await self._ledger.query("sweep_plan", body))
        self._blobs.discard_stagings(folder_of(name, 0, version))

        async def mark(connection: Connection) -> None:
            await payloads.mark_plan_swept(connection, name, version)

        await self._ledger.query("mark_plan_swept", mark)

    async def _drop_outdated(self, name: str, newest_dropped: int) -> None:
        async def body(connection: Connection) -> list[str]:
            return await _forget(connection, name, await payloads.outdated(connection, name, newest_dropped))

        self._delete(await self._ledger.query("drop_outdated", body))

    def _delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._blobs.delete(key)


async def _forget(connection: Connection, name: str, found: Iterable[StoredPayload]) -> list[str]:
    keys = [payload.blob.key for payload in found if payload.present]
    await payloads.forget(connection, name, keys)
    return keys
