"""`python -m tandem.bench.goodput`: a prefill and a decode worker against two colocated ones, on as many GPUs.

Requests arrive by a Poisson process whose schedule is fixed before, at one rate after another without a pause: nothing
waits for answers. What arrives in the last two thirds of a rate's window is judged, when those before have filled the
batch. Times count from when a request was to be sent. A request is good when its first token came within `--ttft-s`,
and the mean time between its tokens, up to the end of its window, was within `--itl-ms`; "strict": 99 of 100 of those
times were. The goodput is the highest rate at which nine of ten are. Routed as a gateway routes, by `Router`.

The engines of an arrangement are started once. Prints JSON lines, and then a table.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..cluster.router import Placement, Router
from ..core.config import Config
from ..core.errors import ConfigError, WorkerError
from ..core.ids import PeerId
from ..core.messages import Abort, Child, Generate, Message, Refused, Report, Sampling, Stopping, Subscribe, Update
from .kernels import MODELS
from .kv_copies import percentiles
from .machine import describe
from .worker_process import Workers

ARRANGEMENTS = {"separate": ["prefill-0#1", "decode-0#1"], "colocated": ["colocated-0#1", "colocated-1#1"]}
GOOD_SHARE = 0.9
_JUDGED_SHARE = 2 / 3
_HOPELESS_SHARE = 0.3
"""At fewer good ones, by the loosest limits, higher rates are left out."""
_START_S = 240.0
_SETTLE_S = 10.0
_VOCABULARY = 256


class Workload(NamedTuple):
    """Prompts and outputs of fixed lengths, at rising rates."""

    input_tokens: int
    output_tokens: int
    rates: tuple[float, ...]
    """Requests a second."""
    window_s: float
    """For each rate."""

    @classmethod
    def parse(cls, text: str) -> Workload:
        """ "2000/1000:4,7,10:16": tokens, rates, seconds for each.

        Raises:
            argparse.ArgumentTypeError: it is none.
        """
        try:
            tokens, rates, window = text.split(":")
            inputs, outputs = map(int, tokens.split("/"))
            return cls(inputs, outputs, tuple(float(rate) for rate in rates.split(",")), float(window))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: write it like 2000/1000:4,7,10:16") from None

    @property
    def name(self) -> str:
        """As people write it."""
        return f"{self.input_tokens}/{self.output_tokens}"


class Tracked:
    """A request on its way."""

    def __init__(self, due_s: float, placement: Placement, input_tokens: int) -> None:
        self.due_s = due_s
        self.placement = placement
        self.prompt_left = placement.num_left or input_tokens
        self.token_times_s: list[float] = []
        self.transferred_bytes = 0
        self.error = ""
        self.ended = False

    def ttft_s(self, now_s: float) -> float:
        """Until the first token; what it is at least, while there is none."""
        return (self.token_times_s[0] if self.token_times_s else now_s) - self.due_s

    def gaps_s(self, until_s: float) -> list[float]:
        """Times between tokens up to some moment; between those there are, if that saw none."""
        times = [at_s for at_s in self.token_times_s if at_s <= until_s]
        found: list[float] = np.diff(times if len(times) > 1 else self.token_times_s).tolist()
        return found


class Gateway:
    """Requests of one arrangement. Owned by one thread."""

    def __init__(self, arrangement: str, config: Config, gpus: Sequence[int]) -> None:
        self._inbox: queue.SimpleQueue[tuple[float, PeerId, Message]] = queue.SimpleQueue()
        peers = ARRANGEMENTS[arrangement]
        self._workers = Workers(peers, config, gpus, lambda *news: self._inbox.put((time.monotonic(), *news)))
        self._router = Router("least_loaded")
        self._router.follow(self._workers.membership)
        for peer in peers:
            self._workers.mesh.send(peer, Subscribe())
        self._reports: dict[PeerId, Report] = {}
        self._tracked: dict[int, Tracked] = {}
        self._ticket = 0
        self.num_tokens = 0
        """That have come."""
        end_s = time.monotonic() + _START_S
        while not self._router.routable(arrangement == "separate"):
            self.turn(time.monotonic() + 0.1)
            if time.monotonic() > end_s:
                raise WorkerError("decode does not read from prefill", fix="what the workers say stands above")

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._tracked)

    @property
    def num_busy(self) -> int:
        """What workers have left to do, by their last reports."""
        return sum(report.running + report.waiting for report in self._reports.values())

    def send(self, due_s: float, tokens: list[int], output_tokens: int) -> Tracked:
        """Send a request."""
        placement = self._router.place(tokens)
        assert placement is not None, "workers were there"
        tracked = Tracked(due_s, placement, len(tokens))
        self._ticket += 1
        self._tracked[self._ticket] = tracked
        self._router.sent(placement, 1, tracked.prompt_left)
        request = Generate(
            self._ticket, f"r{self._ticket}", tokens, len(tokens), [Child(0, self._ticket)], Sampling(),
            Stopping(output_tokens), prefill=placement.prefill,
        )  # fmt: skip
        self._workers.mesh.send(placement.decode, request)
        return tracked

    def turn(self, until_s: float) -> None:
        """Take in what comes until then."""
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                self._take(*self._inbox.get(timeout=min(left_s, 1.0)))
            except queue.Empty:
                self._workers.check()

    def abort_all(self) -> None:
        """Give up on all that is open, and wait until the workers are idle."""
        for ticket, tracked in list(self._tracked.items()):
            self._workers.mesh.send(tracked.placement.decode, Abort([ticket]))
            self._end(ticket)
        end_s = time.monotonic() + _SETTLE_S
        self.turn(time.monotonic() + 1.2)  # reports come once a second
        while self.num_busy and time.monotonic() < end_s:
            self.turn(time.monotonic() + 0.2)

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    def _take(self, at_s: float, sender: PeerId, message: Message) -> None:
        match message:
            case Report():
                self._reports[sender] = message
                self._router.report(sender, message)
            case Refused():
                if message.ticket in self._tracked:
                    self._tracked[message.ticket].error = message.message
                    self._end(message.ticket)
            case Update():
                for usage in message.usages:
                    if usage.ticket in self._tracked:
                        self._tracked[usage.ticket].transferred_bytes = usage.transferred_bytes
                for child in message.children:
                    tracked = self._tracked.get(child.ticket)
                    if tracked is None:
                        continue
                    if tracked.prompt_left:
                        self._router.prompt_done(tracked.placement, tracked.prompt_left)
                        tracked.prompt_left = 0
                    self.num_tokens += len(child.tokens)
                    tracked.token_times_s += [at_s] * len(child.tokens)
                    if child.finish is not None:
                        self._end(child.ticket)

    def _end(self, ticket: int) -> None:
        tracked = self._tracked.pop(ticket)
        tracked.ended = True
        if tracked.prompt_left:
            self._router.prompt_done(tracked.placement, tracked.prompt_left)
        self._router.done(tracked.placement, 1)


def make_config(folder: Path, arrangement: str, gpus: bool, longest: int, options: argparse.Namespace) -> Config:
    """Of two workers."""
    pool = {"gpus_per_replica": int(gpus)}
    decode = pool | {"max_running": options.max_running}
    pools: dict[str, Any] = {"colocated": decode | {"max_batched_tokens": options.colocated_tokens, "replicas": 2}}
    if arrangement == "separate":
        pools = {"prefill": pool | {"max_batched_tokens": options.prefill_tokens}, "decode": decode}
    return Config.model_validate(
        {
            "model": {"path": str(folder), "max_model_len": longest} | ({"load": "dummy"} if gpus else {}),
            "pools": pools,
            "kv": {"prefix_cache": False, "layer_groups": options.layer_groups},
            "routing": {"local_prefill": "never"},
        }
    )


def arrivals(workload: Workload, seed: int) -> list[list[float]]:
    """For each rate, seconds from the beginning of its window."""
    rng = random.Random(f"{seed} {workload.name}")
    found = []
    for rate in workload.rates:
        times, at_s = [], rng.expovariate(rate)
        while at_s < workload.window_s:
            times.append(at_s)
            at_s += rng.expovariate(rate)
        found.append(times)
    return found


def warm_up(gateway: Gateway, workloads: Sequence[Workload], rng: np.random.Generator) -> None:
    """Prompts of all lengths, several at once: what the first ones compile, later ones find."""
    for count in (2, 8):
        for workload in workloads:
            for _ in range(count):
                gateway.send(time.monotonic(), _prompt(workload, rng), 8)
        end_s = time.monotonic() + _START_S
        while gateway.num_open:
            gateway.turn(time.monotonic() + 0.01)
            if time.monotonic() > end_s:
                raise WorkerError("prompts of the warm-up are not answered")


def sweep(gateway: Gateway, workload: Workload, options: argparse.Namespace, end_s: float) -> Iterator[dict[str, Any]]:
    """A record for each rate. Blocks."""
    rng = np.random.default_rng(options.seed)
    base = {"bench": "goodput", "workload": workload.name}
    for rate, schedule in zip(workload.rates, arrivals(workload, options.seed), strict=True):
        if time.monotonic() + workload.window_s > end_s:
            yield base | {"rate": rate, "skipped": "the budget is spent"}
            continue
        prompts = [_prompt(workload, rng) for _ in schedule]
        start_s = time.monotonic()
        stop_s = start_s + workload.window_s
        judged_s = stop_s - _JUDGED_SHARE * workload.window_s
        sent, late_s, counting, before = [], 0.0, False, gateway.num_tokens
        for offset_s, prompt in zip(schedule, prompts, strict=True):
            if not counting and start_s + offset_s >= judged_s:
                gateway.turn(judged_s)
                counting, before = True, gateway.num_tokens
            gateway.turn(start_s + offset_s)
            late_s = max(late_s, time.monotonic() - start_s - offset_s)
            sent.append(gateway.send(start_s + offset_s, prompt, workload.output_tokens))
        gateway.turn(stop_s)
        tokens_per_s = (gateway.num_tokens - before) / (stop_s - judged_s)
        # First tokens of the last ones: what comes no sooner is late by any limit.
        judged = [tracked for tracked in sent if tracked.due_s >= judged_s]
        while any(not t.token_times_s and not t.error for t in judged) and time.monotonic() < stop_s + options.ttft_s:
            gateway.turn(time.monotonic() + 0.02)
        found = judge(judged, stop_s, time.monotonic(), options)
        yield base | {
            "rate": rate, "sent": len(sent), "sent_late_ms": round(1e3 * late_s, 1), "open": gateway.num_open,
            "output_tokens_per_s": round(tokens_per_s, 1),
            "transferred_bytes": sum(tracked.transferred_bytes for tracked in sent),
        } | found  # fmt: skip
        if max(found["good_share"].values(), default=0.0) < _HOPELESS_SHARE:
            for higher in workload.rates[workload.rates.index(rate) + 1 :]:
                yield base | {"rate": higher, "skipped": f"at {rate:g} a second too few were good"}
            return


def judge(judged: Sequence[Tracked], stop_s: float, now_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of the requests of a window that ended at ``stop_s``."""
    ttft_s = [tracked.ttft_s(now_s) for tracked in judged]
    gaps_s = [tracked.gaps_s(stop_s) for tracked in judged]
    itl_s = [float(np.mean(gaps)) if gaps else 0.0 for gaps in gaps_s]
    worst_s = [float(np.percentile(gaps, 99)) if gaps else 0.0 for gaps in gaps_s]
    in_time = [
        not t.error and bool(t.token_times_s) and first <= options.ttft_s
        for t, first in zip(judged, ttft_s, strict=True)
    ]

    def share(values: Sequence[bool]) -> float:
        return round(sum(values) / len(values), 4) if values else 0.0

    return {
        "judged": len(judged),
        "without_first_token": sum(not t.token_times_s for t in judged),
        "errors": sorted({t.error for t in judged if t.error})[:3],
        "ttft_ms": percentiles([1e3 * s for s in ttft_s], 1) if ttft_s else {},
        "request_itl_ms": percentiles([1e3 * s for s in itl_s if s], 2) if any(itl_s) else {},
        "gap_ms": percentiles([1e3 * gap for gaps in gaps_s for gap in gaps], 2) if any(itl_s) else {},
        "ttft_share": share(in_time),
        "good_share": {
            name + kind: share([ok and s <= limit / 1e3 for ok, s in zip(in_time, values, strict=True)])
            for name, limit in ((f"{limit:g}ms", limit) for limit in options.itl_ms)
            for kind, values in (("", itl_s), (" strict", worst_s))
        },
    }


def _prompt(workload: Workload, rng: np.random.Generator) -> list[int]:
    tokens: list[int] = rng.integers(_VOCABULARY, size=workload.input_tokens).tolist()
    return tokens


def records(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Everything that is measured; what fails is a record, too, and the next arrangement comes all the same."""
    begin_s = time.monotonic()
    longest = max(workload.input_tokens + workload.output_tokens for workload in options.workloads) + 64
    for number, arrangement in enumerate(options.arrangements):
        base = {"bench": "goodput", "arrangement": arrangement}
        # What is left is shared by the arrangements that are left.
        now_s = time.monotonic()
        end_s = now_s + (begin_s + options.budget_s - now_s) / (len(options.arrangements) - number)
        if end_s <= now_s:
            yield base | {"skipped": "the budget is spent"}
            continue
        gateway = None
        try:
            config = make_config(folder, arrangement, bool(options.gpus), longest, options)
            gateway = Gateway(arrangement, config, options.gpus)
            warm_up(gateway, options.workloads, np.random.default_rng(options.seed + 1))
            pools = config.model_dump(mode="json")["pools"]
            yield base | {"started_s": round(time.monotonic() - now_s, 1), "pools": pools}
            for index, workload in enumerate(options.workloads):
                if index:
                    gateway.abort_all()
                planned = [len(other.rates) * other.window_s for other in options.workloads[index:]]
                workload_end_s = time.monotonic() + (end_s - time.monotonic()) * planned[0] / sum(planned)
                for record in sweep(gateway, workload, options, workload_end_s):
                    yield base | record
        except Exception as error:  # noqa: BLE001 - the other arrangement is measured all the same
            traceback.print_exc()
            yield base | {"error": f"{type(error).__name__}: {error}"}
        finally:
            if gateway is not None:
                gateway.abort_all()
                gateway.close()


def goodputs(found: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each workload and limit: the highest rate with nine good ones of ten, of each arrangement."""
    rows = [record for record in found if "good_share" in record]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        for limit in dict.fromkeys(limit for row in rows for limit in row["good_share"]):
            best: dict[str, float] = {}
            tokens: dict[str, float] = {}
            for row in rows:
                if row["workload"] == workload:
                    name = row["arrangement"]
                    good = row["good_share"][limit] >= GOOD_SHARE
                    best[name] = max(best.get(name, 0.0), row["rate"] if good else 0.0)
                    tokens[name] = max(tokens.get(name, 0.0), row["output_tokens_per_s"])
            record: dict[str, Any] = {
                "bench": "goodput-summary", "workload": workload, "itl": limit, "requests_per_s": best,
                "most_output_tokens_per_s": tokens,
            }  # fmt: skip
            if best.get("colocated") and "separate" in best:
                record["separate_to_colocated"] = round(best["separate"] / best["colocated"], 2)
            yield record


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The same for people."""
    lines = []
    for record in found:
        name = f"{record.get('workload', ''):>10} {record.get('arrangement', ''):>10} {record.get('rate', 0):5.2f}/s"
        match record:
            case {"skipped": reason} | {"error": reason}:
                lines.append(f"{name}: {reason}")
            case {"bench": "goodput-summary"}:
                rates = ", ".join(f"{arrangement} {rate:g}/s" for arrangement, rate in record["requests_per_s"].items())
                factor = record.get("separate_to_colocated")
                lines.append(
                    f"{record['workload']:>10} goodput at {record['itl']}: {rates}"
                    + (f": {factor} x" if factor else "")
                )
            case {"good_share": shares, "ttft_ms": {"p50": ttft, "p99": late}}:
                gap, long = (record["gap_ms"].get(key, 0.0) for key in ("p50", "p99"))
                within = ", ".join(f"{limit} {share:.0%}" for limit, share in shares.items())
                lines.append(
                    f"{name}: first token {ttft:6.0f} ms (p99 {late:6.0f}), then {gap:5.1f} ms (p99 {long:6.1f}), "
                    f"{record['output_tokens_per_s']:7.0f} tokens/s, good at {within}"
                )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print.

    Raises:
        ConfigError: there are too few GPUs.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tandem.bench.goodput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="qwen3-8b", help=f"a folder with a config.json, or one of {', '.join(MODELS)}"
    )
    parser.add_argument("--gpus", type=int, nargs="*", default=[0, 1], help="two; none: CPUs, and the folder's weights")
    parser.add_argument("--arrangements", nargs="+", choices=sorted(ARRANGEMENTS), default=["separate", "colocated"])
    parser.add_argument(
        "--workloads", nargs="+", type=Workload.parse, metavar="IN/OUT:RATES:SECONDS",
        default=[Workload(2000, 1000, (4.0, 7.0, 10.0, 13.0), 14.0), Workload(8000, 200, (2.0, 3.0, 4.5), 10.0)],
    )  # fmt: skip
    parser.add_argument("--ttft-s", type=float, default=1.0)
    parser.add_argument("--itl-ms", type=float, nargs="+", default=[50.0, 25.0])
    parser.add_argument("--max-running", type=int, default=256, help="outputs of a worker at a time")
    parser.add_argument("--prefill-tokens", type=int, default=8192, help="of a prefill worker's step")
    parser.add_argument("--colocated-tokens", type=int, default=2048, help="of a colocated worker's step")
    parser.add_argument("--layer-groups", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget-s", type=float, default=300.0, help="what would end later is left out, and says so")
    options = parser.parse_args(arguments)
    if options.gpus and (len(options.gpus) != 2 or torch.cuda.device_count() <= max(options.gpus)):
        raise ConfigError(
            f"two GPUs are needed, and {torch.cuda.device_count()} are here", fix="--gpus without numbers"
        )
    start_s = time.monotonic()
    machine = describe() | {"gpus": [torch.cuda.get_device_name(gpu) for gpu in options.gpus]}
    print(json.dumps({"bench": "goodput", "options": vars(options), "machine": machine}), flush=True)
    found = []
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(options.model).expanduser()
        if options.model in MODELS:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(MODELS[options.model]))
        for record in records(options, folder):
            found.append(record)
            print(json.dumps(record), flush=True)
    for record in goodputs(found):
        found.append(record)
        print(json.dumps(record), flush=True)
    print(json.dumps({"seconds": round(time.monotonic() - start_s, 1)}))
    print("\n".join(table(found)))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"tandem: {error}") from None
