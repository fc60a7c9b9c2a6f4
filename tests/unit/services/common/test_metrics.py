from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from services.common.channel import call, open_channel
from services.common.metrics import rpc_interceptors, watch_certificates, watch_disk
from services.common.server import GrpcServer
from services.common.tls import IdentityFiles
from shelora.errors import InternalFault, StalePlan
from shelora.v1 import agent_pb2, agent_pb2_grpc


class Control(agent_pb2_grpc.AgentControlServiceServicer):
    """A service that refuses one call and breaks in another."""

    async def GetStatus(self, request: Any, context: Any) -> agent_pb2.GetStatusResponse:  # noqa: N802 - the contract's name
        return agent_pb2.GetStatusResponse()

    async def Start(self, request: Any, context: Any) -> agent_pb2.StartResponse:  # noqa: N802 - the contract's name
        raise StalePlan("expected plan 2, got 1")

    async def Pause(self, request: Any, context: Any) -> agent_pb2.PauseResponse:  # noqa: N802 - the contract's name
        raise ValueError("a defect")

    def register(self, server: grpc.aio.Server) -> None:
        agent_pb2_grpc.add_AgentControlServiceServicer_to_server(self, server)


async def test_errors_are_counted_by_call_and_stable_code() -> None:
    registry = CollectorRegistry()
    control = Control()  # type: ignore[abstract] # the other calls are not made
    server = GrpcServer("127.0.0.1:0", None, control.register, rpc_interceptors(registry))
    port = await server.start()
    async with open_channel(f"127.0.0.1:{port}", None) as channel:
        stub = agent_pb2_grpc.AgentControlServiceStub(channel)
        await call(stub.GetStatus, agent_pb2.GetStatusRequest(), timeout_s=10)
        for _ in range(2):
            with pytest.raises(StalePlan):
                await call(stub.Start, agent_pb2.StartRequest(), timeout_s=10)
        with pytest.raises(InternalFault):
            await call(stub.Pause, agent_pb2.PauseRequest(), timeout_s=10)
    await server.drain(0)

    def count(method: str, code: str) -> float | None:
        labels = {"method": f"/shelora.v1.AgentControlService/{method}", "code": code}
        return registry.get_sample_value("shelora_errors_total", labels)

    assert count("Start", "stale_plan") == 2
    assert count("Pause", "internal_fault") == 1
    assert [sample.labels["method"].rpartition("/")[2] for sample in samples(registry, "shelora_errors_total")] == [
        "Start",
        "Pause",
    ]


def samples(registry: CollectorRegistry, name: str) -> list[Any]:
    return [sample for family in registry.collect() for sample in family.samples if sample.name == name]


def test_ends_of_certificates_are_shown_and_unreadable_ones_are_no_number(tmp_path: Path, authority: Any) -> None:
    registry = CollectorRegistry()
    files = authority.issue(tmp_path / "own", "spiffe://ward/agent/one")
    missing = IdentityFiles(tmp_path / "missing")
    watch_certificates(registry, {"own": lambda: files.validity_ms()[1], "missing": lambda: missing.validity_ms()[1]})
    name = "shelora_certificate_expiry_timestamp_seconds"
    assert registry.get_sample_value(name, {"certificate": "own"}) == files.validity_ms()[1] / 1000
    assert math.isnan(registry.get_sample_value(name, {"certificate": "missing"}) or 0.0)


def test_the_disk_is_shown_at_every_scrape_also_when_its_folder_goes_away(tmp_path: Path) -> None:
    registry, folder = CollectorRegistry(), tmp_path / "state"
    folder.mkdir()
    watch_disk(registry, folder)
    free, size = (registry.get_sample_value(f"shelora_state_{name}_bytes") or 0.0 for name in ("free", "size"))
    assert 0 < free <= size
    folder.rmdir()
    assert math.isnan(registry.get_sample_value("shelora_state_free_bytes") or 0.0)
