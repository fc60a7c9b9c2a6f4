"""Configuration files, identities and start of all services of a demonstration."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from services.common.clock import Clock
from services.common.identity import Role
from services.common.keymanager_client import FetchedEpoch
from services.operators.demo.folder import DemoFolder
from services.operators.demo.options import EMBEDDED, DemoOptions
from services.operators.demo.processes import Crew
from services.operators.domain import FederationSpec
from services.operators.profile import OperatorProfile, load_profile
from services.operators.session import Session, connect

FEDERATION: Final = "demo"
AGGREGATOR: Final = "aggregator"
KEYMANAGER: Final = "keymanager"
OPERATOR: Final = "demo-operator"
MOST_TEST_ROWS: Final = 2000
"""Agents evaluate on at most this many test rows."""

_READY_PATIENCE_S: Final = 120.0
_TOKEN_LIFETIME_S: Final = 3600
_SOCKET_PATH_BYTES: Final = 100
_HOST: Final = "127.0.0.1"
_LONG_S: Final = 24 * 3600


@dataclass(frozen=True)
class Ports:
    """Loopback ports of the services."""

    keymanager: int
    enrolment: int
    membership: int
    keymanager_ops: int
    aggregator: int
    aggregator_ops: int


def choose_ports(count: int) -> list[int]:
    """Loopback ports that nobody uses now; held all together until the last is chosen, so that none comes twice."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((_HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def thread_share(agents: int) -> int:
    """CPU threads for each agent, so that all together use the cores once."""
    return max(1, len(os.sched_getaffinity(0)) // agents)


def environment(options: DemoOptions, inherited: Mapping[str, str]) -> dict[str, str]:
    """Environment of the child processes: settings of this user's own federations must not leak in."""
    kept = {name: value for name, value in inherited.items() if not name.startswith("SHELORA_")}
    threads = str(thread_share(options.agents))
    kept |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": threads}
    kept |= {"OPENBLAS_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if options.model == EMBEDDED or Path(options.model).is_dir():
        kept |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return kept


class Stage:
    """All files and processes of one demonstration.

    Args:
        options: what was chosen.
        folder: where everything lies.
        crew: starts and ends processes.
        clock: for waiting.
        labels: ordered class names; the same for all agents.
        test_rows: rows of the test file.
    """

    def __init__(
        self,
        options: DemoOptions,
        folder: DemoFolder,
        crew: Crew,
        clock: Clock,
        labels: Sequence[str],
        test_rows: int,
    ) -> None:
        self._options = options
        self._folder = folder
        self._crew = crew
        self._clock = clock
        self._labels = tuple(labels)
        self._test_rows = test_rows
        self.ports = Ports(*choose_ports(6))
        self._spare = dict(zip(options.names, choose_ports(options.agents), strict=True))

    def control_address(self, name: str) -> str:
        """Where an agent's control interface listens: a socket in its folder, or a port where that path is too long."""
        path = self._folder.agent(name) / "control.sock"
        if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES:
            return f"unix:{path}"
        return f"{_HOST}:{self._spare[name]}"

    @property
    def dashboard(self) -> str:
        """Where the aggregator shows itself to a browser."""
        return f"http://{_HOST}:{self.ports.aggregator_ops}/"

    def write(self) -> OperatorProfile:
        """Write all configuration files; returns the operator's profile."""
        folder, ports = self._folder, self.ports
        _write(
            folder.keymanager / "keymanager.yaml",
            {
                "federation": FEDERATION,
                "listen": f"{_HOST}:{ports.keymanager}",
                "enrolment_listen": f"{_HOST}:{ports.enrolment}",
                "membership_listen": f"{_HOST}:{ports.membership}",
                "ops_listen": f"{_HOST}:{ports.keymanager_ops}",
                "state_dir": "state",
                "kek_file": "kek",
                "server_names": [_HOST, "localhost"],
            },
        )
        _write(
            folder.aggregator / "aggregator.yaml",
            {
                "federation": FEDERATION,
                "listen": f"{_HOST}:{ports.aggregator}",
                "ops_listen": f"{_HOST}:{ports.aggregator_ops}",
                "state_dir": "state",
                "identity_dir": "identity",
                "enrolment_file": "enrolment.json",
            },
        )
        _write(
            folder.profile,
            {
                "federation": FEDERATION,
                "aggregator": f"{_HOST}:{ports.aggregator}",
                "keymanager": f"{_HOST}:{ports.keymanager}",
                "identity_dir": "operator/identity",
                "enrolment_file": "operator/enrolment.json",
            },
        )
        for index, name in enumerate(self._options.names):
            _write(folder.agent_config(name), self._agent(index, name))
        return load_profile(folder.profile)

    def _agent(self, index: int, name: str) -> dict[str, Any]:
        options, threads = self._options, thread_share(self._options.agents)
        data: dict[str, Any] = {
            "train": str(self._folder.data / f"{name}.jsonl"),
            "test": str(self._folder.data / "test.jsonl"),
        }
        if self._test_rows > MOST_TEST_ROWS:
            data["limit_test"] = MOST_TEST_ROWS
        return {
            "federation": FEDERATION,
            "aggregator": f"{_HOST}:{self.ports.aggregator}",
            "keymanager": f"{_HOST}:{self.ports.keymanager}",
            "enrolment_file": "enrolment.json",
            "state_dir": "state",
            "control_listen": self.control_address(name),
            "model": {"source": options.model, "labels": list(self._labels)},
            "data": data,
            "lora": {"rank": options.ranks[index]},
            "training": {"seed": options.seed + index, "threads": threads},
            "encryption": {"budget": options.budgets[index], "threads": threads},
            "reveal_dir": str(self._folder.revealed(name)),
        }

    async def start_keymanager(self) -> None:
        """Set up a fresh certificate authority and first key epoch, then serve."""
        folder = self._folder.keymanager
        config = str(folder / "keymanager.yaml")
        setup = self._crew.start("keymanager-init", ["-m", "services.keymanager", "init", "--config", config])
        await self._crew.finish(setup)
        self._folder.operator.mkdir(exist_ok=True)
        invitation = ["-m", "services.keymanager", "token", "--config", config, "--role", Role.OPERATOR.value]
        invitation += ["--name", OPERATOR, "--out", str(self._folder.operator / "enrolment.json")]
        await self._crew.finish(self._crew.start("keymanager-token", invitation))
        ready = folder / "ready.json"
        arguments = ["-m", "services.keymanager", "serve", "--config", config, "--ready-file", str(ready)]
        await self._crew.ready(self._crew.start(KEYMANAGER, arguments), ready, _READY_PATIENCE_S)

    @contextlib.asynccontextmanager
    async def operator(self, profile: OperatorProfile) -> AsyncIterator[Session]:
        """Enrol the operator and open its connections."""
        async with connect(profile, self._clock, patience_s=_READY_PATIENCE_S) as session:
            yield session

    async def invite(self, session: Session) -> None:
        """Write the enrolment files of aggregator and agents, as an operator does it."""
        enrolment, _ = await session.issue(Role.AGGREGATOR, AGGREGATOR, _TOKEN_LIFETIME_S, (_HOST, "localhost"))
        enrolment.save(self._folder.aggregator / "enrolment.json")
        for name in self._options.names:
            enrolment, _ = await session.issue(Role.AGENT, name, _TOKEN_LIFETIME_S, ())
            enrolment.save(self._folder.agent(name) / "enrolment.json")

    def start_agents(self) -> None:
        """Start all agents; they wait for the aggregator by themselves."""
        for name in self._options.names:
            config = str(self._folder.agent_config(name))
            self._crew.start(name, ["-m", "services.client_agent.cli", "run", "--config", config, "--quiet"])

    async def start_aggregator(self) -> None:
        """Start the aggregator and wait until it serves."""
        ready = self._folder.aggregator / "ready.json"
        config = str(self._folder.aggregator / "aggregator.yaml")
        arguments = ["-m", "services.aggregator", "serve", "--config", config, "--ready-file", str(ready)]
        await self._crew.ready(self._crew.start(AGGREGATOR, arguments), ready, _READY_PATIENCE_S)

    async def start_federation(self, session: Session) -> None:
        """Create the federation with the current epoch's HE parameters, and start it."""
        await session.federations.create(self.specification(await session.epoch(0)))
        await session.federations.start(FEDERATION)

    def specification(self, epoch: FetchedEpoch) -> FederationSpec:
        """The federation: all agents in every round, one may be lost, no hurry."""
        agents = self._options.agents
        return FederationSpec(
            federation=FEDERATION,
            rounds=self._options.rounds,
            target_agents=agents,
            quorum=max(2, agents - 1),
            epoch=epoch.number,
            parameters=epoch.parameters,
            basis_cap=self._options.basis_cap,
            packing=self._options.packing,
            gather_timeout_s=_LONG_S,
            negotiate_timeout_s=_LONG_S,
            train_timeout_s=_LONG_S,
            cipher_timeout_s=_LONG_S,
        )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
