"""Ray, where it does not come up at once; its token; its end."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator import cluster

# Python reads it as it begins: Ray's agent takes more than the 15 s that it has, the first time.
SLOW = """\
import sys, time
from pathlib import Path

if "dashboard/agent.py" in " ".join(sys.orig_argv):
    try:
        Path(__file__).with_name("seen").mkdir()
        time.sleep(60)
    except FileExistsError:
        pass
"""
START = """\
import psutil, ray
from orchestrator import cluster, progress

with cluster.on_ray(progress.Bar()):
    print(ray.get(ray.remote(lambda: 6 * 7).remote()))
    print(*(one.name() for one in psutil.Process().children(recursive=True)))
"""

# What Tune has left in cycles is collected as Ray shuts down, as another thread may do.
END = """\
import gc, ray
from orchestrator import cluster, progress

class Cycle:
    def __init__(self):
        self.itself, self.held = self, ray.put(0)

class Leaving:
    def __init__(self, core):
        self.core = core

    def __getattr__(self, name):
        return getattr(self.core, name)

    def shutdown_driver(self):
        self.core.shutdown_driver()
        gc.collect()

with cluster.on_ray(progress.Bar()):
    gc.disable()
    Cycle()
    worker = ray._private.worker.global_worker
    worker.core_worker = Leaving(worker.core_worker)
"""


def test_a_ray_that_dies_as_it_starts_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    line = [sys.executable, "-c", START]
    done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, processes = done.stdout.splitlines()
    assert answer == "42"
    assert processes.split().count("gcs_server") == processes.split().count("raylet") == 1
    assert "starting Ray again" in done.stderr
    (token,) = (tmp_path / ".ray").iterdir()
    assert token.stat().st_mode & 0o777 == 0o600


def test_all_that_start_at_one_moment_have_one_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file, read = tmp_path / ".ray" / "auth_token", []
    together = threading.Barrier(8)

    def start() -> None:
        together.wait()
        cluster._token()
        read.append(file.read_text())

    threads = [threading.Thread(target=start) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(read) == 8 and len({*read}) == 1 and len(read[0]) == 64
    assert [*file.parent.iterdir()] == [file]
    file.chmod(0o644)
    cluster._token()
    assert (file.read_text(), file.stat().st_mode & 0o777) == (read[0], 0o600)


def test_what_is_garbage_as_ray_shuts_down_does_not_end_the_process(tmp_path: Path) -> None:
    line = [sys.executable, "-c", END]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
