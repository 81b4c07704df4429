"""`lmsat` in a process of its own that need not load anything: forked, as it begins, off one that
has loaded what commands and workers load. It does what the installed script does from there on.

What libraries read of the environment when they are loaded stays as it was, but for Ray: a command
that asks a hub at an address has to be the script itself.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

LOADED = (
    "analysis.evidence",
    "analysis.report",
    "matplotlib.figure",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "orchestrator.cli",
    "orchestrator.sweep",
    "trainables.pretrain",
    "trainables.rankfit",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # loads torch's compiler, in every engine
)
SCRIPT = Path(sys.executable).parent / "lmsat"


class Forked:
    """As much of subprocess.Popen as tests need; what the command says goes to the end of files."""

    def __init__(
        self,
        *arguments: object,
        cwd: Path,
        out: Path,
        err: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        multiprocessing.set_forkserver_preload([*LOADED])
        given = dict(os.environ if env is None else env), os.sched_getaffinity(0)
        for file in (out, err):
            file.touch()
        self._said = [(file, file.stat().st_size) for file in (out, err)]
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_run, args=([*map(str, arguments)], cwd, out, err, *given)
        )
        self._process.start()
        assert self._process.pid
        self.pid: int = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout
            raise subprocess.TimeoutExpired("lmsat", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> list[str]:
        self.wait(timeout)
        return [file.read_bytes()[before:].decode() for file, before in self._said]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def lmsat(
    *arguments: object, cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "out", Path(folder) / "err"
        process = Forked(*arguments, cwd=cwd, out=files[0], err=files[1], env=env)
        said = process.communicate()
        return subprocess.CompletedProcess(arguments, process.wait(), *said)


def _run(
    arguments: list[str], cwd: Path, out: Path, err: Path, env: dict[str, str], cores: set[int]
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.sched_setaffinity(0, cores)
    tempfile.tempdir = None  # which was asked for before
    for file, stream in ((out, 1), (err, 2)):
        with file.open("ab") as said:
            os.dup2(said.fileno(), stream)
    sys.argv = [str(SCRIPT), *arguments]
    from ray._raylet import Config

    from orchestrator.cli import main

    Config.initialize("")  # whether there are tokens, by the environment as it is now

    main()
