from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from services.client_agent.adapter import AdapterState
from services.client_agent.training.plaintext import average, cut, load_participants, main, run
from shelora.errors import InvalidConfiguration, ModelMismatch
from shelora.lora import Adapter, Factors, basis, canonical, cipher_part, project, reparameterize
from shelora.plan import FederationSeed
from support.tiny_models import sample_rows, write_jsonl

SEED = FederationSeed(bytes(range(32)))
Folder = Callable[..., Path]


@pytest.fixture
def agents(model_folder: Folder, tmp_path: Path) -> list[Path]:
    """Two agents with other ranks, amounts of data and share of labels."""
    rows = sample_rows(36)
    write_jsonl(tmp_path / "test.jsonl", sample_rows(12))
    paths = []
    for name, rank, part in (("one", 2, rows[:24]), ("two", 4, rows[24:])):
        write_jsonl(tmp_path / f"{name}.jsonl", part)
        path = tmp_path / f"{name}.yaml"
        fields = {
            "federation": "tiny",
            "aggregator": "127.0.0.1:1",
            "state_dir": f"state-{name}",
            "model": {"source": str(model_folder("bert")), "labels": ["cat", "dog"]},
            "data": {"train": f"./{name}.jsonl", "test": "./test.jsonl"},
            "lora": {"rank": rank},
            "training": {"steps": 25, "batch_size": 8, "learning_rate": 0.01, "threads": 1, "device": "cpu"},
        }
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
        paths.append(path)
    return paths


def random_states(ranks: list[int]) -> list[AdapterState]:
    generator = np.random.default_rng(2)
    return [
        AdapterState(
            (Adapter(generator.normal(size=(9, rank)), generator.normal(size=(rank, 7))),), (generator.normal(size=3),)
        )
        for rank in ranks
    ]


def test_the_average_is_weighted_by_examples():
    one, two = random_states([2, 3])
    (update,), (dense,) = average([one, two], [2.0, 0.5], [30, 10])
    expected = 0.75 * 2.0 * one.modules[0].b @ one.modules[0].a + 0.25 * 0.5 * two.modules[0].b @ two.modules[0].a
    np.testing.assert_allclose(update, expected, rtol=1e-12)
    np.testing.assert_allclose(dense, 0.75 * one.dense[0] + 0.25 * two.dense[0], rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_equals_the_protocols_average_when_the_basis_holds_everything(rank: int):
    """Adapters, not only their products: the same signs and the same balance."""
    ranks, scalings, weights = [2, 3], [2.0, 0.5], [0.75, 0.25]
    states = random_states(ranks)
    factors = [canonical(s.modules[0].b, s.modules[0].a, scale) for s, scale in zip(states, scalings, strict=True)]
    common = basis([factor.left for factor in factors], weights, 7)
    core = sum(
        cipher_part(project(common, factor.left), factor.right, weight)
        for factor, weight in zip(factors, weights, strict=True)
    )
    rows = np.full((rank, 7), 0.1)
    protocol = reparameterize(common, core, rank, 1.5, rows)
    (update,), _ = average(states, scalings, weights)
    plain = cut(update, rank, 1.5, rows)
    np.testing.assert_allclose(plain.b, protocol.b, atol=1e-9)
    np.testing.assert_allclose(plain.a, protocol.a, atol=1e-9)


def test_rounds_raise_accuracy_for_every_rank(agents: list[Path]):
    participants = load_participants(agents, [], SEED)
    assert [participant.name for participant in participants] == ["one", "two"]
    one, two = (participant.start for participant in participants)
    np.testing.assert_array_equal(one.modules[0].a, two.modules[0].a[:2])
    assert not two.modules[0].b.any()
    np.testing.assert_array_equal(one.dense[0], two.dense[0])
    records = run(participants, 2)
    assert [record["round"] for record in records] == [1, 2]
    first, last = records[0]["agents"], records[1]["agents"]
    assert [(agent["agent"], agent["rank"], agent["examples"]) for agent in last] == [("one", 2, 24), ("two", 4, 12)]
    for before, after in zip(first, last, strict=True):
        assert before["accuracy_before"] == 0.5
        assert after["accuracy_before"] == before["accuracy_after"]
        assert after["accuracy_after"] == 1.0


def test_a_residual_counts_like_the_adapter():
    one, two = random_states([2, 3])
    kept = Factors(one.modules[0].b[:, :1], two.modules[0].a[:1])
    (update,), _ = average([replace(one, residual=(kept,)), two], [2.0, 0.5], [30, 10])
    (without,), _ = average([one, two], [2.0, 0.5], [30, 10])
    np.testing.assert_allclose(update, without + 0.75 * kept.left @ kept.right, rtol=1e-12)


def test_a_sent_rank_keeps_what_the_cut_to_the_rank_would_take(agents: list[Path]):
    """Working models with the residual are the average cut to the sent rank: their losses are those of that rank."""
    for path in agents:
        fields = yaml.safe_load(path.read_text())
        fields["lora"] |= {"sent_rank": 6}
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    kept = load_participants(agents, [], SEED)
    records = run(kept, 2)
    assert [agent["rank"] for agent in records[1]["agents"]] == [2, 4]
    assert all(agent["accuracy_after"] == 1.0 for agent in records[1]["agents"])
    # Both agents hold the same model, so what they say of the same test texts is the same.
    losses = [participant.trainer.evaluate().loss for participant in kept]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    kept[0].trainer.set_residual(None)
    assert kept[0].trainer.evaluate().loss != pytest.approx(losses[1], rel=1e-4)


def test_the_command_writes_a_report_and_starts_from_saved_adapters(agents: list[Path], tmp_path: Path):
    folders = []
    for participant in load_participants(agents, [], SEED):
        folders.append(tmp_path / "initial" / participant.name)
        participant.trainer.save_adapter(folders[-1], participant.start)
    reports = []
    for number in range(2):
        out = tmp_path / f"report-{number}.json"
        arguments = ["--agents", *map(str, agents), "--initial", *map(str, folders), "--rounds", "1", "--out", str(out)]
        assert main(arguments) == 0
        reports.append(json.loads(out.read_text()))
    for report in reports:
        for agent in report["rounds"][0]["agents"]:
            assert agent.pop("seconds_train") > 0
    assert reports[0] == reports[1]


def test_bad_input_is_refused(agents: list[Path], tmp_path: Path, model_folder: Folder):
    with pytest.raises(InvalidConfiguration, match="--initial: expected 2 folders"):
        load_participants(agents, [tmp_path], SEED)
    fields = yaml.safe_load(agents[1].read_text())
    fields["model"]["source"] = str(model_folder("roberta"))
    agents[1].write_text(yaml.safe_dump(fields))
    with pytest.raises(ModelMismatch, match=r"two.yaml: expected the model"):
        load_participants(agents, [], SEED)
    out = tmp_path / "report.json"
    assert main(["--agents", str(tmp_path / "none.yaml"), "--rounds", "1", "--out", str(out)]) == 2
    assert not out.exists()
    with pytest.raises(SystemExit) as caught:
        main(["--agents", str(agents[0]), "--rounds", "0", "--out", str(out)])
    assert caught.value.code == 2


def test_equal_file_names_are_told_apart_by_folder(agents: list[Path], tmp_path: Path):
    moved = []
    for path in agents:
        fields = yaml.safe_load(path.read_text())
        fields["data"] = {"train": str(tmp_path / f"{path.stem}.jsonl"), "test": str(tmp_path / "test.jsonl")}
        moved.append(tmp_path / f"agent-{path.stem}" / "agent.yaml")
        moved[-1].parent.mkdir()
        moved[-1].write_text(yaml.safe_dump(fields))
    assert [participant.name for participant in load_participants(moved, [], SEED)] == ["agent-one", "agent-two"]
