"""Corpora, models, tokenizers and matrices that are broken: one clear line, and no hang."""

import gzip
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from analysis.errors import BadInput
from tests import malformed
from tests.malformed import GRID, damages, refused, refused_or_harmless, tried
from trainables import tensors

ROW = b'{"text": "the state of our union is strong"}\n'
MANY = ROW * 40


def parquet(**columns: Any) -> bytes:
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


PARQUET = parquet(text=["the state of our union is strong"] * 40)
GZIP = gzip.compress(MANY)

# By name: suffix, content, what the line must say beside the file.
CORPORA: dict[str, tuple[str, bytes, str]] = {
    "empty": (".jsonl", b"", "no text for its train part"),
    "blank": (".jsonl", b"\n\n\n", "no text for its train part"),
    "spaces": (".jsonl", b'{"text": "   "}\n' * 50, "no text for its train part"),
    "broken UTF-8": (".jsonl", MANY + b'{"text": "\xff\xfe"}\n', ":41: not JSON"),
    "NULs": (".jsonl", bytes(1000), ":1: not JSON"),
    "a NUL": (".jsonl", ROW.replace(b"the", b"th\0e"), ":1: not JSON"),
    "a huge line": (".jsonl", b'{"text": "' + b"a b " * 10**6, ":1: not JSON"),
    "a list": (".jsonl", b"[1, 2]\n", ":1: expected an object with a text, not list"),
    "a number": (".jsonl", b'{"text": 5}\n', "'text' is not text"),
    "null": (".jsonl", b'{"text": null}\n', "'text' is not text"),
    "no text": (".jsonl", b'{"txt": "a"}\n', "no 'text' in"),
    "deep": (".jsonl", b"[" * 10**5 + b"\n", ":1: not JSON"),
    "deep objects": (".jsonl", b'{"text":' * 50_000 + b"\n", ":1: not JSON"),
    "cut short": (".jsonl", MANY[:-20], ":40: not JSON"),
    "UTF-16": (".jsonl", MANY.decode().encode("utf-16"), ":1: not JSON"),
    "half a pair": (".jsonl", MANY + b'{"text": "\\ud800"}\n', ":41: half a surrogate pair"),
    "6000 digits": (".jsonl", b'{"text": "a", "n": ' + b"9" * 6000 + b"}\n", ":1: not JSON"),
    "escapes": (".jsonl", b'{"a\\u001b[31m\\n": 1}\n', "no 'text' in"),
    "many fields": (".jsonl", json.dumps({f"k{i}": i for i in range(3000)}).encode(), "no 'text'"),
    "text in UTF-16": (".txt", "the state".encode("utf-16"), "not UTF-8 at byte 0"),
    "noise": (".txt", np.random.default_rng(0).bytes(5000), "not UTF-8 at byte"),
    "no parquet": (".parquet", b"", "file, or damaged"),
    "half a parquet": (".parquet", PARQUET[: len(PARQUET) // 2], "file, or damaged"),
    "parquet without end": (".parquet", PARQUET[:-3], "file, or damaged"),
    "parquet's ends alone": (".parquet", b"PAR1" * 3, "file, or damaged"),
    "parquet's numbers": (".parquet", parquet(text=[1]), "'text' is not text"),
    "parquet's nulls": (".parquet", parquet(text=["a", None]), "'text' is not text"),
    "parquet's lists": (".parquet", parquet(text=[["a"]]), "'text' is not text"),
    "another parquet": (".parquet", parquet(a=[1]), "no 'text' in"),
    "no gzip": (".jsonl.gz", MANY, "or damaged: Not a gzipped file"),
    "half a gzip": (".jsonl.gz", GZIP[: len(GZIP) // 2], "file, or damaged"),
    "gzip without end": (".jsonl.gz", GZIP[:-4], "file, or damaged"),
    "gzip of another sum": (".jsonl.gz", GZIP[:-6] + b"abcdef", "or damaged: CRC"),
    "junk after gzip": (".jsonl.gz", GZIP + b"junk", "file, or damaged"),
    "a bomb": (".jsonl.gz", gzip.compress(bytes(10**7)), ":1: not JSON"),
    "broken text in gzip": (".txt.gz", gzip.compress(b"ab\xff"), "not UTF-8 at byte 2"),
    "another compression": (".jsonl.zst", b"x", "is none of .txt, .jsonl, .parquet"),
}
# What is no file at all: how it is made, what the line must say.
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (Path.mkdir, "nothing at"),
    "a link to nothing": (lambda path: path.symlink_to("/nowhere"), "nothing at"),
    "a link to itself": (lambda path: path.symlink_to(path), "is no path"),
    "a pipe": (os.mkfifo, "is not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is none of"),
}
URLS = {
    "foo://x/y.txt": "Protocol not known: foo",
    "http://127.0.0.1:9/x.txt": "nothing at",
    "zip://a.txt::/nowhere.zip": "No such file",
    "s3://": "",
    "://": "nothing at",
    "[.txt": "nothing at",
    "x" * 300 + ".txt": "",
}


@pytest.fixture
def grid(tmp_path: Path, cache: Path) -> Callable[[object], Path]:
    def write(files: object) -> Path:
        written = {**GRID, "corpus": {"files": str(files)}}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(written))
        return tmp_path / "grid.yaml"

    return write


@pytest.mark.parametrize("name", CORPORA)
def test_a_broken_corpus_is_refused(
    tmp_path: Path, grid: Callable[[object], Path], name: str
) -> None:
    suffix, data, message = CORPORA[name]
    (tmp_path / f"text{suffix}").write_bytes(data)
    tried("corpora", data)
    given = grid(tmp_path / f"text{suffix}")
    refused("sweep", "--grid", given, "--out", tmp_path / "runs", names=message, out=tmp_path)
    refused("dimension", "--corpus", tmp_path / f"text{suffix}", "--out", tmp_path / "runs")


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, grid: Callable[[object], Path], name: str
) -> None:
    make, message = PLACES[name]
    make(tmp_path / "text.txt")
    tried("places", name)
    given = grid(tmp_path / "text.txt")
    refused("sweep", "--grid", given, "--out", tmp_path / "runs", names=message, out=tmp_path)


@pytest.mark.parametrize("url", URLS)
def test_a_url_that_leads_nowhere_is_refused(
    tmp_path: Path, grid: Callable[[object], Path], url: str
) -> None:
    tried("places", url)
    refused("plan", "--grid", grid(url), names="corpus.files: ")
    refused("plan", "--grid", grid(url), names=URLS[url])


def test_a_broken_dataset_folder_is_refused(tmp_path: Path, cache: Path) -> None:
    for i, data in enumerate(damages(PARQUET, 4)):
        folder = tmp_path / f"{i}"
        folder.mkdir()
        (folder / "train.parquet").write_bytes(data)
        (tmp_path / "grid.yaml").write_text(
            yaml.safe_dump({**GRID, "corpus": {"hub": str(folder)}})
        )
        tried("corpora", b"hub" + data)
        given = ("--grid", tmp_path / "grid.yaml", "--out", tmp_path / "runs")
        refused("sweep", *given, names="grid.yaml", out=tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with a small GPT-2 and a tokenizer of its own; the corpus beside it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from trainables import corpus

    folder = tmp_path_factory.mktemp("model")
    source = {"package": None, "hub": None, "config": None, "split": "train", "text": "text"}
    source |= {"files": str(malformed.text(folder)), "date": None, "documents": None}
    source |= {"held_out": 0.3, "held_out_by": "document"}
    text = corpus.prepare(source, 300, corpus.identity(source, 300), cache)
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_head=2, n_layer=1, n_positions=32, vocab_size=300)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    (folder / "model" / "generation_config.json").unlink()
    shutil.copy(text.tokenizer, folder / "model")
    return folder / "model"


def bounds(model: Path, out: Path) -> list[object]:
    corpus = f"{{files: {model.parents[1] / 'text.jsonl'}, held_out: 0.3}}"
    small = ["--tokens", 48, "--sequence", 16, "--ranks", 1]
    return ["bounds", model, "--corpus", corpus, *small, "--out", out]


def test_a_model_with_a_broken_file_is_refused(model: Path, tmp_path: Path) -> None:
    """Each in a folder of its own: what was read once is not read again."""
    (tmp_path / "text.jsonl").write_bytes((model.parent / "text.jsonl").read_bytes())
    found = 0
    for name, count in (("config.json", 40), ("tokenizer.json", 20), ("model.safetensors", 30)):
        for i, data in enumerate(damages((model / name).read_bytes(), count)):
            one = shutil.copytree(model, tmp_path / f"{name}-{i}" / "model")
            (one / name).write_bytes(data)
            tried("models", data)
            found += refused_or_harmless(*bounds(one, tmp_path / "runs"))
    assert found > 40


SETTINGS = {
    "n_embd": [0, -1, 10**9, 2**70, 1.5, "x", None, [], {}],
    "n_head": [0, -1, 3, "x", None],
    "n_layer": [-1, "x", None, {}],
    "vocab_size": [0, -1, 7, "x", None],
    "n_positions": [0, -1, "x"],
    "model_type": ["", "x", "t5", "clip", 5, None, []],
    "dtype": ["x", 5, []],
    "attn_pdrop": [2, "x", float("nan")],
    "activation_function": ["x", 5, None],
}


def test_a_model_with_a_setting_that_cannot_be_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_bytes((model.parent / "text.jsonl").read_bytes())
    config = json.loads((model / "config.json").read_text())
    wrong = [(field, value) for field, some in SETTINGS.items() for value in some]
    found = 0
    for i, (field, value) in enumerate(wrong):
        one = shutil.copytree(model, tmp_path / f"{i}" / "model")
        (one / "config.json").write_text(json.dumps({**config, field: value}))
        tried("models", field, value)
        found += refused_or_harmless(*bounds(one, tmp_path / "runs"), names="model")
    assert found > len(wrong) // 2


def test_a_model_without_a_file_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_bytes((model.parent / "text.jsonl").read_bytes())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        for i, make in enumerate((lambda path: None, Path.mkdir, os.mkfifo)):
            one = shutil.copytree(model, tmp_path / f"{name}-{i}" / "model")
            (one / name).unlink()
            make(one / name)
            tried("places", name, i)
            refused(*bounds(one, tmp_path / "runs"), names=one, out=tmp_path)


def gguf_file(file: Path) -> bytes:
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_token_list([f"t{i}" for i in range(30)])
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.ones((30, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def test_a_broken_gguf_file_is_refused(tmp_path: Path, cache: Path) -> None:
    data = gguf_file(tmp_path / "good.gguf")
    endless = b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 5, 2**60)
    lines = []
    for i, broken in enumerate([endless, *damages(data, 40, len(data) - 2000)]):
        (tmp_path / f"{i}.gguf").write_bytes(broken)
        tried("GGUF files", broken)
        # What is whole after all is refused for its text.
        given = ("probe", tmp_path / f"{i}.gguf", "--head-only", "--corpus", tmp_path / "no.txt")
        lines.append(refused(*given, "--out", tmp_path / "runs", names=tmp_path, out=tmp_path))
    assert "0.gguf: not a GGUF file, or cut short" in lines[0]
    assert sum("no.txt" not in line for line in lines) > len(lines) // 2


def header(entry: Any, size: int | None = None) -> bytes:
    text = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(960)


def array(shape: str, kind: str = "'<f4'") -> bytes:
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + bytes(960)


FINE = {"dtype": "F32", "shape": [40, 6], "data_offsets": [0, 960]}
SAFETENSORS: list[bytes] = [
    header([]),
    header(5),
    header({"w": None}),
    header({"w": {**FINE, "shape": "ab"}}),
    header({"w": {**FINE, "shape": [-40, -6]}}),
    header({"w": {**FINE, "shape": [40.0, 6.0]}}),
    header({"w": {**FINE, "shape": [2**40, 2**40]}}),
    header({"w": {**FINE, "shape": [True, 240]}}),
    header({"w": {**FINE, "shape": [240]}}),
    header({"w": {**FINE, "data_offsets": [-5, 955]}}),
    header({"w": {**FINE, "data_offsets": [960, 0]}}),
    header({"w": {**FINE, "data_offsets": [0, 2**60]}}),
    header({"w": {**FINE, "data_offsets": ["a", "b"]}}),
    header({"w": {**FINE, "dtype": "I8"}}),
    header({"w": {**FINE, "dtype": ["F32"]}}),
    header({"w": FINE, "v": FINE}),
    header({"w\x1b[31m\n": {**FINE, "shape": [5]}}),
    header({f"w{i}" * 50: FINE for i in range(500)}),
    header(b"[" * 10**5),
    header(b'{"\\ud800": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
    header({"w": FINE}, 2**63),
    header({"w": FINE}, 10**7),
    header({"w": FINE})[:-1],
]
ARRAYS: list[bytes] = [
    array("(-40, -6)"),
    array("(2**40, 2**40)"),
    array("(1099511627776, 1099511627776)"),
    array("(40.0, 6)"),
    array("(240,)"),
    array("(0, 6)"),
    array("(" * 200 + ")" * 200),
    array("__import__('os')"),
    array("(40, 6)", "'|O'"),
    array("(40, 3)", "'<c8'"),
    array("(40, 3)", "'<M8[s]'"),
    array("(40, 6)", "[('a', '<f4')]"),
    array("(40, 6)")[:-1],
]


@pytest.mark.parametrize(("suffix", "wrong"), [(".safetensors", SAFETENSORS), (".npy", ARRAYS)])
def test_a_broken_matrix_is_refused(
    tmp_path: Path, cache: Path, suffix: str, wrong: list[bytes]
) -> None:
    for i, data in enumerate(wrong):
        file = tmp_path / f"{i}{suffix}"
        file.write_bytes(data)
        tried("matrices", data)
        refused("probe", file, "--out", tmp_path / "runs", names=file, out=tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_any_damage_to_a_matrix_is_found_or_leaves_a_matrix(tmp_path: Path, suffix: str) -> None:
    """As the workers of `lmsat probe` read it."""
    weights, file, found = np.ones((40, 6), np.float32), tmp_path / f"w{suffix}", 0
    save_file({"w": weights}, file) if suffix == ".safetensors" else np.save(file, weights)
    whole = file.read_bytes()
    for data in damages(whole, 150, len(whole) - weights.nbytes):
        file.write_bytes(data)
        tried("matrices", data)
        try:
            assert all(tensors.matrix(file, None).factors()[0].shape)
        except BadInput as error:
            assert str(error).startswith(str(file))
            found += 1
    assert found > 75


def test_many_were_tried() -> None:
    malformed.keep()
    assert sum(malformed.counts().values()) >= 200
