"""Figures of the key manager for Prometheus; names begin with shelora_keymanager_.

Grants and refusals are counted from the audit log, from its first record on, so a restart changes no figure. Refusals
that the log leaves out because one caller made too many are not in them; shelora_errors_total has those of this
process.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter as Tally
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from services.common.audit import AuditRecord
from services.common.clock import Clock
from services.common.metrics import watch_certificates, watch_disk
from services.keymanager.audit import GRANTED, PAGE_RECORDS
from services.keymanager.domain import Action, EpochState
from services.keymanager.service import KeyManager
from shelora.errors import CorruptState

REFRESH_S: Final = 10.0
"""How old the figures may be."""

_MILLISECONDS: Final = 1000

_logger = structlog.get_logger(__name__)


@contextlib.asynccontextmanager
async def watched(
    keymanager: KeyManager, registry: CollectorRegistry, state_dir: Path, clock: Clock
) -> AsyncIterator[None]:
    """Keep the figures of a key manager fresh inside the block."""
    root = keymanager.authority.certificate
    watch_certificates(registry, {"authority": lambda: int(root.not_valid_after_utc.timestamp() * _MILLISECONDS)})
    watch_disk(registry, state_dir)
    task = asyncio.create_task(KeyManagerMetrics(keymanager, registry, clock).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class KeyManagerMetrics:
    """What was granted and refused, which epochs there are, and whether the key-encryption key opens what is stored.

    Args:
        keymanager: read from, never changed.
        registry: where the figures go.
        clock: waits.
    """

    def __init__(self, keymanager: KeyManager, registry: CollectorRegistry, clock: Clock) -> None:
        self._keymanager = keymanager
        self._clock = clock
        self._counted = 0
        self._decisions = Counter(
            "shelora_keymanager_decisions",
            "Records of the audit log: what was granted, and what was refused with which error code.",
            ["action", "outcome"],
            registry=registry,
        )
        for action in (Action.ENROL, Action.RENEW, Action.FETCH_SECRET):
            # From 0 on, so that Prometheus sees the first one as an increase.
            self._decisions.labels(action.value, GRANTED)
        self._epoch = Gauge("shelora_keymanager_epoch", "Number of the current key epoch.", registry=registry)
        self._epochs = Gauge("shelora_keymanager_epochs", "Key epochs by state.", ["state"], registry=registry)
        self._revoked = Gauge("shelora_keymanager_revoked_identities", "Revoked identities.", registry=registry)
        self._kek = Gauge(
            "shelora_keymanager_kek_usable",
            "1 when the key-encryption key opened authority, audit head and current epoch the last time.",
            registry=registry,
        )
        self._database_up = Gauge(
            "shelora_database_up", "1 when the database answered the last time it was asked.", registry=registry
        )

    async def run(self) -> None:
        """Refresh until cancelled; a database that does not answer leaves the figures as they were."""
        while True:
            try:
                await self.refresh()
            except CorruptState as error:
                self._kek.set(0)
                _logger.error("stored keys do not open", code=error.code, reason=str(error))
            except Exception as error:
                # Whatever it is, members matter more than the figures about them.
                self._database_up.set(0)
                _logger.warning("figures are old", reason=str(error), kind=type(error).__name__)
            await self._clock.sleep(REFRESH_S)

    async def refresh(self) -> None:
        """Read everything once.

        Raises: StoredBytesCorrupt when the key-encryption key does not open what is stored.
        """
        states = Tally(epoch.state for epoch in await self._keymanager.list_epochs(None))
        revoked = len(await self._keymanager.revocations(None))
        while page := await self._keymanager.audit_records(None, self._counted, PAGE_RECORDS):
            for record in page:
                self._decisions.labels(_action(record), record.outcome).inc()
            self._counted = page[-1].sequence
        self._database_up.set(1)
        self._revoked.set(revoked)
        for state in EpochState:
            self._epochs.labels(state.value).set(states[state])
        found = await self._keymanager.ready()
        self._epoch.set(float(str(found["epoch"])))
        self._kek.set(1)


def _action(record: AuditRecord) -> str:
    """What was asked for; the record of a refusal says it in the first word of its subject."""
    return record.subject.partition(" ")[0] if record.action == Action.DENIED.value else record.action
