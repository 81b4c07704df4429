"""A trained model as transformers loads it without lmsat: its weights, a factored head as the one
matrix it is, configuration, tokenizer.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from trainables import corpus

LINEAR = ("linear", "backward")  # kinds of heads that transformers' own layer can stand for


def size(model: Path) -> tuple[int, int]:
    """Bytes of what `lay` makes, and of these what no link can save: of a factored head all."""
    file = model / "model.safetensors"
    whole = file.stat().st_size
    with safe_open(file, "np") as held:
        if not (head := _factored({*held.keys()})):
            return whole, 0
        a, b = (held.get_slice(f"{head}.{part}").get_shape() for part in "AB")
    whole += 4 * (a[0] * b[1] - a[0] * a[1] - b[0] * b[1])
    return whole, whole


def lay(model: Path, folder: Path) -> None:
    """Make `folder` the model of trials/<id>/model/, whose files are linked to, not copied, where
    both are on one disk. Its head is linear. Again over itself: the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        link(model / name, folder / name)
    end = corpus.end_of(tokenizer := corpus.load_tokenizer(str(model)))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if end is not None:
        settings["eos_token"] = tokenizer.id_to_token(end)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _weights(model / "model.safetensors", folder / "model.safetensors")


def link(file: Path, there: Path) -> None:
    """The same file at both places; a copy where that cannot be."""
    there.unlink(missing_ok=True)  # never written through: it may be another's
    try:
        os.link(file, there)
    except OSError:
        shutil.copyfile(file, there)


def _weights(file: Path, there: Path) -> None:
    """W = A B in the place of A and B."""
    with safe_open(file, "np") as held:
        head = _factored({*held.keys()})
    if not head:
        link(file, there)
        return
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    a, b = weights.pop(f"{head}.A"), weights.pop(f"{head}.B")
    weights[f"{head}.weight"] = (a.double() @ b.double()).to(a.dtype)
    there.unlink(missing_ok=True)
    save_file(weights, there, {"format": "pt"})


def _factored(names: set[str]) -> str | None:
    """The module whose weight these files have as A and B."""
    return next((n[:-2] for n in names if n.endswith(".A") and f"{n[:-2]}.B" in names), None)
