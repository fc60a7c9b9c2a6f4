from __future__ import annotations

from collections.abc import Iterator

import pytest

from shelora.he.secret import CkksContext, Decryptor, Encryptor, KeyPair


@pytest.fixture(scope="package")
def context() -> CkksContext:
    return CkksContext.create()


@pytest.fixture(scope="package")
def keys(context: CkksContext) -> KeyPair:
    return context.generate_keys()


@pytest.fixture(scope="package")
def encryptor(context: CkksContext, keys: KeyPair) -> Iterator[Encryptor]:
    with Encryptor(context, keys.public, threads=2) as opened:
        yield opened


@pytest.fixture(scope="package")
def decryptor(context: CkksContext, keys: KeyPair) -> Iterator[Decryptor]:
    with Decryptor(context, keys.public, keys.secret, threads=2) as opened:
        yield opened
