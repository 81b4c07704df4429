"""What a shell completes, in a real bash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator import grid
from orchestrator.cli import main
from tests import made
from tests.ptys import LMSAT, Terminal

ON_PATH = {"PATH": f"{LMSAT.parent}:{os.environ['PATH']}"}
# Each line of words on stdin is completed, the last word of it being typed.
SCRIPT = """\
eval "$(lmsat completion bash)"
while IFS='' read -r line; do
    IFS='|' read -ra COMP_WORDS <<< "$line"
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    COMP_WORDS[COMP_CWORD]=${COMP_WORDS[COMP_CWORD]%$}
    COMPREPLY=()
    _lmsat_completion lmsat
    (IFS='|'; echo "${COMPREPLY[*]}")
done
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("completing")
    made.sweep(folder / "runs", cache)
    made.sweep(folder / "other", cache, change={"name": "elsewhere"})
    (folder / "runs" / "measured" / "ledger").mkdir(parents=True)
    (folder / "mine.yaml").write_text("")
    (folder / "grids").mkdir()
    (folder / "grids" / "yours.yaml").write_text("")
    return folder


def test_bash_completes_commands_sweeps_trials_and_grids(folder: Path) -> None:
    """A $ ends the word that is being typed."""
    shipped = {path.name for path in grid.SHIPPED.iterdir()}
    small = {f"nano-8_r{r}_s0" for r in (2, 4, "full")}
    wanted = {
        "lmsat|stat$": {"status"},
        "lmsat|status|$": {"made"},
        "lmsat|status|--out|other|$": {"elsewhere"},
        "lmsat|status|nosuch$": set(),
        "lmsat|logs|made|nano-8$": small,
        "lmsat|logs|--out|other|elsewhere|nano-8$": small,
        "lmsat|verify|$": {"made", "measured"},
        "lmsat|fit|ma$": {"made"},
        "lmsat|sweep|--grid|$": {"mine.yaml", *shipped},
        "lmsat|plan|--grid|rank$": {"rankfit.yaml", "ranks.yaml"},
        "lmsat|plan|--grid|grids/$": {"grids/yours.yaml"},
        "lmsat|completion|$": {"bash", "zsh", "fish"},
    }
    done = subprocess.run(
        ["bash", "--norc", "-c", SCRIPT],
        input="\n".join(wanted) + "\n",
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **ON_PATH},
        timeout=60,
    )
    found = [{*line.split("|")} - {""} for line in done.stdout.splitlines()]
    assert dict(zip(wanted, found, strict=True)) == wanted, done.stderr


def test_a_name_is_completed_where_it_is_typed(folder: Path) -> None:
    terminal = Terminal("bash", "--norc", "-i", cwd=folder, **ON_PATH)
    terminal.type('eval "$(lmsat completion bash)"; echo rea""dy\n')
    terminal.see("ready")
    terminal.type("lmsat logs ma\t")
    terminal.see("made ")
    terminal.type("nano-16_rf\t")
    terminal.see("nano-16_rfull_s0 ")
    terminal.type("\nexit\n")
    terminal.end()
    assert "nano-16 r=full s=0  " in terminal.shown


def test_completing_loads_nothing_heavy(folder: Path) -> None:
    heavy = ["torch", "ray", "mlflow", "transformers", "polars", "pydantic", "yaml", "rich"]
    code = (
        "import sys; from orchestrator.cli import main\n"
        "try: main(prog_name='lmsat', complete_var='_LMSAT_COMPLETE')\nexcept SystemExit: pass\n"
        f"print('loaded', sorted(set({heavy}) & set(sys.modules)))"
    )
    asked = {"_LMSAT_COMPLETE": "bash_complete"}
    asked |= {"COMP_WORDS": "lmsat logs made ", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **asked},
        check=True,
    )
    assert "plain,nano-8_r2_s0" in done.stdout and "loaded []" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_says_where_it_belongs(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert f"{shell}_complete" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("# Into ~/.")


def test_another_shell_is_refused() -> None:
    done = CliRunner().invoke(main, ["completion", "csh"])
    assert done.exit_code == 2 and "'bash', 'zsh', 'fish'" in done.stderr
