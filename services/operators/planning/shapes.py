"""What is trained, by which ranks and budgets: read from what an operator types."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Final

from shelora.errors import InvalidConfiguration
from shelora.plan import DenseShape, ModelShapes, ModuleShape, parse_budget

_ITEM: Final = re.compile(r"(?:(dense|\d{1,6})\*)?(\d{1,9})(?:x(\d{1,9}))?", re.ASCII)
_FORMS: Final = (
    'name a JSON file {"modules": [{"name", "out_features", "in_features"}], "dense": [{"name", "shape"}]}, or write '
    "COUNT*OUTxIN,...,dense*VALUES, for example 12*384x384,dense*2310"
)


def parse_shapes(text: str) -> ModelShapes:
    """Model shapes from a JSON file or from a short form such as 104*3200x3200,dense*2048.

    Raises:
        InvalidConfiguration: neither.
        InvalidPlan: impossible shapes.
    """
    path = Path(text).expanduser()
    if path.suffix == ".json" or path.is_file():
        return _shapes_from_file(path)
    modules: list[ModuleShape] = []
    dense: list[DenseShape] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        kind = match[1] if match else None
        if match is None or (kind == "dense") == bool(match[3]):
            raise InvalidConfiguration(f"model shapes: expected a file or a short form, got {item[:60]!r}", hint=_FORMS)
        if kind == "dense":
            dense.append(DenseShape(f"dense-{len(dense) + 1}", (int(match[2]),)))
            continue
        for _ in range(int(kind or 1)):
            modules.append(ModuleShape(f"module-{len(modules) + 1}", int(match[2]), int(match[3])))
    return ModelShapes(tuple(modules), tuple(dense))


def parse_ranks(text: str) -> list[int]:
    """Ranks from a text such as 4,8,16.

    Raises:
        InvalidConfiguration: not positive whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1024 for part in parts):
        raise InvalidConfiguration(
            f"ranks: expected whole numbers of 1 to 1,024 with commas between, got {text[:60]!r}",
            hint="write for example 4,8,16,32",
        )
    return [int(part) for part in parts]


def parse_budgets(text: str) -> list[str]:
    """Budgets from a text such as full,25%,5%,auto.

    Raises:
        InvalidConfiguration: one of them cannot be read.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        parse_budget(part)
    return parts


def _shapes_from_file(path: Path) -> ModelShapes:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        modules = tuple(
            ModuleShape(str(module["name"]), _size(module["out_features"]), _size(module["in_features"]))
            for module in found["modules"]
        )
        dense = tuple(
            DenseShape(str(tensor["name"]), tuple(_size(axis) for axis in tensor["shape"]))
            for tensor in found.get("dense", ())
        )
    except OSError as error:
        raise InvalidConfiguration(
            f"model shapes: expected a readable file, got {path} ({error.strerror or type(error).__name__})",
            hint=_FORMS,
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidConfiguration(
            f"model shapes: expected lists of modules and dense tensors in {path}, got {type(error).__name__}: {error}",
            hint=_FORMS,
        ) from error
    return ModelShapes(modules, dense)


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise TypeError(f"a size that is a whole number, not {value!r}")
    return int(value)
