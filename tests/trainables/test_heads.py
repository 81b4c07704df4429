import math

import pytest
import torch

from trainables import backbones, pretrain
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


def trial(rank: int | None, tied: bool = False) -> dict:
    model = {"size": "nano-16", "config": None, "residual": "parallel", "tied": tied}
    return {"seed": 0, "model": model, "head": {"rank": rank}, "train": {"sequence": 32}}


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
