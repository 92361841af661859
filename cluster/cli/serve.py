"""`tandem serve`: everything on this machine, in the foreground."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from rich.console import Console

from ...core.checkpoint import model_folder, model_name, pinned
from ...core.config import DEMO_MODEL, Config, load_config
from ...core.environment import prepare_local_ray
from ...core.errors import TandemError, WorkerError
from ..gateway.listener import gateway_url, listen
from ..tls import tls_context
from .progress import Interrupted, Progress, show_launch, watch_signals

if TYPE_CHECKING:
    from ..tandem_cluster import Cluster

SAMPLE_PROMPT = 'def fibonacci(n):\n    """Return the first n Fibonacci numbers."""\n'
_SAMPLE_TOKENS = 48
_GRACE_S = 5.0
_READY_TIMEOUT_S = 30.0


def serve(file: Path | None, overrides: list[str]) -> None:
    """Start, show, stay; return after a signal. Raises ConfigError before anything was started."""
    console = Console(highlight=False)
    stop = threading.Event()
    watch_signals(stop)
    config = pinned(load_config(file, overrides))
    _check(config)
    _run(config, console, stop)


def _check(config: Config) -> None:
    """What can be known to fail, fails within seconds."""
    # Imported here: it may bring torch, and Ctrl-C is for us while that takes its time.
    from ...engine.models.spec import context_length, read_spec

    context_length(read_spec(model_folder(config)), config.model.max_model_len)
    tls_context(config.gateway.tls_cert, config.gateway.tls_key, "gateway")
    listen(config.gateway.host, config.gateway.port).close()


def _run(config: Config, console: Console, stop: threading.Event) -> None:
    started_s = time.monotonic()
    progress = Progress(console, stop.is_set)
    prepare_local_ray()
    from ..ray_cluster import LocalRay
    from ..tandem_cluster import Cluster, default_log_folder

    ray: LocalRay | None = None
    cluster: Cluster | None = None
    failures: list[TandemError] = []
    try:
        progress.show("starting Ray")
        ray = LocalRay(config)
        watch_signals(stop)  # Ray has put a handler of its own in place
        log_folder = default_log_folder() / time.strftime("%Y%m%d-%H%M%S")
        cluster = Cluster.launch(config, log_folder)
        show_launch(cluster, progress)
        with _client(config) as client:
            _wait_ready(client, progress)
            progress.done(f"ready in {time.monotonic() - started_s:.1f} s")
            _show_sample(client, config, console, progress)
        _show_url(config, console, log_folder)
        threading.Thread(target=_show_news, args=(cluster, console, stop, failures), daemon=True).start()
        stop.wait()
    except Interrupted:
        pass
    finally:
        progress.done("stopping")
        if cluster is not None:
            cluster.stop(_GRACE_S)
        if ray is not None:
            ray.stop()
    console.print("stopped: no process, port or shared memory is left")
    if failures:
        raise failures[0]


def _client(config: Config) -> httpx.Client:
    headers = {"Authorization": f"Bearer {config.gateway.api_keys[0]}"} if config.gateway.api_keys else {}
    # Our own server: what its certificate names is for others to check.
    return httpx.Client(base_url=_url(config), headers=headers, timeout=60, trust_env=False, verify=False)


def _url(config: Config) -> str:
    return gateway_url(config)


def _wait_ready(client: httpx.Client, progress: Progress) -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while True:
        answer = client.get("/readyz")
        if answer.status_code == 200:
            return
        reason = answer.json()["status"]
        progress.show(reason)
        if time.monotonic() > deadline_s:
            raise WorkerError(f"the workers are up, but after {_READY_TIMEOUT_S:g} s: {reason}")
        time.sleep(0.05)


def _show_sample(client: httpx.Client, config: Config, console: Console, progress: Progress) -> None:
    """Stream one completion to the terminal."""
    body = {"model": model_name(config), "prompt": SAMPLE_PROMPT, "max_tokens": _SAMPLE_TOKENS, "temperature": 0}
    console.print("\n[bold]a sample[/bold], prefilled on one worker and decoded on another:\n")
    console.out(SAMPLE_PROMPT, style="dim", end="")
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        if response.status_code != 200:
            console.print(f"[yellow]no sample: {response.read().decode()}[/yellow]")
            return
        for line in response.iter_lines():
            progress.check()
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    console.print(f"[yellow]{event['error']['message']}[/yellow]")
                    return
                sys.stdout.write("".join(choice["text"] for choice in event["choices"]))
                sys.stdout.flush()
    console.print()


def _show_url(config: Config, console: Console, log_folder: Path) -> None:
    key = " -H 'authorization: Bearer …'" if config.gateway.api_keys else ""
    prompt = "import os\\n\\ndef walk(" if config.model.path == DEMO_MODEL else "Hello"
    console.print(f"\n[bold green]serving {model_name(config)} at {_url(config)}/v1[/bold green]")
    console.print("try:", style="bold")
    console.out(
        f"  curl {_url(config)}/v1/completions{key} -H 'content-type: application/json' \\\n"
        f'    -d \'{{"prompt": "{prompt}", "max_tokens": 64, "temperature": 0.2}}\''
    )
    console.print(f"logs: {log_folder}   metrics: {_url(config)}/metrics   stop: Ctrl-C", style="dim")


def _show_news(cluster: Cluster, console: Console, stop: threading.Event, failures: list[TandemError]) -> None:
    """Print what happens in the cluster, until it ends; if that was not asked for, it is one of the ``failures``."""
    last = 0
    while not stop.is_set():
        try:
            events = cluster.events(last, timeout_s=60.0)
        except TandemError as error:
            if not stop.is_set():
                failures.append(error)
                stop.set()
            return
        for event in events:
            last = event.number
            console.print(f"{time.strftime('%H:%M:%S', time.localtime(event.at_s))} {event.text}", style="yellow")
