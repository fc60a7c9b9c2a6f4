"""The probes of the rendered manifests, asked as a kubelet asks, of real services started as the manifests say."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.channel import open_channel
from services.common.clock import SystemClock
from services.common.enrolment import ensure_identity
from services.common.keymanager_client import KeyManagerClient
from services.common.tls import channel_credentials, channel_credentials_for_enrolment
from services.operators.client import FederationClient
from services.operators.domain import FederationSpec
from support.kubelet import Container, EnrolmentError, Node
from support.manifests import ROOT, kubectl, render
from support.postgresql import binaries, running_server

FEDERATION = "clinics"
EXAMPLES = ROOT / "examples/data"

pytestmark = pytest.mark.skipif(
    kubectl() is None and os.environ.get("SHELORA_REQUIRE_KUBECTL") != "1",
    reason="kubectl is not installed: nothing can be rendered",
)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    # Not pytest's own folder: the path of the agent's control socket is at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="shelora-node-") as folder:
        one = Node(Path(folder), render(("overlays/dev", "agent/site", "agent/deployment")))
        try:
            yield one
        finally:
            one.close()


@pytest.fixture(scope="module")
async def keymanager(node: Node) -> Container:
    """A key manager that is ready, on a key that enrol.sh made."""
    node.enrol("kek")
    serving = node.container("keymanager", "keymanager")
    assert not await serving.probe("startup")
    assert not await serving.probe("liveness")
    assert not await serving.probe("readiness")
    node.container("keymanager", "init").finish()
    serving.start()
    await serving.until(startup=True, liveness=True, readiness=True)
    return serving


async def test_the_key_manager_s_probes_tell_the_truth(node: Node, keymanager: Container):
    with pytest.raises(EnrolmentError, match="exists"):
        node.enrol("kek")
    database = keymanager.root / "var/lib/shelora/keymanager/keymanager.db"
    # What the key-encryption key cannot open: a database that belongs to another key.
    with contextlib.closing(sqlite3.connect(database)) as raw:
        sealed = raw.execute("SELECT sealed_key FROM authority").fetchone()[0]
        _store_sealed(raw, bytes([sealed[0], sealed[1] ^ 1]) + sealed[2:])
        await keymanager.until(readiness=False)
        assert await keymanager.probe("liveness")
        assert await keymanager.probe("startup")
        _store_sealed(raw, sealed)
        authority = raw.execute("SELECT certificate_pem FROM authority").fetchone()[0]
    await keymanager.until(readiness=True)
    async with _held_stream(node, authority) as stream:
        keymanager.terminate()
        await keymanager.until(readiness=False)
        assert await keymanager.probe("liveness"), "killed while it drains"
        assert await keymanager.probe("startup")
        stream.cancel()
        assert await keymanager.ended() == 0
    assert not await keymanager.probe("liveness")
    keymanager.start()
    await keymanager.until(startup=True, liveness=True, readiness=True)


@pytest.mark.timeout(240)
async def test_the_aggregator_s_and_an_agent_s_probes_tell_the_truth(node: Node, keymanager: Container):
    with _database() as (url, break_database):
        node.secrets["shelora-aggregator-database"] = {"database_url": url.encode() + b"\n"}
        node.container("migration", "migrate").finish()
        node.enrol("aggregator")
        aggregator = node.container("aggregator", "aggregator")
        assert not await aggregator.probe("startup")
        aggregator.start()
        await aggregator.until(startup=True, liveness=True, readiness=True)
        await _create_federation(node)
        node.enrol("agent", "clinic-1", "--secret", "shelora-agent-enrolment")
        agent = node.container("agent", "agent")
        agent.mount()
        for name in ("train", "test"):
            shutil.copy(EXAMPLES / f"routing_{name}.jsonl", agent.root / f"data/{name}.jsonl")
        agent.start()
        await agent.until(startup=True, liveness=True)
        assert not await agent.probe("readiness"), "ready before it can be connected"
        await agent.until(readiness=True)

        aggregator.terminate()
        await agent.until(readiness=False)
        assert await agent.probe("liveness")
        assert await aggregator.ended() == 0, aggregator.log
        assert not await aggregator.probe("readiness")
        aggregator.start()
        await aggregator.until(startup=True, readiness=True)
        await agent.until(readiness=True)

        break_database()
        await aggregator.until(readiness=False)
        assert await aggregator.probe("liveness")
        assert await aggregator.probe("startup")
    agent.terminate()
    assert await agent.ended() == 0, agent.log


def test_every_node_gets_an_enrolment_of_its_own(node: Node, keymanager: Container):
    node.enrol("nodes", "edge-1")
    node.enrol("nodes", "ip-10-0-0-7.example.internal", "--keymanager", "keys.example.org:7441")
    made = {name: json.loads(text) for name, text in node.secrets["shelora-agent-enrolments"].items()}
    assert {name: (one["role"], one["name"]) for name, one in made.items()} == {
        "edge-1.json": ("agent", "edge-1"),
        "ip-10-0-0-7.example.internal.json": ("agent", "ip-10-0-0-7-example-internal"),
    }
    assert made["ip-10-0-0-7.example.internal.json"]["keymanager"] == "keys.example.org:7441"


def test_a_migration_without_its_secret_fails_and_says_so(node: Node):
    node.secrets["shelora-aggregator-database"] = {}
    migration = node.container("migration", "migrate")
    migration.start()
    assert migration.process is not None
    assert migration.process.wait(60) == 2
    assert "SHELORA_AGGREGATOR__DATABASE_URL_FILE" in migration.log


def _store_sealed(raw: sqlite3.Connection, sealed: bytes) -> None:
    with raw:
        raw.execute("UPDATE authority SET sealed_key = ?", (sealed,))


@contextlib.contextmanager
def _database() -> Iterator[tuple[str, Callable[[], None]]]:
    """A PostgreSQL's URL and a way to stop it; where none is installed, an SQLite file's and a way to spoil it."""
    with contextlib.ExitStack() as stack:
        programs = binaries()
        if programs is not None:
            yield stack.enter_context(running_server(programs)), stack.close
            return
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="shelora-db-"))

        def spoil() -> None:
            with contextlib.closing(sqlite3.connect(f"{folder}/database")) as raw, raw:
                raw.execute("ALTER TABLE federations RENAME TO gone")

        yield f"sqlite:///{folder}/database", spoil


@contextlib.asynccontextmanager
async def _held_stream(node: Node, authority_pem: str) -> AsyncIterator[grpc.aio.UnaryStreamCall]:
    """A call that does not end by itself and so keeps the key manager draining."""
    credentials = channel_credentials_for_enrolment(authority_pem.encode())
    async with open_channel(f"localhost:{node.port('keymanager', 7442)}", credentials) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        stream = stub.Watch(health_pb2.HealthCheckRequest())
        first = await stream.read()
        assert first.status == health_pb2.HealthCheckResponse.SERVING
        yield stream


async def _create_federation(node: Node) -> None:
    """As an operator does who comes through `kubectl port-forward`."""
    file = node.folder / "olga.json"
    members, enrolment = (f"localhost:{node.port('keymanager', number)}" for number in (7441, 7442))
    node.enrol("operator", "olga", str(file), "--keymanager", members, "--enrolment", enrolment)
    files = await ensure_identity(node.folder / "olga", file, SystemClock())
    credentials = channel_credentials(files)
    async with open_channel(f"localhost:{node.port('keymanager', 7441)}", credentials) as channel:
        parameters = (await KeyManagerClient(channel).fetch_epoch(0)).parameters
    spec = FederationSpec(FEDERATION, rounds=1, target_agents=2, quorum=2, epoch=1, parameters=parameters)
    async with open_channel(f"localhost:{node.port('aggregator', 7443)}", credentials) as channel:
        await FederationClient(channel).create(spec)
