"""Machines that can be rented, and the images that they start with."""

from __future__ import annotations

import enum
from typing import NamedTuple

from ..core.errors import ConfigError


class Provider(enum.StrEnum):
    """Whose machines a cluster is made of; onprem: one's own."""

    ONPREM = "onprem"
    AWS = "aws"
    GCP = "gcp"


class Machine(NamedTuple):
    """A type of machine, under its provider's name."""

    name: str
    num_gpus: int
    num_cpus: int
    """Hardware threads, as providers count."""


class Offer(NamedTuple):
    """What a provider has."""

    region: str
    """Where, unless told otherwise."""
    head: Machine
    cpu: Machine
    gpu: tuple[Machine, ...]
    """The first is taken unless told otherwise."""
    cpu_image: str
    gpu_image: str
    """With NVIDIA's driver. Both have Python 3.12."""


OFFERS: dict[Provider, Offer] = {
    Provider.AWS: Offer(
        "us-west-2",
        Machine("m7i.2xlarge", 0, 8),
        Machine("m7i.8xlarge", 0, 32),
        (
            Machine("p5.48xlarge", 8, 192),
            Machine("p5en.48xlarge", 8, 192),
            Machine("p4d.24xlarge", 8, 96),
            Machine("g6e.4xlarge", 1, 16),
            Machine("g6e.12xlarge", 4, 48),
            Machine("g6e.48xlarge", 8, 192),
        ),
        "resolve:ssm:/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
        "resolve:ssm:/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
    ),
    Provider.GCP: Offer(
        "us-central1",
        Machine("n2-standard-8", 0, 8),
        Machine("n2-standard-32", 0, 32),
        (
            Machine("a3-highgpu-8g", 8, 208),
            Machine("a3-ultragpu-8g", 8, 224),
            Machine("a2-highgpu-1g", 1, 12),
            Machine("a2-highgpu-8g", 8, 96),
            Machine("g2-standard-12", 1, 12),
            Machine("g2-standard-96", 8, 96),
        ),
        "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64",
        "projects/ubuntu-os-accelerator-images/global/images/family/ubuntu-accelerator-2404-amd64-with-nvidia-570",
    ),
}


def gpu_machine(cloud: Provider, name: str | None) -> Machine:
    """The machine of that name, or the provider's first.

    Raises:
        ConfigError: it is not known here.
    """
    machines = {machine.name: machine for machine in OFFERS[cloud].gpu}
    if name is None:
        return OFFERS[cloud].gpu[0]
    if name not in machines:
        raise ConfigError(
            f"--machine {name}: not known for {cloud}; known: {', '.join(machines)}",
            fix="take one of these, and change its name in the rendered file",
        )
    return machines[name]
