"""What every rendering of deploy/kubernetes has to keep: each policy is a function from manifests to complaints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from support.kubernetes_network import DIRECTIONS, isolated, peers
from support.manifests import Manifest, Pod, image_name, of_kind, pods, selects, title

Policy = Callable[[Sequence[Manifest]], Iterator[str]]

DRAIN_S: Final = 10
"""What a service takes to drain after SIGTERM."""

OWN_USER: Final = 10001
DATABASE_USER: Final = 999
ONE_NODE_MODES: Final = {"ReadWriteOnce", "ReadWriteOncePod"}

USER_SUPPLIED: Final[dict[tuple[str, str], set[str]]] = {
    # Made by deploy/kubernetes/enrol.sh.
    ("shelora", "shelora-keymanager-kek"): {"keymanager.kek"},
    ("shelora", "shelora-aggregator-enrolment"): {"enrolment.json"},
    ("shelora", "shelora-postgresql"): {"password"},
    ("shelora-agents", "shelora-agent-enrolment"): {"enrolment.json"},
    ("shelora-agents", "shelora-agent-clinic-1"): {"enrolment.json"},
    ("shelora-agents", "shelora-agent-clinic-2"): {"enrolment.json"},
    ("shelora-agents", "shelora-agent-clinic-3"): {"enrolment.json"},
    # One key a node: NODE.json.
    ("shelora-devices", "shelora-agent-enrolments"): {"NODE.json"},
    # Made by enrol.sh for the overlay dev, by hand for production.
    ("shelora", "shelora-aggregator-database"): {"database_url", "ca.crt"},
    # The users of the dashboard's Ingress.
    ("shelora", "shelora-dashboard-users"): {"auth"},
}
"""Secrets that no manifest holds, by namespace and name, with their keys; README.md says how each is made."""


def run_as_nobody_special(manifests: Sequence[Manifest]) -> Iterator[str]:
    """No process is root, and ours are 10001."""
    for pod in pods(manifests):
        context = pod.spec.get("securityContext", {})
        wanted = OWN_USER if pod.is_own else DATABASE_USER
        ids = (context.get("runAsUser"), context.get("runAsGroup"), context.get("fsGroup"))
        if context.get("runAsNonRoot") is not True or ids != (wanted, wanted, wanted):
            yield f"{pod.name}: expected user, group and volumes' group {wanted}, not root, got {context}"
        for container in pod.containers:
            if {"runAsUser", "runAsGroup", "runAsNonRoot"} & set(container.get("securityContext", {})):
                yield f"{pod.name}: container {container['name']} has a user of its own"


def read_only_root(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Programs cannot change the image they run from."""
    for pod, container, context in _contexts(manifests):
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{pod.name}: container {container['name']} can write to its root file system"


def no_privileges(manifests: Sequence[Manifest]) -> Iterator[str]:
    """No capability, no way to get one."""
    for pod, container, context in _contexts(manifests):
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{pod.name}: container {container['name']} can gain privileges"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{pod.name}: container {container['name']} keeps capabilities {context.get('capabilities')}"


def seccomp(manifests: Sequence[Manifest]) -> Iterator[str]:
    """The runtime's filter of system calls applies."""
    for pod in pods(manifests):
        if pod.spec.get("securityContext", {}).get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.name}: no seccomp profile"


def resources(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Requests and limits everywhere; memory that is promised is there, so nobody is killed for a neighbour."""
    for pod in pods(manifests):
        for container in pod.containers:
            found = container.get("resources", {})
            missing = [
                f"{kind}.{what}"
                for kind in ("requests", "limits")
                for what in ("cpu", "memory")
                if what not in found.get(kind, {})
            ]
            if missing:
                yield f"{pod.name}: container {container['name']} has no {', '.join(missing)}"
            elif found["requests"]["memory"] != found["limits"]["memory"]:
                yield f"{pod.name}: container {container['name']} may use more memory than it requests"


def bounded_scratch(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Scratch space ends before the node's disk does."""
    for pod in pods(manifests):
        for volume in pod.volumes:
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield f"{pod.name}: volume {volume['name']} has no size limit"


def probes(manifests: Sequence[Manifest]) -> Iterator[str]:
    """What stays is probed three ways, on ports it has."""
    for pod in pods(manifests):
        if not pod.stays:
            continue
        for container in pod.spec["containers"]:
            for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
                if kind not in container:
                    yield f"{pod.name}: container {container['name']} has no {kind}"
                    continue
                port = _probed_port(container[kind])
                if port is not None and port not in pod.ports and port not in pod.ports.values():
                    yield f"{pod.name}: {kind} asks port {port}, which container {container['name']} does not have"


def pinned_images(manifests: Sequence[Manifest]) -> Iterator[str]:
    """What runs is what was chosen."""
    for pod in pods(manifests):
        for container in pod.containers:
            image = container["image"]
            tag = image.partition("@")[0].removeprefix(image_name(image)).removeprefix(":")
            if "@sha256:" not in image and tag in {"", "latest"}:
                yield f"{pod.name}: image {image} is not pinned"


def default_deny(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every namespace begins from nothing, and every pod is under a policy in both directions."""
    denied = {
        one["metadata"]["namespace"]
        for one in of_kind(manifests, "NetworkPolicy")
        if one["spec"]["podSelector"] == {}
        and set(one["spec"].get("policyTypes", [])) == set(DIRECTIONS)
        and not one["spec"].get("ingress")
        and not one["spec"].get("egress")
    }
    for namespace in sorted({pod.namespace for pod in pods(manifests)} - denied):
        yield f"namespace {namespace}: no policy that denies everything"
    for peer in peers(manifests):
        open_ways = set(DIRECTIONS) - isolated(manifests, peer)
        if peer.rendered and open_ways:
            yield f"{peer.name} in {peer.namespace}: no policy for {', '.join(sorted(open_ways))}"


def away_from_the_node(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Nothing of the node but, for a DaemonSet of agents, its own data under /var/lib/shelora."""
    for pod in pods(manifests):
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.spec.get(field):
                yield f"{pod.name}: {field}"
        for container in pod.containers:
            if any("hostPort" in port for port in container.get("ports", [])):
                yield f"{pod.name}: container {container['name']} has a host port"
        for volume in pod.volumes:
            path = volume.get("hostPath", {}).get("path")
            own = pod.workload["kind"] == "DaemonSet" and str(path).startswith("/var/lib/shelora/")
            if path is not None and not own:
                yield f"{pod.name}: volume {volume['name']} is the node's {path}"


def restricted_namespaces(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Pod Security Standards at their strictest, less only where a pod needs the node's own data."""
    needing = {pod.namespace for pod in pods(manifests) if any("hostPath" in one for one in pod.volumes)}
    for namespace in of_kind(manifests, "Namespace"):
        name, labels = namespace["metadata"]["name"], namespace["metadata"].get("labels", {})
        level = labels.get("pod-security.kubernetes.io/enforce")
        if level != ("privileged" if name in needing else "restricted"):
            yield f"namespace {name}: pod security level {level}"
    declared = {one["metadata"]["name"] for one in of_kind(manifests, "Namespace")}
    for name in sorted({pod.namespace for pod in pods(manifests)} - declared):
        yield f"namespace {name}: not among the manifests"


def no_service_account_tokens(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Nobody here talks to Kubernetes."""
    accounts = {
        (one["metadata"]["namespace"], one["metadata"]["name"]): one for one in of_kind(manifests, "ServiceAccount")
    }
    for pod in pods(manifests):
        account = accounts.get((pod.namespace, pod.spec.get("serviceAccountName", "default")))
        if account is None:
            yield f"{pod.name}: no service account of its own"
        elif account.get("automountServiceAccountToken") is not False:
            yield f"{title(account)}: hands out a token"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: mounts a service account's token"


def no_secrets_in_manifests(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Secrets come from those who know them, as files."""
    for secret in of_kind(manifests, "Secret"):
        yield f"{title(secret)}: holds a secret in plain sight"
    for pod in pods(manifests):
        for container in pod.containers:
            for variable in container.get("env", []):
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    yield f"{pod.name}: {variable['name']} puts a secret into the environment"
        for volume in pod.volumes:
            if "secret" in volume and volume["secret"].get("defaultMode") != 0o440:
                yield f"{pod.name}: volume {volume['name']}: others may read it"


def references_exist(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Whatever a pod names is among the manifests, made by cert-manager, or documented as the user's to make."""
    known = _available(manifests)
    for pod in pods(manifests):
        for kind, name, keys in _references(pod):
            found = known.get((kind, pod.namespace, name))
            if found is None:
                yield f"{pod.name}: no {kind} {name}"
            elif keys - found:
                yield f"{pod.name}: {kind} {name} has no {', '.join(sorted(keys - found))}"
        for container in pod.containers:
            names = {volume["name"] for volume in pod.volumes} | _claim_templates(pod)
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in names:
                    yield f"{pod.name}: no volume {mount['name']}"
    for ingress in of_kind(manifests, "Ingress"):
        for entry in ingress["spec"].get("tls", []):
            if ("Secret", ingress["metadata"]["namespace"], entry["secretName"]) not in known:
                yield f"{title(ingress)}: no Secret {entry['secretName']}"


def selectors_match(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every selector finds what it is meant for, and no two workloads share pods."""
    everyone = pods(manifests)
    for pod in everyone:
        selector = pod.workload["spec"].get("selector")
        if pod.stays and (not selector or not selects(selector, pod.labels)):
            yield f"{pod.name}: its selector does not find its pods"
        others = [one for one in everyone if one is not pod and one.namespace == pod.namespace]
        if selector and any(selects(selector, one.labels) for one in others):
            yield f"{pod.name}: its selector finds the pods of another workload"
    for one in of_kind(manifests, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        selector = _selector(one)
        here = [pod for pod in everyone if pod.namespace == one["metadata"]["namespace"]]
        if here and not any(selects(selector, pod.labels) for pod in here):
            yield f"{title(one)}: selects no pod"


def service_ports(manifests: Sequence[Manifest]) -> Iterator[str]:
    """A Service leads to ports that exist, an Ingress to Services that exist."""
    services = {(one["metadata"]["namespace"], one["metadata"]["name"]): one for one in of_kind(manifests, "Service")}
    for (namespace, _), service in services.items():
        for pod in pods(manifests):
            if pod.namespace != namespace or not selects(_selector(service), pod.labels):
                continue
            for port in service["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                if target not in pod.ports and target not in pod.ports.values():
                    yield f"{title(service)}: {pod.name} has no port {target}"
    for ingress in of_kind(manifests, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                found = services.get((ingress["metadata"]["namespace"], backend["name"]))
                names = {port["name"] for port in found["spec"]["ports"]} if found else set()
                if backend["port"]["name"] not in names:
                    yield f"{title(ingress)}: no Service {backend['name']} with a port {backend['port']['name']}"
    for workload in of_kind(manifests, "StatefulSet"):
        if (workload["metadata"]["namespace"], workload["spec"]["serviceName"]) not in services:
            yield f"{title(workload)}: no Service {workload['spec']['serviceName']}"


def no_shared_volumes(manifests: Sequence[Manifest]) -> Iterator[str]:
    """A volume has one pod."""
    claims = list(of_kind(manifests, "PersistentVolumeClaim"))
    claims += [claim for one in of_kind(manifests, "StatefulSet") for claim in _templates(one)]
    for claim in claims:
        modes = set(claim["spec"]["accessModes"])
        if not modes or modes - ONE_NODE_MODES:
            yield f"volume claim {claim['metadata']['name']}: access modes {sorted(modes)}"
    users: dict[tuple[str, str], str] = {}
    for pod in pods(manifests):
        for volume in pod.volumes:
            if "persistentVolumeClaim" in volume:
                claim_key = (pod.namespace, volume["persistentVolumeClaim"]["claimName"])
                first = users.setdefault(claim_key, pod.name)
                if first != pod.name:
                    yield f"volume claim {claim_key[1]}: used by {first} and by {pod.name}"


def single_writers(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One pod a database, one pod an identity, and nothing that would multiply them."""
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler"):
        yield f"{title(scaler)}: everything here has one writer"
    for workload in of_kind(manifests, "StatefulSet", "Deployment"):
        if workload["spec"].get("replicas", 1) != 1:
            yield f"{title(workload)}: {workload['spec']['replicas']} replicas"
    for workload in of_kind(manifests, "Deployment"):
        if workload["spec"].get("strategy", {}).get("type") != "Recreate":
            yield f"{title(workload)}: a new pod would run beside the old one"


def disruption_budgets(manifests: Sequence[Manifest]) -> Iterator[str]:
    """What holds state is not evicted unasked, and never holds up a drain when it is broken."""
    budgets = list(of_kind(manifests, "PodDisruptionBudget"))
    for pod in pods(manifests):
        if pod.workload["kind"] != "StatefulSet":
            continue
        found = [
            one
            for one in budgets
            if one["metadata"]["namespace"] == pod.namespace and selects(one["spec"]["selector"], pod.labels)
        ]
        if len(found) != 1:
            yield f"{pod.name}: {len(found)} disruption budgets"
        for one in found:
            if one["spec"].get("minAvailable") != 1 or one["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
                yield f"{title(one)}: expected minAvailable 1 and AlwaysAllow, got {one['spec']}"


def time_to_drain(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Nobody is killed while draining."""
    for pod in pods(manifests):
        if pod.stays and pod.spec.get("terminationGracePeriodSeconds", 0) <= DRAIN_S:
            yield f"{pod.name}: killed before it can drain"


def labels(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Everything can be found by the usual labels."""
    for pod in pods(manifests):
        missing = {"app.kubernetes.io/name", "app.kubernetes.io/component"} - set(pod.labels)
        if missing:
            yield f"{pod.name}: pods without {', '.join(sorted(missing))}"


POLICIES: Final[tuple[Policy, ...]] = (
    run_as_nobody_special,
    read_only_root,
    no_privileges,
    seccomp,
    resources,
    bounded_scratch,
    probes,
    pinned_images,
    default_deny,
    away_from_the_node,
    restricted_namespaces,
    no_service_account_tokens,
    no_secrets_in_manifests,
    references_exist,
    selectors_match,
    service_ports,
    no_shared_volumes,
    single_writers,
    disruption_budgets,
    time_to_drain,
    labels,
)


def complaints(manifests: Sequence[Manifest]) -> list[str]:
    return [f"{policy.__name__}: {found}" for policy in POLICIES for found in policy(manifests)]


def _contexts(manifests: Sequence[Manifest]) -> Iterator[tuple[Pod, Manifest, dict[str, Any]]]:
    for pod in pods(manifests):
        for container in pod.containers:
            yield pod, container, container.get("securityContext", {})


def _probed_port(probe: Manifest) -> str | int | None:
    handler = probe.get("httpGet") or probe.get("grpc") or probe.get("tcpSocket")
    return handler["port"] if handler else None


def _selector(one: Manifest) -> dict[str, Any]:
    if one["kind"] == "Service":
        return {"matchLabels": one["spec"]["selector"]}
    return dict(one["spec"]["podSelector"] if one["kind"] == "NetworkPolicy" else one["spec"]["selector"])


def _templates(workload: Manifest) -> list[Manifest]:
    return list(workload["spec"].get("volumeClaimTemplates", []))


def _claim_templates(pod: Pod) -> set[str]:
    return {claim["metadata"]["name"] for claim in _templates(pod.workload)}


def _available(manifests: Sequence[Manifest]) -> dict[tuple[str, str, str], set[str]]:
    """Keys of what can be referred to, by kind, namespace and name."""
    found = {
        (one["kind"], one["metadata"]["namespace"], one["metadata"]["name"]): set(one.get("data", {}))
        for one in of_kind(manifests, "ConfigMap", "PersistentVolumeClaim")
    }
    found |= {("Secret", *place): keys for place, keys in USER_SUPPLIED.items()}
    for one in of_kind(manifests, "Certificate"):
        found["Secret", one["metadata"]["namespace"], one["spec"]["secretName"]] = {"tls.crt", "tls.key", "ca.crt"}
    return found


def _references(pod: Pod) -> Iterator[tuple[str, str, set[str]]]:
    for volume in pod.volumes:
        if "configMap" in volume:
            mounted = [
                mount["subPath"]
                for container in pod.containers
                for mount in container.get("volumeMounts", [])
                if mount["name"] == volume["name"] and "subPath" in mount
            ]
            yield "ConfigMap", volume["configMap"]["name"], set(mounted)
        if "secret" in volume:
            keys = {item["key"] for item in volume["secret"].get("items", [])}
            yield "Secret", volume["secret"]["secretName"], keys
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], set()
    for container in pod.containers:
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            if "configMapKeyRef" in source:
                yield "ConfigMap", source["configMapKeyRef"]["name"], {source["configMapKeyRef"]["key"]}
