"""The one way in: who may do what, and a record of every refusal."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final, TypeVar

from services.common.identity import Identity, Role
from services.keymanager.audit import LOCAL, AuditLog
from services.keymanager.store import Records, Store
from shelora.errors import (
    AccessDenied,
    AgentRevoked,
    Conflict,
    MalformedInput,
    NotAuthenticated,
    NotFound,
    RoleDenied,
    WrongState,
)

Result = TypeVar("Result")
Actor = Identity | None
"""Who asks: a member, or None for the command line on the key manager's own host, which may do everything."""

ANY_ROLE: Final = tuple(Role)
REFUSALS: Final = (MalformedInput, NotFound, Conflict, WrongState, AccessDenied, NotAuthenticated)
"""Errors that mean "no"; the others mean that nobody could decide."""


def actor_name(actor: Actor) -> str:
    """The actor as the audit log names it."""
    return LOCAL if actor is None else actor.uri


class Gate:
    """Decides on calls.

    Args:
        store: knows who is revoked.
        audit: where refusals go.
        federation: the only one whose members are let in.
    """

    def __init__(self, store: Store, audit: AuditLog, federation: str) -> None:
        self._store = store
        self._audit = audit
        self._federation = federation

    async def decide(
        self,
        actor: Actor,
        action: str,
        subject: str,
        roles: Sequence[Role],
        body: Callable[[Records], Awaitable[Result]],
    ) -> Result:
        """Check federation, role and revocation, then run the body, all in one transaction.

        Args:
            actor: who asks.
            action: constant name, for the transaction and the record of a refusal.
            subject: on what, for the record of a refusal.
            roles: who may.
            body: does it; as for Store.run_tx.
        """

        async def checked(records: Records) -> Result:
            if actor is not None:
                self._admit(actor, roles)
                await refuse_revoked(records, actor)
            return await body(records)

        async with self.refusals_recorded(actor_name(actor), f"{action} {subject}"):
            return await self._store.run_tx(action, checked)

    @contextlib.asynccontextmanager
    async def refusals_recorded(self, actor: str, what: str) -> AsyncIterator[None]:
        """Write a record for every refusal that leaves the block."""
        try:
            yield
        except REFUSALS as error:
            await self._audit.deny(actor, what, error)
            raise

    def _admit(self, actor: Identity, roles: Sequence[Role]) -> None:
        if actor.federation != self._federation:
            raise RoleDenied(
                f"federation: expected {self._federation}, got {actor.federation}",
                hint="use an identity that was enrolled in this federation",
                context={"identity": actor.uri},
            )
        if actor.role not in roles:
            raise RoleDenied(
                f"role: expected {' or '.join(role.value for role in roles)}, got {actor.role.value}",
                hint="use an identity that was enrolled for this role",
                context={"identity": actor.uri},
            )


async def refuse_revoked(records: Records, identity: Identity) -> None:
    """Raise AgentRevoked if the identity is revoked."""
    revocation = await records.revocation(identity)
    if revocation is not None:
        raise AgentRevoked(
            f"identity: expected one that is not revoked, got {identity.uri}, revoked with epoch {revocation.epoch}",
            hint="a revoked name stays barred: enrol under another name if that was intended",
            context={"identity": identity.uri},
        )
