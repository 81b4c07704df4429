"""Grid files that are none: one clear line, exit code 2, nothing started and nothing written."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import malformed
from tests.malformed import GRID, refused, refused_or_harmless, tried

GOOD = yaml.safe_dump(GRID, sort_keys=False)
FULL: dict[str, Any] = {
    **GRID,
    "kind": "pretrain",
    "seed": 0,
    "trials": [{"head": {"rank": 1}}],
    "keep_weights": False,
    "features": "pass",
    "extend": 1,
    "corpus": {**GRID["corpus"], "text": "text", "documents": 50, "held_out": 0.1},
    "model": {"size": "nano-4", "tied": False, "residual": "parallel"},
    "head": {"rank": [2, "full"], "kind": "linear", "init": "scaled", "refresh": 5},
    "train": {**GRID["train"], "lr": 1e-3, "schedule": "cosine", "clip": 1, "warmup": 0.1},
    "deepspeed": {"stage": 0, "offload": False, "micro_batch": 4},
    "resources": {"workers": 1, "cpus": 1, "gpus": 0},
    "probes": {"schedule": "log", "steps": [0, 1], "loss": 1.0, "tokens": 256},
}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MANY = ", ".join(map(str, range(2000)))

# By name: the whole file, and what the line must say.
FILES: dict[str, tuple[bytes | str, str]] = {
    "aliases of aliases": (GOOD + BOMB, "more than 100,000 values"),
    "an alias of itself": (GOOD + "seed: &a [*a]\n", "seed: nested more than 20 deep"),
    "a field of itself": (GOOD + "seed: &a {b: *a}\n", "seed: nested more than 20 deep"),
    "thousands deep": ("a: " + "[" * 3000, "nested too deep"),
    "thousands deep, closed": ("a: " + "[" * 3000 + "]" * 3000, "nested too deep"),
    "a tab": (GOOD.replace("  ", "\t"), "grid.yaml:3: found character '\\t'"),
    "a NUL": (GOOD.replace("nano", "na\0no"), "special characters are not allowed"),
    "a bell": (GOOD + "seed: \x07\n", "special characters are not allowed"),
    "UTF-16": (GOOD.encode("utf-16"), "cannot be read: 'utf-8'"),
    "Latin 1": (GOOD.encode() + b"# \xe9\n", "cannot be read: 'utf-8'"),
    "two documents": (GOOD + "---\n" + GOOD, "another document"),
    "YAML 9": ("%YAML 9.9\n---\n" + GOOD, "incompatible YAML"),
    "a field twice, deep": (GOOD + "resources: {cpus: 1, cpus: 2}\n", "'cpus' stands twice"),
    "a number for a field": (GOOD + "1: 2\n", "unknown field '1'"),
    "nothing for a field": (GOOD + "~: 2\n", "unknown field 'None'"),
    "a date for a field": (GOOD + "2001-01-01: 2\n", "unknown field '2001-01-01'"),
    "a number in a section": (GOOD.replace("head:\n", "head:\n  3: 4\n"), "head.3: Keys should be"),
    "a Python object": (GOOD + "seed: !!python/object:os.system {}\n", "could not determine a con"),
    "a Python name": (
        GOOD + "seed: !!python/name:os.system\n",
        "could not determine a constructor",
    ),
    "bytes": (GOOD + "seed: !!binary aGk=\n", "seed: expected text or a number, not a bytes"),
    "a set": (GOOD + "seed: !!set {a, b}\n", "seed: expected text or a number, not a set"),
    "pairs": (GOOD + "seed: !!pairs [a: 1]\n", "seed.0: expected text or a number, not a tuple"),
    "a date": (GOOD + "seed: 2001-01-01\n", "seed: expected text or a number, not a date"),
    "no date": (GOOD + "seed: 2001-13-45\n", "cannot be read: month must be"),
    "no time": (GOOD + "seed: !!timestamp abc\n", "cannot be read"),
    "no boolean": (GOOD + "seed: !!bool abc\n", "cannot be read"),
    "no number": (GOOD + "seed: !!int abc\n", "cannot be read"),
    "6000 digits": (GOOD + f"seed: {'9' * 6000}\n", "cannot be read: Exceeds the limit"),
    "6000 digits in hex": (GOOD + f"seed: 0x{'f' * 6000}\n", "seed: a whole number beyond 1e+18"),
    "no such alias": (GOOD + "seed: *nosuch\n", "undefined alias 'nosuch'"),
    "merged with a number": (GOOD + "<<: 3\n", "expected a mapping"),
    "millions of trials": (GOOD + f"seed: [{MANY}]\nextend: [{MANY}]\n", "8,000,000 trials"),
    "megabytes": (GOOD + "# " + "x" * 5_000_000, "bytes, is it a grid?"),
    "half a character": (GOOD.replace("text.jsonl", '"\\ud800.txt"'), "corpus.files: "),
    "an escape in a value": (GOOD.replace("nano-4", '"nano\\u001b[2J-4"'), "nano\\x1b[2J-4"),
    "an escape in a field": (GOOD + '"a\\u001b[31mb": 1\n', "a\\x1b[31mb: unknown field"),
    "an up name": (GOOD.replace("name: small", "name: ../x"), "name: '../x': letters, digits"),
    "an absolute name": (GOOD.replace("name: small", "name: /x"), "name: '/x': letters, digits"),
    "dots": (GOOD.replace("name: small", "name: '..'"), "name: '..': letters, digits"),
    "a long name": (GOOD.replace("name: small", f"name: {'x' * 300}"), "only, at most 100"),
    "a smile": (GOOD.replace("name: small", "name: 😀"), "name: '😀': letters, digits"),
    "two words": (GOOD.replace("name: small", "name: a b"), "name: 'a b': letters, digits"),
    "two lines": (GOOD.replace("name: small", 'name: "a\\nb"'), "name: 'a\\nb': letters, digits"),
    "a name that is none": (GOOD.replace("name: small", "name: yes"), "name: True: letters"),
    "trials in trials": (GOOD + "trials: [{trials: [{}]}]\n", "trials: unknown field 'trials'"),
}


@pytest.fixture
def grid(tmp_path: Path, cache: Path) -> Path:
    malformed.text(tmp_path)
    return tmp_path / "grid.yaml"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_grid_is_refused(grid: Path, name: str) -> None:
    content, message = FILES[name]
    data = content if isinstance(content, bytes) else content.encode()
    grid.write_bytes(data)
    tried("grids", data)
    refused("sweep", "--grid", grid, "--out", grid.parent / "runs", names=message, out=grid.parent)
    assert str(grid) in malformed.told(malformed.run("plan", "--grid", grid))


def fields(tree: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from fields(value, (*at, key))


def changed(at: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The full grid with another value in one field."""
    found = inner = copy.deepcopy(FULL)
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return found


numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**40, 1e308, 5e-324, float("nan"), float("-inf")]),
)
words = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.sampled_from(["", "1e400", "nan", "0x10", "../x", "/x", "~", "*", "\0", "a\nb", "é" * 300]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words, st.dates(), st.binary(max_size=4)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)


@settings(malformed.drawn, max_examples=150)
@given(st.sampled_from(list(fields(FULL))), values)
def test_any_value_in_any_field_makes_a_grid_or_one_line(
    grid: Path, at: tuple[str, ...], value: Any
) -> None:
    data = yaml.dump(changed(at, value), Dumper=yaml.SafeDumper).encode("utf-8", "surrogatepass")
    grid.write_bytes(data)
    tried("grids", data)
    refused_or_harmless("plan", "--grid", grid, names=grid, out=grid.parent)


@settings(malformed.drawn, max_examples=120)
@given(st.data())
def test_any_change_of_its_text_makes_a_grid_or_one_line(grid: Path, data: Any) -> None:
    broken = bytearray(GOOD.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(broken)))
        more = data.draw(
            st.binary(max_size=3)
            | st.sampled_from([b"[", b"]", b"{", b": ", b"- ", b"&a ", b"*a ", b"!!set ", b"? "])
            | st.sampled_from([b"\n", b"\t", b"'", b'"', b"|", b">", b"%", b"<<: ", b"---\n", b"~"])
        )
        broken[at : at + data.draw(st.integers(0, 9))] = more
    grid.write_bytes(broken)
    tried("grids", bytes(broken))
    refused_or_harmless("plan", "--grid", grid, names=grid, out=grid.parent)


@pytest.mark.parametrize("name", ["aliases of aliases", "a Python object"])
def test_a_process_of_its_own_says_no_more(grid: Path, name: str) -> None:
    content, message = FILES[name]
    grid.write_bytes(content if isinstance(content, bytes) else content.encode())
    script = Path(sys.executable).parent / "lmsat"
    line = [str(script), "plan", "--grid", str(grid)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_many_were_tried() -> None:
    malformed.keep()
    assert malformed.counts()["grids"] >= 250
