"""The documentation: what it links to, what is made from the code, and the site."""

import functools
import importlib.util
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cli import main
from tests.browser import chromium
from tests.test_architecture import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.fixture(scope="module")
def site() -> Any:
    """docs/site.py"""
    spec = importlib.util.spec_from_file_location("site_of_lmsat", DOCS / "site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Those between pages and to anchors are looked at by `make docs`, too."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_the_reference_of_grids_is_that_of_the_schema(site: Any) -> None:
    """Else: python docs/site.py > docs/grid.md"""
    assert (DOCS / "grid.md").read_text() == site.grid_reference()


def test_bounds_of_a_field_are_told() -> None:
    said = (DOCS / "grid.md").read_text()
    assert "| `held_out` | number > 0 < 1 | `0.1` |" in said
    assert "| `train_bpe` | integer ≥ 257" in said


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_a_how_to(name: str) -> None:
    """Listed by question; the page it points at shows the command, and what comes of it."""
    (row,) = re.findall(rf"\| `lmsat {name}[ `][^|]*\| (.*) \|", (DOCS / "howto.md").read_text())
    page = re.findall(r"\]\((\w+\.md)", row)[0]
    text = (DOCS / page).read_text()
    assert re.search(rf"lmsat {name}\b", text)
    assert "![" in text or re.search(r"```\n\$ |```text", text), page


def test_the_citation_is_complete() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(found)
    assert found["version"] in (ROOT / "pyproject.toml").read_text()


def test_the_site_has_equations_and_can_be_searched(tmp_path: Path) -> None:
    """Built strictly: a link or an anchor that leads nowhere fails it. Nothing comes from
    elsewhere."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    serve = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server, chromium() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_address[1]}/"
        page = browser.new_page()
        errors: list[str] = []
        fetched: list[str] = []
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(f"{home}science.html")
        assert page.locator("math").count() > 10
        assert "\\operatorname" not in page.locator("article").inner_text()
        page.get_by_role("link", name="Commands").first.click()
        page.wait_for_url("**/commands.html")
        assert "lmsat sweep" in page.locator("article").inner_text()
        page.keyboard.press("/")
        page.keyboard.type("anisotropy")
        page.locator(".md-search-result__link").first.wait_for()
        assert not errors and all(url.startswith(home) for url in fetched)
        server.shutdown()
