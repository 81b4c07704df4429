"""Whether a name on the Hugging Face hub can be had, before a library retries for a minute."""

import functools
from pathlib import Path
from typing import Literal

from analysis.errors import BadInput


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
