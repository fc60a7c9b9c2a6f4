"""What uploaded bytes have to be, and whether they are. Nothing here believes anything the sender says.

Payloads are read in pieces, so memory does not grow with their size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.aggregator.domain import ExpectedPayload, PayloadKind
from services.aggregator.payload_tensors import factors_specs, votes_specs
from services.aggregator.ports import Arriving
from services.aggregator.residue_sums import ArrivingResidues, check_ciphertext
from services.aggregator.tensors import (
    TensorSpec,
    file_limit_bytes,
    locate,
    read_pieces,
    read_tensor,
)
from services.common.digests import Buffer
from services.common.threads import WorkerPool
from shelora.errors import MalformedPayload, NonFiniteValue, ShapeMismatch, ValueOutOfRange

MAX_LEFT_VALUE: Final = 2.0**20
"""Largest entry of a left factor. Training that gets there has diverged, and ciphertexts could not carry it; the bound
keeps any one member from drowning the others' directions in the rounding of float64 and float32."""

RIGHT_TOLERANCE: Final = 1e-3
"""Rows of a right factor have length 1: no entry, and no row of plain columns, is longer than 1 plus this."""

MAX_SCORE_BITS: Final = 40
"""Order-preserving scores are below 2 to this power."""


_CIPHERTEXTS: Final = frozenset({PayloadKind.CIPHER, PayloadKind.SENSITIVITY})


class Unread:
    """Leaves everything to be checked in the end."""

    good_bytes = 0

    def add(self, _offset: int, _data: Buffer) -> None:
        """Look at nothing."""


class UploadChecks:
    """Checks uploads against the plan; the PayloadChecks of the service.

    Args:
        pool: threads for the work.
    """

    def __init__(self, pool: WorkerPool) -> None:
        self._pool = pool

    def size_limit_bytes(self, expected: ExpectedPayload) -> int:
        """Most bytes such a payload can have."""
        if expected.kind is PayloadKind.FACTORS:
            return file_limit_bytes(factors_specs(expected.plan, expected.rank, expected.columns))
        if expected.kind is PayloadKind.VOTES:
            return file_limit_bytes(votes_specs(expected.plan, expected.columns))
        _require_ciphertext(expected)
        return expected.blocks * expected.parameters.block_bytes

    def arriving(self, expected: ExpectedPayload) -> Arriving:
        """What looks at such a payload while it comes; only ciphertext makes sense before it is whole."""
        if expected.kind in _CIPHERTEXTS:
            return ArrivingResidues(expected.parameters.modulus)
        return Unread()

    async def check(self, path: Path, expected: ExpectedPayload, good_bytes: int = 0) -> int:
        """Parse and validate a file; answers its bytes.

        Args:
            path: the file.
            expected: what it has to be.
            good_bytes: length of the beginning that was found right while it came.

        Raises:
            MalformedInput: a subclass that says what was expected and what came.
        """
        if self._found_right(path, expected, good_bytes):
            return good_bytes
        return await self._pool.run(check_payload, path, expected, good_bytes)

    def _found_right(self, path: Path, expected: ExpectedPayload, good_bytes: int) -> bool:
        """Whether all of a ciphertext was looked at while it came; a thread would only cost time."""
        if expected.kind not in _CIPHERTEXTS:
            return False
        return good_bytes == self.size_limit_bytes(expected) == path.stat().st_size


def check_payload(path: Path, expected: ExpectedPayload, good_bytes: int = 0) -> int:
    """Parse and validate a payload in a file; answers its bytes. See `UploadChecks.check`.

    Raises:
        MalformedPayload: not the announced format, or other tensors than the plan's.
        ShapeMismatch, RankMismatch, SizeMismatch: other shapes or sizes than the plan and the registration give.
        NonFiniteValue, ValueOutOfRange, ResidueOutOfRange: values nobody can use.
    """
    if expected.kind is PayloadKind.FACTORS:
        _check_factors(path, expected)
    elif expected.kind is PayloadKind.VOTES:
        _check_votes(path, expected)
    else:
        _require_ciphertext(expected)
        check_ciphertext(path, expected.blocks, expected.parameters, good_bytes)
    return path.stat().st_size


def _require_ciphertext(expected: ExpectedPayload) -> None:
    if expected.kind not in _CIPHERTEXTS:
        raise MalformedPayload(
            f"payload: expected sensitivity, votes, factors or cipher to be uploaded, got {expected.kind.value}",
            hint="the other kinds are made here and can only be fetched",
        )


def _check_factors(path: Path, expected: ExpectedPayload) -> None:
    specs = factors_specs(expected.plan, expected.rank, expected.columns)
    offsets = locate(path, specs)
    with path.open("rb") as file:
        for spec, offset in zip(specs, offsets.tolist(), strict=True):
            check = _check_left if spec.name.endswith(".left") else _check_right
            for piece in read_pieces(file, spec, offset):
                check(spec, piece)


def _check_left(spec: TensorSpec, piece: NDArray[Any]) -> None:
    _check_bound(spec, piece, MAX_LEFT_VALUE)


def _check_right(spec: TensorSpec, piece: NDArray[Any]) -> None:
    limit = 1.0 + RIGHT_TOLERANCE
    _check_bound(spec, piece, limit)
    longest = float(np.sqrt(np.einsum("ij,ij->i", piece, piece, dtype=np.float64).max()))
    if longest > limit:
        raise ValueOutOfRange(
            f"tensor {spec.name}: expected rows of a length of at most {limit:g}, got {longest:g}",
            hint="send the right factor of the canonical form",
            context={"tensor": spec.name, "module": spec.module},
        )


def _check_bound(spec: TensorSpec, piece: NDArray[Any], limit: float) -> None:
    # The largest absolute value without a temporary array; NaN comes through both.
    largest = max(float(piece.max()), -float(piece.min()))
    context = {"tensor": spec.name, "module": spec.module}
    if not np.isfinite(largest) or not np.isfinite(float(piece.min())):
        raise NonFiniteValue(
            f"tensor {spec.name}: expected finite values, got NaN or infinity",
            hint="training diverged: lower the learning rate or check the data",
            context=context,
        )
    if largest > limit:
        raise ValueOutOfRange(
            f"tensor {spec.name}: expected values of at most {limit:g} in absolute value, got {largest:g}",
            hint="training diverged, or the factors are not in canonical form",
            context=context,
        )


def _check_votes(path: Path, expected: ExpectedPayload) -> None:
    for module, count in zip(expected.plan.shapes.modules, expected.columns, strict=True):
        if not 0 <= count <= module.in_features:
            raise ShapeMismatch(f"votes for {module.name!r}: expected 0 to {module.in_features} columns, got {count}")
    specs = votes_specs(expected.plan, expected.columns)
    offsets = locate(path, specs).tolist()
    with path.open("rb") as file:
        for index, module in enumerate(expected.plan.shapes.modules):
            token, score = specs[2 * index], specs[2 * index + 1]
            tokens = read_tensor(file, token, offsets[2 * index])
            _check_integers(token, tokens, module.in_features)
            if len(np.unique(tokens)) != len(tokens):
                raise MalformedPayload(
                    f"tensor {token.name}: expected {len(tokens)} different tokens, got one more than once",
                    hint="name every column once",
                    context={"tensor": token.name, "module": module.name},
                )
            _check_integers(score, read_tensor(file, score, offsets[2 * index + 1]), 1 << MAX_SCORE_BITS)


def _check_integers(spec: TensorSpec, values: NDArray[np.int64], limit: int) -> None:
    if values.size and (values.min() < 0 or values.max() >= limit):
        got = f"{int(values.min())} to {int(values.max())}"
        raise ValueOutOfRange(
            f"tensor {spec.name}: expected numbers from 0 to {limit - 1}, got {got}",
            hint="use the tokens and scores of this plan version",
            context={"tensor": spec.name, "module": spec.module},
        )
