"""The three rooms and their arrows: orchestrator -> trainables -> analysis."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("orchestrator", "trainables", "analysis")
FORBIDDEN = {
    "analysis": {"trainables", "orchestrator", "ray", "mlflow", "deepspeed"},
    "trainables": {"orchestrator", "ray", "mlflow"},
    "orchestrator": {"deepspeed"},
}
ONLY_IN = {
    "ray": {f"orchestrator/{name}.py" for name in ("cluster", "sweep", "team", "job")},
    "mlflow": {f"orchestrator/tracking/{name}.py" for name in ("models", "places", "store")},
    "deepspeed": {"trainables/engine.py"},
}


def imports(file: Path) -> set[str]:
    """Top-level packages a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        assert not imports(file) & FORBIDDEN[room], file


@pytest.mark.parametrize("package", ONLY_IN)
def test_each_framework_is_known_to_its_own_modules(package: str) -> None:
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    users = {str(file.relative_to(ROOT)) for file in files if package in imports(file)}
    assert users == ONLY_IN[package]


def test_help_loads_nothing_heavy() -> None:
    heavy = ["torch", "ray", "mlflow", "transformers", "polars", "pydantic", "deepspeed", "rich"]
    code = (
        "import sys; from orchestrator.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"print('loaded', sorted(set({heavy}) & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loaded []" in out.stdout


def test_workers_load_deepspeed_and_no_mlflow_drivers_neither_nor_torch() -> None:
    """A driver loads MLflow when it opens a store, later than this."""
    driver = "from orchestrator import place, sweep; place.here()"
    worker = "from trainables import engine; engine.join(1, False)"
    heavy = {"deepspeed", "mlflow", "torch", "scipy", "matplotlib"}
    for code, wanted in ((driver, []), (worker, ["deepspeed", "torch"])):
        code += f"; import sys; print('loaded', sorted({heavy} & {{*sys.modules}}))"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"loaded {wanted}" in out.stdout, out.stderr
