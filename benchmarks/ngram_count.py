"""Time and memory of counting n-grams:  python benchmarks/ngram_count.py

The State of the Union, tokenised by a BPE of 4,096 entries (2.6 million tokens): lmsat's counts
against Counter over tuples, for n of 2, 5 and 8, least seconds of the processor and bytes held for
each distinct n-gram. Checked: the same n-grams as often. Then 5-grams of synthetic text of growing
size, independent tokens by Zipf's law in a vocabulary of 50,000, which repeat hardly any and so are
the worst case: time, bytes of the counts, and the peak of memory that no system can take back
(without files mapped from disk), above what the text takes; in memory and with blocks on disk.

Each measurement is made in a process of its own, on one thread.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis import ngrams
from orchestrator import probe
from trainables import corpus

ENTRIES, REPEATS = 4096, 3
VOCABULARY, SIZES = 50000, (1, 4, 16, 50)  # millions of tokens

Tokens = npt.NDArray[Any]


def anonymous() -> int:
    """Bytes that the process holds, without mapped files."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def size(counts: ngrams.Counts) -> int:
    return sum(a.nbytes for a in (counts.keys, counts.starts, counts.tokens, counts.counts))


def sotu() -> Tokens:
    text = corpus.identity(probe.CORPUS, ENTRIES)
    made = corpus.prepare(probe.CORPUS, ENTRIES, text, corpus.default_cache())
    return np.array(made.shard("train"))


def zipf(tokens: int) -> Tokens:
    rng = np.random.default_rng(0)
    law = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    parts = [
        np.searchsorted(law, rng.random(10**6) * law[-1]).astype(np.uint16)
        for _ in range(0, tokens, 10**6)
    ]
    return np.concatenate(parts)


def real(n: int) -> dict[str, float]:
    """Both ways, on the same tokens."""
    text = sotu()
    ours = theirs = float("inf")
    for _ in range(REPEATS):
        began = time.process_time()
        counts = ngrams.count([text], n, ENTRIES)
        ours = min(ours, time.process_time() - began)
    ids = text.tolist()
    held = 0
    for _ in range(REPEATS):
        before = anonymous()
        began = time.process_time()
        plain: Counter[tuple[int, ...]] = Counter()
        plain.update(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
        theirs = min(theirs, time.process_time() - began)
        held = max(held, anonymous() - before)  # later ones reuse what the first gave back
        columns = [np.array(column) for column in zip(*plain, strict=True)]
        often = np.array(list(plain.values()))
        del plain
    order = np.lexsort(columns[::-1])
    contexts = np.repeat(counts.contexts(), np.diff(counts.starts), axis=0)
    for mine, other in zip([*contexts.T, counts.tokens], columns, strict=True):
        assert (mine == other[order]).all()
    assert (counts.counts == often[order]).all()
    distinct = len(counts.tokens)
    return {
        "distinct": distinct, "ours": ours, "theirs": theirs,
        "bytes": size(counts) / distinct, "their_bytes": held / distinct,
    }  # fmt: skip


def growing(millions: int, disk: bool) -> dict[str, float]:
    text = zipf(millions * 10**6)
    before = peak = anonymous()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        counts = ngrams.count([text], 5, VOCABULARY, spill=Path(folder) if disk else None)
        seconds = time.process_time() - began
    ended.set()
    watcher.join()
    return {"seconds": seconds, "counts": size(counts), "peak": peak - before}


def apart(*arguments: int) -> dict[str, float]:
    words = [sys.executable, __file__, *(str(int(a)) for a in arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    print("State of the Union: ns a token, bytes a distinct n-gram")
    tokens = len(sotu())
    for n in (2, 5, 8):
        f = apart(n)
        print(
            f"  n = {n}: {f['distinct']:8.0f} distinct  lmsat {f['ours'] / tokens * 1e9:4.0f} ns "
            f"{f['bytes']:3.0f} B  Counter {f['theirs'] / tokens * 1e9:5.0f} ns "
            f"{f['their_bytes']:4.0f} B  ratios {f['theirs'] / f['ours']:4.1f} "
            f"{f['their_bytes'] / f['bytes']:4.1f}"
        )
    for disk in (False, True):
        print("5-grams of Zipf's law,", "blocks on disk" if disk else "in memory")
        for millions in SIZES:
            f = apart(millions, disk)
            print(
                f"  {millions:3} M tokens {f['seconds']:6.2f} s "
                f"{f['seconds'] / millions * 1e3:4.0f} ns a token  counts "
                f"{f['counts'] / 1e6:5.0f} MB  peak {f['peak'] / 1e6:5.0f} MB"
            )


if __name__ == "__main__":
    given = [int(a) for a in sys.argv[1:]]
    if not given:
        main()
    else:
        print(json.dumps(real(*given) if len(given) == 1 else growing(*given)))
