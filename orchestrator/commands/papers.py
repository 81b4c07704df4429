"""Redo a paper, and set its claims beside what was found."""

from pathlib import Path

import click

from orchestrator.commands.options import json_option, out_option


@click.command(
    epilog="""\b
Examples:
  lmsat reproduce godey2024
  lmsat reproduce godey2024 --figure 7
  lmsat reproduce godey2024 --scale paper --dry-run"""
)
@click.argument("paper", type=click.Choice(["godey2024"]), metavar="PAPER")
@click.option(
    "--scale",
    type=click.Choice(["nano", "small", "paper"]),
    default="nano",
    show_default=True,
    help="nano: two cores, minutes. small: one GPU, a day. paper: a cluster.",
)
@click.option("--figure", help="Only what this needs: 1a, 1b, 2 to 9, table-1.")
@click.option("--dry-run", is_flag=True, help="Print the commands and stop.")
@out_option
@json_option
def reproduce(
    paper: str, scale: str, figure: str | None, dry_run: bool, out: Path, as_json: bool
) -> None:
    """Redo the figures of PAPER with grids and commands that ship with lmsat, and set each of its
    claims beside what was found: agrees, disagrees, cannot tell.

    PAPER is godey2024. The same command again goes on where it stopped. `small` and `paper` need
    GPUs and the hub; what a sweep of theirs costs, `lmsat plan` says.
    """
    from orchestrator import reproduce as papers
    from orchestrator import terminal

    wanted = papers.steps(scale, figure)
    commands = [papers.typed(step, out) for step in wanted]
    if dry_run:
        if as_json:
            terminal.print_json({"commands": commands})
        else:
            click.echo("\n".join(commands))
        return
    answer, page = papers.redo(wanted, out, lambda line: click.echo(line, err=True))
    if as_json:
        terminal.print_json({"commands": commands, **answer, "report": str(page)})
    else:
        papers.print_claims(answer, page)
