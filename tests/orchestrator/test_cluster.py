"""Ray, where it does not come up at once."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_a_ray_that_dies_as_it_starts_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    line = [sys.executable, "-c", START]
    done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer, processes = done.stdout.splitlines()
    assert answer == "42"
    assert processes.split().count("gcs_server") == processes.split().count("raylet") == 1
    assert "starting Ray again" in done.stderr
