"""Time and memory of W-error by size of text:  python benchmarks/dimension_scale.py [MILLIONS ...]

Synthetic text in a vocabulary of 50,257: tokens by Zipf's law, three in four of them one of a few
successors of the last, so that 5-grams repeat about as they do in prose. Counted in parts of 4M
tokens that wait on disk, merged, and of W (every context a row) the 2,000 leading singular values
and the tail. Seconds of the processor on one thread, and the peak of memory that no system can
take back (without files mapped from disk); each size in a process of its own. Checked: as many
n-grams counted as there are.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis import ngrams, werror

VOCABULARY, N, PART = 50_257, 5, 2**22
SIZES = (1, 4, 16, 50)  # millions of tokens
CHAINS, SUCCESSORS, FAITHFUL = 1000, 8, 0.75


def anonymous() -> int:
    """Bytes that the process holds, without mapped files."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def text(tokens: int) -> npt.NDArray[np.uint16]:
    """Chains, one after the other."""
    rng = np.random.default_rng(0)
    law = np.cumsum(1 / np.arange(1, VOCABULARY + 1))

    def zipf(*shape: int) -> npt.NDArray[np.int64]:
        return np.searchsorted(law, rng.random(shape) * law[-1])

    following = zipf(VOCABULARY, SUCCESSORS)
    steps = tokens // CHAINS
    found = np.empty((steps, CHAINS), np.uint16)
    last = zipf(CHAINS)
    for step in range(steps):
        which = (SUCCESSORS * rng.random(CHAINS) ** 2).astype(int)
        last = np.where(rng.random(CHAINS) < FAITHFUL, following[last, which], zipf(CHAINS))
        found[step] = last
    return found.T.reshape(-1)


def measured(millions: int) -> dict[str, Any]:
    ids = text(millions * 10**6)
    before, peak, stop = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            peak = max(peak, anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        parts = []
        for start in range(0, len(ids), PART):
            parts.append(Path(folder) / str(start))
            chunk = ids[max(0, start - N + 1) : start + PART]
            ngrams.save(ngrams.count([chunk], N, VOCABULARY), parts[-1])
        counts = ngrams.merge([ngrams.load(part) for part in parts])
        counted = time.process_time()
        assert counts.counts.sum() == len(ids) - N + 1
        found = werror.spectrum(counts, dimensions=werror.LEADING)
        ended = time.process_time()
    stop.set()
    watcher.join()
    totals = np.add.reduceat(counts.counts, counts.starts[:-1])
    return {
        "count": counted - began,
        "spectrum": ended - counted,
        "peak": peak,
        "contexts": len(totals),
        "once": float((totals == 1).mean()),
        "halved": werror.reaching(found, 0.5),
        "residual": found.residual / found.values[0],
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measured(int(sys.argv[2]))))
        return
    print("tokens  contexts  once  count s  ns/token  spectrum s  peak GB  W-error .5 at  residual")
    for millions in map(int, sys.argv[1:] or SIZES):
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(millions)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        row = json.loads(done.stdout)
        print(
            f"{millions:4d}M {row['contexts'] / 1e6:8.2f}M {100 * row['once']:4.0f}%"
            f" {row['count']:8.1f} {1e3 * row['count'] / millions:9.0f} {row['spectrum']:11.0f}"
            f" {row['peak'] / 1e9:8.2f} {row['halved']:14d} {row['residual']:9.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
