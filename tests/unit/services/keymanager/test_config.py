from __future__ import annotations

import base64
from pathlib import Path

import pytest

from services.common.config import load_config
from services.common.identity import Role
from services.keymanager.config import KeyManagerConfig
from shelora.errors import InvalidConfiguration
from support.keymanager import keymanager_config

KEK = base64.b64encode(bytes(32)).decode()


def write(folder: Path, text: str) -> Path:
    path = folder / "keymanager.yaml"
    path.write_text(text)
    return path


def test_a_minimal_file_is_enough_and_paths_start_at_its_folder(tmp_path: Path) -> None:
    config = load_config(KeyManagerConfig, write(tmp_path, "federation: clinics\n"), environ={})
    assert config.database_path == tmp_path / "keymanager-state" / "keymanager.db"
    assert config.kek_file == tmp_path / "keymanager.kek"
    assert config.certificate_lifetime_s == 86_400
    for role in (Role.AGENT, Role.OPERATOR):
        assert config.advertised(role) == ("127.0.0.1:7441", "127.0.0.1:7442")
    assert config.advertised(Role.AGGREGATOR) == ("127.0.0.1:7444", "127.0.0.1:7442")
    assert config.health_listen is None


def test_the_environment_can_hold_the_key_encryption_key(tmp_path: Path) -> None:
    environ = {"SHELORA_KEYMANAGER__KEK": f"{KEK} {base64.b64encode(bytes(31) + b'x').decode()}"}
    config = load_config(KeyManagerConfig, write(tmp_path, "federation: clinics\n"), environ=environ)
    assert len(config.vault().key_ids()) == 2
    assert KEK not in repr(config)
    with pytest.raises(InvalidConfiguration, match="SHELORA_KEYMANAGER__KEK: expected base64"):
        keymanager_config(tmp_path, kek="nonsense").vault()


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("federation: Clinics", "federation"),
        ("federation: clinics\nlisten: nowhere", "listen"),
        ("federation: clinics\ncertificate_lifetime_s: 59", "certificate_lifetime_s"),
        ("federation: clinics\nserver_names: []", "server_names"),
        ("federation: clinics\nserver_names: ['a b']", "server_names"),
        ("federation: clinics\nunknown: 1", "unknown"),
        ("listen: 127.0.0.1:1", "federation"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, text: str, field: str) -> None:
    with pytest.raises(InvalidConfiguration, match=f"1 wrong field: {field}: .*expected"):
        load_config(KeyManagerConfig, write(tmp_path, text), environ={})


@pytest.mark.parametrize("listen", ["0.0.0.0:7441", "[::]:7441", "127.0.0.1:0"])
@pytest.mark.parametrize(
    ("field", "advertised", "role", "position"),
    [
        ("listen", "advertise_keymanager", Role.AGENT, 0),
        ("listen", "advertise_keymanager", Role.OPERATOR, 0),
        ("membership_listen", "advertise_membership", Role.AGGREGATOR, 0),
        ("enrolment_listen", "advertise_enrolment", Role.AGENT, 1),
    ],
)
def test_an_address_that_nobody_can_reach_is_not_advertised(
    tmp_path: Path, listen: str, field: str, advertised: str, role: Role, position: int
) -> None:
    config = keymanager_config(tmp_path, **{field: listen, advertised: None})
    with pytest.raises(InvalidConfiguration, match=f"{advertised}: expected an address that members can reach"):
        config.advertised(role)
    reachable = keymanager_config(tmp_path, **{field: listen, advertised: "keys.example.org:443"})
    assert reachable.advertised(role)[position] == "keys.example.org:443"
