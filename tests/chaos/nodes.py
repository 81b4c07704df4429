"""Nodes of a Ray cluster that go, with and without notice, while others come."""

import random
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from tests import rays, same
from tests.chaos.faults import Found, files, trained_again
from tests.chaos.kills import Subject
from tests.chaos.runs import Home, command, marked, wait
from tests.mlserver import free_port

FIND = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(*(n["NodeID"] for n in ray.nodes() if n["Alive"] and sys.argv[2] in n["Resources"]))
"""


def leave(home: Home, subject: Subject, rng: random.Random, count: int) -> Found:
    """Nodes of one CPU each, two at a time; every other one is told before it is killed, and then
    a fifth of the time between checkpoints is lost at most."""
    wrong, environment = list[str](), {**home.environment, **rays.TOKEN}
    tried = sweeps = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")))
        address = f"127.0.0.1:{(port := free_port())}"
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}/"]
        head += ["--num-cpus=0", '--resources={"head": 1}']
        stack.enter_context(rays.node(folder / "head.log", *head))
        names: list[str] = []

        def join() -> None:
            names.append(f"node{uuid.uuid4().hex[:8]}")
            line = [f"--address={address}", "--num-cpus=1", f'--resources={{"{names[-1]}": 1}}']
            log = folder / f"{names[-1]}.log"
            stack.enter_context(rays.node(log, *line, **home.environment, CHAOS=names[-1]))

        join(), join()
        while tried < count and sweeps < 2 * count and not wrong:
            sweeps += 1
            out = home.folder / f"nodes-{sweeps}"
            wanted = ["sweep", "--grid", str(subject.grid), "--out", str(out), "--address", address]
            log, before = out.with_suffix(".log"), ("env", *_pairs(rays.TOKEN))
            with command(home, log, *wanted, before=before) as started:
                while tried < count:
                    if wait(started.ended, rng.uniform(0.5, 1.2) * subject.began):
                        break
                    tried += 1
                    name = names.pop(rng.randrange(2))
                    if told := tried % 2 == 0:
                        _announce(address, name, environment)
                        wait(started.ended, rng.uniform(3, 10))
                    at = time.time()
                    for one in marked(name):
                        with suppress(psutil.NoSuchProcess):
                            one.kill()
                    known = files(out)
                    join()
                    again = trained_again(out, at, known, subject)
                    said = "idle" if again is None else f"{again:.0%} of an interval trained again"
                    print(f"node {tried}: {'told to go' if told else 'killed'}, {said}", flush=True)
                    if told and again is not None and again > 0.2:
                        wrong.append(f"a node that was told to go: {said}")
                wait(started.ended, subject.patience)
            if started.process.returncode:
                wrong.append(f"exit code {started.process.returncode}: {started.said[-300:]}")
            wrong += same.differences(out / "chaos", subject.out / "chaos", noticed=True)
    return tried, wrong


def _pairs(environment: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in environment.items()]


def _announce(address: str, name: str, environment: dict[str, str]) -> None:
    """Say that the node with the resource of that name goes in a minute, as clouds do."""
    line = [sys.executable, "-c", FIND, address, name]
    id = subprocess.check_output(line, env=environment, text=True).split()[-1]
    drain = ["drain-node", f"--address={address}", f"--node-id={id}", "--reason-message=chaos"]
    drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds=60"]
    subprocess.run([rays.BINARIES / "ray", *drain], env=environment, check=True)
