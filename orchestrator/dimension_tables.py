"""How dimensions are shown: W-error, its growth with the text, and the softmax rank."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import polars as pl

from analysis import dimensions, ranks
from analysis.dimensions import LEVELS, TIMES
from orchestrator import result_tables
from orchestrator.terminal import print_json, print_table, short


def print_dimensions(directory: Path, at: list[int], as_json: bool, failed: dict[str, str]) -> None:
    """All that has been measured in a directory; W-error at these d."""
    samples = dimensions.samples(directory)
    errors = dimensions.at(dimensions.curves(directory, "w_errors"), at)
    grown = dimensions.growths(samples)
    softmax = dimensions.curves(directory, "softmax")
    required = dimensions.curves(directory, "required")
    if as_json:
        found = {
            "samples": samples.to_dicts(),
            "w_errors": errors.to_dicts(),
            "growth": grown.to_dicts(),
            "softmax": softmax.to_dicts(),
            "required": required.to_dicts(),
        }
        print_json({"directory": str(directory), **found, "failed": failed})
        return
    if not errors.is_empty():
        _print_w_errors(dimensions.whole(samples), errors, at)
    if not grown.is_empty():
        _print_growth(grown)
    if not softmax.is_empty():
        _print_softmax(softmax)
        _print_required(required)


def _print_w_errors(whole: pl.DataFrame, errors: pl.DataFrame, at: list[int]) -> None:
    rows = []
    for row in errors.join(whole, on="name", maintain_order="left").to_dicts():
        told = [round(row[level]) for level in LEVELS]
        rows.append(
            (
                row["name"],
                short(row["tokens"]),
                short(row["contexts"]),
                f"{100 * row['seen_once']:.0f} %",
                *("-" if row[str(d)] is None else f"{row[str(d)]:.3f}" for d in at),
                *(f"~{d}" if d > row["exact"] else f"{d}" for d in told),
            )
        )
    levels = [f"d({level:g})" for level in LEVELS.values()]
    print_table(
        ("", "tokens", "contexts", "once", *map(str, at), *levels),
        rows,
        title="W-error: what d dimensions leave of the next-token distributions, and the d that "
        "leave\na half, 10 and 1 % (~ estimated)",
    )
    worst = max(whole["residual"].drop_nulls().to_list())
    if worst:
        print(f"squares of singular values: residuals of at most {worst:.0e} of the first")


def _print_growth(grown: pl.DataFrame) -> None:
    rows = []
    for (name, level), some in grown.group_by("name", "level", maintain_order=True):
        first = some.row(0, named=True)
        carried = [
            f"{short(row['d'])} [{short(row['low'])}, {short(row['high'])}]"
            for row in some.to_dicts()
        ]
        missed = f"{round(100 * first['missed']):+d} %"
        rows.append((str(name), f"{level}", f"{first['exponent']:.2f}", missed, *carried))
    print_table(
        ("", "W-error", "exponent", "missed", *(f"{times}x the text" for times in TIMES)),
        rows,
        title="\nHow d grows with the text. missed: the whole, by the law of the smaller samples",
    )


def _print_softmax(softmax: pl.DataFrame) -> None:
    tried = [*softmax["rank"].drop_nulls().unique().sort().to_list(), None]
    rows = []
    for (name,), line in softmax.group_by("name", maintain_order=True):
        losses = dict(zip(line["rank"], line["loss"], strict=True))
        found = (losses.get(rank) for rank in tried)
        rows.append((str(name), *("-" if one is None else f"{one:.3f}" for one in found)))
    headers = ["smoothed" if r is None else f"r = {r}" if r else "unigram" for r in tried]
    print_table(
        ("", *headers),
        rows,
        title="\nHeld-out nats per token of a softmax of rank r; of smoothed counts, of any rank",
    )


def _print_required(required: pl.DataFrame) -> None:
    rows = [
        (str(name), *(_answer(row) for row in some.sort("tolerance").to_dicts()))
        for (name,), some in required.group_by("name", maintain_order=True)
    ]
    tolerances = required["tolerance"].unique().sort().to_list()
    print_table(
        ("", *(f"{tolerance:g} nats" for tolerance in tolerances)),
        rows,
        title="\nThe rank that is within so much of the best, 95 % interval over contexts",
    )


def _answer(row: dict[str, Any]) -> str:
    return result_tables.required(
        ranks.Required(**{f.name: row[f.name] for f in fields(ranks.Required)})
    )
