"""How often each token follows each context: exact counts of n-grams, in bounded memory.

The n-gram models of Godey et al. 2024, section 5.2 and Figure 7: a row of W is what followed one
context of n - 1 tokens. Text is counted block by block, by sorting n-grams packed into 64-bit
words; the sorted blocks are then merged, from memory or from disk.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.errors import BadInput

MEMORY = 2**28  # bytes of work for a block; the counts themselves come on top
_EACH = 100  # bytes of work for a token, or a distinct n-gram of a merge
_FAN = 16  # blocks merged at a time
_ARRAYS = ("keys", "starts", "tokens", "counts")

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Counts:
    """Of C contexts and nnz distinct n-grams, as the rows of a sparse C x V matrix."""

    n: int
    """Tokens of an n-gram: n - 1 of context and the next one."""
    vocabulary: int
    keys: Words
    """(C) or, above 64 bits, (C, 2) with the high word first: packed contexts, rising."""
    starts: Ints
    """(C + 1): context i has the entries starts[i] to starts[i + 1]."""
    tokens: npt.NDArray[np.int32]
    """(nnz) next tokens, rising within a context."""
    counts: Ints
    """(nnz) how often."""

    def contexts(self) -> npt.NDArray[np.int32]:
        """C x (n - 1) token ids, unpacked from the keys."""
        bits = _bits(self.vocabulary)
        low = self.keys.reshape(len(self.keys), -1)[:, -1]
        high = self.keys[:, 0] if self.keys.ndim == 2 else np.zeros_like(low)
        found = np.empty((len(low), self.n - 1), np.int32)
        for i in reversed(range(self.n - 1)):
            found[:, i] = low & (2**bits - 1)
            low = low >> bits | high << (64 - bits)
            high = high >> bits
        return found


def count(
    chunks: Iterable[npt.NDArray[Any]],
    n: int,
    vocabulary: int,
    memory: int = MEMORY,
    spill: Path | None = None,
    done: Callable[[int], None] = lambda grams: None,
) -> Counts:
    """The n-grams of all chunks of token ids (1-d, any integer type, mapped from disk if large).

    No n-gram crosses from one chunk into the next; of a text cut in two, the second chunk has to
    begin with the last n - 1 tokens of the first. `memory` is in bytes, without that of the
    counts found so far. With `spill`, a folder, these wait on its disk until they are merged.
    `done` is told how many n-grams have been counted: one for each token but the first n - 1.

    Raises BadInput where n is not in 2..8, the vocabulary is too large to be packed, a token is
    outside the vocabulary, no chunk has n tokens, or `spill` cannot be written.
    """
    if not 2 <= n <= 8:
        raise BadInput(f"n: {n} tokens; an n-gram here has 2 to 8")
    most = 2 ** min(31, 128 // (n - 1))
    if not 1 <= vocabulary <= most:
        raise BadInput(f"vocabulary: {vocabulary} entries; with n = {n} there may be 1 to {most}")
    runs: list[tuple[int, Counts]] = []  # with levels, falling: of level i are 16^i blocks
    grams = 0
    for text, cuts in _blocks(chunks, n, vocabulary, min(max(1, memory // _EACH), 2**31)):
        level, run = 0, _count(text, cuts, n, vocabulary)
        grams += int(run.counts.sum())
        while True:
            runs.append((level, _spilled(run, spill) if spill else run))
            if len(runs) < _FAN or runs[-_FAN][0] != level:
                break
            run = merge([run for _, run in runs[-_FAN:]], memory)
            level += 1
            del runs[-_FAN:]
        done(grams)
    if not runs:
        raise BadInput(f"corpus: no chunk of it has {n} tokens; give longer text, or smaller n")
    return merge([run for _, run in runs], memory)


def save(counts: Counts, folder: Path) -> None:
    """Keep counts in a folder, for `load`; all of them or nothing. Raises BadInput where its disk
    does not take them."""
    try:
        folder.mkdir(parents=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(counts, name))
        (folder / "counts.json").write_text(json.dumps([counts.n, counts.vocabulary]))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _unwritten(folder.parent, error) from None


def load(folder: Path) -> Counts:
    """What was saved there, mapped from disk."""
    n, vocabulary = json.loads((folder / "counts.json").read_text())
    return Counts(n, vocabulary, *(np.load(folder / f"{a}.npy", mmap_mode="r") for a in _ARRAYS))


def merge(parts: Sequence[Counts], memory: int = MEMORY) -> Counts:
    """The counts of all parts together, as if their text had been counted at once.

    Streams past the parts, which may be mapped from disk, in rising order of contexts.
    """
    n, vocabulary = parts[0].n, parts[0].vocabulary
    if len(parts) == 1:
        return parts[0]
    if any((p.n, p.vocabulary) != (n, vocabulary) for p in parts):
        raise ValueError("parts differ in n or vocabulary")
    # As large as it might get: pages never touched take no memory.
    contexts, rows = sum(len(p.keys) for p in parts), sum(len(p.tokens) for p in parts)
    keys = np.empty((contexts, *parts[0].keys.shape[1:]), np.uint64)
    starts, counts = np.zeros(contexts + 1, np.int64), np.empty(rows, np.int64)
    tokens = np.empty(rows, np.int32)
    c = r = 0
    for block in _together(parts, max(1, memory // _EACH // len(parts))):
        some = _combined(block)
        keys[c : c + len(some.keys)] = some.keys
        starts[c + 1 : c + 1 + len(some.keys)] = r + some.starts[1:]
        tokens[r : r + len(some.tokens)] = some.tokens
        counts[r : r + len(some.tokens)] = some.counts
        c, r = c + len(some.keys), r + len(some.tokens)
    keys.resize((c, *keys.shape[1:]), refcheck=False)
    starts.resize(c + 1, refcheck=False)
    tokens.resize(r, refcheck=False)
    counts.resize(r, refcheck=False)
    return Counts(n, vocabulary, keys, starts, tokens, counts)


def _bits(vocabulary: int) -> np.uint64:
    return np.uint64(max(1, (vocabulary - 1).bit_length()))


def _blocks(
    chunks: Iterable[npt.NDArray[Any]], n: int, vocabulary: int, size: int
) -> Iterator[tuple[Words, Ints]]:
    """About `size` tokens at a time, and where in these a new piece begins, each of at least n. A
    long chunk is cut with overlap."""
    block: list[npt.NDArray[np.uint32]] = []
    held = 0

    def joined() -> tuple[Words, Ints]:
        cuts = np.cumsum([len(piece) for piece in block])[:-1]
        text = np.concatenate(block, dtype=np.uint64)
        block.clear()
        return text, cuts

    for number, chunk in enumerate(chunks):
        for start in range(0, len(chunk) - n + 1, size):
            piece = np.asarray(chunk[start : start + size + n - 1])
            outside = (piece < 0) | (piece >= vocabulary)
            if outside.any():
                at = int(outside.argmax())
                raise BadInput(
                    f"corpus: token {piece[at]} (place {start + at} of chunk {number}, from 0) is "
                    f"not in a vocabulary of {vocabulary}; give the tokenizer's own size"
                )
            if block and held + len(piece) > size:
                yield joined()
                held = 0
            block.append(piece.astype(np.uint32))
            held += len(piece)
    if block:
        yield joined()


def _count(text: Words, cuts: Ints, n: int, vocabulary: int) -> Counts:
    bits, keys = _bits(vocabulary), None
    if n * bits <= 64:
        contexts = _windows(text, n - 1, bits)
    else:
        contexts, places = _ranks(text, n - 1, bits)
        keys = _keys(text, places, n - 1, bits)
    inside = np.ones(len(text) - n + 1, bool)
    inside[cuts[:, None] - np.arange(1, n)] = False  # these would cross into the next piece
    grams = (contexts[: len(inside)] << bits | text[n - 1 :])[inside]
    del contexts
    grams.sort()
    first = _firsts(grams)
    return _rows(n, vocabulary, grams[first], np.diff(first, append=len(grams)), keys)


def _windows(text: Words, length: int, bits: np.uint64) -> Words:
    """Packed into one word: the `length` tokens from each place on."""
    places = len(text) - length + 1
    found = text[:places].copy()
    for i in range(1, length):
        found <<= bits
        found |= text[i : i + places]
    return found


def _keys(text: Words, places: Ints, length: int, bits: np.uint64) -> Words:
    """The same in as many words as it takes, the high one first, from given places on."""
    if length * bits <= 64:
        return _windows(text, length, bits)[places]
    low = text[: len(text) - length + 1].copy()
    high = np.zeros_like(low)
    for i in range(1, length):
        high = high << bits | low >> (64 - bits)
        low <<= bits
        low |= text[i : i + len(low)]
    return np.stack([high[places], low[places]], 1)


def _ranks(text: Words, length: int, bits: np.uint64) -> tuple[Words, Ints]:
    """Of the `length` tokens from each place on, the rank among all distinct ones in order; and
    of each rank, a place. Ranks of one length make those of up to twice the length."""
    held = min(length, int(64 // bits))
    grams = _windows(text, held, bits)
    while True:
        ranks, places = _ranked(grams, np.argsort(grams))
        if held == length:
            return ranks, places
        step = min(held, length - held)
        grams = ranks[:-step] << np.uint64(32) | ranks[step:]
        held += step


def _ranked(keys: Words, order: Ints) -> tuple[Words, Ints]:
    """Ranks of keys among the distinct ones, given their order; and of each rank, a place."""
    first = _firsts(keys[order])
    ranks = np.empty(len(order), np.uint64)
    ranks[order] = np.repeat(np.arange(len(first)), np.diff(first, append=len(order)))
    return ranks, order[first]


def _firsts(rising: Words) -> Ints:
    """Where a sorted array, or one of rows, has the first of each value."""
    differ = rising[1:] != rising[:-1]
    return np.flatnonzero(np.append(True, differ if rising.ndim == 1 else differ.any(1)))


def _rows(n: int, vocabulary: int, grams: Words, counts: Ints, keys: Words | None) -> Counts:
    """From distinct n-grams in order: the context, or its place among keys, and the next token."""
    bits = _bits(vocabulary)
    contexts = grams >> bits
    starts = _firsts(contexts)
    contexts = contexts[starts]
    return Counts(
        n,
        vocabulary,
        contexts if keys is None else keys[contexts],
        np.append(starts, len(grams)),
        (grams & (2**bits - 1)).astype(np.int32),
        counts,
    )


def _together(parts: Sequence[Counts], rows: int) -> Iterator[list[Counts]]:
    """Slices of the parts that hold the same range of contexts, of about `rows` entries each."""
    at = [0] * len(parts)
    while live := [i for i, part in enumerate(parts) if at[i] < len(part.keys)]:
        ends, last = {}, []
        for i in live:
            starts = parts[i].starts
            end = int(np.searchsorted(starts, starts[at[i]] + rows, "right")) - 1
            ends[i] = max(at[i] + 1, end)
            last.append(tuple(np.atleast_1d(parts[i].keys[ends[i] - 1])))
        slices = []
        for i in live:
            end = at[i] + _upto(parts[i].keys[at[i] : ends[i]], min(last))
            if end > at[i]:
                slices.append(_slice(parts[i], at[i], end))
                at[i] = end
        yield slices


def _upto(keys: Words, last: tuple[np.uint64, ...]) -> int:
    """How many of the rising keys are not above the last."""
    low, high = 0, len(keys)
    for word, value in zip(keys.reshape(len(keys), -1).T, last, strict=True):
        low, high = (
            low + int(np.searchsorted(word[low:high], value, side)) for side in ("left", "right")
        )
    return high


def _slice(part: Counts, low: int, high: int) -> Counts:
    starts = np.asarray(part.starts[low : high + 1])
    rows = slice(starts[0], starts[-1])
    return Counts(
        part.n,
        part.vocabulary,
        part.keys[low:high],
        starts - starts[0],
        part.tokens[rows],
        part.counts[rows],
    )


def _combined(parts: list[Counts]) -> Counts:
    """The same as `merge`, at once. Stable sorts find the sorted parts and merge them."""
    n, vocabulary = parts[0].n, parts[0].vocabulary
    bits, keys = _bits(vocabulary), None
    contexts = np.concatenate([part.keys for part in parts])
    if n * bits > 64:
        wide = contexts.ndim == 2
        order = np.lexsort(contexts.T[::-1]) if wide else np.argsort(contexts, kind="stable")
        ranks, places = _ranked(contexts, order)
        keys, contexts = contexts[places], ranks
    grams = np.repeat(contexts, np.concatenate([np.diff(part.starts) for part in parts]))
    grams <<= bits
    grams |= np.concatenate([part.tokens for part in parts], dtype=np.uint64, casting="unsafe")
    order = np.argsort(grams, kind="stable")
    grams = grams[order]
    first = _firsts(grams)
    counts = np.concatenate([part.counts for part in parts])[order]
    return _rows(n, vocabulary, grams[first], np.add.reduceat(counts, first), keys)


def _spilled(run: Counts, folder: Path) -> Counts:
    """The same, mapped from nameless files: whatever happens, none is left behind."""

    def mapped(array: npt.NDArray[Any]) -> Any:
        with TemporaryFile(dir=folder) as file:
            file.write(array.data)
            file.flush()
            return np.asarray(np.memmap(file, array.dtype, "r", shape=array.shape))

    try:
        arrays = {name: mapped(getattr(run, name)) for name in _ARRAYS}
    except OSError as error:
        raise _unwritten(folder, error) from None
    return replace(run, **arrays)


def _unwritten(folder: Path, error: OSError) -> BadInput:
    reason = error.strerror or "it takes no more"  # numpy has words of its own
    return BadInput(f"spill: {folder}: {reason}; give another folder, with more room")
