"""The key manager's audit records and the hash chain through them, so that whoever reads the log can check it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shelora.errors import StoredBytesCorrupt

GENESIS: Final = bytes(32)
"""What the first record has in place of its predecessor's digest."""

_DOMAIN: Final = b"shelora audit record v1\x00"


@dataclass(frozen=True)
class AuditRecord:
    """One line of the audit log.

    Attributes:
        sequence: position from 1, without gaps.
        at_ms: when, in milliseconds since the Unix epoch.
        actor: an identity URI, "anonymous" on the enrolment port, or "local" for the key manager's own command line.
        action: what, or "denied".
        subject: on what.
        outcome: "granted" or the code of the error.
        digest: SHA-256 over the predecessor's digest and the fields above, bytes[32].
    """

    sequence: int
    at_ms: int
    actor: str
    action: str
    subject: str
    outcome: str
    digest: bytes


def chained(
    previous: bytes, *, sequence: int, at_ms: int, actor: str, action: str, subject: str, outcome: str
) -> AuditRecord:
    """The record that follows the one with digest `previous` (`GENESIS` for the first)."""
    state = hashlib.sha256(_DOMAIN + previous + struct.pack("<QQ", sequence, at_ms))
    for text in (actor, action, subject, outcome):
        encoded = text.encode()
        state.update(struct.pack("<I", len(encoded)) + encoded)
    return AuditRecord(sequence, at_ms, actor, action, subject, outcome, state.digest())


def check_chain(records: Iterable[AuditRecord], previous: bytes = GENESIS, after: int = 0) -> tuple[int, bytes]:
    """Check that records follow each other without a gap or a change.

    Args:
        records: oldest first.
        previous: digest of the record before the first of them.
        after: sequence number of that record, 0 if there is none.

    Returns:
        Sequence number and digest of the last record (`after` and `previous` when there is none).

    Raises:
        StoredBytesCorrupt: a record is missing, out of order or altered; the message names the first such place.
    """
    for record in records:
        expected = chained(
            previous,
            sequence=after + 1,
            at_ms=record.at_ms,
            actor=record.actor,
            action=record.action,
            subject=record.subject,
            outcome=record.outcome,
        )
        if record.sequence != expected.sequence:
            raise StoredBytesCorrupt(
                f"audit log: expected record {expected.sequence}, got record {record.sequence}",
                hint="records were removed: compare with a backup and treat the key manager's host as compromised",
                context={"record": str(expected.sequence)},
            )
        if record.digest != expected.digest:
            raise StoredBytesCorrupt(
                f"audit log: record {record.sequence}: expected digest {expected.digest.hex()[:16]}, "
                f"got {record.digest.hex()[:16]}",
                hint="the record was altered: compare with a backup and treat the key manager's host as compromised",
                context={"record": str(record.sequence)},
            )
        previous, after = record.digest, record.sequence
    return after, previous
