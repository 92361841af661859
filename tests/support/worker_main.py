"""One worker or gateway in a process of its own, as its actor runs it, without Ray.

The first line of standard input tells who it is; each later one is a membership, or "stop SECONDS". It prints its own
`Member` once it serves. Everything binary is hexadecimal.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
from tandem.core.config import Config
from tandem.core.log import configure_logging
from tandem.core.messages import Membership
from tandem.core.wire import ClusterKeys


def main() -> None:
    who = json.loads(sys.stdin.readline())
    config = Config.model_validate(who["config"])
    keys = msgspec.msgpack.decode(bytes.fromhex(who["keys"]), type=ClusterKeys)
    configure_logging(who["peer"], "DEBUG", "text", Path(who["log"]))
    runtime: Any
    if who["role"] == "gateway":
        from tandem.cluster.gateway.runtime import GatewayRuntime

        runtime = GatewayRuntime(who["peer"], config, keys, who["address"], lambda phase: None)
    else:
        from tandem.cluster.worker_runtime import WorkerRuntime

        runtime = WorkerRuntime(who["peer"], who["role"], config, keys, who["address"], who["node"], lambda phase: None)
    print(msgspec.msgpack.encode(runtime.start()).hex(), flush=True)
    grace_s = 0.0
    for line in sys.stdin:
        if line.startswith("stop"):
            grace_s = float(line.split()[1])
            break
        runtime.follow(msgspec.msgpack.decode(bytes.fromhex(line), type=Membership))
    runtime.stop(grace_s)


main()
