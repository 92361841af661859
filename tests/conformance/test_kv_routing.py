"""Real workers tell a real gateway what they hold, and prompts that come again go there."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from support.gateway import wait_for
from support.processes import Processes
from tandem.cluster.cli.app import app
from tandem.cluster.cli.kv import post
from tandem.kv_transfer.offload.trace import read_trace
from typer.testing import CliRunner


def test_a_long_prompt_that_comes_again_goes_to_the_worker_that_holds_it(tmp_path: Path) -> None:
    config = {"model": {"max_model_len": 1024}, "pools": {"colocated": {}}, "routing": {"policy": "kv_aware"}}
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 4000, 100).tolist() for _ in range(4)]
    with Processes(tmp_path, config, {f"colocated-{n}": {} for n in range(2)}) as cluster:
        cluster.serve()

        def ask(prompt: list[int], pause_s: float = 0.0) -> int:
            # Reports of load come once a second; a worker that seems busy still is passed over for so short a prompt.
            time.sleep(pause_s)
            answer = cluster.complete(prompt=prompt, max_tokens=1, temperature=0)
            return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

        for prompt in prompts:
            assert ask(prompt) == 0
        # Both have computed some, and each is asked for its own again.
        spread = [cluster.metric("tandem_prompt_tokens_total", worker=f"colocated-{n}") for n in range(2)]
        assert all(spread)
        for prompt in prompts:
            wait_for(lambda prompt=prompt: ask(prompt) == 96, 10, "its KV to be known")
        for prompt in prompts[::-1]:
            assert ask(prompt, 1.5) == 96
        # Operators clear, by the command line: another tenant's first, which changes nothing, then all.
        arguments = ["--url", cluster.url]
        trace = tmp_path / "trace.jsonl"
        commands = [["kv", "clear", "--tenant", "another"], ["kv", "pin", "--prompt", "x = " * 40]]
        for command in (*commands, ["trace", "record", "--output", str(trace), "--duration-s", "0.1"]):
            result = CliRunner().invoke(app, [*command, *arguments])
            assert result.exit_code == 0, (result.output, result.exception)
        assert ask(prompts[0], 1.5) == 96
        result = CliRunner().invoke(app, ["kv", "clear", *arguments])
        cleared = [int(line.split()[1]) for line in result.output.splitlines()]
        assert sum(cleared) >= 4 * 6
        assert [ask(prompt) for prompt in prompts] == [0] * 4
        # A trace says what was served: the same prompt twice.
        post(cluster.url, "/admin/trace/start", {}, "")
        for _ in range(2):
            ask(prompts[0])
        trace.write_bytes(post(cluster.url, "/admin/trace/stop", {}, "").content)
        assert [(r.input_length, r.output_length, r.hash_ids) for r in read_trace(trace).requests] == [
            (100, 1, (0,))
        ] * 2
