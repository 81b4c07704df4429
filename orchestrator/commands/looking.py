"""See how a sweep is, and what it has found."""

from pathlib import Path

import click

from analysis.errors import BadInput
from orchestrator.commands.options import (
    Number,
    json_option,
    measured_argument,
    out_option,
    recorded,
    sweep_argument,
    sweep_of,
    trial_argument,
)


@click.command(
    epilog="""\b
Examples:
  lmsat status ranks
  lmsat status ranks --watch"""
)
@sweep_argument
@out_option
@click.option("--watch", is_flag=True, help="Stay, until nobody is at work on it any more.")
@click.option("--all", "every", is_flag=True, help="All trials, be there thousands.")
@json_option
def status(name: str, out: Path, watch: bool, every: bool, as_json: bool) -> None:
    """Show the trials of SWEEP, a name under OUT or a directory: how far each is, its last held-out
    loss (nats per token) and speed.

    Of more than a hundred trials those that are done or wait are only counted.
    """
    from orchestrator import status as statuses

    _only_one("--watch", watch, as_json)
    seen = statuses.Status(sweep_of(name, out))
    if watch:
        statuses.watch(seen)
    statuses.show(seen, every, as_json)


@click.command(
    epilog="""\b
Examples:
  lmsat logs ranks nano-64_r16
  lmsat logs ranks 78656d318fe0 --follow"""
)
@sweep_argument
@trial_argument
@out_option
@click.option("--follow", is_flag=True, help="Stay, until the trial ends.")
@json_option
def logs(name: str, trial: str, out: Path, follow: bool, as_json: bool) -> None:
    """Tell what happened to one trial of SWEEP, in order of time: losses (nats per token),
    failures, and how it stands.

    TRIAL is its id, its name or a part of that which no other has: nano-64_r16 where there is one
    seed.
    """
    from orchestrator import logs as trial_logs
    from orchestrator import terminal

    _only_one("--follow", follow, as_json)
    sweep = sweep_of(name, out)
    entry = trial_logs.find(sweep, trial)
    if as_json:
        terminal.print_json(trial_logs.as_json(sweep, entry))
        return
    click.echo(trial_logs.title(sweep, entry))
    told = trial_logs.follow(sweep, entry) if follow else trial_logs.events(sweep, entry)
    for line in trial_logs.lines(told, entry["steps"]):
        click.echo(line)


def _only_one(option: str, given: bool, as_json: bool) -> None:
    if given and as_json:
        raise BadInput(f"{option}: goes on for ever, --json says one thing; give one of them")


@click.command(epilog="Example:  lmsat ranks smollm2 --tolerance 0.05")
@sweep_argument
@out_option
@click.option(
    "--tolerance",
    type=Number(min=0, min_open=True),
    default=0.02,
    show_default=True,
    help="Nats per token by which a head may fall short of full rank.",
)
@json_option
def ranks(name: str, out: Path, tolerance: float, as_json: bool) -> None:
    """Show what a low rank costs on the frozen backbones of SWEEP, and which rank is required."""
    from orchestrator import result_tables

    result_tables.print_results(sweep_of(name, out), {"rankfit"}, as_json, tolerance)


@click.command(epilog="Example:  lmsat figures ranks --paper")
@measured_argument
@out_option
@click.option("--paper", is_flag=True, help="With the paper's own readings.")
@json_option
def figures(name: str, out: Path, paper: bool, as_json: bool) -> None:
    """Draw Figures 1a to 5 of the paper from the records of SWEEP, or of what was probed."""
    from analysis import trajectories
    from orchestrator import terminal

    directory = recorded(name, out)
    files = [str(file) for file in trajectories.draw(directory, paper)]
    if as_json:
        terminal.print_json({"directory": str(directory), "files": files})
    else:
        click.echo("\n".join(files))


@click.command(epilog="Example:  lmsat ui --port 5001")
@out_option
@click.option("--port", default=5000, show_default=True, help="On 127.0.0.1.")
@json_option
def ui(out: Path, port: int, as_json: bool) -> None:
    """Open the MLflow UI on the sweeps of OUT, at 127.0.0.1.

    With --json a line with `url` and `store` comes first.
    """
    from orchestrator import terminal, tracking

    tracking.serve(out, port, terminal.print_line if as_json else None)


WHERE = {
    "bash": "~/.bashrc",
    "zsh": "~/.zshrc",
    "fish": "~/.config/fish/completions/lmsat.fish",
}


@click.command(
    epilog="""\b
Examples:
  eval "$(lmsat completion bash)"
  lmsat completion fish > ~/.config/fish/completions/lmsat.fish"""
)
@click.argument("shell", type=click.Choice([*WHERE]))
@json_option
def completion(shell: str, as_json: bool) -> None:
    """Print what makes SHELL complete lmsat's commands, options, sweeps, trials and grids."""
    from click.shell_completion import get_completion_class

    from orchestrator import cli

    known = get_completion_class(shell)
    assert known is not None
    script = known(cli.main, {}, "lmsat", "_LMSAT_COMPLETE").source().strip()
    line = 'eval "$(lmsat completion {})"'
    where = f"# Into {WHERE[shell]}:  {line.format(shell)}"
    if shell == "fish":
        where = f"# Into {WHERE[shell]}"
    if as_json:
        from orchestrator import terminal

        terminal.print_json({"shell": shell, "file": WHERE[shell], "script": script})
    else:
        click.echo(f"{script}\n\n{where}")
