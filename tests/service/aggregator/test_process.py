"""The command line, the process, and its orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr
from typer.testing import CliRunner

from services.aggregator import host
from services.aggregator.__main__ import EXIT_REFUSED, EXIT_USAGE, app
from services.aggregator.config import AggregatorConfig
from services.common.channel import open_channel, receive_stream
from services.common.clock import SystemClock
from services.common.config import load_config
from services.common.enrolment import Enrolment
from services.common.grpc_errors import translate
from services.common.identity import Role
from services.common.tls import channel_credentials
from shelora import errors
from shelora.v1 import aggregator_pb2 as wire
from support.aggregator import FEDERATION, Member, running_aggregator, upload_header
from support.authority import ThrowawayAuthority
from support.clock import FakeClock
from support.keymanager import serving_keymanager
from support.rounds import BUDGETS
from support.updates import sensitivities


@pytest.fixture
def authority(tmp_path):
    return ThrowawayAuthority(tmp_path / "identities", FEDERATION)


@pytest.fixture
def config_file(tmp_path, authority):
    authority.issue(Role.AGGREGATOR, "aggregator")
    path = tmp_path / "aggregator.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "federation": FEDERATION,
                "listen": "127.0.0.1:0",
                "ops_listen": "127.0.0.1:0",
                "state_dir": "state",
                "identity_dir": "identities/ward-aggregator-aggregator",
                "limits": {"max_agents": 5},
            }
        )
    )
    return path


@contextlib.asynccontextmanager
async def spawned(config_file):
    """A real process that serves; yields it with its ports."""
    ready_file = config_file.with_name("ready.json")
    command = [sys.executable, "-m", "services.aggregator", "serve", "--config", str(config_file)]
    process = _spawn([*command, "--ready-file", str(ready_file)], config_file.with_name("log"))
    try:
        for _ in range(6000):
            if ready_file.exists() or process.poll() is not None:
                break
            await asyncio.sleep(0.01)
        yield process, json.loads(ready_file.read_text())
    finally:
        process.kill()
        process.wait()


def _spawn(command, log_file):
    with log_file.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


async def test_sigterm_drains_streams_and_exits_with_success(config_file, authority):
    async with spawned(config_file) as (process, ports):
        credentials = channel_credentials(authority.issue(Role.OPERATOR, "olga"))
        channel = open_channel(f"127.0.0.1:{ports['grpc']}", credentials)
        operator = Member("olga", channel)
        await operator.create()
        request = wire.WatchEventsRequest(federation=FEDERATION)
        events = receive_stream(operator.federations.WatchEvents, request, timeout_s=30)
        assert (await anext(events)).kind == "federation_created"
        stub: Any = health_pb2_grpc.HealthStub(channel)
        health = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert ports["pid"] == process.pid

        process.send_signal(signal.SIGTERM)

        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        health.cancel()
        with pytest.raises(errors.Draining):
            await anext(events)
        assert await asyncio.to_thread(process.wait, 30) == 0
        assert not config_file.with_name("ready.json").exists()
        await channel.close()


async def test_kill_loses_nothing_that_was_acknowledged(config_file, authority):
    credentials = channel_credentials(authority.issue(Role.OPERATOR, "olga"))
    for attempt in range(2):
        async with spawned(config_file) as (process, ports):
            channel = open_channel(f"127.0.0.1:{ports['grpc']}", credentials)
            operator = Member("olga", channel)
            if attempt == 0:
                await operator.create()
                assert (await operator.start()).state == wire.FEDERATION_STATE_GATHERING
            else:
                assert (await operator.federation()).state == wire.FEDERATION_STATE_GATHERING
            os.kill(process.pid, signal.SIGKILL)
            await asyncio.to_thread(process.wait)
            await channel.close()
        config_file.with_name("ready.json").unlink()


async def test_a_second_process_on_the_same_state_is_refused(tmp_path):
    async with running_aggregator(tmp_path) as running:
        with pytest.raises(errors.InvalidConfiguration, match="expected to be its only user"):
            await host.serve(running.config, SystemClock(), asyncio.Event())
    async with running_aggregator(tmp_path):
        pass


@pytest.mark.parametrize(
    ("role", "federation", "text"),
    [
        (Role.AGENT, FEDERATION, "got spiffe://ward/agent/odd"),
        (Role.AGGREGATOR, "elsewhere", "expected an aggregator of ward, got spiffe://elsewhere"),
    ],
)
async def test_an_identity_for_something_else_is_refused(tmp_path, authority, role, federation, text):
    folder = authority.issue(role, "odd", federation=federation).folder
    with pytest.raises(errors.IdentityConflict, match=text):
        async with running_aggregator(tmp_path, identity_dir=folder):
            raise AssertionError("it serves")


async def test_too_many_agents_are_refused(tmp_path):
    limits = {"max_agents": 2}
    async with running_aggregator(tmp_path, limits=limits) as running, contextlib.AsyncExitStack() as stack:
        operator = await stack.enter_async_context(running.member(Role.OPERATOR, "olga"))
        await operator.create()
        for index in range(2):
            agent = await stack.enter_async_context(running.member(Role.AGENT, f"agent-{index}"))
            await agent.register(2, (10, 6))
        agent = await stack.enter_async_context(running.member(Role.AGENT, "agent-2"))
        with pytest.raises(errors.QuotaExceeded, match="at most 2 agents"):
            await agent.register(2, (10, 6))


async def test_payloads_beyond_the_operators_limit_are_refused(tmp_path):
    limits = {"max_payload_bytes": 100}
    async with running_aggregator(tmp_path, limits=limits) as running, contextlib.AsyncExitStack() as stack:
        operator = await stack.enter_async_context(running.member(Role.OPERATOR, "olga"))
        await operator.create(target_agents=2)
        agents = [await stack.enter_async_context(running.member(Role.AGENT, name)) for name in ("agent-1", "agent-2")]
        for agent in agents:
            await agent.register(*BUDGETS[agent.name])
        await operator.start()
        view = await agents[0].until(wire.AGENT_TASK_NEGOTIATE)
        payload = sensitivities()
        with pytest.raises(errors.PayloadTooLarge, match="at most 100 bytes"):
            await agents[0].upload(upload_header(view, wire.PAYLOAD_KIND_SENSITIVITY, payload), payload)


def test_command_line_says_what_is_wrong(tmp_path, config_file):
    runner = CliRunner()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("federation: Ward\ncolour: red\n")

    result = runner.invoke(app, ["serve", "--config", str(wrong)])
    assert result.exit_code == EXIT_USAGE
    assert "federation name: expected 1 to 63 characters" in result.output
    assert "colour: expected no such field" in result.output

    content = yaml.safe_load(config_file.read_text())
    config_file.write_text(yaml.safe_dump({**content, "federation": "another"}))
    result = runner.invoke(app, ["serve", "--config", str(config_file)])
    assert result.exit_code == EXIT_REFUSED
    assert "identity_conflict" in result.output


def test_migrate_makes_the_database(config_file, tmp_path):
    for _ in range(2):
        assert CliRunner().invoke(app, ["migrate", "--config", str(config_file)]).exit_code == 0
    assert (tmp_path / "state" / "aggregator.db").is_file()


def test_configuration_defaults_and_overrides(config_file, tmp_path):
    environ = {"SHELORA_AGGREGATOR__COMPUTE_THREADS": "7", "SHELORA_AGGREGATOR__LIMITS__MAX_AGENTS": "9"}
    config = load_config(AggregatorConfig, config_file, environ=environ)

    assert config.compute_threads == 7
    assert config.limits.max_agents == 9
    assert config.database == f"sqlite:///{tmp_path / 'state' / 'aggregator.db'}"
    assert AggregatorConfig(federation="ward").identity.as_posix() == "aggregator-state/identity"
    other = AggregatorConfig(federation="ward", database_url=SecretStr("postgresql+asyncpg://u:secret@db/x"))
    assert other.database == "postgresql+asyncpg://u:secret@db/x"
    assert "secret" not in repr(other)


async def test_stop_while_still_enrolling_ends_at_once(tmp_path, authority):
    enrolment = Enrolment(
        FEDERATION, Role.AGGREGATOR, "aggregator", "token", authority.pem.decode(), "127.0.0.1:9", "127.0.0.1:9"
    )
    enrolment.save(tmp_path / "enrolment.json")
    stop = asyncio.Event()
    config = AggregatorConfig(
        federation=FEDERATION, state_dir=tmp_path / "state", enrolment_file=tmp_path / "enrolment.json"
    )
    task = asyncio.create_task(host.serve(config, FakeClock(), stop))
    asyncio.get_running_loop().call_later(0.3, stop.set)
    await asyncio.wait_for(task, 20)
    assert not (tmp_path / "state" / "aggregator.db").exists()


async def test_an_address_in_use_is_reported(tmp_path):
    async with running_aggregator(tmp_path) as running:
        taken = {"listen": running.address, "state_dir": tmp_path / "other"}
        with pytest.RaisesGroup(
            pytest.RaisesExc(errors.InvalidConfiguration, match="could not bind"), flatten_subgroups=True
        ) as caught:
            await host.serve(running.config.model_copy(update=taken), SystemClock(), asyncio.Event())
    # What the command line prints.
    assert isinstance(translate(caught.value), errors.InvalidConfiguration)


async def test_a_real_key_manager_enrols_it(tmp_path):
    async with serving_keymanager(tmp_path / "keymanager") as keymanager:
        file = tmp_path / "enrolment.json"
        (await keymanager.enrolment(Role.AGGREGATOR, "aggregator")).save(file)
        changes = {"federation": "clinics", "identity_dir": tmp_path / "identity", "enrolment_file": file}
        async with running_aggregator(tmp_path, **changes) as running:
            files = await keymanager.member(Role.OPERATOR, "olga")
            channel = open_channel(running.address.replace("127.0.0.1", "localhost"), channel_credentials(files))
            created = await Member("olga", channel).create(federation="clinics")
            assert created.state == wire.FEDERATION_STATE_CREATED
            await channel.close()
