from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from shelora.errors import InternalFault
from shelora.he.secret import CkksContext
from shelora.he.secret.library import GeneratorOwnership

FORK_PROGRAM = textwrap.dedent(
    """
    import os
    import threading
    import warnings

    import numpy

    from shelora.errors import InternalFault
    from shelora.he.secret import CkksContext

    context = CkksContext.create()
    keys = context.generate_keys()
    public = context.load_public_key(keys.public)
    values = numpy.zeros(context.parameters.values_per_block)

    def encrypt():
        out = numpy.empty((2, context.parameters.ring_dimension), dtype=numpy.uint64)
        context.encrypt_block(public, values, out)
        return out.tobytes()[:32].hex()

    def attempt():
        try:
            return encrypt()
        except InternalFault:
            return "refused"

    def child(pipe):
        found = [attempt()]
        thread = threading.Thread(target=lambda: found.append(attempt()))
        thread.start()
        thread.join()
        os.write(pipe, " ".join(found).encode() + b"\\n")
        os._exit(0)

    read, write = os.pipe()
    warnings.simplefilter("ignore", DeprecationWarning)
    for _ in range(2):
        process = os.fork()
        if process == 0:
            child(write)
        os.waitpid(process, 0)
    os.close(write)
    with open(read, "rb") as lines:
        for line in lines:
            print(line.decode().strip())
    print(attempt())
    """
)


def test_forked_children_never_encrypt_with_the_same_randomness() -> None:
    done = subprocess.run([sys.executable, "-c", FORK_PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    first, second, parent = (line.split() for line in done.stdout.splitlines())
    assert (first[0], second[0]) == ("refused", "refused")
    assert "refused" not in (first[1], second[1], *parent)
    assert len({first[1], second[1], parent[0]}) == 3


def test_ownership_follows_the_thread() -> None:
    ownership = GeneratorOwnership()
    ownership.check()
    ownership.check()
    with pytest.raises(InternalFault, match="copy made by a fork") as caught:
        ownership.check(native_id=threading.get_native_id() + 1)
    assert "spawn" in caught.value.hint
    passed: list[bool] = []

    def run() -> None:
        ownership.check()
        passed.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert passed == [True]


@pytest.mark.parametrize("loader", ["load_ciphertext", "load_public", "load_secret"])
def test_library_exceptions_become_ours(context: CkksContext, loader: str) -> None:
    with pytest.raises(InternalFault, match=r"could not read a .*RuntimeError") as caught:
        getattr(context.library, loader)(b"\x01\x02\x03")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_wrong_argument_types_become_ours(context: CkksContext) -> None:
    with pytest.raises(InternalFault, match="could not encrypt: TypeError"):
        context.library.encrypt("key", np.zeros(2048, dtype=np.complex128))
