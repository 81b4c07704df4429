"""Tables, records and options that are none: one clear line, no figure, no answer."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import records, sealed
from tests import malformed
from tests.malformed import GRID, damages, refused, refused_or_harmless, tried

SIZES = [(n, d) for n in (1e7, 3e7, 1e8, 3e8) for d in (1e9, 1e10, 1e11)]
LAW = "params,tokens,loss,model\n" + "".join(
    f"{n:g},{d:g},{1.7 + 400 / n**0.34 + 410 / d**0.28:.4f},m{i}\n"
    for i, (n, d) in enumerate(SIZES)
)
RUN = "model,step,loss,singular_entropy\n" + "".join(
    f"a,{step},{3 + 1 / (step + 1):.4f},{0.5 + step / 1e3:.3f}\n" for step in range(0, 600, 50)
)
GOOD = {"fit": LAW, "onset": RUN}


def with_cell(table: str, row: int, column: int, value: str) -> str:
    lines = [line.split(",") for line in table.splitlines()]
    lines[row][column] = value
    return "\n".join(map(",".join, lines)) + "\n"


# What no command can make anything of.
EITHER: dict[str, bytes | Callable[[str], str | bytes]] = {
    "nothing": b"",
    "blank lines": b"\n\n\n",
    "NULs": bytes(1000),
    "a page": b"<html><body>404</body></html>\n",
    "JSON": b'{"a": 1}\n',
    "comments": b"# x\n# y\n",
    "a header alone": lambda good: good.splitlines()[0] + "\n",
    "no header": lambda good: "\n".join(good.splitlines()[1:]),
    "UTF-16": lambda good: good.encode("utf-16"),
    "Latin 1": lambda good: good.replace("m1", "m\xe9").replace("a,", "\xe9,").encode("latin-1"),
    "semicolons": lambda good: good.replace(",", ";"),
    "tabs": lambda good: good.replace(",", "\t"),
    "a longer row": lambda good: good + "1,2,3,4,5,6,7,8\n",
    "an open quote": lambda good: good + '"abc\n',
    "a huge line": lambda good: good + "x" * 10**6 + "\n",
    "a column twice": lambda good: good.replace("tokens", "loss", 1).replace("step", "loss", 1),
    "a huge name": b"a" * 5000 + b"\n1\n",
    "many columns": (",".join(f"c{i}" for i in range(3000)) + "\n" + ",".join("1" * 3000)).encode(),
    "text for a loss": lambda good: with_cell(good, 3, 2, "high"),
    "no number for a loss": lambda good: with_cell(good, 3, 2, "nan"),
    "an infinite loss": lambda good: with_cell(good, 3, 2, "inf"),
    "a loss beyond all": lambda good: with_cell(good, 3, 2, "-1e308"),
}


@pytest.mark.parametrize("name", EITHER)
@pytest.mark.parametrize("command", GOOD)
def test_a_table_that_is_none_is_refused(tmp_path: Path, command: str, name: str) -> None:
    made = EITHER[name]
    content = made if isinstance(made, bytes) else made(GOOD[command])
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "t.csv").write_bytes(data)
    tried("tables", data)
    refused(command, tmp_path / "t.csv", "--out", tmp_path / "runs", names="t.csv", out=tmp_path)


CELLS = [
    "",
    "x",
    "-1",
    "0",
    "1e400",
    "1e308",
    "1e-320",
    "9" * 30,
    "true",
    "2001-01-01",
    "'1'",
    "NA",
]


@settings(malformed.drawn, max_examples=60)
@given(
    st.sampled_from(["fit", "onset"]),
    st.integers(1, 9),
    st.integers(0, 2),
    st.sampled_from(CELLS) | st.text(st.characters(codec="utf-8"), max_size=5),
)
def test_any_cell_makes_a_table_or_one_line(
    tmp_path: Path, command: str, row: int, column: int, value: str
) -> None:
    """Held to one step or size, so that what is harmless is no work."""
    data = with_cell(GOOD[command], row, column, value).encode("utf-8", "replace")
    (tmp_path / "t.csv").write_bytes(data)
    tried("tables", data)
    where = {"fit": "params < 0", "onset": "step < -1"}[command]
    given = ("--where", where, "--out", tmp_path / "runs")
    refused(command, tmp_path / "t.csv", *given, names="t.csv", out=tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_broken_table_of_another_kind_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "t.csv").write_text(LAW)
    frame, file = pl.read_csv(tmp_path / "t.csv"), tmp_path / f"t{suffix}"
    frame.write_parquet(file) if suffix == ".parquet" else frame.write_ndjson(file)
    found = 0
    for data in damages(file.read_bytes(), 12, 400):
        file.write_bytes(data)
        tried("tables", data)
        given = ("fit", file, "--draws", 20, "--out", tmp_path / "runs")
        found += refused_or_harmless(*given, names=file.name)
    assert found > 8


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The folder of a finished sweep of two trials, as its workers and its driver leave it."""
    from orchestrator import grid, ledger
    from trainables import pretrain

    folder = tmp_path_factory.mktemp("swept")
    malformed.text(folder)
    (folder / "grid.yaml").write_text(yaml.safe_dump(GRID))
    loaded, sweep = grid.load(folder / "grid.yaml"), folder / "runs" / "small"
    for trial in loaded.trials:
        ended = pretrain.train(trial, sweep, cache)
        ledger.conclude(sweep, trial["id"], ended.status, ended.step, ended.files)
        known = {"id": trial["id"], "trial": trial, "steps": ended.step, "error": None}
        ledger.write(sweep, {**known, "status": "running", "step": 0})
    plan = {"grid": loaded.raw, "checkpoints": None, "trials": loaded.trials}
    sealed.write(sweep / "plan.json", plan)
    return sweep


@contextmanager
def damaged(file: Path, data: bytes) -> Iterator[Path]:
    """The sweep that a file is of, while that holds something else."""
    whole = file.read_bytes()
    file.write_bytes(data)
    tried("records", file.name.encode() + data)
    try:
        yield next(folder for folder in file.parents if folder.name == "small")
    finally:
        file.write_bytes(whole)


READERS = {
    "scalars": ("status", "fit", "figures", "onset"),
    "blocks": ("onset",),
    "spectra": ("figures",),
    "trials": ("ranks", "fit", "figures", "onset"),
}


@pytest.mark.parametrize("table", READERS)
def test_damaged_records_are_named_and_verify_with_them(swept: Path, table: str) -> None:
    file = records.files(swept, table)[0]
    whole = file.read_bytes()
    swapped = next(f for f in swept.glob("records/*/*/*.parquet") if f.parents[1].name != table)
    others = (b"", whole[: len(whole) // 2], whole[:-4], bytes(len(whole)), swapped.read_bytes())
    line = f"{file} is damaged; `lmsat verify SWEEP` tells"
    for data in others:
        for command in READERS[table]:
            with damaged(file, data) as sweep:
                # Figures that were drawn before the damage was come upon are whole.
                refused(command, sweep, names=line, out=None if command == "figures" else sweep)


def test_flipped_bits_in_records_never_make_a_traceback(swept: Path) -> None:
    """What they did to numbers alone `lmsat verify` finds, by checksums."""
    file = records.files(swept, "scalars")[0]
    for data in damages(file.read_bytes(), 15, 10**6):
        with damaged(file, data) as sweep:
            refused_or_harmless("status", sweep, names=file)
            assert malformed.run("verify", sweep).exit_code == 1


@pytest.mark.parametrize("pattern", ["plan.json", "ledger/*.json", "trials/*/outcome.json"])
def test_a_sweeps_damaged_json_is_named(swept: Path, pattern: str) -> None:
    file = sorted(swept.glob(pattern))[0]
    whole = file.read_bytes()
    some = [b"", b"[]", b"null", b"5", b"{}", b"[" * 10**5, b"\xff", bytes(50), whole[:-3]]
    for data in [*some, *damages(whole, 10, len(whole))]:
        with damaged(file, data) as sweep:
            refused("status", sweep, names=f"{file} is damaged", out=sweep)


# Of each command: arguments, and what the line must say. FILE, GRID, SWEEP and TABLE are there.
OPTIONS: dict[str, list[tuple[str, str]]] = {
    "sweep": [
        ("", "'--grid'"),
        ("--grid nosuch.yaml", "nosuch.yaml: no such grid file"),
        ("--grid GRID --nosuch", "--nosuch"),
        ("--grid GRID more", "more"),
        ("--grid GRID --address ftp://x", "--address: ftp://x"),
        ("--grid GRID --address nowhere", "the cluster at nowhere refuses"),
        ("--grid GRID --address 127.0.0.1:99999", "--address: HOST:PORT"),
        ("--grid GRID --address 127.0.0.1:9", "127.0.0.1:9"),
        ("--grid GRID --address http://127.0.0.1:9", "--out: a folder that all machines"),
        ("--grid GRID --tracking-uri x", "--tracking-uri: 'x' is no URI"),
        ("--grid GRID --out FILE", "'--out'"),
        (f"--grid {'x' * 300}", "File name too long"),
    ],
    "plan": [
        ("--grid GRID --on 8xA1000", "--on: '8xA1000'"),
        ("--grid GRID --on 0xA100", "--on: '0xA100'"),
        ("--grid GRID --on nosuch.yaml", "--on: nosuch.yaml"),
        ("--grid GRID --on GRID", "--on: "),
        ("--grid GRID --on 8xH100", "uses no GPU"),
        ("--grid GRID --json=5", "--json"),
    ],
    "status": [("", "'SWEEP'"), ("nosuch", "nosuch: no sweep"), ("x" * 300, "File name too long")],
    "ranks": [
        ("nosuch", "nosuch: no sweep"),
        ("SWEEP --tolerance 0", "'--tolerance'"),
        ("SWEEP --tolerance x", "'--tolerance'"),
    ],
    "probe": [
        ("", "give a MODEL"),
        ("a/b/c", "a/b/c: no sweep, file or folder"),
        ("nosuch.npy", "nosuch.npy: no such file"),
        ("FILE", "neither a folder nor a .gguf"),
        ("SWEEP --revisions step1", "--revisions: "),
        ("a/b --revisions step{3..1}", "--revisions: {3..1} is empty"),
        ("a/b --revisions step{1..999999999999}", "--revisions: "),
        ("SWEEP --layers x", "--layers: all, last or numbers"),
        ("SWEEP --layers 7", "--layers: "),
        ("SWEEP --tokens 0", "'--tokens'"),
        ("SWEEP --tokens 99999999", "--tokens: 99999999 wanted"),
        ("SWEEP --sequence 1", "'--sequence'"),
        ("SWEEP --corpus nowhere/*.txt", "nothing at"),
        ("SWEEP --corpus {fils:x}", "--corpus: "),
        ("SWEEP --corpus {files:[", "no installed package"),
        ("SWEEP --tokenizer nowhere.json", "nowhere.json"),
        ("SWEEP --tasks nosuch.yaml", "nosuch.yaml"),
        ("SWEEP --name ../x", "--name: '../x'"),
        ("SWEEP --cpus 1000", "--cpus: 1000 wanted"),
        ("SWEEP --gpus 1000", "--gpus: 1000 wanted"),
        ("SWEEP --gpus nan", "--gpus"),
        ("--checkpoints nowhere", "--checkpoints: nowhere"),
        ("SWEEP SWEEP", "stands twice"),
    ],
    "figures": [("nosuch", "nosuch: no records"), ("", "'SWEEP'")],
    "fit": [
        ("nosuch.csv", "nosuch.csv: no such table"),
        ("nosuch", "nosuch: a table is one of"),
        ("TABLE --form nosuch", "--form: no law is called 'nosuch'"),
        ("TABLE --where params>", "--where: "),
        ("TABLE --where nosuch>1", "--where: "),
        ("TABLE --where params", "--where: "),
        ("TABLE --where params<0", "--where: no row meets"),
        ("TABLE --where 1;drop", "--where: "),
        ("TABLE --column N", "--column: "),
        ("TABLE --column N=nosuch", "--column N=nosuch"),
        ("TABLE --column N=(", "--column N=("),
        ("TABLE --column N=sum(params)", "N"),
        ("TABLE --fix E", "--fix: "),
        ("TABLE --fix E=x", "--fix: "),
        ("TABLE --fix nosuch=1", "nosuch"),
        ("TABLE --fix E=nan", "--fix: "),
        ("TABLE --fix E=-1", "E"),
        ("TABLE --predict N=1", "--predict: "),
        ("TABLE --predict N=-1,D=1e9", "--predict"),
        ("TABLE --predict N=nan,D=1e9", "--predict"),
        ("TABLE --predict params>0", "--predict: "),
        ("TABLE --draws 1", "'--draws'"),
        ("TABLE --level 1", "'--level'"),
        ("TABLE --level nan", "--level"),
        ("TABLE --delta -1", "--delta"),
        ("TABLE --delta nan", "--delta"),
        ("TABLE --compute x", "--compute: "),
        ("TABLE --compute -1", "compute must be above 0"),
        ("TABLE --compute inf", "--compute: "),
        ("TABLE --objective x", "'--objective'"),
        ("TABLE --weighted", "--weighted: "),
    ],
    "onset": [
        ("", "'TABLE|SWEEP...'"),
        ("nosuch.csv", "nosuch.csv: no such table"),
        ("SWEEP --where step>0", "--where: is for tables"),
        ("TABLE --better higher", "step"),
        ("CURVES --level 0", "'--level'"),
        ("CURVES --margin nan", "--margin"),
        ("CURVES --rho 2", "'--rho'"),
        ("CURVES --after x", "'--after'"),
        ("CURVES --after nan", "--after"),
        ("CURVES --law nosuch.json", "--law: nosuch.json"),
        ("CURVES --law FILE", "--law: "),
        ("CURVES --column step=nosuch", "--column step=nosuch"),
    ],
    "dimension": [
        ("--corpus nowhere/*.txt", "nothing at"),
        ("--corpus nosuch", "nosuch"),
        ("--tokenizer 5", "--tokenizer: 5"),
        (f"--tokenizer {'9' * 30}", "--tokenizer: "),
        (f"--tokenizer {'9' * 5000}", "--tokenizer: "),
        ("--n 1", "'--n'"),
        ("--at x", "--at: numbers"),
        ("--at 0", "--at: whole numbers"),
        ("--at nan", "--at: numbers"),
        ("--at inf", "--at: numbers"),
        ("--ranks 1.5", "--ranks: whole numbers"),
        ("--estimate x", "'--estimate'"),
        ("--smoothing nan", "--smoothing"),
        ("--spill nowhere", "'--spill'"),
        ("--name a/b", "--name: 'a/b'"),
    ],
    "bounds": [
        ("", "'MODEL'"),
        ("nosuch.gguf", "nosuch.gguf: no such file"),
        ("SWEEP --ranks 0", "--ranks: whole numbers"),
        ("SWEEP", "2 models"),
    ],
    "verify": [("nosuch", "nosuch: nothing of that name")],
    "track": [("nosuch", "nosuch")],
    "ui": [("--out nowhere", "nowhere: no runs here"), ("--port x", "'--port'")],
    "new": [
        ("a/b", "NAME: a: no such folder"),
        ("x --size nano-5", "--size: model: unknown size"),
        ("x --rank x", "--rank: head.rank"),
        ("x --corpus nosuch", "--corpus: corpus.package"),
        ("x --budget nan", "--budget: tokens such as"),
    ],
    "logs": [
        ("nosuch x", "nosuch: no sweep of that name"),
        ("SWEEP", "'TRIAL'"),
        ("SWEEP nosuch", "nosuch: no trial of"),
        ("SWEEP nano --follow --json", "--follow"),
    ],
    "reproduce": [("nosuch", "godey2024"), ("godey2024 --figure 99", "--figure: ")],
    "completion": [("", "{bash|zsh|fish}"), ("csh", "'bash', 'zsh', 'fish'")],
    "report": [("nosuch", "nosuch: no records of that name in runs")],
    "compare": [("SWEEP nosuch", "nosuch: no records of that name in runs")],
    "doctor": [
        ("--address nowhere", "--address: HOST:PORT"),
        ("--grid nosuch.yaml", "nosuch.yaml: no such grid file"),
        ("--tracking-uri x", "--tracking-uri: 'x' is no URI"),
    ],
}


LAW_FILE = {
    "form": "power",
    "constants": [{"name": n, "value": 1.0} for n in ("E", "A", "a")],
    "draws": {n: [1.0, 2.0] for n in ("E", "A", "a")},
}
CLUSTER = yaml.safe_dump(
    {
        "max_workers": 2,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 4}},
            "gpu": {"resources": {"CPU": 8, "GPU": 1}, "max_workers": 2},
        },
    }
).encode()


def test_a_law_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(RUN)
    wrong: list[Any] = [[], 5, None, {}, "x"]
    wrong += [{**LAW_FILE, field: value} for field in LAW_FILE for value in (5, [], {}, "x", [5])]
    wrong += [{**LAW_FILE, "draws": {n: ["x"] for n in ("E", "A", "a")}}]
    for data in [b"\xff", b"[" * 10**5, *(json.dumps(value).encode() for value in wrong)]:
        (tmp_path / "law.json").write_bytes(data)
        tried("laws", data)
        given = ("onset", tmp_path / "c.csv", "--law", tmp_path / "law.json")
        refused(*given, "--out", tmp_path / "runs", names="--law: ", out=tmp_path)


def test_a_cluster_file_that_is_none_is_refused(tmp_path: Path, swept: Path) -> None:
    file, found = tmp_path / "cluster.yaml", 0
    some = [b"", b"[]", b"5", b"a: [", b"[" * 5000, b"max_workers: .inf\n", CLUSTER[:60]]
    for data in [*some, *damages(CLUSTER, 30, len(CLUSTER), seed=1)]:
        file.write_bytes(data)
        tried("cluster files", data)
        given = ("plan", "--grid", swept.parents[1] / "grid.yaml", "--on", file)
        # One that is whole after all: the grid has no use for its GPUs.
        line = refused(*given, names="--on: ", out=tmp_path)
        found += "cluster.yaml" in line
    assert found > 20


def test_every_command_is_tried() -> None:
    assert OPTIONS.keys() == malformed.commands()


@pytest.mark.parametrize("command", OPTIONS)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, swept: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for name, content in (("t.csv", LAW), ("c.csv", RUN), ("file.txt", "text")):
        (tmp_path / name).write_text(content)
    there = {"SWEEP": swept, "GRID": swept.parents[1] / "grid.yaml", "TABLE": tmp_path / "t.csv"}
    there |= {"CURVES": tmp_path / "c.csv", "FILE": tmp_path / "file.txt"}
    monkeypatch.chdir(tmp_path)
    wrong = []
    for line, message in OPTIONS[command]:
        arguments: list[Any] = [there.get(word, word) for word in line.split()]
        tried("options", command, line)
        try:
            refused(command, *arguments, names=message, out=tmp_path)
        except AssertionError as error:
            wrong.append(f"{line[:80]}: {str(error)[:1000]}")
    assert not wrong, "\n\n".join(wrong)


def test_many_were_tried() -> None:
    malformed.keep()
    assert sum(malformed.counts().values()) >= 200
