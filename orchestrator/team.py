"""What runs in Ray's workers: a pack's loop, in one process, or in several under Ray Train."""

import logging
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.util.queue import Queue

from orchestrator import lease, ledger

LOOK = 0.25  # seconds between looks at what others say: a shared folder is slow
News = list[dict[str, Any]]
Report = Callable[[News, str | None], None]  # and the placement group of a team that begins


_told = threading.Event()


def heed() -> None:
    """Take SIGTERM for a notice to save and end, where Ray would end the process at once. To be
    called in the main thread; the work is in another."""
    signal.signal(signal.SIGTERM, lambda number, frame: _told.set())


def alone(config: dict[str, Any], report: Callable[[News], None]) -> None:
    """One pack, in this process, or this process's part of it.

    Raises RuntimeError where the process was told to end, after all was saved, and where another
    driver has taken the sweep over.
    """
    from trainables import pretrain, rankfit

    sweep, cache, storage = Path(config["sweep"]), Path(config["cache"]), config["storage"]
    trials = [ledger.entry(sweep, id)["trial"] for id in config["pack"]]
    asked, first = _Asked(sweep, config["lease"]), config["rank"] == 0
    log, voice = logging.getLogger("trainables"), _Voice(config["pack"][0], report)
    if first:
        log.addHandler(voice)
    try:
        if trials[0]["kind"] == "rankfit":
            outcomes = rankfit.fit(trials, sweep, cache, report, asked.stop, storage, asked.leaving)
        else:
            outcomes = {
                trial["id"]: pretrain.train(
                    trial,
                    sweep,
                    cache,
                    lambda one: report([one]),
                    asked.stop,
                    storage,
                    asked.leaving,
                )
                for trial in trials
            }
    finally:
        log.removeHandler(voice)
    for id, outcome in outcomes.items():
        if outcome.status in ledger.FINISHED and first:
            ledger.conclude(sweep, id, outcome.status, outcome.step, outcome.files)
    if _told.is_set() and any(outcome.status == "stopped" for outcome in outcomes.values()):
        raise RuntimeError("told to end by SIGTERM, and saved")


class _Asked:
    """What the sweep's driver, Ray and the machine want of this process; looked up now and then."""

    def __init__(self, sweep: Path, lease: int) -> None:
        self.sweep, self.lease = sweep, lease
        self.looked = -LOOK
        self.stopping = self.machine_leaves = False

    def stop(self) -> bool:
        self._look()
        return self.stopping or _told.is_set()

    def leaving(self) -> bool:
        return self.machine_leaves

    def _look(self) -> None:
        if time.monotonic() - self.looked < LOOK:
            return
        if lease.overtaken(self.sweep, self.lease):
            raise RuntimeError("another driver has taken this sweep over")
        self.stopping = (self.sweep / "stop").exists()
        # No public interface tells it outside Ray Train, whose own looks there too.
        leaving = ray._private.state.state.get_draining_nodes()
        self.machine_leaves = ray.get_runtime_context().get_node_id() in leaving
        self.looked = time.monotonic()


class _Voice(logging.Handler):
    """What trainables warn of, for whoever watches."""

    def __init__(self, trial: str, report: Callable[[News], None]) -> None:
        super().__init__(logging.WARNING)
        self.trial, self.report = trial, report

    def emit(self, record: logging.LogRecord) -> None:
        self.report([{"trial": self.trial, "warning": record.getMessage()}])


def together(config: dict[str, Any], wanted: dict[str, Any], scratch: str, report: Report) -> None:
    """One pack on `wanted` resources of several workers, which this process waits for and watches.

    Raises RuntimeError with what the first worker that failed said.
    """
    import ray.train.torch  # which loads torch: the driver has no other use for it

    # Not by ray.train.report, which every worker would have to join each time.
    news = Queue(actor_options={"num_cpus": 0})
    trainer = ray.train.torch.TorchTrainer(
        _member,
        train_loop_config={**config, "news": news},
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if wanted["gpus"] else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=wanted["workers"],
            use_gpu=wanted["gpus"] > 0,
            resources_per_worker={"CPU": wanted["cpus"], "GPU": wanted["gpus"]},
        ),
        # A machine announced as leaving costs no retry; all else is Tune's to try again.
        run_config=ray.train.RunConfig(
            name=config["pack"][0],
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
    )
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failures.append(error)

    fitting, begun = threading.Thread(target=fit, daemon=True), False
    stop = Path(config["sweep"]) / "stop"
    fitting.start()
    while fitting.is_alive() or news.size():
        try:
            said = news.get(timeout=0.5)
        except queue.Empty:
            if stop.exists() and not begun:
                return  # nobody has begun, for want of room: there is nothing to save
            continue
        begun = True
        report(*((said, None) if isinstance(said, list) else ([], said)))
    if failures:
        raise RuntimeError(_first(failures[0])) from None


def _member(config: dict[str, Any]) -> None:
    """The part of one worker of several."""
    ray.get_runtime_context().current_actor.execute.remote(heed)
    rank, news = ray.train.get_context().get_world_rank(), config.pop("news")
    if rank == 0:
        news.put(ray.util.get_current_placement_group().id.hex())
    alone({**config, "rank": rank}, news.put)


def _first(error: Exception) -> str:
    """Of a failed training: the last line of its first worker that says anything."""
    failures = getattr(error, "worker_failures", {})
    found = next((failures[rank] for rank in sorted(failures)), error)
    lines = [line.strip() for line in str(found).splitlines() if line.strip()]
    return lines[-1] if lines else "its workers died"
