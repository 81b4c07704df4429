"""Show all of it on one page; set two sweeps side by side."""

from pathlib import Path

import click

from analysis.errors import BadInput, blame
from orchestrator import completing
from orchestrator.commands.options import Number, json_option, out_option, recorded


@click.command(
    epilog="""\b
Examples:
  lmsat report ranks
  lmsat report ranks smollm2 dimension --paper"""
)
@click.argument(
    "names", metavar="SWEEP...", nargs=-1, required=True, shell_complete=completing.measured
)
@out_option
@click.option("--paper", is_flag=True, help="With the paper's own readings, pale.")
@click.option(
    "--tolerance",
    type=Number(min=0, min_open=True),
    default=0.02,
    show_default=True,
    help="Nats per token by which a head may fall short of full rank.",
)
@json_option
def report(names: tuple[str, ...], out: Path, paper: bool, tolerance: float, as_json: bool) -> None:
    """Write what SWEEP has found, or what was probed or counted, as one page that needs nothing
    else: a summary with its numbers, and the paper's figures and table as far as the records allow.

    Each figure also as PNG, SVG, PDF and CSV beside it, in the report of the first SWEEP.
    """
    from analysis import evidence
    from analysis import report as reports
    from orchestrator import progress, terminal

    directories = [recorded(name, out).resolve() for name in dict.fromkeys(names)]
    if len({d.name for d in directories}) < len(directories):
        raise BadInput("SWEEP: two directories of one name cannot be told apart in a report")
    with progress.Bar() as bar, blame(names[0]):
        known = evidence.gather(directories, tolerance, bar.preparing, bar.each)
        bar.preparing("figures")
        made = reports.make(known, paper)
        files = reports.write(made, directories[0] / "report")
    if as_json:
        terminal.print_json({**reports.as_json(made), "files": [str(file) for file in files]})
        return
    for answer in made.answers:
        click.echo(answer.question)
        for line in answer.lines:
            click.echo(f"  {line}")
    for figure, why in made.missing.items():
        click.echo(f"not in the report: {figure}: {why}")
    click.echo(f"written   {files[0]} and {len(files) - 1} files for print beside it")


@click.command(epilog="Example:  lmsat compare ranks ranks-adam")
@click.argument("first", metavar="SWEEP", shell_complete=completing.measured)
@click.argument("second", metavar="SWEEP", shell_complete=completing.measured)
@out_option
@json_option
def compare(first: str, second: str, out: Path, as_json: bool) -> None:
    """Set the finished trials of two sweeps side by side: held-out loss in nats per token, the
    second less the first with its 95 % interval, by name.

    Paired block by block where both were judged on the same text.
    """
    from analysis import comparison
    from orchestrator import terminal

    a, b = recorded(first, out), recorded(second, out)
    found = comparison.compare(a, b)
    if found.trials.is_empty():
        raise BadInput(f"{first} and {second} have no finished trial of one name")
    if as_json:
        mean = found.mean and dict(zip(("difference", "low", "high"), found.mean, strict=True))
        answer = {"trials": found.trials.to_dicts(), "mean": mean}
        only = {"only_first": found.only_first, "only_second": found.only_second}
        terminal.print_json({**answer, **only})
        return
    left, right = (a.name, b.name) if a.name != b.name else (first, second)
    terminal.print_table(
        ("", left, right, "difference", "95 %", "paired"),
        [
            (
                row["name"],
                f"{row['first']:.4f}",
                f"{row['second']:.4f}",
                f"{row['difference']:+.4f}",
                f"[{row['low']:+.4f}, {row['high']:+.4f}]",
                "yes" if row["paired"] else "no",
            )
            for row in found.trials.to_dicts()
        ],
        title=f"Held-out loss, nats per token; difference: {right} less {left}",
    )
    if found.mean:
        middle, low, high = found.mean
        said = f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]"
        click.echo(f"mean difference: {said}, over {found.trials.height} trials")
    for whose, lone in ((left, found.only_first), (right, found.only_second)):
        if lone:
            more = f" and {len(lone) - 8} more" if len(lone) > 8 else ""
            click.echo(f"only in {whose}: {', '.join(lone[:8])}{more}")
