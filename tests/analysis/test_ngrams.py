import resource
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from analysis import ngrams
from analysis.errors import BadInput

Grams = dict[tuple[int, ...], int]
EACH = 100  # bytes of work for a token

# Few tokens, so that n-grams repeat; of large vocabularies the last ones, so that no bit is zero.
VOCABULARIES = st.sampled_from([1, 2, 3, 300, 2**12, 2**13, 50304, 2**16, 2**17 + 1, 2**18])
CHUNKS = st.lists(st.lists(st.integers(0, 2), max_size=40), max_size=8)


def plain(chunks: list[npt.NDArray[Any]], n: int) -> Grams:
    lists = [chunk.tolist() for chunk in chunks]
    return Counter(tuple(ids[i : i + n]) for ids in lists for i in range(len(ids) - n + 1))


def listed(counts: ngrams.Counts) -> list[tuple[tuple[int, ...], int]]:
    """In the order of the rows."""
    contexts = np.repeat(counts.contexts(), np.diff(counts.starts), axis=0)
    grams = np.column_stack([contexts, counts.tokens]).tolist()
    return list(zip(map(tuple, grams), counts.counts.tolist(), strict=True))


def arrays(chunks: list[list[int]], vocabulary: int) -> list[npt.NDArray[Any]]:
    kind = np.uint16 if vocabulary <= 2**16 else np.int64
    return [np.array([max(0, vocabulary - 1 - i) for i in ids], kind) for ids in chunks]


@given(CHUNKS, st.integers(2, 8), VOCABULARIES, st.integers(1, 60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_counts_are_those_of_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory,
    lists: list[list[int]],
    n: int,
    vocabulary: int,
    block: int,
    on_disk: bool,
) -> None:
    """Of every length and key width, whatever the size of a block, in memory or on disk: the same
    n-grams as often, contexts in order, and tokens within a context."""
    chunks = arrays(lists, vocabulary)
    expected = plain(chunks, n)
    spill = tmp_path_factory.getbasetemp() if on_disk else None
    if not expected:
        with pytest.raises(BadInput, match=f"no chunk of it has {n} tokens"):
            ngrams.count(chunks, n, vocabulary, block * EACH, spill)
        return
    found = ngrams.count(chunks, n, vocabulary, block * EACH, spill)
    assert listed(found) == sorted(expected.items())
    assert (found.keys.ndim == 2) == ((n - 1) * max(1, (vocabulary - 1).bit_length()) > 64)


@given(st.lists(CHUNKS, min_size=1, max_size=5), st.sampled_from([(2, 3), (5, 50304), (8, 2**18)]))
@settings(max_examples=40, deadline=None)
def test_merged_parts_are_the_whole(parts: list[list[list[int]]], shape: tuple[int, int]) -> None:
    n, vocabulary = shape
    texts = [arrays(part, vocabulary) for part in parts]
    counted = [ngrams.count(text, n, vocabulary) for text in texts if plain(text, n)]
    if not counted:
        return
    whole = ngrams.count([chunk for text in texts for chunk in text], n, vocabulary)
    for memory in (1, 20 * EACH, 2**20):
        merged = ngrams.merge(counted, memory)
        for name in ("keys", "starts", "tokens", "counts"):
            got, want = getattr(merged, name), getattr(whole, name)
            assert got.dtype == want.dtype and np.array_equal(got, want)


def text(tokens: int, vocabulary: int) -> npt.NDArray[np.uint16]:
    """Markov by a random table, so that contexts matter and repeat."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, vocabulary, (vocabulary, 4))
    drawn, ids = rng.integers(0, 4, tokens).tolist(), [0]
    rows = table.tolist()
    for i in drawn[1:]:
        ids.append(rows[ids[-1]][i])
    return np.array(ids, np.uint16)


@pytest.mark.parametrize("n", [3, 5, 8])
def test_many_merges_lose_nothing(n: int, tmp_path: Path) -> None:
    """16,000 tokens in blocks of 60: three levels of merges, of sixteen each."""
    ids = text(16_000, 60_000)
    seen: list[int] = []
    found = ngrams.count([ids], n, 60_000, 60 * EACH, tmp_path, seen.append)
    assert listed(found) == sorted(plain([ids], n).items())
    assert len(seen) == -(-(len(ids) - n + 1) // 60) > 16**2
    assert seen == sorted(seen) and seen[-1] == len(ids) - n + 1
    assert list(tmp_path.iterdir()) == []


def test_a_text_in_overlapping_chunks_is_the_whole_text() -> None:
    ids = text(5000, 500)
    whole = ngrams.count([ids], 4, 500)
    cut = ngrams.count([ids[:1000], ids[997:1234], ids[1231:]], 4, 500)
    assert listed(cut) == listed(whole)
    assert listed(ngrams.count([ids[:1000], ids[1000:]], 4, 500)) != listed(whole)


def test_sources_that_reuse_their_buffer_or_map_from_disk_are_counted_as_arrays(
    tmp_path: Path,
) -> None:
    ids = text(3000, 500)
    ids.tofile(tmp_path / "ids.bin")
    buffer = np.empty(1000, np.uint16)

    def reused() -> Any:
        for start in range(0, 3000, 1000):
            buffer[:] = ids[start : start + 1000]
            yield buffer

    expected = sorted(plain(np.split(ids, 3), 3).items())
    assert listed(ngrams.count(reused(), 3, 500)) == expected
    mapped = np.memmap(tmp_path / "ids.bin", np.uint16, "r")
    found = ngrams.count(np.split(mapped, 3), 3, 500, 700 * EACH)
    assert listed(found) == expected


def test_rows_estimate_the_transitions_of_a_chain() -> None:
    """A chain of 6 states: transitions are multinomial given the context, so that Pearson's
    statistic of all rows is chi-squared with 6 x 5 degrees of freedom."""
    rng = np.random.default_rng(1)
    chain = rng.dirichlet(np.full(6, 2.0), 6)
    ids, steps = [0], rng.random(60_000)
    ends = np.cumsum(chain, 1)
    for u in steps:
        ids.append(int(np.searchsorted(ends[ids[-1]], u)))
    found = ngrams.count([np.array(ids)], 2, 6)
    table = np.zeros((6, 6))
    table[np.repeat(found.contexts()[:, 0], np.diff(found.starts)), found.tokens] = found.counts
    assert table.sum() == 60_000
    expected = chain * table.sum(1, keepdims=True)
    statistic = ((table - expected) ** 2 / expected).sum()
    assert chi2.ppf(0.001, 30) < statistic < chi2.ppf(0.999, 30)


@pytest.mark.parametrize("n", [1, 9])
def test_lengths_outside_2_to_8_are_refused(n: int) -> None:
    with pytest.raises(BadInput, match=f"n: {n} tokens"):
        ngrams.count([np.arange(20)], n, 20)


def test_vocabularies_too_large_to_pack_are_refused_and_the_largest_named() -> None:
    largest = 2**18
    found = ngrams.count([np.full(8, largest - 1)], 8, largest)
    assert listed(found) == [((largest - 1,) * 8, 1)]
    with pytest.raises(BadInput, match=f"1 to {largest}"):
        ngrams.count([np.zeros(8, int)], 8, largest + 1)
    assert listed(ngrams.count([np.array([2**31 - 1] * 5)], 5, 2**31)) == [((2**31 - 1,) * 5, 1)]
    with pytest.raises(BadInput, match=f"1 to {2**31}"):
        ngrams.count([np.zeros(8, int)], 2, 2**31 + 1)
    with pytest.raises(BadInput, match="vocabulary: 0"):
        ngrams.count([np.zeros(8, int)], 8, 0)


@pytest.mark.parametrize(("token", "kind"), [(10, np.uint8), (-1, np.int16), (2**40, np.int64)])
def test_a_token_outside_the_vocabulary_is_named_with_its_place(token: int, kind: Any) -> None:
    ids = np.arange(10, dtype=kind)
    bad = np.concatenate([ids, np.array([token], kind), ids])
    with pytest.raises(BadInput, match=rf"token {token} \(place 10 of chunk 1, from 0\)"):
        ngrams.count([ids, bad], 3, 10, 4 * EACH)


def test_a_disk_that_refuses_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The system's own limit on the size of a file: a block keeps it, sixteen merged do not."""
    ids = text(50_000, 500)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(BadInput, match=f"spill: {tmp_path}: File too large; .* more room"):
            ngrams.count([ids], 3, 500, 1000 * EACH, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match="No such file or directory"):
        ngrams.count([ids], 3, 500, spill=tmp_path / "absent")


def test_errors_of_the_corpus_are_not_taken_for_the_disks(tmp_path: Path) -> None:
    def broken() -> Any:
        yield np.arange(500)
        raise OSError("the corpus cannot be read")

    with pytest.raises(OSError, match="the corpus cannot be read") as caught:
        ngrams.count(broken(), 3, 500, 100 * EACH, tmp_path)
    assert not isinstance(caught.value, BadInput) and list(tmp_path.iterdir()) == []


def test_parts_of_another_kind_are_not_merged() -> None:
    some = ngrams.count([np.arange(9)], 3, 10)
    for other in (ngrams.count([np.arange(9)], 2, 10), ngrams.count([np.arange(9)], 3, 11)):
        with pytest.raises(ValueError, match="differ in n or vocabulary"):
            ngrams.merge([some, other])
