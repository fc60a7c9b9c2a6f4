"""A compose cluster for tests: the project's own commands on a real Docker Engine, and what the tests ask it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "tests/deploy/images"
REQUIRE = "SHELORA_REQUIRE_DOCKER"
"""Environment variable: with 1 a missing Docker Engine is a failure, without it the tests are skipped."""

PUBLIC_PYTHON = "python:3.12-slim-trixie"
PUBLIC_POSTGRES = "postgres:17-trixie"
STANDIN_PYTHON = "shelora-test/python:3.12-slim-trixie"
STANDIN_POSTGRES = "shelora-test/postgres:17-trixie"


def need_engine() -> None:
    """Skip, or fail where it is required, without a Docker Engine and Compose."""
    missing = _missing()
    if missing and os.environ.get(REQUIRE) == "1":
        pytest.fail(f"{REQUIRE}=1, but {missing}")
    if missing:
        pytest.skip(f"container tests: {missing}")


def _missing() -> str:
    if shutil.which("docker") is None:
        return "docker is not installed"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return "no Docker Engine answers"
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    if not plugin and shutil.which("docker-compose") is None:
        return "Compose is not installed"
    return ""


def docker(*arguments: str, timeout_s: float = 120) -> str:
    """Run docker; its standard output."""
    return run(["docker", *arguments], timeout_s=timeout_s)


def image_exists(image: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode == 0


def base_images() -> dict[str, str]:
    """PYTHON_IMAGE and POSTGRES_IMAGE: what the environment names, else the public ones, else stand-ins built here."""
    python = os.environ.get("PYTHON_IMAGE") or _public(PUBLIC_PYTHON)
    if python is None:
        python = STANDIN_PYTHON
        if not image_exists(python):
            run([str(IMAGES / "base.sh"), python], timeout_s=600)
    postgres = os.environ.get("POSTGRES_IMAGE") or _public(PUBLIC_POSTGRES)
    if postgres is None:
        postgres = STANDIN_POSTGRES
        if not image_exists(postgres):
            folder = str(IMAGES / "postgres")
            docker("build", "-q", "--build-arg", f"BASE_IMAGE={python}", "-t", postgres, folder, timeout_s=600)
    return {"PYTHON_IMAGE": python, "POSTGRES_IMAGE": postgres}


def _public(image: str) -> str | None:
    """The image when it is here or its registry answers soon."""
    if image_exists(image):
        return image
    try:
        run(["docker", "pull", "--quiet", image], timeout_s=180)
    except (AssertionError, subprocess.TimeoutExpired):
        return None
    return image


@dataclass
class Cluster:
    """Containers of one compose project.

    Attributes:
        files: compose files, the first decides where relative paths start.
        environment: variables for Compose and for scripts/compose.sh.
        project: name of the compose project.
    """

    files: tuple[Path, ...]
    environment: dict[str, str]
    project: str
    log: list[str] = field(default_factory=list)

    def variables(self) -> dict[str, str]:
        return {
            **os.environ,
            **self.environment,
            "COMPOSE_PROJECT_NAME": self.project,
            "COMPOSE_FILE": ":".join(str(file.relative_to(ROOT)) for file in self.files),
        }

    def script(self, *arguments: str, timeout_s: float = 1200) -> str:
        """Run scripts/compose.sh, as make does."""
        return run([str(ROOT / "scripts/compose.sh"), *arguments], self.variables(), timeout_s)

    def compose(self, *arguments: str, timeout_s: float = 300) -> str:
        """Run Compose itself."""
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
        program = ["docker", "compose"] if plugin else ["docker-compose"]
        return run([*program, *arguments], self.variables(), timeout_s)

    def operator(self, *arguments: str) -> str:
        """The operator's command line in its container."""
        return self.compose("run", "--rm", "-T", "operator", *arguments)

    def container(self, service: str) -> str:
        """The container's id."""
        return self.compose("ps", "-q", service).split()[0]

    def inspect(self, service: str) -> dict[str, Any]:
        return dict(json.loads(docker("inspect", self.container(service)))[0])

    def python(self, service: str, code: str, *arguments: str) -> str:
        """Run Python code in a service's container under the image's own interpreter."""
        return docker("exec", self.container(service), "python", "-c", code, *arguments)

    def refused(self, service: str, *command: str) -> str:
        """Run a command that must fail; its output."""
        done = subprocess.run(
            ["docker", "exec", self.container(service), *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode != 0, f"{command} passed in {service}: {done.stdout}"
        return done.stdout + done.stderr

    def kill(self, service: str) -> None:
        """SIGKILL everything in a container but its init, as the kernel does when memory runs out."""
        docker("exec", self.container(service), "python", "-c", _KILL_ALL)

    @contextlib.contextmanager
    def paused(self, service: str) -> Iterator[None]:
        """Freeze a container inside the block, so that what waits for it goes on waiting."""
        container = self.container(service)
        docker("pause", container)
        try:
            yield
        finally:
            docker("unpause", container)


_KILL_ALL = """
import os, signal
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) not in (1, os.getpid()):
        os.kill(int(name), signal.SIGKILL)
"""


def read_json(url: str) -> Any:
    """A JSON document over HTTP, or None while nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own loopback address
            return json.loads(answer.read())
    except (urllib.error.URLError, OSError, ValueError):
        return None


def until(look: Callable[[], Any], what: str, patience_s: float) -> Any:
    """Look until there is something; fails with what was waited for."""
    end_s = time.monotonic() + patience_s
    while not (found := look()):
        assert time.monotonic() < end_s, f"never reached within {patience_s:.0f} s: {what}"
        time.sleep(0.2)
    return found


def run(command: list[str], variables: dict[str, str] | None = None, timeout_s: float = 120) -> str:
    """Run a command from the project's root; its standard output, or a failure that shows what it said."""
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=timeout_s
    )
    assert done.returncode == 0, (
        f"{' '.join(command)} exited {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout
