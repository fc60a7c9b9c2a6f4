"""A real aggregator, a bare stream server and certificates for both, in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from services.common.channel import open_channel
from services.common.clock import SystemClock
from services.common.identity import Identity, Role
from services.common.tls import IdentityFiles, channel_credentials
from services.keymanager.ca import Authority
from services.operators.client import FederationClient
from services.operators.demo.processes import Crew

FEDERATION: Final = "bench"
_HOST: Final = "127.0.0.1"
_LIFETIME_S: Final = 7 * 24 * 3600
_PATIENCE_S: Final = 60.0


@dataclass(frozen=True)
class Server:
    """A process that serves.

    Attributes:
        address: host:port of its gRPC server.
        process_id: for /proc.
        folder: where it keeps its files.
    """

    address: str
    process_id: int
    folder: Path


@dataclass
class Stage:
    """Certificates and processes below one folder.

    Attributes:
        folder: where everything lies; made.
    """

    folder: Path
    clock: SystemClock = field(default_factory=SystemClock)

    def __post_init__(self) -> None:
        """Make the authority of all certificates."""
        self._logs = self.folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._authority = Authority.create(FEDERATION, self.clock.now_ms())

    def issue(self, role: Role, name: str) -> IdentityFiles:
        """A complete identity of a member."""
        files = IdentityFiles(self.folder / "identities" / f"{role.value}-{name}")
        key = ec.generate_private_key(ec.SECP256R1())
        names = (_HOST, "localhost") if role is Role.AGGREGATOR else ()
        issued = self._authority.issue(
            Identity(FEDERATION, role, name),
            key.public_key(),
            now_ms=self.clock.now_ms(),
            lifetime_s=_LIFETIME_S,
            server_names=names,
        )
        files.write_key(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        files.write_certificate(issued.certificate_pem.encode(), issued.authority_pem.encode())
        return files

    @contextlib.asynccontextmanager
    async def aggregator(self, name: str = "aggregator", **settings: Any) -> AsyncIterator[Server]:
        """The product's aggregator: mutual TLS, SQLite, a blob folder."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "federation": FEDERATION,
            "listen": f"{_HOST}:0",
            "ops_listen": f"{_HOST}:0",
            "state_dir": "state",
            "identity_dir": str(self.issue(Role.AGGREGATOR, name).folder),
            "log_level": "warning",
            **settings,
        }
        (folder / "aggregator.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        arguments = ["-m", "services.aggregator", "serve", "--config", str(folder / "aggregator.yaml")]
        async with self._served(name, arguments, folder) as server:
            yield server

    @contextlib.asynccontextmanager
    async def bare(self, name: str = "bare") -> AsyncIterator[Server]:
        """A server that takes the same messages over the same TLS and throws them away."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        identity = self.issue(Role.AGGREGATOR, name).folder
        async with self._served(name, ["-m", "bench.aggregator.bare", "--identity", str(identity)], folder) as server:
            yield server

    @contextlib.asynccontextmanager
    async def _served(self, name: str, arguments: Sequence[str], folder: Path) -> AsyncIterator[Server]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SHELORA_")}
        crew = Crew({**kept, "PYTHONUNBUFFERED": "1"}, self._logs, self.clock)
        ready = folder / "ready.json"
        try:
            worker = crew.start(name, [*arguments, "--ready-file", str(ready)])
            await crew.ready(worker, ready, _PATIENCE_S)
            port = json.loads(ready.read_text(encoding="utf-8"))["grpc"]
            yield Server(f"{_HOST}:{port}", worker.process.pid, folder)
        finally:
            await crew.stop()

    @contextlib.asynccontextmanager
    async def operator(self, server: Server) -> AsyncIterator[FederationClient]:
        """Calls of an operator."""
        channel = open_channel(server.address, channel_credentials(self.issue(Role.OPERATOR, "operator")))
        try:
            yield FederationClient(channel)
        finally:
            await channel.close()
