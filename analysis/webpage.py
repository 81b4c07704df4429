"""A report as one page of HTML, which opens without a network."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import polars as pl

from analysis import interactive, printed
from analysis.chart import Chart
from analysis.summary import Answer

PAGE = Path(__file__).parent / "page"
POLICY = (  # nothing is fetched, whatever a name may hold
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
)


@dataclass(frozen=True)
class Table:
    title: str
    caption: str
    rows: pl.DataFrame
    """All of it text, the first column to the left."""


@dataclass(frozen=True)
class Report:
    title: str
    facts: str
    answers: tuple[Answer, ...]
    charts: tuple[Chart, ...]
    tables: tuple[Table, ...]
    missing: dict[str, str]
    """Figures that the records cannot support: what they would need."""


def page(report: Report, kinds: Sequence[str] = printed.KINDS) -> str:
    """As HTML; whatever a name holds is text there. `kinds`: of files that figures have beside."""
    from plotly.offline import get_plotlyjs

    plots = {c.name: interactive.plots(c) for c in report.charts}
    data = json.dumps({name: {"plots": own} for name, own in plots.items()}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # nothing in it ends the script
    css, script = ((PAGE / f"report.{kind}").read_text() for kind in ("css", "js"))
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en" data-theme="light">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.title)}</title>\n<style>{css}</style>\n</head>\n<body>",
        f'<header><button id="theme" type="button">Dark</button><h1>{escape(report.title)}</h1>',
        f'<p class="soft">{escape(report.facts)}</p></header>\n<main>',
        *_summary(report.answers),
        *_contents(report.charts),
        *(line for one in report.charts for line in _figure(one, plots[one.name], kinds)),
        *(line for one in report.tables for line in _table(one)),
        *_missing(report.missing),
        '<p id="said" class="unseen" aria-live="polite"></p></main>',
        "<footer><p>Made by lmsat from records; Godey et al. 2024 is arXiv 2404.07647. Arrow keys "
        "walk over the points of a figure, a click on a name hides its series.</p></footer>",
        f'<script type="application/json" id="charts">{data}</script>',
        f"<script>{get_plotlyjs()}</script>\n<script>{script}</script>\n</body>\n</html>\n",
    ])  # fmt: skip


def _summary(answers: Iterable[Answer]) -> Iterable[str]:
    yield '<section id="summary"><h2>Summary</h2>'
    for one in answers:
        items = "".join(f"<li>{escape(line)}</li>" for line in one.lines)
        yield f"<h3>{escape(one.question)}</h3><ul>{items}</ul>"
    yield "</section>"


def _contents(charts: Sequence[Chart]) -> Iterable[str]:
    links = (f'<li><a href="#{escape(c.name)}">{escape(c.heading)}</a></li>' for c in charts)
    yield f'<nav aria-label="Figures"><ol>{"".join(links)}</ol></nav>'


def _figure(one: Chart, plots: list[dict[str, Any]], kinds: Sequence[str]) -> Iterable[str]:
    name = escape(one.name)
    heading = escape(one.heading)
    yield f'<section id="{name}"><h2>{heading}</h2><figure aria-label="{heading}">'
    cells = " cells" if one.points["kind"].eq("cells").any() else ""
    alone = " one" if len(one.panels) == 1 else ""
    yield f'<div class="panels{alone}{cells}">'
    for i, plot in enumerate(plots):
        yield (
            f'<div class="plot" tabindex="0" role="img" data-chart="{name}" data-panel="{i}" '
            f'aria-label="{escape(plot["label"])}; arrow keys read its points"></div>'
        )
    yield "</div>"
    if entries := interactive.legend(one):
        yield '<div class="legend" role="group" aria-label="Series">'
        yield from (_entry(entry) for entry in entries)
        yield "</div>"
    yield f"<figcaption>{escape(one.caption)}</figcaption></figure>"
    links = (f'<a href="{name}.{kind}">{kind.upper()}</a>' for kind in (*kinds, "csv"))
    button = f'<button type="button" class="csv" data-chart="{name}">Numbers</button>'
    yield f'<div class="files">{button}'
    yield f"<span>Beside this file: {' '.join(links)}</span></div></section>"


def _entry(entry: dict[str, str]) -> str:
    dashes = {"dash": "6 3", "dot": "2 3", "dashdot": "6 3 2 3"}.get(entry["dash"], "none")
    line = (
        f'<svg width="26" height="10" aria-hidden="true"><line x1="0" y1="5" x2="26" y2="5" '
        f'stroke="{entry["colour"]}" stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )
    name = escape(entry["name"])
    return f'<button type="button" aria-pressed="true" data-series="{name}">{line}{name}</button>'


def _table(one: Table) -> Iterable[str]:
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in one.rows.columns)
    yield f"<section><h2>{escape(one.title)}</h2><p class=soft>{escape(one.caption)}</p>"
    yield f'<div class="table" tabindex="0" role="region" aria-label="{escape(one.title)}">'
    yield f"<table><thead><tr>{head}</tr></thead><tbody>"
    for row in one.rows.iter_rows():
        yield "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>"
    yield "</tbody></table></div></section>"


def _missing(missing: dict[str, str]) -> Iterable[str]:
    if not missing:
        return
    items = "".join(f"<li>{escape(k)}: {escape(why)}.</li>" for k, why in missing.items())
    yield f'<section id="missing"><h2>What these records cannot show</h2><ul>{items}</ul></section>'
