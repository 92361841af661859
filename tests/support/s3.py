"""An S3 server in a process of its own, which can be stopped as if the network were gone."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
from typing import Any

SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel("ERROR")
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """Moto's, with one bucket. The environment has keys for it.

    Attributes:
        endpoint: its URL.
        client: to look at what is in it.
    """

    BUCKET = "kv-blocks"

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER, "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        self.client: Any = importlib.import_module("boto3").client("s3", endpoint_url=self.endpoint)
        self.client.create_bucket(Bucket=self.BUCKET)

    def names(self) -> list[str]:
        """Of all objects."""
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.BUCKET).get("Contents", [])]

    def get(self, name: str) -> bytes:
        """An object."""
        return bytes(self.client.get_object(Bucket=self.BUCKET, Key=name)["Body"].read())

    def put(self, name: str, body: bytes) -> None:
        """Write an object."""
        self.client.put_object(Bucket=self.BUCKET, Key=name, Body=body)

    def stop(self) -> None:
        """Let it answer nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it answer again."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        self.go_on()
        self.client.close()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def allow(monkeypatch: Any) -> None:
    """Put keys into the environment that moto takes."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
