"""Commands in processes of their own that need not load anything: forked, as they begin, from one
that has loaded what lmsat loads. So they are killed at their work, not at Python's imports."""

import os
import sys
import tempfile
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

LOADED = [
    "analysis.evidence",
    "analysis.report",
    "mlflow",
    "orchestrator.cli",
    "orchestrator.sweep",
]


class Forked:
    """`lmsat` with these arguments; what it says goes to the end of `log`."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str], log: Path):
        context = get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        cores = os.sched_getaffinity(0)
        self.process: BaseProcess = context.Process(
            target=_run, args=(arguments, folder, environment, log, cores)
        )
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)


def _run(
    arguments: list[str], folder: Path, environment: dict[str, str], log: Path, cores: set[int]
) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.sched_setaffinity(0, cores)
    tempfile.tempdir = None  # which was asked for before
    with log.open("ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    sys.argv = ["lmsat", *arguments]
    from orchestrator.cli import main

    main()
