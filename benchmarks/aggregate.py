"""Ten million measured values to two tables:  python benchmarks/aggregate.py [ROWS]

A sweep of as many trials as ROWS asks for, 500 steps of 20 metrics each, in ten segments of
parquet a trial as a sweep writes them; one trial in fifty was resumed and has measured fifty steps
twice. The same values again as Ray Tune's result.json, one file of JSON lines a trial. Asked are
the last held-out loss of each trial, and its mean over seeds along training by size and rank:
of records.scan, of pandas on the same parquet (reading what is needed alone, and reading all), and
of pandas on the result.json files. Each in a process of its own, once to warm up and three times
for the median, with as many threads as there are cores. Told are seconds and peak memory. Checked:
all say the same to 1e-12.
"""

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

ROWS = 10_000_000
SIZES, RANKS = [8, 16, 32, 64, 128], [2, 4, 8, 16, None]
STEPS, SEGMENTS, REPEATS = 500, 10, 3
METRICS = [
    *(("train", m, None) for m in ("loss", "gradient_norm", "learning_rate")),
    *(("held_out", m, None) for m in ("loss", "perplexity", "accuracy", "entropy")),
    *(("held_out", "anisotropy", layer) for layer in range(7)),
    *(("", m, -1) for m in ("singular_entropy", "stable_rank", "effective_rank")),
    *(("", m, None) for m in ("tokens_per_second", "peak_memory", "probe_seconds")),
]
LOSS = METRICS.index(("held_out", "loss", None))


def make(home: Path, rows: int) -> None:
    """The trials of home/sweep, and of home/tune."""
    import polars as pl

    from analysis import records

    each = STEPS * len(METRICS)
    cells = itertools.product(range(rows // each), SIZES, RANKS)
    for number, (seed, d, rank) in enumerate(itertools.islice(cells, rows // each)):
        trial, name = f"{number:012x}", f"nano-{d}"
        rng = np.random.default_rng(number)
        values = 2 + np.exp(rng.normal(0, 0.1, (STEPS, len(METRICS))))
        segments = [range(at, at + STEPS // SEGMENTS) for at in range(0, STEPS, STEPS // SEGMENTS)]
        if number % 50 == 0:
            at = segments[4].start
            segments.insert(4, range(at - 1, at + STEPS // SEGMENTS - 1))
        row = {"trial": trial, "size": name, "d": d, "rank": rank, "seed": seed, "status": "done"}
        records.write(home / "sweep", "trials", trial, STEPS, [row])
        folder, kept = home / "tune" / trial, home / "sweep" / "records" / "scalars" / trial
        folder.mkdir(parents=True)
        kept.mkdir(parents=True)
        with (folder / "result.json").open("w") as file:
            for order, steps in enumerate(segments):
                final = order == len(segments) - 1 or steps.stop <= segments[order + 1].start
                # What was measured again after a crash counts.
                now = values[steps] if final else values[steps] + 1
                frame = _frame(trial, np.array(steps), now)
                frame.select(list(records.TABLES["scalars"])).write_parquet(
                    kept / f"{steps.stop:012d}.parquet"
                )
                for step, line in zip(steps, now.tolist(), strict=True):
                    _line(file, trial, step, line, {"size": name, "rank": rank, "seed": seed})
    files = records.files(home / "sweep", "scalars")
    held = pl.scan_parquet(files).select(pl.len()).collect().item()
    print(
        f"{held:,} rows of {number + 1:,} trials: {_size(files)} of parquet in {len(files):,} "
        f"files, {_size((home / 'tune').rglob('*.json'))} of result.json",
        flush=True,
    )


def _frame(trial: str, steps: Any, values: Any) -> Any:
    import polars as pl

    from analysis import records

    split, metric, layer = (list(column) * len(steps) for column in zip(*METRICS, strict=True))
    at = steps.repeat(len(METRICS))
    columns = {"step": at, "tokens": at * 4096, "split": split, "metric": metric, "layer": layer}
    columns |= {"value": values.ravel(), "stderr": values.ravel() / 100, "time": 1_700_000 + at}
    frame = pl.DataFrame(columns).with_columns(trial=pl.lit(trial))
    return frame.cast(records.TABLES["scalars"])  # type: ignore[arg-type]


def _line(file: Any, trial: str, step: int, values: list[float], config: dict[str, Any]) -> None:
    """As Tune's JsonLoggerCallback: what was reported, and what Tune adds to it."""
    result: dict[str, Any] = {"step": step}
    for (split, metric, layer), value in zip(METRICS, values, strict=True):
        result["/".join(str(x) for x in (split or "model", metric, layer) if x is not None)] = value
    result |= {
        "timestamp": 1_700_000_000 + step,
        "checkpoint_dir_name": None,
        "done": step == STEPS - 1,
        "training_iteration": step + 1,
        "trial_id": trial[-8:],
        "date": "2026-01-01_00-00-00",
        "time_this_iter_s": 0.123456789,
        "time_total_s": 0.123456789 * step,
        "pid": 4242,
        "hostname": "node",
        "node_ip": "10.0.0.1",
        "config": config,
        "time_since_restore": 0.123456789 * step,
        "iterations_since_restore": step + 1,
        "experiment_tag": f"0_rank={config['rank']},seed={config['seed']},size={config['size']}",
    }
    file.write(json.dumps(result) + "\n")


def _size(files: Any) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.0f} MB"


Found = tuple[dict[str, float], dict[str, float]]


def of_records(home: Path) -> Found:
    import polars as pl

    from analysis import records

    sweep = home / "sweep"
    losses = records.scan(sweep, "scalars").filter(split="held_out", metric="loss")
    trials = records.scan(sweep, "trials").select("trial", "size", pl.col("rank").fill_null(0))
    rows = losses.select("trial", "step", "value").join(trials, on="trial").collect()
    last = rows.sort("step").group_by("trial").last()
    curve = rows.group_by("size", "rank", "step").agg(pl.col("value").mean())
    names = curve.select(pl.concat_str("size", "rank", "step", separator=" ")).to_series()
    return (
        dict(zip(last["trial"], last["value"], strict=True)),
        dict(zip(names, curve["value"], strict=True)),
    )


def of_parquet(home: Path) -> Found:
    import pandas as pd

    rows = pd.read_parquet(
        home / "sweep" / "records" / "scalars",
        columns=["trial", "step", "value"],
        filters=[("split", "==", "held_out"), ("metric", "==", "loss")],
    ).drop_duplicates(["trial", "step"], keep="last")
    return _aggregate(rows, _trials(home))


def of_whole_parquet(home: Path) -> Found:
    import pandas as pd

    rows = pd.read_parquet(home / "sweep" / "records" / "scalars")
    rows = rows.drop_duplicates(["trial", "step", "split", "metric", "layer"], keep="last")
    rows = rows[(rows["split"] == "held_out") & (rows["metric"] == "loss")]
    return _aggregate(rows, _trials(home))


def of_json(home: Path) -> Found:
    import pandas as pd

    frames, trials = [], []
    for file in sorted((home / "tune").glob("*/result.json")):
        rows = pd.read_json(file, lines=True)
        config = {"rank": None, **rows["config"].iloc[0]}
        trials.append({"trial": file.parent.name, **config})
        rows = rows[["step", "held_out/loss"]].drop_duplicates("step", keep="last")
        frames.append(
            rows.rename(columns={"held_out/loss": "value"}).assign(trial=trials[-1]["trial"])
        )
    return _aggregate(pd.concat(frames), pd.DataFrame(trials))


def _trials(home: Path) -> "pd.DataFrame":
    import pandas as pd

    table = home / "sweep" / "records" / "trials"
    return pd.read_parquet(table, columns=["trial", "size", "rank"])


def _aggregate(rows: "pd.DataFrame", trials: "pd.DataFrame") -> Found:
    last = rows.sort_values("step").groupby("trial")["value"].last()
    trials = trials.assign(rank=trials["rank"].fillna(0).astype(int))
    merged = rows.merge(trials, on="trial")
    curve = merged.groupby(["size", "rank", "step"], as_index=False)["value"].mean()
    names = (f"{size} {rank} {step}" for size, rank, step, _ in curve.to_numpy())
    return (
        {str(trial): loss for trial, loss in last.items()},
        dict(zip(names, curve["value"], strict=True)),
    )


WAYS: dict[str, Callable[[Path], Found]] = {
    "records.scan": of_records,
    "pandas, parquet": of_parquet,
    "pandas, all of the parquet": of_whole_parquet,
    "pandas, result.json": of_json,
}


def one(way: str, home: Path) -> None:
    """What it found, and below it the median of its seconds, and its peak memory in MB."""
    took = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        found = WAYS[way](home)
        took.append(time.perf_counter() - began)
    print(json.dumps([*found, statistics.median(took[1:]), _peak()]))


def _peak() -> float:
    """MB; getrusage's own takes in those of who started this process."""
    said = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(said[1]) / 1e3 if said else float("nan")


def main() -> None:
    rows = int(sys.argv[1]) if sys.argv[1:] else ROWS
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make(home, rows)
        print(f"{os.cpu_count()} threads", flush=True)
        kept: list[Any] = []
        for way in WAYS:
            command = [sys.executable, __file__, "--one", way, folder]
            said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            *found, seconds, peak = json.loads(said)
            kept = kept or [*found, seconds]
            for ours, theirs in zip(kept, found, strict=False):
                assert ours.keys() == theirs.keys(), f"{len(ours)} and {len(theirs)} of {way}"
                worst = max(abs(ours[key] - theirs[key]) for key in ours)
                assert worst <= 1e-12, f"{way} differs by {worst}"
            print(
                f"{way:28} {seconds:7.2f} s {seconds / kept[2]:6.1f}x {peak:7,.0f} MB", flush=True
            )
    print(f"the same {len(kept[0]):,} losses and {len(kept[1]):,} points of curves, to 1e-12")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
