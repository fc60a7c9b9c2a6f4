"""The same vectors through this project's encryption and through TenSEAL as NVFlare sets it up: one vector a layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import tenseal

from bench.records import Record
from bench.speed.baseline import add_terms
from bench.speed.load import Run
from shelora.he.residues import sum_residues
from shelora.he.secret import CkksContext, Decryptor, Encryptor

_RING_DIMENSION: Final = 8192
_SLOTS: Final = _RING_DIMENSION // 2
_MODULUS_BITS: Final = (60, 40, 40)
_SCALE: Final = 2.0**40
_DEVIATION: Final = 0.02
Float64 = npt.NDArray[np.float64]
T = TypeVar("T")


def measure_vectors(run: Run, layers: int, repeats: int) -> Iterator[Record]:
    """Encrypt, add and open the adapters of a few layers, whole, with both libraries.

    Args:
        run: sizes; every agent's A and B of a layer are one vector.
        layers: layers to measure.
        repeats: how often.

    Yields:
        One record a library and repeat: seconds by step, bytes of an agent, values, largest absolute error of the mean.
    """
    rng = np.random.default_rng(0)
    size = run.rank(0) * (run.out_features + run.in_features)
    vectors = [[rng.normal(scale=_DEVIATION, size=size) for _ in range(layers)] for _ in range(run.agents)]
    for repeat in range(repeats):
        common = {"repeat": repeat, "layers": layers, "agents": run.agents, "values": layers * size}
        yield common | {"library": "shelora"} | _ours(vectors)
        yield common | {"library": "TenSEAL"} | _tenseal(vectors)


def _ours(vectors: list[list[Float64]]) -> Record:
    context = CkksContext.create()
    keys = context.generate_keys()
    public, secret = keys.public, keys.secret
    with Encryptor(context, public, 1) as encryptor, Decryptor(context, public, secret, 1) as decryptor:
        encryptor.encrypt(vectors[0][0])
        encrypt_s, sent = _timed(lambda: [[encryptor.encrypt(one) for one in agent] for agent in vectors])
        modulus = context.parameters.modulus
        add_s, sums = _timed(lambda: [sum_residues(layer, modulus) for layer in zip(*sent, strict=True)])
        sizes = [one.size for one in vectors[0]]
        decrypt_s, opened = _timed(
            lambda: [decryptor.decrypt(one, size) for one, size in zip(sums, sizes, strict=True)]
        )
    sent_bytes = sum(one.nbytes for one in sent[0])
    return _record(vectors, opened, encrypt_s, add_s, decrypt_s, sent_bytes)


def _tenseal(vectors: list[list[Float64]]) -> Record:
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, _RING_DIMENSION, coeff_mod_bit_sizes=list(_MODULUS_BITS))
    context.global_scale = _SCALE

    def encrypt() -> list[list[list[bytes]]]:
        return [[[_encrypted(context, part) for part in _cut(one)] for one in agent] for agent in vectors]

    def add() -> list[list[bytes]]:
        return [[add_terms(context, parts) for parts in zip(*layer, strict=True)] for layer in zip(*sent, strict=True)]

    def decrypt() -> list[Float64]:
        return [np.concatenate([tenseal.ckks_vector_from(context, part).decrypt() for part in one]) for one in sums]

    encrypt_s, sent = _timed(encrypt)
    add_s, sums = _timed(add)
    decrypt_s, opened = _timed(decrypt)
    return _record(vectors, opened, encrypt_s, add_s, decrypt_s, sum(len(part) for one in sent[0] for part in one))


def _cut(vector: Float64) -> list[Float64]:
    """A vector in ciphertexts: TenSEAL cuts it alike by itself, and warns each time that products are disabled then."""
    return [vector[start : start + _SLOTS] for start in range(0, len(vector), _SLOTS)]


def _encrypted(context: Any, part: Float64) -> bytes:
    serialized: bytes = tenseal.ckks_vector(context, part).serialize()
    return serialized


def _record(
    vectors: list[list[Float64]],
    opened: list[Float64],
    encrypt_s: float,
    add_s: float,
    decrypt_s: float,
    sent_bytes: int,
) -> Record:
    exact = [sum(layer) for layer in zip(*vectors, strict=True)]
    error = max(float(np.abs(got - want).max()) for got, want in zip(opened, exact, strict=True))
    return {
        "encrypt_s": encrypt_s / len(vectors),
        "add_s": add_s,
        "decrypt_s": decrypt_s,
        "bytes": sent_bytes,
        "max_abs_error": error / len(vectors),
    }


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result
