"""What runs in Ray's workers: a pack's loop, in one process, or in several under Ray Train."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.queue import Queue

from orchestrator import ledger

News = list[dict[str, Any]]
Report = Callable[[News, str | None], None]  # and the placement group of a team that begins


def alone(config: dict[str, Any], report: Callable[[News], None]) -> None:
    """One pack, in this process, or this process's part of it."""
    from trainables import pretrain, rankfit

    sweep, cache, storage = Path(config["sweep"]), Path(config["cache"]), config["storage"]
    trials = [ledger.entry(sweep, id)["trial"] for id in config["pack"]]
    stop = (sweep / "stop").exists
    if trials[0]["kind"] == "rankfit":
        outcomes = rankfit.fit(trials, sweep, cache, report, stop, storage)
    else:
        outcomes = {
            trial["id"]: pretrain.train(
                trial, sweep, cache, lambda one: report([one]), stop, storage
            )
            for trial in trials
        }
    for id, outcome in outcomes.items():
        if outcome.status in ledger.FINISHED and config["rank"] == 0:
            ledger.conclude(sweep, id, outcome.status, outcome.step)


def together(config: dict[str, Any], wanted: dict[str, Any], scratch: str, report: Report) -> None:
    """One pack on `wanted` resources of several workers, which this process waits for and watches.

    Raises RuntimeError with what the first worker that failed said.
    """
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
