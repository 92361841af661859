"""Transports by name, the fastest first. One suite holds for all: `tests/conformance`."""

from .base import Read, Region, TransferResult, Transport

PREFERENCE = ("inproc", "cuda_ipc", "shm", "nixl", "ucx", "zmq")
"""The order in which `auto` tries what both ends offer."""

__all__ = ["PREFERENCE", "Read", "Region", "TransferResult", "Transport"]
