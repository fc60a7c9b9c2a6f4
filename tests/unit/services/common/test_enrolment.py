from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.common.enrolment import Enrolment, ensure_identity
from services.common.identity import Role
from services.common.member_key import load_key, load_or_make_key, same_certificate
from services.common.tls import IdentityFiles
from shelora.errors import InvalidConfiguration, InvalidIdentifier
from support.clock import FakeClock

FIELDS = {
    "federation": "clinics",
    "role": "agent",
    "name": "agent-1",
    "token": "t" * 43,
    "authority_pem": "-----BEGIN CERTIFICATE-----\n",
    "keymanager": "keys.example.org:7441",
    "enrolment": "keys.example.org:7442",
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "enrolment.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_an_enrolment_file_round_trips_and_is_private(tmp_path: Path) -> None:
    enrolment = Enrolment.load(write(tmp_path, FIELDS))
    assert enrolment.role is Role.AGENT
    assert enrolment.identity.uri == "spiffe://clinics/agent/agent-1"
    assert FIELDS["token"] not in repr(enrolment)
    path = tmp_path / "again.json"
    enrolment.save(path)
    assert Enrolment.load(path) == enrolment
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        [],
        {},
        {**FIELDS, "extra": "x"},
        {key: value for key, value in FIELDS.items() if key != "token"},
        {**FIELDS, "token": 5},
        {**FIELDS, "role": "king"},
        {**FIELDS, "role": ["agent"]},
        {**FIELDS, "keymanager": "nowhere"},
        "[" * 70_000,
    ],
)
def test_a_broken_enrolment_file_is_a_clear_error(tmp_path: Path, content: Any) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        Enrolment.load(write(tmp_path, content))
    assert FIELDS["token"] not in str(caught.value)


def test_names_in_an_enrolment_file_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidIdentifier, match="agent name"):
        Enrolment.load(write(tmp_path, {**FIELDS, "name": "../agent"}))


@pytest.mark.parametrize("named", [True, False])
async def test_nothing_to_enrol_with_is_a_clear_error(tmp_path: Path, named: bool) -> None:
    file = tmp_path / "absent.json" if named else None
    with pytest.raises(InvalidConfiguration, match="enrolment file"):
        await ensure_identity(tmp_path / "identity", file, FakeClock())


def test_a_key_is_made_once(tmp_path: Path) -> None:
    files = IdentityFiles(tmp_path)
    first = load_or_make_key(files)
    assert load_or_make_key(files).private_numbers() == first.private_numbers()
    assert files.key.stat().st_mode & 0o777 == 0o600


def test_a_broken_key_is_a_clear_error(tmp_path: Path) -> None:
    files = IdentityFiles(tmp_path)
    with pytest.raises(InvalidConfiguration, match="FileNotFoundError"):
        load_key(files)
    files.write_key(b"nonsense")
    with pytest.raises(InvalidConfiguration, match=r"key\.pem: expected a private key in PEM"):
        load_or_make_key(files)


def test_texts_that_are_no_certificates_cannot_be_compared() -> None:
    with pytest.raises(InvalidConfiguration, match="expected a certificate in PEM"):
        same_certificate("nonsense", "nonsense")
