"""Who may call no longer although the certificate is still valid: the key manager's list, asked for regularly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import structlog

from services.common.channel import open_channel
from services.common.clock import Clock
from services.common.identity import Identity
from services.common.keymanager_client import KeyManagerClient
from services.common.tls import IdentityFiles, channel_credentials
from shelora.errors import AgentRevoked, SheLoraError

REFRESH_S: Final = 30.0
"""How long a revocation may take to reach the aggregator while the key manager answers."""

_log = structlog.get_logger(__name__)


class Revocations:
    """The newest known list of revoked identities; empty at first."""

    def __init__(self) -> None:
        self._uris: frozenset[str] = frozenset()

    def replace(self, uris: Iterable[str]) -> None:
        """Take a newer list."""
        self._uris = frozenset(uris)

    def check(self, identity: Identity) -> None:
        """Refuse a revoked identity.

        Raises:
            AgentRevoked: it is on the list.
        """
        if identity.uri in self._uris:
            raise AgentRevoked(
                f"identity: expected one that is in force, got {identity.uri}, which was revoked",
                hint="ask the operator for a new enrolment under another name",
                context={"identity": identity.uri},
            )


async def follow(revocations: Revocations, keymanager: str, files: IdentityFiles, clock: Clock) -> None:
    """Keep the list up to date until cancelled. While the key manager is away the last list stays.

    Args:
        revocations: is told.
        keymanager: the key manager's membership port.
        files: the aggregator's identity; read anew every time, because it is renewed.
        clock: waits.
    """
    while True:
        try:
            revocations.replace(await _ask(keymanager, files))
        except SheLoraError as error:
            _log.warning("list of revoked identities is old", code=error.code, reason=error.message)
        await clock.sleep(REFRESH_S)


async def _ask(keymanager: str, files: IdentityFiles) -> list[str]:
    channel = open_channel(keymanager, channel_credentials(files))
    try:
        return await KeyManagerClient(channel).revocations()
    finally:
        await channel.close()
