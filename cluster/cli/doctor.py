"""`tandem doctor`: what is there, what is missing, how fast KV moves."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from ...core.config import Config, load_config
from ...core.environment import join_local_ray, prepare_local_ray, prepare_ray, ray_address, ray_authenticates
from ...core.errors import ConfigError, TandemError
from ...core.wire import make_cluster_keys
from ..doctor.finding import Finding, Notes, Verdict
from ..gateway.listener import listen
from .progress import Interrupted, Progress, watch_signals

_MIN_TABLE_WIDTH = 160
_STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def doctor(file: Path | None, overrides: list[str], address: str | None, limit_s: float, *, as_json: bool) -> int:
    """Look, and print what was found; returns the exit status: 0, or 1 if a check failed.

    Raises:
        ConfigError: the configuration; nothing was looked at.
    """
    started_s = time.monotonic()
    config = load_config(file, overrides)
    stop = threading.Event()
    watch_signals(stop)
    console = Console(highlight=False, stderr=as_json)
    progress = Progress(console, stop.is_set)
    findings: list[Finding] = []
    try:
        for finding in _examine(config, file is not None or bool(overrides), address, limit_s, progress, stop):
            findings.append(finding)
            if as_json:
                _print_json(msgspec.to_builtins(finding))
    except Interrupted:
        progress.done("interrupted")
    counts = {verdict.value: sum(finding.verdict is verdict for finding in findings) for verdict in Verdict}
    seconds = round(time.monotonic() - started_s, 1)
    failed = counts["fail"] > 0 or stop.is_set()
    if as_json:
        _print_json({"verdict": "fail" if failed else "ok", **counts, "seconds": seconds})
    else:
        progress.done("")
        _print_table(findings)
        told = ", ".join(f"[{_STYLES[Verdict(name)]}]{count} {name}[/]" for name, count in counts.items())
        Console(highlight=False).print(f"\n{told} in {seconds} s")
    return int(failed)


def _examine(
    config: Config, chosen: bool, address: str | None, limit_s: float, progress: Progress, stop: threading.Event
) -> Iterator[Finding]:
    """Find a Ray, or start one; look; leave nothing behind."""
    deadline_s = time.monotonic() + limit_s
    where, own = _find_ray(address)
    if own:
        prepare_local_ray()
    from ..doctor.examination import Examination
    from ..probe_actors import Probes, ray_version, running_tandem
    from ..ray_cluster import LocalRay, connect_ray, disconnect_ray

    notes = Notes("Ray", "here")
    with ExitStack() as cleanup:
        running: dict[str, str] = {}
        try:
            if own:
                progress.show("starting Ray")
                cleanup.callback(LocalRay(config).stop)
                notes.ok("Ray", f"{ray_version()}, a private one for this examination: none runs here")
            else:
                progress.show(f"joining Ray at {where}")
                connect_ray(where)
                cleanup.callback(disconnect_ray)
                notes.ok("Ray", f"{ray_version()} at {where}")
        except (TandemError, OSError, RuntimeError, ValueError) as error:
            fix = error.fix if isinstance(error, TandemError) else "Ray's logs are below /tmp/ray"
            notes.fail("Ray", str(error).splitlines()[0], "a cluster that lets only its own in", fix)
            yield from notes.findings
            yield from _here_alone(config, progress)
            return
        watch_signals(stop)  # Ray has put handlers of its own in place
        found = running_tandem()
        if found is not None:
            config, running = config if chosen else found[0], found[1]
            notes.ok("Tandem", f"{len(running)} processes run here; figures share the machines with them")
        else:
            notes.ok("Tandem", "does not run here")
        notes.ok(
            "authentication", "by token" if ray_authenticates() else "none; the cluster is on the loopback address",
            "by token off the loopback address",
        )  # fmt: skip
        yield from notes.findings
        yield from _look_at_gateway(config, served=bool(running))
        probes = Probes(config, msgspec.msgpack.encode(make_cluster_keys()), progress.check)
        cleanup.callback(probes.close)
        yield from Examination(config, probes, running, deadline_s, progress.show).run()
        progress.show("ending the probes")


def _find_ray(address: str | None) -> tuple[str | None, bool]:
    """The cluster to look at, and whether it must be started first."""
    named = address or ray_address()
    if named:
        prepare_ray()
        return named, False
    note = join_local_ray()
    if note is not None and _answers(note):
        prepare_ray()
        return note, False
    return None, True


def _answers(address: str) -> bool:
    """Whether somebody listens: the note of a `tandem serve` that was killed may still be there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1.0).close()
    except (OSError, ValueError):
        return False
    return True


def _here_alone(config: Config, progress: Progress) -> Iterator[Finding]:
    """What can be seen without Ray: this host."""
    from ..doctor.probe import Probe

    yield from _look_at_gateway(config, served=False)
    progress.show("looking at this host")
    probe = Probe("here", config.model_dump_json(), msgspec.msgpack.encode(make_cluster_keys()), "127.0.0.1")
    yield from msgspec.msgpack.decode(probe.look(0), type=list[Finding])
    notes = Notes("KV links", "cluster")
    notes.warn("pairs", "not measured: there is no Ray to place probes with", "all", "look at the row about Ray")
    yield from notes.findings


def _look_at_gateway(config: Config, *, served: bool) -> list[Finding]:
    notes = Notes("gateway", "here")
    where = f"{config.gateway.host}:{config.gateway.port}"
    try:
        listen(config.gateway.host, config.gateway.port).close()
    except ConfigError as error:
        if served:
            notes.ok("port", f"{where} is in use, as Tandem runs")
        else:
            notes.fail("port", error.message, "free", error.fix)
    else:
        notes.ok("port", f"{where} is free")
    local = config.gateway.host in ("127.0.0.1", "::1", "localhost")
    notes.judge(
        "API keys", local or bool(config.gateway.api_keys),
        f"{len(config.gateway.api_keys)}, {'on' if local else 'off'} the loopback address",
        "some, off the loopback address", "set gateway.api_keys: whoever reaches the port is served",
    )  # fmt: skip
    return notes.findings


def _print_table(findings: list[Finding]) -> None:
    console = Console(highlight=False)
    # A line that the terminal breaks can be read; a table squeezed into it cannot.
    console.width = max(console.width, _MIN_TABLE_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "what", "where", "check", "measured", "expected"):
        table.add_column(name, overflow="fold")
    last = ("", "")
    for finding in findings:
        here = finding.section, finding.where
        shown = ("" if here[0] == last[0] else here[0]), ("" if here == last else here[1])
        last = here
        verdict = f"[{_STYLES[finding.verdict]}]{finding.verdict.value}[/]"
        measured = finding.measured if not finding.fix else f"{finding.measured}\nfix: {finding.fix}"
        table.add_row(verdict, *shown, finding.check, _escaped(measured), _escaped(finding.expected))
    console.print(table)


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def _print_json(record: object) -> None:
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
    sys.stdout.flush()
