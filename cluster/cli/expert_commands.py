"""Commands about experts, and their help: `tandem rebalance`, `trace experts`, `experts plot | synth`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

experts_app = typer.Typer(no_args_is_help=True, help="Experts: recorded loads, and where experts should be for them.")

ControlOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--control",
        metavar="FILE",
        help="The cluster's control.json, from its log folder. Default: that of this user's newest cluster.",
    ),
]


def rebalance(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="prefill, decode or colocated. Default: all.")] = "",
    timeout_s: Annotated[float, typer.Option(min=0.1, max=3600, help="What a group may take.")] = 120.0,
    control: ControlOption = None,
) -> None:
    """Place the experts of every group anew, by what they computed last, whatever that gains, while they serve.

    Returns when they have moved; says for each group how many, or why none. Exit 1 if a group failed.
    """
    from .experts import rebalance as run

    if not run(pool, timeout_s, control):
        raise typer.Exit(1)


def trace_experts(
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where to write it.")],
    duration_s: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.1, help="For so long. Default: until Ctrl-C."),
    ] = None,
    worker: Annotated[
        str, typer.Option(metavar="WORKER", help="The first of a group, as decode-0. Default: of the only group.")
    ] = "",
    control: ControlOption = None,
) -> None:
    """Record what the experts of a running group compute: tokens of each, for `tandem experts plot`, and for
    experts.balance.load_file to start with."""
    from .experts import record as run

    run(output, duration_s, worker, control)


@experts_app.command("plot")
def experts_plot(
    file: Annotated[Path, typer.Argument(metavar="LOADFILE", help="A recorded load of experts.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that experts are spread over.")],
    slots: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Slots of all ranks. Default: the fewest that hold every expert."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the ranks.")] = 1,
    groups: Annotated[int, typer.Option(min=1, help="Groups of experts that stay in one node each.")] = 1,
    output: Annotated[Path, typer.Option(help="The PNG.")] = Path("experts.png"),
) -> None:
    """Draw how full each rank is in each layer, before and after placing experts by a recorded load."""
    from .experts import Layout
    from .experts import plot as run

    run(file, Layout(ranks, slots, nodes, groups), output)


@experts_app.command("synth")
def experts_synth(
    file: Annotated[Path, typer.Argument(metavar="LOADFILE", help="The file to write.")],
    layers: Annotated[int, typer.Option(min=1, max=1024, help="Layers.")] = 48,
    experts: Annotated[int, typer.Option(min=1, max=1 << 14, help="Experts of a layer.")] = 128,
    windows: Annotated[int, typer.Option(min=1, max=1 << 16, help="Windows of 1000 steps.")] = 4,
    exponent: Annotated[float, typer.Option(min=0.01, max=4, help="Of the power law.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="Of all chance.")] = 0,
) -> None:
    """Make up a recorded load, to try things with."""
    from .experts import synthesize as run

    run(file, layers, experts, windows, exponent, seed)
