import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from analysis import spectrum
from tests.conftest import head_section
from trainables import backbones, heads, pretrain, zoo
from trainables.heads import CHUNK, LinearHead, token_stats

V, D = 101, 16


def head(rank: int | None) -> LinearHead:
    torch.manual_seed(0)
    return LinearHead(V, D, rank)


def product(head: LinearHead) -> torch.Tensor:
    """W, V x d, in float64."""
    out, down = head.factors()
    return out.double() if down is None else out.double() @ down.double()


@pytest.mark.parametrize("rank", [None, 1, 4, 16])
def test_loss_and_gradients_are_those_of_the_whole_logits(rank: int | None) -> None:
    ours = head(rank)
    hidden = torch.randn(3, CHUNK // 2, D, requires_grad=True)
    labels = torch.randint(V, (3, CHUNK // 2))
    ours(hidden, labels).backward()
    exact = hidden.detach().double().requires_grad_()
    factors = [f.detach().double().requires_grad_() for f in ours.parameters()]
    logits = exact @ (factors[0].T if rank is None else (factors[0] @ factors[1]).T)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    assert ours(hidden, labels).item() == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(hidden.grad.double(), exact.grad, atol=1e-8)
    for parameter, factor in zip(ours.parameters(), factors, strict=True):
        assert torch.allclose(parameter.grad.double(), factor.grad, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 1, 4, 16])
def test_the_matrix_has_its_rank(rank: int | None) -> None:
    assert torch.linalg.matrix_rank(product(head(rank))).item() == (rank or D)


@pytest.mark.parametrize("rank", [None, 4, 64])
def test_logits_start_with_variance_one(rank: int | None) -> None:
    torch.manual_seed(1)
    ours = LinearHead(4096, 128, rank)
    logits = ours(torch.randn(512, 128)).detach()
    assert logits.var().item() == pytest.approx(1, rel=0.25 if rank == 4 else 0.05)
    loss = ours(torch.randn(512, 128), torch.randint(4096, (512,))).item()
    assert math.log(4096) < loss < math.log(4096) + 1


@pytest.mark.parametrize("rank", [4, 16])
def test_adam_moves_low_rank_logits_as_far_as_full_ones(rank: int) -> None:
    def moved(rank: int | None) -> float:
        """Of the logits of one hidden state that every token shares, in one step on A or W."""
        torch.manual_seed(2)
        ours = LinearHead(256, 64, rank)
        hidden, labels = torch.randn(64).expand(512, 64), torch.randint(256, (512,))
        before = ours(hidden).detach()
        optimizer = torch.optim.Adam([ours.factors()[0]], lr=1e-4)
        ours(hidden, labels).backward()
        optimizer.step()
        return (ours(hidden) - before).abs().mean().item()

    assert 0.5 < moved(rank) / moved(None) < 2


def test_token_stats_are_exact_over_many_chunks() -> None:
    ours = head(4)
    hidden, labels = torch.randn(2 * CHUNK + 7, D), torch.randint(V, (2 * CHUNK + 7,))
    stats = token_stats(ours, hidden, labels)
    logits = hidden.double() @ product(ours).T
    exact = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(stats.loss.double(), exact, atol=1e-5)
    assert torch.equal(stats.correct, logits.argmax(1) == labels)


def test_bf16_states_give_a_loss_in_fp32() -> None:
    ours = head(4).bfloat16()
    hidden, labels = torch.randn(64, D).bfloat16(), torch.randint(V, (64,))
    loss = ours(hidden, labels)
    out, down = ours.factors()
    logits = torch.nn.functional.linear(hidden, down).float() @ out.float().T
    exact = torch.nn.functional.cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), abs=1e-5)


ZOO = [
    head_section("linear"),
    head_section("linear", 3),
    head_section("sigsoftmax"),
    head_section("sigsoftmax", 3),
    head_section("monotone"),
    head_section("monotone", 3),
    head_section("mlp", 3),
    head_section("mos", experts=4),
    head_section("mos", 3, experts=2),
    head_section("backward", backward=3, directions="own", refresh=10),
    head_section("backward", backward=3, directions="random"),
]


def reference(head: heads.LinearHead, kind: str, h: torch.Tensor) -> torch.Tensor:
    """Log-probabilities from probabilities, token by token, as the papers write them."""
    w = {name: p.double() for name, p in head.named_parameters()}
    if kind == "mos":
        out, k = w["weight"], len(w["prior"])
        pi = torch.softmax(w["prior"] @ h, 0)
        each, c = w["experts"].view(k, -1, len(h)), len(h) / out.shape[1]
        return torch.log(
            sum(pi[i] * torch.softmax(out @ torch.tanh(each[i] @ h) * c, 0) for i in range(k))
        )
    if kind == "mlp":
        z = w["A"] @ w["B"] @ torch.nn.functional.gelu(w["C"] @ h)
    else:
        z = (w["weight"] if "weight" in w else w["A"] @ w["B"]) @ h
    if kind == "sigsoftmax":
        p = torch.exp(z) / (1 + torch.exp(-z))
        return torch.log(p / p.sum())
    if kind == "monotone":
        slopes = torch.log(1 + torch.exp(w["slopes"]))
        edges = torch.linspace(-16, 16, 33, dtype=torch.float64)
        values = torch.cat([torch.tensor([-16.0]).double(), -16 + slopes.cumsum(0)])
        z = torch.stack([_piecewise(x, edges, values, slopes) for x in z])
    return torch.log(torch.softmax(z, 0))


def _piecewise(x: Any, edges: Any, values: Any, slopes: Any) -> torch.Tensor:
    i = min(max(math.floor(float(x) + 16), 0), 31)
    return values[i] + slopes[i] * (x - edges[i])


@pytest.mark.parametrize("given", ZOO, ids=zoo.label)
def test_every_head_is_its_formula(given: dict[str, Any]) -> None:
    """Values, loss and all gradients in float64, over more than one chunk; fp32 beside it."""
    torch.manual_seed(3)
    n, v, d = CHUNK + 5, 11, 6
    head = heads.make(given, v, d).double()
    with torch.no_grad():
        for p in head.parameters():  # off its start, where a monotone function is the identity
            p.mul_(1 + torch.rand_like(p)).add_(0.1)
    hidden = 3 * torch.randn(n, d, dtype=torch.float64)
    labels = torch.randint(v, (n,))
    wanted = torch.stack([reference(head, given["kind"], h) for h in hidden])
    assert torch.allclose(head(hidden).log_softmax(-1), wanted, atol=1e-10)

    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = head(ours, labels)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()
    plain = -torch.stack([reference(head, given["kind"], h) for h in theirs])[range(n), labels]
    plain.mean().backward()
    assert loss.item() == pytest.approx(plain.mean().item(), abs=1e-12)
    for name, p in head.named_parameters():
        assert torch.allclose(gradients[name], p.grad, atol=1e-10), name
    if given["kind"] == "backward":
        q = head.basis
        assert torch.allclose(q.T @ q, torch.eye(3, dtype=torch.float64), atol=1e-6)
        assert torch.allclose(ours.grad, theirs.grad @ q @ q.T, atol=1e-10)
        assert not torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    else:
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-10)
    single = head.float()(hidden.float(), labels)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("given", ZOO, ids=zoo.label)
def test_every_head_states_its_parameters(given: dict[str, Any]) -> None:
    head = heads.make(given, 50, 8)
    assert zoo.cost(given, 50, 8).params == sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize(("v", "d", "rank"), [(4096, 64, 16), (49152, 576, 64), (1024, 16, 2)])
def test_a_small_network_costs_a_linear_head_of_its_rank(v: int, d: int, rank: int) -> None:
    mlp, linear = (zoo.cost(head_section(k, rank), v, d).params for k in ("mlp", "linear"))
    assert 0 <= linear - mlp < d + rank


@pytest.mark.parametrize("given", ZOO, ids=zoo.label)
def test_every_heads_products_are_counted_by_torch(given: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    head, counter = heads.make(given, 50, 8), FlopCounterMode(display=False)
    with counter:
        head(torch.randn(7, 8))
    assert counter.get_total_flops() == 2 * 7 * zoo.cost(given, 50, 8).products


@pytest.mark.parametrize("given", ZOO, ids=zoo.label)
def test_every_head_starts_near_ln_v(given: dict[str, Any]) -> None:
    torch.manual_seed(4)
    head = heads.make(given, 4096, 64)
    loss = head(torch.randn(256, 64), torch.randint(4096, (256,))).item()
    assert math.log(4096) - 0.2 < loss < math.log(4096) + 1.2


def achieved(given: dict[str, Any]) -> int:
    """Rank of the centred log-probabilities of 40 states in 8 dimensions, V = 60."""
    torch.manual_seed(5)
    head = heads.make(given, 60, 8).double()
    log_probs = head(3 * torch.randn(40, 8, dtype=torch.float64)).log_softmax(-1)
    return spectrum.numerical_rank((log_probs - log_probs.mean(-1, keepdim=True)).T)


def test_only_what_is_not_linear_passes_the_rank() -> None:
    assert achieved(head_section("linear")) == 8
    assert achieved(head_section("linear", 3)) == 3
    assert achieved(head_section("mlp", 3)) == 2
    assert achieved(head_section("mos", experts=4)) == 40
    assert achieved(head_section("mos", 3, experts=4)) == 40
    assert achieved(head_section("sigsoftmax", 3)) > 20
    assert achieved(head_section("monotone", 3)) == 3  # the identity, at its start


def test_own_directions_are_the_heads_top_ones() -> None:
    head = heads.make(head_section("backward", backward=2, directions="own", refresh=10), 50, 8)
    head.renew()
    top = torch.linalg.svd(head.weight.double()).Vh[:2].T
    ours = head.basis.double()
    assert torch.allclose(ours @ ours.T, top @ top.T, atol=1e-6)


@pytest.mark.parametrize(
    "given", [head_section("mos", experts=4), head_section("sigsoftmax")], ids=zoo.label
)
def test_no_head_holds_all_logits_for_its_backward_pass(given: dict[str, Any]) -> None:
    """What autograd keeps between the passes is a few tokens' worth of logits at most."""
    head, n, v = heads.make(given, 2000, 8), 4 * CHUNK, 2000
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        head(torch.randn(n, 8), torch.randint(v, (n,)))
    assert kept < n * v / 20


def trial(rank: int | None, tied: bool = False) -> dict:
    model = {"size": "nano-16", "config": None, "residual": "parallel", "tied": tied}
    return {
        "seed": 0,
        "model": model,
        "head": head_section("linear", rank),
        "train": {"sequence": 32},
    }


@pytest.mark.parametrize("rank", [None, 3])
def test_the_head_in_use_is_ours(rank: int | None) -> None:
    model = pretrain.build(trial(rank), V)
    ids = torch.randint(V, (2, 9))
    with torch.no_grad():
        theirs = model.model(ids).logits
        states = model.model.base_model(ids).last_hidden_state
    assert torch.allclose(theirs.double(), states.double() @ product(model.head).T, atol=1e-5)
    before = model(ids).item()
    with torch.no_grad():
        model.head.factors()[0].zero_()
    assert model(ids).item() == pytest.approx(math.log(V)) != before


def test_assigning_to_the_attribute_would_do_nothing() -> None:
    config = backbones.configuration(trial(None)["model"], V, 32)
    model, ids = backbones.build(config), torch.randint(V, (1, 5))
    before = model(ids).logits
    model.embed_out = LinearHead(V, D, 3)
    assert torch.equal(model(ids).logits, before)


def test_a_tied_head_is_the_embedding() -> None:
    model = pretrain.build(trial(None, tied=True), V)
    assert model.head.weight is model.model.get_input_embeddings().weight
    names = [name for name, _ in model.named_parameters()]
    assert len([n for n in names if "embed" in n]) == 1


def test_the_backbone_is_the_same_under_every_head() -> None:
    full, low = (pretrain.build(trial(rank), V).model.base_model for rank in (None, 3))
    for a, b in zip(full.parameters(), low.parameters(), strict=True):
        assert torch.equal(a, b)


def test_head_and_embedding_are_drawn_apart() -> None:
    model = pretrain.build(trial(None), V)
    embedding = model.model.get_input_embeddings().weight.detach().flatten()
    both = torch.stack([embedding, model.head.weight.detach().flatten()])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.1


def test_a_head_as_given_has_its_bias_and_nothing_to_train() -> None:
    torch.manual_seed(0)
    out, down, bias = torch.randn(50, 3), torch.randn(3, 8), torch.randn(50)
    hidden, labels = torch.randn(7, 8), torch.randint(50, (7,))
    for factors, w in (((out, down), out @ down), ((out @ down, None), out @ down)):
        head = heads.Fixed(*factors, bias)
        logits = hidden @ w.T + bias
        assert torch.allclose(head(hidden), logits, atol=1e-5)
        assert torch.allclose(head(hidden, labels), F.cross_entropy(logits, labels), atol=1e-5)
        assert list(head.parameters()) == []


@pytest.mark.parametrize("kind", ["linear", "sigsoftmax", "monotone"])
def test_normal_starts_are_the_papers(kind: str) -> None:
    """A, B from N(0, 1): logits of scale sqrt(r d) on states of unit variance."""
    torch.manual_seed(0)
    head = heads.make(head_section(kind, 64), 400, 256)
    heads.start(head, "normal")
    assert head.A is not None and head.B is not None
    for matrix in (head.A, head.B):
        assert abs(matrix.mean().item()) < 0.02 and abs(matrix.std().item() - 1) < 0.02
    z = heads.LinearHead.logits(head, torch.randn(500, 256))
    assert z.std().item() == pytest.approx((64 * 256) ** 0.5, rel=0.1)
