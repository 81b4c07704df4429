"""What the user is shown: tables and JSON, on stdout."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

from analysis import atomic, ranks, sealed, tables
from analysis.ranks import TOLERANCE
from orchestrator import ledger, tracking
from orchestrator.fits import GPU_SHARE
from orchestrator.plan import Cost, Plan
from orchestrator.sizes import Size


def print_json(value: Any) -> None:
    """To stdout; NaN and infinity as null, which JSON lacks."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def write_json(value: Any, path: Path) -> Path:
    """The same to a file."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    atomic.write_text(path, text)
    return path


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


def busy(what: str) -> Status:
    """Says so on a terminal while it lasts."""
    return Console(stderr=True).status(what)


def short(value: float | None, unit: str = "") -> str:
    """1.2k, 3.4M, 5.6G, ...; a dash for nothing."""
    if value is None:
        return "-"
    for scale, letter in (
        (1e21, "Z"),
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
        found = asdict(plan)
        more = {"utilisation": GPU_SHARE if plan.speeds else None, "notices": notices}
        print_json({"trials": found.pop("costs"), **found, **more})
        return
    for notice in notices:
        print(f"note: {notice}")
    spread = any(c.workers > 1 or c.gpus for c in plan.costs)
    gpu = any(c.gpus for c in plan.costs)
    how = ("workers", "stage", "micro-batch") if spread else ()
    memory = "GB a GPU" if gpu else "memory"
    headers = ("trial", "id", "N", "N-emb", "tokens", "epochs", "FLOPs", *how, memory, "time")
    rows = [
        (
            c.name,
            c.id,
            short(c.params),
            short(c.params_without_embeddings),
            short(c.tokens),
            short(c.epochs),
            short(c.flops),
            *(_held(c) if spread else ()),
            _gb(c.memory) if gpu else short(c.memory, "B"),
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
        *("" for _ in how),
        "",
        _clock(seconds),
    )
    print_table(headers, [*rows, total])
    _print_sizes(plan.sizes, gpu)
    where = "here" if plan.place == "this machine" else f"on {plan.place}"
    grown = ", which must grow first" if plan.waits else ""
    print(f"\n{plan.at_once} at once {where}{grown}: about {duration(plan.hours * 3600)}")
    if plan.speeds:
        peaks = " or ".join(f"{speed / 1e12:.4g}" for speed in plan.speeds)
        hours = sum(c.seconds * c.workers * c.gpus for c in plan.costs) / 3600
        print(
            f"{_hours(hours)} GPU-hours at {100 * GPU_SHARE:.0f} % of {peaks} TFLOP/s, which is "
            "assumed; without what GPUs send each other."
        )
    else:
        print("Estimates; on a CPU within a factor of two for linear heads.")
    shares = sorted({round(100 * c.probes / c.seconds) for c in plan.costs})
    print(f"measuring: {' to '.join(map(str, shares[:1] + shares[1:][-1:]))} % of a trial's time")
    for pack in plan.packs:
        if len(pack.trials) > 1:
            print(
                f"one pass for {len(pack.trials)} heads: {duration(pack.seconds)}, "
                f"{short(pack.memory, 'B')}; one run a head: {duration(pack.apart)}"
            )
    if plan.features:
        print(f"hidden states kept on disk: {short(plan.features, 'B')}")


def _held(c: Cost) -> tuple[str, str, str]:
    """How many workers hold the model, and how."""
    offload = "+offload" if c.offload else ""
    return str(c.workers), f"{c.stage}{offload}", str(c.micro_batch or "share")


def _print_sizes(sizes: list[Size], gpu: bool) -> None:
    """What models take by ZeRO's stage."""
    if not sizes:
        return
    each = "GPU" if gpu else "worker"
    print_table(
        ("", "workers", *(f"stage {k}" for k in range(4)), "best", "GB", "hours", "GPU-hours"),
        [
            (
                size.name,
                str(size.workers),
                *(f"{_gb(a)} / {_gb(b)}" for a, b in zip(size.states, size.totals, strict=True)),
                *_best(size),
                _hours(size.hours),
                _hours(size.gpu_hours) if gpu else "-",
            )
            for size in sizes
        ],
        title=f"\nGB on one {each} by ZeRO's stage: model states / all, one sequence at a time.\n"
        "best: the least stage that fits x its largest micro-batch, whatever the grid has chosen",
    )


def _best(size: Size) -> tuple[str, str]:
    if size.best is None or size.best_total is None:
        return "none", "-"
    offload = "+offload" if size.best.offload else ""
    return f"{size.best.stage}{offload} x {size.best.micro_batch}", _gb(size.best_total)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def _gb(size: float) -> str:
    """Bytes as GB: 110, 37.7, 0.23."""
    size /= 1e9
    return f"{size:.0f}" if size >= 100 else f"{size:.1f}" if size >= 1 else f"{size:.2g}"


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
        )
        if b.heads["edge"].any():
            print("* the best learning rate is the lowest or highest tried")
        print(f"unigram cross-entropy of the same text: {b.unigram:.3f}")
        for family, r in b.required.items():
            print(f"required rank, {family} heads, gap under {r.tolerance:g}: {required(r)}")


def required(r: ranks.Required) -> str:
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
    if (sweep / "grid.yaml").exists():
        more = [f"status {sweep.name}{option}", f"plan --grid {sweep / 'grid.yaml'}"]
    else:
        more = [f"figures {sweep.name}{option} --paper"] if (sweep / "probe.json").exists() else []
    if tracking_uri is None:
        more = [f"ui{option}", *more]
    print(drawn)
    print(f"records   {sweep / 'records'}")
    print(f"MLflow    {tracking_uri or tracking.default_uri(out)}")
    if more:
        print("\nnext      " + "\n          ".join(f"lmsat {command}" for command in more))


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
        kept = {round(i * (len(rows) - 1) / (ROWS - 1)) for i in range(ROWS)}
        rows = [row for i, row in enumerate(rows) if i in kept]
        print(f"{len(rows)} of {found.height} checkpoints; all are in the records")
    shown = _fitting(columns, rows)
    if left_out := [heading for _, heading, _ in columns[len(shown) :]]:
        print(f"not shown on so narrow a terminal: {', '.join(left_out)}")
    print_table(
        ("model", "step", *(heading for _, heading, _ in shown)),
        [(row["name"], str(row["step"]), *_digits(row, shown)) for row in rows],
        title="Held-out text: nats per token; the last layer; S of the head in nats",
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


def _fitting(
    columns: list[tuple[str, str, int]], rows: list[dict[str, Any]]
) -> list[tuple[str, str, int]]:
    """As many as fit into the terminal beside a model's name and a step."""
    console = Console()
    if not console.is_terminal:
        return columns
    cells = [[_digits(row, [column])[0] for row in rows] for column in columns]
    widths = [1 + max(map(len, (c[1], *own))) for c, own in zip(columns, cells, strict=True)]
    beside = 10 + max(len(str(row["step"])) + 1 for row in rows)
    return [c for i, c in enumerate(columns) if beside + sum(widths[: i + 1]) <= console.width]


def _digits(row: dict[str, Any], columns: Iterable[tuple[str, str, int]]) -> list[str]:
    return ["-" if row[key] is None else f"{row[key]:.{digits}f}" for key, _, digits in columns]


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


def print_status(sweep: Path, as_json: bool) -> None:
    """Every trial of a sweep, and how far it is."""
    latest, entries = tables.latest(sweep), ledger.read(sweep)
    order = [t["id"] for t in sealed.read(sweep / "plan.json")["trials"]]
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
