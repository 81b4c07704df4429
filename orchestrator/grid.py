"""Grid file -> validated trials with stable ids.

Any field of a grid may be a list and is then an axis; the grid is the product of its axes.
Entries of `trials` are laid over the grid: one replaces the cells whose axis values it names,
or adds a cell. A trial's id is a hash of what changes its result and of nothing else.
"""

import functools
import hashlib
import itertools
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from analysis.errors import BadInput, blame
from orchestrator import schema, search
from trainables import backbones, corpus, pretrained, zero, zoo

SHIPPED = Path(__file__).parent / "grids"
BYTES = 4_000_000  # of a grid file
MOST = 100_000  # trials of a grid, and values in its file
DEEPEST = 20  # that these are nested
LARGEST = 10**18  # of whole numbers
RECIPE = 2  # of training and probes: a change that moves results makes every id new


@dataclass(frozen=True)
class Grid:
    """A grid file, read."""

    path: Path
    name: str
    raw: dict[str, Any]
    trials: list[dict[str, Any]]
    """Each as plain values, every default filled in, with id and name."""
    notices: list[str]
    """Cells left out, and why."""


def find(name: str) -> Path:
    """The grid file: as given, or among those that ship with lmsat."""
    path = Path(name)
    if path.is_file():
        return path
    if path.name == name and (SHIPPED / name).is_file():
        return SHIPPED / name
    shipped = ", ".join(sorted(p.name for p in SHIPPED.glob("*.yaml")))
    raise BadInput(f"{name}: no such grid file; shipped with lmsat: {shipped}")


def load(path: Path) -> Grid:
    """Read and validate a grid file. Raises BadInput, one line, with file and field."""
    try:
        if path.stat().st_size > BYTES:
            raise BadInput(f"{path}: of more than {BYTES:,} bytes, is it a grid?")
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except RecursionError:
        raise BadInput(f"{path}: nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", "not YAML")
        raise BadInput(f"{path}{line}: {problem}") from None
    except BadInput:
        raise
    except (OSError, ValueError, LookupError, AttributeError) as error:
        # Not UTF-8, or not what it says it is: 2024-99-99, !!bool 7.
        raise BadInput(f"{path}: cannot be read: {error}") from None
    with blame(path):
        _check_plain(raw)
        return _grid(raw, path)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but a field given twice is an error: it would take the last and say
    nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else None
            if name is None or name in seen:
                problem = "a field's name is one word" if name is None else f"{name!r} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _check_plain(raw: Any) -> None:
    """Raises BadInput for what YAML can say and a grid cannot: dates, bytes, sets, and aliases of
    aliases that come to more than a machine can hold."""
    for count, (at, value) in enumerate(_values(raw)):
        if count == MOST:
            raise BadInput(f"more than {MOST:,} values, each alias counted as often as it is used")
        if len(at) > DEEPEST:
            raise BadInput(f"{at[0]}: nested more than {DEEPEST} deep")
        if not isinstance(value, str | int | float | list | dict | None):
            kind = type(value).__name__
            raise BadInput(f"{'.'.join(at)}: expected text or a number, not a {kind}; quote it")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise BadInput(f"{'.'.join(at)}: a whole number beyond {LARGEST:g}")


def _values(tree: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything in the tree, and where."""
    yield at, tree
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _values(value, (*at, str(key)))


def check_name(field: str, name: Any) -> None:
    """Raises BadInput where no directory can be called so."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise BadInput(
            f"{field}: {reprlib.repr(name)}: letters, digits, dot, dash and underscore only, at "
            "most 100"
        )


def _grid(raw: Any, path: Path) -> Grid:
    if not isinstance(raw, dict):
        raise BadInput("expected fields such as corpus, model, train")
    name = raw.get("name", path.stem)
    check_name("name", name)
    raw = _absolute({**raw, "name": name}, path.parent)
    base = {str(key): value for key, value in raw.items() if key not in ("name", "trials")}
    axes = [axis for axis, _ in _axes(base)]
    trials: dict[str, dict[str, Any]] = {}
    notices: dict[str, None] = {}
    identify = functools.cache(lambda key: corpus.identity(*json.loads(key)))  # reads all text
    cells = [c for cell in _cells(base, raw.get("trials", []), axes) for c in _searched(cell)]
    varied = _varied(cells, axes)
    for cell in cells:
        trial = _trial(cell, varied, identify)
        if reason := _impossible(trial):
            notices[reason] = None
        elif trial["id"] in trials:
            raise BadInput(f"{trial['name']}: stands twice in the grid; give each trial once")
        else:
            trials[trial["id"]] = trial
    if not trials:
        raise BadInput("no trial is left: " + "; ".join(notices))
    frozen_ones = [t for t in trials.values() if t["kind"] == "rankfit"]
    _check_names(frozen_ones)
    for extra in search.completed(frozen_ones):
        trial = numbered(extra)
        trials.setdefault(trial["id"], trial)
    return Grid(path, name, raw, list(trials.values()), list(notices))


def _check_names(trials: list[dict[str, Any]]) -> None:
    """Results are told apart by the backbone's name."""
    models: dict[str, dict[str, Any]] = {}
    for model in (t["model"] for t in trials):
        other = models.setdefault(pretrained.name(model), model)
        if pretrained.fingerprint(other) != pretrained.fingerprint(model):
            raise BadInput(
                f"model.pretrained: {other['pretrained']} and {model['pretrained']} are two models "
                f"of one name, {pretrained.name(model)}; rename a folder"
            )


_PATHS = (
    ("corpus", "files"),
    ("corpus", "hub"),
    ("model", "config"),
    ("model", "pretrained"),
    ("tokenizer",),
)


def _absolute(tree: Any, folder: Path, at: tuple[str, ...] = ()) -> Any:
    """The grid with its paths, which are relative to its file, made absolute: neither its copy in
    the sweep nor a worker stands there."""
    if isinstance(tree, dict):
        return {
            k: _absolute(v, folder, () if k == "trials" else (*at, str(k))) for k, v in tree.items()
        }
    if isinstance(tree, list):
        return [_absolute(v, folder, at) for v in tree]
    if at in _PATHS and isinstance(tree, str) and "://" not in tree:
        try:
            path = (folder / tree).resolve()
            if at == ("corpus", "files") or path.exists():
                return str(path)
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop, with a NUL
            raise BadInput(f"{'.'.join(at)}: {reprlib.repr(tree)} is no path: {error}") from None
    return tree


def _axes(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[Any, list[Any]]]:
    """(path, values) of every list in the tree."""
    for key, value in tree.items():
        at = (*prefix, str(key))
        if isinstance(value, dict):
            yield from _axes(value, at)
        elif isinstance(value, list) and at != ("probes", "steps"):
            if not value:
                raise BadInput(f"{'.'.join(at)}: an empty list; an axis needs a value")
            yield at, value


def _product(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    axes = list(_axes(tree))
    if (count := math.prod(len(values) for _, values in axes)) > MOST:
        raise BadInput(f"its axes make {count:,} trials; {MOST:,} are the most")
    for values in itertools.product(*(v for _, v in axes)):
        cell = tree
        for (path, _), value in zip(axes, values, strict=True):
            cell = _with(cell, path, value)
        yield cell


def _with(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    inner = value if len(path) == 1 else _with(tree[path[0]], path[1:], value)
    return {**tree, path[0]: inner}


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _merge(under: Any, over: Any) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        return {k: _merge(under.get(k), over[k]) if k in over else under[k] for k in under | over}
    return over


def _cells(base: dict[str, Any], entries: Any, axes: list[tuple[str, ...]]) -> list[dict[str, Any]]:
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise BadInput("trials: expected a list of cells, each with fields such as model, head")
    product, added = list(_product(base)), []
    for entry in entries:
        new = list(_product(_merge(base, entry)))
        named = [[_at(cell, axis) for axis in axes] for cell in new]
        product = [c for c in product if [_at(c, axis) for axis in axes] not in named]
        added += new
    return product + added


def _searched(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """The cell, or, where it is a rankfit without a learning rate, one for each usual rate."""
    head, train = cell.get("head") or {}, cell.get("train")
    if cell.get("kind") != "rankfit" or not isinstance(train, dict) or "lr" in train:
        return [cell]
    init = head.get("init", "scaled") if isinstance(head, dict) else "scaled"
    return [{**cell, "train": {**train, "lr": r}} for r in search.RATES.get(init, (1e-3,))]


def _varied(cells: list[dict[str, Any]], axes: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The axes, and every other field in which cells differ: a trial's name tells them."""
    leaves = {at: None for cell in cells for at in _leaves(cell)}
    others = [at for at in leaves if len({json.dumps(_at(cell, at)) for cell in cells}) > 1]
    return list(dict.fromkeys([*axes, *others]))


def _leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key))


_TEXT = ("corpus", "tokenizer", "probes", "train.sequence", "train.precision")

# Fields that a trial's name tells in its own way.
_NAMED = {("seed",), ("head",), ("model",), ("train", "lr")} | {
    (section, field)
    for section, of in (("model", schema.Model), ("head", schema.Head))
    for field in of.model_fields
    if field not in ("residual", "tied")
}


def _trial(
    cell: dict[str, Any],
    axes: list[tuple[str, ...]],
    identify: Callable[[str], dict[str, Any]],
) -> dict[str, Any]:
    """A cell as plain values: validated, defaults filled in, named."""
    try:
        trial = schema.Trial.model_validate(cell).model_dump()
    except ValidationError as error:
        raise BadInput(schema.explain(error)) from None
    if isinstance(trial["tokenizer"], dict):
        trial["tokenizer"] = trial["tokenizer"]["train_bpe"]
    size = trial["model"]["size"]
    if trial["train"]["lr"] is None:
        if size is None:
            raise BadInput("train.lr: missing; only sizes of the ladder have one by default")
        trial["train"]["lr"] = backbones.LADDER[size].lr
    if size and trial["model"]["residual"] is None:
        trial["model"]["residual"] = "parallel"
    if trial["kind"] == "rankfit":
        trial["tokenizer"] = _own_tokenizer(trial)
    if trial["probes"]["tokens"] is None:
        least = 8192 if trial["kind"] == "rankfit" else 2048
        trial["probes"]["tokens"] = min(max(trial["train"]["tokens"] // 200, least), 65536)
    trial["head"] = _plain_head(trial["head"])
    trial["deepspeed"] = _deepspeed(trial)
    told = [axis for axis in axes if axis not in _NAMED and _at(cell, axis) is not None]
    more = {".".join(axis): f"{axis[-1]}={_at(cell, axis)}" for axis in told}
    searched = ("train", "lr") in axes
    trial["text"] = identify(json.dumps([trial["corpus"], trial["tokenizer"]]))
    return numbered({**trial, "axes": more, "searched": searched, "beyond": 0})


def numbered(trial: dict[str, Any], lr: float | None = None) -> dict[str, Any]:
    """The trial, under another learning rate where one is given, with id and name of its own; and
    `search`, which all trials share that differ in learning rate alone (None for a baseline)."""
    trial = {**trial, "train": {**trial["train"], "lr": lr or trial["train"]["lr"]}}
    baseline = trial["head"]["kind"] in zoo.BASELINES
    facts = _facts(trial, baseline)
    trial["search"] = None if baseline else _hash(_with(facts, ("train", "lr"), None))
    return {**trial, "id": _hash(facts), "name": _name(trial, baseline)}


def _name(trial: dict[str, Any], baseline: bool) -> str:
    model, head = trial["model"], trial["head"]
    named = model["size"] or (
        Path(model["config"]).name if model["config"] else pretrained.name(model)
    )
    kind = [] if head["kind"] == "linear" else [zoo.label(head)]
    if baseline:
        # Nobody trains it: it is told by its text alone.
        told = [t for at, t in trial["axes"].items() if at.startswith(_TEXT)]
        rank = [f"r={head['rank']}"] if head["rank"] else []
        return " ".join([named, *kind, *rank, *told])
    init = [] if head["init"] == "scaled" else [f"init={head['init']}"]
    rate = [f"lr={trial['train']['lr']:g}"] if trial["searched"] else []
    rank = [f"r={head['rank'] or 'full'}", f"s={trial['seed']}"]
    return " ".join([named, *kind, *rank, *init, *trial["axes"].values(), *rate])


@functools.cache
def _vocabulary(tokenizer: str) -> dict[str, int]:
    return corpus.load_tokenizer(tokenizer).get_vocab()


def _own_tokenizer(trial: dict[str, Any]) -> str:
    """The model's, or the one given, where it fits. Raises BadInput where it does not."""
    form = pretrained.shape(trial["model"], trial["train"]["sequence"])
    own, given = pretrained.tokenizer(trial["model"]), trial["tokenizer"]
    try:
        vocabulary = _vocabulary(own)
    except BadInput:
        if given is None:
            raise
        vocabulary = _vocabulary(given)
    if given is not None and _vocabulary(given) != vocabulary:
        raise BadInput(
            f"tokenizer: {given} is not the model's own, which gives other ids; leave it out"
        )
    if len(vocabulary) > form.vocabulary:
        raise BadInput(
            f"tokenizer: has {len(vocabulary)} entries, the model's head only {form.vocabulary}"
        )
    return given or own


def _facts(trial: dict[str, Any], baseline: bool) -> dict[str, Any]:
    """What changes the result: not names, paths, hardware, or how often it is saved."""
    model = trial["model"]
    if trial["kind"] == "rankfit":
        what: Any = pretrained.fingerprint(model)
    else:
        of_scratch = ("size", "config", "residual", "tied")
        what = {key: model[key] for key in of_scratch}
        what["config"] = model["config"] and backbones.fingerprint(model["config"])
    train = trial["train"]
    if baseline:
        train = {"lr": None, **{key: train[key] for key in ("sequence", "precision")}}
    alike = ("kind", "text", "head", "seed", "probes")
    return {
        "recipe": RECIPE,
        "model": what,
        "train": train,
        **{key: trial[key] for key in alike},
    }


def _hash(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _impossible(trial: dict[str, Any]) -> str | None:
    """Why a cell of the product makes no model, or None."""
    if trial["kind"] == "rankfit":
        d = pretrained.shape(trial["model"], trial["train"]["sequence"]).d
    else:
        d = backbones.width(trial["model"])
    return zoo.impossible(trial["head"], d, trial["model"]["tied"])


def _deepspeed(trial: dict[str, Any]) -> dict[str, Any]:
    """With its defaults: those of the size where there are several workers or a GPU to train it."""
    t, r = trial["train"], trial["resources"]
    plain = trial["kind"] == "rankfit" or not (r["gpus"] or r["workers"] > 1)
    size = None if plain else trial["model"]["size"] or "other"
    share = t["batch"] // r["workers"]
    return zero.settings(trial["deepspeed"], size, t["sequence"], share, t["precision"])


def _plain_head(head: dict[str, Any]) -> dict[str, Any]:
    """Without what its kind does not use: that makes no other trial."""
    kind = head["kind"]
    used = {"mos": {"experts"}, "backward": {"backward", "directions", "refresh"}}.get(kind, set())
    if head["directions"] == "random":
        used = used - {"refresh"}
    return {k: v if k in {"kind", "rank", "init", *used} else None for k, v in head.items()}
