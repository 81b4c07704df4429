"""The command line. Every command is thin: it reads its options, calls, and prints."""

import sys
from pathlib import Path
from typing import Any

import click

from analysis.errors import BadInput

INTERRUPTED = 130  # as a shell says of Ctrl-C


class Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BadInput as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except (BrokenPipeError, KeyboardInterrupt):
            sys.exit(INTERRUPTED)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with:  lmsat sweep --grid ranks.yaml",
)
@click.version_option(package_name="lmsat")
def main() -> None:
    """The laboratory for language-model saturation: train grids of model size x head rank, probe
    them along training, and see whether the softmax head is the bottleneck.

    Exit codes: 0 done, 1 the work failed, 2 bad input, 130 stopped with Ctrl-C.
    """


def _cache() -> Path:
    from trainables import corpus

    return corpus.default_cache()


grid_option = click.option(
    "--grid",
    "grid_name",
    required=True,
    metavar="FILE",
    help="Grid file; if it is not here, one that ships with lmsat (ranks.yaml).",
)
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Where sweeps and the MLflow store lie.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")


@main.command(epilog="Example:  lmsat sweep --grid ranks.yaml --out runs")
@grid_option
@out_option
@click.option("--tracking-uri", metavar="URI", help="MLflow server; by default OUT/mlflow.db.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@json_option
def sweep(
    grid_name: str, out: Path, tracking_uri: str | None, dry_run: bool, as_json: bool
) -> None:
    """Train every trial of a grid.

    The same command again goes on where it stopped: finished trials are skipped, the others
    resume from their last checkpoint. Ctrl-C saves the running trials and stops.
    """
    from orchestrator import grid, terminal

    loaded = grid.load(grid.find(grid_name))
    if dry_run:
        _plan(loaded, as_json)
        return
    from orchestrator import progress
    from orchestrator import sweep as sweeps

    for notice in loaded.notices:
        click.echo(f"note: {notice}", err=True)
    directory = out / loaded.name
    with progress.Progress() as watcher:
        entries = sweeps.run(loaded, out, tracking_uri, _cache(), watcher)
    statuses = [entry["status"] for entry in entries.values()]
    kinds = {entry["trial"]["kind"] for entry in entries.values()}
    terminal.print_results(directory, kinds, as_json)
    if not as_json:
        terminal.print_next(directory, out, tracking_uri)
    if "stopped" in statuses or "waiting" in statuses:
        click.echo("stopped; the same command goes on from here", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(1 if "failed" in statuses else 0)


@main.command(epilog="Example:  lmsat plan --grid ranks.yaml --json")
@grid_option
@json_option
def plan(grid_name: str, as_json: bool) -> None:
    """Show what a grid will cost: every trial's size, tokens, FLOPs, memory and time.

    Nothing is started and nothing written.
    """
    from orchestrator import grid

    _plan(grid.load(grid.find(grid_name)), as_json)


def _plan(loaded: Any, as_json: bool) -> None:
    from orchestrator import plan, terminal

    terminal.print_plan(plan.plan(loaded, _cache()), loaded.notices, as_json)


@main.command(epilog="Example:  lmsat status ranks")
@click.argument("name", metavar="SWEEP")
@out_option
@json_option
def status(name: str, out: Path, as_json: bool) -> None:
    """Show the trials of SWEEP, a name under OUT or a directory."""
    from orchestrator import terminal

    terminal.print_status(_sweep(name, out), as_json)


@main.command(epilog="Example:  lmsat ranks smollm2 --tolerance 0.05")
@click.argument("name", metavar="SWEEP")
@out_option
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0, min_open=True),
    default=0.02,
    show_default=True,
    help="Nats per token by which a head may fall short of full rank.",
)
@json_option
def ranks(name: str, out: Path, tolerance: float, as_json: bool) -> None:
    """Show what a low rank costs on the frozen backbones of SWEEP, and which rank is required."""
    from orchestrator import terminal

    terminal.print_results(_sweep(name, out), {"rankfit"}, as_json, tolerance)


def _sweep(name: str, out: Path) -> Path:
    for directory in (out / name, Path(name)):
        if (directory / "plan.json").is_file():
            return directory
    raise BadInput(f"{name}: no sweep of that name in {out}, and no sweep directory")


@main.command(epilog="Example:  lmsat ui --port 5001")
@out_option
@click.option("--port", default=5000, show_default=True, help="On 127.0.0.1.")
def ui(out: Path, port: int) -> None:
    """Open the MLflow UI on the sweeps of OUT, at 127.0.0.1."""

    from orchestrator import tracking

    tracking.serve(out, port)
