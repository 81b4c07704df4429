"""Run a grid: the only module that knows Ray.

Ray Tune decides what runs where; the ledger decides what runs at all. Workers write records and
checkpoints themselves, so the driver may die at any time.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.util.scheduling_strategies
import yaml
from ray import tune

from analysis import atomic, bound_figures, figures, ranks, tables, trajectories
from analysis.errors import BadInput
from orchestrator import ledger, plan, search, tracking
from orchestrator.driver import Driver, Preparing, Watcher
from orchestrator.grid import Grid, blame, numbered
from trainables import corpus

RETRIES = 2  # of a trial whose worker raised or was killed


def run(
    grid: Grid, out: Path, tracking_uri: str | None, cache: Path, watcher: Watcher
) -> dict[str, dict[str, Any]]:
    """Train what is not finished yet; the ledger's entries, by trial id.

    Raises BadInput before anything is started or written where the grid cannot run here.
    """
    sweep, uri = out.resolve() / grid.name, tracking.resolve(tracking_uri, out)
    _check_same(grid, sweep)
    plan.plan(grid, cache)
    with blame(grid.path):
        _check_text(grid, cache, watcher)
    planned = plan.plan(grid, cache)  # again: the epochs are known now
    if planned.features:
        watcher.preparing(f"hidden states go to {cache}: {planned.features / 1e9:.2f} GB")
    ledger.make(sweep, out)
    with ledger.driving(sweep):
        _keep(grid, planned.costs, sweep)
        watcher.preparing("opening MLflow")
        tracker = tracking.Tracker(uri, sweep, grid.name)
        tracker.describe(_note(grid, sweep), _hash(grid))
        driver = Driver(sweep, tracker, watcher)
        driver.add(grid.trials, planned)
        try:
            while True:
                if driver.pending:
                    _tune(driver, cache)
                if driver.pending or not _extend(driver, cache):
                    break
        finally:
            _show(sweep, tracker)
            tracker.close(finished=not driver.pending)
        return driver.entries


def _check_same(grid: Grid, sweep: Path) -> None:
    if not (sweep / "plan.json").is_file():
        return
    before = json.loads((sweep / "plan.json").read_text())
    if {t["id"] for t in before["trials"]} == {t["id"] for t in grid.trials}:
        return
    old, new = dict(tracking.flat(before["grid"])), dict(tracking.flat(grid.raw))
    changes = [
        f"{k} was {old.get(k)}, is {new.get(k)}" for k in old | new if old.get(k) != new.get(k)
    ]
    what = "; ".join(changes) or "the text, a file that the grid names, or lmsat itself"
    raise BadInput(f"{sweep} holds another grid of this name ({what}); give the new one a new name")


def _check_text(grid: Grid, cache: Path, watcher: Watcher) -> None:
    """Tokenise every corpus of the grid, and refuse one too short to train or to judge on."""
    for trial in grid.trials:
        text = corpus.prepare(
            trial["corpus"], trial["tokenizer"], trial["text"], cache, watcher.preparing
        )
        t = trial["train"]
        for split, blocks in (("train", t["batch"]), ("held_out", 3)):
            if corpus.blocks(text.shard(split), t["sequence"]) < blocks:
                raise BadInput(
                    f"corpus: its {split} part has {text.tokens[split]} tokens, fewer than "
                    f"{blocks} sequences of {t['sequence']}"
                )


def _keep(grid: Grid, costs: list[plan.Cost], sweep: Path) -> None:
    kept = {"grid": grid.raw, "trials": [dataclasses.asdict(c) for c in costs]}
    atomic.write_text(sweep / "plan.json", json.dumps(kept, indent=1))
    atomic.write_text(sweep / "grid.yaml", yaml.safe_dump(grid.raw, sort_keys=False))


def _note(grid: Grid, sweep: Path) -> str:
    return (
        f"{len(grid.trials)} trials of grid `{grid.name}`, in `{sweep}`.\n\n"
        f"Go on after a stop: `lmsat sweep --grid {sweep / 'grid.yaml'} --out {sweep.parent}`"
    )


def _hash(grid: Grid) -> str:
    ids = ",".join(sorted(trial["id"] for trial in grid.trials))
    return hashlib.sha256(ids.encode()).hexdigest()[:12]


def _extend(driver: Driver, cache: Path) -> bool:
    """Add trials where the best learning rate of a search lies on the edge of those tried; whether
    there are any."""
    trials = [entry["trial"] for entry in driver.entries.values()]
    more = [
        numbered(trial, rate)
        for trial, rate in search.extended(trials, ranks.selection_losses(driver.sweep))
    ]
    if more:
        driver.watcher.preparing(f"{len(more)} searches have their best rate on the edge: going on")
        driver.add(more, plan.of(more, cache))
    return bool(more)


def _show(sweep: Path, tracker: tracking.Tracker) -> None:
    table = tables.final_losses(sweep)
    if table.height:
        tracker.artifact(figures.loss_vs_rank(table, sweep / "report" / "loss_vs_rank.png"))
        for figure in trajectories.draw(sweep):
            tracker.artifact(figure)
    for backbone in ranks.fitted(sweep):
        path = sweep / "report" / f"ranks_{backbone.name}.png"
        tracker.artifact(figures.ranks(backbone, path))
        points = bound_figures.w_errors(sweep, backbone)
        if points.height:
            path = sweep / "report" / f"werror_{backbone.name}.png"
            tracker.artifact(bound_figures.w_error(backbone, points, path))


def _tune(driver: Driver, cache: Path) -> None:
    """Run the pending trials to their end, or until the user asks to stop."""
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_GLOBAL_CHECKPOINT_S="86400",  # its own state is of no use to us
        RAY_AIR_NEW_OUTPUT="0",
    )
    trials = {i: driver.entries[i]["trial"] for i in driver.pending}
    left = ([id for id in pack if id in trials] for pack in driver.packs)
    packs = [pack for pack in left if pack]
    stop_file = driver.sweep / "stop"
    stop_file.unlink(missing_ok=True)

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        wanted = trials[config["pack"][0]]["resources"]
        return tune.PlacementGroupFactory([{"CPU": wanted["cpus"], "GPU": wanted["gpus"]}])

    with on_ray(driver.watcher) as neutral, _stop_on_signal(stop_file, driver.watcher):
        tune.Tuner(
            tune.with_resources(_work, resources),
            param_space={
                "pack": tune.grid_search(packs),
                "sweep": str(driver.sweep),
                "cache": str(cache.resolve()),
            },
            tune_config=tune.TuneConfig(
                # A destroyed ZeRO-3 engine is not freed.
                reuse_actors=all(t["deepspeed"]["stage"] < 3 for t in trials.values()),
                trial_dirname_creator=lambda trial: trial.config["pack"][0],
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=neutral,
                callbacks=[_Callback(driver)],
                stop=_Stopper(driver, stop_file),
                failure_config=tune.FailureConfig(max_failures=RETRIES),
                verbose=0,
            ),
        ).fit()


@contextlib.contextmanager
def on_ray(watcher: Preparing, address: str | None = None) -> Iterator[str]:
    """Ray, that of the cluster at `address` or RAY_ADDRESS, or else started here where it is not
    running yet; within, the current directory is a neutral one of its own: Ray puts the driver's
    first on its workers' path, and a user's own folder named `analysis` there would be taken for
    ours."""
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_niceness="0",  # workers at Ray's 15 starve beside anything else
    )
    address = address or os.environ.get("RAY_ADDRESS")
    with tempfile.TemporaryDirectory(prefix="lmsat-") as neutral, contextlib.chdir(neutral):
        started_here = not ray.is_initialized()
        if started_here:
            watcher.preparing(f"connecting to {address}" if address else "starting Ray")
            ray.init(
                address=address or "local",  # and not what else may run on this machine
                num_cpus=None if address else plan.cores(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                configure_logging=True,
            )
        try:
            yield neutral
        finally:
            if started_here:
                ray.shutdown()


def fan_out(
    work: Callable[[Any], None],
    ahead: Callable[[Any], None],
    items: list[Any],
    cpus: int,
    gpus: float,
    watcher: Preparing,
) -> Iterator[tuple[int, str | None]]:
    """Do `work` on every item, as many at once as there is room for; (index, error or None) of
    each as it ends. While a worker is at one item it looks `ahead` to one more.

    Raises KeyboardInterrupt on Ctrl-C, but never in the middle of what is done with an answer.
    """
    if not items:
        return
    with on_ray(watcher), _asked_to_stop() as asked:
        have = ray.cluster_resources()
        room = min(have.get("CPU", 1) / cpus, have.get("GPU", 0) / gpus if gpus else len(items))
        hire = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Worker).remote
        waiting = list(range(len(items)))[::-1]
        busy: dict[Any, tuple[Any, int, int | None]] = {}

        def give(worker: Any, index: int) -> None:
            following = waiting.pop() if waiting else None
            then = None if following is None else items[following]
            busy[worker.do.remote(work, items[index], ahead, then)] = (worker, index, following)

        # One for each worker before any is taken ahead.
        for index in [waiting.pop() for _ in range(max(1, min(int(room), len(items))))]:
            give(hire(), index)
        watcher.preparing("measuring")
        while busy:
            ended, _ = ray.wait(list(busy), timeout=0.2)
            if asked:
                raise KeyboardInterrupt
            for done in ended:
                worker, index, following = busy.pop(done)
                try:
                    error = ray.get(done)
                except ray.exceptions.RayError:
                    error, worker = "its worker died", hire()
                yield index, error
                if following is not None or waiting:
                    give(worker, waiting.pop() if following is None else following)


@contextlib.contextmanager
def every_node(
    watcher: Preparing, address: str | None = None, seconds: float = 120
) -> Iterator[Callable[[Callable[[dict[str, float]], Any]], dict[str, Any]]]:
    """What does `work` once on every node, though all its CPUs be taken, and gives the answer by
    node, or the exception; `work` is given what Ray believes the node has. It travels whole with
    its module: the node may have another lmsat, or none.

    Raises ConnectionError where there is no such cluster, or it refuses."""

    def ask(work: Callable[[dict[str, float]], Any]) -> dict[str, Any]:
        module = sys.modules[work.__module__]
        nodes = [node for node in ray.nodes() if node["Alive"]]
        names = [node["NodeName"] for node in nodes]
        waiting, answers = {}, {}
        ray.cloudpickle.register_pickle_by_value(module)
        try:
            for node, name in zip(nodes, names, strict=True):
                id = node["NodeID"]
                there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(id, False)
                task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(work)
                label = name if names.count(name) == 1 else f"{name}/{id[:6]}"
                waiting[label] = task.remote(node["Resources"])
        finally:
            ray.cloudpickle.unregister_pickle_by_value(module)
        until = time.monotonic() + seconds
        for label, task in waiting.items():
            try:
                answers[label] = ray.get(task, timeout=max(0.0, until - time.monotonic()))
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                answers[label] = RuntimeError(lines[-1])
        return answers

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(on_ray(watcher, address))
        except (OSError, RuntimeError, ray.exceptions.RayError) as error:
            raise ConnectionError(" ".join(str(error).split())) from None
        yield ask


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Not empty after Ctrl-C or SIGTERM; a second one raises KeyboardInterrupt at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    with _handling(ask):
        yield asked


class _Worker:
    """A process that does one thing after another."""

    def do(
        self, work: Callable[[Any], None], item: Any, ahead: Callable[[Any], None], then: Any
    ) -> str | None:
        """What went wrong, if anything. What goes wrong ahead will again when its turn comes."""

        def look() -> None:
            with contextlib.suppress(Exception):
                ahead(then)

        thread = threading.Thread(target=look) if then is not None else None
        if thread:
            thread.start()
        try:
            work(item)
        except BadInput as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}".split("\n")[0]
        finally:
            if thread:
                thread.join()
        return None


class _ForThisProcess:
    """Tune pickles what it is given, to restore it one day; we never do."""

    def __reduce__(self) -> Any:
        return (object, ())


class _Callback(_ForThisProcess, tune.Callback):  # type: ignore[misc]
    """Tells the driver what Tune says."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        for id in trial.config["pack"]:
            self.driver.on_start(id)

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any
    ) -> None:
        for news in result["news"]:
            self.driver.on_result(news)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        for id in trial.config["pack"]:
            self.driver.on_end(id)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        for id in trial.config["pack"]:
            self.driver.on_end(id, _last_line(trial.error_file))


class _Stopper(_ForThisProcess, tune.Stopper):  # type: ignore[misc]
    """Ends the sweep once the user has asked for it and every running trial has saved itself."""

    def __init__(self, driver: Driver, stop_file: Path) -> None:
        self.driver, self.stop_file = driver, stop_file

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.stop_file.exists() and not self.driver.active


def _work(config: dict[str, Any]) -> None:
    """One pack, in a Ray worker."""
    from trainables import pretrain, rankfit

    sweep, cache = Path(config["sweep"]), Path(config["cache"])
    trials = [ledger.entry(sweep, id)["trial"] for id in config["pack"]]
    stop = (sweep / "stop").exists

    def report(news: list[dict[str, Any]]) -> None:
        tune.report({"news": news})

    if trials[0]["kind"] == "rankfit":
        outcomes = rankfit.fit(trials, sweep, cache, report, stop)
    else:
        outcomes = {
            trial["id"]: pretrain.train(trial, sweep, cache, lambda one: report([one]), stop)
            for trial in trials
        }
    for id, outcome in outcomes.items():
        if outcome.status in ledger.FINISHED:
            ledger.conclude(sweep, id, outcome.status, outcome.step)


@contextlib.contextmanager
def _stop_on_signal(stop_file: Path, watcher: Watcher) -> Iterator[None]:
    """On the first Ctrl-C or SIGTERM, ask all trials to save and stop; on the second, give up."""

    def ask(number: int, frame: Any) -> None:
        if stop_file.exists():
            raise KeyboardInterrupt
        stop_file.touch()
        watcher.stopping()

    with _handling(ask):
        yield


@contextlib.contextmanager
def _handling(ask: Callable[[int, Any], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM."""
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(error_file: str | None) -> str:
    """Of the worker's traceback: what went wrong."""
    try:
        lines = [line for line in Path(error_file or "").read_text().splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1].strip() if lines else "its worker died"
