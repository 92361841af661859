"""A cluster launch file for `ray up`: on machines that are there, on AWS, on GCP.

Ray's own schema of it is ray/autoscaler/ray-schema.json. The token is a file that `ray up` copies to every node;
neither it nor the YAML, which may hold API keys, is part of what is rendered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import Config
from ..core.environment import UNDISTURBED
from ..core.errors import ConfigError
from .machines import OFFERS, Machine, Provider, gpu_machine
from .nodes import plan_nodes

_TOKEN = "~/.ray/auth_token"
"""Where Ray looks for it, here and there."""
_BIN = "~/tandem-venv/bin"
_PORT = 6379
_SYSTEM_GB = 200
"""Disk for the system, the software and logs."""


@dataclass(frozen=True)
class Site:
    """Where the cluster is: what the YAML does not know."""

    provider: Provider
    name: str
    """The cluster's."""
    file: Path
    """The one YAML: goes to every node as ~/tandem.yaml."""
    source: Path
    """A clone of Tandem, which every node installs."""
    head: str | None = None
    """On-premise: the address of the first node."""
    workers: tuple[str, ...] = ()
    """On-premise: those of the others."""
    gpus_per_node: int = 8
    """On-premise."""
    machine: str | None = None
    """In a cloud: the type of nodes with GPUs."""
    region: str | None = None
    zone: str | None = None
    project: str | None = None
    """On GCP."""
    ssh_user: str = "ubuntu"
    ssh_key: str | None = None
    """A private key. In a cloud Ray makes one if there is none."""


def render_ray_cluster(config: Config, site: Site) -> dict[str, Any]:
    """The launch file, as a tree.

    Raises:
        ConfigError: the nodes do not suffice, or something about the site is missing.
    """
    if not (site.source / "pyproject.toml").is_file():
        raise ConfigError(
            f"--source {site.source}: no pyproject.toml there", fix="give the folder of a clone of Tandem"
        )
    if site.provider is Provider.ONPREM:
        provider, nodes = _own(config, site)
    else:
        provider, nodes = _rented(config, site, site.provider)
    auth = {"ssh_user": site.ssh_user} | ({"ssh_private_key": site.ssh_key} if site.ssh_key else {})
    return {
        "cluster_name": site.name,
        "provider": provider,
        "auth": auth,
        **nodes,
        "file_mounts": {
            "~/tandem": str(site.source.resolve()),
            "~/tandem.yaml": str(site.file.resolve()),
            _TOKEN: _TOKEN,
        },
        "rsync_exclude": [".git", ".venv", "__pycache__", "bench/out"],
        "initialization_commands": [] if site.provider is Provider.ONPREM else [_APT],
        "setup_commands": ["chmod 600 ~/.ray/auth_token ~/tandem.yaml", *_install(config, site.provider)],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": _start(
            f"--head --port={_PORT} --include-dashboard=false --autoscaling-config=~/ray_bootstrap_config.yaml"
        ),
        "worker_start_ray_commands": _start(f"--address=$RAY_HEAD_IP:{_PORT}"),
    }


_APT = (
    "sudo apt-get -o DPkg::Lock::Timeout=300 update -qq"
    " && sudo apt-get -o DPkg::Lock::Timeout=300 install -qqy python3-venv rsync"
)


def extras(config: Config) -> list[str]:
    """What of pyproject's optional dependencies the configuration uses."""
    pools = (config.pools.prefill, config.pools.decode, config.pools.colocated)
    wanted = {
        "gpu": any(pool is not None and pool.gpus_per_replica for pool in pools),
        "nixl": config.kv.transport in ("auto", "nixl"),
        "ucx": config.kv.transport == "ucx",
        "otel": config.observability.traces.endpoint is not None,
        "s3": any(tier.kind == "s3" for tier in config.offload.tiers),
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def _install(config: Config, provider: Provider) -> list[str]:
    clients = {Provider.AWS: ["boto3"], Provider.GCP: ["google-api-python-client"]}.get(provider, [])
    wanted = extras(config)
    package = '"$HOME/tandem' + (f"[{','.join(wanted)}]" if wanted else "") + '"'
    return [
        "python3 -m venv ~/tandem-venv",
        " ".join([f"{_BIN}/pip install -q -c ~/tandem/constraints.txt 'ray[default]'", *clients, package]),
    ]


def _start(arguments: str) -> list[str]:
    variables = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"} | UNDISTURBED
    told = " ".join(f"{name}={value}" for name, value in variables.items())
    return [f"{_BIN}/ray stop", f"ulimit -n 65536; {told} {_BIN}/ray start {arguments}"]


def _own(config: Config, site: Site) -> tuple[dict[str, Any], dict[str, Any]]:
    if site.head is None:
        raise ConfigError("--head is missing", fix="--head 10.0.0.1 --worker 10.0.0.2 …: the addresses of your nodes")
    groups = plan_nodes(config, node_gpus=site.gpus_per_node)
    wanted, there = sum(group.num_nodes for group in groups if group.num_gpus), 1 + len(site.workers)
    if wanted > there:
        raise ConfigError(
            f"the pools need {wanted} nodes of {site.gpus_per_node} GPUs; there are {there}",
            fix="name more with --worker, lower pools.*.replicas, or give --gpus-per-node",
        )
    return {"type": "local", "head_ip": site.head, "worker_ips": list(site.workers)}, {}


def _rented(config: Config, site: Site, cloud: Provider) -> tuple[dict[str, Any], dict[str, Any]]:
    offer = OFFERS[cloud]
    machines = {"gpu": gpu_machine(cloud, site.machine), "cpu": offer.cpu}
    groups = plan_nodes(
        config,
        node_gpus=machines["gpu"].num_gpus,
        gpu_node_cpus=machines["gpu"].num_cpus,
        cpu_node_cpus=machines["cpu"].num_cpus,
    )
    provider: dict[str, Any] = {"type": cloud.value, "region": site.region or offer.region}
    if cloud is Provider.GCP:
        if site.project is None:
            raise ConfigError("--project is missing", fix="--project ID: the GCP project that pays")
        provider |= {"availability_zone": site.zone or f"{provider['region']}-a", "project_id": site.project}
    elif site.zone is not None:
        provider["availability_zone"] = site.zone
    make = _aws_node if cloud is Provider.AWS else _gcp_node
    disk_gb = _SYSTEM_GB + sum(tier.capacity for tier in config.offload.tiers if tier.kind == "disk") // 10**9
    # No worker is placed on the head, which has the gateways and nothing to compute with.
    types: dict[str, Any] = {
        "head": {"resources": {"CPU": 0}, "node_config": make(offer.head, offer.cpu_image, _SYSTEM_GB)}
    }
    for group in groups:
        machine = machines[group.name]
        image = offer.gpu_image if machine.num_gpus else offer.cpu_image
        types[group.name] = {
            "min_workers": group.num_nodes,
            "max_workers": group.num_nodes,
            "resources": {"CPU": machine.num_cpus} | ({"GPU": machine.num_gpus} if machine.num_gpus else {}),
            "node_config": make(machine, image, disk_gb),
        }
    return provider, {
        "max_workers": sum(group.num_nodes for group in groups),
        "head_node_type": "head",
        "available_node_types": types,
    }


def _aws_node(machine: Machine, image: str, disk_gb: int) -> dict[str, Any]:
    volume = {"VolumeSize": disk_gb, "VolumeType": "gp3", "Encrypted": True}
    return {
        "InstanceType": machine.name,
        "ImageId": image,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": volume}],
        "MetadataOptions": {"HttpTokens": "required"},
    }


def _gcp_node(machine: Machine, image: str, disk_gb: int) -> dict[str, Any]:
    disk = {
        "boot": True,
        "autoDelete": True,
        "type": "PERSISTENT",
        "initializeParams": {"diskSizeGb": disk_gb, "sourceImage": image},
    }
    node: dict[str, Any] = {"machineType": machine.name, "disks": [disk]}
    # A machine with GPUs cannot be moved while it runs.
    return node | ({"scheduling": [{"onHostMaintenance": "TERMINATE"}]} if machine.num_gpus else {})
