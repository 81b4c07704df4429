"""What a shell completes arguments to. Loads nothing but the standard library: it is waited for."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

GRIDS = Path(__file__).parent / "grids"


def slug(name: str) -> str:
    """A trial's name as a shell takes it without quotes: nano-64 r=16 s=0 is nano-64_r16_s0."""
    return name.replace(" ", "_").replace("=", "")


def grids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Files, and what ships with lmsat."""
    above, slash, _ = incomplete.rpartition("/")
    folder = Path(above + slash)
    near = [path for path in _inside(folder) if path.suffix in (".yaml", ".yml")]
    return _beginning(incomplete, [*map(str, near), *(path.name for path in _inside(GRIDS))])


def sweeps(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Their names under OUT."""
    return _beginning(incomplete, names(_out(ctx), "plan.json"))


def measured(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The same, and of what was probed."""
    return _beginning(incomplete, names(_out(ctx), "ledger"))


def tables(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The same, or else files."""
    found = measured(ctx, param, incomplete)
    return [CompletionItem(one) for one in found] or [CompletionItem(incomplete, type="file")]


def trials(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Those of the sweep that was given, by name."""
    name = str(ctx.params.get("name") or "")
    for sweep in (_out(ctx) / name, Path(name)):
        try:
            found: list[dict[str, Any]] = json.loads((sweep / "plan.json").read_text())["trials"]
            return _beginning(incomplete, [slug(trial["name"]) for trial in found])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []


def names(out: Path, part: str) -> list[str]:
    """Of the directories of OUT that have this in them."""
    return [path.name for path in _inside(out) if (path / part).exists()]


def _out(ctx: click.Context) -> Path:
    return Path(ctx.params.get("out") or "runs")


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _beginning(incomplete: str, known: Iterable[str]) -> list[str]:
    return [one for one in dict.fromkeys(known) if one.startswith(incomplete)]
