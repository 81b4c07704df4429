"""Commands on malformed input: what a good one is, ways to damage it, and whether it is refused.

counts()  # how many different inputs were tried in this process, by kind
"""

import json
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings

from orchestrator.cli import main

SECONDS = 30.0  # that a refusal may take on a busy machine
LENGTH = 450  # characters of the line that tells why
GRID: dict[str, Any] = {
    "name": "small",
    "corpus": {"files": "text.jsonl"},
    "tokenizer": {"train_bpe": 300},
    "model": {"size": "nano-4"},
    "head": {"rank": [2, "full"]},
    "train": {"tokens": 1024, "batch": 4, "sequence": 16},
    "probes": {"count": 2, "tokens": 256, "final_tokens": 256},
    "checkpoints": 1,
}
WORDS = [
    "the",
    "state",
    "of",
    "our",
    "union",
    "is",
    "strong",
    "and",
    "a",
    "congress",
    "will",
    "say",
    "so",
    "in",
    "peace",
    "or",
    "war",
]
TRIED: dict[str, set[bytes]] = {}

# The same examples in every run, as many as asked for.
drawn = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def counts() -> dict[str, int]:
    """How many different inputs were tried in this process, by kind."""
    return {kind: len(found) for kind, found in sorted(TRIED.items())}


def tried(kind: str, *what: object) -> None:
    data = what[0] if isinstance(what[0], bytes) else repr(what).encode("utf-8", "replace")
    TRIED.setdefault(kind, set()).add(data)


def keep() -> None:
    """Add the counts to the JSON file that LMSAT_MALFORMED names, for who writes about them."""
    if file := os.environ.get("LMSAT_MALFORMED"):
        known = json.loads(Path(file).read_text()) if Path(file).exists() else {}
        Path(file).write_text(json.dumps({**known, **counts()}, indent=1))


def commands() -> set[str]:
    """All that the command line has."""
    return {*main.list_commands(click.Context(main))}


def text(folder: Path) -> Path:
    """A corpus in `folder`, of eighty documents."""
    rng = random.Random(0)
    rows = [json.dumps({"text": " ".join(rng.choices(WORDS, k=40))}) for _ in range(80)]
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "text.jsonl"


def damages(data: bytes, count: int, head: int = 1000, seed: int = 0) -> Iterator[bytes]:
    """Cut short, and with bits and bytes changed, lost and added in the first `head` bytes."""
    rng = random.Random(seed)
    yield from (b"", data[:1], data[: len(data) // 2], data[:-1], bytes(200), rng.randbytes(200))
    for _ in range(count):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(min(len(broken), head))
            change = rng.randrange(4)
            if change == 0:
                broken[at] ^= 1 << rng.randrange(8)
            elif change == 1:
                broken[at] = rng.choice(b'\0\1\x7f\x80\xff[{"9')
            elif change == 2:
                del broken[at : at + rng.randint(1, 9)]
            else:
                broken[at:at] = rng.randbytes(rng.randint(1, 9))
        yield bytes(broken)


def run(*args: object) -> Result:
    """A command, in this process."""
    return CliRunner().invoke(main, [str(one) for one in args])


def listed(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def told(result: Result) -> str:
    """The one line that says what is wrong, at the end of stderr."""
    broke = result.exception if not isinstance(result.exception, SystemExit) else None
    assert broke is None, f"{type(broke).__name__}: {broke}"
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], result.output
    assert lines[-1].isprintable() and len(lines[-1]) < LENGTH, lines[-1]
    return lines[-1]


def refused(*args: object, names: object = "", out: Path | None = None) -> str:
    """It is refused, by a line that names the culprit; nothing is on stdout, `out` as before. The
    line."""
    before, began = listed(out) if out else [], time.monotonic()
    result = run(*args)
    assert time.monotonic() - began < SECONDS
    assert result.exit_code == 2, (result.output[-2000:], result.exception)
    assert re.search(re.escape(str(names)), told(result)), (names, told(result))
    assert result.stdout == ""
    assert not out or listed(out) == before
    return told(result)


def refused_or_harmless(*args: object, names: object = "", out: Path | None = None) -> bool:
    """Whether it is refused; else it must have gone well, for the damage did not matter."""
    result = run(*args)
    if result.exit_code == 0:
        assert result.exception is None
        return False
    refused(*args, names=names, out=out)
    return True
