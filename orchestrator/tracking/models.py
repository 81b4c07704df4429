"""What a trial reads and what it becomes, as MLflow's own datasets and models."""

import contextlib
import hashlib
import json
import platform
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import yaml

from analysis import sealed
from orchestrator.tracking import names
from trainables import plain

MOST = 100e6  # bytes of a model that is written or sent though nobody asked for it
_WEIGHTS = "lmsat.weights"  # of a model that is whole: a hash of what it was made of


def datasets(trial: dict[str, Any], text: dict[str, dict[str, int]] | None) -> list[Any]:
    """The two parts of a trial's text, as inputs of its run. `text`: tokens, bytes and documents of
    each, where they are known."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name, kind, source = _source(trial["corpus"], trial["text"]["source"])
    found = []
    for part in ("train", "held_out"):
        identity = json.dumps([trial["text"], part], sort_keys=True).encode()
        digest = hashlib.sha256(identity).hexdigest()[:8]
        profile = json.dumps({k: v[part] for k, v in text.items()}) if text else None
        schema = json.dumps({"mlflow_colspec": [{"name": "text", "type": "string"}]})
        dataset = Dataset(name, digest, kind, json.dumps(source), schema, profile)
        found.append(DatasetInput(dataset, [InputTag("mlflow.data.context", part)]))
    return found


def _source(corpus: dict[str, Any], text: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """What to call a corpus, and where it is, as MLflow's own kinds of sources say it."""
    if hub := corpus["hub"]:
        where = {"path": hub, "config_name": corpus["config"], "split": corpus["split"]}
        return hub, "hugging_face", {**where, "revision": text.get("revision")}
    if files := corpus["files"]:
        scheme, _, _ = files.partition("://")
        path = Path(files)
        named = path.parent.name if "*" in path.name else path.name
        return named or files, "local" if scheme == files else scheme, {"uri": files}
    package = corpus["package"]
    return package, "code", {"tags": {"mlflow.source.name": f"the package {package}"}}


def wanted(trial: dict[str, Any], folder: Path, local: bool) -> bool:
    """Whether the model in `folder` is to be logged: one that transformers alone can load, that
    was asked for or is cheap. `local`: MLflow's files are on a disk of this machine."""
    asked = trial.get("log_model")
    linear = trial["kind"] == "pretrain" and trial["head"]["kind"] in plain.LINEAR
    if not linear or asked is False or not (folder / "model.safetensors").is_file():
        return False
    whole, unlinked = plain.size(folder)
    return bool(asked) or (unlinked if local else whole) <= MOST


def one(client: Any, experiment: str, key: str, run: str) -> Any | None:
    """The run's model, if there is one: the first. Others, and those of other runs, are deleted."""
    found = client.search_logged_models([experiment], f"tags.`lmsat.key` = '{key}'")
    own = sorted((m for m in found if m.source_run_id == run), key=lambda m: m.creation_timestamp)
    for model in found:
        if model not in own[:1]:
            client.delete_logged_model(model.model_id)
    return own[0] if own else None


def make(client: Any, experiment: str, key: str, run: str, entry: dict[str, Any]) -> Any:
    """A model of a run, without its files yet."""
    trial = entry["trial"]
    name = "".join("_" if c in "/:.%\"'" else c for c in trial["name"])  # what MLflow takes
    params = {k: str(v) for k, v in entry["tags"].items() if v is not None}
    tags = {"lmsat.key": key, "lmsat.trial": entry["id"]}
    return client.create_logged_model(experiment, name, run, tags, params, "transformers")


def fill(client: Any, model: Any, folder: Path, step: int) -> None:
    """Give a logged model its files, made of trials/<id>/model/, and show it with its run. They
    are not sent again where they are; a link is made anew, as its file may be another by now."""
    mark = sealed.digest(folder / "model.safetensors")[:16]
    local = model.artifact_location.startswith("file://")
    if local or model.tags.get(_WEIGHTS) != mark or not _sent(client, model):
        with _place(client, model, folder) as place:
            plain.lay(folder, place / "model")
            tokenizer = place / "components" / "tokenizer"
            tokenizer.mkdir(parents=True, exist_ok=True)
            for file in sorted((place / "model").glob("tokenizer*")):
                plain.link(file, tokenizer / file.name)
            (place / "MLmodel").write_text(_card(model))
        if model.status != "READY":
            client.finalize_logged_model(model.model_id, "READY")
        if model.tags.get(_WEIGHTS) != mark:
            client.set_logged_model_tags(model.model_id, {_WEIGHTS: mark})
    _show(client, model, step)


def _sent(client: Any, model: Any) -> bool:
    return "MLmodel" in {file.path for file in client.list_logged_model_artifacts(model.model_id)}


@contextlib.contextmanager
def _place(client: Any, model: Any, near: Path) -> Any:
    """Where to lay files: MLflow's own folder, or one whose contents are sent there."""
    location = model.artifact_location
    if location.startswith("file://"):
        place = Path(url2pathname(urlparse(location).path))
        place.mkdir(parents=True, exist_ok=True)
        yield place
    else:
        with tempfile.TemporaryDirectory(prefix=".sending-", dir=near.parent) as folder:
            yield Path(folder)
            client.log_model_artifacts(model.model_id, folder)


def _card(model: Any) -> str:
    """By it MLflow knows how to load what lies beside."""
    import mlflow

    flavor = {
        "task": "text-generation",
        "instance_type": "TextGenerationPipeline",
        "pipeline_model_type": "AutoModelForCausalLM",
        "model_binary": "model",
        "source_model_name": model.name,
        "components": ["tokenizer"],
        "tokenizer_type": "PreTrainedTokenizerFast",
    }
    function = {"loader_module": "mlflow.transformers", "python_version": platform.python_version()}
    return yaml.safe_dump(
        {
            "artifact_path": model.artifact_location,
            "flavors": {"python_function": function, "transformers": flavor},
            "mlflow_version": mlflow.__version__,
            "model_id": model.model_id,
            "model_uuid": model.model_id,
            "run_id": model.source_run_id,
        }
    )


def _show(client: Any, model: Any, step: int) -> None:
    """Beside its run, with what sums it up."""
    from mlflow.entities import LoggedModelOutput, Metric

    id, run = model.model_id, client.get_run(model.source_run_id)
    if id not in {output.model_id for output in run.outputs.model_outputs}:
        client.log_outputs(run.info.run_id, [LoggedModelOutput(id, step)])
    text = {tag.value: read.dataset for read in run.inputs.dataset_inputs for tag in read.tags}
    told = {metric.key for metric in model.metrics or ()}
    metrics = []
    for name in names.FIRST:
        if name in run.data.metrics and name not in told:
            # The run has it already; with another time it would have it twice.
            last = max(client.get_metric_history(run.info.run_id, name), key=lambda m: m.step)
            read = text.get(name.partition("/")[0])
            of = (read.name, read.digest) if read else (None, None)
            metrics.append(Metric(name, last.value, last.timestamp, last.step, id, *of))
    if metrics:
        client.log_batch(run.info.run_id, metrics=metrics)
