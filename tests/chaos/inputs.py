"""Malformed inputs: those of the tests, counted."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.chaos.faults import Found
from tests.chaos.kills import Subject
from tests.chaos.runs import Home


def malformed(home: Home, subject: Subject, rng: random.Random, count: int) -> Found:
    """All of them, however many are asked for."""
    counts = home.folder / "inputs.json"
    tests = sorted(map(str, Path(__file__).parents[1].glob("test_malformed_*.py")))
    line = [sys.executable, "-m", "pytest", "-q", "--no-header", *tests]
    env = {**os.environ, "LMSAT_MALFORMED": str(counts)}
    ran = subprocess.run(line, env=env, capture_output=True, text=True)
    failed = [line for line in ran.stdout.splitlines() if line.startswith("FAILED")]
    kinds = json.loads(counts.read_text())
    print(f"inputs: {kinds}", flush=True)
    return sum(kinds.values()), failed or ([] if ran.returncode == 0 else [ran.stdout[-300:]])
