"""Tasks of EleutherAI's lm-evaluation-harness (Gao et al. 2024) on a model in memory.

Those of Godey et al. 2024, Table 1, are lambada_openai, storycloze, wikitext, sciq and arc_easy.
A task's data is a dataset on the hub, or files of one's own named in a task file (.yaml).
"""

import difflib
import functools
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from analysis.errors import BadInput
from trainables import corpus

DRAWS = 1000  # a bootstrapped standard error to 2 %; the harness's own 100 000 take minutes


def check(tasks: list[str]) -> None:
    """Raises BadInput where the harness is not installed, or a task is neither one of its own (or
    a group or tag of these) nor a task file. Reads no data."""
    for name in tasks:
        _find(name)


def evaluate(
    model: Any, tokenizer: Path, tasks: list[str], limit: int | None = None, batch: int = 8
) -> list[dict[str, Any]]:
    """Rows {metric, split, layer, value, stderr}, in the units of the harness: one for each metric
    of each task ("arc_easy/acc"), and of each group that sums up its tasks. A metric of a filter
    carries its name ("gsm8k/exact_match,strict-match").

    model: a transformers causal language model; `tokenizer`: its tokenizer.json; `limit`: only so
    many documents of each task, the first ones. Context that does not fit into the model's
    positions is cut on the left. Seeds the global generators of random numbers, as the harness
    does. Raises BadInput as `check` does, where a task's data cannot be had, and where the
    tokenizer has no token to begin a text with.
    """
    import lm_eval
    import numpy as np
    import torch
    from lm_eval import defaults
    from lm_eval.models.huggingface import HFLM

    prepared = _tokenizer(tokenizer, model.config.get_text_config())
    random.seed(defaults.DEFAULT_RANDOM_SEED)
    np.random.seed(defaults.DEFAULT_OTHER_SEED)
    torch.manual_seed(defaults.DEFAULT_OTHER_SEED)
    with _quiet():
        loaded = _load(tuple(tasks))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=defaults.DEFAULT_OTHER_SEED)
        wrapped = HFLM(model, tokenizer=prepared, batch_size=batch, softmax_dtype="float32")
        # Not simple_evaluate: around this it asks git and pip about the machine.
        answer = lm_eval.evaluate(
            wrapped, loaded, limit=limit, bootstrap_iters=DRAWS, log_samples=False
        )
    return [
        {"metric": f"{name}/{metric}", "split": "task", "layer": None, **measured}
        for name, results in answer["results"].items()
        for metric, measured in _metrics(results).items()
    ]


def _metrics(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """What a task was measured to be; beside that, its results hold names and counts."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in results.items():
        metric, comma, kind = key.rpartition(",")
        if comma and isinstance(value, Real) and not metric.endswith("_stderr"):
            error = results.get(f"{metric}_stderr,{kind}")
            stderr = float(error) if isinstance(error, Real) else math.nan
            found[metric if kind == "none" else key] = {
                "value": float(value),
                "stderr": None if math.isnan(stderr) else stderr,
            }
    return found


def _find(name: str) -> tuple[Any, Any]:
    """What loads the task, and by what: its name, or what its file says."""
    if Path(name).suffix in (".yaml", ".yml"):
        return _manager(known=False), _file(Path(name))
    manager = _manager(known=True)
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.task_index)
        raise BadInput(
            f"tasks: {name!r} is no task of lm_eval, nor a task file (.yaml)"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    return manager, name


@functools.cache  # it reads some 15 000 files where it is to know them
def _manager(known: bool) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != "lm_eval":
            raise
        raise BadInput(
            "tasks: they are those of lm-evaluation-harness, which is not installed; try: "
            "pip install lm_eval"
        ) from None
    return TaskManager(include_defaults=known)


def _file(file: Path) -> dict[str, Any]:
    """A task file's configuration, with data beside it found there: the harness looks for it where
    the process happens to run."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config: dict[str, Any] = load_yaml(file)
    except FileNotFoundError as error:
        raise BadInput(f"tasks: {file}: no file {error.filename}") from None
    except Exception as error:  # also of code that it names
        raise BadInput(f"tasks: {file}: {_line(error)}") from None
    if not isinstance(config.get("task"), str):
        raise BadInput(f"tasks: {file}: not a task file: it has no `task: NAME`")
    data = config.get("dataset_kwargs") or {}
    for key in data.keys() & {"data_files", "data_dir"}:
        data[key] = _beside(file.parent.resolve(), data[key])
    return config


def _beside(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {split: _beside(folder, some) for split, some in files.items()}
    if isinstance(files, list):
        return [_beside(folder, some) for some in files]
    relative = files and not Path(files).is_absolute()
    return str(folder / files) if relative and any(folder.glob(files)) else files


@functools.cache  # a process sees one state of the data
def _load(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    for name in names:
        manager, task = _find(name)
        try:
            found = manager.load(task)
        except Exception as error:  # of datasets, of the hub, of code that the task names
            raise BadInput(f"tasks: {name}: cannot be loaded: {_line(error)}") from error
        if twice := sorted(found["tasks"].keys() & loaded["tasks"].keys()):
            raise BadInput(f"tasks: {name}: asks for {', '.join(twice)} a second time")
        for kind, some in loaded.items():
            some.update(found[kind])
    return loaded


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _tokenizer(file: Path, config: Any) -> Any:
    """As transformers has it, with the tokens that the harness asks for: one to begin a text with
    and one that ends it."""
    from transformers import PreTrainedTokenizerFast

    own = corpus.load_tokenizer(str(file))
    special = {i: t.content for i, t in own.get_added_tokens_decoder().items() if t.special}

    def named(what: str) -> str | None:
        ids = getattr(config, f"{what}_token_id", None)
        return special.get(ids[0] if isinstance(ids, list) else ids)

    # The configurations of a sweep's own models name none; others may name the tokens of another
    # tokenizer, but not likely special ones.
    ends = (end for end in corpus.ENDS if own.token_to_id(end) is not None)
    end = named("eos") or next(ends, None)
    begin = named("bos") or end
    if begin is None:
        raise BadInput(
            f"tasks: {file} has no token to begin a text with, which lm_eval asks for; it knows "
            + ", ".join(corpus.ENDS)
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token=begin, eos_token=end or begin, pad_token=end or begin
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness without progress bars, and telling of errors only."""
    from unittest.mock import patch

    import datasets
    from lm_eval.api import metrics, task
    from lm_eval.api import model as base
    from lm_eval.models import huggingface

    bar = huggingface.tqdm

    def silent(*args: Any, **options: Any) -> Any:
        return bar(*args, **{**options, "disable": True})

    def bootstrap(f: Callable[..., float], xs: Sequence[Any], iters: int) -> float:
        # The harness's own forks a process that has run torch's threads, for each core.
        return metrics.sample_stddev(metrics._bootstrap_internal(f, iters)((0, xs)))

    log = logging.getLogger("lm_eval")
    level, bars = log.level, not datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        for module in (base, task, huggingface):
            stack.enter_context(patch.object(module, "tqdm", silent))
        stack.enter_context(patch.object(metrics, "bootstrap_stderr", bootstrap))
        stack.callback(log.setLevel, level)
        log.setLevel(logging.ERROR)
        if bars:
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield
