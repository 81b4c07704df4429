"""What the site adds to these pages: the reference of grids and commands, equations, and the source
files that pages link to.

    python docs/site.py > docs/grid.md
"""

import html
import re
from inspect import cleandoc
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).parents[1]
SOURCE = re.compile(r"\]\(\.\./([^)#]+)\)")  # a link out of the documentation
FAR = 2**32  # bounds that nobody meets are not told
GRID = """\
# Grid files

Made from [orchestrator/schema.py](../orchestrator/schema.py). `name` is what the sweep is called.
Any other field may be a list and is then an axis; the grid is the product of its axes. `trials:`
lays cells over it: `- {model: {size: nano-64}, head: {rank: 8}, train: {lr: 5e-3}}` replaces the
cell of that size and rank, or adds one. Ranks above d are left out, with a notice.
"""


def grid_reference() -> str:
    """Every field of a grid: what it may be, its default and its meaning."""
    from orchestrator.schema import Trial

    parts = [GRID, "## At the top\n", _fields(Trial)]
    for name, annotation in get_type_hints(Trial).items():
        for section in (annotation, *get_args(annotation)):
            if hasattr(section, "model_fields"):
                parts += [f"## {name}\n", cleandoc(section.__doc__) + "\n", _fields(section)]
    return "\n".join(parts)


def _fields(section: Any) -> str:
    rows = ["| field | may be | default | meaning |", "|---|---|---|---|"]
    hints = get_type_hints(section, include_extras=True)
    for name, field in section.model_fields.items():
        what = "text, or fields" if name == "tokenizer" else _kind(hints[name])
        default = "**needed**" if field.is_required() else _default(field.default)
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{name}` | {what} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    from pydantic import BaseModel

    if value is None or isinstance(value, BaseModel):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _kind(annotation: Any) -> str:
    """Of a field's type, with its bounds."""
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{one}`" for one in args)
    if get_origin(annotation) is list:
        return f"list of {_kind(args[0])}"
    if get_origin(annotation) in (UnionType, Union):
        return " or ".join(_kind(one) for one in args if one is not NoneType)
    if get_origin(annotation) is Annotated:
        return " ".join([_kind(args[0]), *_bounds(annotation)])
    names = {str: "text", bool: "yes or no", int: "integer", float: "number"}
    return names.get(annotation, "fields, see below")


def _bounds(annotation: Any) -> list[str]:
    """The closest from below and from above; outer ones are closer."""
    limits = [m for one in get_args(annotation)[1:] for m in getattr(one, "metadata", ())]
    found = {}
    for limit in limits:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if abs(value := getattr(limit, name, FAR)) < FAR:
                found[name[0]] = f"{sign} {value}"
    return [*found.values()]


def commands() -> str:
    """What every command says of itself."""
    from click import Context

    from orchestrator.cli import PARTS, main

    top = Context(main, info_name="lmsat")
    parts = ["# Commands\n", "What `--help` says. How to use them: [by question](howto.md).\n"]
    for part, group in PARTS.items():
        parts.append(f"## {part}\n")
        for command in group:
            context = Context(command, info_name=command.name, parent=top, max_content_width=90)
            parts += [f"### {command.name}\n", f"```text\n{command.get_help(context)}\n```\n"]
    return "\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """A page for each source file that a page links to, which has to be there."""
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import File

    made = {"commands.md": commands()}
    for page in files.documentation_pages():
        for name in SOURCE.findall(page.content_string):
            if not (ROOT / name).is_file():
                raise PluginError(f"{page.src_uri}: links to ../{name}, which is not there")
            text, kind = (ROOT / name).read_text(), Path(name).suffix.lstrip(".")
            made[f"source/{name}.md"] = f"# {name}\n\n````{kind}\n{text}\n````\n"
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return SOURCE.sub(r"](source/\1.md)", markdown)


def on_page_content(text: str, **_: Any) -> str:
    """Equations as MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    def drawn(found: re.Match[str]) -> str:
        tex, block = html.unescape(found[2]), found[1] == "div"
        return convert(tex, display="block" if block else "inline")

    return re.sub(
        r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', drawn, text, flags=re.S
    )


if __name__ == "__main__":
    print(grid_reference(), end="")
