"""Kubernetes manifests as kustomize renders them, and the pods they make."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "deploy/kubernetes"
WORKLOADS: Final = ("Deployment", "StatefulSet", "DaemonSet", "Job")
OWN_IMAGES: Final = ("shelora/keymanager", "shelora/aggregator", "shelora/agent")

Manifest = dict[str, Any]

# Safe like SafeLoader, and ten times as fast where libyaml is there.
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, eq=False)
class Pod:
    """What a workload runs."""

    workload: Manifest
    labels: Mapping[str, str]
    spec: Manifest

    @property
    def name(self) -> str:
        return f"{self.workload['kind']} {self.workload['metadata']['name']}"

    @property
    def namespace(self) -> str:
        return str(self.workload["metadata"]["namespace"])

    @property
    def component(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    @property
    def stays(self) -> bool:
        """Whether it is meant to run for good."""
        return self.workload["kind"] != "Job"

    @property
    def is_own(self) -> bool:
        """Whether it runs images of this project."""
        return all(image_name(one["image"]) in OWN_IMAGES for one in self.containers)

    @property
    def containers(self) -> list[Manifest]:
        """All containers, those that prepare included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def volumes(self) -> list[Manifest]:
        return list(self.spec.get("volumes", []))

    @property
    def ports(self) -> dict[str, int]:
        """Container ports by name."""
        found = (port for one in self.spec["containers"] for port in one.get("ports", []))
        return {port["name"]: port["containerPort"] for port in found}


def image_name(image: str) -> str:
    """An image without its tag and digest."""
    head, _, last = image.partition("@")[0].rpartition("/")
    return f"{head}/{last.partition(':')[0]}" if head else last.partition(":")[0]


def kubectl() -> str | None:
    return shutil.which("kubectl")


@functools.cache
def _rendered(resources: tuple[str, ...], components: tuple[str, ...]) -> str:
    """What `kubectl kustomize` makes of folders below deploy/kubernetes, as JSON.

    Raises: AssertionError with kustomize's words when it refuses.
    """
    with tempfile.TemporaryDirectory(prefix="shelora-kustomize-") as folder:
        # kustomize takes relative paths only, and resolves links in the folder it is called for.
        start = Path(folder).resolve()
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(FOLDER / one, start) for one in resources],
            "components": [os.path.relpath(FOLDER / one, start) for one in components],
        }
        (start / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run(["kubectl", "kustomize", str(start)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{resources} with {components}: {done.stderr}"
    assert not done.stderr, f"{resources} with {components}: {done.stderr}"
    return json.dumps([one for one in yaml.load_all(done.stdout, Loader=_LOADER) if one])


def render(resources: Sequence[str], components: Sequence[str] = ()) -> list[Manifest]:
    """Fresh copies of the rendered manifests."""
    return list(json.loads(_rendered(tuple(resources), tuple(components))))


def of_kind(manifests: Iterable[Manifest], *kinds: str) -> Iterator[Manifest]:
    return (one for one in manifests if one["kind"] in kinds)


def pods(manifests: Iterable[Manifest]) -> list[Pod]:
    templates = ((one, one["spec"]["template"]) for one in of_kind(manifests, *WORKLOADS))
    return [Pod(one, template["metadata"].get("labels", {}), template["spec"]) for one, template in templates]


def title(manifest: Manifest) -> str:
    """Kind and name, for messages."""
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a label selector with matchLabels and matchExpressions matches labels; an empty one matches all."""
    wanted = selector.get("matchLabels", {}).items()
    return all(labels.get(key) == value for key, value in wanted) and all(
        _matches(one, labels) for one in selector.get("matchExpressions", [])
    )


def _matches(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, operator, values = expression["key"], expression["operator"], expression.get("values", [])
    if operator == "In":
        return labels.get(key) in values
    if operator == "NotIn":
        return labels.get(key) not in values
    if operator == "Exists":
        return key in labels
    if operator == "DoesNotExist":
        return key not in labels
    raise AssertionError(f"unknown operator {operator}")
