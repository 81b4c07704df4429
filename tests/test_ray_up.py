"""`ray up`, a sweep from outside, `ray down`: for real, on a private machine within this one."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator import ledger
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
# `ray stop` ends every Ray that it sees: processes, network and mounts are a machine's of its own.
PRIVATE = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc"]
NEEDED = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "ip": "iproute2"}
if os.getuid():
    PRIVATE += ["--user", "--map-root-user", "--map-auto"]
    NEEDED["newuidmap"] = "uidmap"


def lacking() -> str | None:
    """What this machine lacks, and how to get it."""
    if missing := [NEEDED[one] for one in NEEDED if not shutil.which(one, path=PATH)]:
        return f"apt-get install {' '.join(missing)}"
    if not shutil.which("unshare"):
        return "util-linux's `unshare` is wanted: run this on Linux"
    tried = subprocess.run([*PRIVATE, "true"], capture_output=True, text=True)
    return f"namespaces are wanted, run this as root: {tried.stderr}" if tried.returncode else None


MISSING = lacking()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"`ray up` IS NOT TESTED HERE: {MISSING}")

SCRIPT = r"""
PS4='+ ${SECONDS}s: '
set -euxo pipefail
ip link set lo up
mount --bind "$TOP/passwd" /etc/passwd
mount -t tmpfs none /run
mkdir /run/sshd
"$(command -v sshd)" -f "$TOP/sshd_config" # it wants to be called by its whole path

ray get-auth-token --generate > /dev/null
export RAY_AUTH_MODE=token
ray up "$TOP/local.yaml" -y
ray dashboard "$TOP/local.yaml" --port 9265 > "$TOP/dashboard" 2>&1 &
until (: < /dev/tcp/127.0.0.1/9265) 2> /dev/null; do sleep .5; jobs %1 > /dev/null; done
sweep=(lmsat sweep --grid "$TOP/tiny.yaml" --out "$TOP/shared/runs")
"${sweep[@]}" --address http://127.0.0.1:9265 --json > "$TOP/swept"
lmsat doctor --address 127.0.0.1:6379 --out "$TOP/shared/runs" --json > "$TOP/found" || true
ps -eo args > "$TOP/up"
ray down "$TOP/local.yaml" -y
ps -eo args > "$TOP/down"
"""


@pytest.fixture(scope="module")
def machine(cache: Path) -> Iterator[Path]:
    """What has become of a machine that went through all of SCRIPT: its folder."""
    with tempfile.TemporaryDirectory(prefix="up", dir="/tmp") as name:  # sockets: a short path
        top = Path(name)
        user, node = top / "user", top / "node"
        for home in (user, node):
            (home / ".ssh").mkdir(parents=True)
        key = user / ".ssh/id_ed25519"
        for file in (key, top / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file], check=True)
        shutil.copy(key.with_suffix(".pub"), node / ".ssh/authorized_keys")
        (top / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1\nHostKey {top}/host_key\nStrictModes no\nUsePAM no\n"
        )
        homes = [f"{one.name}:x:0:0::{one}:/bin/bash\n" for one in (user, node)]
        (top / "passwd").write_text("".join(homes) + Path("/etc/passwd").read_text())
        (node / ".bashrc").write_text(f"export RAY_TMPDIR={top} LMSAT_CACHE={cache}\n")
        environment(node / "lmsat/.venv")
        cluster = (ROOT / "clusters/local.yaml").read_text()
        (top / "local.yaml").write_text(filled(cluster, node.name))
        (top / "tiny.yaml").write_text(yaml.safe_dump({**yaml.safe_load(TINY), **SMALL}))
        (top / "script").write_text(SCRIPT)
        done = subprocess.run(
            [*PRIVATE, "bash", top / "script"],
            cwd=ROOT,
            env={
                "HOME": str(user),
                "PATH": PATH,
                "TERM": "dumb",
                "USER": top.name,
                "RAY_TMPDIR": str(top),
                "TOP": str(top),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        (top / "said").write_text(done.stdout)
        user_hash = hashlib.sha256(top.name.encode()).hexdigest()[:10]
        shutil.rmtree(f"/tmp/ray_ssh_{user_hash}")  # Ray's, for the connections of one user
        assert done.returncode == 0, done.stdout
        yield top


SMALL = {
    "model": {"size": "nano-8"},
    "train": {"tokens": 8192, "batch": 8, "sequence": 64},
    "probes": {"count": 2, "tokens": 1024, "final_tokens": 2048},
}


def environment(venv: Path) -> None:
    """A node's, so new that lmsat is not in it; all that lmsat wants is seen through from here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    offline = "[*sys.argv[1:], '--no-index', '--no-build-isolation']"
    for name, module, arguments in (
        ("pip", "pip._internal.cli.main", offline),
        ("ray", "ray.scripts.scripts", ""),
    ):
        script = venv / "bin" / name
        code = f"import sys\nfrom {module} import main\nsys.exit(main({arguments}))\n"
        script.write_text(f"#!{venv}/bin/python\n{code}")
        script.chmod(0o755)


def filled(text: str, user: str) -> str:
    """The cluster file, with what its user fills in."""
    for field, value in (("head_ip", "127.0.0.1"), ("worker_ips", ""), ("ssh_user", user)):
        text = re.sub(rf"({field}: \[?)FILL-IN", rf"\g<1>{value}", text)
    assert "FILL-IN" not in text
    return text


def test_a_cluster_comes_up_trains_from_outside_and_goes_down(machine: Path) -> None:
    swept = json.loads((machine / "swept").read_text())
    assert [trial["status"] for trial in swept["trials"]] == ["done"] * 2
    entries = ledger.read(machine / "shared/runs/tiny").values()
    assert [entry["status"] for entry in entries] == ["done"] * 2
    up, down = (
        [line for line in (machine / name).read_text().splitlines() if is_ray(line, machine)]
        for name in ("up", "down")
    )
    assert any("gcs_server" in line for line in up)
    assert any("raylet" in line for line in up)
    assert down == []


def is_ray(process: str, machine: Path) -> bool:
    """Of the node: all of them name their session's folder, but workers at work."""
    return f"{machine}/ray/" in process or process.startswith("ray::")


def test_the_doctor_finds_the_cluster_well(machine: Path) -> None:
    findings = json.loads((machine / "found").read_text())
    assert {one["node"] for one in findings} == {"127.0.0.1", "driver"}
    wrong = {one["check"] for one in findings if one["level"] == "wrong"}
    assert wrong <= {"disk", "shared memory", "open files"}  # may be so on this machine
    (ports,) = [one for one in findings if one["check"] == "ports"]
    assert ports["level"] == "ok"
