"""What a frozen backbone makes of blocks of text: hidden states, from the model or from disk."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainables import corpus, pretrained
from trainables.frozen import Frozen

FORMAT = 1  # of the files: a change makes every cache new


class Features:
    """Hidden states by block. Kept on disk where `cache` says so: computed once, read after."""

    def __init__(
        self, backbone: Frozen, text: corpus.Corpus, sequence: int, cache: Path | None
    ) -> None:
        """cache: the directory of `directory`, or None."""
        self.backbone, self.text, self.sequence = backbone, text, sequence
        self.d = backbone.weight.shape[1]
        self.cache = cache
        self.files: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}

    def both(self, split: str, blocks: list[int]) -> tuple[Tensor, Tensor]:
        """Hidden states (blocks x sequence x d, fp32) and labels (blocks x sequence), on the
        backbone's device."""
        ids = self._ids(split, blocks)
        return self._hidden(split, blocks, ids), ids[:, 1:].to(self.backbone.device)

    def _hidden(self, split: str, blocks: list[int], ids: Tensor) -> Tensor:
        if self.cache is None:
            return self.backbone.hidden(ids[:, :-1])
        states, kept = self._open(split)
        missing = [block for block in blocks if not kept[block]]
        if missing:
            states[missing] = self.backbone.hidden(self._ids(split, missing)[:, :-1]).cpu().numpy()
            kept[missing] = True  # last: what is marked is whole
        return torch.from_numpy(states[blocks]).to(self.backbone.device)

    def _ids(self, split: str, blocks: list[int]) -> Tensor:
        return torch.from_numpy(corpus.rows(self.text.shard(split), self.sequence, blocks))

    def _open(self, split: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Sparse files for all blocks of the split, and which of them are there."""
        if split not in self.files:
            assert self.cache is not None
            self.cache.mkdir(parents=True, exist_ok=True)
            count = corpus.blocks(self.text.shard(split), self.sequence)
            shapes = {"states": (count, self.sequence, self.d), "kept": (count,)}
            found = []
            for (name, form), dtype in zip(shapes.items(), (np.float32, np.bool_), strict=True):
                path = self.cache / f"{split}.{name}"
                with path.open("ab") as f:
                    f.truncate(math.prod(form) * np.dtype(dtype).itemsize)
                found.append(np.memmap(path, dtype, "r+", shape=form))
            self.files[split] = (found[0], found[1])
        return self.files[split]


def directory(trial: dict[str, Any], cache: Path) -> Path:
    """Where a trial's hidden states lie, under the cache."""
    t = trial["train"]
    facts = {
        "format": FORMAT,
        "model": pretrained.fingerprint(trial["model"]),
        "text": trial["text"],
        "sequence": t["sequence"],
        "precision": t["precision"],
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache / "features" / key


def size(trial: dict[str, Any], d: int, text: corpus.Corpus | None) -> int:
    """Bytes that a trial's hidden states take, all of them: 4 d a token, each token once."""
    tokens, final = trial["train"]["tokens"], 2 * trial["probes"]["final_tokens"]
    if text:
        tokens, final = min(tokens, text.tokens["train"]), min(final, text.tokens["held_out"])
    return 4 * d * (tokens + final)
