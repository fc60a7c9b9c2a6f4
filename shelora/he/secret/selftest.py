"""The start-up proof that adding residues is what the HE library's addition does, on this machine, with this build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from shelora.errors import SelfTestFailed, SheLoraError
from shelora.he.parameters import POLYNOMIALS
from shelora.he.residues import add_residues, check_residues

if TYPE_CHECKING:
    from shelora.he.secret.context import CkksContext

_PATTERN_SEED: Final = 20260601


def self_test(context: CkksContext) -> None:
    """Encrypt two vectors, add them as residues, decrypt; compare with the library's own addition and with the truth.

    The steps, in order: (1) keys survive their residue form; (2) fresh residues are below the modulus; (3) two
    encryptions of the same values differ; (4) the library's sum holds the residue sum bit for bit; (5) both decrypt to
    the same float64 numbers; (6) these are the clear sum within the documented error bound.

    Args:
        context: a context that no other thread uses yet.

    Raises:
        SelfTestFailed: any step gives another result; the process must not handle keys or ciphertexts.
    """
    try:
        _run_steps(context)
    except SelfTestFailed:
        raise
    except SheLoraError as cause:
        raise SelfTestFailed(
            f"HE self-test: expected no error, got {cause.code}: {cause.message}",
            hint="install the pinned OpenFHE version for this Python",
        ) from cause


def _run_steps(context: CkksContext) -> None:
    parameters, library = context.parameters, context.library
    keys = context.generate_keys()
    public, secret = context.load_public_key(keys.public), context.load_secret_key(keys.secret)

    generator = np.random.default_rng(_PATTERN_SEED)
    limit = parameters.max_abs_value / 2.0
    values = generator.uniform(-limit, limit, (2, parameters.values_per_block))
    fresh = np.empty((3, POLYNOMIALS, parameters.ring_dimension), dtype=np.uint64)
    for row, out in zip((values[0], values[1], values[0]), fresh, strict=True):
        context.encrypt_block(public, row, out)
    check_residues(fresh, parameters)
    _require(not np.any(np.all(fresh[0] == fresh[2], axis=1)), "two encryptions of the same values to differ")

    total = fresh[:1].copy()
    add_residues(total, fresh[1:2], parameters.modulus)
    loaded = [library.load_ciphertext(context.template.splice(block)) for block in fresh[:2]]
    reference = library.add(loaded[0], loaded[1])
    serialized = library.serialize(reference)
    _require(
        all(polynomial.tobytes() in serialized for polynomial in total[0]),
        "residue sums and library sums to agree bit for bit",
    )
    decrypted = context.decrypt_block(secret, total[0])
    _require(
        np.array_equal(decrypted, library.decrypt(secret, reference).view(np.float64)),
        "residue sums and library sums to decrypt to the same numbers",
    )
    error = float(np.max(np.abs(decrypted - values.sum(axis=0))))
    _require(error <= parameters.error_bound(2), f"an error of at most {parameters.error_bound(2):.1e}")


def _require(condition: bool, expected: str) -> None:
    """Raise SelfTestFailed unless the condition holds."""
    if not condition:
        raise SelfTestFailed(
            f"HE self-test: expected {expected}, got a different result",
            hint="do not use this machine for the federation; reinstall the pinned OpenFHE version",
        )
