"""Starting, failing to start, and stopping: nothing is left behind, and every mistake is one clear line within
seconds."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from support.living import living
from support.patience import slowness, stretched
from support.served import TANDEM, Served, free_port, wait_for
from support.traces import Traces

pytestmark = pytest.mark.e2e


def check_ended(processes: list[psutil.Process], port: int, traces: Traces) -> None:
    """Nothing of a run is left."""
    wait_for(lambda: not living(processes), 5, "all processes to end")
    with socket.create_server(("127.0.0.1", port)):
        pass
    traces.check()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    traces = Traces()
    served = Served(tmp_path)
    try:
        served.wait_ready()
        seconds = time.monotonic() - served.started_s
        text = served.text()
        assert "prefill-0" in text, "progress is visible"
        assert f"curl {served.url}/v1/completions" in text
        assert "def fibonacci(n):" in text
        processes = served.tree()
        assert len(processes) > 5
        if number == signal.SIGTERM:  # what a process manager does: the one process, not the group
            served.process.send_signal(number)
            assert served.process.wait(timeout=stretched(30)) == 0
        else:
            assert served.stop(number) == 0
        check_ended(processes, served.port, traces)
        assert served.text().splitlines()[-1].startswith("stopped")
        print(f"ready after {seconds:.1f} s")
    finally:
        served.kill()


def watches_signals(process: psutil.Process) -> bool:
    """Whether it does something about SIGTERM: before, Python has hardly begun."""
    [caught] = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("after_s", [0.0, 3.0, 5.5])
def test_a_signal_while_it_starts(tmp_path: Path, after_s: float) -> None:
    traces = Traces()
    served = Served(tmp_path)
    try:
        wait_for(lambda: watches_signals(psutil.Process(served.process.pid)), 10, "its first lines")
        time.sleep(after_s)
        processes = served.tree()
        assert served.stop(signal.SIGINT) == 0, served.text()
        check_ended(processes, served.port, traces)
    finally:
        served.kill()


def test_a_killed_serve_takes_its_processes_with_it(tmp_path: Path) -> None:
    """The keeper of the node's memory and that memory included."""
    traces = Traces()
    served = Served(tmp_path, "--set", "offload.tiers=[{kind: host, capacity: 64MiB}]")
    try:
        served.wait_ready()
        processes = served.tree()
        assert any("tandem.kv_transfer.offload.keeper" in command_of(process) for process in processes)
        served.process.kill()
        served.process.wait(timeout=stretched(10))
        wait_for(lambda: not living(processes), 30, "orphans to end")
        traces.check(30)
    finally:
        served.kill()


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def fail(*arguments: str, file: Path | None = None) -> str:
    """Run `tandem serve`, which must fail within seconds; returns its one complaint."""
    start_s = time.monotonic()
    command = [TANDEM, "serve", *([str(file)] if file else []), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=stretched(60))
    assert done.returncode != 0
    assert time.monotonic() - start_s < stretched(10)
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("tandem: ")
    assert len(done.stderr.splitlines()) <= 3
    return done.stderr


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = fail("--set", f"gateway.port={port}")
    assert f"cannot listen on 127.0.0.1:{port}" in text
    assert f"fix: stop what uses it, or choose another with --set gateway.port={port + 1}" in text


def test_what_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in fail(file=Path("/nowhere.yaml"))
    assert "model.path: /nowhere: the folder does not exist" in fail("--set", "model.path=/nowhere")
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    text = fail("--set", f"model.path={tmp_path}")
    assert "architecture GPT2LMHeadModel is not supported" in text
    assert "LlamaForCausalLM" in text


def test_a_bad_key(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("kv:\n  block_token: 3\n")
    assert f"{file}:2: unknown key kv.block_token; did you mean kv.block_tokens?" in fail(file=file)


def test_what_only_a_worker_can_know(tmp_path: Path) -> None:
    """The cause reaches the user from the process that found it, and everything is stopped again."""
    import shutil

    from tandem.core.checkpoint import model_folder
    from tandem.core.config import load_config

    traces = Traces()
    folder = tmp_path / "model"
    shutil.copytree(model_folder(load_config()), folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    port = free_port()
    command = [TANDEM, "serve", "--set", f"model.path={folder}", "--set", f"gateway.port={port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=stretched(60))
    assert done.returncode == 1
    assert "model.safetensors: not a readable safetensors file" in done.stderr
    assert "Traceback" not in done.stderr
    command[3:4] = [f"model.path={model_folder(load_config())}", "--set", "kv.capacity=1KiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=stretched(60))
    assert done.returncode == 1
    assert "kv.capacity" in done.stderr
    assert "fix: raise kv.capacity or lower model.max_model_len" in done.stderr
    check_ended([], port, traces)


def test_a_fall_back_to_tcp_ends_the_start_where_rdma_is_required(tmp_path: Path) -> None:
    traces = Traces()
    file, port = tmp_path / "my.yaml", free_port()
    file.write_text(f"kv: {{transport: zmq, require_rdma: true}}\ngateway: {{port: {port}}}\n")
    start_s = time.monotonic()
    done = subprocess.run([TANDEM, "serve", str(file)], capture_output=True, text=True, timeout=stretched(90))
    assert done.returncode == 1, done.stdout
    assert time.monotonic() - start_s < stretched(60)
    assert "Traceback" not in done.stderr
    assert "decode-0#1 cannot read KV from prefill-0#1: kv.transport zmq: nothing works" in done.stderr
    assert "zmq: it would move KV by plain TCP, which kv.require_rdma rules out" in done.stderr
    assert "fix: give both hosts an active RDMA port" in done.stderr
    check_ended([], port, traces)


def test_shared_memory_is_fine_where_rdma_is_required(tmp_path: Path) -> None:
    served = Served(tmp_path, "--set", "kv.require_rdma=true", "--set", "routing.local_prefill=never")
    try:
        served.wait_ready()
        served.wait_routable()
        served.complete(prompt=list(range(5, 400)), max_tokens=2)
        assert served.metric("tandem_transfer_bytes_total", transport="shm") > 0
        assert served.stop() == 0
    finally:
        served.kill()


def test_the_command_line_teaches() -> None:
    for arguments in (
        [],
        ["serve"],
        ["up"],
        ["down"],
        ["status"],
        ["doctor"],
        ["config"],
        ["config", "check"],
        ["bench", "serve"],
    ):
        done = subprocess.run([TANDEM, *arguments, "--help"], capture_output=True, text=True, timeout=stretched(30))
        assert done.returncode == 0
        assert len(done.stdout) > 200
    assert subprocess.run([TANDEM, "--version"], capture_output=True, text=True).stdout.startswith("tandem ")


def test_config_commands(tmp_path: Path) -> None:
    import json

    schema = subprocess.run([TANDEM, "config", "schema"], capture_output=True, text=True, check=True).stdout
    assert json.loads(schema)["title"] == "Config"
    file = tmp_path / "my.yaml"
    file.write_text("kv: {block_tokens: 32}\n")
    checked = subprocess.run([TANDEM, "config", "check", str(file)], capture_output=True, text=True, check=True).stdout
    assert "good; Qwen3MoeForCausalLM, 6 layers, sequences of up to 4096 tokens" in checked
    shown = subprocess.run([TANDEM, "config", "show", str(file)], capture_output=True, text=True, check=True).stdout
    assert "block_tokens: 32" in shown
    file.write_text("kv: {block_tokens: x}\n")
    failed = subprocess.run([TANDEM, "config", "check", str(file)], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "kv.block_tokens" in failed.stderr


def test_status_without_a_cluster() -> None:
    done = subprocess.run(
        [TANDEM, "status", "--address", f"127.0.0.1:{free_port()}"],
        capture_output=True,
        text=True,
        timeout=stretched(120),
    )
    assert done.returncode == 1
    assert "no Ray cluster at" in done.stderr


def test_status_finds_the_serve_of_this_user(served: Served) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(served.home)}
    done = subprocess.run(
        [TANDEM, "status", "--json"], capture_output=True, text=True, timeout=stretched(60), env=environment, check=True
    )
    workers = [json.loads(line) for line in done.stdout.splitlines()]
    assert {worker["worker"] for worker in workers} == {"prefill-0", "decode-0", "gateway-0"}
    note = served.home / "tandem" / "local-ray.json"
    assert note.stat().st_mode & 0o777 == 0o600, "it holds a token"


def test_idle_costs_next_to_nothing(served: Served) -> None:
    """All of Tandem's processes together, Ray's own left out: under 3 % of a core."""
    served.wait_idle()
    time.sleep(3)
    names = ("prefill-0", "decode-0", "gateway-0", "controller", "keeper", "supervisor-0")
    processes = [psutil.Process(served.process.pid)]
    for process in served.tree():
        files = " ".join(file.path for file in process.open_files())
        if any(f"/{name}" in files and ".log" in files for name in names) and "/tandem/logs/" in files:
            processes.append(process)
    assert len(processes) == 7

    def seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    shares = []
    while len(shares) < 3 and min(shares, default=1.0) >= 0.03:  # the same work takes longer beside others'
        before, start_s = seconds(), time.monotonic()
        time.sleep(10)
        shares.append((seconds() - before) / (time.monotonic() - start_s) / slowness())
    print("idle:", *(f"{share:.2%}" for share in shares), "of a core")
    assert min(shares) < 0.03


def test_logs_name_the_request_in_every_line_about_it(served: Served) -> None:
    request_id = served.complete(prompt=list(range(5, 1200)), max_tokens=3)["id"]
    time.sleep(0.3)
    lines = [line for line in served.logs().splitlines() if "prompt of 1195 tokens" in line]
    assert lines
    assert all(request_id in line for line in lines)
