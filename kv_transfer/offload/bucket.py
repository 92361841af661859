"""A bucket of an S3-compatible store, through boto3 (`pip install tandem[s3]`)."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ...core.errors import ConfigError

_T = TypeVar("_T")


class Entry(NamedTuple):
    """An object in a listing."""

    name: str
    num_bytes: int


class Bucket:
    """Every method blocks, for a request or, where it is a long list, several; boto3's clients are thread-safe.

    Args:
        bucket: its name; it exists.
        endpoint: URL of the store; None: Amazon's.
        timeout_s: of a request.
        connections: requests at a time.

    Raises:
        ConfigError: boto3 is not installed, or there is nothing that tells it a region.
    """

    def __init__(self, bucket: str, endpoint: str | None, timeout_s: float, connections: int) -> None:
        try:
            boto3 = importlib.import_module("boto3")
            config = importlib.import_module("botocore.config")
            self._failures: Any = importlib.import_module("botocore.exceptions")
        except ImportError:
            raise ConfigError("kind: s3 needs boto3", fix="pip install 'tandem[s3]'") from None
        settings = config.Config(
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            retries={"total_max_attempts": 1},
            max_pool_connections=connections,
        )
        try:
            self._client: Any = boto3.client("s3", endpoint_url=endpoint, config=settings)
        except (self._failures.BotoCoreError, ValueError) as error:
            raise ConfigError(f"endpoint: {error}") from None
        self.name = bucket

    def get(self, name: str) -> bytes | None:
        """An object; None: there is none.

        Raises:
            OSError: the store cannot be reached, or refuses; so do the other methods.
        """
        return self._try(lambda: self._client.get_object(Bucket=self.name, Key=name)["Body"].read())

    def put(self, name: str, body: bytes) -> None:
        """Write an object."""
        self._try(lambda: self._client.put_object(Bucket=self.name, Key=name, Body=body))

    def delete(self, name: str) -> None:
        """Let there be no such object."""
        self._try(lambda: self._client.delete_object(Bucket=self.name, Key=name))

    def list(self, prefix: str) -> list[Entry]:
        """All objects whose names begin with this."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        found = self._try(lambda: [object_ for page in pages for object_ in page.get("Contents", ())])
        return [Entry(object_["Key"], object_["Size"]) for object_ in found or ()]

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _try(self, request: Callable[[], _T]) -> _T | None:
        try:
            return request()
        except self._failures.ClientError as error:
            if error.response.get("Error", {}).get("Code", "") == "NoSuchKey":
                return None
            raise OSError(errno.EIO, str(error)) from None
        except (self._failures.BotoCoreError, self._failures.HTTPClientError) as error:
            raise OSError(errno.EIO, str(error)) from None
