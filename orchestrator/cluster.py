"""Ray itself: join a cluster or start one here, what it has, and work handed out over it."""

import collections
import contextlib
import dataclasses
import gc
import itertools
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.util.scheduling_strategies
from ray.util.placement_group import PlacementGroup

from analysis.errors import BadInput, Failed, full, one_line
from orchestrator import place
from orchestrator.driver import Preparing
from orchestrator.place import Node, Place

HEAD = "head"  # the resource, 1 on a cluster's head, of who waits for several workers
HEADLESS = (  # what is wrong without it, and what to do
    "resources.workers: the cluster's head lacks the resource `head`",
    f"start it with ray start --head --resources='{{\"{HEAD}\": 1}}'",
)
BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # where `ray up` puts its file, on the head


class Unreachable(BadInput):
    """There is no such cluster, or it refuses."""


def address(given: str | None) -> str | None:
    """Of the cluster to join, by an option or by RAY_ADDRESS; None: start one here."""
    return given or os.environ.get("RAY_ADDRESS") or None


def closed(address: str) -> str | None:
    """Why nothing can be sent to HOST:PORT or ray://HOST:PORT, if so. Ray itself asks for
    fourteen minutes.

    Raises BadInput where it is no such address."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise BadInput(f"--address: HOST:PORT or ray://HOST:PORT, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


@contextlib.contextmanager
def on_ray(watcher: Preparing, at: str | None = None) -> Iterator[str]:
    """Ray, that of the cluster at `at` or RAY_ADDRESS, or else started here where it is not
    running yet; within, the current directory is a neutral one of its own: Ray puts the driver's
    first on its workers' path, and a user's own folder named `analysis` there would be taken for
    ours.

    Raises Unreachable; Failed where none comes up here.
    """
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_niceness="0",  # workers at Ray's 15 starve beside anything else
    )
    at = address(at)
    if at and ":" in at and not ray.is_initialized() and (why := closed(at)):
        raise Unreachable(f"no cluster at {at}: {why}")
    with tempfile.TemporaryDirectory(prefix="lmsat-") as neutral, contextlib.chdir(neutral):
        started_here = not ray.is_initialized()
        if started_here:
            if at:
                _join(at, watcher)
            else:
                _start(watcher)
        try:
            yield neutral
        finally:
            if started_here:
                # A reference to one of Ray's objects that another thread finds to be garbage while
                # Ray shuts down ends this process, with exit code 1.
                gc.collect()
                ray.shutdown()


def _join(at: str, watcher: Preparing) -> None:
    watcher.preparing(f"connecting to {at}")
    try:
        _init(address=at)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise Unreachable(f"the cluster at {at} refuses: {one_line(error)}") from None


def _start(watcher: Preparing) -> None:
    """Ray dies where its helpers take more than 15 s to load, as on a busy machine they may: then
    again (github.com/ray-project/ray/issues/65983)."""
    _token()
    for again in ("", " again", " for the third time"):
        watcher.preparing(f"starting Ray{again}")
        before = {*psutil.Process().children(recursive=True)}
        try:
            # "local", and not what else may run on this machine.
            _init(address="local", num_cpus=place.cores(), resources={HEAD: 1})
        except Exception as error:  # of no kind of its own
            failed = error
            left = {*psutil.Process().children(recursive=True)} - before
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, timeout=5)
        else:
            return
    why = f"Ray does not start here ({one_line(failed)}); the same command tries again"
    raise Failed(full(failed) or why) from failed


def _init(**options: Any) -> None:
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": True}
    ray.init(**options, **quiet, logging_level="ERROR")


def _token() -> None:
    """Have one, for this user alone to read, before Ray looks for it: its own can be read by all,
    and of two that make theirs at the same moment one is then refused by what it started."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: nowhere is home
        file = Path.home() / ".ray" / "auth_token"
        file.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent) as new:
            new.write(secrets.token_hex(32))
            new.flush()
            with contextlib.suppress(FileExistsError):
                os.link(new.name, file)
        file.chmod(0o600)


def look(watcher: Preparing, at: str | None = None) -> Place:
    """Where work will be done: on the cluster at `at` or RAY_ADDRESS, else on this machine. Raises
    Unreachable."""
    if not address(at):
        return place.here()
    with on_ray(watcher, at):
        return here()


def here() -> Place:
    """What the cluster that this process has joined has now, and, on the head of one that
    `ray up` started, what it may grow to."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    of_head = "node:__internal_head__"  # as Ray marks it
    head = next((node["NodeID"] for node in alive if of_head in node["Resources"]), None)
    found: dict[Any, list[Node]] = collections.defaultdict(list)
    for one in alive:
        node = place.node(one["Resources"], 1, 1)
        found[node.cpus, node.gpus].append(node)
    file, machines = Path(BOOTSTRAP).expanduser(), None
    if head == ray.get_runtime_context().get_node_id() and file.is_file():
        launched = place.launched(file)
        machines = launched.machines
        for node in launched.nodes:
            now = found[node.cpus, node.gpus]
            now += [dataclasses.replace(node, count=0, most=1)] * (node.most - len(now))
    return Place("the cluster", tuple(itertools.chain(*found.values())), machines)


def has_head() -> bool:
    """Whether somebody can wait there for several workers."""
    return HEAD in ray.cluster_resources()


def free(group: str) -> None:
    """Remove a placement group, by its id, where it is still there, with what runs in it."""
    ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def fan_out(
    work: Callable[[Any], None],
    ahead: Callable[[Any], None],
    items: list[Any],
    cpus: int,
    gpus: float,
    watcher: Preparing,
) -> Iterator[tuple[int, str | None]]:
    """Do `work` on every item, as many at once as there is room for, or as a growing cluster will
    have room for; (index, error or None) of each as it ends. While a worker is at one item it
    looks `ahead` to one more.

    Raises KeyboardInterrupt on Ctrl-C, but never in the middle of what is done with an answer;
    BadInput where there never is room.
    """
    if not items:
        return
    with on_ray(watcher), _asked_to_stop() as asked:
        _, most = place.at_once(here(), 1, cpus, gpus)
        if not most:
            raise BadInput(f"no machine of the cluster has {cpus} CPUs and {gpus:g} GPUs")
        hire = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Worker).remote
        waiting = list(range(len(items)))[::-1]
        coming: dict[Any, Any] = {}  # workers that have no room yet
        busy: dict[Any, tuple[Any, int, int | None]] = {}

        def give(worker: Any, index: int, spare: int) -> None:
            following = waiting.pop() if len(waiting) > spare else None
            then = None if following is None else items[following]
            busy[worker.do.remote(work, items[index], ahead, then)] = (worker, index, following)

        for _ in range(min(most, len(items))):
            worker = hire()
            coming[worker.ready.remote()] = worker
        watcher.preparing("measuring")
        while busy or waiting:
            ended, _ = ray.wait([*busy, *coming], timeout=0.2)
            if asked:
                raise KeyboardInterrupt
            for done in ended:
                if done in coming:
                    worker = coming.pop(done)
                    # What others may begin with is not taken ahead.
                    if waiting:
                        give(worker, waiting.pop(), spare=len(coming))
                    continue
                worker, index, following = busy.pop(done)
                try:
                    error = ray.get(done)
                except ray.exceptions.RayError:
                    error, worker = "its worker died", hire()
                yield index, error
                if following is not None or waiting:
                    give(worker, waiting.pop() if following is None else following, len(coming))


@contextlib.contextmanager
def every_node(
    watcher: Preparing, at: str | None = None, seconds: float = 120
) -> Iterator[Callable[[Callable[[dict[str, float]], Any]], dict[str, Any]]]:
    """What does `work` once on every node, though all its CPUs be taken, and gives the answer by
    node, or the exception; `work` is given what Ray believes the node has. It travels whole with
    its module: the node may have another lmsat, or none.

    Raises Unreachable.
    """

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

    with on_ray(watcher, at):
        yield ask


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Not empty after Ctrl-C or SIGTERM; a second one raises KeyboardInterrupt at once."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    with handling(ask):
        yield asked


class _Worker:
    """A process that does one thing after another."""

    def ready(self) -> None:
        """Answers once there is room for it."""

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
            return one_line(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}".split("\n")[0]
        finally:
            if thread:
                thread.join()
        return None


@contextlib.contextmanager
def handling(ask: Callable[[int, Any], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM."""
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
