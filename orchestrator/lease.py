"""One driver a sweep, on whichever machine: a lease, renewed for as long as its holder lives.

    driver/000003.json   a claim: who, and when last heard of; the highest number holds

A claim is made by linking to the file of the next number, which one machine alone can do. A holder
that was silent for too long is overtaken, and learns of it from the higher number, as do its
workers.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import atomic
from analysis.errors import BadInput

BEAT = 5.0  # seconds between signs of life
SILENCE = 60.0  # seconds without one, after which a holder on another machine is taken for dead


@dataclass(frozen=True)
class Lease:
    """The hold on a sweep."""

    number: int
    lost: threading.Event
    """Somebody else has taken it."""


@contextlib.contextmanager
def hold(sweep: Path) -> Iterator[Lease]:
    """Hold the sweep as its only driver. Raises BadInput where another one does."""
    before = _last(sweep)
    if before and _alive(sweep, before):
        raise BadInput(
            f"{sweep}: another `lmsat` is at work here ({_who(sweep, before)}); "
            f"see `lmsat status {sweep}`"
        )
    own, me = _claim(sweep, before + 1), _self()
    own.parent.mkdir(parents=True, exist_ok=True)
    # A link, which one alone can make, to what is whole: half a claim would bar the way.
    beside = own.with_name(f".{uuid.uuid4().hex[:8]}")
    beside.write_text(json.dumps(me))
    try:
        os.link(beside, own)
        if overtaken(sweep, before + 1):
            raise FileExistsError
    except FileExistsError:
        raise BadInput(f"{sweep}: another `lmsat` has just begun to work here") from None
    finally:
        beside.unlink()
    for old in own.parent.glob("*.json"):
        if old < own:
            old.unlink(missing_ok=True)
    lease, over = Lease(before + 1, threading.Event()), threading.Event()

    def live() -> None:
        while not over.wait(BEAT):
            if overtaken(sweep, lease.number):
                lease.lost.set()
                return
            with contextlib.suppress(OSError):  # a full disk is no reason to die
                os.utime(own)

    beating = threading.Thread(target=live, daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        over.set()
        beating.join()
        if not overtaken(sweep, lease.number):
            with contextlib.suppress(OSError):
                atomic.write_text(own, json.dumps({**me, "ended": True}))


def held(sweep: Path) -> bool:
    """Whether a driver is at work."""
    number = _last(sweep)
    return bool(number) and _alive(sweep, number)


def overtaken(sweep: Path, number: int) -> bool:
    """Whether the holder of this number is none any more."""
    return _claim(sweep, number + 1).exists()


def _claim(sweep: Path, number: int) -> Path:
    return sweep / "driver" / f"{number:06d}.json"


def _last(sweep: Path) -> int:
    return max((int(p.stem) for p in (sweep / "driver").glob("[0-9]*.json")), default=0)


def _who(sweep: Path, number: int) -> str:
    try:
        holder: dict[str, Any] = json.loads(_claim(sweep, number).read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has just begun"


def _alive(sweep: Path, number: int) -> bool:
    try:
        return _lives(_claim(sweep, number))
    except FileNotFoundError:
        return held(sweep)  # overtaken while we looked


def _lives(claim: Path) -> bool:
    """Whether who made it does. Raises FileNotFoundError where it is gone."""
    try:
        holder = json.loads(claim.read_text())
        if holder.get("ended"):
            return False
        if holder["machine"] == _machine():
            began = _began(holder["pid"])
            return began is not None and abs(began - holder["began"]) < 2  # clocks are set
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # being written, or damaged: its time tells
    return _age(claim) < SILENCE


def _age(file: Path) -> float:
    """Seconds since a file was last touched, by the clock that stamps files there."""
    probe = file.with_name(f".{os.getpid()}-{threading.get_ident()}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:  # somebody who may only look
        now = time.time()
    return now - file.stat().st_mtime


def _self() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "began": _began(pid),
    }


def _machine() -> str:
    """Where process numbers mean the same: a machine since its start, or a container of it."""
    known = [socket.gethostname()]
    for file in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            path = Path(file)
            known.append(str(path.readlink()) if path.is_symlink() else path.read_text().strip())
    return " ".join(known)


def _began(pid: int) -> float | None:
    """When a process began, to tell it from a later one of its number; None where there is none."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
