"""What a node knows of itself, for `lmsat doctor`.

It runs on any node, even one without lmsat: it knows the standard library only.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

Facts = dict[str, Any]

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "lmsat")
ROOMS = ("orchestrator", "trainables", "analysis")
TORCH = "import torch; print(torch.cuda.device_count())"
# Whoever reaches one of the first two sees everything; the others run what they are sent.
SERVERS = {
    "dashboard/dashboard.py": "Ray's dashboard",
    "mlflow": "MLflow",
    "gcs_server": "Ray's GCS",
    "ray.util.client.server": "Ray's client server",
}


def facts(tokens: dict[str, str], resources: dict[str, float]) -> Facts:
    """Of the node that this runs on; sizes in bytes. `resources`: what Ray believes it has;
    `tokens`: folders, each in one that is to be shared, where the driver has left a file, and every
    node leaves one."""
    folders = {str(Path(one).parent) for one in tokens.values()} | {tempfile.gettempdir()}
    shm = Path("/dev/shm")
    return {
        "versions": installed(),
        "code": code(),
        "gpus": _gpus(),
        "believed": resources.get("GPU", 0),
        "shared": {check: _shared(Path(one)) for check, one in tokens.items()},
        "free": {one: shutil.disk_usage(one).free for one in sorted(folders) if _is(one)},
        "shm": shutil.disk_usage(shm).total if shm.is_dir() else None,
        "object_store": resources.get("object_store_memory", 0),
        "files": _files(),
        "world": sorted(set(_world())),
        "token": os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
    }


def asker(tokens: dict[str, str]) -> Callable[[dict[str, float]], Facts]:
    """The same, of what a node's resources are still to come."""
    return lambda resources: facts(tokens, resources)


def clock(resources: dict[str, float]) -> float:
    """Seconds since 1970, as the node has it."""
    return time.time()


def _is(folder: str) -> bool:
    return Path(folder).is_dir()


def installed() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    """Without what tells one build from another: 2.13.0+cpu is 2.13.0."""
    try:
        return metadata.version(package).split("+")[0]
    except metadata.PackageNotFoundError:
        return None


def code() -> str | None:
    """A hash of the three packages' source: the same version may be other code."""
    seen = hashlib.sha256()
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        if spec is None or spec.origin is None:
            return None
        for file in sorted(Path(spec.origin).parent.rglob("*.py")):
            seen.update(file.read_bytes())
    return seen.hexdigest()[:8]


def _gpus() -> int | str:
    """How many torch sees, or why it cannot say. Ray hides them from a worker that has asked for
    none, so a process of its own looks, with the environment that Ray was started in."""
    env = dict(os.environ)
    if "RAY_RAYLET_PID" in env:
        env.pop("CUDA_VISIBLE_DEVICES", None)
        with suppress(OSError):
            raylet = Path("/proc", env["RAY_RAYLET_PID"], "environ").read_bytes()
            pairs = dict(one.split(b"=", 1) for one in raylet.split(b"\0") if b"=" in one)
            if b"CUDA_VISIBLE_DEVICES" in pairs:
                env["CUDA_VISIBLE_DEVICES"] = pairs[b"CUDA_VISIBLE_DEVICES"].decode()
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH], capture_output=True, text=True, env=env, timeout=90
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"torch: {error}"
    said = done.stderr.strip().splitlines() or ["it died"]
    return int(done.stdout) if done.returncode == 0 else f"torch: {said[-1]}"


def _shared(folder: Path) -> dict[str, str | None]:
    """What this node reads of the driver's file and writes for it: a name, and the name again
    inside."""
    if not folder.parent.is_dir():
        return {"error": "not there", "read": None, "wrote": None}
    name = uuid.uuid4().hex
    try:
        read = (folder / "driver").read_text()
        (folder / name).write_text(name)
    except FileNotFoundError:
        return {"error": "another folder of that name", "read": None, "wrote": None}
    except OSError as error:
        return {"error": str(error), "read": None, "wrote": None}
    return {"error": None, "read": read, "wrote": name}


def _files() -> int | None:
    """Files a process may have open; None where that is not limited, or not said."""
    try:
        import resource
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _world() -> Iterator[str]:
    """Servers of this node that listen on every address, as 'name on port'. Linux only, and only
    of processes that this one may look at."""
    ports = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                address, port = fields[1].split(":")
                if fields[3] == "0A" and not int(address, 16):
                    ports[f"socket:[{fields[9]}]"] = int(port, 16)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            # A dashboard that listens on loopback exports its metrics to the world.
            name = next((SERVERS[part] for part in SERVERS if part in command), None)
            if "--host=127.0.0.1" in command or "--host=localhost" in command:
                continue
            for handle in (process / "fd").iterdir() if name else ():
                with suppress(OSError):
                    if (link := str(handle.readlink())) in ports:
                        yield f"{name} on port {ports[link]}"
