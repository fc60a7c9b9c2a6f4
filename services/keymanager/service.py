"""What the key manager does, one public method a use case. Every grant and every refusal reaches the audit log."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from services.common.audit import AuditRecord
from services.common.clock import Clock
from services.common.identity import Identity, Role
from services.common.keymanager_client import EnrolmentToken
from services.common.threads import WorkerPool
from services.keymanager.audit import PAGE_RECORDS, AuditLog
from services.keymanager.ca import Authority, Issued
from services.keymanager.domain import (
    Action,
    Epoch,
    Revocation,
    StoredAuthority,
    authority_purpose,
)
from services.keymanager.epoch_keys import KeyMaker
from services.keymanager.epochs import Epochs, check_reason
from services.keymanager.gate import Actor, Gate, actor_name
from services.keymanager.members import Addresses, Members
from services.keymanager.seal import Vault
from services.keymanager.store import Records, Store
from shelora.errors import InvalidConfiguration, UnknownAgent, ValueOutOfRange

DEFAULT_RECORDS: Final = 100
_DAY_MS: Final = 86_400_000

_logger = structlog.get_logger(__name__)


class KeyManager:
    """One federation's key manager.

    Args:
        authority: signs certificates.
        store: all state.
        vault: seals secrets at rest.
        keys: makes and proves CKKS keys, in threads of the pool.
        pool: threads for the above.
        clock: time.
        certificate_lifetime_s: validity of members' certificates.
        addresses: where a new member of a role reaches the key manager, and where it enrols.
        random_bytes: source of tokens and seeds.
    """

    def __init__(
        self,
        *,
        authority: Authority,
        store: Store,
        vault: Vault,
        keys: KeyMaker,
        pool: WorkerPool,
        clock: Clock,
        certificate_lifetime_s: int,
        addresses: Addresses,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self.federation = authority.federation
        self.authority = authority
        self._store = store
        self._vault = vault
        self._clock = clock
        self._audit = AuditLog(store, vault, self.federation, clock)
        self._gate = Gate(store, self._audit, self.federation)
        self._members = Members(
            authority, store, self._audit, self._gate, clock, certificate_lifetime_s, addresses, random_bytes
        )
        self._epochs = Epochs(
            federation=self.federation,
            store=store,
            vault=vault,
            audit=self._audit,
            gate=self._gate,
            keys=keys,
            pool=pool,
            clock=clock,
            random_bytes=random_bytes,
        )

    async def enrol(self, federation: str, token: str, csr_der: bytes) -> Issued:
        """Certificate for a one-time token; the same token and key get one again until the token expires."""
        return await self._members.enrol(federation, token, csr_der)

    async def renew(self, caller: Identity, csr_der: bytes) -> Issued:
        """Fresh certificate for the caller's own identity and the key in the request."""
        return await self._members.renew(caller, csr_der)

    async def create_token(
        self, caller: Actor, role: Role, name: str, ttl_s: int = 0, server_names: Sequence[str] = ()
    ) -> EnrolmentToken:
        """A one-time enrolment token; only its digest is kept."""
        return await self._members.create_token(caller, role, name, ttl_s, server_names)

    async def fetch_epoch(self, caller: Actor, number: int, hpke_public_key: bytes = b"") -> tuple[Epoch, bytes]:
        """The public side of an epoch (0: the current one), and its secrets sealed to the agent that sent its key."""
        return await self._epochs.fetch(caller, number, hpke_public_key)

    async def list_epochs(self, caller: Actor) -> list[Epoch]:
        """All epochs, newest first."""
        return await self._epochs.listed(caller)

    async def rotate_epoch(self, caller: Actor, reason: str) -> Epoch:
        """A new epoch with new keys and a new seed; the one before stays readable."""
        return await self._epochs.rotate(caller, reason)

    async def retire_epoch(self, caller: Actor, number: int) -> Epoch:
        """Destroy the secrets of an epoch that is not current; once more changes nothing."""
        return await self._epochs.retire(caller, number)

    async def revoke(self, caller: Actor, role: Role, name: str, reason: str) -> Epoch:
        """Bar an identity for good and rotate; revoking once more answers the epoch that the first time made."""
        subject = f"{role.value} {name[:80]}"

        async def earlier(records: Records) -> Epoch | None:
            check_reason(reason)
            identity = self._members.identity(role, name)
            revocation = await records.revocation(identity)
            if revocation is not None:
                return (await records.epoch(revocation.epoch))[0]
            open_token = await records.has_token(role, name, self._clock.now_ms())
            if not open_token and await records.member(identity) is None:
                raise UnknownAgent(
                    f"identity: expected an enrolled one or one with an open token, got {identity.uri}",
                    hint="check role and name; there is nothing to revoke",
                )
            return None

        found = await self._gate.decide(caller, Action.REVOKE.value, subject, (Role.OPERATOR,), earlier)
        if found is not None:
            return found
        material = await self._epochs.draw()

        async def body(records: Records) -> Epoch:
            meanwhile = await earlier(records)
            if meanwhile is not None:
                return meanwhile
            identity = self._members.identity(role, name)
            await self._audit.append(records, actor_name(caller), Action.REVOKE, f"{identity.uri}: {reason}")
            epoch = await self._epochs.insert(records, caller, material, f"revocation of {identity.uri}")
            await records.put_revocation(Revocation(identity, epoch.number, self._clock.now_ms()))
            return epoch

        epoch = await self._gate.decide(caller, Action.REVOKE.value, subject, (Role.OPERATOR,), body)
        _logger.warning("identity revoked", role=role.value, name=name, epoch=epoch.number)
        return epoch

    async def revocations(self, caller: Actor) -> list[Revocation]:
        """Revoked identities, oldest first."""
        roles = (Role.AGGREGATOR, Role.OPERATOR)
        return await self._gate.decide(caller, "list", "revocations", roles, lambda records: records.revocations())

    async def audit_records(self, caller: Actor, after: int = 0, limit: int = 0) -> list[AuditRecord]:
        """Audit records after a sequence number, oldest first."""

        async def body(records: Records) -> list[AuditRecord]:
            if not 0 <= limit <= PAGE_RECORDS:
                raise ValueOutOfRange(
                    f"limit: expected 1 to {PAGE_RECORDS}, got {limit}", hint=f"0 means {DEFAULT_RECORDS}"
                )
            return await records.audit_records(min(after, 2**62), limit or DEFAULT_RECORDS)

        return await self._gate.decide(caller, "list", "audit-records", (Role.OPERATOR,), body)

    async def verify_audit(self) -> int:
        """Check the whole audit log; answers the number of records."""
        return await self._audit.verify()

    async def check_current_keys(self) -> int:
        """Encrypt and decrypt with the current epoch's keys as stored; answers its number."""
        return await self._epochs.check_current()

    async def ready(self) -> dict[str, object]:
        """Prove that the database answers and that the key-encryption key opens authority, log head, current epoch."""

        async def body(records: Records) -> dict[str, object]:
            await open_authority(records, self._vault, self.federation)
            await self._audit.head(records)
            epoch, stored = await records.epoch()
            self._epochs.open(epoch, stored)
            root_end_ms = int(self.authority.certificate.not_valid_after_utc.timestamp() * 1000)
            return {
                "federation": self.federation,
                "epoch": epoch.number,
                "key_encryption_key": self._vault.key_ids()[0],
                "authority_days_left": (root_end_ms - self._clock.now_ms()) // _DAY_MS,
            }

        return await self._store.run_tx("ready", body)

    async def reseal(self) -> int:
        """Seal everything under the first key-encryption key; answers how many epochs changed. For the command line."""

        async def body(records: Records) -> int:
            authority = await open_authority(records, self._vault, self.federation)
            await store_authority(records, self._vault, authority)
            changed = await self._epochs.reseal(records)
            await self._audit.append(records, actor_name(None), Action.RESEAL, f"key {self._vault.key_ids()[0]}")
            return changed

        return await self._store.run_tx("reseal", body)


async def open_authority(records: Records, vault: Vault, federation: str) -> Authority:
    """The stored certificate authority.

    Raises: InvalidConfiguration when there is none or it is another federation's; StoredBytesCorrupt.
    """
    stored = await records.authority()
    if stored is None:
        raise InvalidConfiguration(
            "key manager: expected a certificate authority in the database, got none",
            hint="run `shelora-keymanager init --config FILE` once",
        )
    if stored.federation != federation:
        raise InvalidConfiguration(
            f"federation: expected {stored.federation}, whose state this is, got {federation}",
            hint="give every federation its own state_dir, or correct the configuration",
        )
    private_der = vault.open(stored.sealed_key, authority_purpose(federation))
    return Authority.load(federation, stored.certificate_pem, private_der)


async def store_authority(records: Records, vault: Vault, authority: Authority) -> None:
    """Store a certificate authority with its key sealed."""
    sealed = vault.seal(authority.private_der(), authority_purpose(authority.federation))
    await records.put_authority(StoredAuthority(authority.federation, authority.pem, sealed))
