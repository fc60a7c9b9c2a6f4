"""Encrypting and decrypting vectors of any length, block by block, on several threads."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shelora.errors import DigestMismatch, NonFiniteValue, ShapeMismatch, SizeMismatch, ValueOutOfRange
from shelora.he.parameters import POLYNOMIALS, CkksParameters
from shelora.he.residues import Blocks, check_blocks, check_residues
from shelora.he.secret.context import CkksContext
from shelora.he.secret.keys import PublicKey, SecretKey
from shelora.he.secret.pool import BlockPool

Progress: TypeAlias = Callable[[int], None]
"""Called with the number of blocks done so far, from the thread that started the work."""

_RATE_BLOCKS_PER_THREAD: Final = 16
_SHORTEST_S: Final = 1e-9


class Encryptor:
    """Encrypts under one public key on its own threads. Thread-safe; close it, or use it as a context manager."""

    def __init__(self, context: CkksContext, public_key: PublicKey, threads: int) -> None:
        """Load the key.

        Args:
            context: the process's context.
            public_key: the epoch's public key.
            threads: threads to encrypt on, 1 to 256.

        Raises:
            InvalidConfiguration: `threads` is out of bounds.
            SizeMismatch, ResidueOutOfRange: the key does not belong to this parameter set.
        """
        self._context = context
        self._public = context.load_public_key(public_key)
        self._pool = BlockPool(threads)

    @property
    def parameters(self) -> CkksParameters:
        """The parameter set of the context."""
        return self._context.parameters

    @property
    def threads(self) -> int:
        """Threads this object encrypts on."""
        return self._pool.threads

    def encrypt(self, values: NDArray[np.floating], progress: Progress | None = None) -> Blocks:
        """Encrypt a vector.

        Value i goes to block i // N; within a block, values 2 j and 2 j + 1 are the real and the imaginary part of slot
        j. The last block is filled up with zeros. No two calls give the same residues.

        Args:
            values: float[count], each below `parameters.max_abs_value` in absolute value.
            progress: called with the number of blocks done so far.

        Returns:
            uint64[ceil(count / N), 2, N]; a sum of T such encryptions decrypts within `parameters.error_bound(T)`.

        Raises:
            ShapeMismatch: not a vector of floating-point numbers.
            NonFiniteValue, ValueOutOfRange: before anything is encrypted.
            InternalFault: the object is closed.
        """
        out = np.empty(self._out_shape(values), dtype=np.uint64)
        self.encrypt_into(values, out, progress)
        return out

    def encrypt_into(self, values: NDArray[np.floating], out: Blocks, progress: Progress | None = None) -> None:
        """Encrypt a vector into memory the caller owns, for example a mapped file.

        Args:
            values: as for `encrypt`.
            out: uint64[ceil(count / N), 2, N], C-contiguous and writable; overwritten.
            progress: as for `encrypt`.

        Raises:
            ShapeMismatch: `out` does not fit the values, or as for `encrypt`.
            NonFiniteValue, ValueOutOfRange, InternalFault: as for `encrypt`.
        """
        shape = self._out_shape(values)
        if out.shape != shape or out.dtype != np.uint64 or not (out.flags.c_contiguous and out.flags.writeable):
            raise ShapeMismatch(
                f"encryption output: expected writable contiguous uint64{list(shape)}, "
                f"got {out.dtype}{list(out.shape)}",
                hint="allocate numpy.empty((parameters.blocks_for(count), 2, ring_dimension), numpy.uint64)",
            )
        check_values(values, self.parameters.max_abs_value)

        def work(first: int, end: int) -> None:
            for block in range(first, end):
                self._context.encrypt_block(self._public, self._block_values(values, block), out[block])

        self._pool.run(work, shape[0], progress)

    def close(self) -> None:
        """Stop the threads. May be called again."""
        self._pool.close()

    def __enter__(self) -> Encryptor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _out_shape(self, values: NDArray[np.floating]) -> tuple[int, int, int]:
        """Shape of the blocks a vector fills; refuses anything that is not a vector of floating-point numbers."""
        if values.ndim != 1 or values.dtype.kind != "f":
            raise ShapeMismatch(
                f"values to encrypt: expected a vector of floats, got {values.dtype}{list(values.shape)}",
                hint="pack all modules into one vector with the slot layout",
            )
        return self.parameters.blocks_for(values.size), POLYNOMIALS, self.parameters.ring_dimension

    def _block_values(self, values: NDArray[np.floating], block: int) -> NDArray[np.float64]:
        """float64[N] of one block: a view when possible, zero-filled at the end."""
        size = self.parameters.values_per_block
        part = values[block * size : (block + 1) * size]
        if part.size == size:
            return np.ascontiguousarray(part, dtype=np.float64)
        padded = np.zeros(size, dtype=np.float64)
        padded[: part.size] = part
        return padded


class Decryptor:
    """Decrypts sums under one key pair on its own threads. Thread-safe; close it, or use it as a context manager."""

    def __init__(self, context: CkksContext, public_key: PublicKey, secret_key: SecretKey, threads: int) -> None:
        """Load the secret key and prove that it opens what the public key closes.

        Args:
            context: the process's context.
            public_key: the epoch's public key.
            secret_key: the epoch's secret key.
            threads: threads to decrypt on, 1 to 256.

        Raises:
            DigestMismatch: the two keys are not a pair.
            InvalidConfiguration: `threads` is out of bounds.
            SizeMismatch, ResidueOutOfRange: a key does not belong to this parameter set.
        """
        self._context = context
        self._secret = context.load_secret_key(secret_key)
        self._check_pair(public_key)
        self._pool = BlockPool(threads)

    @property
    def parameters(self) -> CkksParameters:
        """The parameter set of the context."""
        return self._context.parameters

    def decrypt(self, blocks: Blocks, count: int, progress: Progress | None = None) -> NDArray[np.float64]:
        """Decrypt a vector of blocks, typically a published sum.

        Args:
            blocks: uint64[ceil(count / N), 2, N] from anyone; checked before the HE library sees them.
            count: number of values wanted.
            progress: called with the number of blocks done so far.

        Returns:
            float64[count]; for a sum of T encryptions within `parameters.error_bound(T)` of the true sum.

        Raises:
            ShapeMismatch: not an array of blocks.
            SizeMismatch: another number of blocks than `count` values fill.
            ResidueOutOfRange: a residue is not below the modulus.
            ValueOutOfRange: a block opens to numbers beyond `parameters.max_abs_value`: it was made under other keys,
                was changed on the way, or the sum overflowed.
            InternalFault: the object is closed.
        """
        check_blocks(blocks, self.parameters.ring_dimension)
        expected = self.parameters.blocks_for(count)
        if len(blocks) != expected:
            raise SizeMismatch(
                f"blocks to decrypt: expected {expected} for {count} values, got {len(blocks)}",
                hint="take the number of slots from the layout of the published round",
            )
        check_residues(blocks, self.parameters)
        out = np.empty((len(blocks), self.parameters.values_per_block), dtype=np.float64)

        def work(first: int, end: int) -> None:
            for block in range(first, end):
                out[block] = self._context.decrypt_block(self._secret, blocks[block])
                _check_opened(out[block], block, self.parameters.max_abs_value)

        self._pool.run(work, len(blocks), progress)
        return out.reshape(-1)[:count]

    def close(self) -> None:
        """Stop the threads. May be called again."""
        self._pool.close()

    def __enter__(self) -> Decryptor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_pair(self, public_key: PublicKey) -> None:
        """Encrypt a known block and open it again."""
        context, parameters = self._context, self.parameters
        values: NDArray[np.float64] = np.linspace(-1.0, 1.0, parameters.values_per_block, dtype=np.float64)
        residues = np.empty((POLYNOMIALS, parameters.ring_dimension), dtype=np.uint64)
        context.encrypt_block(context.load_public_key(public_key), values, residues)
        error = float(np.max(np.abs(context.decrypt_block(self._secret, residues) - values)))
        if not error <= parameters.error_bound():
            raise DigestMismatch(
                "key pair: expected a secret key that opens what the public key encrypts, got keys of different pairs",
                hint="fetch both keys of the same epoch from the key manager",
            )


def check_values(values: NDArray[np.floating], max_abs_value: float) -> None:
    """Check that all values can be encrypted.

    Args:
        values: float[count].
        max_abs_value: bound that no absolute value may reach.

    Raises:
        NonFiniteValue: NaN or infinity, naming the first position.
        ValueOutOfRange: too large, naming the first position; the value itself is private and not in the message.
    """
    if not values.size:
        return
    # minimum and maximum carry NaN and infinity along, so the common case needs no temporary array.
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        position = int(np.argmin(np.isfinite(values)))
        raise NonFiniteValue(
            f"value {position} to encrypt: expected a finite number, got NaN or infinity",
            hint="training diverged; lower the learning rate",
            context={"position": str(position)},
        )
    if max(-low, high) >= max_abs_value:
        position = int(np.argmax(np.abs(values) >= max_abs_value))
        raise ValueOutOfRange(
            f"value {position} to encrypt: expected an absolute value below {max_abs_value:g}, got a larger one",
            hint="training diverged or the update is unscaled; lower the learning rate or the LoRA alpha",
            context={"position": str(position)},
        )


def measure_encrypt_rate(encryptor: Encryptor, clock: Callable[[], float]) -> float:
    """Measure how fast this machine encrypts right now, residue extraction included.

    Args:
        encryptor: the encryptor to measure, with its threads; 16 blocks per thread are encrypted, twice.
        clock: seconds from any monotonic origin, for example `time.perf_counter`.

    Returns:
        Values per second over all threads.

    Raises:
        InternalFault: the encryptor is closed.
    """
    values = np.zeros(_RATE_BLOCKS_PER_THREAD * encryptor.threads * encryptor.parameters.values_per_block)
    # The first pass starts the threads and maps the output's memory.
    out = encryptor.encrypt(values)
    start_s = clock()
    encryptor.encrypt_into(values, out)
    elapsed_s = clock() - start_s
    return values.size / max(elapsed_s, _SHORTEST_S)


def _check_opened(values: NDArray[np.float64], block: int, max_abs_value: float) -> None:
    """Refuse a block that opened to noise."""
    if not max(-float(values.min()), float(values.max())) < max_abs_value:
        raise ValueOutOfRange(
            f"decrypted block {block}: expected absolute values below {max_abs_value:g}, got larger ones",
            hint="the sum was made under another key epoch, was changed on the way, or overflowed; skip this round",
            context={"block": str(block)},
        )
