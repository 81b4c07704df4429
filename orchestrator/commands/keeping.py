"""Keep sweeps, their MLflow store and the machines in order."""

import sys
from pathlib import Path

import click

from analysis.errors import Failed
from orchestrator.commands.options import (
    cache,
    directory_of,
    json_option,
    measured_argument,
    out_option,
    tracking_option,
)


@click.command(epilog="Example:  lmsat track ranks --tracking-uri http://127.0.0.1:5000")
@measured_argument
@out_option
@tracking_option
@json_option
def track(name: str, out: Path, tracking_uri: str | None, as_json: bool) -> None:
    """Bring MLflow up to the records of SWEEP, or of what was probed: a store that was away, has
    lost something, or is new.

    Nothing is there twice, however often this is done. `lmsat sweep` does it by itself where the
    store answers. Exit code 1 where it does not.
    """
    from orchestrator import lease, ledger, progress, terminal, tracker, tracking

    directory = directory_of(name, out).resolve()
    entries = ledger.read(directory)  # before the hold: as long as nobody has it none is running
    with progress.Bar() as bar, lease.hold(directory):
        try:
            uri = tracking.resolve(tracking_uri, directory.parent)
            bringing = tracker.Tracker(uri, directory, bar, anew=True)
        except tracking.NoAnswer as error:
            raise Failed(str(error)) from None
        for entry in entries.values():
            bringing.update(entry)
        bringing.close()
    store = bringing.store
    written = {
        "store": uri,
        "runs": len(entries),
        "new": store.new_runs,
        "values": store.new_values,
    }
    if as_json:
        terminal.print_json(written)
    else:
        new = f"{store.new_runs} new runs, {store.new_values:,} values"
        click.echo(f"{uri} has {len(entries)} trials of {directory}; written: {new}")
    sys.exit(1 if bringing.problems else 0)


@click.command(epilog="Example:  lmsat verify ranks")
@measured_argument
@out_option
@click.option(
    "--mend", is_flag=True, help="Set aside what is damaged: the same sweep makes it anew."
)
@json_option
def verify(name: str, out: Path, mend: bool, as_json: bool) -> None:
    """Find every damaged or missing file of SWEEP, or of what was probed: records, checkpoints,
    weights, ledger. Exit code 1 where there is one.

    A sweep that goes on sees to damaged records and checkpoints by itself.
    """
    from orchestrator import integrity, progress, result_tables

    directory = directory_of(name, out)
    with progress.Bar() as bar:
        bad, whole = integrity.verify(directory, mend, bar)
    result_tables.print_verified(directory, bad, whole, mend, as_json)
    sys.exit(1 if bad and not mend else 0)


@click.command(
    epilog="""\b
Examples:
  lmsat doctor
  lmsat doctor --address 10.0.0.5:6379 --out /shared/runs --grid mine.yaml"""
)
@click.option(
    "--address",
    metavar="ADDRESS",
    envvar="RAY_ADDRESS",
    show_envvar=True,
    help="HOST:PORT or ray://HOST:PORT of a cluster; by default this machine.",
)
@out_option
@tracking_option
@click.option("--grid", "grid_name", metavar="FILE", help="Look for the room that it wants.")
@json_option
def doctor(
    address: str | None, out: Path, tracking_uri: str | None, grid_name: str | None, as_json: bool
) -> None:
    """Check a Ray cluster, or this machine, before money is spent on it.

    Versions, GPUs, shared storage and cache, disks, shared memory, clocks, limits, open ports, the
    token and MLflow, on every node. Exit code 1: something is wrong; a warning alone is 0.
    """
    from dataclasses import asdict

    from orchestrator import doctor as doctors
    from orchestrator import grid, progress, terminal

    trials = grid.load(grid.find(grid_name)).trials if grid_name else []
    with progress.Bar() as bar:
        findings = doctors.run(address, out, cache(), tracking_uri, trials, bar)
    if as_json:
        terminal.print_json([asdict(one) for one in findings])
    else:
        doctors.print_findings(findings)
    wrong = sum(one.level == "wrong" for one in findings)
    if wrong:
        click.echo(f"{wrong} to mend, see above", err=True)
    sys.exit(1 if wrong else 0)
