"""The published server procedure, re-created with TenSEAL to measure against on the same machine.

One LoRA pair at a time: agents encrypt columns of A, one ciphertext each; the server multiplies each with an agent's B
under encryption, adds the products; the average is decrypted, joined with the plain columns as an m x n matrix, and
decomposed.
Parameters are the published ones: ring dimension 8192, moduli of 60, 40 and 60 bits, scale 2^24.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import tenseal

from bench.records import Record
from bench.speed.load import Run
from shelora.plan import parse_budget, resolve_columns

_RING_DIMENSION: Final = 8192
_MODULUS_BITS: Final = (60, 40, 60)
_SCALE: Final = 2.0**24
_DEVIATION: Final = 0.02

ENCRYPTED_STEPS: Final = ("encrypt", "multiply", "add", "decrypt")
PLAIN_STEPS: Final = ("average", "svd")

Float64 = npt.NDArray[np.float64]
T = TypeVar("T")


@dataclass
class Stopwatch:
    """Seconds by step."""

    seconds: dict[str, float]

    def timed(self, step: str, work: Callable[[], T]) -> T:
        """Do something and add the time it took."""
        started = time.perf_counter()
        result = work()
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started
        return result


def measure_baseline(run: Run, pairs: int, columns: int) -> Record:
    """Run the procedure on a few pairs.

    Args:
        run: sizes.
        pairs: pairs to measure.
        columns: encrypted columns of each.

    Returns:
        Means of one pair: seconds by step, up_bytes an agent, sum_bytes; largest max_abs_error of what was opened.
    """
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, _RING_DIMENSION, coeff_mod_bit_sizes=list(_MODULUS_BITS))
    context.generate_galois_keys()
    context.global_scale = _SCALE
    rng = np.random.default_rng(0)
    measured = [_measure_pair(context, run, columns, rng) for _ in range(pairs)]
    mean = {key: float(np.mean([one[key] for one in measured])) for key in measured[0]}
    error = max(one["max_abs_error"] for one in measured)
    return {**mean, "pairs": pairs, "columns": columns, "max_abs_error": error}


def scale_baseline(measured: Record, run: Run) -> Record:
    """What a whole workload takes the procedure, from what a few pairs took.

    Steps under encryption are linear in encrypted columns, all steps are linear in pairs.

    Returns:
        total_s, seconds by step, up_bytes an agent, down_bytes; columns_scale and pairs_scale that were applied.
    """
    columns = max(1, resolve_columns(parse_budget(run.budget(0)), run.in_features))
    scale = columns / measured["columns"]
    seconds = {f"{step}_s": run.modules * scale * measured[f"{step}_s"] for step in ENCRYPTED_STEPS}
    seconds |= {f"{step}_s": run.modules * measured[f"{step}_s"] for step in PLAIN_STEPS}
    return {
        **seconds,
        "total_s": sum(seconds.values()),
        "up_bytes": run.modules * scale * measured["up_bytes"],
        "down_bytes": run.modules * scale * measured["sum_bytes"],
        "columns_scale": scale,
        "pairs_scale": run.modules / measured["pairs"],
    }


def _measure_pair(context: Any, run: Run, columns: int, rng: np.random.Generator) -> dict[str, float]:
    rank, agents = run.rank(0), run.agents
    a = [rng.normal(scale=_DEVIATION, size=(rank, run.in_features)) for _ in range(agents)]
    b = [rng.normal(scale=_DEVIATION, size=(run.out_features, rank)) for _ in range(agents)]
    watch = Stopwatch({})

    def encrypt() -> list[list[bytes]]:
        return [[tenseal.ckks_vector(context, one[:, c]).serialize() for c in range(columns)] for one in a]

    def multiply() -> list[list[bytes]]:
        return [_multiply(context, one, factor / agents) for one, factor in zip(sent, b, strict=True)]

    def decrypt() -> Float64:
        opened = [np.array(tenseal.ckks_vector_from(context, one).decrypt()) for one in sums]
        return np.stack(opened, axis=1)[: run.out_features]

    def mean() -> Float64:
        total = np.zeros((run.out_features, run.in_features))
        for left, right in zip(b, a, strict=True):
            total += left @ right
        return total / agents

    sent = watch.timed("encrypt", encrypt)
    products = watch.timed("multiply", multiply)
    sums = watch.timed("add", lambda: [add_terms(context, [one[c] for one in products]) for c in range(columns)])
    opened = watch.timed("decrypt", decrypt)
    average = watch.timed("average", mean)
    error = float(np.abs(opened - average[:, :columns]).max())
    average[:, :columns] = opened
    watch.timed("svd", lambda: np.linalg.svd(average, full_matrices=False))
    return {
        **{f"{step}_s": seconds for step, seconds in watch.seconds.items()},
        "up_bytes": sum(len(one) for agent in sent for one in agent) / agents,
        "sum_bytes": float(sum(map(len, sums))),
        "max_abs_error": error,
    }


def _multiply(context: Any, columns: list[bytes], factor: Any) -> list[bytes]:
    """One agent's B times each of its encrypted columns."""
    plain = tenseal.plain_tensor(factor.T.copy())
    return [tenseal.ckks_vector_from(context, one).mm(plain).serialize() for one in columns]


def add_terms(context: Any, terms: Sequence[bytes]) -> bytes:
    """Sum of serialized ciphertexts, serialized."""
    total = tenseal.ckks_vector_from(context, terms[0])
    for term in terms[1:]:
        total += tenseal.ckks_vector_from(context, term)
    serialized: bytes = total.serialize()
    return serialized
