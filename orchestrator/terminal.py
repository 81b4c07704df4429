"""What the user is shown: tables and JSON, on stdout."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis import ranks, tables
from analysis.ranks import TOLERANCE
from orchestrator import ledger, tracking
from orchestrator.plan import Plan


def print_json(value: Any) -> None:
    """To stdout; NaN and infinity as null, which JSON lacks."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """To stdout, the first column to the left and the others to the right."""
    if title:
        print(title)
    console, table, rows = Console(), Table(box=None, padding=(0, 1, 0, 0)), list(rows)
    if not console.is_terminal:  # a pipe has no width: never fold a row
        console.width = 200
    # On a narrow terminal only names are cut, never numbers.
    numbers = sum(
        max(map(len, column)) + 1 for column in list(zip(headers, *rows, strict=True))[1:]
    )
    for i, header in enumerate(headers):
        if i == 0:
            table.add_column(header, no_wrap=True, max_width=max(8, console.width - numbers - 1))
        else:
            table.add_column(header, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def short(value: float | None, unit: str = "") -> str:
    """1.2k, 3.4M, 5.6G, ...; a dash for nothing."""
    if value is None:
        return "-"
    for scale, letter in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}{unit}"
    return f"{value:.3g}{unit}"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 5 h 12 min, 4 d 6 h."""
    seconds = round(seconds)
    for size, unit, next_size, next_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // next_size} {next_unit}"
    return f"{seconds} s"


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def print_plan(plan: Plan, notices: list[str], as_json: bool) -> None:
    if as_json:
        trials = [asdict(cost) for cost in plan.costs]
        print_json(
            {
                "trials": trials,
                "packs": [asdict(pack) for pack in plan.packs],
                "at_once": plan.at_once,
                "hours": plan.hours,
                "features": plan.features,
                "notices": notices,
            }
        )
        return
    for notice in notices:
        print(f"note: {notice}")
    headers = ("trial", "id", "N", "N-emb", "tokens", "epochs", "FLOPs", "memory", "time")
    rows = [
        (
            c.name,
            c.id,
            short(c.params),
            short(c.params_without_embeddings),
            short(c.tokens),
            short(c.epochs),
            short(c.flops),
            short(c.memory, "B"),
            _clock(c.seconds),
        )
        for c in plan.costs
    ]
    flops, tokens = sum(c.flops for c in plan.costs), sum(c.tokens for c in plan.costs)
    seconds = sum(c.seconds for c in plan.costs)
    total = (
        f"{len(rows)} trials",
        "",
        "",
        "",
        short(tokens),
        "",
        short(flops),
        "",
        _clock(seconds),
    )
    print_table(headers, [*rows, total])
    print(
        f"\n{plan.at_once} at once here: about {duration(plan.hours * 3600)}\n"
        "Estimates; on a CPU within a factor of two for linear heads."
    )
    for pack in plan.packs:
        if len(pack.trials) > 1:
            print(
                f"one pass for {len(pack.trials)} heads: {duration(pack.seconds)}, "
                f"{short(pack.memory, 'B')}; one run a head: {duration(pack.apart)}"
            )
    if plan.features:
        print(f"hidden states kept on disk: {short(plan.features, 'B')}")


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
        _print_losses(losses)
    if backbones is not None:
        _print_ranks(backbones)


def _print_losses(losses: pl.DataFrame) -> None:
    """Held-out loss by size and rank."""
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
        )
        if b.heads["edge"].any():
            print("* the best learning rate is the lowest or highest tried")
        print(f"unigram cross-entropy of the same text: {b.unigram:.3f}")
        for family, r in b.required.items():
            print(f"required rank, {family} heads, gap under {r.tolerance:g}: {_required(r)}")


def _required(r: ranks.Required) -> str:
    def end(rank: int) -> str:
        if rank <= r.at_least:
            return f"{r.at_least} or less"
        return f"more than {r.at_most}" if rank > r.at_most else str(rank)

    answer, low, high = end(r.rank), end(r.low), end(r.high)
    return (
        answer if answer == low == high else f"{answer}, {100 * ranks.LEVEL:.0f} % [{low}, {high}]"
    )


def print_next(sweep: Path, out: Path, tracking_uri: str | None) -> None:
    """Where everything lies, and what to try."""
    option = "" if out == Path("runs") else f" --out {out}"
    drawn = "".join(f"\nfigure    {file}" for file in sorted(sweep.glob("report/*.png")))
    print(
        f"""{drawn}
records   {sweep / "records"}
MLflow    {tracking_uri or tracking.default_uri(out)}

next      lmsat ui{option}
          lmsat status {sweep.name}{option}
          lmsat plan --grid {sweep / "grid.yaml"}"""
    )


def print_status(sweep: Path, as_json: bool) -> None:
    """Every trial of a sweep, and how far it is."""
    latest, entries = tables.latest(sweep), ledger.read(sweep)
    order = [t["id"] for t in json.loads((sweep / "plan.json").read_text())["trials"]]
    order += [id for id in entries if id not in order]  # learning rates added on the way
    rows = [
        {
            "trial": entry["trial"]["name"],
            "id": id,
            "status": entry["status"],
            "step": entry["step"],
            "steps": entry["steps"],
            "loss": latest.get(id, {}).get("loss"),
            "tokens_per_second": latest.get(id, {}).get("tokens_per_second"),
            "error": entry.get("error"),
        }
        for id, entry in ((id, entries[id]) for id in order if id in entries)
    ]
    if as_json:
        print_json({"sweep": str(sweep), "trials": rows})
        return
    headers = ("trial", "id", "status", "step", "held-out loss", "tokens/s")
    table = [
        (
            row["trial"],
            row["id"],
            row["status"],
            f"{row['step']}/{row['steps']}",
            "-" if row["loss"] is None else f"{row['loss']:.3f}",
            short(row["tokens_per_second"]),
        )
        for row in rows
    ]
    print_table(headers, table)
    for row in rows:
        if row["error"]:
            print(f"{row['trial']} {row['status']}: {row['error']}")
