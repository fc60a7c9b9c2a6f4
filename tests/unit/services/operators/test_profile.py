from __future__ import annotations

import pytest

from services.common.enrolment import Enrolment
from services.common.identity import Role
from services.operators.profile import load_profile
from shelora.errors import InvalidConfiguration


def write(path, text: str):
    path.write_text(text)
    return path


def test_the_key_managers_address_comes_from_the_enrolment_file_when_left_out(tmp_path) -> None:
    enrolment = Enrolment("demo", Role.OPERATOR, "ann", "t" * 20, "pem", "127.0.0.1:1", "127.0.0.1:2")
    enrolment.save(tmp_path / "enrolment.json")
    path = write(
        tmp_path / "operator.yaml",
        "federation: demo\naggregator: 127.0.0.1:3\nidentity_dir: identity\nenrolment_file: enrolment.json\n",
    )
    profile = load_profile(path)
    assert profile.identity_dir == tmp_path / "identity"
    assert profile.keymanager_address() == "127.0.0.1:1"


def test_profile_wins_over_the_enrolment_file(tmp_path) -> None:
    path = write(
        tmp_path / "operator.yaml",
        "federation: demo\naggregator: a:3\nkeymanager: k:4\nidentity_dir: identity\n",
    )
    profile = load_profile(path)
    assert profile.keymanager_address() == "k:4"


def test_no_address_anywhere_says_which_field_is_missing(tmp_path) -> None:
    path = write(tmp_path / "operator.yaml", "federation: demo\naggregator: a:3\nidentity_dir: identity\n")
    profile = load_profile(path)
    with pytest.raises(InvalidConfiguration, match="field keymanager"):
        profile.keymanager_address()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("federation: Demo!\naggregator: a:3\nidentity_dir: i\n", "federation"),
        ("federation: demo\nidentity_dir: i\n", "aggregator: expected a value"),
        ("federation: demo\naggregator: a\nidentity_dir: i\n", "host:port"),
        ("federation: demo\naggregator: a:3\nidentity_dir: i\ncolour: red\n", "colour: expected no such field"),
    ],
)
def test_wrong_profiles_are_refused(tmp_path, text, message) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        load_profile(write(tmp_path / "operator.yaml", text))


def test_a_missing_profile_says_how_to_name_one(tmp_path) -> None:
    with pytest.raises(InvalidConfiguration, match="--profile FILE"):
        load_profile(tmp_path / "none.yaml")
