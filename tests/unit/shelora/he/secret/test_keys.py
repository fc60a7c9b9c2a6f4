from __future__ import annotations

import copy
import hashlib
import pickle

import pytest

from shelora.he.secret import KeyPair, PublicKey, SecretKey

DATA = bytes(range(64))


def test_secret_key_gives_its_bytes_only_when_asked() -> None:
    key = SecretKey(DATA)
    assert key.expose() == DATA
    for text in (repr(key), str(key), f"{KeyPair(PublicKey(DATA), key)}"):
        assert "redacted" in text
        assert repr(DATA)[2:20] not in text


def test_secret_keys_compare_by_content_and_only_with_each_other() -> None:
    assert SecretKey(DATA) == SecretKey(bytearray(DATA))
    assert SecretKey(DATA) != SecretKey(DATA[:-1])
    assert SecretKey(DATA) != SecretKey(DATA[:-1] + b"\x00")
    assert SecretKey(DATA) != DATA


def test_secret_key_is_not_hashable() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(SecretKey(DATA))


@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_secret_key_refuses_to_be_duplicated(duplicate) -> None:
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        duplicate(SecretKey(DATA))
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        duplicate({"nested": SecretKey(DATA)} if duplicate is not copy.copy else SecretKey(DATA))


def test_secret_key_keeps_a_copy() -> None:
    data = bytearray(DATA)
    key = SecretKey(data)
    data[0] = 99
    assert key.expose() == DATA


def test_public_key_shows_a_fingerprint() -> None:
    assert PublicKey(DATA).fingerprint() == hashlib.sha256(DATA).hexdigest()
    assert PublicKey(DATA) == PublicKey(DATA)
    assert "data" not in repr(PublicKey(DATA))
