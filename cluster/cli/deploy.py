"""`tandem deploy render`: files that start a cluster, from the one YAML."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...core.config import load_config
from ...core.errors import ConfigError
from ...deploy.kuberay import KubeOptions, render_kuberay
from ...deploy.ray_up import Site, render_ray_cluster


def render_ray(site: Site, output: Path) -> None:
    """Write cluster.yaml for `ray up`, and say what comes next.

    Raises:
        ConfigError: see `render_ray_cluster`; or the folder cannot be written.
    """
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


def render_kube(file: Path, options: KubeOptions, output: Path) -> None:
    """Write the manifests for `kubectl apply`, and say what comes next.

    Raises:
        ConfigError: see `render_kuberay`; or the folder cannot be written.
    """
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
