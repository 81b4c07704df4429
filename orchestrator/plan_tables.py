"""How a plan is shown."""

from dataclasses import asdict
from pathlib import Path

from orchestrator.asking import New
from orchestrator.fits import GPU_SHARE
from orchestrator.plan import Cost, Plan
from orchestrator.sizes import Size
from orchestrator.terminal import clock, duration, print_json, print_table, short


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
            clock(c.seconds),
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
        clock(seconds),
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


def print_new(file: Path, new: New, as_json: bool) -> None:
    """What a new grid will cost, and what to type next."""
    tokens = new.grid.trials[0]["train"]["tokens"]
    command = f"lmsat sweep --grid {file}"
    if new.plan is None:
        command = f"lmsat plan --grid {file} --on 8xA100-80G"
    if as_json:
        print_json(
            {
                "file": str(file),
                "trials": len(new.grid.trials),
                "tokens": tokens,
                "at_once": new.plan and new.plan.at_once,
                "seconds": new.plan and 3600 * new.plan.hours,
                "unfit": new.unfit or None,
                "notices": new.grid.notices,
                "next": command,
            }
        )
        return
    for notice in new.grid.notices:
        print(f"note: {notice}")
    cost = f"here it cannot run: {new.unfit}"
    if new.plan:
        cost = f"about {duration(3600 * new.plan.hours)} here, {new.plan.at_once} at once"
    print(f"{file}: {len(new.grid.trials)} trials of {short(tokens)} tokens, {cost}")
    print(f"next      {command}")
