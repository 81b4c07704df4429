from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.errors import BadInput
from trainables import backbones

# Godey et al. 2024, table of PAPER figures: parameters of the public Pythia models.
PUBLISHED = {
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
}


def model(size: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"size": size, "config": None, "residual": "parallel", "tied": False, **fields}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", backbones.LADDER)
def test_what_is_planned_is_what_is_built(size: str, tied: bool) -> None:
    section = model(size, tied=tied)
    built = backbones.shape(backbones.configuration(section, 1000, 128))
    assert backbones.planned(section, 1000, 128) == built
    assert backbones.width(section) == built.d


@pytest.mark.parametrize("size", PUBLISHED)
def test_pythia_sizes_have_the_published_parameters(size: str) -> None:
    vocabulary = backbones.LADDER[size].vocabulary
    shape = backbones.shape(backbones.configuration(model(size), vocabulary, 128))
    assert shape.body + shape.embedding + vocabulary * shape.d == PUBLISHED[size]


def test_every_size_rotates_whole_pairs() -> None:
    for size in backbones.LADDER.values():
        assert size.d % size.heads == 0
        rotated = size.d // size.heads * size.rotary
        assert rotated >= 2 and rotated % 2 == 0


def test_the_residual_is_an_axis() -> None:
    ids = torch.arange(20).view(1, 20)
    states = {}
    for residual in ("parallel", "sequential"):
        torch.manual_seed(0)
        config = backbones.configuration(model("nano-16", residual=residual), 100, 32)
        states[residual] = backbones.build(config).base_model(ids).last_hidden_state
    assert not torch.allclose(states["parallel"], states["sequential"], atol=1e-3)


def test_any_causal_model_enters_by_its_configuration(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=24, n_layer=2, n_head=2).save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        fields = model(config=str(name), residual=None)
        shape = backbones.shape(backbones.configuration(fields, 77, 64))
        positions = 1024 * 24
        assert shape == (
            24,
            2,
            2,
            77 * 24,
            2 * (12 * 24 * 24 + 13 * 24) + 2 * 24 + positions,
            77,
            False,
        )
        assert backbones.width(fields) == 24


def test_a_configurations_fingerprint_is_its_content(tmp_path: Path) -> None:
    from transformers import GPT2Config

    for name, width in (("a", 24), ("b", 24), ("c", 48)):
        GPT2Config(n_embd=width, n_head=2).save_pretrained(tmp_path / name)
    a, b, c = (backbones.fingerprint(str(tmp_path / n)) for n in "abc")
    assert a == b != c


def test_a_choice_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=24, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="gpt2 models have no such choice"):
        backbones.configuration(model(config=str(tmp_path)), 77, 64)


def test_what_is_no_causal_model_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="not a causal language model"):
        backbones.build(backbones._load(str(tmp_path)))
