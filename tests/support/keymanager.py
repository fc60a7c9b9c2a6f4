"""A real key manager for tests: real database, real CKKS keys, and real TLS where a test asks for servers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from services.common.channel import open_channel
from services.common.clock import Clock, SystemClock
from services.common.database import Database
from services.common.enrolment import Enrolment, ensure_identity
from services.common.identity import Identity, Role
from services.common.keymanager_client import KeyManagerClient
from services.common.tls import IdentityFiles, channel_credentials, channel_credentials_for_enrolment
from services.keymanager.config import KeyManagerConfig
from services.keymanager.host import initialise, opened, serve
from services.keymanager.service import KeyManager
from services.keymanager.store import Records, Store
from support.clock import FakeClock

FEDERATION = "clinics"


def keymanager_config(folder: Path, **changes: Any) -> KeyManagerConfig:
    """A configuration below a folder, on free ports."""
    fields: dict[str, Any] = {
        "federation": FEDERATION,
        "listen": "127.0.0.1:0",
        "enrolment_listen": "127.0.0.1:0",
        "membership_listen": "127.0.0.1:0",
        "ops_listen": "127.0.0.1:0",
        "state_dir": folder / "state",
        "kek_file": folder / "kek",
        "advertise_keymanager": "127.0.0.1:1",
        "advertise_enrolment": "127.0.0.1:2",
        "advertise_membership": "127.0.0.1:3",
    }
    return KeyManagerConfig(**{**fields, **changes})


def signing_request(key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    """A PKCS#10 request in DER, for a fresh key unless one is given."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.DER)


@contextlib.asynccontextmanager
async def local_keymanager(folder: Path, clock: Clock | None = None) -> AsyncIterator[KeyManager]:
    """An initialised key manager without servers, by default on a clock that stands still."""
    config = keymanager_config(folder)
    chosen = clock or FakeClock()
    await initialise(config, chosen)
    async with opened(config, chosen) as keymanager:
        yield keymanager


@contextlib.asynccontextmanager
async def raw_store(config: KeyManagerConfig) -> AsyncIterator[tuple[Store, Database]]:
    """The tables behind a key manager's back."""
    database = Database(config.database_url)
    try:
        yield Store(database), database
    finally:
        await database.close()


async def stored_secrets(config: KeyManagerConfig) -> list[bytes]:
    """All secret keys and seeds in clear, read straight from the database with the key-encryption key."""
    vault = config.vault()
    found: list[bytes] = []
    async with raw_store(config) as (store, _):
        for listed in await store.run_tx("epochs", lambda records: records.epochs()):
            number = listed.number
            _, sealed = await store.run_tx("epoch", functools.partial(Records.epoch, number=number))
            if sealed is not None:
                found.append(vault.open(sealed.secret_key, f"secret key of epoch {number} of {config.federation}"))
                found.append(vault.open(sealed.seed, f"seed of epoch {number} of {config.federation}"))
    return found


@dataclass(frozen=True)
class Running:
    """A serving key manager."""

    config: KeyManagerConfig
    folder: Path
    ports: dict[str, int]

    @property
    def address(self) -> str:
        """The port of agents and operators."""
        return f"127.0.0.1:{self.ports['grpc']}"

    @property
    def enrolment_address(self) -> str:
        return f"127.0.0.1:{self.ports['enrolment']}"

    @property
    def ops_port(self) -> int:
        return self.ports["ops"]

    @property
    def membership_address(self) -> str:
        return f"127.0.0.1:{self.ports['membership']}"

    async def enrolment(
        self, role: Role, name: str, *, server_names: tuple[str, ...] = (), ttl_s: int = 3600
    ) -> Enrolment:
        """What an operator hands to a new member."""
        async with opened(self.config, SystemClock()) as local:
            names = server_names or (("localhost",) if role is Role.AGGREGATOR else ())
            token = await local.create_token(None, role, name, ttl_s, names)
        address = self.membership_address if role is Role.AGGREGATOR else self.address
        found = token._replace(keymanager=address, enrolment=self.enrolment_address)
        return Enrolment.around(found, Identity(FEDERATION, role, name))

    async def member(self, role: Role, name: str) -> IdentityFiles:
        """An enrolled member."""
        file = self.folder / f"{role.value}-{name}.json"
        (await self.enrolment(role, name)).save(file)
        return await ensure_identity(self.folder / f"{role.value}-{name}", file, SystemClock())

    @contextlib.asynccontextmanager
    async def client(self, files: IdentityFiles) -> AsyncIterator[KeyManagerClient]:
        """Calls under a member's certificate."""
        async with self.channel(files) as channel:
            yield KeyManagerClient(channel)

    @contextlib.asynccontextmanager
    async def channel(self, files: IdentityFiles, address: str = "") -> AsyncIterator[grpc.aio.Channel]:
        """A channel under a member's certificate, by default to the port of agents and operators."""
        channel = open_channel(address or self.address, channel_credentials(files))
        try:
            yield channel
        finally:
            await channel.close()

    @contextlib.asynccontextmanager
    async def enrolment_channel(self, authority_pem: str, address: str = "") -> AsyncIterator[grpc.aio.Channel]:
        """A channel without a client certificate, by default to the enrolment port."""
        credentials = channel_credentials_for_enrolment(authority_pem.encode())
        channel = open_channel(address or self.enrolment_address, credentials)
        try:
            yield channel
        finally:
            await channel.close()


@contextlib.asynccontextmanager
async def serving_keymanager(folder: Path, clock: Clock | None = None, **changes: Any) -> AsyncIterator[Running]:
    """A key manager that serves on loopback, initialised first; run it again on the same folder to restart it."""
    config = keymanager_config(folder, **changes)
    chosen = clock or SystemClock()
    await initialise(config, chosen)
    ready_file = folder / "ready.json"
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, chosen, stop, ready_file))
    try:
        yield Running(config, folder, await _ports(ready_file, task))
    finally:
        stop.set()
        await task


async def _ports(ready_file: Path, task: asyncio.Task[None]) -> dict[str, int]:
    deadline_s = time.monotonic() + 30
    while not await asyncio.to_thread(ready_file.exists):
        if task.done() or time.monotonic() > deadline_s:
            await task
            raise AssertionError("the key manager ended before it was ready")
        await asyncio.sleep(0.01)
    return dict(json.loads(await asyncio.to_thread(ready_file.read_text)))
