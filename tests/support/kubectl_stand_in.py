"""A kubectl for deploy/kubernetes/enrol.sh on one machine: Secrets are files, `exec` runs beside the key manager.

What needs no cluster (`create --dry-run=client`) is left to the real one. It runs as a program of its own.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import yaml

_PLACE: Final = "place.json"
_APPLIED: Final = ".secret.json"


@dataclass(frozen=True)
class Place:
    """Where the key manager runs.

    Attributes:
        root: folder that is its root.
        mounts: what is mounted below it.
        environment: its variables.
        secrets: names of the Secrets that exist.
    """

    root: str
    mounts: list[str]
    environment: dict[str, str]
    secrets: list[str]


def install(folder: Path, place: Place) -> Path:
    """Make a folder for PATH with a program `kubectl`."""
    folder.mkdir(exist_ok=True)
    (folder / _PLACE).write_text(json.dumps(asdict(place)))
    program = folder / "kubectl"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{folder}" "$@"\n')
    program.chmod(0o755)
    return folder


def applied(folder: Path) -> dict[str, dict[str, bytes]]:
    """The Secrets that were applied so far."""
    found = {one.name.removesuffix(_APPLIED): json.loads(one.read_text()) for one in folder.glob(f"*{_APPLIED}")}
    return {
        name: {key: base64.b64decode(value) for key, value in secret["data"].items()} for name, secret in found.items()
    }


def relocated(text: str, root: str, mounts: Sequence[str]) -> str:
    """A text whose mounted paths lie below a root; paths that no mount covers stay, and lead nowhere."""
    known = "|".join(re.escape(one) for one in sorted(mounts, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])({known})(?![\w.-])", lambda match: f"{root}{match[1]}", text)


def main(folder: Path, arguments: list[str]) -> int:
    place = Place(**json.loads((folder / _PLACE).read_text()))
    path = os.environ["PATH"].partition(os.pathsep)[2]
    verb = next(one for one in arguments if one in {"exec", "create", "apply", "patch", "get", "wait"})
    if verb == "exec":
        command = [relocated(one, place.root, place.mounts) for one in arguments[arguments.index("--") + 1 :]]
        programs = os.pathsep.join((str(Path(sys.executable).parent), path))
        return subprocess.run(
            command, env={**os.environ, **place.environment, "PATH": programs}, check=False
        ).returncode
    if verb == "create" and "--dry-run=client" in arguments:
        return subprocess.run(["kubectl", *arguments], env={**os.environ, "PATH": path}, check=False).returncode
    if verb == "apply":
        secret = yaml.safe_load(sys.stdin)
        (folder / f"{secret['metadata']['name']}{_APPLIED}").write_text(json.dumps(secret))
    if verb == "patch":
        name = arguments[arguments.index("secret") + 1]
        found = applied(folder).get(name, {})
        encoded = {key: base64.b64encode(value).decode() for key, value in found.items()}
        (folder / f"{name}{_APPLIED}").write_text(json.dumps({"data": encoded | json.load(sys.stdin)["data"]}))
    if verb == "get":
        kind, name = arguments[arguments.index("get") + 1 :][:2]
        if kind == "namespace" or name in place.secrets:
            sys.stdout.write(f"{kind}/{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
