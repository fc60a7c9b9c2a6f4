"""Key epochs: made, fetched, superseded, retired."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from services.common.clock import Clock
from services.common.identity import Role
from services.common.keymanager_client import seal_secrets
from services.common.threads import WorkerPool
from services.keymanager.audit import AuditLog
from services.keymanager.domain import Action, Epoch, EpochState, SealedSecrets, secret_key_purpose, seed_purpose
from services.keymanager.epoch_keys import CkksKeys, KeyMaker
from services.keymanager.gate import ANY_ROLE, Actor, Gate, actor_name
from services.keymanager.seal import Vault
from services.keymanager.store import Records, Store
from shelora.errors import RoleDenied, UnknownEpoch, ValueOutOfRange, WrongEpoch
from shelora.he.secret import SecretKey
from shelora.plan.seed import SEED_BYTES

MAX_REASON_BYTES: Final = 200

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Material:
    """Everything secret and public that a new epoch is made of.

    Attributes:
        keys: the CKKS keys.
        seed: the federation seed.
    """

    keys: CkksKeys
    seed: bytes = field(repr=False)


class Epochs:
    """The epochs of one federation.

    Args:
        federation: whose they are.
        store: where they are kept.
        vault: seals their secrets at rest.
        audit: records every grant.
        gate: decides on calls.
        keys: makes and proves CKKS keys, in threads of the pool.
        pool: threads for the above.
        clock: when an epoch was made.
        random_bytes: source of seeds.
    """

    def __init__(
        self,
        *,
        federation: str,
        store: Store,
        vault: Vault,
        audit: AuditLog,
        gate: Gate,
        keys: KeyMaker,
        pool: WorkerPool,
        clock: Clock,
        random_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._federation = federation
        self._store = store
        self._vault = vault
        self._audit = audit
        self._gate = gate
        self._keys = keys
        self._pool = pool
        self._clock = clock
        self._random_bytes = random_bytes

    async def fetch(self, caller: Actor, number: int, hpke_public_key: bytes = b"") -> tuple[Epoch, bytes]:
        """The public side of an epoch (0: the current one), and its secrets sealed to the agent that sent its key."""
        action = Action.FETCH_SECRET if hpke_public_key else Action.FETCH_PUBLIC
        roles = (Role.AGENT,) if hpke_public_key else ANY_ROLE

        async def body(records: Records) -> tuple[Epoch, bytes]:
            epoch, stored = await records.epoch(number)
            sealed = self._seal_to(caller, epoch, stored, hpke_public_key) if hpke_public_key else b""
            await self._audit.append(records, actor_name(caller), action, f"epoch {epoch.number}")
            return epoch, sealed

        return await self._gate.decide(caller, action.value, f"epoch {number or 'current'}", roles, body)

    async def listed(self, caller: Actor) -> list[Epoch]:
        """All epochs, newest first."""
        return await self._gate.decide(caller, "list", "epochs", ANY_ROLE, lambda records: records.epochs())

    async def rotate(self, caller: Actor, reason: str) -> Epoch:
        """A new epoch with new keys and a new seed; the one before stays readable."""

        async def allowed(_records: Records) -> None:
            check_reason(reason)

        await self._gate.decide(caller, Action.ROTATE.value, "epochs", (Role.OPERATOR,), allowed)
        material = await self.draw()
        epoch = await self._gate.decide(
            caller,
            Action.ROTATE.value,
            "epochs",
            (Role.OPERATOR,),
            lambda records: self.insert(records, caller, material, reason),
        )
        _logger.info("epoch rotated", epoch=epoch.number)
        return epoch

    async def retire(self, caller: Actor, number: int) -> Epoch:
        """Destroy the secrets of an epoch that is not current; once more changes nothing."""

        async def body(records: Records) -> Epoch:
            if number < 1:
                raise UnknownEpoch(f"epoch: expected a number from 1, got {number}", hint="list the epochs")
            epoch, _ = await records.epoch(number)
            if epoch.state is EpochState.CURRENT:
                raise WrongEpoch(
                    f"epoch {number}: expected a superseded one, got the current one",
                    hint="rotate first, and let running plans move to the new epoch",
                    context={"epoch": str(number)},
                )
            if epoch.state is EpochState.SUPERSEDED:
                await records.retire(number)
                await self._audit.append(records, actor_name(caller), Action.RETIRE, f"epoch {number}")
            return (await records.epoch(number))[0]

        return await self._gate.decide(caller, Action.RETIRE.value, f"epoch {number}", (Role.OPERATOR,), body)

    async def draw(self) -> Material:
        """Fresh keys and a fresh seed."""
        return Material(await self._pool.run(self._keys.make), self._random_bytes(SEED_BYTES))

    async def insert(self, records: Records, caller: Actor, material: Material, reason: str) -> Epoch:
        """Make the material the current epoch, inside a transaction."""
        number = await records.newest_epoch() + 1
        epoch = Epoch(
            number,
            EpochState.CURRENT,
            material.keys.parameters,
            material.keys.public_key,
            self._clock.now_ms(),
        )
        await records.supersede()
        await records.insert_epoch(epoch, self._sealed(number, material.keys.secret_key.expose(), material.seed))
        await self._audit.append(records, actor_name(caller), Action.ROTATE, f"epoch {number}: {reason}")
        return epoch

    async def reseal(self, records: Records) -> int:
        """Seal all secrets under the first key-encryption key, inside a transaction; how many epochs changed."""
        changed = 0
        for listed in await records.epochs():
            _, stored = await records.epoch(listed.number)
            if stored is None or all(self._vault.is_current(sealed) for sealed in (stored.secret_key, stored.seed)):
                continue
            secret_key, seed = self.open(listed, stored)
            await records.replace_secrets(listed.number, self._sealed(listed.number, secret_key, seed))
            changed += 1
        return changed

    def open(self, epoch: Epoch, stored: SealedSecrets | None) -> tuple[bytes, bytes]:
        """Secret key and seed of an epoch in clear.

        Raises: WrongEpoch when they were destroyed, StoredBytesCorrupt when they do not open.
        """
        if stored is None:
            raise WrongEpoch(
                f"epoch {epoch.number}: expected one with secrets, got a {epoch.state.value} one",
                hint="its secrets were destroyed: use the current epoch",
                context={"epoch": str(epoch.number)},
            )
        secret_key = self._vault.open(stored.secret_key, secret_key_purpose(self._federation, epoch.number))
        return secret_key, self._vault.open(stored.seed, seed_purpose(self._federation, epoch.number))

    async def check_current(self) -> int:
        """Encrypt and decrypt with the current epoch's keys as stored; answers its number."""
        epoch, stored = await self._store.run_tx("current_epoch", lambda records: records.epoch())
        secret_key, _ = self.open(epoch, stored)
        keys = CkksKeys(epoch.parameters, epoch.public_key, SecretKey(secret_key))
        await self._pool.run(self._keys.check, keys)
        return epoch.number

    def _seal_to(self, caller: Actor, epoch: Epoch, stored: SealedSecrets | None, hpke_public_key: bytes) -> bytes:
        # The gate has let agents through only; this is the last line before a secret leaves, so it asks again.
        if caller is None or caller.role is not Role.AGENT:
            raise RoleDenied(
                f"role: expected agent, got {actor_name(caller)}", hint="only agents can obtain the secrets of an epoch"
            )
        secret_key, seed = self.open(epoch, stored)
        return seal_secrets(secret_key, seed, hpke_public_key, self._federation, epoch.number, caller.name)

    def _sealed(self, number: int, secret_key: bytes, seed: bytes) -> SealedSecrets:
        return SealedSecrets(
            self._vault.seal(secret_key, secret_key_purpose(self._federation, number)),
            self._vault.seal(seed, seed_purpose(self._federation, number)),
        )


def check_reason(reason: str) -> None:
    """Refuse a reason of more than 200 bytes."""
    if len(reason.encode()) > MAX_REASON_BYTES:
        raise ValueOutOfRange(
            f"reason: expected at most {MAX_REASON_BYTES} bytes, got {len(reason.encode())}", hint="shorten the text"
        )
