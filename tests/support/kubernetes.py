"""What Kubernetes and KubeRay accept of the fields that Tandem's manifests use, as JSON Schema.

KubeRay publishes its schema inside a Helm chart, in no Python package: this is written by hand after its API reference
(KubeRay 1.6), and that of Kubernetes 1.37. No object may have a field that is not named here, so that a misspelt one is
found; both servers would drop it in silence, or refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema

Schema = dict[str, Any]


def _object(required: str, **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def _list(items: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": at_least}


def _const(*values: Any) -> Schema:
    return {"enum": list(values)}


_TEXT: Schema = {"type": "string", "minLength": 1}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
_FLAG: Schema = {"type": "boolean"}
_LABEL: Schema = {"type": "string", "maxLength": 63, "pattern": r"^([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?$"}
_LABELS: Schema = {
    "type": "object",
    "propertyNames": {"pattern": r"^([a-z0-9.-]+/)?[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?$"},
    "additionalProperties": _LABEL,
}
_DNS_LABEL: Schema = {"type": "string", "maxLength": 63, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
_QUANTITY: Schema = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$"}
_SELECTOR = _object("matchLabels", matchLabels=_LABELS)

_TIMES = {"periodSeconds": _COUNT, "timeoutSeconds": _COUNT, "failureThreshold": _COUNT}
_PROBE = {
    "oneOf": [
        _object("httpGet", httpGet=_object("path port", path=_TEXT, port=_PORT), **_TIMES),
        _object("exec", exec=_object("command", command=_list(_TEXT, 1)), **_TIMES),
    ]
}
_ENV = {
    "oneOf": [
        _object("name value", name=_TEXT, value={"type": "string"}),
        _object("name valueFrom", name=_TEXT, valueFrom=_object("fieldRef", fieldRef=_object("fieldPath", fieldPath=_TEXT))),
    ]
}  # fmt: skip
_RESOURCES = _object(
    "requests limits",
    **{
        name: _object("cpu memory", **{"cpu": _QUANTITY, "memory": _QUANTITY, "nvidia.com/gpu": {"pattern": "^[0-9]+$"}})
        for name in ("requests", "limits")
    },
)  # fmt: skip
_CONTAINER = _object(
    "name image resources securityContext livenessProbe readinessProbe startupProbe",
    name=_DNS_LABEL,
    image=_TEXT,
    env=_list(_ENV),
    envFrom=_list(_object("secretRef", secretRef=_object("name", name=_TEXT, optional=_FLAG))),
    ports=_list(_object("containerPort", name={**_DNS_LABEL, "maxLength": 15}, containerPort=_PORT)),
    startupProbe=_PROBE,
    livenessProbe=_PROBE,
    readinessProbe=_PROBE,
    resources=_RESOURCES,
    securityContext=_object(
        "allowPrivilegeEscalation capabilities",
        allowPrivilegeEscalation=_const(False),
        capabilities=_object("drop", drop=_const(["ALL"])),
    ),
    volumeMounts=_list(
        _object("name mountPath", name=_DNS_LABEL, mountPath={"type": "string", "pattern": "^/"}, readOnly=_FLAG)
    ),
)
_VOLUME = {
    "oneOf": [
        _object("name emptyDir", name=_DNS_LABEL, emptyDir=_object("sizeLimit", medium=_const("Memory"), sizeLimit=_QUANTITY)),
        _object("name secret", name=_DNS_LABEL, secret=_object("secretName", secretName=_TEXT)),
        _object(
            "name persistentVolumeClaim",
            name=_DNS_LABEL,
            persistentVolumeClaim=_object("claimName", claimName=_TEXT, readOnly=_FLAG),
        ),
    ]
}  # fmt: skip
_POD = _object(
    "spec",
    spec=_object(
        "containers securityContext",
        automountServiceAccountToken=_FLAG,
        terminationGracePeriodSeconds=_COUNT,
        securityContext=_object(
            "runAsNonRoot runAsUser seccompProfile",
            runAsNonRoot=_const(True),
            runAsUser={"type": "integer", "minimum": 1},
            runAsGroup=_COUNT,
            fsGroup=_COUNT,
            seccompProfile=_object("type", type=_const("RuntimeDefault")),
        ),
        containers=_list(_CONTAINER, 1),
        volumes=_list(_VOLUME),
        tolerations=_list(
            _object("key operator effect", key=_TEXT, operator=_const("Exists", "Equal"), effect=_const("NoSchedule"))
        ),
    ),
)
_PARAMS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_RAY_CLUSTER = _object(
    "headGroupSpec",
    rayVersion=_TEXT,
    authOptions=_object("mode", mode=_const("disabled", "token"), secretName=_TEXT, enableK8sTokenAuth=_FLAG),
    enableInTreeAutoscaling=_FLAG,
    headGroupSpec=_object("rayStartParams template", rayStartParams=_PARAMS, template=_POD),
    workerGroupSpecs=_list(
        _object(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=_DNS_LABEL,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            rayStartParams=_PARAMS,
            template=_POD,
        )
    ),
)
_RAY_JOB = _object(
    "entrypoint",
    clusterSelector=_object("ray.io/cluster", **{"ray.io/cluster": _TEXT}),
    submissionMode=_const("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypoint=_TEXT,
    shutdownAfterJobFinishes=_FLAG,
)
_SERVICE = _object(
    "selector ports",
    type=_const("ClusterIP", "NodePort", "LoadBalancer"),
    selector=_LABELS,
    ports=_list(_object("port", name=_DNS_LABEL, port=_PORT, targetPort={"anyOf": [_PORT, _DNS_LABEL]}), 1),
)
_PEER = _object("podSelector", podSelector=_SELECTOR, namespaceSelector={"type": "object", "maxProperties": 0})
_NETWORK_POLICY = _object(
    "podSelector policyTypes ingress",
    podSelector=_SELECTOR,
    policyTypes=_list(_const("Ingress", "Egress"), 1),
    ingress=_list(
        _object("from", **{"from": _list(_PEER, 1), "ports": _list(_object("protocol port", protocol=_const("TCP"), port=_PORT))})
    ),
)  # fmt: skip
# Kubernetes: pods that no built-in controller owns may have minAvailable alone, as a number.
_DISRUPTION_BUDGET = _object("minAvailable selector", minAvailable=_COUNT, selector=_SELECTOR)

_KINDS = {
    ("ray.io/v1", "RayCluster"): _RAY_CLUSTER,
    ("ray.io/v1", "RayJob"): _RAY_JOB,
    ("v1", "Service"): _SERVICE,
    ("networking.k8s.io/v1", "NetworkPolicy"): _NETWORK_POLICY,
    ("policy/v1", "PodDisruptionBudget"): _DISRUPTION_BUDGET,
}


_METADATA = _object("name", name=_DNS_LABEL, labels=_LABELS)
_VALIDATORS = {
    (version, kind): jsonschema.Draft202012Validator(
        _object(
            "apiVersion kind metadata spec",
            apiVersion=_const(version),
            kind=_const(kind),
            metadata=_METADATA,
            spec=spec,
        )
    )
    for (version, kind), spec in _KINDS.items()
}


def validate_manifest(manifest: Mapping[str, Any]) -> None:
    """Raises jsonschema.ValidationError if a server would refuse it, or drop a part of it."""
    _VALIDATORS[manifest["apiVersion"], manifest["kind"]].validate(manifest)
