"""`tandem deploy render`: files that start a cluster, from the one YAML."""

from __future__ import annotations

import enum
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
import yaml

from ... import __version__
from ...core.errors import ConfigError
from ...deploy.machines import Provider

if TYPE_CHECKING:
    from ...deploy.kuberay import KubeOptions
    from ...deploy.ray_up import Site

deploy_app = typer.Typer(no_args_is_help=True, help="Files that start a cluster, from the one YAML.")


@deploy_app.callback()
def _deploy() -> None:
    pass  # with one command alone, typer would leave its name out


class Target(enum.StrEnum):
    """What starts the cluster."""

    RAY = "ray"
    KUBERAY = "kuberay"


@deploy_app.command()
def render(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file.")],
    target: Annotated[Target, typer.Option(help="ray: for `ray up`. kuberay: for Kubernetes.")],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write.")],
    provider: Annotated[Provider, typer.Option(help="For ray: whose machines.")] = Provider.ONPREM,
    name: Annotated[str, typer.Option(help="The cluster's.")] = "tandem",
    gpus_per_node: Annotated[int, typer.Option(min=1, max=64, help="kuberay, onprem: GPUs of one machine.")] = 8,
    image: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="kuberay: made from deploy/image/Dockerfile. Default: tandem:VERSION."),
    ] = None,
    model_claim: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="CLAIM",
            help="kuberay: the volume claim with the checkpoint, or for the Hub's.",
        ),
    ] = None,
    worker_memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIZE", help="kuberay: limit of a worker pod. Default: an estimate."),
    ] = None,
    head: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HOST", help="onprem: the first node, for Ray's head and the gateway."),
    ] = None,
    worker: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="HOST", help="onprem: another node. Repeatable."),
    ] = None,
    machine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TYPE", help="aws, gcp: nodes with GPUs. Default: p5.48xlarge, a3-highgpu-8g."),
    ] = None,
    region: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="aws, gcp. Default: us-west-2, us-central1."),
    ] = None,
    zone: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="aws, gcp. Default: Ray's choice, the region's a."),
    ] = None,
    project: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="ID", help="gcp: needed."),
    ] = None,
    ssh_user: Annotated[str, typer.Option(help="ray: on all nodes.")] = "ubuntu",
    ssh_key: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="ray: a private key."),
    ] = None,
    source: Annotated[
        Path, typer.Option(metavar="FOLDER", help="ray: the clone of Tandem that nodes install. Default: this one.")
    ] = Path(__file__).resolve().parents[2],
) -> None:
    """Write the files that start a cluster for a configuration: its nodes, and what they need.

    The nodes are as many as the pools' workers fill. No secret is written: neither Ray's token nor the YAML, which may
    hold API keys. docs/deploy.md goes from nothing to a served model.
    """
    from ...core.units import parse_bytes
    from ...deploy.kuberay import KubeOptions
    from ...deploy.ray_up import Site

    if target is Target.RAY:
        site = Site(
            provider, name, file, source, head, tuple(worker or ()), gpus_per_node, machine, region, zone, project,
            ssh_user, ssh_key,
        )  # fmt: skip
        _render_ray(site, output)
        return
    try:
        memory_bytes = None if worker_memory is None else parse_bytes(worker_memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--worker-memory") from None
    options = KubeOptions(name, image or f"tandem:{__version__}", gpus_per_node, model_claim, memory_bytes)
    _render_kube(file, options, output)


def _render_ray(site: Site, output: Path) -> None:
    """Write cluster.yaml for `ray up`, and say what comes next.

    Raises:
        ConfigError: see `render_ray_cluster`; or the folder cannot be written.
    """
    from ...core.config import load_config
    from ...deploy.ray_up import render_ray_cluster

    _write(output, site.file, {"cluster.yaml": [render_ray_cluster(load_config(site.file), site)]})
    launch = shlex.quote(str(output / "cluster.yaml"))
    _tell(
        output,
        ["cluster.yaml"],
        [
            "ray get-auth-token --generate   (once: into ~/.ray/auth_token, for you and for every node)",
            f"RAY_AUTH_MODE=token ray up -y {launch}",
            f"ray exec {launch} 'RAY_AUTH_MODE=token ~/tandem-venv/bin/tandem up ~/tandem.yaml'",
        ],
    )


def _render_kube(file: Path, options: KubeOptions, output: Path) -> None:
    """Write the manifests for `kubectl apply`, and say what comes next.

    Raises:
        ConfigError: see `render_kuberay`; or the folder cannot be written.
    """
    from ...core.config import load_config
    from ...deploy.kuberay import render_kuberay

    manifests = render_kuberay(load_config(file), options)
    _write(output, file, manifests)
    name = options.name
    _tell(
        output,
        manifests,
        [
            f"openssl rand -hex 32 | tr -d '\\n' | kubectl create secret generic {name}-ray-token"
            " --from-file=auth_token=/dev/stdin",
            f"kubectl create secret generic {name}-config --from-file=tandem.yaml={shlex.quote(str(file))}",
            f"kubectl apply -f {shlex.quote(str(output))}",
        ],
    )


def _write(folder: Path, source: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, documents in files.items():
            head = f"# Rendered from {source.name} by `tandem deploy render`: change that, and render again.\n"
            text = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
            (folder / name).write_text(head + text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written: {error.strerror}") from None


class _Dumper(yaml.SafeDumper):
    """Writes a tree that occurs twice twice: an anchor is hard to read."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True


def _tell(folder: Path, names: Sequence[str] | Mapping[str, Any], steps: Sequence[str]) -> None:
    sys.stdout.write(f"written: {folder}/" + ", ".join(names) + "\nnext:\n" + "".join(f"  {step}\n" for step in steps))
