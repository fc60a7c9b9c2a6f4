"""The append-only audit log: hash-chained records, and a head sealed under the key-encryption key.

The chain shows a changed or missing record. The sealed head, which only this process can make, also shows that the
newest records were cut off or that the whole chain was written anew.
"""

from __future__ import annotations

import struct
from typing import Final

import structlog

from services.common.audit import GENESIS, AuditRecord, chained, check_chain
from services.common.clock import Clock
from services.keymanager.domain import Action, audit_purpose
from services.keymanager.seal import Vault
from services.keymanager.store import Records, Store
from shelora.errors import SheLoraError, StoredBytesCorrupt

GRANTED: Final = "granted"
LOCAL: Final = "local"
ANONYMOUS: Final = "anonymous"
PAGE_RECORDS: Final = 1000
_HEAD = struct.Struct("<Q32s")
_SUBJECT_CHARACTERS: Final = 400
_BURST_DENIALS: Final = 60
_DENIALS_PER_S: Final = 1.0

_logger = structlog.get_logger(__name__)


class AuditLog:
    """Writes and checks the log of one federation.

    Args:
        store: where the records are.
        vault: seals the head.
        federation: whose log it is.
        clock: time of the records.
        page_records: how many records `verify` holds at once.
    """

    def __init__(
        self, store: Store, vault: Vault, federation: str, clock: Clock, *, page_records: int = PAGE_RECORDS
    ) -> None:
        self._store = store
        self._vault = vault
        self._purpose = audit_purpose(federation)
        self._clock = clock
        self._page_records = page_records
        self._denials: dict[str, _DenialBudget] = {}

    async def append(self, records: Records, actor: str, action: Action, subject: str, outcome: str = GRANTED) -> None:
        """Add a record inside the transaction whose effect it describes: neither exists without the other."""
        sequence, digest = await self.head(records)
        record = chained(
            digest,
            sequence=sequence + 1,
            at_ms=self._clock.now_ms(),
            actor=actor,
            action=action.value,
            subject=subject[:_SUBJECT_CHARACTERS],
            outcome=outcome,
        )
        await records.append_audit(record, self._seal_head(record.sequence, record.digest))

    async def deny(self, actor: str, what: str, error: SheLoraError) -> None:
        """Record a refusal in a transaction of its own.

        Beyond 60 in a row and one a second an actor's refusals are only counted, and the number is written with the
        next record: the log must not be a way to fill the disk. A log that cannot be written does not replace the
        refusal.
        """
        budget = self._denials.setdefault(actor, _DenialBudget(self._clock.monotonic_s()))
        unrecorded = budget.spend(self._clock.monotonic_s())
        if unrecorded is None:
            return
        about = error.context.get("identity", actor)
        subject = what if about == actor else f"{what} by {about}"
        if unrecorded:
            subject += f" ({unrecorded} more not recorded)"
        try:
            await self._store.run_tx(
                "audit_denial",
                lambda records: self.append(records, actor, Action.DENIED, subject, error.code),
            )
        except SheLoraError as failure:
            budget.give_back(unrecorded)
            _logger.error("denial not recorded", actor=actor, subject=subject, code=error.code, reason=str(failure))

    async def verify(self) -> int:
        """Check the whole log up to the sealed head.

        Returns: the number of records.
        Raises: StoredBytesCorrupt naming the first place that is wrong.
        """
        newest, expected = await self._store.run_tx("audit_head", self.head)
        after, digest = 0, GENESIS
        while True:
            page = await self._page(after, self._page_records)
            known = [record for record in page if record.sequence <= newest]
            after, digest = check_chain(known, digest, after)
            if len(known) < self._page_records:
                break
        if (after, digest) != (newest, expected) or (newest == 0 and page):
            raise StoredBytesCorrupt(
                f"audit log: expected {newest} records that end in {expected.hex()[:16]}, "
                f"got {max(after, len(page))} that end in {digest.hex()[:16]}",
                hint="records were cut off or written anew: compare with a backup and treat the host as compromised",
            )
        return newest

    async def head(self, records: Records) -> tuple[int, bytes]:
        """Sequence number and digest of the newest record, as sealed."""
        sealed = await records.audit_head()
        if sealed is None:
            return 0, GENESIS
        sequence, digest = _HEAD.unpack(self._vault.open(sealed, self._purpose))
        return int(sequence), bytes(digest)

    async def _page(self, after: int, limit: int) -> list[AuditRecord]:
        return await self._store.run_tx("audit_page", lambda records: records.audit_records(after, limit))

    def _seal_head(self, sequence: int, digest: bytes) -> bytes:
        return self._vault.seal(_HEAD.pack(sequence, digest), self._purpose)


class _DenialBudget:
    """Lets a burst through, then one a second; counts the rest."""

    def __init__(self, now_s: float) -> None:
        self._left = float(_BURST_DENIALS)
        self._at_s = now_s
        self._unrecorded = 0

    def spend(self, now_s: float) -> int | None:
        """How many refusals went unrecorded since the last record, or None when this one does too."""
        self._left = min(_BURST_DENIALS, self._left + (now_s - self._at_s) * _DENIALS_PER_S)
        self._at_s = now_s
        if self._left < 1:
            self._unrecorded += 1
            return None
        self._left -= 1
        unrecorded, self._unrecorded = self._unrecorded, 0
        return unrecorded

    def give_back(self, unrecorded: int) -> None:
        """The record could not be written: count it and those it stood for."""
        self._unrecorded += unrecorded + 1
