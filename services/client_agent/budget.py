"""From a configured HE budget to encrypted columns per module."""

from __future__ import annotations

import asyncio
import os
import time

from services.client_agent.config import AgentConfig
from services.client_agent.domain import Terms
from services.client_agent.keys import EpochKeys
from services.client_agent.state import AgentState
from shelora.he.secret import measure_encrypt_rate
from shelora.plan import BudgetKind, HeRate, ModelShapes, resolve_plan_columns

ASSUMED_UPLOAD_BYTES_PER_S = 1.25e6
"""Used by `auto` before the agent has measured an upload of its own (10 Mbit/s)."""
_CAP_FACTOR = 4


async def resolve_budget(
    config: AgentConfig, state: AgentState, shapes: ModelShapes, epoch: EpochKeys, terms: Terms
) -> tuple[int, ...]:
    """Encrypted columns k per module for the configured budget and the federation's terms.

    `auto` measures this device's encryption rate, takes the upload rate of its last ciphertext, and assumes that the
    basis reaches its cap, so a smaller cohort only makes a round faster. The result is kept on disk: an agent that is
    restarted inside a round must not come back with another one.
    """
    path = state.root / "budget.json"
    key = {"budget": config.encryption.budget, "shapes": shapes.digest().hex()}
    kept = state.read_json(path)
    if {name: kept.get(name) for name in key} == key:
        return tuple(int(count) for count in kept["columns"])
    columns = await _resolve(config, state, shapes, epoch, terms)
    state.write_json(path, key | {"columns": list(columns)})
    return columns


async def _resolve(
    config: AgentConfig, state: AgentState, shapes: ModelShapes, epoch: EpochKeys, terms: Terms
) -> tuple[int, ...]:
    budget = config.encryption.parsed_budget
    cap = terms.basis_cap or _CAP_FACTOR * config.lora.effective_sent_rank
    rows = tuple(min(module.out_features, cap) for module in shapes.modules)
    rate = None
    if budget.kind is BudgetKind.AUTO:
        values_per_s = await asyncio.to_thread(measure_encrypt_rate, epoch.encryptor, time.perf_counter)
        link = state.read_json(state.root / "link.json")
        rate = HeRate(values_per_s, float(link.get("upload_bytes_per_s", ASSUMED_UPLOAD_BYTES_PER_S)))
    dense_values = sum(tensor.size for tensor in shapes.dense)
    return resolve_plan_columns(budget, shapes.modules, rate, rows, dense_values, packing=terms.packing)


def default_threads() -> int:
    """One encryption thread a core that this process may use."""
    return len(os.sched_getaffinity(0))
