"""Clusters of several Ray nodes on this machine."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from tests.mlserver import free_port

BINARIES = Path(sys.executable).parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}  # which clients need
AGENTS = ("dashboard-agent-grpc", "dashboard-agent-listen", "metrics-export", "runtime-env-agent")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}


@contextmanager
def node(
    log: Path, *arguments: str, before: Sequence[str] = (), **environment: str
) -> Iterator[None]:
    """`ray start --block` with these arguments. Not ended by `ray stop`, which would end every Ray
    of the machine."""
    # Where a port is given, nobody waits for it: Ray dies where its agents, on a busy machine, take
    # more than 15 s to tell theirs.
    ports = [f"--{agent}-port={free_port()}" for agent in AGENTS]
    line = [*before, str(BINARIES / "ray"), "start", "--block", *ports, *arguments]
    env = {**os.environ, **QUIET, **TOKEN, **environment}
    with log.open("wb") as to, subprocess.Popen(line, env=env, stdout=to, stderr=to) as started:
        try:
            until = time.monotonic() + 120
            while "Ray runtime started" not in log.read_text():
                assert time.monotonic() < until and started.poll() is None, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            with suppress(psutil.NoSuchProcess):
                for one in psutil.Process(started.pid).children(recursive=True):
                    one.kill()
            started.kill()


@contextmanager
def cluster(
    port: int, *nodes: list[str], before: Sequence[str] = (), **environment: str
) -> Iterator[str]:
    """The address of a cluster of `nodes`, the first its head: the arguments of each. `before`
    is put before the others' commands: env, unshare."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as name, ExitStack() as stack:
        folder = Path(name)  # sockets: a short path
        address = f"127.0.0.1:{port}"
        for i, arguments in enumerate(nodes):
            role, prefix = [f"--address={address}"], before
            if i == 0:
                role, prefix = ["--head", f"--port={port}", "--include-dashboard=false"], ()
            line = [*role, f"--temp-dir={folder}/", *arguments]
            stack.enter_context(node(folder / f"{i}.log", *line, before=prefix, **environment))
        yield address
