"""Configuration: one YAML file a service, overridden by environment variables, checked as a whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from services.common.addresses import check_address, unix_path
from shelora.errors import InvalidConfiguration

Model = TypeVar("Model", bound=BaseModel)

_FOLDER = "folder"
_SECRET = re.compile(r"kek|key|secret|token|password", re.IGNORECASE)
_SHOWN_CHARACTERS = 80
_FILE = "_file"
_MOST_BYTES = 65_536


def _resolve_address(text: str, info: ValidationInfo) -> str:
    try:
        check_address(text)
    except InvalidConfiguration as error:
        raise ValueError(error.message) from error
    path = unix_path(text)
    if path is None:
        return text
    return f"unix:{_folder(info.context) / path}"


def _folder(context: Any) -> Path:
    return Path(context[_FOLDER]) if isinstance(context, Mapping) and _FOLDER in context else Path()


Address = Annotated[str, AfterValidator(_resolve_address)]
"""Field type: host:port or unix:path; a relative path starts at the configuration file's folder."""


class ServiceConfig(BaseModel):
    """Base for configuration models: unknown fields are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def load_config(
    model: type[Model], path: Path, *, environ: Mapping[str, str] | None = None, service: str | None = None
) -> Model:
    """Read a configuration file, apply environment overrides, check everything.

    An override is named SHELORA_<SERVICE>__<FIELD>, with another `__` for each level below, for example
    SHELORA_AGENT__LORA__RANK=8. Its value is a text; lists and mappings are written as JSON. With _FILE appended to a
    field's name the value is read from the file that the variable names, less one newline at its end; where a field's
    own name ends so, as in ENROLMENT_FILE, the variable means that field.

    Args:
        model: what to build; unknown fields are refused whatever the model says. Relative paths in it start at the
            file's folder.
        path: the YAML file.
        environ: environment variables; None means the process's.
        service: the <SERVICE> part; None derives it from the model's name (AgentConfig: AGENT).

    Returns:
        The checked configuration.

    Raises:
        InvalidConfiguration: the file is missing or no YAML mapping, or any field is wrong; names the file and every
            wrong field. Or the file that a variable names cannot be read; names both, never the content.
    """
    name = service or re.sub(r"(Configuration|Config|Settings)$", "", model.__name__)
    folder = path.resolve().parent
    data = _merged(_read(path), overrides(name, os.environ if environ is None else environ, model, folder))
    try:
        config = model.model_validate(data, extra="forbid", context={_FOLDER: str(folder)})
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors(include_url=False)]
        raise InvalidConfiguration(
            f"{path}: {len(lines)} wrong field{'s' if len(lines) > 1 else ''}: " + "; ".join(lines),
            hint=f"correct the file or the SHELORA_{name.upper()}__... variables",
            context={"file": str(path)},
        ) from None
    return cast("Model", _resolved(config, folder))


def overrides(
    service: str, environ: Mapping[str, str], model: type[BaseModel], folder: Path = Path()
) -> dict[str, Any]:
    """The nested overrides for a service that the environment holds.

    Args:
        service: the <SERVICE> part of the names.
        environ: environment variables.
        model: tells the field `x_file` from the field `x` whose value lies in a file.
        folder: where relative paths of such files start.

    Raises:
        InvalidConfiguration: a value begins like JSON and is none, one variable is the parent of another, a file cannot
            be read or is empty, or a field is given twice.
    """
    prefix = f"SHELORA_{service.upper()}__"
    found: dict[str, Any] = {}
    for variable in sorted(environ):
        if not variable.startswith(prefix):
            continue
        *parents, last = variable[len(prefix) :].lower().split("__")
        level = found
        for parent in parents:
            level = level.setdefault(parent, {})
            if not isinstance(level, dict):
                raise InvalidConfiguration(
                    f"{variable}: expected a field of its own, got one below a value that is also set"
                )
        field, value = last, environ[variable]
        if _names_file(model, parents, last):
            field, value = last.removesuffix(_FILE), _content(variable, folder / value)
        if field in level:
            raise InvalidConfiguration(
                f"{variable}: expected one way to set the field, got {variable.removesuffix(_FILE.upper())} as well",
                hint="unset one of the two variables",
            )
        level[field] = _parse(variable, value)
    return found


def _names_file(model: type[BaseModel], parents: Sequence[str], name: str) -> bool:
    """Whether a variable means "the file that holds the field" because no field has the whole name."""
    for parent in parents:
        inner = _submodel(model, parent)
        if inner is None:
            return False
        model = inner
    known = model.model_fields
    return name.endswith(_FILE) and name not in known and name.removesuffix(_FILE) in known


def _submodel(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The model that a field holds, or None when it holds something else."""
    if field not in model.model_fields:
        return None
    annotation = model.model_fields[field].annotation
    candidates = (annotation, *get_args(annotation))
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _content(variable: str, path: Path) -> str:
    value, problem = "", "nothing"
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            problem = "more"
        else:
            value = re.sub(r"\r?\n\Z", "", content.decode())
    except OSError as error:
        problem = error.strerror or type(error).__name__
    except UnicodeDecodeError:
        problem = "bytes that are no UTF-8"
    if not value:
        raise InvalidConfiguration(
            f"{variable}: expected a text of 1 to {_MOST_BYTES} bytes in {path}, got {problem}",
            hint="check the path, its mode and what is mounted there",
        )
    return value


def _parse(variable: str, value: str) -> Any:
    if not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise InvalidConfiguration(f"{variable}: expected JSON, got text that breaks at column {error.colno}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(
            f"{path}: expected a readable configuration file, got {type(error).__name__}",
            hint="check the path and its mode",
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise InvalidConfiguration(
            f"{path}: expected YAML, got something else{place}: {getattr(error, 'problem', '')}",
            hint="correct the file",
        ) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidConfiguration(f"{path}: expected a mapping of fields, got a {type(content).__name__}")
    return content


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        present = result.get(key)
        result[key] = _merged(present, value) if isinstance(present, dict) and isinstance(value, dict) else value
    return result


def _explain(problem: dict[str, Any]) -> str:
    """One wrong field in one line; values of fields that may hold a secret are left out."""
    field = ".".join(str(part) for part in problem["loc"]) or "(whole file)"
    message = str(problem["msg"])
    if problem["type"] == "missing":
        return f"{field}: expected a value, got none"
    if problem["type"] == "extra_forbidden":
        return f"{field}: expected no such field"
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    if message.startswith("should be "):
        message = "expected " + message.removeprefix("should be ")
    if _SECRET.search(field):
        return f"{field}: {message}" if "got" not in message else f"{field}: expected another value"
    if "got" in message:
        return f"{field}: {message}"
    return f"{field}: {message}, got {repr(problem['input'])[:_SHOWN_CHARACTERS]}"


def _resolved(value: Any, folder: Path) -> Any:
    """The same value with every relative path made absolute."""
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        changed = {name: new for name, old in fields.items() if (new := _resolved(old, folder)) is not old}
        return value.model_copy(update=changed) if changed else value
    if isinstance(value, list | tuple):
        members = [_resolved(member, folder) for member in value]
        unchanged = all(new is old for new, old in zip(members, value, strict=True))
        return value if unchanged else type(value)(members)
    if isinstance(value, dict):
        mapped = {key: _resolved(member, folder) for key, member in value.items()}
        return value if all(mapped[key] is value[key] for key in value) else mapped
    return value
