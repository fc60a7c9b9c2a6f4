"""The key manager's tables and every statement on them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import sqlalchemy as sa

from services.common.audit import AuditRecord
from services.common.database import Connection, Database
from services.common.identity import Identity, Role
from services.keymanager.domain import (
    Epoch,
    EpochState,
    Member,
    Revocation,
    SealedSecrets,
    StoredAuthority,
    TokenGrant,
)
from shelora.errors import UnknownEpoch
from shelora.he.parameters import CkksParameters

MIGRATIONS: Final = Path(__file__).parent / "migrations"
METADATA: Final = sa.MetaData()
_AUTHORITY = sa.Table(
    "authority",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("federation", sa.Text, nullable=False),
    sa.Column("certificate_pem", sa.Text, nullable=False),
    sa.Column("sealed_key", sa.LargeBinary, nullable=False),
    sa.CheckConstraint("id = 1", name="one_authority"),
)
_EPOCHS = sa.Table(
    "epochs",
    METADATA,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("parameters", sa.Text, nullable=False),
    sa.Column("public_key", sa.LargeBinary, nullable=False),
    sa.Column("sealed_secret_key", sa.LargeBinary),
    sa.Column("sealed_seed", sa.LargeBinary),
    sa.Column("created_at_ms", sa.BigInteger, nullable=False),
    sa.CheckConstraint("state IN ('current', 'superseded', 'retired')", name="known_state"),
    sa.CheckConstraint(
        "(state = 'retired') = (sealed_secret_key IS NULL) AND (state = 'retired') = (sealed_seed IS NULL)",
        name="secrets_until_retired",
    ),
)
_ONE_CURRENT = sa.Index("one_current_epoch", _EPOCHS.c.state, unique=True, sqlite_where=sa.text("state = 'current'"))
_TOKENS = sa.Table(
    "tokens",
    METADATA,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("server_names", sa.Text, nullable=False),
    sa.Column("expires_at_ms", sa.BigInteger, nullable=False),
    sa.Column("key_digest", sa.LargeBinary),
)
_MEMBERS = sa.Table(
    "members",
    METADATA,
    sa.Column("identity", sa.Text, primary_key=True),
    sa.Column("server_names", sa.Text, nullable=False),
    sa.Column("not_after_ms", sa.BigInteger, nullable=False),
)
_REVOCATIONS = sa.Table(
    "revocations",
    METADATA,
    sa.Column("identity", sa.Text, primary_key=True),
    sa.Column("epoch", sa.Integer, sa.ForeignKey("epochs.number"), nullable=False),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
)
_AUDIT = sa.Table(
    "audit",
    METADATA,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
)
_AUDIT_HEAD = sa.Table(
    "audit_head",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("sealed", sa.LargeBinary, nullable=False),
    sa.CheckConstraint("id = 1", name="one_head"),
)
_ONLY = 1

Result = TypeVar("Result")


class Store:
    """Transactions over the key manager's tables.

    Args:
        database: the engine; stays the caller's to close.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run_tx(self, name: str, body: Callable[[Records], Awaitable[Result]]) -> Result:
        """Run a body in one transaction; it may be run several times and must have no other effect."""

        async def connected(connection: Connection) -> Result:
            return await body(Records(connection))

        return await self._database.run_tx(name, connected)


class Records:
    """The tables inside one transaction."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def authority(self) -> StoredAuthority | None:
        row = await self._first(sa.select(_AUTHORITY))
        return None if row is None else StoredAuthority(row.federation, row.certificate_pem, row.sealed_key)

    async def put_authority(self, authority: StoredAuthority) -> None:
        await self._replace(_AUTHORITY, _AUTHORITY.c.id, {"id": _ONLY, **asdict(authority)})

    async def epoch(self, number: int = 0) -> tuple[Epoch, SealedSecrets | None]:
        """One epoch with what is left of its secrets; 0 means the current one."""
        wanted = _EPOCHS.c.number == number if number else _EPOCHS.c.state == EpochState.CURRENT.value
        row = await self._first(sa.select(_EPOCHS).where(wanted))
        if row is None:
            newest = await self.newest_epoch()
            raise UnknownEpoch(
                f"epoch: expected one of 1 to {newest}, got {number or 'current'}",
                hint="list the epochs of this key manager",
                context={"epoch": str(number)},
            )
        return _epoch(row), _secrets(row)

    async def epochs(self) -> list[Epoch]:
        """Newest first."""
        rows = await self._connection.execute(sa.select(_EPOCHS).order_by(_EPOCHS.c.number.desc()))
        return [_epoch(row) for row in rows]

    async def newest_epoch(self) -> int:
        """Highest epoch number, 0 when there is none."""
        return int(await self._connection.scalar(sa.select(sa.func.max(_EPOCHS.c.number))) or 0)

    async def supersede(self) -> None:
        """End the current epoch's time as the current one."""
        current = _EPOCHS.c.state == EpochState.CURRENT.value
        await self._connection.execute(sa.update(_EPOCHS).where(current).values(state=EpochState.SUPERSEDED.value))

    async def insert_epoch(self, epoch: Epoch, secrets: SealedSecrets) -> None:
        await self._connection.execute(
            sa.insert(_EPOCHS).values(
                number=epoch.number,
                state=epoch.state.value,
                parameters=json.dumps(asdict(epoch.parameters), sort_keys=True),
                public_key=epoch.public_key,
                sealed_secret_key=secrets.secret_key,
                sealed_seed=secrets.seed,
                created_at_ms=epoch.created_at_ms,
            )
        )

    async def replace_secrets(self, number: int, secrets: SealedSecrets) -> None:
        """Store an epoch's secrets in another sealed form."""
        values = {"sealed_secret_key": secrets.secret_key, "sealed_seed": secrets.seed}
        await self._connection.execute(sa.update(_EPOCHS).where(_EPOCHS.c.number == number).values(values))

    async def retire(self, number: int) -> None:
        """Forget an epoch's secrets; freed pages are overwritten, at the latest when the service stops."""
        await self._connection.exec_driver_sql("PRAGMA secure_delete = ON")
        values = {"state": EpochState.RETIRED.value, "sealed_secret_key": None, "sealed_seed": None}
        await self._connection.execute(sa.update(_EPOCHS).where(_EPOCHS.c.number == number).values(values))

    async def token(self, digest: bytes) -> TokenGrant | None:
        row = await self._first(sa.select(_TOKENS).where(_TOKENS.c.digest == digest))
        return None if row is None else _grant(row)

    async def put_token(self, digest: bytes, grant: TokenGrant, now_ms: int) -> None:
        """Store a new token and forget those that ended before now."""
        await self._connection.execute(sa.delete(_TOKENS).where(_TOKENS.c.expires_at_ms <= now_ms))
        await self._connection.execute(
            sa.insert(_TOKENS).values(
                digest=digest,
                role=grant.role.value,
                name=grant.name,
                server_names=json.dumps(grant.server_names),
                expires_at_ms=grant.expires_at_ms,
                key_digest=grant.key_digest,
            )
        )

    async def bind_token(self, digest: bytes, key_digest: bytes) -> None:
        """From now on the token works for this key only."""
        await self._connection.execute(
            sa.update(_TOKENS).where(_TOKENS.c.digest == digest).values(key_digest=key_digest)
        )

    async def has_token(self, role: Role, name: str, now_ms: int) -> bool:
        """Whether an identity has a token that still works."""
        matches = sa.and_(_TOKENS.c.role == role.value, _TOKENS.c.name == name, _TOKENS.c.expires_at_ms > now_ms)
        return await self._first(sa.select(_TOKENS.c.name).where(matches)) is not None

    async def member(self, identity: Identity) -> Member | None:
        row = await self._first(sa.select(_MEMBERS).where(_MEMBERS.c.identity == identity.uri))
        return None if row is None else Member(identity, tuple(json.loads(row.server_names)), row.not_after_ms)

    async def put_member(self, member: Member) -> None:
        values = {
            "identity": member.identity.uri,
            "server_names": json.dumps(member.server_names),
            "not_after_ms": member.not_after_ms,
        }
        await self._replace(_MEMBERS, _MEMBERS.c.identity, values)

    async def revocation(self, identity: Identity) -> Revocation | None:
        row = await self._first(sa.select(_REVOCATIONS).where(_REVOCATIONS.c.identity == identity.uri))
        return None if row is None else Revocation(identity, row.epoch, row.at_ms)

    async def revocations(self) -> list[Revocation]:
        """Oldest first."""
        order = (_REVOCATIONS.c.at_ms, _REVOCATIONS.c.identity)
        rows = await self._connection.execute(sa.select(_REVOCATIONS).order_by(*order))
        return [Revocation(Identity.parse(row.identity), row.epoch, row.at_ms) for row in rows]

    async def put_revocation(self, revocation: Revocation) -> None:
        values = {"identity": revocation.identity.uri, "epoch": revocation.epoch, "at_ms": revocation.at_ms}
        await self._connection.execute(sa.insert(_REVOCATIONS).values(values))

    async def append_audit(self, record: AuditRecord, sealed_head: bytes) -> None:
        """Add a record and move the sealed head of the log to it."""
        await self._connection.execute(sa.insert(_AUDIT).values(asdict(record)))
        await self.put_audit_head(sealed_head)

    async def put_audit_head(self, sealed_head: bytes) -> None:
        await self._replace(_AUDIT_HEAD, _AUDIT_HEAD.c.id, {"id": _ONLY, "sealed": sealed_head})

    async def audit_head(self) -> bytes | None:
        row = await self._first(sa.select(_AUDIT_HEAD))
        return None if row is None else bytes(row.sealed)

    async def audit_records(self, after: int, limit: int) -> list[AuditRecord]:
        """Oldest first."""
        chosen = sa.select(_AUDIT).where(_AUDIT.c.sequence > after).order_by(_AUDIT.c.sequence).limit(limit)
        rows = await self._connection.execute(chosen)
        return [AuditRecord(**row._mapping) for row in rows]

    async def _first(self, statement: sa.Select[Any]) -> sa.Row[Any] | None:
        return (await self._connection.execute(statement)).first()

    async def _replace(self, table: sa.Table, key: sa.Column[Any], values: dict[str, Any]) -> None:
        changed = await self._connection.execute(sa.update(table).where(key == values[key.name]).values(values))
        if changed.rowcount == 0:
            await self._connection.execute(sa.insert(table).values(values))


def _epoch(row: sa.Row[Any]) -> Epoch:
    parameters = CkksParameters(**json.loads(row.parameters))
    return Epoch(row.number, EpochState(row.state), parameters, row.public_key, row.created_at_ms)


def _secrets(row: sa.Row[Any]) -> SealedSecrets | None:
    if row.sealed_secret_key is None or row.sealed_seed is None:
        return None
    return SealedSecrets(row.sealed_secret_key, row.sealed_seed)


def _grant(row: sa.Row[Any]) -> TokenGrant:
    names = tuple(json.loads(row.server_names))
    return TokenGrant(Role(row.role), row.name, names, row.expires_at_ms, row.key_digest)
