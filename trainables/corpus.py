"""Token shards, and batches that are a pure function of (seed, step).

A corpus is split by document into `train` and `held_out`, tokenised once for each (text, split,
tokenizer), and kept in a cache as two flat files of token ids that every trial maps into memory.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.errors import BadInput, one_line
from trainables import gguf_header, hub, text
from trainables.text import Document

FORMAT = 1  # of the shards: a change makes every cache new
END = "<|endoftext|>"  # follows each document
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>")  # what tokenizers at large call it
LARGEST = 10**7  # token id
LOST = 0.05  # share of the characters that a tokenizer may lose

Progress = Callable[[str, int], None]  # (what is being done, documents so far)


@dataclass(frozen=True)
class Corpus:
    """Tokenised text on disk."""

    directory: Path
    vocabulary: int
    tokens: dict[str, int]
    """By split: train, held_out."""
    bytes: dict[str, int]
    documents: dict[str, int]

    def shard(self, split: str) -> npt.NDArray[Any]:
        """The token ids of a split, one after the other, mapped from disk."""
        return np.memmap(self.directory / f"{split}.bin", _width(self.vocabulary), mode="r")

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer.json"

    def unigram(self) -> npt.NDArray[np.float64]:
        """Log-probability of each token (V), from its count in the training text plus one."""
        counts = np.bincount(self.shard("train"), minlength=self.vocabulary) + 1.0
        return np.log(counts / counts.sum())


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LMSAT_CACHE") or Path(base) / "lmsat")


def identity(source: dict[str, Any], tokenizer: int | str) -> dict[str, Any]:
    """What the token stream depends on. `tokenizer` is a number of BPE entries to train, or a
    local tokenizer.json, or a hub name."""
    if isinstance(tokenizer, str) and (file := _tokenizer_file(tokenizer)):
        tokenizer = hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "format": FORMAT,
        "source": text.identity(source),
        "held_out": [source["held_out"], source["held_out_by"]],
        "tokenizer": tokenizer,
    }


def key(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def find(key: str, cache: Path) -> Corpus | None:
    """The shards of a corpus, where they have been made and are whole."""
    directory = cache / "corpora" / key
    try:
        corpus = Corpus(directory, **json.loads((directory / "meta.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    itemsize = np.dtype(_width(corpus.vocabulary)).itemsize
    for split, count in corpus.tokens.items():
        file = directory / f"{split}.bin"
        if not file.exists() or file.stat().st_size != count * itemsize:
            return None
    return corpus


def prepare(
    source: dict[str, Any],
    tokenizer: int | str,
    identity: dict[str, Any],
    cache: Path,
    progress: Progress = lambda what, n: None,
) -> Corpus:
    """The tokenised corpus, made if it is not in the cache. Safe when many start at once.

    `identity` is the function's answer for the same source and tokenizer: finding it out reads
    all the text, so it is done once and handed on. Raises BadInput where there is no text, one
    split stays empty, or the tokenizer is unknown.
    """
    from filelock import FileLock

    name = key(identity)
    if found := find(name, cache):
        return found
    (cache / "corpora").mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "corpora" / f"{name}.lock"):
        if found := find(name, cache):
            return found
        for left in (cache / "corpora").glob(f".{name}-*"):  # by one that was killed
            shutil.rmtree(left)
        partial = cache / "corpora" / f".{name}-{uuid.uuid4().hex[:8]}"
        partial.mkdir()
        try:
            _make(source, tokenizer, partial, progress)
            final = cache / "corpora" / name
            shutil.rmtree(final, ignore_errors=True)  # damaged, or find() had taken it
            os.rename(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    made = find(name, cache)
    assert made is not None
    return made


def batch(
    shard: npt.NDArray[Any], sequence: int, size: int, seed: int, step: int
) -> npt.NDArray[np.int64]:
    """Batch number `step` (from 0): size x (sequence + 1) token ids, the last one a label only.

    The text is cut into blocks of `sequence` tokens, shuffled anew for each epoch.
    """
    return rows(shard, sequence, batch_blocks(shard, sequence, size, seed, step))


def batch_blocks(
    shard: npt.NDArray[Any], sequence: int, size: int, seed: int, step: int
) -> list[int]:
    """The blocks that make up that batch."""
    count = blocks(shard, sequence)
    at = range(step * size, (step + 1) * size)
    return [int(_order(count, seed, i // count)[i % count]) for i in at]


def rows(shard: npt.NDArray[Any], sequence: int, indices: Iterable[int]) -> npt.NDArray[np.int64]:
    """Blocks by index: each sequence + 1 token ids."""
    return np.stack([shard[i * sequence : (i + 1) * sequence + 1] for i in indices]).astype(
        np.int64
    )


def blocks(shard: npt.NDArray[Any], sequence: int) -> int:
    """How many blocks of `sequence` tokens, each with its label, the text holds."""
    return (len(shard) - 1) // sequence


def sample(shard: npt.NDArray[Any], sequence: int, tokens: int) -> list[int]:
    """Indices of a fixed random sample of blocks; a larger sample begins with the smaller ones."""
    return [int(i) for i in _order(blocks(shard, sequence), 0, 0)[: max(1, tokens // sequence)]]


def halves(shard: npt.NDArray[Any], sequence: int, tokens: int) -> tuple[list[int], list[int]]:
    """Two such samples, of `tokens` each, that share no document but the one in the middle: from
    the first and from the second half of the text."""
    count = blocks(shard, sequence)
    order, size = _order(count, 0, 0), max(1, tokens // sequence)
    first = order < count // 2
    return [int(i) for i in order[first][:size]], [int(i) for i in order[~first][:size]]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _width(vocabulary: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def _make(source: dict[str, Any], name: int | str, directory: Path, progress: Progress) -> None:
    held_out = _split(source, progress)
    if isinstance(name, int):
        train = (d.text for d in text.read(source) if not held_out(d))
        tokenizer = _train_bpe(name, train, progress)
    else:
        tokenizer = load_tokenizer(name)
        tokenizer.no_truncation()
        tokenizer.no_padding()
    end = end_of(tokenizer)
    tokenizer.save(str(directory / "tokenizer.json"))
    # As many as entries, unless ids have holes.
    vocabulary = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if vocabulary > LARGEST:
        raise BadInput(f"tokenizer: {name} has ids beyond {LARGEST:,}")
    counts = {part: {"tokens": 0, "bytes": 0, "documents": 0} for part in ("train", "held_out")}
    files = {part: (directory / f"{part}.bin").open("wb") for part in counts}
    done = 0
    documents = text.read(source)
    while some := list(islice(documents, 64)):
        if not done:
            _check_expressed([d.text for d in some], tokenizer, name)
        encoded = tokenizer.encode_batch_fast([d.text for d in some], add_special_tokens=False)
        for document, encoding in zip(some, encoded, strict=True):
            part = "held_out" if held_out(document) else "train"
            ids = encoding.ids if end is None else [*encoding.ids, end]
            files[part].write(np.asarray(ids, _width(vocabulary)).tobytes())
            counts[part]["tokens"] += len(ids)
            counts[part]["bytes"] += len(document.text.encode())
            counts[part]["documents"] += 1
        done += len(some)
        progress("tokenising", done)
    for file in files.values():
        file.close()
    for part, count in counts.items():
        if not count["documents"]:
            raise _nothing(part)
    meta = {what: {part: counts[part][what] for part in counts} for what in counts["train"]}
    (directory / "meta.json").write_text(json.dumps({"vocabulary": vocabulary, **meta}))


def end_of(tokenizer: Any) -> int | None:
    """The token that follows each document, where the tokenizer has one."""
    ids = (tokenizer.token_to_id(end) for end in ENDS)
    return next((id for id in ids if id is not None), None)


def _nothing(part: str) -> BadInput:
    return BadInput(
        f"corpus: no text for its {part} part; give more documents (one a file, or one a line of "
        "JSONL), or change held_out"
    )


def _check_expressed(texts: list[str], tokenizer: Any, name: int | str) -> None:
    """Raises BadInput where the tokenizer drops many of the characters, or calls them unknown."""
    unknown = {tokenizer.token_to_id(name) for name in ("<unk>", "[UNK]", "<|unk|>")} - {None}
    counts = Counter(c for one in texts for c in one if not c.isspace())
    encoded = tokenizer.encode_batch_fast([*counts], add_special_tokens=False)
    lost = Counter(
        {
            c: counts[c]
            for c, encoding in zip(counts, encoded, strict=True)
            if not encoding.ids or unknown & {*encoding.ids}
        }
    )
    if (share := lost.total() / counts.total()) > LOST:
        worst = " ".join(c for c, _ in lost.most_common(8))
        raise BadInput(
            f"tokenizer: {name} has no tokens for {100 * share:.0f} % of the text ({worst}); give "
            "one that was trained on such text, or a byte-level one"
        )


def _split(source: dict[str, Any], progress: Progress) -> Callable[[Document], bool]:
    """Whether a document is held out: by the hash of its text, or the latest ones by date."""
    share = source["held_out"]
    if source["held_out_by"] == "document":
        return lambda d: _hash01(d.text) < share
    sizes: dict[str, int] = {}
    for n, document in enumerate(text.read(source), 1):
        if document.date is None:
            raise BadInput(
                "corpus.held_out_by: the documents have no date; name a column in corpus.date, "
                "begin file names with YYYY, or split by document"
            )
        sizes[document.date] = sizes.get(document.date, 0) + len(document.text)
        progress("dating", n)
    kept, first = 0, ""
    for date in sorted(sizes, reverse=True):
        kept, first = kept + sizes[date], date
        if kept >= share * sum(sizes.values()):
            break
    return lambda d: d.date is not None and d.date >= first


def _hash01(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _tokenizer_file(name: str) -> Path | None:
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    return path if path.is_file() else None


def load_tokenizer(name: str) -> Any:
    """A `tokenizers` tokenizer from a local tokenizer.json, its folder, a GGUF file, or the hub
    (NAME or NAME@REVISION)."""
    from tokenizers import Tokenizer

    file, options = _tokenizer_file(name), {}
    if file and file.suffix != ".gguf":
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise BadInput(f"tokenizer: {file}: {error}") from None
    if file:
        gguf_header.check(file)
        source, options = str(file.parent), {"gguf_file": file.name}
    elif Path(name).is_dir():
        source = name
    else:
        source, _, revision = name.partition("@")
        hub.revision("model", source, "tokenizer", revision or None)
        options = {"revision": revision} if revision else {}
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **options).backend_tokenizer
    except Exception as error:  # of whatever reads this kind of tokenizer
        raise BadInput(f"tokenizer: {name!r} has no tokenizer to load: {one_line(error)}") from None


def _train_bpe(entries: int, texts: Iterator[str], progress: Progress) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    read = 0

    def counted() -> Iterator[str]:
        nonlocal read
        for read, one in enumerate(texts, 1):
            progress("training the tokenizer", read)
            yield one

    tokenizer.train_from_iterator(counted(), trainer)
    if not read:
        raise _nothing("train")
    if tokenizer.get_vocab_size() != entries:
        raise BadInput(
            f"tokenizer.train_bpe: the text yields {tokenizer.get_vocab_size()} entries, "
            f"not {entries}; ask for fewer"
        )
    return tokenizer
