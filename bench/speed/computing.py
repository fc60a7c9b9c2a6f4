"""The aggregator's computations of one round, alone in a process, on stored payloads of many agents.

    python -m bench.speed.computing --run run.json --folder work

Every agent's factors and ciphertext are the same stored bytes under another name, so that a thousand agents need the
disk of one; each is read, hashed and added all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anyio
import numpy as np
from safetensors.numpy import save

from bench.processes import begin_peak, memory_bytes
from bench.records import Record
from bench.speed.load import Run, read_run
from services.aggregator.compute import LocalCompute
from services.aggregator.domain import CohortMember
from services.common.blobs import Blob, DirectoryBlobStore
from services.common.threads import WorkerPool, keep_algebra_on_callers_thread
from shelora.he.parameters import CkksParameters
from shelora.plan import Negotiation, Plan, average_bytes, parse_budget, resolve_columns

PARAMETERS = CkksParameters(ring_dimension=4096, modulus=1152921504606830593, modulus_bits=60, scale_bits=50)
_THREADS = 2
_WAITING = 64


def measure_computing(run: Run, folder: Path) -> Record:
    """Run the computations of one round in a fresh process.

    Returns:
        Processor seconds of basis and projections, sum and average; peak and idle resident bytes; payload bytes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run.save(folder / "run.json")
    command = [
        sys.executable,
        "-m",
        "bench.speed.computing",
        "--run",
        str(folder / "run.json"),
        "--folder",
        str(folder),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    shutil.rmtree(folder)
    record: Record = json.loads(done.stdout.splitlines()[-1])
    return record


async def _compute(run: Run, folder: Path) -> Record:
    blobs = DirectoryBlobStore(folder / "blobs")
    plan, columns = _plan(run), _columns(run)
    ranks = [run.rank(index) for index in range(run.agents)]
    blocks = plan.layout(ranks).blocks(columns)
    members, terms = await _store(run, plan, columns, blocks, blobs)
    compute = LocalCompute(blobs, WorkerPool(_THREADS, _WAITING))
    idle_bytes = begin_peak()
    seconds: dict[str, float] = {}
    clock = time.process_time()
    basis = await compute.compute_basis(plan, members, "round")
    seconds["basis_cpu_s"] = time.process_time() - clock
    members = [replace(member, projection=basis.projections[member.agent]) for member in members]
    clock = time.process_time()
    total = None
    for first in range(0, len(terms), _WAITING):
        part = terms[first : first + _WAITING]
        total = await compute.fold_residues(total, part, blocks, PARAMETERS, f"sum-{first}")
    seconds["sum_cpu_s"] = time.process_time() - clock
    clock = time.process_time()
    average = await compute.compute_average(plan, basis.basis, members, "average")
    seconds["average_cpu_s"] = time.process_time() - clock
    factors = members[0].factors
    return {
        **seconds,
        "cpu_s": sum(seconds.values()),
        "idle_bytes": idle_bytes,
        "peak_bytes": memory_bytes(os.getpid(), "VmHWM"),
        "factors_bytes": factors.size_bytes if factors else 0,
        "cipher_bytes": terms[0].size_bytes if terms else 0,
        "average_bytes": average.size_bytes,
        "predicted_average_bytes": average_bytes(plan.shapes, plan.layout(ranks).basis_rows, columns),
    }


async def _store(
    run: Run, plan: Plan, columns: Sequence[int], blocks: int, blobs: DirectoryBlobStore
) -> tuple[list[CohortMember], list[Blob]]:
    rng = np.random.default_rng(0)
    factors: dict[int, Blob] = {}
    for rank in sorted({run.rank(index) for index in range(run.agents)}):
        tensors = {}
        for index, (module, hidden) in enumerate(zip(plan.shapes.modules, columns, strict=True)):
            tensors[f"{index}.left"] = rng.normal(scale=0.02, size=(module.out_features, rank)).astype(np.float32)
            plain = rng.normal(size=(rank, module.in_features - hidden)) / np.sqrt(module.in_features)
            tensors[f"{index}.right"] = plain.astype(np.float32)
        factors[rank] = await blobs.write(f"sent-{rank}", [save(tensors)])
    residues = rng.integers(0, PARAMETERS.modulus, size=(1, PARAMETERS.block_bytes // 8), dtype=np.uint64).tobytes()
    cipher = await blobs.write("term", [residues] * blocks)
    weight = 1.0 / run.agents
    members = []
    for index in range(run.agents):
        named = _linked(blobs, factors[run.rank(index)], f"factors/{index}")
        members.append(CohortMember(f"agent-{index}", run.rank(index), tuple(columns), weight, 1, named))
    return members, [_linked(blobs, cipher, f"cipher/{index}") for index in range(run.agents)]


def _linked(blobs: DirectoryBlobStore, blob: Blob, key: str) -> Blob:
    path = blobs.path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.hardlink_to(blobs.path(blob.key))
    return replace(blob, key=key)


def _columns(run: Run) -> tuple[int, ...]:
    return (resolve_columns(parse_budget(run.budget(0)), run.in_features),) * run.modules


def _plan(run: Run) -> Plan:
    return Plan(
        federation="scale",
        version=1,
        epoch=1,
        shapes=run.shapes,
        cap=run.cap or 4 * max(run.ranks),
        negotiation=Negotiation.ENCRYPTED,
        levels=tuple((count,) for count in _columns(run)),
        parameters_digest=PARAMETERS.digest(),
        values_per_block=PARAMETERS.values_per_block,
        packing=run.packing,
    )


def main() -> None:
    """Compute and print one record as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    keep_algebra_on_callers_thread()
    print(json.dumps(anyio.run(_compute, read_run(options.run), options.folder)))


if __name__ == "__main__":
    main()
