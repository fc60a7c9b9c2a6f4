"""Taking payloads in: resumable, idempotent, and counted only once everything is checked and durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

import structlog

from services.aggregator import store
from services.aggregator.admission import PayloadName, admitted, announced, name_of
from services.aggregator.domain import ExpectedPayload, UploadReceipt, UploadStatus, UploadTicket
from services.aggregator.events import Hub, Presence
from services.aggregator.intake import Intake, Staged
from services.aggregator.ledger import Change, Ledger
from services.aggregator.ports import PayloadChecks
from services.aggregator.store import StoredFederation
from services.aggregator.turns import STREAMS, Turn
from services.common.blobs import Blob, BlobStore
from services.common.identity import Identity
from services.common.threads import ended, in_thread, start_in_thread
from services.common.transfer import Piece
from shelora.errors import (
    Conflict,
    ConflictingResend,
    MalformedInput,
    NotFound,
    PayloadTooLarge,
    RankMismatch,
    SheLoraError,
    SizeMismatch,
    WrongState,
)

_log = structlog.get_logger(__name__)

_THREADS: Final = STREAMS + 2
"""One for every stream with a turn and some for those without."""

_REFUSALS = (MalformedInput, WrongState, Conflict, NotFound)
"""Errors after which the payload certainly was not accepted."""


@dataclass(frozen=True)
class UploadLimits:
    """What the operator of the aggregator allows.

    Attributes:
        max_payload_bytes: longest payload, whatever the plan would allow.
    """

    max_payload_bytes: int = 1 << 40


@dataclass(frozen=True)
class _Incoming:
    """One stream that was admitted.

    Attributes:
        name: of the payload.
        ticket: what was announced.
        expected: what the payload has to be.
        lock: of the payload, which other streams may bring as well.
        turn: held from the first byte until the payload is accepted or refused.
    """

    name: PayloadName
    ticket: UploadTicket
    expected: ExpectedPayload
    lock: asyncio.Lock
    turn: Turn


@dataclass
class _Seen:
    """The state under which a stream was last welcome; as long as it is the same one, it is welcome."""

    state: StoredFederation | None = None


class Uploads:
    """Uploads of agents; the agent is the caller's identity."""

    def __init__(
        self,
        ledger: Ledger,
        blobs: BlobStore,
        checks: PayloadChecks,
        hub: Hub,
        presence: Presence,
        limits: UploadLimits,
    ) -> None:
        self._ledger = ledger
        self._blobs = blobs
        self._checks = checks
        self._hub = hub
        self._presence = presence
        self._limits = limits
        self._locks: WeakValueDictionary[PayloadName, asyncio.Lock] = WeakValueDictionary()
        self._turns = asyncio.Semaphore(STREAMS)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="intake")
        self._staged: dict[PayloadName, Staged] = {}
        self._finishing: set[asyncio.Task[UploadReceipt]] = set()

    async def status(self, identity: Identity, ticket: UploadTicket) -> UploadStatus:
        """How far an upload is.

        Raises:
            ConflictingResend: another payload was accepted in its place.
            SheLoraError: it is not welcome now; see `announced` and `admitted`.
        """
        announced(ticket)
        name = name_of(ticket, identity.name)
        expected = await self._welcome(name, ticket)
        if expected is None:
            return UploadStatus(ticket.size_bytes, complete=True)
        async with self._lock(name):
            return UploadStatus(self._staging_of(name, ticket, expected).staging.size_bytes, complete=False)

    async def upload(
        self,
        identity: Identity,
        ticket: UploadTicket,
        pieces: AsyncIterator[Piece],
        tell: Callable[[int], object] = lambda _staged_bytes: None,
    ) -> UploadReceipt:
        """Take one payload in.

        Args:
            identity: the calling agent.
            ticket: names the payload.
            pieces: its bytes from the staged offset on.
            tell: called with the staged offset before the first piece is asked for.

        Returns:
            The receipt, once everything is checked and durable. The same payload again is a duplicate.

        Raises:
            ConflictingResend: another payload was accepted in its place.
            OffsetMismatch: the bytes do not begin where the staged ones end.
            SizeMismatch: fewer bytes came than announced; they stay staged. Or more came.
            ChecksumMismatch: the bytes are not those announced; they are gone.
            PayloadTooLarge: longer than the plan or the operator allows.
            MalformedInput: the payload is not what the plan says.
            SheLoraError: it is not welcome now; see `announced` and `admitted`.
        """
        announced(ticket)
        name = name_of(ticket, identity.name)
        self._presence.touch(ticket.federation, identity.name)
        expected = await self._welcome(name, ticket)
        if expected is None:
            return UploadReceipt(ticket.size_bytes, duplicate=True)
        self._check_size(ticket, expected)
        incoming = _Incoming(name, ticket, expected, self._lock(name), Turn(self._turns))
        finishing: asyncio.Task[UploadReceipt] | None = None
        try:
            if not await self._take(incoming, pieces, tell):
                return UploadReceipt(ticket.size_bytes, duplicate=True)
            # The sender may go away now; what it has sent is finished all the same.
            finishing = asyncio.create_task(self._finish(incoming))
            self._finishing.add(finishing)
            finishing.add_done_callback(self._forget)
            return await asyncio.shield(finishing)
        finally:
            if finishing is None:
                incoming.turn.end()
            else:
                finishing.add_done_callback(lambda _: incoming.turn.end())

    async def settled(self) -> None:
        """Wait until every upload whose bytes are complete is accepted or refused."""
        if self._finishing:
            await asyncio.wait(self._finishing)

    def _lock(self, name: PayloadName) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    async def _welcome(self, name: PayloadName, ticket: UploadTicket) -> ExpectedPayload | None:
        """The same as `_admit` without a transaction, as long as the answer is yes.

        Bytes may then be staged; whether they count is decided by the transaction at their end.
        """
        try:
            return admitted(await self._ledger.glance(name.federation), name, ticket)
        except SheLoraError:
            return await self._admit(name, ticket)

    async def _admit(self, name: PayloadName, ticket: UploadTicket) -> ExpectedPayload | None:
        """What the payload has to be, None when the same one was accepted before."""

        async def body(change: Change) -> ExpectedPayload | None:
            accepted = await self._accepted(change, name, ticket)
            return None if accepted else admitted(change.stored, name, ticket)

        return await self._ledger.change("admit_upload", name.federation, body)

    async def _accepted(self, change: Change, name: PayloadName, ticket: UploadTicket) -> bool:
        """Whether the same payload was accepted before.

        Raises:
            ConflictingResend: another one was.
        """
        if not name.possible(change.stored.state):
            return False
        known = await store.payloads.find(change.connection, name.key)
        if known is None or (known.blob.size_bytes, known.blob.digest) == (ticket.size_bytes, ticket.digest):
            return known is not None
        raise ConflictingResend(
            f"expected the payload that was accepted first ({known.blob.size_bytes} bytes, digest "
            f"{known.blob.digest.hex()[:12]}), got another one ({ticket.size_bytes} bytes, {ticket.digest.hex()[:12]})",
            hint="send the first payload again, byte by byte, or wait for the next round",
            context={"agent": name.agent},
        )

    def _check_size(self, ticket: UploadTicket, expected: ExpectedPayload) -> None:
        limit = min(self._checks.size_limit_bytes(expected), self._limits.max_payload_bytes)
        if ticket.size_bytes > limit:
            raise PayloadTooLarge(
                f"expected at most {limit} bytes of {ticket.kind.value}, got {ticket.size_bytes}",
                hint="check rank and budget against the registration",
            )

    async def _take(self, incoming: _Incoming, pieces: AsyncIterator[Piece], tell: Callable[[int], object]) -> bool:
        """Stage all pieces while others arrive; False when the payload is not wanted any more."""
        name, ticket, turn, seen, iterator = incoming.name, incoming.ticket, incoming.turn, _Seen(), pieces.__aiter__()
        intake = Intake(
            ticket.size_bytes,
            incoming.lock,
            lambda: self._staging_of(name, ticket, incoming.expected),
            lambda: self._still_wanted(name, ticket, seen),
            lambda: turn.held,
            self._threads,
        )
        try:
            await turn.take()
            async with incoming.lock:
                if not await self._still_wanted(name, ticket, seen):
                    return False
                tell(self._staging_of(name, ticket, incoming.expected).staging.size_bytes)
            while (piece := await turn.next(iterator)) is not None:
                if not await intake.put(piece):
                    return False
                del piece
            await turn.take()
            return await intake.end()
        except BaseException:
            await intake.settle()
            raise

    async def _still_wanted(self, name: PayloadName, ticket: UploadTicket, seen: _Seen) -> bool:
        """Whether more bytes make sense; not when another stream with the same payload was faster."""
        self._hub.require_open()
        present = self._ledger.latest(name.federation)
        if present is None or present is not seen.state:
            if await self._welcome(name, ticket) is None:
                return False
            seen.state = present
        return True

    def _staging_of(self, name: PayloadName, ticket: UploadTicket, expected: ExpectedPayload) -> Staged:
        """Staged bytes of this very payload; those of another one by the same name are dropped."""
        staged = self._staged.get(name)
        if staged is not None:
            if staged.digest == ticket.digest:
                return staged
            staged.staging.discard()
        staging = self._blobs.staging(name.staging_id(ticket.digest), ticket.size_bytes)
        staged = self._staged[name] = Staged(ticket.digest, staging, self._checks.arriving(expected))
        return staged

    async def _finish(self, incoming: _Incoming) -> UploadReceipt:
        name, ticket, expected = incoming.name, incoming.ticket, incoming.expected
        async with incoming.lock:
            if not await self._still_wanted(name, ticket, _Seen()):
                return UploadReceipt(ticket.size_bytes, duplicate=True)
            staged = self._staging_of(name, ticket, expected)
            staging = staged.staging
            if staging.size_bytes < ticket.size_bytes:
                raise SizeMismatch(
                    f"expected {ticket.size_bytes} bytes, got {staging.size_bytes} so far",
                    hint=f"continue at offset {staging.size_bytes}",
                    context={"staged_bytes": str(staging.size_bytes)},
                )
            await self._check(incoming, staged)
            blob = await staging.commit(name.blob_key(ticket.digest), ticket.size_bytes, ticket.digest)
            self._staged.pop(name, None)
            try:
                if not await self._accept(name, ticket, expected, blob):
                    return UploadReceipt(blob.size_bytes, duplicate=True)
            except _REFUSALS:
                await in_thread(self._blobs.delete, blob.key)
                raise
            _log.info("upload accepted", federation=name.federation, agent=name.agent, kind=name.kind.value)
            return UploadReceipt(blob.size_bytes, duplicate=False)

    async def _check(self, incoming: _Incoming, staged: Staged) -> None:
        """Refuse bytes that are not what was announced and planned; while they are read, the disk takes them."""
        staging, good_bytes, syncing = staged.staging, staged.arriving.good_bytes, None
        await staging.verify(incoming.ticket.size_bytes, incoming.ticket.digest)
        if good_bytes < incoming.ticket.size_bytes:
            syncing = start_in_thread(staging.sync)
        try:
            await self._checks.check(staging.path, incoming.expected, good_bytes)
        except _REFUSALS:
            staging.discard()
            self._staged.pop(incoming.name, None)
            raise
        finally:
            if syncing is not None:
                await ended(syncing)

    async def _accept(self, name: PayloadName, ticket: UploadTicket, expected: ExpectedPayload, blob: Blob) -> bool:
        """Record the payload; False when it was recorded before, by a try whose outcome nobody learned."""

        async def body(change: Change) -> bool:
            if await self._accepted(change, name, ticket):
                return False
            if admitted(change.stored, name, ticket) != expected:
                raise RankMismatch(
                    "expected the registration under which the upload began, got another one",
                    hint="send the payload again",
                    context={"agent": name.agent},
                )
            change.emit(name.event(ticket))
            await store.payloads.record(change.connection, name.key, blob, change.now_ms)
            if ticket.metrics:
                await store.history.put_figures(
                    change.connection, name.federation, name.round, name.agent, store.history.UPLOAD, ticket.metrics
                )
            return True

        return await self._ledger.change("accept_upload", name.federation, body)

    def _forget(self, task: asyncio.Task[UploadReceipt]) -> None:
        self._finishing.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Retrieved here, so that an upload whose sender went away does not warn; the sender gets it otherwise.
            _log.info("upload refused", error=type(task.exception()).__name__)
