"""A real Prometheus on a free port of this machine, with the configuration that the containers get."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from support.deployment import until_seen
from support.ports import free_port

ROOT: Final = Path(__file__).parents[2]
CONFIGURATION: Final = ROOT / "deploy/monitoring/prometheus"


def installed() -> bool:
    """Whether Prometheus and its tool are there."""
    return shutil.which("prometheus") is not None and shutil.which("promtool") is not None


@dataclass(frozen=True)
class Prometheus:
    """Calls to the HTTP API of a running Prometheus."""

    url: str

    async def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer; its error as a failure."""
        async with httpx.AsyncClient(trust_env=False) as client:
            answer = (await client.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    async def evaluate(self, expression: str) -> list[float]:
        """Values of an instant vector."""
        data = await self.ask("query", query=expression)
        assert data["resultType"] == "vector", f"{expression}: {data['resultType']}"
        return [float(sample["value"][1]) for sample in data["result"]]

    async def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            async with httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(f"{self.url}/-/ready", timeout=10)).status_code == 200
        return False


@contextlib.asynccontextmanager
async def running_prometheus(folder: Path, targets: Mapping[str, list[str]]) -> AsyncIterator[Prometheus]:
    """Start it on a copy of our configuration, with these targets by file and a scrape every second.

    Yields: it, once it has scraped every target.
    """
    copied = folder / "prometheus"
    shutil.copytree(CONFIGURATION, copied)
    for name, addresses in targets.items():
        (copied / "targets" / f"{name}.yml").write_text(yaml.safe_dump([{"targets": addresses}]))
    configuration = yaml.safe_load((copied / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (copied / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={copied / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={address}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    found = Prometheus(f"http://{address}")
    try:
        await until_seen(found.ready, f"Prometheus serves, see {folder / 'prometheus.log'}")
        expected = [1.0] * sum(map(len, targets.values()))

        async def scraped() -> bool:
            return await found.evaluate("up") == expected

        await until_seen(scraped, "every target is scraped")
        yield found
    finally:
        process.terminate()
        await process.wait()
