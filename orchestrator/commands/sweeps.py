"""Make a grid, see what it will cost, and run it."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from analysis.errors import BadInput, one_line
from orchestrator.commands.options import (
    INTERRUPTED,
    cache,
    grid_option,
    json_option,
    out_option,
    tracking_option,
)


@click.command(epilog="Example:  lmsat sweep --grid ranks.yaml --out runs")
@grid_option
@out_option
@tracking_option
@click.option(
    "--address",
    metavar="ADDRESS",
    envvar="RAY_ADDRESS",
    show_envvar=True,
    help="A cluster: http://HOST:PORT of its dashboard, from outside; HOST:PORT or auto, on a "
    "machine of it.",
)
@click.option(
    "--checkpoints",
    metavar="PLACE",
    help="A folder or an fsspec URL (s3://...) for checkpoints; by default the sweep's directory.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@json_option
def sweep(
    grid_name: str,
    out: Path,
    tracking_uri: str | None,
    address: str | None,
    checkpoints: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train every trial of a grid.

    The same command again goes on where it stopped: finished trials are skipped, the others
    resume from their last checkpoint. Ctrl-C saves the running trials and stops.

    With --address http://127.0.0.1:8265, which `ray dashboard` opens, the sweep runs on that
    cluster's head: the grid file is sent there, OUT and the paths in the grid are the cluster's
    and absolute. Ctrl-C saves and stops as here; a second one leaves the sweep to itself.
    """
    from orchestrator import grid, result_tables, terminal

    if address and address.startswith(("http://", "https://")):
        given: dict[str, str | bool | None] = {
            "--tracking-uri": tracking_uri,
            "--checkpoints": checkpoints,
            "--dry-run": dry_run,
            "--json": as_json,
        }
        sys.exit(_submit(address, grid.find(grid_name), out, given))
    if address and "://" in address:
        raise BadInput(
            f"--address: {address}: a sweep is driven from within its cluster; give "
            "http://HOST:PORT of the dashboard, or HOST:PORT on a machine of it"
        )
    loaded = grid.load(grid.find(grid_name))
    if dry_run:
        _plan(loaded, as_json, _cluster(address))
        return
    from orchestrator import progress
    from orchestrator import sweep as sweeps

    for notice in loaded.notices:
        click.echo(f"note: {notice}", err=True)
    directory = out / loaded.name
    with progress.Progress() as watcher:
        entries = sweeps.run(loaded, out, tracking_uri, cache(), watcher, address, checkpoints)
    statuses = [entry["status"] for entry in entries.values()]
    kinds = {entry["trial"]["kind"] for entry in entries.values()}
    result_tables.print_results(directory, kinds, as_json)
    if not as_json:
        terminal.print_next(directory, out, tracking_uri)
    result_tables.print_failures(directory, entries.values())
    if "stopped" in statuses or "waiting" in statuses:
        click.echo("stopped; the same command goes on from here", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(1 if "failed" in statuses else 0)


def _cluster(address: str | None) -> Any:
    """Where a sweep would run."""
    from orchestrator import cluster, progress

    with progress.Bar() as bar:
        return cluster.look(bar, address)


def _submit(address: str, grid_file: Path, out: Path, given: dict[str, str | bool | None]) -> int:
    """The same command on a cluster; its exit code."""
    if not out.is_absolute():
        raise BadInput(f"--out: a folder that all machines of the cluster share: /..., not {out}")
    from orchestrator import job, tracking

    arguments = ["--out", str(out)]
    for option, value in given.items():
        tracking.check_secrets(option, str(value))
        if value:
            arguments += [option] if value is True else [option, str(value)]
    inside = False  # its JSON: a job has one output, ours has two

    def show(line: str) -> None:
        nonlocal inside
        inside |= line == "{"
        click.echo(line, err=bool(given["--json"]) and not inside)
        inside &= line != "}"

    return job.submit(address, grid_file, arguments, show, lambda line: click.echo(line, err=True))


@click.command(
    epilog="""\b
Examples:
  lmsat plan --grid ranks.yaml --json
  lmsat plan --grid pythia.yaml --on 8xA100-80G"""
)
@grid_option
@click.option(
    "--on",
    metavar="PLACE",
    help="Not this machine, but GPUs, such as 8xA100-80G, or what a file for `ray up` may start.",
)
@json_option
def plan(grid_name: str, on: str | None, as_json: bool) -> None:
    """Show what a grid will cost: every trial's size, tokens, FLOPs, memory and time.

    Of models that several workers or GPUs train also how ZeRO's stages would share them out.
    Nothing is started and nothing written.
    """
    from orchestrator import grid, place

    there = place.find(on) if on else None
    loaded = grid.load(grid.find(grid_name))
    if on and not any(trial["resources"]["gpus"] for trial in loaded.trials):
        raise BadInput(f"--on: {loaded.path} uses no GPU; give it resources: {{gpus: 1}}")
    _plan(loaded, as_json, there)


def _plan(loaded: Any, as_json: bool, place: Any = None) -> None:
    from orchestrator import plan, plan_tables

    planned = plan.plan(loaded, cache(), place)
    for note in planned.notes:
        click.echo(f"note: {note}", err=True)
    plan_tables.print_plan(planned, loaded.notices, as_json)


@click.command(
    epilog="""\b
Examples:
  lmsat new
  lmsat new mine --size nano-32,nano-64 --rank 8,full --budget '10 min'"""
)
@click.argument("name", metavar="[NAME]", default="mine")
@click.option("--size", help="Of models: nano-16,nano-64.")
@click.option("--rank", help="Of heads: 4,16,full.")
@click.option("--corpus", help="A package, a file or glob, or as in a grid: '{hub: NAME}'.")
@click.option("--budget", help="Tokens of each trial (400k), or time for all of them ('10 min').")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@json_option
def new(name: str, force: bool, as_json: bool, **answers: str | None) -> None:
    """Write a grid to NAME.yaml, with comments, and say what it will cost.

    On a terminal what no option says is asked for, with a default in brackets; elsewhere defaults
    are taken.
    """
    from orchestrator import asking, plan_tables

    file = asking.place(name, force)
    given = {option: answer for option, answer in answers.items() if answer is not None}
    made = asking.write(file, given, _prompt if sys.stdin.isatty() else None, cache())
    plan_tables.print_new(file, made, as_json)


def _prompt(question: str, default: str, check: Callable[[str], str]) -> str:
    """Asks again after a bad answer."""

    def checked(answer: str) -> str:
        try:
            return check(answer)
        except BadInput as error:
            raise click.UsageError(one_line(error)) from None

    signal.signal(signal.SIGINT, signal.default_int_handler)  # polars' would wait for a line
    return str(click.prompt(question, default, value_proc=checked, err=True))
