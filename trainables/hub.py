"""Whether a name on the Hugging Face hub can be had, before a library retries for a minute."""

import functools
import json
from pathlib import Path
from typing import Literal

from analysis.errors import BadInput

SMALL = ("*.json", "*.model", "*.txt")  # configuration and tokenizer


@functools.cache  # a process sees one commit
def revision(
    kind: Literal["dataset", "model"], name: str, field: str, wanted: str | None = None
) -> str:
    """The commit a repository stands at, or stood at under the branch, tag or commit `wanted`: on
    the hub, or else in the local cache. Raises BadInput, naming the grid's `field`, where it is in
    neither."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        return str(HfApi().repo_info(name, repo_type=kind, revision=wanted, timeout=20).sha)
    except Exception as error:  # of whatever HTTP library the client is built on
        try:
            return Path(
                snapshot_download(name, repo_type=kind, revision=wanted, local_files_only=True)
            ).name
        except Exception:
            reason = str(error).strip().split("\n")[0]
            raise BadInput(
                f"{field}: {name!r} is neither here nor on the hub as far as it can be reached: "
                f"{reason}"
            ) from None


def cached(name: str, wanted: str | None, pickle: bool) -> Path | None:
    """The folder of a model repository in the user's own cache, where all of it is there."""
    from huggingface_hub import snapshot_download

    for pattern in _weights(pickle):
        try:
            found = snapshot_download(
                name,
                revision=wanted,
                allow_patterns=[*SMALL, pattern],
                local_files_only=True,
            )
        except Exception:  # of whatever HTTP library the client is built on
            return None
        if _whole(Path(found), pattern):
            return Path(found)
    return None


def download(name: str, wanted: str | None, pickle: bool, cache: Path | None) -> Path:
    """The folder of a model repository at a branch, tag or commit, with its weights: as the user's
    own cache has it, or fetched into `cache` (None: the user's own). Raises BadInput where there
    are no safetensors, or, where `pickle` allows those, no PyTorch pickles either."""
    from huggingface_hub import snapshot_download

    if found := cached(name, wanted, pickle):
        return found
    at = f"{name}@{wanted or 'main'}"
    for pattern in _weights(pickle):
        try:
            folder = snapshot_download(
                name, revision=wanted, allow_patterns=[*SMALL, pattern], cache_dir=cache
            )
        except Exception as error:  # of whatever HTTP library the client is built on
            reason = str(error).strip().split("\n")[0]
            raise BadInput(f"{at} cannot be fetched: {reason}") from None
        if _whole(Path(folder), pattern):
            return Path(folder)
    raise BadInput(f"{at}: no safetensors there; PyTorch pickles are read with --pickle alone")


def _weights(pickle: bool) -> tuple[str, ...]:
    return ("*.safetensors", "*.bin") if pickle else ("*.safetensors",)


def _whole(folder: Path, pattern: str) -> bool:
    """Whether a configuration and all weights are there: a download may have been cut short."""
    files = {file.name for file in folder.glob(pattern)}
    named: set[str] = set()
    for index in folder.glob(f"{pattern}.index.json"):
        try:
            named |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError):
            return False
    return bool(files) and named <= files and (folder / "config.json").exists()
