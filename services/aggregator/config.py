"""aggregator.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr

from services.aggregator.pacing import CONNECTED_AGENTS
from services.common.config import Address, ServiceConfig
from services.common.identity import check_name
from services.common.server import WINDOW_BYTES
from services.common.transfer import MAX_PAYLOAD_BYTES
from shelora.errors import SheLoraError


def _check_federation(name: str) -> str:
    try:
        return check_name(name, "federation")
    except SheLoraError as error:
        raise ValueError(error.message) from error


class Limits(ServiceConfig):
    """What the operator of the aggregator allows.

    Attributes:
        max_payload_bytes: longest upload, whatever the plan would allow.
        max_agents: registered agents per federation.
        connected_agents: agents that stay connected, and as many that send or receive payloads at once; what bounds
            memory however many are registered. More are told when to come back.
        max_concurrent_calls: calls at once, view streams included; more are refused.
        upload_window_bytes: what an upload may send ahead of what is read. An upload over a long line brings at most
            about this much, and a chunk of 1 MiB, in each round trip; a few uploads at once hold this much memory.
    """

    max_payload_bytes: int = Field(default=16 << 30, ge=1, le=MAX_PAYLOAD_BYTES)
    max_agents: int = Field(default=100_000, ge=2, le=100_000)
    connected_agents: int = Field(default=CONNECTED_AGENTS, ge=2, le=100_000)
    max_concurrent_calls: int = Field(default=20_000, ge=8, le=1_000_000)
    upload_window_bytes: int = Field(default=WINDOW_BYTES, ge=64 << 10, le=64 << 20)


class AggregatorConfig(ServiceConfig):
    """Configuration of the aggregator.

    Attributes:
        federation: the federation it is enrolled in.
        listen: port for agents and operators, mutual TLS.
        ops_listen: HTTP for health, metrics and the dashboard. It asks nobody who they are: keep it inside.
        health_listen: gRPC without TLS that serves the standard health service and nothing else; off unless set.
        state_dir: blobs, and the database unless `database_url` says otherwise.
        database_url: sqlite:///<path> or postgresql+asyncpg://...; the default is a file in `state_dir`.
        identity_dir: key and certificates; the default is a folder in `state_dir`.
        enrolment_file: how to get an identity where there is none.
        keymanager: the key manager's membership port, where the certificate is renewed and revocations are read; the
            default is what the enrolment file says.
        compute_threads: threads for computations; as many again check uploads.
        keep_rounds: published rounds whose average stays, 0 for all.
        resume_grace_s: after a restart agents get at least this long before the running deadline.
        limits: what is allowed.
        log_level: lowest level that is logged.
    """

    federation: Annotated[str, AfterValidator(_check_federation)]
    listen: Address = "127.0.0.1:7443"
    ops_listen: Address = "127.0.0.1:7480"
    health_listen: Address | None = None
    state_dir: Path = Path("aggregator-state")
    database_url: SecretStr | None = None
    identity_dir: Path | None = None
    enrolment_file: Path | None = None
    keymanager: Address | None = None
    compute_threads: int = Field(default=2, ge=1, le=256)
    keep_rounds: int = Field(default=0, ge=0, le=10_000)
    resume_grace_s: int = Field(default=30, ge=0, le=86_400)
    limits: Limits = Limits()
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def database(self) -> str:
        """The database's URL."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.state_dir / 'aggregator.db'}"

    @property
    def identity(self) -> Path:
        """The identity's folder."""
        return self.identity_dir or self.state_dir / "identity"
