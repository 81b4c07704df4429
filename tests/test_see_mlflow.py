"""What a sweep found, seen in MLflow's UI: a real server, a real browser, clicked through."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import polars as pl
import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from playwright.sync_api import Browser, Page, ViewportSize, expect
from safetensors.torch import load_file

from analysis import tables
from orchestrator import grid, ledger, plan, sweep, tracking
from orchestrator.driver import Driver
from orchestrator.progress import Progress
from orchestrator.tracker import Tracker
from tests.browser import chromium, keep
from tests.conftest import TINY
from tests.mlserver import free_port
from trainables import corpus, pretrain

GRID = {
    **yaml.safe_load(TINY),
    "name": "seen",
    "model": {"size": "nano-8"},
    "train": {"tokens": 10_240, "batch": 8, "sequence": 64},
    "system_metrics": True,
}
expect.set_options(timeout=30_000)  # beside other tests MLflow is slow
WIDE: ViewportSize = {"width": 1280, "height": 800}
SCREENSHOTS = os.environ.get("LMSAT_SCREENSHOTS")  # a folder, for pictures of a larger sweep
if SCREENSHOTS:
    GRID["model"] = {"size": ["nano-8", "nano-16"]}
    GRID["head"] = {"rank": [2, 4, "full"]}
    GRID["train"] = {"tokens": 131_072, "batch": 8, "sequence": 64}


class Sweep:
    """A sweep as its driver goes through it, trained by this process: so it can wait."""

    def __init__(self, folder: Path, cache: Path) -> None:
        file = folder / "seen.yaml"
        file.write_text(yaml.safe_dump(GRID, sort_keys=False))
        self.grid, self.cache, self.watcher = grid.load(file), cache, Progress(quiet=True)
        self.folder = folder / "runs" / "seen"
        ledger.make(self.folder, folder)
        watcher, uri = self.watcher, tracking.default_uri(folder / "runs")
        sweep._check_text(self.grid, cache, watcher)
        planned = plan.plan(self.grid, cache)
        sweep._keep(self.grid, planned.costs, None, self.folder)
        note, marked = sweep._note(self.grid, self.folder), sweep._hash(self.grid)
        self.tracker = Tracker(uri, self.folder, watcher, note, marked)
        self.driver = Driver(self.folder, self.tracker, watcher, cache)
        self.driver.add(self.grid.trials, planned)

    def train(self, trial: dict[str, Any], steps: int | None = None) -> None:
        """A trial to its end, or for so many steps."""
        asked = iter(range(10**9))
        left = pretrain.train(
            trial,
            self.folder,
            self.cache,
            self.driver.on_result,
            lambda: steps is not None and next(asked) >= steps,
        )
        if left.status != "stopped":
            ledger.conclude(self.folder, trial["id"], left.status, left.step, left.files)
            self.driver.on_end(trial["id"])

    def finish(self) -> None:
        for id in self.driver.pending:
            self.train(self.driver.entries[id]["trial"])
        sweep._show(self.folder, self.watcher)
        self.tracker.close()


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Sweep:
    """One trial at work, one that waits."""
    made = Sweep(tmp_path_factory.mktemp("to be seen"), cache)
    first = made.grid.trials[0]
    made.driver.on_start(first["id"])
    made.train(first, steps=12)
    return made


@pytest.fixture(scope="module")
def finished(seen: Sweep) -> Sweep:
    seen.finish()
    return seen


@pytest.fixture(scope="module")
def address(seen: Sweep) -> Iterator[str]:
    """Of the UI that `lmsat ui` opens."""
    port, script = free_port(), str(Path(sys.executable).parent / "lmsat")
    out = str(seen.folder.parent)
    command = [script, "ui", "--out", out, "--port", str(port)]
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert server.poll() is None, "the server ended"
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=2).close()
                    break
                except OSError:
                    time.sleep(0.1)
            assert server.stdout is not None
            assert server.stdout.readline().decode().startswith(f"seen: {address}/#/experiments/")
            yield address
        finally:
            os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """As who comes for the first time; what MLflow puts before them is closed."""
    page = browser.new_page(viewport=WIDE)
    for name in ("Close", "Got it"):
        button = page.get_by_role("button", name=name, exact=True)
        page.add_locator_handler(button, lambda found: found.first.click())
    page.goto(f"{address}/#/experiments")
    yield page
    page.close()


def open_runs(page: Page) -> Page:
    """From the list of experiments to the experiment, and by its description to its runs."""
    page.get_by_role("link", name="seen", exact=True).click()
    with page.expect_popup() as opened:
        page.get_by_role("link", name="Runs, best first").click()
    opened.value.set_viewport_size(WIDE)
    return opened.value


def test_a_run_at_work_shows_its_curves_and_the_machine(page: Page) -> None:
    runs = open_runs(page)
    runs.get_by_role("link", name="nano-8 r=2 s=0").click()
    expect(runs.get_by_text("Running", exact=True)).to_be_visible()
    runs.get_by_role("tab", name="Model metrics").click()
    for name in ("train/loss", "held_out/loss", "model/singular_entropy"):
        runs.get_by_placeholder("Search metric charts").fill(name)
        card = runs.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=f"({name})")
        expect(card.locator("path.js-line").first).to_be_visible()
    runs.get_by_role("tab", name="System metrics").click()
    card = runs.get_by_test_id("experiment-view-compare-runs-card").filter(
        has_text="system/cpu_utilization_percentage"
    )
    expect(card.locator("path.js-line").first).to_be_visible()


def test_the_description_says_what_was_asked_and_how_to_go_on(page: Page, finished: Sweep) -> None:
    page.get_by_role("link", name="seen", exact=True).click()
    page.get_by_text(f"{len(finished.grid.trials)} trials of the grid").click()
    for line in ("train_bpe: 1024", f"lmsat sweep --grid {finished.folder}/grid.yaml"):
        expect(page.get_by_text(line).first).to_be_visible()


def test_runs_come_by_their_final_loss_with_the_columns_that_matter(
    page: Page, finished: Sweep
) -> None:
    runs = open_runs(page)
    losses = tables.final_losses(finished.folder).sort("loss")
    cells = '[role=gridcell][col-id="{}"]'
    names = runs.locator(cells.format("attributes.`Run Name`")).get_by_role("link")
    expect(names).to_have_text([*losses["name"], "seen"])
    values = runs.locator(cells.format("metrics.`held_out/loss`"))
    expect(values).to_have_text([*losses["loss"].cast(pl.String), "-"])
    headers = runs.locator("[role=columnheader][col-id^='metrics.']")
    expect(headers).to_have_count(5)
    left = headers.filter(has_text="held_out/loss").bounding_box()  # the page's order is another
    assert left and all(left["x"] <= box["x"] for h in headers.all() if (box := h.bounding_box()))
    keep(runs, "mlflow_experiment")


def test_from_a_run_to_a_figure_of_spectra_and_the_report(page: Page, finished: Sweep) -> None:
    runs = open_runs(page)
    runs.get_by_role("link", name="nano-8 r=full s=0").click()
    expect(runs.get_by_text("Finished", exact=True)).to_be_visible()
    keep(runs, "mlflow_run")
    runs.get_by_role("tab", name="Model metrics").click()
    expect(runs.locator("path.js-line").first).to_be_visible()
    keep(runs, "mlflow_curves")
    runs.get_by_role("tab", name="Overview").click()
    runs.get_by_role("link", name="seen", exact=True).last.click()
    expect(runs.get_by_role("link", name="nano-8 r=2 s=0")).to_be_visible()
    keep(runs, "mlflow_parent")
    runs.get_by_role("tab", name="Artifacts").click()
    figure = next(file.name for file in (finished.folder / "report").glob("*spectr*.png"))
    runs.get_by_text(figure, exact=True).first.click()
    picture = runs.locator("img[alt], .image-outer-container img").last
    expect(picture).to_be_visible()
    assert picture.evaluate("img => img.naturalWidth") > 300
    keep(runs, "mlflow_figure")
    runs.get_by_text("report.html", exact=True).first.click()
    shown = runs.frame_locator("iframe")
    expect(shown.get_by_role("heading").first).to_be_visible()
    shown.locator(".plot").first.scroll_into_view_if_needed()
    expect(shown.locator(".plot .main-svg").first).to_be_visible()


def test_the_ui_is_on_loopback_alone(address: str) -> None:
    port = int(address.rpartition(":")[2])
    sockets = [c for c in psutil.net_connections() if c.status == "LISTEN"]
    assert {c.laddr.ip for c in sockets if c.laddr.port == port} == {"127.0.0.1"}


LOAD = """
import json, sys
for ours in ("orchestrator", "trainables", "analysis"):
    sys.modules[ours] = None
import mlflow, torch
from transformers import AutoModelForCausalLM
store, ids, models = json.loads(sys.argv[1])
mlflow.set_tracking_uri(store)
for name, uri in models.items():
    pipeline = mlflow.transformers.load_model(uri)
    assert pipeline("My fellow citizens", max_new_tokens=3)[0]["generated_text"]
    folder = mlflow.artifacts.download_artifacts(uri)
    plain = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits.tolist() for model in (pipeline.model, plain)]
    print(json.dumps([name, found]))
"""


def test_a_trials_model_loads_back_without_lmsat(finished: Sweep) -> None:
    """By mlflow, and by transformers alone; its factored head too."""
    uri = tracking.default_uri(finished.folder.parent)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("seen").experiment_id
    logged = {m.name: m for m in client.search_logged_models([experiment])}
    losses = tables.final_losses(finished.folder)
    assert {n: m.metrics[0].value for n, m in logged.items()} == dict(losses["name", "loss"].rows())
    ids, uris = list(range(0, 960, 40)), {name: m.model_uri for name, m in logged.items()}
    code = [sys.executable, "-c", LOAD, json.dumps([uri, ids, uris])]
    done = subprocess.run(code, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(map(json.loads, done.stdout.splitlines()))
    for trial in finished.grid.trials:
        own = pretrain.build(trial, 1024).whole().eval()
        weights = finished.folder / "trials" / trial["id"] / "model" / "model.safetensors"
        own.load_state_dict(load_file(weights))
        with torch.no_grad():
            wanted = own(torch.tensor([ids])).logits
        assert wanted.std() > 0.1
        for logits in found[trial["name"]]:
            assert (torch.tensor(logits) - wanted).abs().max() < 1e-5
        place = Path(url2pathname(urlparse(logged[trial["name"]].artifact_location).path))
        shared = (place / "model" / "model.safetensors").samefile(weights)
        assert shared == (trial["head"]["rank"] is None)  # no second copy of what is the same


def test_a_run_names_the_texts_it_read(finished: Sweep) -> None:
    client = MlflowClient(tracking.default_uri(finished.folder.parent))
    experiment = client.get_experiment_by_name("seen").experiment_id
    runs = client.search_runs([experiment], "tags.lmsat.trial LIKE '%'")
    key = corpus.key(finished.grid.trials[0]["text"])
    text = corpus.find(key, finished.cache)
    assert text is not None and len(runs) == len(finished.grid.trials)
    for run in runs:
        read = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
        assert {part: json.loads(d.profile)["tokens"] for part, d in read.items()} == text.tokens
        assert {d.name for d in read.values()} == {"sotu"}
    assert len({d.dataset.digest for run in runs for d in run.inputs.dataset_inputs}) == 2
