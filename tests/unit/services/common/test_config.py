from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from services.aggregator.config import AggregatorConfig
from services.common.config import Address, ServiceConfig, load_config, overrides
from services.keymanager.config import KeyManagerConfig
from shelora.errors import InvalidConfiguration


class Lora(ServiceConfig):
    rank: int = Field(ge=1)
    modules: tuple[str, ...] = ("query",)


class AgentConfig(ServiceConfig):
    federation: str
    state_dir: Path = Path("state")
    listen: Address = "unix:state/control.sock"
    extra_files: tuple[Path, ...] = ()
    files_by_name: dict[str, Path] = Field(default_factory=dict)
    lora: Lora = Lora(rank=8)
    token: str | None = None
    kek: int | None = None
    enrolment_file: Path | None = None
    enrolment: str | None = None
    nested: Lora | None = None


class Plain(BaseModel):
    """A model without our base: unknown fields are refused all the same."""

    name: str


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def writer(content: str) -> Path:
        path = tmp_path / "agent.yaml"
        path.write_text(content)
        return path

    return writer


def test_paths_start_at_the_files_folder(write: Any, tmp_path: Path) -> None:
    path = write("federation: fed\nextra_files: [a, /b]\nfiles_by_name: {c: c/d}\n")
    config = load_config(AgentConfig, path, environ={})
    assert config.state_dir == tmp_path / "state"
    assert config.listen == f"unix:{tmp_path}/state/control.sock"
    assert config.extra_files == (tmp_path / "a", Path("/b"))
    assert config.files_by_name == {"c": tmp_path / "c" / "d"}
    assert config.lora == Lora(rank=8)
    absolute = load_config(AgentConfig, write("federation: fed\nlisten: unix:/run/x\nstate_dir: /s\n"), environ={})
    assert (absolute.listen, absolute.state_dir) == ("unix:/run/x", Path("/s"))


def test_the_environment_overrides_the_file(write: Any, tmp_path: Path) -> None:
    path = write("federation: fed\nlora: {rank: 4}\n")
    environ = {
        "SHELORA_AGENT__LORA__RANK": "16",
        "SHELORA_AGENT__LORA__MODULES": '["query", "value"]',
        "SHELORA_AGENT__STATE_DIR": "elsewhere",
        "SHELORA_AGENT__LISTEN": "127.0.0.1:30",
        "SHELORA_AGGREGATOR__FEDERATION": "not for us",
        "SHELORA_AGENT_FEDERATION": "not for us",
        "PATH": "/bin",
    }
    config = load_config(AgentConfig, path, environ=environ)
    assert config.lora == Lora(rank=16, modules=("query", "value"))
    assert config.state_dir == tmp_path / "elsewhere"
    assert (config.federation, config.listen) == ("fed", "127.0.0.1:30")
    assert load_config(AgentConfig, path, environ={"SHELORA_X__FEDERATION": "x"}, service="x").federation == "x"


def test_an_empty_file_is_filled_by_the_environment(write: Any) -> None:
    assert load_config(AgentConfig, write(""), environ={"SHELORA_AGENT__FEDERATION": "fed"}).federation == "fed"


def test_every_wrong_field_is_named_with_expected_and_got(write: Any, tmp_path: Path) -> None:
    path = write("lora: {rank: 0, color: red}\nlisten: nowhere\nunknown: 1\nstate_dir: [1]\n")
    with pytest.raises(InvalidConfiguration) as caught:
        load_config(AgentConfig, path, environ={})
    message = caught.value.message
    assert message.startswith(f"{tmp_path}/agent.yaml: 6 wrong fields: ")
    for part in (
        "federation: expected a value, got none",
        "lora.rank: expected greater than or equal to 1, got 0",
        "lora.color: expected no such field",
        "unknown: expected no such field",
        "listen: address: expected host:port or unix:path, got 'nowhere'",
        "state_dir: ",
    ):
        assert part in message
    assert "SHELORA_AGENT__" in caught.value.hint


def test_wrong_values_that_may_be_secrets_are_not_shown(write: Any) -> None:
    path = write("federation: fed\ntoken: [do-not-show]\nkek: do-not-show\n")
    with pytest.raises(InvalidConfiguration) as caught:
        load_config(AgentConfig, path, environ={})
    assert "token: " in caught.value.message
    assert "kek: " in caught.value.message
    assert "do-not-show" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1", "expected YAML, got something else at line 1"),
        ("- a\n- b\n", "expected a mapping of fields, got a list"),
        ("!!python/object:os.system {}", "expected YAML"),
    ],
)
def test_other_contents_are_refused(write: Any, content: str, expected: str) -> None:
    with pytest.raises(InvalidConfiguration, match=r"agent\.yaml") as caught:
        load_config(Plain, write(content), environ={})
    assert expected in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"absent\.yaml: expected a readable configuration file"):
        load_config(Plain, tmp_path / "absent.yaml", environ={})


def test_plain_models_refuse_unknown_fields_too(write: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="other: expected no such field"):
        load_config(Plain, write("name: a\nother: b\n"), environ={})


def test_contradicting_and_broken_variables_are_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="SHELORA_AGENT__LORA__RANK"):
        overrides("agent", {"SHELORA_AGENT__LORA": "8", "SHELORA_AGENT__LORA__RANK": "8"}, AgentConfig)
    with pytest.raises(InvalidConfiguration, match="expected JSON") as caught:
        overrides("agent", {"SHELORA_AGENT__TOKEN": "{do-not-show"}, AgentConfig)
    assert "do-not-show" not in str(caught.value)


def secret(folder: Path, content: bytes) -> Path:
    path = folder / "secret"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"abc", "abc"),
        (b"abc\n", "abc"),
        (b"abc\r\n", "abc"),
        (b"abc\n\n", "abc\n"),
        (b" a\nb ", " a\nb "),
        (b"\xc3\xa9", "é"),
    ],
)
def test_a_file_can_hold_the_value_of_a_field(write: Any, tmp_path: Path, content: bytes, value: str) -> None:
    path = write("federation: fed\ntoken: from the file\n")
    for named in (secret(tmp_path, content), "secret"):
        config = load_config(AgentConfig, path, environ={"SHELORA_AGENT__TOKEN_FILE": str(named)})
        assert config.token == value


def test_files_hold_values_at_every_level_and_of_every_type(write: Any, tmp_path: Path) -> None:
    environ = {
        "SHELORA_AGENT__LORA__RANK_FILE": str(secret(tmp_path, b"16\n")),
        "SHELORA_AGENT__NESTED__RANK_FILE": "secret",
        "SHELORA_AGENT__NESTED__MODULES": '["value"]',
    }
    config = load_config(AgentConfig, write("federation: fed\n"), environ=environ)
    assert config.lora.rank == 16
    assert config.nested == Lora(rank=16, modules=("value",))
    (tmp_path / "secret").write_text('["key"]')
    environ = {"SHELORA_AGENT__LORA__MODULES_FILE": "secret"}
    assert load_config(AgentConfig, write("federation: fed\nlora: {rank: 1}\n"), environ=environ).lora.modules == (
        "key",
    )


def test_a_field_whose_own_name_ends_so_is_meant_itself(write: Any, tmp_path: Path) -> None:
    path = write("federation: fed\n")
    config = load_config(AgentConfig, path, environ={"SHELORA_AGENT__ENROLMENT_FILE": "absent.json"})
    assert (config.enrolment_file, config.enrolment) == (tmp_path / "absent.json", None)
    secret(tmp_path, b"elsewhere.json\n")
    config = load_config(AgentConfig, path, environ={"SHELORA_AGENT__ENROLMENT_FILE_FILE": "secret"})
    assert config.enrolment_file == tmp_path / "elsewhere.json"
    environ = {"SHELORA_AGENT__FILES_BY_NAME__C_FILE": "c/d"}
    assert load_config(AgentConfig, path, environ=environ).files_by_name == {"c_file": tmp_path / "c" / "d"}
    with pytest.raises(InvalidConfiguration, match="color_file: expected no such field"):
        load_config(AgentConfig, path, environ={"SHELORA_AGENT__COLOR_FILE": "secret"})


def test_a_file_that_cannot_be_used_is_named_but_not_shown(write: Any, tmp_path: Path) -> None:
    path = write("federation: fed\n")
    hidden = tmp_path / "hidden"
    cases: list[tuple[bytes | None, str]] = [
        (None, "No such file or directory"),
        (b"", "got nothing"),
        (b"\n", "got nothing"),
        (b"do-not-show\xff", "got bytes that are no UTF-8"),
        (b"do-not-show" * 6000, "got more"),
    ]
    for content, expected in cases:
        if content is not None:
            hidden.write_bytes(content)
        with pytest.raises(InvalidConfiguration) as caught:
            load_config(AgentConfig, path, environ={"SHELORA_AGENT__TOKEN_FILE": "hidden"})
        start = f"SHELORA_AGENT__TOKEN_FILE: expected a text of 1 to 65536 bytes in {hidden}, got "
        assert caught.value.message.startswith(start)
        assert expected in caught.value.message
        assert "do-not-show" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(InvalidConfiguration, match=f"{tmp_path}, got Is a directory"):
        load_config(AgentConfig, path, environ={"SHELORA_AGENT__TOKEN_FILE": ""})


def test_a_field_is_set_in_one_way_only(write: Any, tmp_path: Path) -> None:
    environ = {"SHELORA_AGENT__TOKEN": "do-not-show", "SHELORA_AGENT__TOKEN_FILE": str(secret(tmp_path, b"nor this"))}
    expected = "SHELORA_AGENT__TOKEN_FILE: expected one way to set the field, got SHELORA_AGENT__TOKEN as well"
    with pytest.raises(InvalidConfiguration, match=expected) as caught:
        load_config(AgentConfig, write("federation: fed\n"), environ=environ)
    assert "do-not-show" not in str(caught.value)
    assert "nor this" not in str(caught.value)


def test_the_services_secrets_can_lie_in_files(write: Any, tmp_path: Path) -> None:
    path = write("federation: fed\n")
    secret(tmp_path, b"postgresql+asyncpg://u:p@db/shelora\n")
    config = load_config(AggregatorConfig, path, environ={"SHELORA_AGGREGATOR__DATABASE_URL_FILE": "secret"})
    assert config.database == "postgresql+asyncpg://u:p@db/shelora"
    environ = {"SHELORA_AGGREGATOR__ENROLMENT_FILE": "enrolment.json", "SHELORA_KEYMANAGER__KEK_FILE": "kek"}
    assert load_config(AggregatorConfig, path, environ=environ).enrolment_file == tmp_path / "enrolment.json"
    keymanager = load_config(KeyManagerConfig, path, environ=environ)
    assert (keymanager.kek_file, keymanager.kek) == (tmp_path / "kek", None)
