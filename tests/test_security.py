"""What is open to whom."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from click.testing import CliRunner

from orchestrator import cluster, progress
from orchestrator.cli import main
from tests import rays
from tests.orchestrator.test_sweep import write_grid

JOIN = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print('joined')"


def join(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Another process tries to join a Ray."""
    line = [sys.executable, "-c", JOIN, address]
    env = {**os.environ, **rays.QUIET, **environment}
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=120)


def test_a_ray_that_is_started_here_answers_to_its_token_alone() -> None:
    with cluster.on_ray(progress.Bar(quiet=True)):
        address = ray.get_runtime_context().gcs_address
        for stranger in (
            {"RAY_AUTH_MODE": "disabled"},
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "cd" * 32},
        ):
            refused = join(address, **stranger)
            assert refused.returncode != 0 and "AuthenticationError" in refused.stderr
        assert join(address, RAY_AUTH_MODE="token").stdout == "joined\n"
        token = Path.home() / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("option", "url"),
    [
        ("--tracking-uri", "http://me:hush@127.0.0.1:5000"),
        ("--checkpoints", "s3://KEY:hush@bucket/prefix"),
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(
    option: str, url: str, tmp_path: Path, cache: Path
) -> None:
    grid = write_grid(tmp_path)
    line: list[Any] = ["sweep", "--grid", grid, "--out", tmp_path / "runs", option, url]
    done = CliRunner().invoke(main, list(map(str, line)))
    assert done.exit_code == 2 and option in done.stderr and "hush" not in done.output
    assert not (tmp_path / "runs").exists()
