"""The cluster files, as Ray's own launcher takes them; Slurm's script on a Slurm of shims."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
CLOUDS = ("cluster.yaml", "clusters/gcp.yaml")
FILES = (*CLOUDS, "clusters/local.yaml")


def prepared(name: str) -> dict[str, Any]:
    """As `ray up` has it before it asks the cloud for anything."""
    config = prepare_config(yaml.safe_load((ROOT / name).read_text()))
    validate_config(config)
    return config


def commands(config: dict[str, Any]) -> list[str]:
    return [
        command
        for node in ("head", "worker")
        for step in (f"{node}_setup_commands", f"{node}_start_ray_commands")
        for command in config[step]
    ]


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file_and_starts_no_machine_that_nothing_needs(name: str) -> None:
    config = prepared(name)
    assert 0 < config["idle_timeout_minutes"] <= 15
    if name in CLOUDS:
        types = config["available_node_types"]
        assert all(node["min_workers"] == 0 for node in types.values())
        assert config["provider"]["cache_stopped_nodes"] is False


@pytest.mark.parametrize("name", CLOUDS)
def test_drivers_live_on_demand_and_gpus_on_several_kinds_of_spot_machine(name: str) -> None:
    config = prepared(name)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0, "head": 1}
    assert head["max_workers"] == 0
    assert not spot(head)
    kind = {"aws": "InstanceType", "gcp": "machineType"}[config["provider"]["type"]]
    assert len({node["node_config"][kind] for node in types.values()}) >= 3
    for node in types.values():
        assert spot(node)
        assert node["resources"]["GPU"] >= 1
        assert "head" not in node["resources"]


def spot(node: dict[str, Any]) -> bool:
    made = node["node_config"]
    return (
        made.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        or made.get("scheduling", {}).get("provisioningModel") == "SPOT"
    )


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_open_to_the_world(name: str) -> None:
    """Ray's own defaults bind the dashboard to every address, and open port 22 to every address
    where a node has no security group of its own."""
    config = prepared(name)
    assert "0.0.0.0" not in str(config)
    (start,) = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in start
    for node in config["available_node_types"].values():
        made = node["node_config"]
        if name in CLOUDS:
            assert made.get("SecurityGroupIds") or made.get("networkInterfaces")


@pytest.mark.parametrize("name", FILES)
def test_every_ray_starts_with_the_token_and_the_environment(name: str) -> None:
    config = prepared(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [c for c in commands(config) if re.search(r"\bray (start|stop)\b", c)]
    assert len(starts) == 4
    assert all(c.startswith(". ~/lmsat/clusters/env.sh;") for c in starts)
    shown = subprocess.run(
        ["bash", "-c", ". clusters/env.sh; echo $RAY_AUTH_MODE; echo $PATH"],
        cwd=ROOT,
        env={"HOME": "/home/u", "PATH": "/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == ["token", "/home/u/lmsat/.venv/bin:/bin"]


@pytest.mark.parametrize("name", FILES)
def test_nodes_get_the_packages_and_what_pip_needs_to_install_them(name: str) -> None:
    config = prepared(name)
    shipped = {target.removeprefix("~/lmsat/"): source for target, source in mounts(config)}
    assert all(target == source for target, source in shipped.items())
    assert all((ROOT / source).exists() for source in shipped)
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.search(r"include = \[(.*)\]", project)
    assert needed
    packages = {p.strip(' "*') for p in needed[1].split(",")}
    files = set(re.findall(r'"([\w.]+\.md|LICENSE)"', project))
    assert packages | files | {"pyproject.toml", "constraints.txt", "clusters"} == shipped.keys()


def mounts(config: dict[str, Any]) -> list[tuple[str, str]]:
    return [(t, s) for t, s in config["file_mounts"].items() if t.startswith("~/lmsat/")]


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_constraints(name: str) -> None:
    """The launcher here, Ray on the nodes and lmsat agree: one file says all of them."""
    import ray

    known = pins((ROOT / "constraints.txt").read_text())
    assert known["ray"] == ray.__version__
    installs = [c for c in commands(prepared(name)) if "pip" in c or "setup.sh" in c]
    assert len(installs) == 2
    for install in installs:
        script, *more = install.removeprefix("bash ").split()
        assert script == "~/lmsat/clusters/setup.sh"
        for package in more:
            ((project, version),) = pins(package).items()
            assert known.get(project, version) == version
    pip = [c for c in (ROOT / "clusters/setup.sh").read_text().splitlines() if "pip install" in c]
    assert len(pip) == 1
    assert "--constraint constraints.txt" in pip[0]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A node's home, as rsync leaves it, with a pip that tells what it was asked."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("secret")
    binaries = tmp_path / "lmsat/.venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    shim(binaries / "pip", 'echo "$@" >> ~/asked')
    (tmp_path / ".bashrc").write_text("# mine\n")
    return tmp_path


def shim(path: Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def test_setting_up_twice_is_setting_up_once(home: Path) -> None:
    for _ in range(2):
        subprocess.run(
            ["bash", ROOT / "clusters/setup.sh", "boto3==1"],
            env={**os.environ, "HOME": str(home)},
            check=True,
        )
    asked = (home / "asked").read_text().splitlines()
    assert asked == ["install --quiet --constraint constraints.txt --editable . boto3==1"] * 2
    lines = (home / ".bashrc").read_text().splitlines()
    assert lines == ["# mine", ". ~/lmsat/clusters/env.sh"]
    assert (home / ".ray/auth_token").stat().st_mode & 0o077 == 0


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """A Slurm of three nodes, all of them here: srun runs its command, Ray only tells of itself."""
    shims = tmp_path / "shims"
    shims.mkdir()
    shim(shims / "scontrol", "printf 'n1\\nn2\\nn3\\n'")
    shim(
        shims / "srun",
        'echo "srun $*" >> "$LOG"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"',
    )
    shim(shims / "hostname", "echo 10.0.0.1 10.0.0.2")
    # One node for the head, two for the workers; `--block` stays.
    shim(
        shims / "ray",
        """case "$1 $2" in
        "start --block")
            [[ "$*" == *--head* ]] && echo n1 >> "$LOG.up" || printf 'n2\\nn3\\n' >> "$LOG.up"
            trap 'echo stopped >> "$LOG"; exit' TERM
            while :; do sleep .05; done ;;
        "status ") sed 's/^/ 1 node_/' "$LOG.up" ;;
        "get-auth-token --generate") mkdir -p ~/.ray; echo secret > ~/.ray/auth_token ;;
        *) exit 9 ;;
        esac""",
    )
    return {
        "HOME": str(tmp_path),
        "PATH": f"{shims}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_ID": "41234",
        "SLURM_CPUS_PER_TASK": "8",
    }


SCRIPT = ROOT / "clusters/slurm.sh"


def test_slurm_starts_ray_on_all_nodes_then_the_command_in_it(slurm: dict[str, str]) -> None:
    command = ["bash", "-c", 'echo "$RAY_ADDRESS $RAY_AUTH_MODE"; wc -l < "$LOG.up"; exit 7']
    done = subprocess.run(
        ["bash", SCRIPT, *command], env=slurm, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == ["10.0.0.1:21234", "token", "3"]
    log = Path(slurm["LOG"]).read_text()
    (head,) = re.findall(r"srun (.*--head .*)", log)
    (workers,) = re.findall(r"srun (.*--address.*)", log)
    assert "--nodelist=n1 " in head
    assert '--resources={"head": 1}' in head
    assert "--nodes=2 --ntasks=2 --exclude=n1 " in workers
    assert "--address=10.0.0.1:21234" in workers
    assert log.count("stopped") == 2


def test_slurm_passes_the_end_of_the_job_on_and_waits_for_the_command(
    slurm: dict[str, str],
) -> None:
    command = 'trap "sleep .3; echo saved; exit 3" TERM; echo running; while :; do sleep .05; done'
    with subprocess.Popen(
        ["bash", SCRIPT, "bash", "-c", command], env=slurm, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout
        assert job.stdout.readline() == "running\n"
        job.terminate()
        assert job.stdout.read() == "saved\n"
        assert job.wait(timeout=20) == 3
    assert Path(slurm["LOG"]).read_text().count("stopped") == 2


def test_slurm_gives_up_where_ray_does_not_start(slurm: dict[str, str], tmp_path: Path) -> None:
    shim(
        tmp_path / "shims/ray",
        '[[ $1 == start ]] && echo "no port" >&2; [[ $1 == get-auth-token ]]',
    )
    done = subprocess.run(
        ["bash", SCRIPT, "echo", "ran"], env=slurm, capture_output=True, text=True, timeout=30
    )
    assert done.returncode != 0
    assert "ran" not in done.stdout
    assert "no port" in done.stderr
