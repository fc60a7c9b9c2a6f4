"""An operator's connection to a federation's two services."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import structlog

from services.common.channel import open_channel
from services.common.clock import Clock
from services.common.enrolment import RENEW_AT, Enrolment, ensure_identity, renew_identity
from services.common.identity import Identity, Role
from services.common.keymanager_client import FetchedEpoch, KeyManagerClient
from services.common.tls import IdentityFiles, channel_credentials
from services.operators.client import FederationClient
from services.operators.profile import OperatorProfile
from shelora.errors import Unavailable

ENROL_PATIENCE_S: Final = 20.0
"""How long a command tries to enrol before it says that the key manager cannot be reached."""

_logger = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Session:
    """Calls under the operator's certificate.

    Attributes:
        profile: what the operator works on.
        federations: the aggregator.
        keys: the key manager.
    """

    profile: OperatorProfile
    federations: FederationClient
    keys: KeyManagerClient

    async def issue(self, role: Role, name: str, ttl_s: int, server_names: tuple[str, ...]) -> tuple[Enrolment, int]:
        """Make a one-time token and the enrolment file's content for a new member.

        Returns:
            The enrolment and the end of the token's validity in milliseconds since the Unix epoch.
        """
        identity = Identity(self.profile.federation, role, name)
        token = await self.keys.create_token(role, name, ttl_s, server_names)
        return Enrolment.around(token, identity), token.expires_at_ms

    async def epoch(self, number: int) -> FetchedEpoch:
        """The public side of an epoch; 0 for the current one."""
        return await self.keys.fetch_epoch(number)


@contextlib.asynccontextmanager
async def connect(
    profile: OperatorProfile, clock: Clock, *, patience_s: float = ENROL_PATIENCE_S
) -> AsyncIterator[Session]:
    """Enrol if needed, renew if due, and open both channels; they connect at the first call.

    Raises:
        SheLoraError: the operator has no usable identity.
    """
    files = await ensure_identity(profile.identity_dir, profile.enrolment_file, clock, give_up_after_s=patience_s)
    await _renew_if_due(files, profile, clock)
    credentials = channel_credentials(files)
    aggregator = open_channel(profile.aggregator, credentials)
    keymanager = open_channel(profile.keymanager_address(), credentials)
    try:
        yield Session(profile, FederationClient(aggregator), KeyManagerClient(keymanager))
    finally:
        await aggregator.close()
        await keymanager.close()


async def _renew_if_due(files: IdentityFiles, profile: OperatorProfile, clock: Clock) -> None:
    begin_ms, end_ms = files.validity_ms()
    if clock.now_ms() < begin_ms + (end_ms - begin_ms) * RENEW_AT:
        return
    try:
        await renew_identity(files, profile.keymanager_address(), clock)
    except Unavailable as error:
        _logger.warning("certificate not renewed, the old one is still valid", code=error.code)
