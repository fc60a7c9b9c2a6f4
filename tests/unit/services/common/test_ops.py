from __future__ import annotations

import asyncio
import os
import signal
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from services.common.metrics import bytes_counter, new_registry, seconds_histogram
from services.common.ops import ops_app, serve_http
from services.common.versions import PACKAGE_VERSION, PROTOCOL
from shelora.errors import InvalidConfiguration, Unavailable


def app_that_answers(details: Mapping[str, Any] | Exception) -> FastAPI:
    async def ready() -> Mapping[str, Any]:
        if isinstance(details, Exception):
            raise details
        return details

    return ops_app(ready, new_registry("test"))


async def get(port: int, path: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(f"http://127.0.0.1:{port}{path}", timeout=10)


async def test_health_readiness_and_metrics() -> None:
    async with serve_http(app_that_answers({"rounds": 3}), "127.0.0.1:0") as port:
        assert (await get(port, "/healthz")).json() == {"status": "ok", "version": PACKAGE_VERSION}
        ready = await get(port, "/readyz")
        assert (ready.status_code, ready.json()) == (200, {"ready": True, "rounds": 3})
        metrics = await get(port, "/metrics")
        assert f'shelora_build_info{{protocol="{PROTOCOL}",service="test"' in metrics.text
        assert "process_resident_memory_bytes" in metrics.text
        assert (await get(port, "/docs")).status_code == 404


@pytest.mark.parametrize(
    ("details", "body"),
    [
        (
            Unavailable("no database", hint="start it"),
            {"ready": False, "code": "unavailable", "message": "no database (start it)"},
        ),
        ({"ready": False, "why": "migrating"}, {"ready": False, "why": "migrating"}),
    ],
)
async def test_what_cannot_work_is_not_ready(details: Any, body: dict[str, Any]) -> None:
    async with serve_http(app_that_answers(details), "127.0.0.1:0") as port:
        answer = await get(port, "/readyz")
        assert (answer.status_code, answer.json()) == (503, body)
        assert (await get(port, "/healthz")).status_code == 200


async def test_a_check_that_hangs_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.health.CHECK_TIMEOUT_S", 0.05)

    async def ready() -> Mapping[str, Any]:
        await asyncio.Event().wait()
        return {}

    async with serve_http(ops_app(ready, new_registry("test")), "127.0.0.1:0") as port:
        assert (await get(port, "/readyz")).status_code == 503


async def test_signal_handlers_stay_ours() -> None:
    loop = asyncio.get_running_loop()
    heard = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, heard.set)
    try:
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        async with serve_http(app_that_answers({}), "127.0.0.1:0") as port:
            assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(heard.wait(), 10)
            assert (await get(port, "/healthz")).status_code == 200
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def test_a_port_is_free_again_and_cannot_be_taken_twice() -> None:
    async with serve_http(app_that_answers({}), "127.0.0.1:0") as port:
        with pytest.raises(InvalidConfiguration, match="expected a free address"):
            async with serve_http(app_that_answers({}), f"127.0.0.1:{port}"):
                raise AssertionError("the port is taken")
    async with serve_http(app_that_answers({}), f"127.0.0.1:{port}") as again:
        assert again == port


async def test_a_failing_block_ends_the_server() -> None:
    with pytest.raises(ValueError, match="service failed"):
        async with serve_http(app_that_answers({}), "127.0.0.1:0") as port:
            raise ValueError("service failed")
    with pytest.raises(httpx.ConnectError):
        await get(port, "/healthz")


async def test_a_unix_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "ops.sock"
    for _ in range(2):
        async with serve_http(app_that_answers({}), f"unix:{path}") as port:
            assert port == 0
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
                assert (await client.get("http://local/healthz")).status_code == 200
    with pytest.raises(InvalidConfiguration):
        async with serve_http(app_that_answers({}), f"unix:{tmp_path}/absent/ops.sock"):
            raise AssertionError("the folder is absent")


def test_metric_names_carry_their_unit() -> None:
    registry = new_registry("test")
    seconds_histogram(registry, "shelora_fold_seconds", "Duration of folds.").observe(0.2)
    bytes_counter(registry, "shelora_uploaded_bytes", "Uploaded.", ("kind",)).labels("cipher").inc(10)
    assert registry.get_sample_value("shelora_fold_seconds_bucket", {"le": "0.25"}) == 1
    assert registry.get_sample_value("shelora_uploaded_bytes_total", {"kind": "cipher"}) == 10
    for make in (seconds_histogram, bytes_counter):
        with pytest.raises(ValueError, match="metric name"):
            make(registry, "shelora_fold", "Without a unit.")
