"""A second network on this machine: a namespace behind a pair of virtual interfaces, whose link can be cut. Needs root."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess

import pytest


class Network:
    """This host at `near`, and a namespace at `far`. What runs with `prefix` runs in it."""

    def __init__(self) -> None:
        self._name = f"td{secrets.token_hex(3)}"
        third = secrets.randbelow(200) + 20
        self.near, self.far = f"10.213.{third}.1", f"10.213.{third}.2"
        self.prefix = ["ip", "netns", "exec", self._name]
        self.path = f"/run/netns/{self._name}"
        if os.geteuid() != 0 or shutil.which("ip") is None:
            pytest.skip("network namespaces need root and iproute2")
        try:
            self._run("ip", "netns", "add", self._name)
            self._run(
                "ip", "link", "add", f"{self._name}a", "type", "veth", "peer", f"{self._name}b", "netns", self._name
            )
        except subprocess.CalledProcessError as error:
            self.close()
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        self._run("ip", "addr", "add", f"{self.near}/24", "dev", f"{self._name}a")
        self._run("ip", "link", "set", f"{self._name}a", "up")
        for command in (
            ["ip", "addr", "add", f"{self.far}/24", "dev", f"{self._name}b"],
            ["ip", "link", "set", f"{self._name}b", "up"],
            ["ip", "link", "set", "lo", "up"],
        ):
            self._run(*self.prefix, *command)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Every packet is lost from now on."""
        self._run(*self.prefix, "ip", "link", "set", f"{self._name}b", "down")

    def restore(self) -> None:
        """The link is back."""
        self._run(*self.prefix, "ip", "link", "set", f"{self._name}b", "up")

    def close(self) -> None:
        """Remove both; what still runs in the namespace loses its network."""
        subprocess.run(["ip", "link", "del", f"{self._name}a"], capture_output=True)
        subprocess.run(["ip", "netns", "del", self._name], capture_output=True)

    @staticmethod
    def _run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)
