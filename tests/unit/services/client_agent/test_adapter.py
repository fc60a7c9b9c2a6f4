from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from services.client_agent.adapter import AdapterState
from shelora.errors import NonFiniteValue, RankMismatch, ShapeMismatch, StoredBytesCorrupt
from shelora.lora import Adapter, Factors
from shelora.plan import DenseShape, ModelShapes, ModuleShape

SHAPES = ModelShapes((ModuleShape("q", 6, 5), ModuleShape("v", 4, 5)), (DenseShape("head.weight", (2, 3)),))


def make_state(rank: int = 2) -> AdapterState:
    generator = np.random.default_rng(1)
    modules = tuple(
        Adapter(generator.normal(size=(shape.out_features, rank)), generator.normal(size=(rank, shape.in_features)))
        for shape in SHAPES.modules
    )
    return AdapterState(modules, (generator.normal(size=(2, 3)),))


def test_save_and_load_keep_every_bit(tmp_path: Path):
    state, path = make_state(), tmp_path / "new" / "state.safetensors"
    state.save(path)
    state.save(path)
    loaded = AdapterState.load(path)
    for before, after in zip(state.modules, loaded.modules, strict=True):
        np.testing.assert_array_equal(before.a, after.a)
        np.testing.assert_array_equal(before.b, after.b)
    np.testing.assert_array_equal(state.dense[0], loaded.dense[0])
    assert [entry.name for entry in path.parent.iterdir()] == ["state.safetensors"]


def test_load_refuses_what_is_no_state(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError):
        AdapterState.load(path)
    make_state().save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(StoredBytesCorrupt, match="delete the file"):
        AdapterState.load(path)
    save_file({"modules.0.a": np.zeros((1, 2))}, path)
    with pytest.raises(StoredBytesCorrupt, match="expected format"):
        AdapterState.load(path)
    metadata = {"format": "shelora adapter state 1", "modules": "1", "dense": "0"}
    save_file({"modules.0.a": np.zeros((1, 2))}, path, metadata=metadata)
    with pytest.raises(StoredBytesCorrupt):
        AdapterState.load(path)
    save_file({"modules.0.a": np.zeros((1, 2)), "modules.0.b": np.zeros((2, 2))}, path, metadata=metadata)
    with pytest.raises(StoredBytesCorrupt, match="RankMismatch"):
        AdapterState.load(path)


def test_check_names_what_does_not_fit():
    state = make_state()
    state.check(SHAPES, 2)
    with pytest.raises(RankMismatch, match="module q: expected rank 3, got 2"):
        state.check(SHAPES, 3)
    with pytest.raises(ShapeMismatch, match="1 dense tensors, got 2 and 0"):
        AdapterState(state.modules, ()).check(SHAPES, 2)
    with pytest.raises(ShapeMismatch, match=r"head.weight: expected shape \(2, 3\)"):
        AdapterState(state.modules, (np.zeros((3, 2)),)).check(SHAPES, 2)
    with pytest.raises(ShapeMismatch, match="q: expected shape"):
        AdapterState(state.modules[::-1], state.dense).check(SHAPES, 2)
    with pytest.raises(NonFiniteValue, match=r"head.weight"):
        AdapterState(state.modules, (np.full((2, 3), np.nan),)).check(SHAPES, 2)


def make_residual(*ranks: int) -> tuple[Factors, ...]:
    generator = np.random.default_rng(2)
    return tuple(
        Factors(generator.normal(size=(shape.out_features, rank)), generator.normal(size=(rank, shape.in_features)))
        for shape, rank in zip(SHAPES.modules, ranks, strict=True)
    )


def test_a_residual_is_saved_and_loaded_also_where_a_module_has_none(tmp_path: Path):
    state, path = replace(make_state(), residual=make_residual(3, 0)), tmp_path / "state.safetensors"
    state.save(path)
    loaded = AdapterState.load(path)
    loaded.check(SHAPES, 2)
    for before, after in zip(state.residual, loaded.residual, strict=True):
        np.testing.assert_array_equal(before.left, after.left)
        np.testing.assert_array_equal(before.right, after.right)
    assert loaded.residual[1].rank == 0
    rights = loaded.right_factors()
    np.testing.assert_array_equal(rights[0], np.concatenate([state.modules[0].a, state.residual[0].right]))
    np.testing.assert_array_equal(rights[1], state.modules[1].a)
    np.testing.assert_array_equal(make_state().right_factors()[0], state.modules[0].a)


def test_a_state_without_residual_is_stored_as_ever(tmp_path: Path):
    path = tmp_path / "state.safetensors"
    make_state().save(path)
    assert AdapterState.load(path).residual == ()
    assert b"residual" not in path.read_bytes()


def test_a_residual_of_another_model_is_refused():
    state = make_state()
    with pytest.raises(ShapeMismatch, match="residual of 2 modules or none, got 1"):
        replace(state, residual=make_residual(3, 1)[:1]).check(SHAPES, 2)
    with pytest.raises(ShapeMismatch, match="q: expected shape"):
        replace(state, residual=make_residual(3, 1)[::-1]).check(SHAPES, 2)
    broken = Factors(np.full((6, 1), np.inf), np.ones((1, 5)))
    with pytest.raises(NonFiniteValue, match="q: expected finite"):
        replace(state, residual=(broken, make_residual(3, 1)[1])).check(SHAPES, 2)
