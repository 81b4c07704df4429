"""Whether two sweeps of one grid came out the same, bit for bit, wall-clock measures aside.

Each sweep is turned into facts, values with a name; then these are compared.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from analysis import records
from orchestrator import ledger, tracking
from tests.conftest import TIMING

Fact = tuple[str, Any]


def differences(
    sweep: Path,
    other: Path,
    uri: str | None = None,
    other_uri: str | None = None,
    noticed: bool = False,
) -> list[str]:
    """What `sweep` lacks, has too much, has otherwise than `other`, or what one of them has twice:
    a line for each fact. MLflow's stores are beside the sweeps, or at the URIs. Where a notice
    made one of them save at other steps, `noticed`: checkpoints at steps that both have.
    """
    steps, others = kept(sweep), kept(other)
    if noticed:
        steps = others = {id: steps[id] & others[id] for id in steps.keys() & others.keys()}
    found = _gather(facts(sweep, steps, uri))
    wanted = _gather(facts(other, others, other_uri))
    lines = []
    for fact in sorted(found | wanted):
        mine, theirs = found.get(fact, []), wanted.get(fact, [])
        if not mine or not theirs:
            lines.append(f"{fact}: {'too much' if mine else 'missing'}")
        elif len(mine) > 1 or len(theirs) > 1:
            lines.append(f"{fact}: {len(mine)} times, was {len(theirs)} times")
        elif mine != theirs:
            lines.append(f"{fact}: {mine[0]}, was {theirs[0]}")
    return lines


def kept(sweep: Path) -> dict[str, set[str]]:
    """The checkpoints of each trial."""
    folders = (sweep / "trials").glob("*/checkpoints")
    return {one.parent.name: {step.name for step in one.glob("step-*")} for one in folders}


def facts(sweep: Path, steps: dict[str, set[str]], uri: str | None = None) -> Iterator[Fact]:
    """All that a sweep has made; of checkpoints the last one of each trial at these steps."""
    for id, entry in ledger.read(sweep).items():
        yield f"ledger {id}", (entry["status"], entry["step"])
    yield from _weights(sweep)
    yield from _checkpoints(sweep, steps)
    yield from _records(sweep)
    yield from _tracked(sweep.name, uri or tracking.default_uri(sweep.parent))


def _weights(sweep: Path) -> Iterator[Fact]:
    for file in sorted((sweep / "trials").rglob("*.safetensors")):
        where = str(file.relative_to(sweep))
        yield from ((f"{where} {name}", _bits(w)) for name, w in load_file(file).items())
    for file in sorted((sweep / "trials").glob("*/model/*.json")):
        yield str(file.relative_to(sweep)), _digest(file.read_bytes())


def _checkpoints(sweep: Path, steps: dict[str, set[str]]) -> Iterator[Fact]:
    """Engine, generators, state."""
    for id in sorted(id for id in steps if steps[id]):
        last = sweep / "trials" / id / "checkpoints" / max(steps[id])
        for file in sorted(last.rglob("*")):
            where = str(file.relative_to(sweep))
            if file.suffix == ".pt":
                try:  # a pickle, but this machine's own
                    held = torch.load(file, map_location="cpu", weights_only=False)
                except Exception:
                    held = "damaged"
                yield from ((f"{where}{name}", value) for name, value in _leaves(held))
            elif file.name == "state.json" or file.name.startswith("generators"):
                held = json.loads(file.read_text())
                held.pop("files", None)  # sums of records, which have the time
                yield from ((f"{where}{name}", value) for name, value in _leaves(held))


def _records(sweep: Path) -> Iterator[Fact]:
    for table, keys in records.KEYS.items():
        for row in records.scan(sweep, table).collect().to_dicts():
            if row.get("metric") not in TIMING:
                row.pop("time", None)
                name = ", ".join(str(row.pop(key)) for key in keys)
                yield f"records/{table} {name}", {k: _bits(v) for k, v in row.items()}


def _tracked(name: str, uri: str) -> Iterator[Fact]:
    """MLflow's experiment of that name; what was deleted is not there."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return
    models = client.search_logged_models([experiment.experiment_id])
    for run in client.search_runs([experiment.experiment_id], max_results=5000):
        id, tags = run.info.run_id, run.data.tags
        where = f"MLflow {tags.get('lmsat.trial', 'sweep')}"
        yield where, (run.info.run_name, run.info.status, "mlflow.parentRunId" in tags)
        yield from ((f"{where} param {key}", value) for key, value in run.data.params.items())
        for key, value in tags.items():
            if key.startswith("lmsat.") and key != "lmsat.key":  # which is drawn at random
                yield f"{where} tag {key}", value
        for key in run.data.metrics:
            clock = key.rpartition("/")[2] in TIMING
            for m in client.get_metric_history(id, key):
                yield f"{where} metric {key} {m.step}", "?" if clock else _bits(m.value)
        yield from ((f"{where} artifact {path}", True) for path in _artifacts(client, id))
        for read in run.inputs.dataset_inputs:
            text = read.dataset
            part = ", ".join(tag.value for tag in read.tags)
            yield f"{where} dataset {part}", (text.name, text.digest, text.profile)
        there = {model.model_id for model in models}
        shown = [output for output in run.outputs.model_outputs if output.model_id in there]
        yield from ((f"{where} model", True) for _ in shown)
    for model in models:
        where = f"MLflow model {model.tags['lmsat.trial']}"
        yield where, (model.name, model.status.name, model.tags.get("lmsat.weights"), model.params)
        for m in model.metrics or ():
            clock = m.key.rpartition("/")[2] in TIMING
            yield f"{where} metric {m.key} {m.step}", "?" if clock else _bits(m.value)


def _artifacts(client: MlflowClient, run: str, folder: str | None = None) -> Iterator[str]:
    for one in client.list_artifacts(run, folder):
        if one.is_dir:
            yield from _artifacts(client, run, one.path)
        else:
            yield one.path


def _gather(found: Iterator[Fact]) -> dict[str, list[Any]]:
    gathered: dict[str, list[Any]] = defaultdict(list)
    for name, value in found:
        gathered[name].append(value)
    return gathered


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Of nested dictionaries and lists, with the way to each."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{name} {key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{name} {index}")
    else:
        yield name, _bits(tree)


def _bits(value: Any) -> Any:
    """Equal where the bits are."""
    if isinstance(value, torch.Tensor):
        whole = value.detach().contiguous().flatten().view(torch.uint8).numpy()
        return f"{value.dtype} {tuple(value.shape)} {_digest(whole.tobytes())}"
    if isinstance(value, float):
        return value.hex()
    return _digest(value.encode()) if isinstance(value, str) and len(value) > 80 else repr(value)


def _digest(held: bytes) -> str:
    return hashlib.sha256(held).hexdigest()[:16]
