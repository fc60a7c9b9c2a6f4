"""The two-host layout: a device reaches the server side through this host's published ports, and nothing but these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.containers import ROOT, Cluster, base_images, docker, need_engine, read_json, run, until
from support.ports import free_port

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

DEVICE = "clinic-7"

HOST_ADDRESS = """
import socket, struct
rows = [line.split() for line in open("/proc/net/route")][1:]
gateway = next(row[2] for row in rows if row[1] == "00000000")
print(socket.inet_ntoa(struct.pack("<L", int(gateway, 16))))
"""
"""Prints this host's address as a container sees it."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The server side, healthy."""
    need_engine()
    folder = tmp_path_factory.mktemp("server")
    images = base_images()
    server = Cluster(
        files=(ROOT / "deploy/compose/server.yaml",),
        environment={
            **images,
            "SHELORA_SECRETS": str(folder / "secrets"),
            "SHELORA_DATA": str(folder / "data"),
            "SHELORA_DASHBOARD_PORT": str(free_port()),
            "SERVER_NAME": docker("run", "--rm", images["PYTHON_IMAGE"], "python", "-c", HOST_ADDRESS).strip(),
        },
        project=f"shelora-server-{os.getpid()}",
    )
    server.script("build")
    run([str(ROOT / "deploy/compose/prepare.sh"), DEVICE], server.variables())
    try:
        server.compose("up", "-d")
        until(lambda: server.inspect("aggregator")["State"]["Health"]["Status"] == "healthy", "it is healthy", 120)
        yield server
    finally:
        server.compose("down", "--volumes", "--remove-orphans")


@pytest.fixture(scope="module")
def device(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A device with the enrolment file that the operator made for it."""
    folder = tmp_path_factory.mktemp("device")
    made = "/var/lib/shelora/enrolment.json"
    server.operator("agents", "token", DEVICE, "--out", made)
    (folder / "enrolment.json").write_text(server.compose("run", "--rm", "-T", "--entrypoint", "cat", "operator", made))
    folder.chmod(0o755)
    device = Cluster(
        files=(ROOT / "deploy/compose/device.yaml",),
        environment={
            "SERVER_NAME": server.environment["SERVER_NAME"],
            "SHELORA_ENROLMENT": str(folder),
            "SHELORA_DATA": str(Path(server.environment["SHELORA_DATA"]) / DEVICE),
        },
        project=f"shelora-device-{os.getpid()}",
    )
    try:
        device.compose("up", "-d")
        yield device
    finally:
        device.compose("down", "--volumes")


def test_device_joins_through_published_ports(server: Cluster, device: Cluster) -> None:
    server.operator("federation", "create", "--rounds", "1", "--agents", "2")
    server.operator("federation", "start")
    api = f"http://127.0.0.1:{server.environment['SHELORA_DASHBOARD_PORT']}/api/v1/federations/demo/agents"

    def joined() -> bool:
        agents = (read_json(api) or {"agents": []})["agents"]
        return [agent["name"] for agent in agents if agent["connected"]] == [DEVICE]

    until(joined, f"{DEVICE} is registered and connected", 180)


def test_device_reaches_no_operations_port(server: Cluster, device: Cluster) -> None:
    code = """
import socket, sys
for port in sys.argv[2:]:
    try:
        socket.create_connection((sys.argv[1], int(port)), timeout=2).close()
        print(port)
    except OSError:
        pass
"""
    ports = ("7441", "7442", "7443", "7444", "7480", "7481", "5432", server.environment["SHELORA_DASHBOARD_PORT"])
    found = device.python("agent", code, server.environment["SERVER_NAME"], *ports)
    assert found.split() == ["7441", "7442", "7443"]
