"""Run a grid: Ray Tune decides what runs where, the ledger what runs at all.

Workers write records and checkpoints themselves, so the driver may die at any time.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import fsspec
import ray
import yaml
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.trainable import wrap_function

from analysis import atomic, sealed
from analysis.errors import BadInput, Failed, blame, full, one_line
from orchestrator import cluster, integrity, lease, ledger, place, plan, search, team, tracking
from orchestrator.driver import Driver, Watcher, last_line
from orchestrator.grid import Grid, numbered
from orchestrator.place import Place
from orchestrator.tracker import Tracker
from trainables import corpus


def run(
    grid: Grid,
    out: Path,
    tracking_uri: str | None,
    cache: Path,
    watcher: Watcher,
    address: str | None = None,
    checkpoints: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Train what is not finished yet; the ledger's entries, by trial id.

    On the cluster at `address` or RAY_ADDRESS, else on a Ray of this machine; checkpoints go to a
    folder or an fsspec URL of their own, else into the sweep's directory.
    Raises BadInput before anything is started or written where the grid cannot run there; Failed
    where the sweep cannot go on, for want of room on a disk or of the hold on it.
    """
    out, cache = out.resolve(), cache.resolve()
    sweep, uri = out / grid.name, tracking.resolve(tracking_uri, out)
    if checkpoints and "://" in checkpoints:
        tracking.check_secrets("--checkpoints", checkpoints)
    elif checkpoints:
        checkpoints = str(Path(checkpoints).resolve())  # on Ray the current directory is another
    _check_same(grid, sweep)
    with contextlib.ExitStack() as stack:
        if cluster.address(address):
            stack.enter_context(cluster.on_ray(watcher, address))
            there = cluster.here()
            teams = any(t["resources"]["workers"] > 1 for t in grid.trials)
            if teams and not cluster.has_head():
                raise BadInput("; ".join(cluster.HEADLESS))
        else:
            there = place.here()
        plan.plan(grid, cache, there)
        with blame(grid.path):
            _check_text(grid, cache, watcher)
        planned = plan.plan(grid, cache, there)  # again: the epochs are known now
        if planned.features:
            watcher.preparing(f"hidden states go to {cache}: {planned.features / 1e9:.2f} GB")
        storage = _storage(checkpoints, sweep)
        ledger.make(sweep, out)
        holding = stack.enter_context(lease.hold(sweep))
        integrity.mend(sweep, False, watcher.warned)
        _keep(grid, planned.costs, storage, sweep)
        watcher.preparing("opening MLflow")
        tracker = Tracker(uri, sweep, watcher, _note(grid, sweep), _hash(grid))
        driver = Driver(sweep, tracker, watcher, cache)
        driver.add(grid.trials, planned)
        try:
            while True:
                while driver.waiting and not driver.stopped:
                    _tune(driver, holding, cache, storage, there)
                if driver.pending or not _extend(driver, cache, there):
                    break
        finally:
            if not holding.lost.is_set():
                try:
                    _show(sweep, watcher)
                finally:
                    tracker.close()
        return driver.entries


def _storage(wanted: str | None, sweep: Path) -> str | None:
    """Where checkpoints go, and went before. Raises BadInput where that changes, or nothing can be
    written there."""
    place = wanted
    if (sweep / "plan.json").is_file():
        place = sealed.read(sweep / "plan.json").get("checkpoints")
        if wanted and wanted != place:
            raise BadInput(
                f"--checkpoints: those of {sweep} are in {place or 'its own directory'}; "
                "leave the option out"
            )
    if place:
        _check_writable(place)
    return place


def _check_writable(place: str) -> None:
    try:
        files, folder = fsspec.url_to_fs(place)
        files.makedirs(folder, exist_ok=True)
        files.pipe_file(f"{folder}/.lmsat", b"written to see whether that can be done")
        files.rm_file(f"{folder}/.lmsat")
    except Exception as error:  # each store has its own
        said = one_line(error)
        raise BadInput(f"--checkpoints: cannot write to {place}: {said}") from None


def _check_same(grid: Grid, sweep: Path) -> None:
    if not (sweep / "plan.json").is_file():
        return
    before = sealed.read(sweep / "plan.json")
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


def _keep(grid: Grid, costs: list[plan.Cost], storage: str | None, sweep: Path) -> None:
    trials = [dataclasses.asdict(c) for c in costs]
    kept = {"grid": grid.raw, "checkpoints": storage, "trials": trials}
    sealed.write(sweep / "plan.json", kept)
    atomic.write_text(sweep / "grid.yaml", yaml.safe_dump(grid.raw, sort_keys=False))


def _note(grid: Grid, sweep: Path) -> str:
    asked = yaml.safe_dump({k: v for k, v in grid.raw.items() if k != "name"}, sort_keys=False)
    if len(asked) > 2000:
        asked = f"{asked[:2000]}\n# and so on: grid.yaml\n"
    return (
        f"{len(grid.trials)} trials of the grid `{grid.name}`, a run each.\n\n"
        f"```yaml\n{asked}```\n\n"
        f"- Go on after a stop: `lmsat sweep --grid {sweep / 'grid.yaml'} --out {sweep.parent}`\n"
        f"- Report: `{sweep / 'report'}`, made anew by `lmsat report {sweep}`\n"
        f"- Records, as parquet: `{sweep / 'records'}`\n"
        f"- Weights: `{sweep / 'trials'}/<id>/model`\n"
    )


def _hash(grid: Grid) -> str:
    ids = ",".join(sorted(trial["id"] for trial in grid.trials))
    return hashlib.sha256(ids.encode()).hexdigest()[:12]


def _extend(driver: Driver, cache: Path, there: Place) -> bool:
    """Add trials where the best learning rate of a search lies on the edge of those tried; whether
    there are any."""
    from analysis import ranks

    trials = [entry["trial"] for entry in driver.entries.values()]
    more = [
        numbered(trial, rate)
        for trial, rate in search.extended(trials, ranks.selection_losses(driver.sweep))
    ]
    if more:
        driver.watcher.preparing(f"{len(more)} searches have their best rate on the edge: going on")
        driver.add(more, plan.of(more, cache, there))
    return bool(more)


def _show(sweep: Path, watcher: Watcher) -> None:
    """Draw what was found; what was trained does not end with a page that cannot be made."""
    from analysis import evidence, report

    watcher.preparing("the report")
    try:
        report.write(report.make(evidence.gather([sweep])), sweep / "report", ("png", "svg"))
    except Exception as error:
        if full(error):
            raise
        watcher.warned(f"no report ({one_line(error)}); `lmsat report {sweep}` tries again")


def _tune(
    driver: Driver, holding: lease.Lease, cache: Path, storage: str | None, there: Place
) -> None:
    """Run the waiting trials to their end, or until the user asks to stop."""
    waiting = set(driver.waiting)
    left = ([id for id in pack if id in waiting] for pack in driver.packs)
    packs = [pack for pack in left if pack]
    trials = [driver.entries[pack[0]]["trial"] for pack in packs]
    needs = [trial["resources"] for trial in trials]
    # A cluster grows by those that wait; where they differ, one kind must not bar the way.
    alike = all(n == needs[0] for n in needs)
    room = place.at_once(there, **needs[0])[1] if alike else 200
    os.environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_GLOBAL_CHECKPOINT_S="86400",  # its own state is of no use to us
        TUNE_MAX_PENDING_TRIALS_PG=str(max(1, room)),
        RAY_AIR_NEW_OUTPUT="0",
        TUNE_PRINT_ALL_TRIAL_ERRORS="0",  # they are kept, and told in one line
    )
    stop_file = driver.sweep / "stop"
    stop_file.unlink(missing_ok=True)

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        wanted = config["resources"]
        if wanted["workers"] == 1:
            return tune.PlacementGroupFactory([{"CPU": wanted["cpus"], "GPU": wanted["gpus"]}])
        # This is who waits for the workers: on the head, which stays, and no more of them than
        # there can be teams.
        _, teams = place.at_once(there, **wanted)
        return tune.PlacementGroupFactory([{cluster.HEAD: math.floor(1e4 / teams) / 1e4}])

    with cluster.on_ray(driver.watcher) as neutral, _stop_on_signal(stop_file, driver.watcher):
        tuner = tune.Tuner(
            tune.with_resources(_Trial, resources),
            param_space={
                "sweep": str(driver.sweep),
                "cache": str(cache),
                "storage": storage,
                "lease": holding.number,
            },
            tune_config=tune.TuneConfig(
                search_alg=_Packs(packs, needs),
                num_samples=len(packs),
                scheduler=_InTurn(),
                # A destroyed ZeRO-3 engine is not freed; and who waits for workers in vain
                # is stopped by its end alone.
                reuse_actors=all(
                    t["deepspeed"]["stage"] < 3 and t["resources"]["workers"] == 1 for t in trials
                ),
                trial_dirname_creator=lambda trial: trial.config["pack"][0],
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=neutral,
                callbacks=[_Callback(driver)],
                stop=_Stopper(driver, holding, stop_file),
                failure_config=tune.FailureConfig(max(t["retries"] for t in trials)),
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except Exception as error:
            if why := full(error):
                raise Failed(why) from None
            # Tune knows no retry where Ray ends workers because their machine's memory is full.
            if not isinstance(error.__cause__, ray.exceptions.OutOfMemoryError):
                raise
            driver.on_lost(str(error.__cause__).splitlines()[0])
    if holding.lost.is_set():
        raise Failed(f"{driver.sweep}: another `lmsat` has taken it over, and goes on with it")
    if driver.full:
        raise Failed(driver.full)
    driver.stopped = stop_file.exists()


class _ForThisProcess:
    """Tune pickles what it is given, to restore it one day; we never do."""

    def __reduce__(self) -> Any:
        return (object, ())


class _Packs(_ForThisProcess, tune.search.Searcher):  # type: ignore[misc]
    """Hands out one pack after another: a grid search copies the list of all for each of them, and
    makes every trial at the start."""

    def __init__(self, packs: list[list[str]], needs: list[dict[str, Any]]) -> None:
        super().__init__()
        self.left = zip(packs, needs, strict=True)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        pack, resources = next(self.left)
        return {"pack": pack, "resources": resources}

    def on_trial_complete(self, *_: Any, **__: Any) -> None: ...

    def save(self, checkpoint_path: str) -> None: ...

    def restore(self, checkpoint_path: str) -> None: ...


class _InTurn(_ForThisProcess, tune.schedulers.FIFOScheduler):  # type: ignore[misc]
    """First in, first out. Tune's own looks at every trial there has been, at every step; and Tune
    keeps 28 kB of each, which would be of use to who restores it."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[Any] = []

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.left.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        self.left = [trial for trial in self.left if not trial.is_finished()]
        return next((trial for trial in self.left if trial.status == trial.PENDING), None)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        """Forget those that ended before it."""
        trials, ended = tune_controller.get_trials(), tune_controller._stopped_trials
        trials[:] = [other for other in trials if other not in ended]
        tune_controller._trials_to_cache -= ended
        ended.clear()


class _Callback(_ForThisProcess, TrialProgressCallback):  # type: ignore[misc]
    """Tells the driver what Tune says, and Tune how often to try again; in the place of a callback
    of Tune's own, which would keep every trial."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.groups: dict[str, str] = {}  # of teams at work

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        for id in trial.config["pack"]:
            self.driver.on_start(id)
            trial.max_failures = self.driver.entries[id]["trial"]["retries"]

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any
    ) -> None:
        if result["group"]:
            self.groups[trial.trial_id] = result["group"]
        for news in result["news"]:
            if self.driver.on_result(news):
                # Machines come and go: what fails after it got further has not used up a retry.
                trial.run_metadata.num_failures = 0

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._free(trial)
        self.driver.on_failure(trial.config["pack"], _failure(trial.error_file))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        for id in trial.config["pack"]:
            self.driver.on_end(id)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """It failed too often; or before it began, which Tune itself never tries again."""
        self._free(trial)
        pack, failure = trial.config["pack"], _failure(trial.error_file)
        self.driver.on_failure(pack, failure)
        for id in pack:
            if trial.num_failures > trial.max_failures or not self.driver.again(id):
                self.driver.on_end(id, last_line(failure))

    def _free(self, trial: Any) -> None:
        """A team's room outlives who waited for it, where there is no dashboard for Train's own
        cleaner to ask (ray#54305)."""
        if group := self.groups.pop(trial.trial_id, None):
            cluster.free(group)


class _Stopper(_ForThisProcess, tune.Stopper):  # type: ignore[misc]
    """Ends the sweep once the user has asked for it and every running trial has saved itself; or
    at once when another driver has it."""

    def __init__(self, driver: Driver, holding: lease.Lease, stop_file: Path) -> None:
        self.driver, self.holding, self.stop_file = driver, holding, stop_file

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self.holding.lost.is_set():
            return True
        return self.stop_file.exists() and not self.driver.active


def _work(config: dict[str, Any]) -> None:
    """One pack, in a Tune trial."""

    def report(news: team.News, group: str | None = None) -> None:
        tune.report({"news": news, "group": group})

    wanted = config["resources"]
    if wanted["workers"] == 1:
        team.alone({**config, "rank": 0}, report)
    else:
        team.together(config, wanted, str(Path.cwd()), report)


class _Trial(wrap_function(_work)):  # type: ignore[misc]
    """`_work` in a process that heeds SIGTERM."""

    def setup(self, config: dict[str, Any]) -> None:
        team.heed()
        super().setup(config)


@contextlib.contextmanager
def _stop_on_signal(stop_file: Path, watcher: Watcher) -> Iterator[None]:
    """On the first Ctrl-C or SIGTERM, ask all trials to save and stop; on the second, give up."""

    def ask(number: int, frame: Any) -> None:
        if stop_file.exists():
            raise KeyboardInterrupt
        stop_file.touch()
        watcher.stopping()

    with cluster.handling(ask):
        yield


def _failure(error_file: str | None) -> str:
    """The last failure that Tune has noted: the worker's traceback, or what Ray says of its end."""
    try:
        text = Path(error_file or "").read_text()
    except OSError:
        return ""
    return click.unstyle(re.split(r"^Failure # .*$", text, flags=re.M)[-1])
