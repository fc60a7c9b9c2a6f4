"""Rendered pods as processes of this machine: volumes are folders, ports free ones, probes asked as a kubelet asks."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support import kubectl_stand_in
from support.manifests import FOLDER, ROOT, Manifest, Pod, of_kind, pods
from support.ports import free_port

PROGRAMS: Final = {
    "shelora/keymanager": "services.keymanager",
    "shelora/aggregator": "services.aggregator",
    "shelora/agent": "services.client_agent.cli",
}
CORES: Final = "2"
PATIENCE_S: Final = 100.0
_ADDRESS: Final = re.compile(r"\b(0\.0\.0\.0|shelora-(?:keymanager|aggregator)[a-z.]*):(\d+)\b")


@dataclass
class Node:
    """One machine that runs the pods of some manifests."""

    folder: Path
    manifests: Sequence[Manifest]
    secrets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    numbers: dict[tuple[str, int], int] = field(default_factory=dict)
    running: list[Container] = field(default_factory=list)

    def pod(self, component: str) -> Pod:
        return next(pod for pod in pods(self.manifests) if pod.component == component)

    def port(self, component: str, number: int) -> int:
        """The port of this machine that stands for a container's."""
        return self.numbers.setdefault((component, number), free_port())

    def container(self, component: str, name: str) -> Container:
        """A container, not started."""
        pod = self.pod(component)
        spec = next(one for one in pod.containers if one["name"] == name)
        container = Container(self, pod, spec, self.folder / component)
        self.running.append(container)
        return container

    def close(self) -> None:
        for one in self.running:
            one.kill()

    def enrol(self, *arguments: str) -> None:
        """Run enrol.sh against this machine: Secrets arrive in `secrets`, `exec` runs in the key manager's place."""
        keymanager = self.container("keymanager", "keymanager")
        programs = kubectl_stand_in.install(
            self.folder / "programs",
            kubectl_stand_in.Place(
                str(keymanager.root), keymanager.mounts, keymanager.environment(), sorted(self.secrets)
            ),
        )
        path = os.pathsep.join((str(programs), os.environ["PATH"]))
        done = subprocess.run(
            [str(FOLDER / "enrol.sh"), *arguments],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode:
            raise EnrolmentError(done.stderr)
        self.secrets |= kubectl_stand_in.applied(programs)


class EnrolmentError(Exception):
    """enrol.sh ended with an error; its words."""


@dataclass
class Container:
    """A container of a pod, whose root folder holds what is mounted."""

    node: Node
    pod: Pod
    spec: Manifest
    root: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def mounts(self) -> list[str]:
        return [one["mountPath"] for one in self.spec["volumeMounts"]]

    @property
    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")[-4000:]

    def mount(self) -> None:
        """Put the volumes where the container expects them, with this machine's ports and paths in them."""
        self.root.mkdir(parents=True, exist_ok=True)
        volumes = {one["name"]: one for one in self.pod.volumes}
        for mount in self.spec["volumeMounts"]:
            place = self.root / mount["mountPath"].lstrip("/")
            volume = volumes.get(mount["name"], {})
            if "configMap" in volume:
                text = self._config_map(volume["configMap"]["name"])[mount["subPath"]]
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(self.local(text))
                continue
            if "secret" in volume:
                shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True, exist_ok=True)
            if "secret" in volume:
                for name, content in self.node.secrets[volume["secret"]["secretName"]].items():
                    file = place / name
                    file.write_text(self.local_addresses(content.decode()))
                    file.chmod(volume["secret"]["defaultMode"])

    def local(self, text: str) -> str:
        """A text with mounted paths and addresses as they are on this machine."""
        return kubectl_stand_in.relocated(self.local_addresses(text), str(self.root), self.mounts)

    def local_addresses(self, text: str) -> str:
        return _ADDRESS.sub(self._local_address, text)

    def environment(self) -> dict[str, str]:
        """The container's variables."""
        found = {one["name"]: self._value(one) for one in self.spec.get("env", [])}
        return {name: self.local(value) for name, value in found.items()}

    def start(self) -> None:
        self.mount()
        program = PROGRAMS[self.spec["image"].partition(":")[0]]
        arguments = [self.local(one) for one in self.spec["args"]]
        # Everything else comes from the manifests: a variable of this shell must not help.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHELORA_")}
        settings = {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(ROOT / "build/pycache")}
        inherited.pop("PYTHONDONTWRITEBYTECODE", None)
        with (self.root / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", program, *arguments],
                cwd=self.root,
                env={**inherited, **settings, **self.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def finish(self) -> None:
        """Run to the end, as an init container or a Job's."""
        self.start()
        assert self.process is not None
        assert self.process.wait(PATIENCE_S) == 0, self.log

    def terminate(self) -> None:
        """What a kubelet does first."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def ended(self) -> int:
        """Wait as long as a kubelet does before it kills; answers the exit code."""
        assert self.process is not None
        return await asyncio.to_thread(self.process.wait, self.pod.spec["terminationGracePeriodSeconds"])

    async def probe(self, kind: str) -> bool:
        """Ask once, as a kubelet does; whether the probe passes."""
        probe = self.spec[f"{kind}Probe"]
        if "grpc" in probe:
            return await self._check(probe["grpc"], probe["timeoutSeconds"])
        return await asyncio.to_thread(self._get, probe["httpGet"], probe["timeoutSeconds"])

    async def until(self, **wanted: bool) -> None:
        """Probe until all results are as wanted, for example startup=True, readiness=False."""
        end_s = time.monotonic() + PATIENCE_S
        while (seen := {kind: await self.probe(kind) for kind in wanted}) != wanted:
            assert time.monotonic() < end_s, f"{self.pod.name}: wanted {wanted}, saw {seen}\n{self.log}"
            await asyncio.sleep(0.2)

    def probed_port(self, port: str | int) -> int:
        """The port of this machine that a probe asks; a name is looked up in the container's ports."""
        number = port if isinstance(port, int) else self.pod.ports[port]
        return self.node.port(self.pod.component, number)

    def _get(self, handler: Mapping[str, Any], timeout_s: float) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.probed_port(handler["port"]), timeout=timeout_s)
        with contextlib.closing(connection):
            try:
                connection.request("GET", handler["path"])
                return 200 <= connection.getresponse().status < 400
            except OSError:
                return False

    async def _check(self, handler: Mapping[str, Any], timeout_s: float) -> bool:
        request = health_pb2.HealthCheckRequest(service=handler.get("service", ""))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.probed_port(handler['port'])}") as channel:
            try:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                answer = await stub.Check(request, timeout=timeout_s)
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def _config_map(self, name: str) -> dict[str, str]:
        found = next(one for one in of_kind(self.node.manifests, "ConfigMap") if one["metadata"]["name"] == name)
        return dict(found["data"])

    def _value(self, variable: Mapping[str, Any]) -> str:
        if "value" in variable:
            return str(variable["value"])
        source = variable["valueFrom"]
        if "configMapKeyRef" in source:
            return self._config_map(source["configMapKeyRef"]["name"])[source["configMapKeyRef"]["key"]]
        assert source == {"resourceFieldRef": {"resource": "limits.cpu"}}, source
        return CORES

    def _local_address(self, match: re.Match[str]) -> str:
        host, number = match[1], int(match[2])
        if host == "0.0.0.0":  # noqa: S104 - what the configuration says, not what is bound
            return f"127.0.0.1:{self.node.port(self.pod.component, number)}"
        component = "keymanager" if host.startswith("shelora-keymanager") else "aggregator"
        return f"localhost:{self.node.port(component, number)}"
