"""Whether what a command says with --json is what docs/schemas/ says of it."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
SCHEMAS: dict[str, Any] = {p.stem: json.loads(p.read_text()) for p in FOLDER.glob("*.json")}
_ALL = Registry().with_resources((s["$id"], Resource.from_contents(s)) for s in SCHEMAS.values())


def check(command: str, answer: str) -> Any:
    """The answer of a command, which must be JSON as its schema says, and no more than that."""

    def none(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(answer, parse_constant=none)
    Draft202012Validator(SCHEMAS[command], registry=_ALL).validate(found)
    return found
