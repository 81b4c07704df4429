"""Fit laws, and find when saturation sets in."""

import math
from pathlib import Path

import click

from analysis.errors import BadInput, blame
from orchestrator import completing
from orchestrator.commands.options import (
    Number,
    column_option,
    json_option,
    level_option,
    out_option,
    read_columns,
    read_numbers,
    read_values,
)


@click.command(
    epilog="""\b
Examples:
  lmsat fit ranks --form rank
  lmsat fit law.csv --fix B=410.7,b=0.28,E=1.69 --where "kind = 'final'"
  lmsat fit losses.csv --column D=20*N --predict N=7e9,D=140e9"""
)
@click.argument("name", metavar="TABLE|SWEEP", shell_complete=completing.tables)
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
    values = read_values(held_out) if held_out else None
    fixed = read_values(fix) if fix else {}
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
    budgets = read_numbers("--compute", compute) if compute else None
    points = sources.table(name, out, along)
    with blame(name):
        found = prediction.predict(
            points,
            law,
            settings,
            read_columns(columns),
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


@click.command(
    epilog="""\b
Examples:
  lmsat onset perplexity.csv entropy.csv
  lmsat onset zero_shot.csv --where "task = 'lambada_openai'" --level 0.01
  lmsat onset ranks --law runs/law/report/fit-chinchilla.json"""
)
@click.argument(
    "names",
    metavar="TABLE|SWEEP...",
    nargs=-1,
    required=True,
    shell_complete=completing.tables,
)
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
    from orchestrator import answers, progress, sources, terminal

    given = read_columns(columns)
    curves = [c for name in names for c in sources.curves(name, out, where, given, better)]
    laws = sources.laws(law, curves) if law else None
    with progress.Bar() as bar:
        found = onsets.verdicts(curves, level, margin, after, rho, laws, bar.each)
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
