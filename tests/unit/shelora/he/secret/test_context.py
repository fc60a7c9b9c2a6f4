from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from shelora.errors import DigestMismatch, ResidueOutOfRange, SelfTestFailed, SizeMismatch
from shelora.he import CkksParameters
from shelora.he.secret import CkksContext, KeyPair, PublicKey, SecretKey
from shelora.he.secret.library import CkksLibrary

EXPECTED = CkksParameters(modulus=1152921504606830593)


class MisreportingLibrary(CkksLibrary):
    @property
    def rounded_modulus(self) -> float:
        return 2.0**59


def is_prime(number: int) -> bool:
    """Miller-Rabin with bases that decide every 64-bit number."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        if all((power := power * power % number) != number - 1 for _ in range(twos - 1)):
            return False
    return True


def test_parameters_are_the_published_ones(context: CkksContext) -> None:
    assert context.parameters == EXPECTED
    assert is_prime(context.parameters.modulus)


def test_from_parameters_accepts_its_own_and_refuses_others() -> None:
    assert CkksContext.from_parameters(EXPECTED).parameters == EXPECTED
    with pytest.raises(DigestMismatch, match=r"scale_bits=40.*scale_bits=50"):
        CkksContext.from_parameters(dataclasses.replace(EXPECTED, scale_bits=40))


def test_wrong_modulus_is_noticed() -> None:
    with pytest.raises(SelfTestFailed, match="modulus: expected one number"):
        CkksContext(MisreportingLibrary())


def test_keys_are_residues_and_every_pair_is_new(context: CkksContext, keys: KeyPair) -> None:
    assert len(keys.public.data) == 65536
    assert len(keys.secret.expose()) == 32768
    other = context.generate_keys()
    assert other.public != keys.public
    assert other.secret != keys.secret


def test_keys_of_one_context_work_in_another(keys: KeyPair) -> None:
    other = CkksContext.create()
    values: NDArray[np.float64] = np.linspace(-3.0, 3.0, 4096, dtype=np.float64)
    residues = np.empty((2, 4096), dtype=np.uint64)
    other.encrypt_block(other.load_public_key(keys.public), values, residues)
    opened = other.decrypt_block(other.load_secret_key(keys.secret), residues)
    assert np.max(np.abs(opened - values)) < other.parameters.error_bound()


@pytest.mark.parametrize("size", [0, 8, 32767, 32769, 65535, 131072])
def test_keys_of_other_lengths_are_refused(context: CkksContext, size: int) -> None:
    with pytest.raises(SizeMismatch, match=f"public key: expected 65536 bytes, got {size}"):
        context.load_public_key(PublicKey(bytes(size)))
    with pytest.raises(SizeMismatch, match=f"secret key: expected 32768 bytes, got {size}"):
        context.load_secret_key(SecretKey(bytes(size)))


def test_keys_with_large_residues_are_refused(context: CkksContext, keys: KeyPair) -> None:
    large = context.parameters.modulus.to_bytes(8, "little")
    with pytest.raises(ResidueOutOfRange, match="public key"):
        context.load_public_key(PublicKey(keys.public.data[:-8] + large))
    with pytest.raises(ResidueOutOfRange, match="secret key"):
        context.load_secret_key(SecretKey(large + keys.secret.expose()[8:]))


def test_contexts_can_be_created_while_others_encrypt(context: CkksContext, keys: KeyPair) -> None:
    public, secret = context.load_public_key(keys.public), context.load_secret_key(keys.secret)
    stop = threading.Event()
    worst: list[float] = []

    def encrypt() -> None:
        values: NDArray[np.float64] = np.linspace(-1.0, 1.0, 4096, dtype=np.float64)
        residues = np.empty((2, 4096), dtype=np.uint64)
        while not stop.is_set():
            context.encrypt_block(public, values, residues)
            worst.append(float(np.max(np.abs(context.decrypt_block(secret, residues) - values))))

    threads = [threading.Thread(target=encrypt) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        built = [CkksContext.create() for _ in range(5)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {other.parameters for other in built} == {EXPECTED}
    assert worst
    assert max(worst) < context.parameters.error_bound()


def calls_before_others_run(action: Callable[[], object], calls: int) -> int:
    """How many calls a thread makes before this one runs again, when only a released interpreter lock lets it."""
    done: list[int] = []

    def work() -> None:
        for call in range(calls):
            action()
            done.append(call)

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(3600.0)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        seen = len(done)
        thread.join()
    finally:
        sys.setswitchinterval(interval_s)
    return seen


def test_library_calls_let_other_threads_run(context: CkksContext, keys: KeyPair) -> None:
    public, secret = context.load_public_key(keys.public), context.load_secret_key(keys.secret)
    values = np.zeros(4096)
    residues = np.zeros((2, 4096), dtype=np.uint64)
    assert calls_before_others_run(lambda: sum(range(100)), 200) == 200
    assert calls_before_others_run(lambda: context.encrypt_block(public, values, residues), 200) < 200
    assert calls_before_others_run(lambda: context.decrypt_block(secret, residues), 200) < 200
