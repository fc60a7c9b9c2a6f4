"""Every rendering of deploy/kubernetes fits the Kubernetes API, keeps the policies, lets only the right ones meet.

No cluster is needed. Without kubectl the tests are skipped, unless SHELORA_REQUIRE_KUBECTL=1 says that they must run.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import kubernetes_validate  # type: ignore[import-untyped] # it brings no types
import pytest
import yaml

from support import kubernetes_policies as policies
from support.kubernetes_crds import MODELS
from support.kubernetes_network import Flow, allowed_flows
from support.manifests import FOLDER, Manifest, Pod, kubectl, of_kind, pods, render, title

VERSIONS: Final = ("1.29", "1.33", "1.37")
OVERLAYS: Final = ("overlays/dev", "overlays/production")
KINDS: Final = ("agent/deployment", "agent/daemonset", "agent/job")
ADDITIONS: Final = ("agent/gpu", "agent/ephemeral", "agent/remote")
AGENTS: Final = "examples/three-agents"

# One component each on both overlays, and all at once; production brings the load balancers itself.
COMPONENTS: Final = (
    ("components/argocd",),
    ("components/cert-manager",),
    ("components/cert-manager", "components/database-client-tls"),
    ("components/grafana",),
    ("components/ingress",),
    ("components/monitoring",),
    ("components/vpa",),
)
EVERYTHING: Final = tuple(dict.fromkeys(one for group in COMPONENTS for one in group))

Rendering = tuple[tuple[str, ...], tuple[str, ...]]


def _renderings() -> Iterator[Rendering]:
    for overlay in OVERLAYS:
        yield (overlay,), ()
        yield (overlay, AGENTS), ()
        yield from (((overlay,), group) for group in COMPONENTS)
        yield (overlay, AGENTS), EVERYTHING
    yield ("overlays/dev",), ("components/loadbalancer",)
    for kind in KINDS:
        site = () if kind == "agent/daemonset" else ("agent/site",)
        for additions in ((), *((one,) for one in ADDITIONS), ADDITIONS):
            yield (*site, kind), additions


RENDERINGS: Final = tuple(_renderings())
_NAMES: Final = ["+".join(one.rpartition("/")[2] for one in (*resources, *extra)) for resources, extra in RENDERINGS]
each_rendering = pytest.mark.parametrize(("resources", "components"), RENDERINGS, ids=_NAMES)


@pytest.fixture(scope="module", autouse=True)
def _kubectl() -> None:
    if kubectl() is None:
        if os.environ.get("SHELORA_REQUIRE_KUBECTL") == "1":
            pytest.fail("kubectl is required (SHELORA_REQUIRE_KUBECTL=1) and not installed")
        pytest.skip("kubectl is not installed: nothing can be rendered")


def test_every_folder_is_rendered():
    folders = {one.parent.relative_to(FOLDER).as_posix() for one in FOLDER.rglob("kustomization.yaml")}
    named = {one for resources, components in RENDERINGS for one in (*resources, *components)}
    # Parts of the above.
    named |= {"base", "base/aggregator", "base/keymanager", "base/network", "agent/configuration", "agent/volumes"}
    named |= {f"{AGENTS}/clinic-{number}" for number in (1, 2, 3)}
    assert folders == named


@each_rendering
def test_fits_the_api(resources, components):
    for one in render(resources, components):
        fits_the_api(json.dumps(one, sort_keys=True))


@each_rendering
def test_keeps_the_policies(resources, components):
    assert policies.complaints(render(resources, components)) == []


@functools.cache
def fits_the_api(text: str) -> None:
    """Validate against the strict schemas of several Kubernetes versions; custom resources against our own models."""
    manifest = json.loads(text)
    model = MODELS.get((manifest["apiVersion"], manifest["kind"]))
    if model is not None:
        model.model_validate(manifest["spec"])
        return
    for version in VERSIONS:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("StatefulSet", lambda spec: spec.update(replica=1)),
        ("StatefulSet", lambda spec: spec["template"]["spec"]["containers"][0].update(ports=[{"containerPort": "x"}])),
        ("NetworkPolicy", lambda spec: spec.update(policyType=[])),
        ("Issuer", lambda spec: spec.update(selfsigned={})),
        ("Certificate", lambda spec: spec.pop("secretName")),
        ("ServiceMonitor", lambda spec: spec["endpoints"][0].update(intervall="15s")),
        ("PodMonitor", lambda spec: spec.pop("podMetricsEndpoints")),
        ("PrometheusRule", lambda spec: spec["groups"][0]["rules"][0].pop("expr")),
        ("VerticalPodAutoscaler", lambda spec: spec["updatePolicy"].update(updateMode="Never")),
    ],
)
def test_validation_can_fail(kind, change):
    one = next(of_kind(render(("overlays/dev",), EVERYTHING), kind))
    change(one["spec"])
    with pytest.raises((kubernetes_validate.ValidationError, ValueError)):
        fits_the_api(json.dumps(one, sort_keys=True))


# ------------------------------------------------------------------------------------------- policies that can fail


def _pod(manifests: Sequence[Manifest], component: str = "aggregator") -> Pod:
    return next(pod for pod in pods(manifests) if pod.component == component)


def _container(manifests: Sequence[Manifest], component: str = "aggregator") -> Manifest:
    return _pod(manifests, component).containers[0]


def _named(manifests: Sequence[Manifest], kind: str, name: str, namespace: str = "shelora") -> Manifest:
    place = {"name": name} if kind == "Namespace" else {"name": name, "namespace": namespace}
    return next(one for one in of_kind(manifests, kind) if place.items() <= one["metadata"].items())


def _without(manifests: list[Manifest], kind: str, name: str) -> None:
    manifests.remove(_named(manifests, kind, name))


def _scaler() -> Manifest:
    target = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "shelora-aggregator"}
    metadata = {"name": "more", "namespace": "shelora"}
    return {"kind": "HorizontalPodAutoscaler", "metadata": metadata, "spec": {"scaleTargetRef": target}}


def _twin(manifests: list[Manifest]) -> None:
    """A second workload on the state of the first agent."""
    twin = copy.deepcopy(_pod(manifests, "agent").workload)
    twin["metadata"]["name"] += "-twin"
    manifests.append(twin)


BREACHES: Final[list[tuple[policies.Policy, Callable[[list[Manifest]], Any]]]] = [
    (policies.run_as_nobody_special, lambda all_: _pod(all_).spec["securityContext"].update(runAsUser=0)),
    (policies.run_as_nobody_special, lambda all_: _container(all_)["securityContext"].update(runAsNonRoot=False)),
    (policies.read_only_root, lambda all_: _container(all_)["securityContext"].pop("readOnlyRootFilesystem")),
    (policies.no_privileges, lambda all_: _container(all_)["securityContext"].pop("allowPrivilegeEscalation")),
    (policies.no_privileges, lambda all_: _container(all_)["securityContext"].update(privileged=True)),
    (policies.no_privileges, lambda all_: _container(all_)["securityContext"]["capabilities"].update(add=["CHOWN"])),
    (policies.seccomp, lambda all_: _pod(all_).spec["securityContext"].pop("seccompProfile")),
    (policies.resources, lambda all_: _container(all_)["resources"]["limits"].pop("memory")),
    (policies.resources, lambda all_: _container(all_)["resources"]["requests"].update(memory="1Mi")),
    (policies.bounded_scratch, lambda all_: _pod(all_).spec["volumes"].append({"name": "more", "emptyDir": {}})),
    (policies.probes, lambda all_: _container(all_).pop("readinessProbe")),
    (policies.probes, lambda all_: _container(all_)["readinessProbe"].update(grpc={"port": 7491})),
    (policies.pinned_images, lambda all_: _container(all_).update(image="shelora/aggregator")),
    (
        policies.pinned_images,
        lambda all_: _container(all_).update(image="registry.example.org:5000/shelora/aggregator"),
    ),
    (policies.pinned_images, lambda all_: _container(all_).update(image="shelora/aggregator:latest")),
    (policies.default_deny, lambda all_: _without(all_, "NetworkPolicy", "shelora-default-deny")),
    (policies.away_from_the_node, lambda all_: _pod(all_).spec.update(hostNetwork=True)),
    (policies.away_from_the_node, lambda all_: _pod(all_).spec.update(hostPID=True)),
    (
        policies.away_from_the_node,
        lambda all_: _pod(all_).spec["volumes"].append({"name": "node", "hostPath": {"path": "/etc"}}),
    ),
    (policies.restricted_namespaces, lambda all_: _without(all_, "Namespace", "shelora")),
    (
        policies.restricted_namespaces,
        lambda all_: _named(all_, "Namespace", "shelora")["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "baseline"}
        ),
    ),
    (policies.no_service_account_tokens, lambda all_: _pod(all_).spec.pop("automountServiceAccountToken")),
    (policies.no_service_account_tokens, lambda all_: _pod(all_).spec.pop("serviceAccountName")),
    (policies.no_secrets_in_manifests, lambda all_: all_.append({"kind": "Secret", "metadata": {"name": "oops"}})),
    (
        policies.no_secrets_in_manifests,
        lambda all_: _container(all_)["env"].append({"name": "X", "valueFrom": {"secretKeyRef": {"name": "x"}}}),
    ),
    (policies.references_exist, lambda all_: _named(all_, "ConfigMap", _config(all_))["data"].clear()),
    (policies.references_exist, lambda all_: _secret_volume(all_).update(secretName="shelora-nobody-makes-this")),
    (policies.references_exist, lambda all_: _secret_volume(all_).update(items=[{"key": "other", "path": "x"}])),
    (policies.selectors_match, lambda all_: _pod(all_).workload["spec"]["selector"]["matchLabels"].update(a="b")),
    (
        policies.selectors_match,
        lambda all_: _named(all_, "Service", "shelora-aggregator")["spec"]["selector"].update(a="b"),
    ),
    (policies.selectors_match, _twin),
    (
        policies.service_ports,
        lambda all_: _named(all_, "Service", "shelora-aggregator")["spec"]["ports"][0].update(targetPort="grcp"),
    ),
    (
        policies.no_shared_volumes,
        lambda all_: (
            _pod(all_).workload["spec"]["volumeClaimTemplates"][0]["spec"].update(accessModes=["ReadWriteMany"])
        ),
    ),
    (policies.no_shared_volumes, _twin),
    (policies.single_writers, lambda all_: _pod(all_).workload["spec"].update(replicas=2)),
    (policies.single_writers, lambda all_: _pod(all_, "agent").workload["spec"].update(strategy={})),
    (policies.single_writers, lambda all_: all_.append(_scaler())),
    (policies.disruption_budgets, lambda all_: _without(all_, "PodDisruptionBudget", "shelora-keymanager")),
    (policies.time_to_drain, lambda all_: _pod(all_).spec.update(terminationGracePeriodSeconds=10)),
    (policies.labels, lambda all_: _pod(all_).workload["spec"]["template"]["metadata"].pop("labels")),
]


def _config(manifests: Sequence[Manifest]) -> str:
    return next(one["configMap"]["name"] for one in _pod(manifests).volumes if one["name"] == "config")


def _secret_volume(manifests: Sequence[Manifest]) -> dict[str, Any]:
    return next(one["secret"] for one in _pod(manifests).volumes if one["name"] == "enrolment")


@pytest.mark.parametrize(("policy", "breach"), BREACHES, ids=[policy.__name__ for policy, _ in BREACHES])
def test_a_policy_notices_a_breach(policy, breach):
    manifests = render(("overlays/dev", AGENTS))
    assert list(policy(manifests)) == []
    breach(manifests)
    assert list(policy(manifests)) != []


def test_every_policy_has_a_breach():
    assert {policy for policy, _ in BREACHES} == set(policies.POLICIES)


# ------------------------------------------------------------------------------------------------------- who meets whom

INSIDE: Final = {
    Flow("agent", "keymanager", 7441),
    Flow("agent", "keymanager", 7442),
    Flow("agent", "aggregator", 7443),
    Flow("aggregator", "keymanager", 7442),
    Flow("aggregator", "keymanager", 7444),
    Flow("prometheus", "keymanager", 7481),
    Flow("prometheus", "aggregator", 7480),
    Flow("prometheus", "agent", 7482),
    *(Flow(name, "dns", 53, protocol) for name in ("agent", "aggregator", "migration") for protocol in ("TCP", "UDP")),
}
DATABASE: Final = {Flow("aggregator", "database", 5432), Flow("migration", "database", 5432)}
EXTERNAL_DATABASE: Final = {Flow("aggregator", "external database", 5432), Flow("migration", "external database", 5432)}
# From everywhere but our own namespaces, whose own policies still hold.
EVERYWHERE: Final = (
    "outside",
    "load balancer",
    "external database",
    "metadata service",
    "prometheus",
    "dns",
    "ingress",
    "stranger",
)
LOAD_BALANCED: Final = {
    Flow(source, *target)
    for source in EVERYWHERE
    for target in (("keymanager", 7441), ("keymanager", 7442), ("aggregator", 7443))
}
FROM_INGRESS: Final = {
    Flow("ingress", "keymanager", 7441),
    Flow("ingress", "keymanager", 7442),
    Flow("ingress", "aggregator", 7443),
}


@pytest.mark.parametrize(
    ("resources", "components", "expected"),
    [
        (("overlays/dev", AGENTS), (), INSIDE | DATABASE),
        (("overlays/dev", "agent/daemonset"), (), INSIDE | DATABASE),
        (("overlays/dev", "agent/site", "agent/job"), ("agent/ephemeral",), INSIDE | DATABASE),
        (("overlays/dev", AGENTS), ("components/ingress",), INSIDE | DATABASE | FROM_INGRESS),
        (
            ("overlays/dev", AGENTS),
            ("components/cert-manager",),
            INSIDE | DATABASE | {Flow("ingress", "aggregator", 7480)},
        ),
        (("overlays/production", AGENTS), (), INSIDE | EXTERNAL_DATABASE | LOAD_BALANCED),
        (("overlays/production", AGENTS), ("components/monitoring",), INSIDE | EXTERNAL_DATABASE | LOAD_BALANCED),
        (
            ("agent/site", "agent/deployment"),
            ("agent/remote",),
            {
                Flow("prometheus", "agent", 7482),
                Flow("agent", "dns", 53),
                Flow("agent", "dns", 53, "UDP"),
                *(Flow("agent", "load balancer", port) for port in (7441, 7442, 7443)),
            },
        ),
    ],
    ids=lambda one: "+".join(name.rpartition("/")[2] for name in one) if isinstance(one, tuple) else "flows",
)
def test_only_the_right_ones_meet(resources, components, expected):
    assert allowed_flows(render(resources, components)) == expected


@each_rendering
def test_the_aggregator_never_reaches_the_secret_port(resources, components):
    flows = allowed_flows(render(resources, components))
    assert not {flow for flow in flows if flow.source == "aggregator" and flow.port == 7441}


def test_an_open_policy_shows_in_the_flows():
    manifests = render(("overlays/dev", AGENTS))
    _named(manifests, "NetworkPolicy", "shelora-aggregator")["spec"]["egress"].append({})
    to_database = _named(manifests, "NetworkPolicy", "shelora-keymanager")["spec"]["ingress"][1]
    to_database["ports"].append({"port": 7441})
    opened = allowed_flows(manifests) - INSIDE - DATABASE
    assert Flow("aggregator", "keymanager", 7441) in opened
    assert Flow("aggregator", "outside", 443) in opened
    _without(manifests, "NetworkPolicy", "shelora-aggregator")
    _without(manifests, "NetworkPolicy", "shelora-default-deny")
    assert Flow("outside", "aggregator", 7490) in allowed_flows(manifests)


# ------------------------------------------------------------------------------------------------------------ the rest


def test_the_pods_of_all_agent_kinds_are_alike():
    """What is written three times may differ only where the kinds do."""
    shapes = []
    for kind in KINDS:
        spec = _pod(render((kind,)), "agent").spec
        for field in ("restartPolicy", "nodeSelector"):
            spec.pop(field, None)
        own = {"SHELORA_AGENT__EXIT_WHEN_FINISHED", "NODE_NAME", "SHELORA_AGENT__ENROLMENT_FILE"}
        spec["containers"][0]["env"] = [one for one in spec["containers"][0]["env"] if one["name"] not in own]
        spec["volumes"] = sorted(
            (one if one["name"] in {"config", "tmp"} else one["name"] for one in spec["volumes"]), key=str
        )
        shapes.append(spec)
    assert shapes[0] == shapes[1] == shapes[2]


def test_alerts_are_the_monitoring_folder_s():
    alerts = yaml.safe_load((FOLDER.parent / "monitoring/prometheus/alerts.yml").read_text())
    rule = next(of_kind(render(("overlays/dev",), ("components/monitoring",)), "PrometheusRule"))
    assert rule["spec"] == alerts, "run scripts/k8s-validate.sh --write"


def test_the_dashboard_is_the_monitoring_folder_s():
    dashboard = (FOLDER.parent / "monitoring/grafana/dashboards/shelora.json").read_text()
    manifests = render(("overlays/dev",), ("components/grafana",))
    assert _named(manifests, "ConfigMap", "shelora-dashboard", "monitoring")["data"]["shelora.json"] == dashboard


def test_it_is_said_how_every_missing_secret_is_made():
    text = (FOLDER / "README.md").read_text() + (FOLDER / "enrol.sh").read_text()
    names = {re.sub(r"clinic-\d", "NAME", name) for _, name in policies.USER_SUPPLIED}
    assert {name for name in names if name not in text} == set()


def test_gpus_are_asked_for_where_they_are_wanted():
    for kind in KINDS:
        container = _container(render((kind,), ("agent/gpu",)), "agent")
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert container["image"] == "shelora/agent:0.1.0-cuda"


def test_ephemeral_state_leaves_no_claim():
    for kind in KINDS:
        manifests = render((kind,), ("agent/ephemeral",))
        state = next(one for one in _pod(manifests, "agent").volumes if one["name"] == "state")
        assert set(state) == {"name", "emptyDir"}
        assert "shelora-agent-state" not in {title(one).split()[1] for one in manifests}
