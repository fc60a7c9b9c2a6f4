"""Who may connect to whom: NetworkPolicies evaluated over rendered pods and the neighbours they have in a cluster."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from support.manifests import Manifest, of_kind, pods, selects

DIRECTIONS: Final = ("Ingress", "Egress")
OTHER_PORTS: Final = (22, 53, 80, 443, 5432, 6443, 7441, 7442, 7443, 7444, 7480, 7481, 7482, 7490, 30000)


class Flow(NamedTuple):
    """A connection that nothing forbids."""

    source: str
    target: str
    port: int
    protocol: str = "TCP"


@dataclass(frozen=True)
class Peer:
    """Somebody with an address: a rendered pod, or a neighbour whose own policies are not ours to know."""

    name: str
    address: str
    namespace: str = ""
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    rendered: bool = False


NEIGHBOURS: Final = (
    Peer("prometheus", "10.244.9.1", "monitoring", {"kubernetes.io/metadata.name": "monitoring"}),
    Peer("dns", "10.244.9.2", "kube-system", {"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"}),
    Peer("ingress", "10.244.9.3", "ingress-nginx", {"kubernetes.io/metadata.name": "ingress-nginx"}),
    # Labels like ours, in a namespace that nobody admitted.
    Peer(
        "stranger",
        "10.244.9.4",
        "elsewhere",
        {"kubernetes.io/metadata.name": "elsewhere"},
        {"app.kubernetes.io/name": "shelora", "app.kubernetes.io/component": "agent"},
    ),
    Peer("outside", "203.0.113.7"),
    Peer("external database", "192.0.2.10"),
    Peer("load balancer", "192.0.2.20"),
    Peer("metadata service", "169.254.169.254"),
)


def peers(manifests: Sequence[Manifest]) -> list[Peer]:
    """The pods, named by their component, and the neighbours."""
    namespaces = {
        one["metadata"]["name"]: {
            **one["metadata"].get("labels", {}),
            "kubernetes.io/metadata.name": one["metadata"]["name"],
        }
        for one in of_kind(manifests, "Namespace")
    }
    own = [
        Peer(
            pod.component,
            f"10.244.0.{number}",
            pod.namespace,
            namespaces.get(pod.namespace, {"kubernetes.io/metadata.name": pod.namespace}),
            pod.labels,
            pod.ports,
            rendered=True,
        )
        for number, pod in enumerate(pods(manifests), start=1)
    ]
    return [*own, *NEIGHBOURS]


def allowed_flows(manifests: Sequence[Manifest]) -> set[Flow]:
    """Every connection that both ends' policies let through; traffic of the node to its own pods is not among them."""
    policies = list(of_kind(manifests, "NetworkPolicy"))
    everyone = peers(manifests)
    numbers = sorted({port for peer in everyone for port in peer.ports.values()} | set(OTHER_PORTS))
    return {
        Flow(source.name, target.name, port, protocol)
        for source in everyone
        for target in everyone
        if source is not target and (source.rendered or target.rendered)
        for port in numbers
        for protocol in ("TCP", "UDP")
        if _permits(policies, "Egress", source, target, target, port, protocol)
        and _permits(policies, "Ingress", target, source, target, port, protocol)
    }


def isolated(manifests: Sequence[Manifest], peer: Peer) -> set[str]:
    """The directions in which a policy selects a peer, so that what no rule allows is refused."""
    chosen = [one for one in of_kind(manifests, "NetworkPolicy") if _selected(one, peer)]
    return {direction for one in chosen for direction in _directions(one)}


def _permits(
    policies: Iterable[Manifest], direction: str, subject: Peer, other: Peer, target: Peer, port: int, protocol: str
) -> bool:
    """Whether the policies on one end let a connection through; without any, everything passes."""
    applying = [one for one in policies if direction in _directions(one) and _selected(one, subject)]
    if not applying:
        return True
    rules = ((policy, rule) for policy in applying for rule in policy["spec"].get(direction.lower(), []))
    side = "from" if direction == "Ingress" else "to"
    return any(
        _covers_port(rule.get("ports"), target, port, protocol)
        and (not rule.get(side) or any(_is_peer(one, other, policy) for one in rule[side]))
        for policy, rule in rules
    )


def _selected(policy: Manifest, peer: Peer) -> bool:
    here = peer.rendered and policy["metadata"]["namespace"] == peer.namespace
    return here and selects(policy["spec"]["podSelector"], peer.labels)


def _directions(policy: Manifest) -> list[str]:
    spec = policy["spec"]
    return list(spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])])


def _is_peer(rule: Mapping[str, Any], peer: Peer, policy: Manifest) -> bool:
    if "ipBlock" in rule:
        # A network plugin may or may not apply a block to pods: here it does, which allows more.
        inside = _within(peer.address, rule["ipBlock"]["cidr"])
        return inside and not any(_within(peer.address, one) for one in rule["ipBlock"].get("except", []))
    if not peer.namespace:
        return False
    if "namespaceSelector" in rule:
        if not selects(rule["namespaceSelector"], peer.namespace_labels):
            return False
    elif peer.namespace != policy["metadata"]["namespace"]:
        return False
    return selects(rule.get("podSelector", {}), peer.labels)


def _within(address: str, block: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(block)


def _covers_port(ports: Sequence[Mapping[str, Any]] | None, target: Peer, port: int, protocol: str) -> bool:
    """Whether a rule's ports hold one; no list means every port. A name means whatever the target calls so."""
    if not ports:
        return True
    for one in ports:
        if one.get("protocol", "TCP") != protocol:
            continue
        wanted = one.get("port")
        number = target.ports.get(wanted) if isinstance(wanted, str) else wanted
        if wanted is None or (number is not None and number <= port <= one.get("endPort", number)):
            return True
    return False
