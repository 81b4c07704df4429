"""Small facts as JSON that tells by itself whether it is whole: its last key is its checksum."""

import hashlib
import json
from pathlib import Path
from typing import Any

from analysis import atomic
from analysis.errors import BadInput

_SEAL = "sha256"


class Damaged(BadInput):
    """A file is there and is not what was written."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} is damaged; `lmsat verify SWEEP` tells what else is")


def text(facts: dict[str, Any]) -> str:
    """`facts` with their seal."""
    plain = json.loads(json.dumps(facts))  # as it will be read: no tuples, no numbers as keys
    return json.dumps({**plain, _SEAL: _sum(plain)}, indent=1)


def write(path: Path, facts: dict[str, Any]) -> None:
    atomic.write_text(path, text(facts))


def parse(written: str | bytes, name: str) -> dict[str, Any]:
    """What `text` was given. Raises Damaged, with this name."""
    try:
        facts = json.loads(written)
        seal = facts.pop(_SEAL)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise Damaged(name) from None
    if seal != _sum(facts):
        raise Damaged(name)
    return dict(facts)


def read(path: Path) -> dict[str, Any]:
    """What was written there. Raises FileNotFoundError or Damaged."""
    return parse(path.read_bytes(), str(path))


def digest(file: Path) -> str:
    """sha256 of a file."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def wrong(folder: Path, sums: dict[str, str]) -> list[str]:
    """Which of these files of a folder, by relative path, are missing or damaged."""

    def whole(name: str) -> bool:
        try:
            return digest(folder / name) == sums[name]
        except OSError:
            return False

    return [name for name in sums if not whole(name)]


def _sum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
