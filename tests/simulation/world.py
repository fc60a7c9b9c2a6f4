"""A whole aggregator on a fake clock, simulated agents around it, and the checks that hold after every operation."""

from __future__ import annotations

import asyncio
import functools
import shutil
import tempfile
import zlib
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import anyio.to_thread

from services.aggregator.compute import LocalCompute
from services.aggregator.domain import (
    AgentView,
    Download,
    DownloadRequest,
    FederationSpec,
    PayloadKind,
)
from services.aggregator.driver import Driver, DriverOptions
from services.aggregator.payloads import UploadChecks
from services.aggregator.service import AggregatorService
from services.aggregator.store import MIGRATIONS, payloads
from services.common.database import migrate
from services.common.digests import digest_of
from services.common.threads import WorkerPool
from services.common.transfer import Piece
from shelora.errors import ConflictingResend, MalformedInput, SheLoraError
from shelora.plan import Negotiation
from shelora.rounds import AgentTask, Federation, RoundPhase
from simulation.devices import CAP, FEDERATION, PARAMETERS, PROFILES, Device, Payload
from simulation.evidence import check_average, check_sum
from simulation.mortal import Fate, Killed, MortalBlobs, MortalCompute, MortalDatabase
from support.clock import FakeClock

PIECES = 3
GATHER_S, NEGOTIATE_S, TRAIN_S, CIPHER_S = 60, 70, 80, 90
_ROUND_KINDS = (PayloadKind.FACTORS, PayloadKind.CIPHER)


def make_spec(**changes) -> FederationSpec:
    spec = FederationSpec(
        federation=FEDERATION,
        rounds=2,
        target_agents=3,
        quorum=2,
        epoch=1,
        parameters=PARAMETERS,
        negotiation=Negotiation.ENCRYPTED,
        gather_timeout_s=GATHER_S,
        negotiate_timeout_s=NEGOTIATE_S,
        train_timeout_s=TRAIN_S,
        cipher_timeout_s=CIPHER_S,
        basis_cap=CAP,
        max_abandoned=20,
    )
    return replace(spec, **changes)


@functools.cache
def _migrated_database() -> bytes:
    """An empty database with the newest schema."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.db"
        migrate(f"sqlite:///{path}", MIGRATIONS)
        return path.read_bytes()


class World:
    """The aggregator's process, its disk, and the agents.

    Attributes:
        fate: decides where the process dies.
        clock: moves on request only.
        devices: the agents.
        deaths: how often the process died.
        verified: published rounds whose sums were checked.
    """

    def __init__(
        self, folder: Path, spec: FederationSpec, options: DriverOptions | None = None, url: str | None = None
    ) -> None:
        self.folder = folder
        self.url = url or f"sqlite:///{folder / 'state.db'}"
        self.spec = spec
        self.options = options or DriverOptions(resume_grace_s=5)
        self.clock = FakeClock()
        self.devices = [Device(index, *profile) for index, profile in enumerate(PROFILES)]
        self.fate = Fate()
        self.deaths = 0
        self.verified: set[int] = set()
        self._acknowledged: set[tuple[int, PayloadKind, int]] = set()
        self._sent: set[tuple[int, PayloadKind, int]] = set()

    async def __aenter__(self) -> World:
        if self.url.startswith("sqlite"):
            empty = await anyio.to_thread.run_sync(_migrated_database)
            (self.folder / "state.db").write_bytes(empty)
        else:
            await anyio.to_thread.run_sync(migrate, self.url, MIGRATIONS)
        await self._open()
        await self.service.create_federation(self.spec)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.database.close()

    async def _open(self) -> None:
        """Start a process on whatever is on the disk."""
        self.fate = Fate()
        self.database = MortalDatabase(self.url, self.fate)
        self.blobs = MortalBlobs(self.folder / "blobs", self.fate)
        pool = WorkerPool(1)
        self.service = AggregatorService(self.database, self.blobs, UploadChecks(pool), self.clock)
        compute = MortalCompute(LocalCompute(self.blobs, pool), self.fate)
        ledger, hub = self.service.ledger, self.service.hub
        self.driver = Driver(ledger, hub, self.blobs, compute, self.clock, self.options)
        await self.driver.recover()

    async def survive(self, operation: Awaitable[object]) -> None:
        """Run an operation; if the process dies in it, start the next one on the same disk."""
        try:
            await operation
        except Killed:
            self.deaths += 1
            await self.database.close()
            await self._open()

    async def restart(self) -> None:
        """End the process in order and start the next one: it must stand exactly where the last one stood."""
        before = (await self.service.ledger.read(FEDERATION)).state
        await self.service.close()
        await self.database.close()
        await self._open()
        after = (await self.service.ledger.read(FEDERATION)).state
        assert _without_deadlines(after) == _without_deadlines(before)
        assert after.next_deadline_ms >= before.next_deadline_ms

    async def register(self, device: Device) -> None:
        await self.service.register_agent(device.identity, device.registration())

    async def view(self, device: Device) -> AgentView:
        async with aclosing(self.service.watch_view(device.identity, FEDERATION)) as views:  # type: ignore[type-var]
            async for view in views:
                return view
        raise AssertionError("a view stream begins with a view")

    async def wanted(self, device: Device) -> Payload | None:
        """What the agent should send now."""
        view = await self.view(device)
        projection = None
        if view.task is AgentTask.CIPHER:
            request = DownloadRequest(FEDERATION, PayloadKind.PROJECTION, view.round)
            projection = await self.service.open_download(device.identity, request)
        return device.payload(view, projection)

    async def act(self, device: Device) -> bool:
        """Do what the view says, continuing a cut upload where it ends; whether there was anything to do."""
        payload = await self.wanted(device)
        if payload is None:
            return False
        status = await self.service.get_upload(device.identity, payload.ticket)
        assert not status.complete
        await self.send(device, payload, status.staged_bytes)
        return True

    async def send(self, device: Device, payload: Payload, offset: int = 0) -> bool:
        """Upload from an offset on; whether it was a duplicate."""
        name = (device.index, payload.ticket.kind, payload.ticket.round or payload.ticket.plan_version)
        self._sent.add(name)
        receipt = await self.service.upload(device.identity, payload.ticket, _pieces(payload.data, offset))
        assert receipt.accepted_bytes == len(payload.data)
        assert receipt.duplicate or name not in self._acknowledged
        self._acknowledged.add(name)
        return receipt.duplicate

    async def cut(self, device: Device) -> None:
        """Begin an upload and lose the connection in the middle: what came stays staged, nothing counts."""
        payload = await self.wanted(device)
        if payload is None or len(payload.data) < PIECES:
            return
        before = (await self.service.get_upload(device.identity, payload.ticket)).staged_bytes
        if before == len(payload.data):
            return  # Everything had come when the connection was lost before; one more call is all that is missing.
        half = max(before, len(payload.data) // 2)
        try:
            await self.service.upload(device.identity, payload.ticket, _pieces(payload.data[:half], before))
        except MalformedInput:
            staged = (await self.service.get_upload(device.identity, payload.ticket)).staged_bytes
            assert staged == half
        else:
            raise AssertionError("half a payload was accepted")

    async def lose_response(self, device: Device) -> None:
        """Send everything and go away before the answer."""
        payload = await self.wanted(device)
        if payload is None:
            return
        name = (device.index, payload.ticket.kind, payload.ticket.round or payload.ticket.plan_version)
        self._sent.add(name)
        offset = (await self.service.get_upload(device.identity, payload.ticket)).staged_bytes
        gone = asyncio.Event()

        async def pieces() -> AsyncIterator[Piece]:
            async for part in _pieces(payload.data, offset):
                yield part
            gone.set()

        upload = asyncio.create_task(self.service.upload(device.identity, payload.ticket, pieces()))
        watch = asyncio.create_task(gone.wait())
        await asyncio.wait({upload, watch}, return_when=asyncio.FIRST_COMPLETED)
        watch.cancel()
        upload.cancel()
        await asyncio.wait({upload})
        await self.service.close()
        if self.fate.dead:
            raise Killed
        await self.restart()

    async def resend(self, device: Device) -> None:
        """Send everything again that was ever acknowledged: each is a duplicate, now and for ever."""
        for (kind, number), payload in device.payloads.items():
            if (device.index, kind, number) in self._acknowledged:
                assert await self.send(device, payload)
                status = await self.service.get_upload(device.identity, payload.ticket)
                assert status.complete

    async def forge(self, device: Device) -> None:
        """Send something else in place of what was acknowledged."""
        for (kind, number), payload in list(device.payloads.items()):
            if (device.index, kind, number) in self._acknowledged:
                data = payload.data[::-1] + b"\0"
                ticket = replace(payload.ticket, size_bytes=len(data), digest=digest_of(data))
                await _refused(self.service.upload(device.identity, ticket, _pieces(data, 0)), ConflictingResend)

    async def send_garbage(self, device: Device) -> None:
        """Send bytes that are not what they say: refused, and the round is not disturbed."""
        payload = await self.wanted(device)
        if payload is None or not payload.data:
            return
        before = (await self.service.ledger.read(FEDERATION)).state
        data = b"\xff" * len(payload.data)
        ticket = replace(payload.ticket, digest=digest_of(data))
        await _refused(self.service.upload(device.identity, ticket, _pieces(data, 0)), MalformedInput)
        wrong_digest = replace(payload.ticket, digest=bytes(32))
        await _refused(self.service.upload(device.identity, wrong_digest, _pieces(data, 0)), MalformedInput)
        assert (await self.service.ledger.read(FEDERATION)).state == before

    async def leave(self, device: Device) -> None:
        view = await self.view(device)
        if view.round:
            await self.service.leave_round(device.identity, FEDERATION, view.round, "battery low")

    async def work(self) -> None:
        """Let the driver do everything there is to do without time passing."""
        while await self.driver.advance(FEDERATION) == 0.0 or await self.driver.tick(FEDERATION) == 0.0:
            pass

    async def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.work()

    async def finish(self) -> None:
        """All agents are willing and nobody dies: the federation must come to its end."""
        self.fate.dies_at = None
        for device in self.devices:
            await _unless_refused(self.register(device))
        await _unless_refused(self.service.start_federation(FEDERATION))
        for _ in range(200):
            await self.work()
            if (await self.service.ledger.read(FEDERATION)).state.ended:
                break
            acted = [await _acted(self.act(device)) for device in self.devices]
            if not any(acted):
                await self.wait(100)
        assert (await self.service.ledger.read(FEDERATION)).state.ended
        await self.check()
        await self._check_disk()

    async def check(self) -> None:
        """What holds whenever nobody is in the middle of something."""
        stored = await self.service.ledger.read(FEDERATION)
        self._check_acknowledged(stored.state)
        await self._check_events(stored.next_sequence - 1)
        registered = next((device for device in self.devices if device.name in stored.state.agents), None)
        summaries = await self.service.list_rounds(FEDERATION)
        assert [summary.number for summary in summaries] == list(range(1, len(summaries) + 1))
        for summary in summaries:
            if summary.phase is RoundPhase.PUBLISHED and summary.number not in self.verified:
                assert registered is not None
                await self._verify(registered, summary.number)
                self.verified.add(summary.number)

    def _check_acknowledged(self, state: Federation) -> None:
        """Nothing that was acknowledged is lost."""
        live = state.live_round
        negotiation = state.negotiation
        for index, kind, number in self._acknowledged:
            agent = self.devices[index].name
            if live is not None and number == live.number and kind in _ROUND_KINDS:
                member = live.members[agent]
                assert member.uploaded if kind is PayloadKind.FACTORS else member.complete
            if negotiation is not None and number == negotiation[0].version and kind not in _ROUND_KINDS:
                assert agent in negotiation[1].received

    async def _check_events(self, last: int) -> None:
        sequences = []
        async with aclosing(self.service.watch_events(FEDERATION)) as events:  # type: ignore[type-var]
            async for event in events:
                sequences.append(event.sequence)
                if event.sequence == last:
                    break
        assert sequences == list(range(1, last + 1))

    async def _verify(self, reader: Device, number: int) -> None:
        """The published sum is exactly that of the members that count, each once; so is the plain part."""
        total = await self.fetch(reader, PayloadKind.CIPHER, number)
        average = await self.fetch(reader, PayloadKind.AVERAGE, number)
        counted = [self._device(member.agent) for member in total.cohort if member.counted]
        names = {(device.index, PayloadKind.CIPHER, number) for device in counted}
        acknowledged = {name for name in self._acknowledged if name[1:] == (PayloadKind.CIPHER, number)}
        assert acknowledged <= names <= self._sent
        assert len(counted) >= self.spec.quorum

        check_sum(self.blobs.path(total.blob.key).read_bytes(), self.devices, counted, number)
        examples = sum(member.examples for member in total.cohort)
        weights = {device.name: device.examples / examples for device in counted}
        assert total.total_weight == average.total_weight == sum(weights[device.name] for device in counted)
        check_average(self.blobs.path(average.blob.key).read_bytes(), counted, weights, number)

    async def fetch(self, reader: Device, kind: PayloadKind, number: int) -> Download:
        download = await self.service.open_download(reader.identity, DownloadRequest(FEDERATION, kind, number))
        await self.blobs.verify(download.blob)
        return download

    async def _check_disk(self) -> None:
        """Every byte on the disk has a name, and of what is over only what late readers need is left."""
        named = await self.service.ledger.query("present_keys", payloads.present_keys)
        assert set(self.blobs.keys()) == named
        over = ("/factors/", "/cipher/", "/sensitivity/", "/votes/", "/basis", "/projection-")
        assert not [key for key in named if any(part in key for part in over)]
        assert not list((self.folder / "blobs" / "staging").iterdir())

    def _device(self, name: str) -> Device:
        return next(device for device in self.devices if device.name == name)


def temporary_folder() -> Path:
    """A folder in memory where there is one: what a dead process wrote is seen by the next one there, too."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="shelora-simulation-", dir=memory if memory.is_dir() else None))


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def piece(offset: int, data: bytes) -> Piece:
    """Some bytes with the checksum that they are sent with."""
    return Piece(offset, data, zlib.crc32(data))


async def _pieces(data: bytes, offset: int) -> AsyncIterator[Piece]:
    size = max(1, -(-len(data) // PIECES))
    while offset < len(data):
        yield piece(offset, data[offset : offset + size])
        offset += size


async def _refused(call: Awaitable[object], *errors: type[SheLoraError]) -> None:
    try:
        await call
    except errors:
        return
    raise AssertionError(f"expected one of {errors}")


async def _unless_refused(call: Awaitable[object]) -> None:
    try:
        await call
    except SheLoraError:
        return


async def _acted(call: Awaitable[bool]) -> bool:
    """An agent may lose the race against the state; it looks again then."""
    try:
        return await call
    except SheLoraError:
        return False


def _without_deadlines(state: Federation) -> Federation:
    round_ = None if state.round is None else replace(state.round, deadline_ms=0)
    return replace(state, deadline_ms=0, round=round_)
