"""Measured federations run as real processes, small here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from peft import PeftConfig
from safetensors.numpy import load_file

from bench.speed.federation import given_options, measure_federation
from bench.speed.given import GivenTrainer
from bench.speed.load import Run
from bench.speed.scenarios import federation_records

RUN = Run(agents=2, modules=2, out_features=24, in_features=40, ranks=(2, 4), budgets=("25%", "full"), rounds=2)


def test_rounds_of_the_real_services_are_measured(tmp_path) -> None:
    measured = measure_federation(given_options(RUN, tmp_path / "out"), RUN)
    records = list(federation_records(measured, {}))
    assert [record["part"] for record in records] == ["round", "round", "use"]
    assert all(record["seconds"] > 0.0 and record["cipher_bytes_up"] >= 65536 for record in records[:2])
    assert records[2]["server_peak_bytes"] > 2**20
    assert not (tmp_path / "out").exists()


def test_a_verified_round_is_within_the_error_of_float32(tmp_path) -> None:
    run = replace(RUN, rounds=1)
    check = measure_federation(given_options(run, tmp_path / "out"), run, reveal=True).check
    assert check is not None
    assert check.values == 2 * 24 * 40
    assert check.max_abs_error < 1e-8


def test_plaintext_averaging_moves_an_adapter_each_way(tmp_path) -> None:
    run = replace(RUN, ranks=(4,))
    measured = measure_federation(given_options(run, tmp_path / "out"), run, plain=True)
    record = next(federation_records(measured, {}))
    assert record["bytes_up"] == record["bytes_down"] == run.lora_bytes


@pytest.mark.parametrize("index", [0, 1])
def test_given_adapters_are_saved_in_peft_s_format(tmp_path, index) -> None:
    trainer = GivenTrainer(RUN, index)
    trainer.train(1, lambda *_: None, lambda: False)
    trainer.save_adapter(tmp_path / "adapter", trainer.get_adapter())
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.r, config.lora_alpha) == (RUN.rank(index), 2.0 * RUN.rank(index))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert weights["base_model.model.layers.0.projection.lora_B.weight"].shape == (24, RUN.rank(index))
