from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from services.common.config import Address, ServiceConfig, load_config, overrides
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
        overrides("agent", {"SHELORA_AGENT__LORA": "8", "SHELORA_AGENT__LORA__RANK": "8"})
    with pytest.raises(InvalidConfiguration, match="expected JSON") as caught:
        overrides("agent", {"SHELORA_AGENT__TOKEN": "{do-not-show"})
    assert "do-not-show" not in str(caught.value)
