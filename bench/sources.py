"""Fingerprints of code, so that records of another version are measured again."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Final

from shelora import __version__

ROOT: Final = Path(__file__).resolve().parents[1]


def fingerprint(sources: Iterable[Path]) -> str:
    """Of everything that decides a measurement's figures.

    Args:
        sources: its modules; comments, layout and docstrings do not count. Other files count byte by byte.
    """
    digest = sha256(__version__.encode())
    for path in sources:
        digest.update(_code(path).encode() if path.suffix == ".py" else path.read_bytes())
    return digest.hexdigest()[:16]


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.dump(tree)
