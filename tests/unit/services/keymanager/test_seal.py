from __future__ import annotations

import base64
import copy
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.keymanager.seal import Vault, make_key_file, parse_keys, read_key_file
from shelora.errors import InvalidConfiguration, StoredBytesCorrupt

OLD, NEW = bytes(range(32)), bytes(range(32, 64))


@given(st.binary(max_size=200), st.text(max_size=40))
def test_what_is_sealed_opens_for_its_purpose(plaintext: bytes, purpose: str) -> None:
    vault = Vault([OLD])
    sealed = vault.seal(plaintext, purpose)
    assert vault.open(sealed, purpose) == plaintext
    assert len(plaintext) < 4 or plaintext not in sealed


@given(st.data())
def test_any_altered_byte_is_found(data: st.DataObject) -> None:
    sealed = bytearray(Vault([OLD]).seal(b"the secret of epoch 1", "epoch 1"))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StoredBytesCorrupt):
        Vault([OLD]).open(bytes(sealed), "epoch 1")


def test_one_row_cannot_stand_in_for_another() -> None:
    vault = Vault([OLD])
    with pytest.raises(StoredBytesCorrupt, match="epoch 2: the stored bytes fail"):
        vault.open(vault.seal(b"secret", "secret key of epoch 1"), "secret key of epoch 2")


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    before = Vault([OLD]).seal(b"secret", "seed")
    both = Vault([NEW, OLD])
    assert both.open(before, "seed") == b"secret"
    assert not both.is_current(before)
    after = both.seal(b"secret", "seed")
    assert both.is_current(after)
    assert Vault([NEW]).open(after, "seed") == b"secret"
    with pytest.raises(StoredBytesCorrupt, match="expected one of the key-encryption keys"):
        Vault([NEW]).open(before, "seed")


@pytest.mark.parametrize("sealed", [b"", b"\x01short", b"\x02" + bytes(60)])
def test_bytes_that_were_never_sealed_are_refused(sealed: bytes) -> None:
    with pytest.raises(StoredBytesCorrupt):
        Vault([OLD]).open(sealed, "seed")


@pytest.mark.parametrize("keys", [[], [b"short"], [OLD] * 17])
def test_wrong_keys_are_refused(keys: list[bytes]) -> None:
    with pytest.raises(InvalidConfiguration, match="key-encryption keys"):
        Vault(keys)


def test_a_vault_shows_and_gives_away_nothing() -> None:
    vault = Vault([OLD])
    assert OLD.hex() not in repr(vault)
    assert "redacted" in repr(vault)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(vault)
    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.copy(vault)


def test_a_made_key_file_is_private_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "kek"
    make_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    first = read_key_file(path)
    make_key_file(path)
    assert read_key_file(path) == first
    assert [len(key) for key in first] == [32]


def test_a_key_file_holds_several_keys_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "kek"
    path.write_text(f"# new\n{base64.b64encode(NEW).decode()}\n\n # old\n{base64.b64encode(OLD).decode()}\n")
    path.chmod(0o440)
    assert read_key_file(path) == [NEW, OLD]


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "kek"
    make_key_file(path)
    path.chmod(mode)
    with pytest.raises(InvalidConfiguration, match="expected mode 0600") as caught:
        read_key_file(path)
    assert f"chmod 600 {path}" in caught.value.hint


@pytest.mark.parametrize("text", ["", "not base64!", base64.b64encode(b"short").decode(), "# only a comment"])
def test_unusable_key_texts_are_refused_without_showing_them(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match="expected base64 lines of 32 bytes") as caught:
        parse_keys(text, "kek")
    assert "not base64!" not in str(caught.value)


def test_a_missing_key_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="FileNotFoundError") as caught:
        read_key_file(tmp_path / "absent")
    assert "init" in caught.value.hint
