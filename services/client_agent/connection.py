"""The agent's side of both services: every RPC it makes, with retries, over mutual TLS that renews itself."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import structlog

from services.client_agent.codec import (
    KIND_TO_WIRE,
    received_from_proto,
    registration_to_proto,
    terms_from_proto,
    upload_to_proto,
    view_from_proto,
)
from services.client_agent.config import AgentConfig
from services.client_agent.domain import PayloadKind, Received, Registration, Terms, Upload, View
from services.client_agent.link import Link
from services.client_agent.progress import Report
from services.client_agent.state import AgentState
from services.common.channel import call, open_channel, receive_stream, send_stream
from services.common.clock import Clock
from services.common.enrolment import Enrolment, ensure_identity, renew_forever
from services.common.keymanager_client import FetchedEpoch, KeyManagerClient
from services.common.retry import retrying
from services.common.tls import IdentityFiles, channel_credentials
from services.common.transfer import STAGED_BYTES, Piece, payload_header, pieces, receive, received_bytes
from services.common.versions import check_peer_version
from shelora.errors import (
    ChecksumMismatch,
    InvalidConfiguration,
    MalformedPayload,
    PeerUnreachable,
    SheLoraError,
    SizeMismatch,
)
from shelora.v1 import aggregator_pb2

log = structlog.get_logger(__name__)
T = TypeVar("T")

_CALL_TIMEOUT_S = 30.0
_SILENCE_S = 60.0
_LONGEST_WAIT_S = 5.0
_LONGEST_ABSENCE_S = 600.0
_OFFSET_DIGITS = 20


class Connection:
    """The calls of one agent. Use as an async context manager; it renews the certificate while open.

    Transient failures of uploads, downloads and reports are retried until the caller cancels; the other calls raise.
    """

    def __init__(
        self,
        federation: str,
        aggregator: str,
        keymanager: str,
        files: IdentityFiles,
        clock: Clock,
        on_error: Callable[[SheLoraError], None] = lambda _error: None,
    ) -> None:
        """Addresses are host:port; `files` is a complete identity; `on_error` is told of failures that are retried."""
        self._on_error = on_error
        self._name = files.identity().name
        self._federation = federation
        self._aggregator = aggregator
        self._keymanager = keymanager
        self._files = files
        self._clock = clock
        self._rng = random.Random()  # noqa: S311  # spreads retries, protects nothing
        self._link = Link(aggregator, files)
        self._renewal: asyncio.Task[None] | None = None
        self._refused: SheLoraError | None = None

    @property
    def name(self) -> str:
        """The agent's name in its certificate."""
        return self._name

    async def __aenter__(self) -> Connection:
        """Begin renewing the certificate."""
        self._renewal = asyncio.ensure_future(self._renew())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing and close the channel."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
        await self._link.close()

    async def fetch_epoch(self, number: int, hpke_public_key: bytes) -> FetchedEpoch:
        """A key epoch with its sealed secrets, over a connection of its own: an agent asks once an epoch."""
        async with open_channel(self._keymanager, channel_credentials(self._files)) as channel:
            return await KeyManagerClient(channel).fetch_epoch(number, hpke_public_key)

    async def terms(self) -> Terms:
        """Key epoch in force and basis cap of the federation."""
        request = aggregator_pb2.GetTermsRequest(federation=self._federation)
        async with self._link.used() as rounds:
            answer = await call(rounds.GetTerms, request, timeout_s=_CALL_TIMEOUT_S)
        check_peer_version(answer.version)
        return terms_from_proto(answer)

    async def register(self, registration: Registration) -> View:
        """Register or register again."""
        request = registration_to_proto(self._federation, registration)
        async with self._link.used() as rounds:
            answer = await call(rounds.RegisterAgent, request, timeout_s=_CALL_TIMEOUT_S)
        check_peer_version(answer.version)
        return view_from_proto(answer.view)

    async def watch(self) -> AsyncGenerator[View, None]:
        """The agent's view now and after every change, across renewals of the certificate.

        An aggregator with more agents than it keeps connected ends the stream and says when to ask again.

        Raises:
            PeerUnreachable: the stream broke or was silent for a minute.
            AgentRevoked, RoleDenied: the key manager renews this agent's certificate no more.
        """
        request = aggregator_pb2.WatchFederationRequest(federation=self._federation)
        while True:
            link = self._link
            async with link.used() as rounds:
                stream = receive_stream(rounds.WatchFederation, request, timeout_s=None)
                come_back_s = 0.0
                try:
                    while not come_back_s and (message := await _next(stream, link.retired)) is not None:
                        view = view_from_proto(message.view)
                        come_back_s = min(view.come_back_ms / 1000, _LONGEST_ABSENCE_S)
                        link.lasting = not come_back_s
                        yield view
                finally:
                    await stream.aclose()
            if come_back_s:
                await self._stay_away(come_back_s, link)
            if self._refused is not None:
                raise self._refused
            if not come_back_s and not link.retired.is_set():
                return

    async def _stay_away(self, seconds: float, link: Link) -> None:
        """Wait for that long, or until the certificate is another one or will be renewed no more."""
        waits = {asyncio.ensure_future(self._clock.sleep(seconds)), asyncio.ensure_future(link.retired.wait())}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def upload(self, upload: Upload, report: Report) -> int:
        """Send a payload to the end, resuming where it stopped; returns its bytes."""
        if upload.digest:
            payload = payload_header(upload.path, upload.digest)
        else:
            payload = await asyncio.to_thread(payload_header, upload.path)
        header = upload_to_proto(self._federation, upload, payload)

        async def attempt() -> None:
            requests = UploadRequests(header, upload.path, report)
            async with self._link.rounds_for(payload.size_bytes) as rounds:
                await send_stream(rounds.Upload, requests, timeout_s=None, asked=requests.continue_at)

        await self._retrying(attempt)
        report(1.0, "")
        return int(payload.size_bytes)

    async def download(
        self, kind: PayloadKind, path: Path, report: Report, *, round_number: int = 0, plan_version: int = 0
    ) -> Received:
        """Fetch and verify a payload into a file, resuming a partial one."""

        async def attempt() -> Received:
            offset = received_bytes(path)
            request = aggregator_pb2.DownloadRequest(
                federation=self._federation,
                round=round_number,
                plan_version=plan_version,
                kind=KIND_TO_WIRE[kind],
                offset=offset,
            )
            async with self._link.used() as rounds:
                stream = receive_stream(rounds.Download, request, timeout_s=None)
                try:
                    return await self._receive(stream, path, offset, report)
                except (SizeMismatch, ChecksumMismatch) as error:
                    raise PeerUnreachable(f"a download broke off: {error.message}", hint=error.hint) from error
                finally:
                    await stream.aclose()

        return await self._retrying(attempt)

    async def report_round(self, round_number: int, metrics: Mapping[str, float]) -> None:
        """Report figures."""
        request = aggregator_pb2.ReportRoundRequest(
            federation=self._federation, round=round_number, metrics=dict(metrics)
        )

        async def attempt() -> None:
            async with self._link.used() as rounds:
                await call(rounds.ReportRound, request, timeout_s=_CALL_TIMEOUT_S)

        await self._retrying(attempt)

    async def leave_round(self, round_number: int, reason: str) -> None:
        """Give up a round."""
        request = aggregator_pb2.LeaveRoundRequest(federation=self._federation, round=round_number, reason=reason[:200])
        async with self._link.used() as rounds:
            await call(rounds.LeaveRound, request, timeout_s=_CALL_TIMEOUT_S)

    async def _receive(self, stream: AsyncIterator[Any], path: Path, offset: int, report: Report) -> Received:
        """Header and chunks of one download into a file."""
        first = await _next(stream, None)
        if first is None:
            raise PeerUnreachable("a download ended before its header")
        if not isinstance(first, aggregator_pb2.DownloadHeader):
            raise MalformedPayload("a download begins without a header", hint="compare both software versions")
        await receive(self._downloaded(stream, first.payload.size_bytes, report), path, first.payload, offset)
        return received_from_proto(first, path)

    async def _downloaded(self, stream: AsyncIterator[Any], size_bytes: int, report: Report) -> AsyncIterator[Piece]:
        async for piece in stream:
            if not isinstance(piece, Piece):
                raise MalformedPayload(
                    "a download brings something else than chunks after its header",
                    hint="compare both software versions",
                )
            yield piece
            report((piece.offset + len(piece.data)) / max(1, size_bytes), "")

    async def _retrying(self, attempt: Callable[[], Awaitable[T]]) -> T:
        return await retrying(
            attempt,
            clock=self._clock,
            rng=self._rng,
            longest_wait_s=_LONGEST_WAIT_S,
            on_retry=lambda error, _wait_s: self._on_error(error),
        )

    async def _renew(self) -> None:
        """Keep the certificate fresh; a refusal ends the view stream, which tells it."""
        try:
            await renew_forever(self._files, self._keymanager, self._clock, on_renewed=self._reopen)
        except SheLoraError as error:
            log.error("certificate cannot be renewed", code=error.code, reason=error.message)
            self._refused = error
            self._link.retired.set()

    async def _reopen(self) -> None:
        """Use the renewed certificate from now on; calls in flight finish on the old channel."""
        old, self._link = self._link, Link(self._aggregator, self._files)
        log.info("certificate renewed, channel reopened")
        await old.retire()


class UploadRequests:
    """The messages of one upload; where its chunks begin is told after the header."""

    def __init__(self, header: aggregator_pb2.UploadHeader, path: Path, report: Report) -> None:
        self._header = header
        self._path = path
        self._report = report
        self._offset = 0

    def continue_at(self, metadata: Mapping[str, Any]) -> None:
        """The aggregator asks for the chunks.

        Raises:
            MalformedPayload: it does not name an offset.
        """
        text = str(metadata.get(STAGED_BYTES, "0"))
        if not text.isdecimal() or len(text) > _OFFSET_DIGITS:
            raise MalformedPayload(
                f"upload: expected an offset in bytes to begin at, got {text[:_OFFSET_DIGITS]!r}",
                hint="compare both software versions",
            )
        self._offset = int(text)

    async def __aiter__(self) -> AsyncIterator[aggregator_pb2.UploadRequest | Piece]:
        yield aggregator_pb2.UploadRequest(header=self._header)
        size = max(1, self._header.payload.size_bytes)
        for piece in pieces(self._path, self._offset):
            yield piece
            self._report((piece.offset + len(piece.data)) / size, "")


async def _next(stream: AsyncIterator[Any], ended: asyncio.Event | None) -> Any:
    """The next message, None at the end of the stream or once the event is set.

    Raises: PeerUnreachable after a long silence, or when the stream broke.
    """
    arriving = asyncio.ensure_future(_anext(stream))
    waiting = {arriving, asyncio.ensure_future(ended.wait())} if ended is not None else {arriving}
    try:
        done, _ = await asyncio.wait(waiting, timeout=_SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if arriving in done:
            return arriving.result()
        if done:
            return None
        raise PeerUnreachable(
            f"the aggregator was silent for {_SILENCE_S:.0f} s", hint="check the network; the agent reconnects"
        )
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _anext(stream: AsyncIterator[Any]) -> Any:
    async for message in stream:
        return message
    return None


async def connect(
    config: AgentConfig,
    state: AgentState,
    clock: Clock,
    on_error: Callable[[SheLoraError], None] = lambda _error: None,
) -> Connection:
    """Enrol if needed and make the connection; `on_error` is told of failures that are retried.

    Raises:
        InvalidConfiguration: no key manager address anywhere, or the certificate is for another federation.
        InvalidToken, AgentRevoked: the key manager refuses this device.
        PeerUnreachable: not enrolled yet and the key manager does not answer.
    """
    files = await ensure_identity(state.identity, config.enrolment_file, clock, on_error=on_error)
    keymanager = config.keymanager
    if keymanager is None:
        if config.enrolment_file is None or not config.enrolment_file.exists():
            raise InvalidConfiguration(
                "no key manager address: neither `keymanager` nor a readable `enrolment_file` is configured",
                hint="add keymanager: host:port to the agent's configuration",
            )
        keymanager = Enrolment.load(config.enrolment_file).keymanager
    identity = files.identity()
    if identity.federation != config.federation:
        raise InvalidConfiguration(
            f"the certificate in {state.identity} is for federation {identity.federation!r}, "
            f"the configuration says {config.federation!r}",
            hint="use another state_dir or correct the configuration",
        )
    return Connection(config.federation, config.aggregator, keymanager, files, clock, on_error)
