"""`tandem drain`, `restart`, `scale` and `watch`: the operators' API from the command line."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from ..control.client import ControlClient
from ..control.credentials import Credentials


def drain(worker: str, grace_s: float, file: Path | None, *, restart: bool, finish: bool) -> None:
    """Take a worker out, and return when it has ended, or is back."""
    with ControlClient(credentials_of(file)) as client:
        client.drain(worker, grace_s, restart=restart, finish=finish)
    Console(highlight=False).print(f"{worker} is {'ready again' if restart else 'drained'}", markup=False)


def restart(pool: str, grace_s: float, file: Path | None) -> None:
    """Begin another life of every worker of a pool, or of all, one after the other, and tell of each."""
    console = Console(highlight=False)
    with ControlClient(credentials_of(file)) as client:
        for worker in client.restart(pool, grace_s):
            console.print(f"{worker} is ready again", markup=False)


def scale(pool: str, replicas: int, file: Path | None) -> None:
    """Have so many workers in a pool, and tell which start and which leave."""
    with ControlClient(credentials_of(file)) as client:
        started, drained = client.scale(pool, replicas)
    console = Console(highlight=False)
    for verb, workers in (("starting", started), ("draining", drained)):
        if workers:
            console.print(f"{verb} {', '.join(workers)}", markup=False)
    if not started and not drained:
        console.print(f"the {pool} pool has {replicas} already", markup=False)


def watch(file: Path | None) -> None:
    """Print what has happened and what happens, until Ctrl-C or the cluster's end."""
    console = Console(highlight=False, soft_wrap=True)
    with ControlClient(credentials_of(file)) as client:
        try:
            for event in client.watch():
                at = time.strftime("%H:%M:%S", time.localtime(event.at_s))
                console.print(f"{at} {event.text}", markup=False)
        except KeyboardInterrupt:
            return


def credentials_of(file: Path | None) -> Credentials:
    """Of the cluster that a control.json tells of, or of this user's newest."""
    return Credentials.find() if file is None else Credentials.read(file)
