"""What things are called in MLflow, and what its UI shows first."""

import json
import re
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]  # of `scalars`

LOSS = "held_out/loss"
# Of a finished trial these sum it up: first in the table, and beside its model.
FIRST = (
    LOSS,
    "held_out/accuracy",
    "model/singular_entropy",
    "held_out/anisotropy/layer_last",
    "model/tokens_per_second",
)
TAGS = ("head", "rank", "d", "params", "tokens_per_param")
_KEY = "lmsat"  # of the view that the description links to


def metric_name(row: Row) -> str:
    """held_out/loss, model/stable_rank, held_out/anisotropy/layer_last: split first, layer last."""
    parts = [row["split"] or "model", row["metric"]]
    if row["layer"] is not None:
        parts.append("layer_last" if row["layer"] == -1 else f"layer_{row['layer']:02d}")
    return re.sub(r"[^\w\-./ :]", "_", "/".join(parts))  # what MLflow takes in a name


def flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every set leaf of nested fields, with its dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


VIEW = f"mlflow.sharedViewState.{_KEY}"  # a tag


def view(experiment: str) -> str:
    """The page of the UI that shows an experiment's runs by VIEW."""
    return (
        f"/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={_KEY}"
    )


def experiment_tags(note: str, experiment: str, run: str) -> dict[str, str]:
    """What the UI reads: that this is training, by what its charts begin, a description, and a view
    of the runs with the columns that matter. Nothing sets what a first visit to an experiment
    shows, which is all but empty; so the description begins with links. `run`: the sweep's own."""
    columns = [f"metrics.`{name}`" for name in FIRST] + [f"tags.`lmsat.{tag}`" for tag in TAGS]
    always = ["attributes.`Run Name`", "runDateAndNestInfo", "duration"]
    shown = {
        "orderByKey": columns[0],
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": [*always, *columns],
    }
    links = {
        "Runs, best first": view(experiment)[1:],
        "figures and report": f"#/experiments/{experiment}/runs/{run}/artifacts",
    }
    linked = " · ".join(f"[{what}]({where})" for what, where in links.items())
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": LOSS,
        "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
        VIEW: json.dumps(shown),
        "mlflow.note.content": f"{linked}: {note}",
    }
