"""What a cluster, or this machine, lacks before money is spent on it.

The judgements are functions of what nodes know of themselves: plain dicts, by node.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from analysis.errors import BadInput
from orchestrator import facts, fits, place
from orchestrator.facts import Facts
from orchestrator.place import Place

Ask = Callable[[Callable[[dict[str, float]], Any]], dict[str, Any]]

FREE = 5e9  # bytes, the least of a disk
SKEW = 1.0  # seconds
FILES = 4096  # open at once: a Ray worker takes dozens, and a head some for every worker
LEVELS = ("wrong", "warning", "ok")
REFUSED = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` says on the head"
)
MISMATCH = "install here the Python and the Ray of the cluster"
GUARDED = ("Ray's GCS", "Ray's client server")  # by the token
ELSE = {  # what to do about a folder that is no good, by the check
    "storage": "give another --out",
    "cache": "set LMSAT_CACHE to storage that all nodes share",
}


@dataclass(frozen=True)
class Finding:
    """Of one check on one node."""

    check: str
    node: str
    level: Literal["ok", "warning", "wrong"]
    found: str
    todo: str = ""


# What is to be thought of it. `nodes` are the facts by node, without those that gave no answer.


def judge(driver: Facts, nodes: dict[str, Facts], folders: dict[str, str]) -> list[Finding]:
    """All that facts alone tell; `folders`: the driver's, by the check that they are shared."""
    return [
        *versions(driver, nodes),
        *graphics(nodes),
        *shared(nodes, folders),
        *disks(nodes),
        *memory(nodes),
        *clocks(nodes),
        *files(nodes),
        *ports(nodes),
    ]


def versions(driver: Facts, nodes: dict[str, Facts]) -> Iterator[Finding]:
    """Equal to the driver's."""
    wanted = {**driver["versions"], "code": driver["code"]}
    for node, known in nodes.items():
        has = {**known["versions"], "code": known["code"]}
        other = [name for name in wanted if has[name] != wanted[name]]
        if other == ["code"]:
            found = f"other code of lmsat: {has['code']}, the driver has {wanted['code']}"
        else:
            found = ", ".join(
                f"{name} {has[name] or 'missing'}, the driver has {wanted[name] or 'none'}"
                for name in other
                if name != "code"
            )
        if other:
            todo = "install there what the driver has: pip install -c constraints.txt"
            yield Finding("versions", node, "wrong", found, todo)
        else:
            found = ", ".join(f"{k} {v}" for k, v in known["versions"].items() if v)
            yield Finding("versions", node, "ok", found)


def graphics(nodes: dict[str, Facts]) -> Iterator[Finding]:
    """GPUs: torch sees as many as Ray believes."""
    for node, known in nodes.items():
        seen, believed = known["gpus"], known["believed"]
        if isinstance(seen, str):
            yield Finding("GPUs", node, "wrong", seen, "mend torch on this node")
        elif seen < believed:
            found = f"torch sees {seen}, Ray believes in {believed:g}"
            todo = "look at nvidia-smi, the driver and torch's CUDA build; or lower --num-gpus"
            yield Finding("GPUs", node, "wrong", found, todo)
        elif seen > believed:
            found = f"torch sees {seen}, Ray believes in {believed:g}"
            yield Finding("GPUs", node, "warning", found, "restart Ray there with --num-gpus")
        else:
            yield Finding("GPUs", node, "ok", f"{seen}")


def shared(nodes: dict[str, Facts], folders: dict[str, str]) -> Iterator[Finding]:
    """Every node has read the driver's token in each folder, and the driver its."""
    for check, folder in folders.items():
        todo = f"mount the same storage at the same path on every node, or {ELSE[check]}"
        for node, known in nodes.items():
            has = known["shared"][check]
            wrong = has["error"]
            if not wrong and not has["read_back"]:
                wrong = "the driver does not see what this node writes"
            if not wrong and not has["same"]:
                wrong = "this node reads something else than the driver wrote"
            if wrong:
                yield Finding(check, node, "wrong", f"{folder}: {wrong}", todo)
            else:
                yield Finding(check, node, "ok", f"{folder} is shared")


def disks(nodes: dict[str, Facts]) -> Iterator[Finding]:
    for node, known in nodes.items():
        for folder, free in known["free"].items():
            found = f"{free / 1e9:.1f} GB free in {folder}"
            if free < FREE:
                yield Finding("disk", node, "wrong", found, f"free {FREE / 1e9:g} GB, or more")
            else:
                yield Finding("disk", node, "ok", found)


def memory(nodes: dict[str, Facts]) -> Iterator[Finding]:
    """Shared memory holds Ray's object store."""
    for node, known in nodes.items():
        shm, store = known["shm"], known["object_store"]
        if shm is None:
            continue
        found = f"/dev/shm has {shm / 1e9:.1f} GB, Ray's object store {store / 1e9:.1f}"
        if shm < store:
            todo = (
                f"docker run --shm-size={store / 1e9 + 1:.0f}g, or ray start --object-store-memory"
            )
            yield Finding("shared memory", node, "wrong", found, todo)
        else:
            yield Finding("shared memory", node, "ok", found)


def clocks(nodes: dict[str, Facts]) -> Iterator[Finding]:
    """Within a second of the driver's, as far as the round trip lets one say."""
    for node, known in nodes.items():
        low, high = known["ahead"]
        sure = max(low, -high, 0.0)
        if sure > SKEW:
            found = f"{sure:.1f} s or more {'ahead of' if low > 0 else 'behind'} the driver's clock"
            todo = "synchronise it: chronyc makestep, or timedatectl set-ntp true"
            yield Finding("clock", node, "wrong", found, todo)
        else:
            found = f"within {max(abs(low), abs(high)):.2f} s of the driver's"
            yield Finding("clock", node, "ok", found)


def files(nodes: dict[str, Facts]) -> Iterator[Finding]:
    for node, known in nodes.items():
        limit = known["files"]
        if limit is not None and limit < FILES:
            todo = f"ulimit -n {16 * FILES} before ray start"
            yield Finding("open files", node, "wrong", f"at most {limit}", todo)
        else:
            yield Finding("open files", node, "ok", f"{limit or 'not limited'}")


def ports(nodes: dict[str, Facts]) -> Iterator[Finding]:
    """Nothing that runs or shows what one likes listens to the world."""
    for node, known in nodes.items():
        bare = [s for s in known["world"] if not (known["token"] and s.startswith(GUARDED))]
        if bare:
            guarded = all(s.startswith(GUARDED) for s in bare)
            todo = "RAY_AUTH_MODE=token" if guarded else "bind it to 127.0.0.1, and use a tunnel"
            found = f"open to whoever reaches the node: {', '.join(bare)}"
            yield Finding("ports", node, "warning", found, todo)
        else:
            yield Finding("ports", node, "ok", "none open without a token")


def room(there: Place, trials: list[dict[str, Any]]) -> Iterator[Finding]:
    """Each trial of a grid has some, or will have once the cluster has grown."""
    for wanted in {tuple(t["resources"].items()): t["resources"] for t in trials}.values():
        try:
            now, most = fits.teams(there, wanted)
        except BadInput as error:
            todo = "start more or larger machines, or lower it in the grid"
            yield Finding("grid", "all", "wrong", str(error), todo)
            continue
        workers, cpus, gpus = (wanted[key] for key in ("workers", "cpus", "gpus"))
        each = f"trials of {workers} x ({cpus} cpus, {gpus:g} gpus)"
        if now:
            yield Finding("grid", "all", "ok", f"{each}: room for {now} at once")
        else:
            found = f"{each}: no room yet, for {most} once the cluster has grown"
            todo = "nothing where its machines come when asked for: see `ray status`"
            yield Finding("grid", "all", "warning", found, todo)


# The examination.


def run(
    address: str | None,
    out: Path,
    cache: Path,
    tracking_uri: str | None,
    trials: list[dict[str, Any]],
    watcher: Any,
) -> list[Finding]:
    """All checks, of the cluster at `address` or of this machine, and for the trials of a grid;
    what they leave in `out` and `cache` they take away again. Raises BadInput where `address` or
    `tracking_uri` cannot be one."""
    # Read when ray is imported: three tries to connect, and not twenty.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")
    out = out.resolve()
    with ExitStack() as stack:
        tokens, found = {}, []
        for check, folder in (("storage", out), ("cache", cache.resolve())):
            tokens[check], problem = stack.enter_context(_token(folder))
            if problem:
                todo = f"make it writable, or {ELSE[check]}"
                found.append(Finding(check, "driver", "wrong", f"{folder}: {problem}", todo))
        found += _store(tracking_uri, out, tokens["storage"])
        from orchestrator import cluster

        if address and (closed := cluster.closed(address)):
            todo = "is Ray running there, and this the address that `ray start --head` printed?"
            return [Finding("cluster", "driver", "wrong", f"{address}: {closed}", todo), *found]
        try:
            with cluster.every_node(watcher, address) as ask:
                found = [*_examine(ask, tokens), *found]
                found += room(cluster.here() if cluster.address(address) else place.here(), trials)
                teams = any(trial["resources"]["workers"] > 1 for trial in trials)
                if teams and not cluster.has_head():
                    found.append(Finding("grid", "head", "wrong", *cluster.HEADLESS))
                return found
        except cluster.Unreachable as error:
            todo = MISMATCH if "mismatch" in str(error).lower() else REFUSED
            return [
                Finding("cluster", "driver", "wrong", f"it listens, but: {error}", todo),
                *found,
            ]


def _examine(ask: Ask, tokens: dict[str, Path]) -> list[Finding]:
    answers = ask(facts.asker({check: str(token) for check, token in tokens.items()}))
    sent = time.time()
    times = ask(facts.clock)  # of workers that are warm by now
    received = time.time()
    nodes, silent = {}, []
    for node, known in answers.items():
        both = (known, times.get(node, ConnectionError("it has gone")))
        error = next((e for e in both if isinstance(e, Exception)), None)
        if error:
            todo = "see `ray status` and Ray's logs on the node, and restart it"
            silent.append(Finding("answer", node, "wrong", f"none: {error}", todo))
            continue
        for check, has in known["shared"].items():
            token, wrote = tokens[check], has["wrote"]
            has["same"] = has["read"] == token.name
            has["read_back"] = bool(wrote) and _text(token / wrote) == wrote
        nodes[node] = {**known, "ahead": (times[node] - received, times[node] - sent)}
    driver = {"versions": facts.installed(), "code": facts.code()}
    folders = {check: str(token.parent) for check, token in tokens.items()}
    return [*silent, *judge(driver, nodes, folders)]


@contextmanager
def _token(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """A folder in this one with the driver's file, whose text is its name; and what went wrong, if
    anything. Both are gone afterwards, and `folder` where it was not there before."""
    token = folder / f".lmsat-doctor-{uuid.uuid4().hex}"
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    problem = None
    try:
        token.mkdir(parents=True)
        (token / "driver").write_text(token.name)
    except OSError as error:
        problem = error.strerror or str(error)
    try:
        yield token, problem
    finally:
        shutil.rmtree(token, ignore_errors=True)
        for one in made:
            with suppress(OSError):
                one.rmdir()


def _text(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None


def _store(uri: str | None, out: Path, folder: Path) -> list[Finding]:
    """MLflow answers and can be written to. What is written is deleted again."""
    from orchestrator import tracking

    todo = "see the server's log; or give another --tracking-uri"
    try:
        store = tracking.resolve(uri, out)
    except BadInput as error:
        if not (uri or "").startswith("http"):
            raise
        found = str(error).removeprefix("--tracking-uri: ")
        return [Finding("MLflow", "driver", "wrong", found, "start it; or open the tunnel to it")]
    file = Path(store.removeprefix("sqlite:///"))
    if store.startswith("sqlite") and not file.exists():
        if os.access(next(p for p in file.parents if p.exists()), os.W_OK):
            return [Finding("MLflow", "driver", "ok", f"{store} will be made")]
        return [Finding("MLflow", "driver", "wrong", f"{store} cannot be made", "another --out")]
    try:
        tracking.try_out(store, folder)
    except Exception as error:  # a store may fail in any way
        return [Finding("MLflow", "driver", "wrong", f"{store}: {tracking.why(error)}", todo)]
    return [Finding("MLflow", "driver", "ok", f"{store} can be written to")]


def print_findings(findings: list[Finding]) -> None:
    """To stdout: what is not well first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, table = Console(), Table(box=None, padding=(0, 1, 0, 0))
    if not console.is_terminal:  # a pipe has no width: never fold a row
        console.width = 400
    for heading in ("", "check", "node", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for one in sorted(findings, key=lambda one: LEVELS.index(one.level)):
        style = {"wrong": "red", "warning": "yellow"}.get(one.level, "")
        row = (one.level, one.check, one.node, one.found, one.todo)
        table.add_row(*(Text(cell, style if i == 0 else "") for i, cell in enumerate(row)))
    console.print(table)
