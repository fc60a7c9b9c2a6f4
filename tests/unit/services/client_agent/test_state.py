from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from services.client_agent.adapter import AdapterState
from services.client_agent.figures import RoundFigures
from services.client_agent.reveal import Reveal
from services.client_agent.round import AveragedUpdate, LocalUpdate
from services.client_agent.state import AgentState, load_tensors, write_file, write_tensors
from shelora.errors import InvalidConfiguration, StoredBytesCorrupt
from shelora.lora import Adapter, Factors


@pytest.fixture
def state(tmp_path: Path) -> AgentState:
    return AgentState(tmp_path / "agent")


def make_update() -> LocalUpdate:
    rng = np.random.default_rng(0)
    factors = tuple(Factors(rng.normal(size=(5, 2)), rng.normal(size=(2, 3))) for _ in range(12))
    return LocalUpdate(factors, (rng.normal(size=(2, 2)), np.asarray(1.5)))


def test_an_update_comes_back_bit_for_bit(state):
    assert state.load_update(3) is None
    assert not (state.root / "rounds").exists()
    update = make_update()
    metadata = {"examples": 17, "metrics": {"loss": 0.25, "text": 1e-300}}
    state.save_update(3, update, metadata)
    loaded = state.load_update(3)
    assert loaded is not None
    assert loaded[1] == metadata
    assert len(loaded[0].factors) == 12
    for one, other in zip(update.factors, loaded[0].factors, strict=True):
        np.testing.assert_array_equal(one.left, other.left)
        np.testing.assert_array_equal(one.right, other.right)
    for tensor, again in zip(update.dense, loaded[0].dense, strict=True):
        np.testing.assert_array_equal(tensor, again)


def test_only_the_agent_may_read(state):
    state.save_update(1, make_update(), {})
    path = state.round(1) / "factors.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (state.root, state.round(1), state.plan(1), state.epoch(1)):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_applied_round_and_adapters(state):
    assert state.applied_round() == 0
    assert state.adapter_rounds() == []
    state.set_applied_round(12)
    assert AgentState(state.root).applied_round() == 12
    for number in (0, 2, 11):
        state.adapter(number).mkdir(parents=True)
    (state.root / "adapters" / ".round-003.77.part").mkdir()
    (state.root / "adapters" / "round-00x").mkdir()
    assert state.adapter_rounds() == [0, 2, 11]


def test_what_does_not_parse_is_told(state):
    path = state.root / "state.json"
    path.write_text("{")
    with pytest.raises(StoredBytesCorrupt, match="not JSON"):
        state.applied_round()
    path.write_text("[1]")
    with pytest.raises(StoredBytesCorrupt, match="not a JSON object"):
        state.applied_round()
    (state.round(1) / "factors.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0garbage")
    with pytest.raises(StoredBytesCorrupt, match="factors"):
        state.load_update(1)
    state.save_update(2, make_update(), {})
    whole = state.round(2) / "factors.safetensors"
    whole.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(StoredBytesCorrupt):
        state.load_update(2)


def test_forgetting_keeps_figures_newer_rounds_and_the_newest_adapter(state):
    figures = RoundFigures(state)
    adapter = AdapterState((Adapter(np.zeros((2, 1)), np.zeros((1, 2))),), ())
    for number in (0, 1, 2, 3):
        adapter.save(state.adapter_state(number))
        state.adapter(number).mkdir(parents=True)
    for number in (1, 2, 3):
        figures.add(number, loss=number)
        write_file(state.round(number) / "cipher.upload", b"x")
        (state.round(number) / ".average.download.00.part").write_bytes(b"x")
    state.forget_rounds(2)
    left = {path.relative_to(state.root).as_posix() for path in (state.root / "rounds").rglob("*") if path.is_file()}
    assert left == {
        "rounds/1/figures.json",
        "rounds/2/figures.json",
        "rounds/3/figures.json",
        "rounds/3/cipher.upload",
        "rounds/3/.average.download.00.part",
    }
    assert [number for number in range(4) if state.adapter_state(number).exists()] == [2, 3]
    assert state.adapter_rounds() == [0, 1, 2, 3]


def test_one_agent_a_folder(state):
    with state.exclusive(), pytest.raises(InvalidConfiguration, match="another agent works in"), state.exclusive():
        pass
    with state.exclusive():
        pass


def test_figures_add_up_and_survive(state):
    figures = RoundFigures(state)
    assert figures.get(4) == {"bytes_up": 0.0, "bytes_down": 0.0, "he_seconds": 0.0}
    assert not (state.root / "rounds").exists()
    figures.add(4, factors_bytes_up=10, seconds_he_encrypt=1.5)
    figures.add(4, cipher_bytes_up=5, average_bytes_down=7, cipher_bytes_down=8, projection_bytes_down=1)
    figures.add(4, seconds_he_decrypt=0.5, cipher_bytes_up=6)
    found = RoundFigures(AgentState(state.root)).get(4)
    assert (found["bytes_up"], found["bytes_down"], found["he_seconds"]) == (16.0, 16.0, 2.0)
    assert found["cipher_bytes_up"] == 6.0


def test_reveal_writes_what_the_verifier_reads(tmp_path):
    update = make_update()
    reveal = Reveal(tmp_path)
    reveal.factors(7, update, 33)
    tensors = load_tensors(tmp_path / "round-007-factors.safetensors")
    assert len(tensors) == 26
    np.testing.assert_array_equal(tensors["3.left"], update.factors[3].left)
    np.testing.assert_array_equal(tensors["dense.0"], update.dense[0])
    opened = AveragedUpdate((np.eye(3, 2),), (np.ones((2, 4)),), (np.zeros(2),))
    reveal.average(7, opened, ["a", "b"])
    tensors = load_tensors(tmp_path / "round-007-average.safetensors")
    assert sorted(tensors) == ["0.basis", "0.core", "dense.0"]
    assert all(tensor.dtype == np.float64 for tensor in tensors.values())
    assert b'["a", "b"]' in (tmp_path / "round-007-average.safetensors").read_bytes().replace(b"\\", b"")


def test_writes_are_whole(state, monkeypatch):
    path = state.root / "some.safetensors"
    write_tensors(path, {"x": np.zeros(2)})

    def broken(descriptor: int) -> None:
        raise OSError("the disk broke")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="the disk broke"):
        write_tensors(path, {"x": np.ones(2)})
    monkeypatch.undo()
    np.testing.assert_array_equal(load_tensors(path)["x"], np.zeros(2))
    assert [entry.name for entry in state.root.iterdir()] == ["some.safetensors"]
