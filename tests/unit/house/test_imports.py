"""The positive half of the import rules: what the method may import at all (import-linter holds what nobody may)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
METHOD = ROOT / "shelora"

# Standard modules that compute: none of them reads a file, a clock, the environment or a socket.
PURE_STANDARD = {
    "__future__", "abc", "array", "base64", "binascii", "bisect", "collections", "contextlib", "copy", "dataclasses",
    "datetime", "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "hmac", "itertools", "json", "math",
    "numbers", "operator", "re", "statistics", "string", "struct", "types", "typing", "unicodedata", "uuid", "weakref",
    "zlib",
}  # fmt: skip
# The secret part owns keys and a bounded thread pool as well.
SECRET_STANDARD = PURE_STANDARD | {"concurrent", "gc", "queue", "secrets", "threading", "warnings"}


def imports_of(source: str) -> Iterator[str]:
    """Yield the top-level package of every import in a module, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def modules(inside: Path) -> list[Path]:
    return sorted(path for path in inside.rglob("*.py") if METHOD / "v1" not in path.parents)


def foreign_imports(path: Path, allowed: set[str]) -> list[str]:
    return sorted(set(imports_of(path.read_text())) - allowed - {"shelora"})


def test_imports_of_sees_every_form() -> None:
    source = "import os.path, numpy as np\nfrom grpc import aio\nfrom . import here\ndef f():\n    import time\n"
    assert sorted(imports_of(source)) == ["grpc", "numpy", "os", "time"]


@pytest.mark.parametrize("path", modules(METHOD), ids=lambda path: str(path.relative_to(ROOT)))
def test_method_imports_numpy_and_pure_standard_modules_only(path: Path) -> None:
    if METHOD / "he" / "secret" in path.parents:
        allowed = SECRET_STANDARD | {"numpy", "openfhe", "pyope"}
    else:
        allowed = PURE_STANDARD | {"numpy"}
    assert foreign_imports(path, allowed) == []
