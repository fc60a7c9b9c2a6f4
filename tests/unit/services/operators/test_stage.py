from __future__ import annotations

import os
from pathlib import Path

import pytest

from services.aggregator.config import AggregatorConfig
from services.client_agent.config import AgentConfig
from services.common.clock import SystemClock
from services.common.config import load_config
from services.common.identity import Role
from services.keymanager.config import KeyManagerConfig
from services.operators.demo.folder import DemoFolder, take_folder
from services.operators.demo.options import DemoOptions, choose
from services.operators.demo.processes import Crew
from services.operators.demo.stage import Stage, choose_ports, environment, thread_share


def stage(folder: DemoFolder, options: DemoOptions, test_rows: int = 10) -> Stage:
    return Stage(options, folder, Crew({}, folder.logs, SystemClock()), SystemClock(), ("no", "yes"), test_rows)


def options(out: Path, model: str = "embedded") -> DemoOptions:
    return choose(
        data=None, test=None, model=model, agents=3, rounds=2, ranks="4,8", budgets="full,5%", compare=None, out=out
    )  # fmt: skip


def test_every_service_can_read_its_file(tmp_path) -> None:
    chosen = options(tmp_path / "demo")
    with take_folder(chosen.out) as folder:
        profile = stage(folder, chosen).write()
        keymanager = load_config(KeyManagerConfig, folder.keymanager / "keymanager.yaml")
        aggregator = load_config(AggregatorConfig, folder.aggregator / "aggregator.yaml")
        agents = [load_config(AgentConfig, folder.agent_config(name), service="agent") for name in chosen.names]

    assert profile.aggregator == aggregator.listen == agents[0].aggregator
    assert profile.keymanager_address() == keymanager.listen == agents[0].keymanager
    assert keymanager.advertised(Role.AGENT) == (profile.keymanager_address(), keymanager.enrolment_listen)
    assert keymanager.advertised(Role.AGGREGATOR) == (keymanager.membership_listen, keymanager.enrolment_listen)
    assert [agent.lora.rank for agent in agents] == [4, 8, 4]
    assert [agent.encryption.budget for agent in agents] == ["full", "5%", "full"]
    assert len({agent.training.seed for agent in agents}) == 3
    assert {agent.model.labels for agent in agents} == {("no", "yes")}
    assert all(agent.reveal_dir is not None and folder.root in agent.reveal_dir.parents for agent in agents)
    assert all(
        folder.root in path.parents for path in (keymanager.state_dir, keymanager.kek_file, aggregator.state_dir)
    )


def test_large_test_files_are_not_evaluated_whole(tmp_path) -> None:
    chosen = options(tmp_path / "demo")
    for rows, limit in ((2000, None), (2001, 2000)):
        with take_folder(chosen.out) as folder:
            stage(folder, chosen, rows).write()
            agent = load_config(AgentConfig, folder.agent_config("agent-1"), service="agent")
        assert agent.data.limit_test == limit


def test_control_falls_back_to_a_port_where_the_socket_path_is_too_long(tmp_path) -> None:
    short, long = Path("/tmp/d"), tmp_path / ("x" * 100)
    folder = DemoFolder(short)
    assert stage(folder, options(short)).control_address("agent-1") == "unix:/tmp/d/agents/agent-1/control.sock"
    address = stage(DemoFolder(long), options(long)).control_address("agent-1")
    assert address.startswith("127.0.0.1:")


def test_ports_are_different() -> None:
    assert len(set(choose_ports(20))) == 20


@pytest.mark.parametrize(("model", "offline"), [("embedded", True), ("someone/encoder", False)])
def test_children_do_not_inherit_settings_of_other_federations(tmp_path, model, offline) -> None:
    inherited = {"PATH": "/bin", "SHELORA_AGENT__LORA__RANK": "99", "SHELORA_PROFILE": "mine.yaml"}
    found = environment(options(tmp_path, model), inherited)
    assert found["PATH"] == "/bin"
    assert not [name for name in found if name.startswith("SHELORA_")]
    assert ("HF_HUB_OFFLINE" in found) is offline


def test_agents_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert thread_share(1) == cores
    assert thread_share(1000) == 1
