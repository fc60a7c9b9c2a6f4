"""Shapes of the custom resources in deploy/kubernetes.

The schemas of kubernetes-validate hold built-in kinds only, and no operator is at hand here. These models hold the
fields that our manifests use, named and typed as the operators' own reference says, and refuse any other; they stand in
for the operators' admission, they do not replace it.
"""

# ruff: noqa: N815 - the names are the resources'

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Duration = Annotated[str, Field(pattern=r"^([0-9]+(ms|s|m|h|d))+$")]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Selector(_Shape):
    matchLabels: dict[str, str]


# ---------------------------------------------------------------- cert-manager.io/v1


class _IssuerReference(_Shape):
    name: str
    kind: Literal["Issuer", "ClusterIssuer"] = "Issuer"
    group: Literal["cert-manager.io"] = "cert-manager.io"


class _PrivateKey(_Shape):
    algorithm: Literal["RSA", "ECDSA", "Ed25519"] = "RSA"
    size: int = 2048
    rotationPolicy: Literal["Never", "Always"] = "Never"


class _Certificate(_Shape):
    secretName: str
    issuerRef: _IssuerReference
    isCA: bool = False
    commonName: str = Field(default="", max_length=64)
    dnsNames: list[str] = []
    duration: Duration = "2160h"
    renewBefore: Duration = "720h"
    privateKey: _PrivateKey = _PrivateKey()
    usages: list[Literal["digital signature", "key encipherment", "server auth", "client auth"]] = []


class _Authority(_Shape):
    secretName: str


class _Nothing(_Shape):
    pass


class _Issuer(_Shape):
    selfSigned: _Nothing | None = None
    ca: _Authority | None = None


# ---------------------------------------------------------------- monitoring.coreos.com/v1


class _Endpoint(_Shape):
    port: str
    path: str = "/metrics"
    interval: Duration


class _Namespaces(_Shape):
    matchNames: list[str]


class _ServiceMonitor(_Shape):
    jobLabel: str
    selector: _Selector
    endpoints: list[_Endpoint] = Field(min_length=1)
    namespaceSelector: _Namespaces | None = None


class _PodMonitor(_Shape):
    jobLabel: str
    selector: _Selector
    podMetricsEndpoints: list[_Endpoint] = Field(min_length=1)
    namespaceSelector: _Namespaces | None = None


class _Rule(_Shape):
    expr: str
    alert: str | None = None
    record: str | None = None
    for_: Duration | None = Field(default=None, alias="for")
    keep_firing_for: Duration | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Group(_Shape):
    name: str
    interval: Duration | None = None
    rules: list[_Rule] = Field(min_length=1)


class _PrometheusRule(_Shape):
    groups: list[_Group] = Field(min_length=1)


# ---------------------------------------------------------------- autoscaling.k8s.io/v1


class _Target(_Shape):
    apiVersion: str
    kind: str
    name: str


class _UpdatePolicy(_Shape):
    updateMode: Literal["Off", "Initial", "Recreate", "Auto"]


class _ContainerPolicy(_Shape):
    containerName: str
    controlledResources: list[Literal["cpu", "memory"]]
    controlledValues: Literal["RequestsAndLimits", "RequestsOnly"]
    minAllowed: dict[str, str]
    maxAllowed: dict[str, str]


class _ResourcePolicy(_Shape):
    containerPolicies: list[_ContainerPolicy]


class _VerticalPodAutoscaler(_Shape):
    targetRef: _Target
    updatePolicy: _UpdatePolicy
    resourcePolicy: _ResourcePolicy


MODELS: Final[dict[tuple[Any, Any], type[BaseModel]]] = {
    ("cert-manager.io/v1", "Certificate"): _Certificate,
    ("cert-manager.io/v1", "Issuer"): _Issuer,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _ServiceMonitor,
    ("monitoring.coreos.com/v1", "PodMonitor"): _PodMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): _PrometheusRule,
    ("autoscaling.k8s.io/v1", "VerticalPodAutoscaler"): _VerticalPodAutoscaler,
}
"""Model of the spec, by apiVersion and kind."""
