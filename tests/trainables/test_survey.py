"""One checkpoint's measurements against a plain forward pass in float64."""

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from analysis import geometry, records, spectrum
from analysis.errors import BadInput
from tests.conftest import TIMING, head_section
from tests.trainables.test_frozen import section
from trainables import corpus, pretrain, survey

SEQUENCE, BLOCKS = 64, 16
TRIAL = "0123456789ab"
Scalars = dict[tuple[str, str, int | None], tuple[float, float | None]]


class Plain(NamedTuple):
    """What transformers says of the sample, float64."""

    labels: Tensor
    """blocks x sequence."""
    logits: Tensor
    states: dict[int, Tensor]
    """By layer, each blocks x sequence x d."""
    weight: Tensor


@pytest.fixture(scope="module")
def trial(backbone: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """That of the backbone."""
    from orchestrator import grid
    from tests.conftest import TINY

    path = tmp_path_factory.mktemp("grid") / "tiny.yaml"
    path.write_text(TINY)
    return grid.load(path).trials[-1]


@pytest.fixture(scope="module")
def text(trial: dict[str, Any], cache: Path) -> corpus.Corpus:
    return corpus.prepare(trial["corpus"], trial["tokenizer"], trial["text"], cache)


@pytest.fixture(scope="module")
def task(trial: dict[str, Any], backbone: Path) -> dict[str, Any]:
    return {
        **{key: trial[key] for key in ("corpus", "tokenizer", "text")},
        **{"trial": TRIAL, "name": "nano", "step": 5, "step_tokens": None},
        **{"tokens": BLOCKS * SEQUENCE, "sequence": SEQUENCE, "batch": 3, "layers": []},
        **{"precision": "fp32", "head_only": False, "tasks": [], "cka": None},
        **{"unargmaxable": False, "gram": False, "cpus": 1, "gpus": 0.0, "download": None},
        "source": {"model": section(backbone / "model", pickle=False)},
    }


def measure(task: dict[str, Any], directory: Path, cache: Path, **fields: Any) -> Scalars:
    survey.measure({**task, **fields}, directory, cache)
    step = fields.get("step", task["step"])
    rows = records.scan(directory, "scalars", task["trial"]).filter(step=step).collect()
    return {
        (row["metric"], row["split"], row["layer"]): (row["value"], row["stderr"])
        for row in rows.iter_rows(named=True)
    }


@pytest.fixture(scope="module")
def directory(task: dict[str, Any], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of all that can be measured."""
    directory = tmp_path_factory.mktemp("measured")
    measure(task, directory, cache, gram=True, unargmaxable=True)
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> Scalars:
    rows = records.scan(directory, "scalars").collect().iter_rows(named=True)
    return {(r["metric"], r["split"], r["layer"]): (r["value"], r["stderr"]) for r in rows}


def sample(text: corpus.Corpus, blocks: int) -> Tensor:
    """Its blocks, each with one more token."""
    shard = text.shard("held_out")
    indices = corpus.sample(shard, SEQUENCE, blocks * SEQUENCE)
    return torch.tensor(
        [[int(id) for id in shard[i * SEQUENCE : (i + 1) * SEQUENCE + 1]] for i in indices]
    )


def plainly(folder: Path, ids: Tensor) -> Plain:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        out = model(input_ids=ids[:, :-1], output_hidden_states=True)
    *inner, last = out.hidden_states
    states = {**dict(enumerate(inner)), -1: last}
    return Plain(ids[:, 1:], out.logits, states, model.get_output_embeddings().weight.detach())


@pytest.fixture(scope="module")
def plain(backbone: Path, text: corpus.Corpus) -> Plain:
    return plainly(backbone / "model", sample(text, BLOCKS))


def losses(plain: Plain) -> Tensor:
    """Of each token."""
    chosen = plain.logits.log_softmax(-1).gather(-1, plain.labels[..., None])
    return -chosen.squeeze(-1)


def check(found: Scalars, metric: str, tokens: Tensor) -> None:
    """Mean over tokens (blocks x sequence), its error over blocks."""
    value, stderr = found[metric, "held_out", None]
    blocks = tokens.double().mean(1)
    assert value == pytest.approx(float(blocks.mean()), rel=1e-5)
    assert stderr == pytest.approx(float(blocks.std()) / len(blocks) ** 0.5, rel=1e-4)


def values(found: Scalars) -> dict[tuple[str, str, int | None], float]:
    return {key: value for key, (value, _) in found.items() if key[0] not in TIMING}


def test_predictions_are_those_of_a_plain_forward_pass(
    found: Scalars, plain: Plain, directory: Path, text: corpus.Corpus
) -> None:
    logs = plain.logits.log_softmax(-1)
    check(found, "loss", losses(plain))
    check(found, "entropy", -(logs.exp() * logs).sum(-1))
    check(found, "accuracy", plain.logits.argmax(-1) == plain.labels)
    counts = torch.bincount(torch.from_numpy(text.shard("train").astype("int64")), minlength=1024)
    check(found, "unigram_loss", -((counts + 1) / (counts + 1).sum()).log()[plain.labels])
    blocks = records.scan(directory, "blocks").collect()
    assert blocks["block"].to_list() == corpus.sample(text.shard("held_out"), SEQUENCE, 1024)
    assert blocks["loss"].to_list() == pytest.approx(losses(plain).mean(1).tolist(), rel=1e-5)


def test_perplexity_and_bits_follow_from_the_loss(found: Scalars, text: corpus.Corpus) -> None:
    from tokenizers import Tokenizer

    loss, stderr = found["loss", "held_out", None]
    assert stderr is not None
    perplexity = found["perplexity", "held_out", None]
    assert perplexity == pytest.approx((math.exp(loss), math.exp(loss) * stderr))
    ids = text.shard("held_out").tolist()
    tokenizer = Tokenizer.from_file(str(text.tokenizer))
    size = len(tokenizer.decode(ids, skip_special_tokens=True).encode())
    per_byte = len(ids) / size / math.log(2)
    assert found["bits_per_byte", "held_out", None] == pytest.approx(
        (loss * per_byte, stderr * per_byte)
    )


def test_deciles_of_the_text_make_up_the_loss(
    found: Scalars, plain: Plain, text: corpus.Corpus
) -> None:
    p = torch.from_numpy(text.unigram()).exp()
    order = p.argsort(descending=True, stable=True)
    middle = p[order].cumsum(0) - p[order] / 2
    decile = torch.empty(1024, dtype=torch.long)
    decile[order] = (10 * middle).long().clamp(max=9)
    each, total = decile[plain.labels], 0.0
    for i in range(10):
        value, stderr = found[f"loss_decile_{i}", "held_out", None]
        assert value == pytest.approx(float(losses(plain)[each == i].mean()), rel=1e-5)
        assert stderr is not None and stderr > 0
        total += value * int((each == i).sum())
    assert total / each.numel() == pytest.approx(found["loss", "held_out", None][0], rel=1e-6)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_every_layer_is_measured_on_its_own_states(
    found: Scalars, plain: Plain, layer: int
) -> None:
    states = plain.states[layer]
    blocks, length, _ = states.shape
    units = states.flatten(0, 1) / states.flatten(0, 1).norm(dim=-1, keepdim=True)
    cosines = units @ units.T
    own = torch.arange(blocks).repeat_interleave(length)
    first = torch.arange(length).repeat(blocks) == 0
    between = own[:, None] != own
    rest = states[:, 1:].flatten(0, 1)
    sigma = torch.linalg.svdvals(rest)
    variances = torch.linalg.eigvalsh(torch.cov(rest.T, correction=0)).flip(0)
    mean = rest.mean(0)
    wanted = {
        "anisotropy": cosines[~torch.eye(len(units), dtype=torch.bool)].mean(),
        "anisotropy_between": cosines[between & ~first & ~first[:, None]].mean(),
        "anisotropy_first": cosines[between & first & first[:, None]].mean(),
        "rankme": geometry.rankme(sigma),
        "participation_ratio": geometry.participation_ratio(variances),
        "isoscore_star": geometry.isoscore_star(variances),
        "alpha_req": geometry.alpha_req(variances),
        "norm": rest.norm(dim=-1).mean(),
        "mean_share": mean @ mean / rest.square().sum(1).mean(),
    }
    measured = {
        m: v for (m, split, at), (v, _) in found.items() if (split, at) == ("held_out", layer)
    }
    assert measured == pytest.approx({m: float(v) for m, v in wanted.items()}, rel=1e-4)


def test_spectra_are_those_of_the_head_and_of_its_logits(
    directory: Path, found: Scalars, plain: Plain
) -> None:
    w, states = plain.weight, plain.states[-1][:, 1:].flatten(0, 1)
    centred = w - w.mean(0)
    logits = (states - states.mean(0)) @ centred.T / len(states) ** 0.5
    frame = records.scan(directory, "spectra").collect()
    for matrix, wanted in {"head": w, "head_centred": centred, "functional": logits}.items():
        sigma = frame.filter(matrix=matrix).sort("index")["sigma"].to_list()
        exact = torch.linalg.svdvals(wanted)[:16].tolist()
        assert sigma == pytest.approx(exact, rel=1e-4, abs=1e-5)  # the norm leaves one at zero
    sigma = torch.linalg.svdvals(w)
    entropy = spectrum.singular_entropy(sigma)
    assert found["singular_entropy", "", None][0] == pytest.approx(entropy, rel=1e-6)
    assert found["stable_rank", "", None][0] == pytest.approx(spectrum.stable_rank(sigma))
    assert found["unargmaxable", "", None][0] in range(1024)


def test_what_the_head_knows_of_frequency(
    found: Scalars, plain: Plain, text: corpus.Corpus
) -> None:
    logs = torch.from_numpy(text.unigram())
    left = torch.linalg.svd(plain.weight, full_matrices=False).U
    for i in range(4):
        both = torch.corrcoef(torch.stack([left[:, i], logs]))
        value = found[f"frequency_correlation_{i}", "", None][0]
        assert value == pytest.approx(abs(float(both[0, 1])), rel=1e-4)


def test_a_gram_file_gives_back_the_singular_values(directory: Path) -> None:
    kept = spectrum.load(directory / "grams" / f"{TRIAL}-{5:012d}.npz")
    frame = records.scan(directory, "spectra").collect()
    for matrix, r in {"head": kept.whole, "head_centred": kept.centred}.items():
        sigma = frame.filter(matrix=matrix).sort("index")["sigma"].to_list()
        assert spectrum.values(r, kept.shape).tolist() == pytest.approx(sigma, rel=1e-9)


def test_what_of_the_gradient_survives(found: Scalars, plain: Plain) -> None:
    gradient = plain.logits.softmax(-1)
    gradient.scatter_add_(2, plain.labels[..., None], -torch.ones_like(gradient[..., :1]))
    basis = torch.linalg.qr(plain.weight).Q
    inside = (gradient @ basis).square().sum((1, 2))  # of each block, of which there are not more
    whole = gradient.square().sum((1, 2))
    value, stderr = found["gradient_survival", "held_out", None]
    assert value == pytest.approx(float(inside.sum() / whole.sum()), rel=1e-4)
    without = (inside.sum() - inside) / (whole.sum() - whole)
    jackknife = (without - without.mean()).square().sum() * (BLOCKS - 1) / BLOCKS
    assert stderr == pytest.approx(float(jackknife.sqrt()), rel=1e-3)


def test_the_rank_of_log_probabilities(found: Scalars, plain: Plain) -> None:
    logs = plain.logits.log_softmax(-1).flatten(0, 1)[: 2 * 16]
    rank = spectrum.numerical_rank(logs - logs.mean(-1, keepdim=True))
    assert found["achieved_rank", "held_out", None][0] == rank == 16


def test_the_row_says_what_it_is(directory: Path, backbone: Path) -> None:
    weights = load_file(backbone / "model" / "model.safetensors")
    (row,) = records.scan(directory, "trials").collect().to_dicts()
    shown = {"trial": TRIAL, "name": "nano", "kind": "probe", "status": "done", "step": 5}
    shown |= {"head": "full", "rank": None, "d": 16, "vocabulary": 1024}
    shown["params"] = sum(w.numel() for w in weights.values())
    shown["params_without_embeddings"] = shown["params"] - 2 * 16 * 1024
    assert {key: row[key] for key in shown} == shown


@pytest.mark.parametrize("layers", [[-1], [-1, 0], [-1, 1]])
def test_some_layers_alone(
    task: dict[str, Any], found: Scalars, cache: Path, tmp_path: Path, layers: list[int]
) -> None:
    some = values(measure(task, tmp_path, cache, layers=layers))
    wanted = {key: v for key, v in values(found).items() if key[2] in (None, *layers)}
    del wanted["unargmaxable", "", None]
    assert some == pytest.approx(wanted, rel=1e-6)
    assert {layer for _, _, layer in some} == {None, *layers}


@pytest.fixture(scope="module")
def other(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model, its vocabulary padded as Pythia's are."""
    return untrained(backbone, tmp_path_factory.mktemp("other"), 1040)


def untrained(backbone: Path, folder: Path, vocabulary: int) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(backbone / "model", vocab_size=vocabulary)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(backbone / "model" / "tokenizer.json", folder)
    return folder


def test_a_padded_vocabulary(
    task: dict[str, Any], other: Path, text: corpus.Corpus, cache: Path, tmp_path: Path
) -> None:
    found = measure(task, tmp_path, cache, source={"model": section(other, pickle=False)})
    plain = plainly(other, sample(text, BLOCKS))
    assert plain.logits.shape[-1] == 1040
    check(found, "loss", losses(plain))
    logs = torch.from_numpy(text.unigram())
    padded = torch.cat([logs, logs.min().expand(16)])
    left = torch.linalg.svd(plain.weight, full_matrices=False).U
    both = torch.corrcoef(torch.stack([left[:, 0], padded]))
    value = found["frequency_correlation_0", "", None][0]
    assert value == pytest.approx(abs(float(both[0, 1])), rel=1e-3)
    assert records.scan(tmp_path, "trials").collect()["vocabulary"].to_list() == [1040]


def test_likeness_to_the_last_checkpoint(
    task: dict[str, Any],
    backbone: Path,
    other: Path,
    text: corpus.Corpus,
    cache: Path,
    tmp_path: Path,
) -> None:
    """On as many blocks whatever goes through the model at once."""
    more = {"tokens": 70 * SEQUENCE}
    last = measure(task, tmp_path, cache, **more, step=9, batch=8, cka="reference")
    same = measure(task, tmp_path, cache, **more, step=8, batch=5, cka="compare")
    source = {"model": section(other, pickle=False)}
    far = measure(task, tmp_path, cache, **more, step=7, cka="compare", source=source)
    ids = sample(text, 64)  # of 64 tokens: 4096
    ends, begins = plainly(backbone / "model", ids).states, plainly(other, ids).states
    for layer in (0, 1, -1):
        key = ("cka_to_last", "held_out", layer)
        assert last[key] == pytest.approx((1.0, 0.0), abs=1e-6)
        assert same[key] == pytest.approx((1.0, 0.0), abs=1e-6)
        wanted = geometry.cka(begins[layer][:, 1:], ends[layer][:, 1:])
        assert far[key] == pytest.approx(tuple(wanted), rel=1e-3)
        assert far[key][0] < 0.9


def test_nothing_to_be_compared_with(task: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the last checkpoint, to be compared with, could not"):
        measure(task, tmp_path, cache, cka="compare")
    assert not records.segments(tmp_path, "trials", TRIAL)


def trained(trial: dict[str, Any], folder: Path, cache: Path, **head: Any) -> dict[str, Any]:
    """A task's source: a trial of another head, trained for a moment."""
    train = {**trial["train"], "tokens": 2048}
    own = {**trial, "head": head_section(**head), "train": train, "id": "another"}
    assert pretrain.train(own, folder, cache).status == "done"
    return {"trial": own, "weights": str(folder / "trials" / "another" / "model")}


@pytest.mark.parametrize(
    "head", [{"kind": "linear"}, {"kind": "linear", "rank": 4}, {"kind": "sigsoftmax"}]
)
def test_a_sweeps_own_model_with_the_head_it_has(
    task: dict[str, Any],
    trial: dict[str, Any],
    text: corpus.Corpus,
    cache: Path,
    tmp_path: Path,
    head: dict[str, Any],
) -> None:
    source = trained(trial, tmp_path, cache, **head)
    found = measure(task, tmp_path / "probe", cache, source=source, step_tokens=512)
    weights = load_file(Path(source["weights"]) / "model.safetensors")
    plain = plainly(Path(source["weights"]), sample(text, BLOCKS))  # its head may be another
    w = weights.get("lm_head.weight")
    if w is None:
        w = weights["lm_head.A"] @ weights["lm_head.B"]
    z = plain.states[-1] @ w.double().T
    logits = z + torch.nn.functional.logsigmoid(z) if head["kind"] == "sigsoftmax" else z
    check(found, "loss", losses(plain._replace(logits=logits)))
    (row,) = records.scan(tmp_path / "probe", "trials").collect().to_dicts()
    label = {"kind": "probe", "rank": head.get("rank"), "seed": 0, "lr": trial["train"]["lr"]}
    assert {key: row[key] for key in label} == label
    tokens = records.scan(tmp_path / "probe", "scalars").collect()["tokens"]
    assert tokens.unique().to_list() == [5 * 512]


@pytest.mark.parametrize("kind", ["trial", "model"])
def test_a_head_alone_needs_no_body(
    task: dict[str, Any],
    trial: dict[str, Any],
    found: Scalars,
    backbone: Path,
    cache: Path,
    tmp_path: Path,
    kind: str,
) -> None:
    """Its weights are gone."""
    model = tmp_path / "model"
    shutil.copytree(backbone / "model", model)
    weights = load_file(model / "model.safetensors")
    save_file({"lm_head.weight": weights["lm_head.weight"]}, model / "model.safetensors")
    sources = {
        "trial": {"trial": trial, "weights": str(model)},
        "model": {"model": section(model, pickle=False)},
    }
    with pytest.raises(BadInput, match=r"not the weights of|weights are missing"):
        measure(task, tmp_path, cache, source=sources[kind])
    alone = measure(task, tmp_path, cache, source=sources[kind], head_only=True)
    wanted = {k: v for k, v in values(found).items() if not k[1] and "functional" not in k[0]}
    del wanted["unargmaxable", "", None]
    assert values(alone) == pytest.approx(wanted, rel=1e-6)


def test_a_checkpoint_that_holds_no_numbers(
    task: dict[str, Any], backbone: Path, cache: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(backbone / "model", model)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][3] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    source = {"model": section(model, pickle=False)}
    for head_only, told in ((False, "held-out loss is not a number"), (True, "NaN or infinity")):
        with pytest.raises(BadInput, match=told):
            measure(task, tmp_path / "probe", cache, source=source, head_only=head_only)
    for table in records.TABLES:
        assert records.scan(tmp_path / "probe", table).select(pl.len()).collect().item() == 0
