"""What every command says with --json is what docs/schemas/ says of it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator, ValidationError

from orchestrator import tracking
from orchestrator.cli import main
from tests import made, schemas
from tests.mlserver import free_port

PAPER = Path(__file__).parents[2] / "analysis" / "paper"

# What is run here, by command, beside a sweep that was made and its grid.
HERE = {
    "new": [
        "new mine --size nano-8 --budget 100k",
        "new big --size pythia-12b",
    ],
    "plan": ["plan --grid made.yaml", "plan --grid gpu.yaml --on 8xA100-80G"],
    "sweep": ["sweep --grid made.yaml --dry-run"],
    "status": ["status made"],
    "logs": ["logs made nano-8_r2", "logs made nano-16_r2", "logs made nano-16_rfull"],
    "ranks": ["ranks made"],
    "figures": ["figures made"],
    "completion": ["completion bash", "completion zsh", "completion fish"],
    "fit": [
        "fit made --form rank --draws 20",
        f"fit {PAPER}/law.csv --fix B=410.7,b=0.28,E=1.69 --draws 20 --predict N=7e9,D=14e10",
    ],
    "verify": ["verify made"],
    "track": ["track made"],
    "report": ["report made"],
    "compare": ["compare made made"],
    "reproduce": ["reproduce godey2024 --dry-run", "reproduce godey2024 --figure 7 --dry-run"],
}
# What needs Ray, a model or a server is checked where that is at work anyway.
ELSEWHERE = {
    "probe": "test_probe.py",
    "dimension": "test_dimension.py",
    "bounds": "test_bounds.py",
    "doctor": "test_doctor.py",
    "ui": "test_json.py",
    "onset": "test_onset.py",
    "sweep": "test_sweep.py",
    "ranks": "test_rankfit_sweep.py",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("json")
    made.sweep(folder, cache, {1: "failed", 2: "stopped", 5: "waiting"})
    on_gpus = {**made.GRID, "resources": {"gpus": 1}}
    (folder / "gpu.yaml").write_text(yaml.safe_dump(on_gpus))
    return folder


def test_every_command_has_a_schema_and_is_checked() -> None:
    assert {*main.commands} == {*HERE, *ELSEWHERE} == {*schemas.SCHEMAS}
    assert all("as_json" in [p.name for p in command.params] for command in main.commands.values())
    for command, file in ELSEWHERE.items():
        assert f'schemas.check("{command}"' in (Path(__file__).parent / file).read_text(), command


@pytest.mark.parametrize("line", [line for lines in HERE.values() for line in lines])
def test_a_command_says_what_its_schema_says(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    out = [] if line.split()[0] in ("new", "plan", "completion") else ["--out", "."]
    done = CliRunner().invoke(main, [*line.split(), *out, "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    if line == "track made":
        _ui(folder)
    assert schemas.check(line.split()[0], done.stdout)


def _ui(out: Path) -> None:
    """A line before it serves, and then it does."""
    command = [Path(sys.executable).parent / "lmsat", "ui", "--port", str(free_port()), "--json"]
    with subprocess.Popen([*command, "--out", out], stdout=subprocess.PIPE, text=True) as ui:
        assert ui.stdout
        found = schemas.check("ui", ui.stdout.readline())
        ui.kill()
    assert found["store"] == tracking.default_uri(out)


@pytest.mark.parametrize("command", schemas.SCHEMAS)
def test_a_schema_is_one_and_refuses_what_it_does_not_name(command: str) -> None:
    schema = schemas.SCHEMAS[command]
    Draft202012Validator.check_schema(schema)
    for wrong in ({}, {"nobody": "named this"}, [{}], "text", None):
        with pytest.raises(ValidationError):
            schemas.check(command, json.dumps(wrong))


def test_every_number_says_what_it_is() -> None:
    """Each field that has a number of its own, by its description or its name."""

    def fields(tree: object, see: Callable[[str, dict[str, object]], None]) -> None:
        if isinstance(tree, dict):
            for name, field in tree.get("properties", {}).items():
                see(name, field)
            for inner in tree.values():
                fields(inner, see)
        elif isinstance(tree, list):
            for inner in tree:
                fields(inner, see)

    bare: list[str] = []

    def see(name: str, field: dict[str, object]) -> None:
        if field.get("type") in ("number", ["number", "null"]) and not field.get("description"):
            bare.append(name)

    for schema in schemas.SCHEMAS.values():
        fields(schema, see)
    assert {*bare} <= {"value", "rho"}
