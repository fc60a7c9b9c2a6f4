"""The aggregator's use cases, one public method each; the servicer translates, everything is decided here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.aggregator import store, summaries
from services.aggregator.agents import AgentLimits, Agents
from services.aggregator.domain import (
    AgentSummary,
    AgentView,
    Download,
    DownloadRequest,
    Event,
    FederationSpec,
    FederationSummary,
    Registration,
    RoundSummary,
    Terms,
    UploadReceipt,
    UploadStatus,
    UploadTicket,
)
from services.aggregator.downloads import Downloads
from services.aggregator.events import Hub, Presence
from services.aggregator.federations import Operations
from services.aggregator.ledger import Ledger
from services.aggregator.pacing import CONNECTED_AGENTS, Pace
from services.aggregator.plans import widths
from services.aggregator.ports import PayloadChecks
from services.aggregator.store import Connection, StoredFederation
from services.aggregator.uploads import UploadLimits, Uploads
from services.common.blobs import BlobStore
from services.common.clock import Clock
from services.common.database import Database
from services.common.identity import Identity
from services.common.transfer import Piece
from shelora.he.parameters import CkksParameters

_EVENTS_PER_QUERY: Final = 200
_LAST_SEQUENCE: Final = 2**63 - 1


@dataclass(frozen=True)
class ServiceLimits:
    """What the operator of the aggregator allows.

    Attributes:
        agents: about agents.
        uploads: about uploads.
        connected_agents: agents whose view streams stay open, and as many that send or receive payloads.
    """

    agents: AgentLimits = field(default_factory=AgentLimits)
    uploads: UploadLimits = field(default_factory=UploadLimits)
    connected_agents: int = CONNECTED_AGENTS


class AggregatorService:
    """All use cases.

    Args:
        database: migrated to the newest schema.
        blobs: where payloads are.
        checks: decides whether payloads are what the plan says.
        clock: time.
        limits: what the operator allows.

    Attributes:
        ledger: shared with the driver.
        hub: shared with the driver.
        presence: which agents are connected.
        pace: how many may be.
    """

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        checks: PayloadChecks,
        clock: Clock,
        limits: ServiceLimits | None = None,
    ) -> None:
        allowed = limits or ServiceLimits()
        self.hub = Hub(clock)
        self.pace = Pace(allowed.connected_agents)
        self.presence = Presence(clock, self.pace.views)
        self.ledger = Ledger(database, clock, self.hub)
        self._operations = Operations(self.ledger, clock)
        self._agents = Agents(self.ledger, self.hub, self.presence, self.pace, clock, allowed.agents)
        self._uploads = Uploads(self.ledger, blobs, checks, self.hub, self.presence, allowed.uploads)
        self._downloads = Downloads(self.ledger)

    async def close(self) -> None:
        """End all streams and wait for uploads whose bytes are complete."""
        self.hub.close()
        await self._uploads.settled()

    async def create_federation(self, spec: FederationSpec) -> FederationSummary:
        return await self._summary(await self._operations.create(spec))

    async def start_federation(self, federation: str, more_rounds: int = 0) -> FederationSummary:
        return await self._summary(await self._operations.start(federation, more_rounds))

    async def stop_federation(self, federation: str, reason: str) -> FederationSummary:
        return await self._summary(await self._operations.stop(federation, reason))

    async def adopt_epoch(self, federation: str, epoch: int, parameters: CkksParameters) -> FederationSummary:
        return await self._summary(await self._operations.adopt_epoch(federation, epoch, parameters))

    async def list_federations(self) -> list[FederationSummary]:
        return [await self.get_federation(name) for name in await self.ledger.names()]

    async def get_federation(self, federation: str) -> FederationSummary:
        return await self._summary(await self.ledger.read(federation))

    async def list_agents(self, federation: str) -> list[AgentSummary]:
        state = (await self.ledger.read(federation)).state

        async def body(connection: Connection) -> list[AgentSummary]:
            registrations = await store.federations.load_registrations(connection, federation)
            return summaries.agent_summaries(state, registrations, self.presence)

        return await self.ledger.query("list_agents", body)

    async def list_rounds(self, federation: str, after: int = 0, limit: int = 0) -> list[RoundSummary]:
        """Rounds with a greater number, oldest first; at most `limit` unless it is 0."""
        latest = (await self.ledger.read(federation)).state.round
        last = 0 if latest is None else latest.number
        numbers = range(after + 1, last + 1)
        # One by one: all members of all rounds at once would keep everybody waiting.
        return [await self._round(federation, number) for number in (numbers[:limit] if limit else numbers)]

    async def all_columns(self, federation: str) -> int:
        """Columns of all modules together, 0 until an agent has registered."""
        signature = (await self.ledger.glance(federation)).signature
        return 0 if signature is None else sum(widths(signature.shapes))

    async def watch_events(self, federation: str, after: int = 0) -> AsyncIterator[Event]:
        """Events as they happen, from a sequence number on; ends with Draining."""
        last = min(after, _LAST_SEQUENCE)
        while True:
            self.hub.require_open()
            signal = self.hub.signal(federation)
            found = await self._events(federation, last)
            for event in found:
                yield event
                last = event.sequence
            if not found:
                await self.hub.wait(signal, timeout_s=None)

    async def get_terms(self, federation: str) -> Terms:
        return summaries.terms(await self.ledger.read(federation))

    async def register_agent(self, identity: Identity, registration: Registration) -> AgentView:
        return await self._agents.register(identity, registration)

    def watch_view(self, identity: Identity, federation: str) -> AsyncIterator[AgentView]:
        """The agent's view: at once, after every change, every 20 seconds; ends with Draining or `come_back_ms`."""
        return self._agents.watch(identity, federation)

    @contextlib.asynccontextmanager
    async def transfer(self, identity: Identity, federation: str) -> AsyncIterator[None]:
        """A place for an upload or a download, as long as the context is open.

        Raises:
            UnknownFederation: there is none of that name.
            QuotaExceeded: there is no place now; the error says when to try again.
        """
        state = (await self.ledger.glance(federation)).state
        with self.pace.transfer(federation, identity.name, len(state.agents), state.rules):
            yield

    async def get_upload(self, identity: Identity, ticket: UploadTicket) -> UploadStatus:
        return await self._uploads.status(identity, ticket)

    async def upload(
        self,
        identity: Identity,
        ticket: UploadTicket,
        pieces: AsyncIterator[Piece],
        tell: Callable[[int], object] = lambda _staged_bytes: None,
    ) -> UploadReceipt:
        return await self._uploads.upload(identity, ticket, pieces, tell)

    async def open_download(self, identity: Identity, request: DownloadRequest) -> Download:
        return await self._downloads.open(identity, request)

    async def report_round(
        self, identity: Identity, federation: str, number: int, metrics: Mapping[str, float]
    ) -> None:
        await self._agents.report(identity, federation, number, metrics)

    async def leave_round(self, identity: Identity, federation: str, number: int, reason: str) -> None:
        await self._agents.leave(identity, federation, number, reason)

    async def _round(self, federation: str, number: int) -> RoundSummary:
        async def body(connection: Connection) -> RoundSummary:
            return await summaries.round_of(connection, federation, number)

        return await self.ledger.query("summarise_round", body)

    async def _summary(self, stored: StoredFederation) -> FederationSummary:
        async def body(connection: Connection) -> FederationSummary:
            return await summaries.federation_summary(connection, stored)

        return await self.ledger.query("summarise_federation", body)

    async def _events(self, federation: str, after: int) -> list[Event]:
        async def body(connection: Connection) -> list[Event]:
            await store.federations.revision(connection, federation)
            return await store.history.events_after(connection, federation, after, _EVENTS_PER_QUERY)

        return await self.ledger.query("read_events", body)
