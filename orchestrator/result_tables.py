"""How results are shown: losses by rank, frozen backbones, checkpoints, and what is damaged."""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from analysis import ranks, tables
from analysis.ranks import TOLERANCE
from orchestrator.terminal import print_json, print_table


def print_results(
    sweep: Path, kinds: set[str], as_json: bool, tolerance: float = TOLERANCE
) -> None:
    """What a sweep of such trials has found."""
    losses = tables.final_losses(sweep) if "pretrain" in kinds else None
    backbones = ranks.fitted(sweep, tolerance) if "rankfit" in kinds else None
    if as_json:
        found: dict[str, Any] = {"sweep": str(sweep)}
        if losses is not None:
            found["trials"] = losses.to_dicts()
        if backbones is not None:
            found["backbones"] = [
                {
                    "name": b.name,
                    "unigram_loss": b.unigram,
                    "required_rank": {family: asdict(r) for family, r in b.required.items()},
                    "heads": b.heads.to_dicts(),
                }
                for b in backbones
            ]
        print_json(found)
        return
    if losses is not None:
        _print_losses(losses, tables.probe_shares(sweep))
    if backbones is not None:
        _print_ranks(backbones)


def _print_losses(losses: pl.DataFrame, shares: tuple[float, float] | None) -> None:
    """Held-out loss by size and rank, and what the probes cost."""
    if losses.is_empty():
        print("no trial is finished yet")
        return
    ranks = sorted(losses["rank"].unique().to_list(), key=lambda r: (r is None, r))
    rows: dict[str, dict[int | None, str]] = {}
    for trial in losses.iter_rows(named=True):
        line = rows.setdefault(f"{trial['series']} s={trial['seed']}", {})
        line[trial["rank"]] = f"{trial['loss']:.3f}±{trial['stderr']:.3f}".replace("±0.", "±.")
    print_table(
        ["", *(f"r = {r}" if r else "full" for r in ranks)],
        [[name, *(line.get(r, "") for r in ranks)] for name, line in rows.items()],
        title="Held-out loss by head rank, nats per token ± standard error over blocks",
    )
    print(f"unigram cross-entropy of the same text: {tables.unigram_loss(losses):.3f}")
    if shares is not None:
        along, last = (f"{100 * share:.1f} %" for share in shares)
        print(f"measuring took {along} of training's time along the way, {last} at the end")


def _print_ranks(backbones: list[ranks.Fitted]) -> None:
    """What a low rank costs on each frozen backbone."""
    if not backbones:
        print("no head on a frozen backbone is finished yet")
    for b in backbones:
        rows = [
            (
                row["family"],
                str(row["rank"] or "full"),
                "-" if row["lr"] is None else f"{row['lr']:.3g}{'*' if row['edge'] else ''}",
                f"{row['loss']:.3f}",
                f"{100 * row['accuracy']:.1f}",
                "-" if row["gap"] is None else f"{row['gap']:+.3f}",
                "-" if row["gap"] is None else f"[{row['low']:+.3f}, {row['high']:+.3f}]",
            )
            for row in b.heads.iter_rows(named=True)
        ]
        print_table(
            ("head", "rank", "lr", "loss", "accuracy", "gap", f"{100 * ranks.LEVEL:.0f} %"),
            rows,
            title=f"Heads on {b.name}, frozen: held-out loss in nats per token, accuracy in %,\n"
            "gap to a factored head of rank d",
            keys=2,
        )
        if b.heads["edge"].any():
            print("* the best learning rate is the lowest or highest tried")
        print(f"unigram cross-entropy of the same text: {b.unigram:.3f}")
        for family, r in b.required.items():
            print(f"required rank, {family} heads, gap under {r.tolerance:g}: {required(r)}")


def required(r: ranks.Required) -> str:
    answer, low, high = map(r.said, (r.rank, r.low, r.high))
    return (
        answer if answer == low == high else f"{answer}, {100 * ranks.LEVEL:.0f} % [{low}, {high}]"
    )


def print_failures(sweep: Path, entries: Iterable[dict[str, Any]]) -> None:
    """On stderr, for what follows the results: which trials failed, why, and where all is told."""
    failed = [entry for entry in entries if entry["status"] == "failed"]
    for entry in failed:
        log = sweep / "trials" / entry["id"] / "errors.txt"
        lines = f"failed    {entry['trial']['name']}: {entry['error']}\n          {log}"
        print(lines, file=sys.stderr)
    if failed:
        said = f"{len(failed)} failed after their retries; the same command tries again"
        print(said, file=sys.stderr)


# What a checkpoint is shown by: column, heading, digits. The rest is in the records.
SHOWN = (
    ("loss", "loss", 3),
    ("perplexity", "ppl", 1),
    ("accuracy", "acc", 3),
    ("bits_per_byte", "bpb", 3),
    ("last_anisotropy", "anisotropy", 3),
    ("last_rankme", "RankMe", 1),
    ("singular_entropy", "S", 3),
    ("singular_entropy_centred", "S centred", 3),
    ("effective_rank", "eff. rank", 1),
    ("stable_rank", "stable rank", 2),
    ("achieved_rank", "log p rank", 0),
    ("gradient_survival", "survival", 4),
    ("unargmaxable", "never", 0),
)


LAYER = (
    ("anisotropy", "anisotropy", 3),
    ("rankme", "RankMe", 1),
    ("isoscore_star", "IsoScore*", 4),
    ("participation_ratio", "part. ratio", 2),
    ("alpha_req", "alpha-ReQ", 3),
    ("norm", "norm", 1),
    ("mean_share", "mean share", 3),
    ("cka_to_last", "CKA", 3),
)


ROWS = 30  # checkpoints that a table shows


def print_measured(directory: Path, failed: dict[str, str], as_json: bool) -> None:
    """What probing has found: a row a checkpoint; of a single one its layers too."""
    found, layers = tables.measured(directory), tables.by_layer(directory)
    if as_json:
        print_json(
            {
                "directory": str(directory),
                "checkpoints": found.to_dicts(),
                "layers": layers.to_dicts(),
                "failed": failed,
            }
        )
        return
    if found.is_empty():
        return
    tasks = [name for name in found.columns if "/" in name and not name.startswith("last_")]
    columns = [c for c in SHOWN if c[0] in found.columns] + [(t, t, 3) for t in tasks]
    rows = found.to_dicts()
    if len(rows) > ROWS:
        rows = [*tables.evenly(rows, ROWS)]
        print(f"{len(rows)} of {found.height} checkpoints; all are in the records")
    print_table(
        ("model", "step", *(heading for _, heading, _ in columns)),
        [(row["name"], str(row["step"]), *_digits(row, columns)) for row in rows],
        title="Held-out text: nats per token; the last layer; S of the head in nats",
        keys=2,
    )
    if found.height == 1 and layers.height > 1:
        columns = [c for c in LAYER if c[0] in layers.columns]
        print_table(
            ("layer", *(heading for _, heading, _ in columns)),
            [
                ("last" if row["layer"] == -1 else str(row["layer"]), *_digits(row, columns))
                for row in layers.to_dicts()
            ],
            title="\nHidden states, layer 0 the embedding, last after the final norm",
        )


def _digits(row: dict[str, Any], columns: Iterable[tuple[str, str, int]]) -> list[str]:
    return ["-" if row[key] is None else f"{row[key]:.{digits}f}" for key, _, digits in columns]


def print_verified(
    directory: Path, bad: list[tuple[str, str]], whole: int, mended: bool, as_json: bool
) -> None:
    """Every damaged file."""
    if as_json:
        found = [{"file": file, "what": what} for file, what in bad]
        print_json({"directory": str(directory), "damaged": found, "whole": whole})
        return
    if bad:
        print_table(("file", "is"), bad)
    todo = ""
    if bad:
        again = "the same command makes it anew"
        todo = f"; set aside: {again}" if mended else f"; set it aside with --mend, and {again}"
    print(f"{whole} files whole, {len(bad)} damaged or missing{todo}")
