"""Commands and their help. Each imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ... import __version__
from .deploy import deploy_app
from .expert_commands import ControlOption, experts_app, rebalance, trace_experts
from .kv import DEFAULT_URL, KeyOption, UrlOption, kv_app

app = typer.Typer(
    name="tandem",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Serve large language models with prefill and decode on separate workers.

    [bold]First steps[/bold]

      tandem serve                        the demo model, on this machine, at http://127.0.0.1:8000

      tandem serve --set model.path=DIR   your own checkpoint, in Hugging Face format

      tandem config schema                every key of the YAML file, as JSON Schema

      tandem explain my.yaml              what computes each operation, and why

      tandem doctor my.yaml               what is missing or slow on the nodes, and what to do about it

      tandem tune my.yaml --trace T       which offload tiers pay on a recorded load, without serving it

    [bold]On a Ray cluster[/bold]

      tandem up my.yaml  ·  tandem status  ·  tandem down

      tandem drain decode-0  ·  tandem scale decode 3  ·  tandem restart  ·  tandem rebalance  ·  tandem watch

      tandem deploy render my.yaml        files that start the cluster: on your machines, AWS, GCP, Kubernetes
    """,
)
config_app = typer.Typer(no_args_is_help=True, help="Look at, and check, the one YAML file.")
bench_app = typer.Typer(
    no_args_is_help=True, help="Measure: figures as JSON lines, with what is needed to reproduce them."
)
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
trace_app = typer.Typer(no_args_is_help=True, help="Traces: recorded load for `tandem tune` and `tandem bench serve`.")
app.add_typer(trace_app, name="trace")
app.add_typer(deploy_app, name="deploy")
app.add_typer(kv_app, name="kv")
app.add_typer(experts_app, name="experts")

# typer evaluates these at run time: Optional, not "| None", keeps the help's types readable.
FileArgument = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Argument(metavar="FILE", help="The YAML file; without it, the demo model with every default."),
]
SetOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key, for example --set kv.block_tokens=32. Repeatable."
    ),
]
AddressOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="HOST:PORT", help="The Ray cluster. Default: RAY_ADDRESS, or the one on this host."),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"tandem {__version__}")
        raise typer.Exit


@app.command()
def serve(file: FileArgument = None, set_: SetOption = None) -> None:
    """Start everything on this machine, show that it works, and stay until Ctrl-C.

    Starts a Ray of its own on the loopback address, the workers and the gateway; streams one completion; prints the URL
    and a curl line. Ctrl-C or SIGTERM stops all of it and leaves nothing behind.
    """
    from .serve import serve as run

    run(file, set_ or [])


@app.command()
def up(file: FileArgument = None, set_: SetOption = None, address: AddressOption = None) -> None:
    """Start Tandem on a running Ray cluster, and return when it serves; if it cannot, say why and leave nothing there.

    Workers with GPUs go near each other, those without are spread over the nodes. Ctrl-C or SIGTERM ends the launch.

    `ray start --head` (on every other node `ray start --address=…`) makes a cluster. Off the loopback address Ray
    must authenticate: RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN, in the environment of every `ray start` and of this
    command.
    """
    from .cluster import up as run

    run(file, set_ or [], address)


@app.command()
def down(address: AddressOption = None) -> None:
    """Stop the Tandem that runs on a Ray cluster: gateways first, workers once their clients are served."""
    from .cluster import down as run

    run(address)


@app.command()
def status(
    address: AddressOption = None,
    kv: Annotated[bool, typer.Option("--kv", help="Each worker's prefix cache and tiers instead.")] = False,
    experts: Annotated[bool, typer.Option("--experts", help="Each group that shares experts instead.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object a worker instead of a table.")] = False,
) -> None:
    """Show every worker: role, node, state, sequences, blocks, leases, and rates over one second.

    With --kv, what each prefix cache and tier holds and has done since its worker started: blocks, hits, bytes and the
    speed of copies, evictions, the oldest block's age, failures, and whether it is away. With --experts, how even the
    ranks of each group are now, and would be by the newest plan, where its experts are and since when, and how the last
    attempt to move them ended.
    """
    from .cluster import status as run

    run(address, kv=kv, experts=experts, as_json=json_)


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="For example decode-0; `tandem status` lists them.")],
    restart: Annotated[bool, typer.Option("--restart", help="Start it again, and wait until it serves.")] = False,
    grace_s: Annotated[
        float, typer.Option(min=0, max=86_400, help="What is not finished by then goes on elsewhere.")
    ] = 600.0,
    finish: Annotated[
        bool, typer.Option("--finish", help="Finish what runs on a decode worker there, however long that takes.")
    ] = False,
    control: ControlOption = None,
) -> None:
    """Take a worker out: it gets nothing new, hands over or finishes what it has, and ends; no request fails.

    What runs on a decode worker goes on on another, with its KV, from the very next token.

    Returns when it has ended. `tandem scale` brings it back. The last worker of a pool that is ready stays.
    """
    from .control import drain as run

    run(worker, grace_s, control, restart=restart, finish=finish)


@app.command()
def restart(
    pool: Annotated[
        str, typer.Argument(metavar="[POOL]", help="prefill, decode, colocated or gateway; without it, all.")
    ] = "",
    grace_s: Annotated[
        float, typer.Option(min=0, max=86_400, help="What a worker has not done by then goes on elsewhere.")
    ] = 600.0,
    control: ControlOption = None,
) -> None:
    """Begin another life of every worker and gateway, one after the other; no request fails.

    Each is drained, starts again, and serves before the next is drained. A pool of one worker gets a second one
    meanwhile where there is room for it; else its requests wait. Ctrl-C: no further one is begun. When the controller
    dies, the next one goes on with it.
    """
    from .control import restart as run

    run(pool, grace_s, control)


@app.command()
def scale(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="prefill, decode or colocated.")],
    replicas: Annotated[int, typer.Argument(metavar="N", min=1, max=1024, help="How many workers it shall have.")],
    control: ControlOption = None,
) -> None:
    """Have N workers in a pool: new ones start, or the last are drained. Returns at once; no request fails.

    `tandem watch` shows how it goes on. A restart of the cluster begins with the YAML's number again.
    """
    from .control import scale as run

    run(pool, replicas, control)


app.command()(rebalance)


@app.command()
def watch(control: ControlOption = None) -> None:
    """Print what happens in the cluster, as it happens: starts, ends, drains, failures. Ctrl-C ends it."""
    from .control import watch as run

    run(control)


@app.command()
def explain(
    file: FileArgument = None,
    set_: SetOption = None,
    device: Annotated[str, typer.Option(help="h100, h200, a100, cpu; here: what this machine has.")] = "here",
    json_: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Show what computes each operation of the configuration's model, and why nothing faster does.

    The device need not be here: `tandem explain my.yaml --device h100`. `model.kernels` in the YAML names another
    backend for an operation.
    """
    from .explain import explain as run

    run(file, set_ or [], device, as_json=json_)


@app.command()
def doctor(
    file: FileArgument = None,
    set_: SetOption = None,
    address: AddressOption = None,
    limit_s: Annotated[
        float, typer.Option(min=10, max=3600, help="Measure for so long at most; 20 s may pass beyond it.")
    ] = 120.0,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object a row, and one for all.")] = False,
) -> None:
    """Look at every node and measure how fast KV moves: what is missing, what is slow, and what to do about it.

    Looks at the running cluster (--address, RAY_ADDRESS, or this machine's `tandem serve`), else starts a private Ray
    and ends it again. Reads 256 MiB from each prefill worker's place to each decode worker's, by every transport, and
    says which one workers would use. Leaves nothing behind. Exit status: 0 all is well, 1 a check failed, 2 bad usage
    or configuration.
    """
    from ...core.errors import ConfigError
    from .doctor import doctor as run

    try:
        status = run(file, set_ or [], address, limit_s, as_json=json_)
    except ConfigError as error:
        typer.echo(f"tandem: {error.message}" + (f"\n  fix: {error.fix}" if error.fix else ""), err=True)
        status = 2
    raise typer.Exit(status)


@app.command()
def tune(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file, with lists in its offload section.")],
    trace: Annotated[Path, typer.Option(metavar="TRACE", help="Recorded load, in Mooncake's JSONL format.")],
    set_: SetOption = None,
    trace_block_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens that one of its hash_ids is.")] = 512,
    trace_speed: Annotated[float, typer.Option(min=0.001, help="How much faster than it was recorded.")] = 1.0,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Prefill workers. Default: the pool's replicas."),
    ] = None,
    prefill_rate: Annotated[float, typer.Option(min=1, help="Prompt tokens a second of each.")] = 20_000.0,
    prefill_overhead_ms: Annotated[float, typer.Option(min=0, help="Of each prompt, however short.")] = 10.0,
    kv_bytes_per_token: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIZE", help="KV of a token, for example 128KiB. Default: the model's."),
    ] = None,
    worker_cache: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIZE", help="Prefix cache of all workers. Default: kv.capacity × workers; 0 if auto."),
    ] = None,
    link: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="KIND=LOAD:STORE:MS",
            help="Speed of a kind of tier, bytes a second and latency. Defaults: host=20GB:20GB:0.02, "
            "disk=6GB:4GB:0.2 a folder, s3=1GB:1GB:20. Repeatable.",
        ),
    ] = None,
    price: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="KIND=PRICE", help="Of a GiB. Defaults: host=3, disk=0.1, s3=0.02. Repeatable."),
    ] = None,
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="The best may cost no more than this."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object a configuration instead of a table.")] = False,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Write tune.jsonl, best.yaml and tune.png there."),
    ] = None,
    plot: Annotated[bool, typer.Option(help="Draw the PNG (needs matplotlib).")] = True,
) -> None:
    """Replay a recorded load through the offload tiers in simulated time, and say which configuration is best.

    A list in the YAML's offload section where one value is wanted, as in capacity: [1GiB, 4GiB], is compared entry by
    entry, in all combinations. Tells hit rate, bytes moved, predicted TTFT and cost of each; the best is the cheapest
    of those within 1 % of the least TTFT p90. docs/tuning.md says what is simulated.
    """
    from .tune import Options
    from .tune import tune as run

    options = Options(
        trace, trace_block_tokens, trace_speed, workers, prefill_rate, prefill_overhead_ms, kv_bytes_per_token,
        worker_cache, link or [], price or [], budget, out, plot,
    )  # fmt: skip
    run(file, set_ or [], options, as_json=json_)


@trace_app.command("synth")
def trace_synth(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
    requests: Annotated[int, typer.Option(min=1, help="Lines.")] = 1000,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second.")] = 3.0,
    turns: Annotated[float, typer.Option(min=1, help="Mean number of a conversation's questions.")] = 4.0,
    pause_s: Annotated[float, typer.Option(min=0.001, help="Mean time between two questions of one.")] = 60.0,
    input_tokens: Annotated[int, typer.Option(min=1, help="Mean length of a question.")] = 2000,
    output_tokens: Annotated[int, typer.Option(min=1, help="Mean length of an answer.")] = 350,
    seed: Annotated[int, typer.Option(help="The same seed, the same trace.")] = 0,
) -> None:
    """Make up conversations that share system prompts, and write them in Mooncake's JSONL format."""
    from ...bench.conversations import Conversations
    from .tune import synthesize

    synthesize(
        file,
        Conversations(
            requests, seed, rate, turns, pause_s, input_tokens=input_tokens, output_tokens=output_tokens
        ),
    )  # fmt: skip


@trace_app.command("record")
def trace_record(
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it.")],
    duration_s: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.1, help="For so long. Default: until Ctrl-C."),
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, max=100_000, help="So many at most.")] = 100_000,
    url: UrlOption = DEFAULT_URL,
    admin_key: KeyOption = "",
) -> None:
    """Record what a running gateway serves: arrivals, lengths and shared beginnings, no text.

    Requests that arrive and are answered meanwhile are written in Mooncake's JSONL format.
    """
    from .record import record

    record(output, duration_s, max_requests, url, admin_key)


trace_app.command("experts")(trace_experts)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the YAML file, for editors (`# yaml-language-server: $schema=…`)."""
    import json

    from ...core.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML file.")], set_: SetOption = None
) -> None:
    """Check a YAML file, and the model that it names, without starting anything."""
    from ...core.checkpoint import model_folder
    from ...core.config import load_config
    from ...engine.models.spec import context_length, read_spec

    config = load_config(file, set_ or [])
    spec = read_spec(model_folder(config))
    length = context_length(spec, config.model.max_model_len)
    typer.echo(f"{file}: good; {spec.architecture}, {spec.num_layers} layers, sequences of up to {length} tokens")


@config_app.command("show")
def config_show(file: FileArgument = None, set_: SetOption = None) -> None:
    """Print the whole configuration that a file means, every default filled in."""
    import yaml

    from ...core.config import load_config

    typer.echo(yaml.safe_dump(load_config(file, set_ or []).model_dump(mode="json"), sort_keys=False), nl=False)


@bench_app.command("serve")
def bench_serve(
    file: FileArgument = None,
    set_: SetOption = None,
    baseline: Annotated[
        str,
        typer.Option(help="colocated: as many workers, each doing both. transformers: one batch of generate. none."),
    ] = "none",
    requests: Annotated[int, typer.Option(min=1, help="Requests of one run.")] = 64,
    rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.001, help="Open loop: Poisson arrivals, requests a second."),
    ] = None,
    concurrency: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Closed loop: requests in flight. Default 16, without --rate or --trace."),
    ] = None,
    input_tokens: Annotated[str, typer.Option(help="Prompt length: 128, or 100:1000 for a range.")] = "128",
    output_tokens: Annotated[str, typer.Option(help="Output length, likewise.")] = "64",
    long_share: Annotated[float, typer.Option(min=0, max=1, help="Share of requests with long prompts.")] = 0.0,
    long_input_tokens: Annotated[str, typer.Option(help="Their prompt length.")] = "2048",
    long_output_tokens: Annotated[str, typer.Option(help="Their output length.")] = "8",
    trace: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Arrivals, lengths and shared prefixes of a trace in Mooncake's JSONL format."),
    ] = None,
    trace_speed: Annotated[float, typer.Option(min=0.001, help="How much faster than it was recorded.")] = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of every arm, in turns, each with fresh prompts.")] = 3,
    slo_ttft_ms: Annotated[float, typer.Option(min=0, help="Goodput counts requests within this TTFT …")] = 1000,
    slo_itl_ms: Annotated[float, typer.Option(min=0, help="… and this mean time between tokens.")] = 50,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Measure a server that runs already, at http://HOST:PORT."),
    ] = None,
    api_key: Annotated[str, typer.Option(envvar="TANDEM_API_KEY", help="For --url.")] = "",
    out: Annotated[Path, typer.Option(help="Folder for the JSON lines and the plot.")] = Path("bench/out"),
    plot: Annotated[bool, typer.Option(help="Draw a PNG (needs matplotlib).")] = True,
) -> None:
    """Load a served model: TTFT, ITL and E2E at p50, p90 and p99, goodput, throughput, stages, failures.

    Starts what it measures, and its baseline beside it, runs the same load on both in turns, and prints JSON lines: a
    header with configuration and machine, one line a run, and the medians with their ratios.
    """
    from ...bench.summary import Slo
    from .bench import Options
    from .bench import bench_serve as run

    if baseline not in ("none", "colocated", "transformers"):
        raise typer.BadParameter("choose none, colocated or transformers", param_hint="--baseline")
    if url is not None and baseline == "colocated":
        raise typer.BadParameter("a colocated baseline needs a cluster of its own: leave --url out")
    options = Options(
        url, api_key, baseline, rate, concurrency, requests, input_tokens, output_tokens, long_share, long_input_tokens,
        long_output_tokens, trace, trace_speed, repeats, Slo(slo_ttft_ms / 1e3, slo_itl_ms / 1e3), seed, out, plot,
    )  # fmt: skip
    run(file, set_ or [], options)


@bench_app.command("engine")
def bench_engine(
    file: FileArgument = None,
    set_: SetOption = None,
    load: Annotated[str, typer.Option(help="dummy: random weights from config.json alone. auto: read them.")] = "auto",
    profile: Annotated[
        bool, typer.Option(help="Also say where each row's time goes, and write traces for chrome://tracing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSON lines and traces.")] = Path("bench/out"),
) -> None:
    """Measure one engine without a cluster: prefill and a mixed load in tokens a second, decode in milliseconds a step,
    each beside the shortest time that the device allows.

    The configuration must have a colocated pool; gpus_per_replica: 1 takes the GPU.
    """
    from .bench import bench_engine as run

    run(file, [*(set_ or []), f"model.load={load}"], out, profile=profile)


@bench_app.command("kv")
def bench_kv(
    transport: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="One of kv.transport's. Repeatable. Default: all that this machine can run."),
    ] = None,
    block_kib: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(min=1, help="Bytes of a block, in KiB. Repeatable. Default: 16, 64 and 256."),
    ] = None,
    region_mib: Annotated[int, typer.Option(min=1, help="Memory that the blocks lie scattered in, at each end.")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Timed pulls of each transport and of its baseline.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder for the JSON lines.")] = Path("bench/out"),
) -> None:
    """Measure how fast each transport moves scattered blocks between two processes of this host, in turn with the same
    bytes moved by the same means with nothing around them.

    Exit 1 if a transport is slower than four fifths of that.
    """
    from .bench import bench_kv as run

    if not run(transport or [], block_kib or [16, 64, 256], region_mib, repeats, out):
        raise typer.Exit(1)


@bench_app.command("eplb")
def bench_eplb(
    loads: Annotated[int, typer.Option(min=1, help="Random loads whose placements are compared.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Timed placements of each case.")] = 25,
    seed: Annotated[int, typer.Option(min=0, help="Of all loads.")] = 0,
    device: Annotated[str, typer.Option(help="Where ranks serve while experts move: cpu or cuda.")] = "cpu",
    ranks: Annotated[int, typer.Option(min=2, max=64, help="So many; of cuda, a GPU each.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for the JSON lines.")] = Path("bench/out"),
) -> None:
    """Measure placements of experts: milliseconds to find one, how even ranks are, and experts moved when loads drift;
    each beside greedy packing, in turns. Then what balancing gains ranks that serve, and what a step takes meanwhile.

    Exit 1 if a placement is slower, less even or moves more than it must.
    """
    from .bench import bench_eplb as run

    if device not in ("cpu", "cuda"):
        raise typer.BadParameter("choose cpu or cuda", param_hint="--device")
    if not run(loads, repeats, seed, out, device, ranks):
        raise typer.Exit(1)
