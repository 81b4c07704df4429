from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, xlogy
from scipy.stats import entropy

from analysis import softmaxrank
from analysis.errors import BadInput
from analysis.ngrams import Counts

Table = npt.NDArray[np.int64]


def counted(table: Table) -> Counts:
    """A dense C x V table as counts of bigrams."""
    rows, tokens = np.nonzero(table)
    starts = np.searchsorted(rows, np.arange(len(table) + 1))
    keys = np.arange(len(table), dtype=np.uint64)
    return Counts(2, table.shape[1], keys, starts, tokens.astype(np.int32), table[rows, tokens])


def drawn(logits: npt.NDArray[np.float64], each: int, seed: int = 0) -> Table:
    p = np.exp(log_softmax(logits, axis=1))
    return np.random.default_rng(seed).multinomial(each, p / p.sum(1, keepdims=True))


def parts(table: Table, least: int = 1) -> list[softmaxrank._Part]:
    return softmaxrank._split(counted(table), len(table), least, 0)[0]


def dense(part: softmaxrank._Part, columns: int) -> npt.NDArray[np.float64]:
    table = np.zeros((len(part.totals), columns))
    table[part.rows, part.columns] = part.counts
    return table


def model(C: int, V: int, r: int, seed: int = 0) -> softmaxrank._Model:
    rng = np.random.default_rng(seed)
    shapes = (C, r), (r, V), (V,)
    return softmaxrank._Model(
        *(torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in shapes)
    )


World = tuple[npt.NDArray[np.float64], Table, softmaxrank.Fits]


@pytest.fixture(scope="module")
def world() -> World:
    """400 contexts, 64 tokens, logits of rank 4 and frequencies besides; 4,000 of each context."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((400, 4)) @ rng.standard_normal((4, 64)) + rng.standard_normal(64)
    table = drawn(logits, 4000)
    return logits, table, softmaxrank.fit(counted(table), [1, 2, 3, 4, 8], seed=1)


def test_a_world_of_rank_4_is_learnt_at_rank_4(world: World) -> None:
    """Its loss there is the world's own on the same occurrences, but for half a nat for each
    parameter of the fit; lower ranks cost more, higher ones win nothing."""
    logits, table, fits = world
    (train, _, report), _, absent = softmaxrank._split(counted(table), 400, 2, 1)
    assert absent == 0
    nats = -(dense(report, 64) * log_softmax(logits, axis=1)).sum(1)
    loss = {f.rank: f.held_out for f in fits.ranks}
    cost = (4 * (400 + 64 - 4) + 63) / 2 / float(train.totals.sum())
    assert loss[4] - nats.sum() / fits.tokens.sum() == pytest.approx(cost, rel=0.3)
    assert loss[1] - loss[2] > 0.02 and loss[2] - loss[3] > 0.02 and loss[3] - loss[4] > 0.02
    assert 0 < loss[8] - loss[4] < 3 * cost
    assert fits.unigram.held_out > loss[1]
    # Without rank, 63 parameters a context are fitted, not 4; smoothing saves some.
    assert loss[4] + 3 * cost < fits.saturated.held_out < loss[4] + 63 / 2 / 2400


def test_the_required_rank_of_a_world_of_rank_4_is_4(world: World) -> None:
    found = softmaxrank.required(world[2], 0.01)
    assert found.low == found.rank == found.high == 4
    assert softmaxrank.required(world[2], 5.0).rank == 1 == found.at_least


def test_the_required_rank_is_of_the_best_rank_or_less(world: World) -> None:
    """Where higher ranks overfit by more than the tolerance, as they would without ridge."""
    fits = world[2]
    above = dict(zip([1, 2, 3, 4, 8], [0.5, 0.3, 0.03, 0.0, 0.2], strict=True))
    made = [replace(f, by_context=(2 + above[f.rank]) * fits.tokens) for f in fits.ranks]
    found = softmaxrank.required(replace(fits, ranks=made), 0.02)
    assert found.rank == 4
    assert softmaxrank.required(replace(fits, ranks=made), 0.3).rank == 2


def test_one_hot_rows_cost_nothing_at_rank_2() -> None:
    """Tokens on a circle: each context points at its own. No rank below V - 1 approximates the
    probabilities, and the unigram costs ln 32."""
    table = 200 * np.eye(32, dtype=np.int64)
    fits = softmaxrank.fit(counted(table), [1, 2])
    assert fits.unigram.held_out == pytest.approx(np.log(32), abs=0.01)
    assert fits.ranks[1].held_out < 0.02
    assert fits.ranks[0].held_out > 10 * fits.ranks[1].held_out


def test_rank_0_is_the_unigram_and_unseen_tokens_cost_what_is_set_aside() -> None:
    """Against the cross-entropy of word frequencies, and a share for tokens that were not fitted
    as often as they turn up elsewhere (half an occurrence added to either side)."""
    rng = np.random.default_rng(0)
    table = rng.multinomial(50, 1 / np.arange(1, 301) / (1 / np.arange(1, 301)).sum(), size=20)
    fits = softmaxrank.fit(counted(table), [1])
    fitted, chosen, held = (
        np.random.default_rng(0).multinomial(table[table > 0], softmaxrank.SHARES).T
    )
    tokens = np.nonzero(table)[1]
    f, g, h = (np.bincount(tokens, part, 300) for part in (fitted, chosen, held))
    new = f == 0
    share = (g[new].sum() + 0.5) / (g.sum() + 1)
    p = np.where(new, share / new.sum(), (1 - share) * f / f.sum())
    assert h[new].sum() > 0
    assert fits.unigram.held_out == pytest.approx(-xlogy(h, p).sum() / h.sum(), abs=1e-5)
    assert fits.unigram.train == pytest.approx(entropy(f), abs=1e-5)
    assert fits.tokens.sum() == h.sum()


def test_a_full_rank_without_ridge_is_the_empirical_distribution() -> None:
    table = np.random.default_rng(0).integers(5, 50, (12, 6))
    train = parts(table)[0]
    seen = dense(train, 6)
    start = model(12, 6, 5)
    for _ in range(4):
        start = softmaxrank._minimised(train, start, 1e-7, 1e-6)
    p = seen / seen.sum(1, keepdims=True)
    assert softmaxrank._loss(train, start) == pytest.approx(
        -xlogy(seen, p).sum() / seen.sum(), abs=1e-4
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.floats(0, 10))
def test_gradients_are_those_of_finite_differences(seed: int, rank: int, ridge: float) -> None:
    """And the objective that of scipy's softmax, whatever is held at a time."""
    rng = np.random.default_rng(seed)
    train = parts(rng.integers(1, 9, (7, 5)))[0]
    seen = dense(train, 5)
    V = int(train.columns.max()) + 1
    seen, at = seen[:, :V], model(7, V, rank, seed)

    def objective(A, B, b) -> float:  # type: ignore[no-untyped-def]
        nats = -(seen * log_softmax(A @ B + b, axis=1)).sum()
        return nats + ridge / 2 * ((A**2).sum() + (B**2).sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmaxrank, "LOGITS", int(rng.integers(1, 40)))
        total, gradients = softmaxrank._objective(train, at, ridge)
    x = [t.double().numpy() for t in (at.A, at.B, at.b)]
    assert total == pytest.approx(objective(*x), rel=1e-5)
    direction = [rng.standard_normal(t.shape) for t in x]
    up, down = ([t + s * d for t, d in zip(x, direction, strict=True)] for s in (1e-5, -1e-5))
    slope = (objective(*up) - objective(*down)) / 2e-5
    found = sum(
        float((g.double().numpy() * d).sum()) for g, d in zip(gradients, direction, strict=True)
    )
    assert found == pytest.approx(slope, rel=1e-3, abs=2e-2)


def test_more_columns_never_fit_worse_at_the_same_ridge() -> None:
    """Sparse counts: a tenth of the parameters of rank 16 could fit them."""
    rng = np.random.default_rng(3)
    train = parts(drawn(2 * rng.standard_normal((150, 40)), 30), 1)[0]
    frequencies = torch.bincount(train.columns, train.counts)
    A, B = softmaxrank._directions(train, frequencies, 16, 0)
    b = (frequencies / frequencies.sum()).log().float()
    losses, at = [], softmaxrank._Model(A[:, :0], B[:0], b)
    for old, new in ((0, 1), (1, 4), (4, 16)):
        wider = torch.cat([at.A, A[:, old:new]], 1), torch.cat([at.B, B[old:new]])
        at = softmaxrank._minimised(train, softmaxrank._Model(*wider, at.b), 0.1, 1e-3)
        losses.append(softmaxrank._loss(train, at))
    assert losses[0] - losses[1] > 0.1 and losses[1] - losses[2] > 0.1


def test_parts_are_the_most_frequent_contexts_thinned() -> None:
    rng = np.random.default_rng(0)
    table = rng.poisson(np.arange(1, 11)[:, None] * np.ones(50))
    (train, choose, report), share, absent = softmaxrank._split(counted(table), 4, 2, 0)
    held = [p.totals.numpy() + p.unseen for p in (train, choose, report)]
    assert np.array_equal(sum(held), table.sum(1)[6:])
    assert share == pytest.approx(table[6:].sum() / table.sum())
    assert train.unseen.sum() == 0 and absent == 50 - int(train.columns.max()) - 1
    n = table[6:].sum()
    for part, expected in zip(held, softmaxrank.SHARES, strict=True):
        assert abs(part.sum() - n * expected) < 4 * np.sqrt(n * expected * (1 - expected))


def test_standard_errors_are_those_of_contexts_drawn_anew() -> None:
    """Of a fixed unigram's loss, in 400 samples of 60 contexts of very unequal size."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(8, 0.3), 4000)
    sizes = rng.geometric(0.01, 4000) + 20
    found = []
    for _ in range(400):
        some = rng.integers(0, 4000, 60)
        table = rng.multinomial(sizes[some], p[some])
        nats = table @ -np.log(np.linspace(0.05, 0.2, 8))
        found.append(softmaxrank._mean(nats, table.sum(1)))
    means, errors = np.array(found).T
    # A standard deviation from 400 is good to 3.5 %.
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.12)


def test_what_cannot_be_fitted_is_refused() -> None:
    table = np.eye(4, dtype=np.int64)
    with pytest.raises(BadInput, match="2 times or more"):
        softmaxrank.fit(counted(table), [1])
    for ranks in ([], [0], [5]):
        with pytest.raises(BadInput, match="from 1 to 4"):
            softmaxrank.fit(counted(5 * table), ranks)
    with pytest.raises(BadInput, match="two or more"):
        softmaxrank.required(softmaxrank.fit(counted(50 * table), [2]))
