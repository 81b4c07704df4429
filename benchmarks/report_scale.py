"""The report of a sweep of 10,000 trials: how long it takes to make and to open, beside one of 21.

    python benchmarks/report_scale.py [--trials 10000] [--probes 12]

Simulated records, one segment a trial and table, as a sweep of short trials leaves them. Opened in
a headless Chromium from the file, without a network: until the page is laid out, and until its
first figure is drawn. Checked in the same run: every figure has marks, the console is silent, and
what the page says of the smallest rank is what the simulated world holds.
"""

import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import polars as pl
from playwright.sync_api import sync_playwright

from analysis import evidence, records, report

RANKS = (4, 8, 16, 32, None)
GAP = {4: 0.4, 8: 0.2, 16: 0.1, 32: 0.05, None: 0.0}
BLOCKS = 16


def simulate(sweep: Path, trials: int, probes: int) -> None:
    """Sizes x RANKS x ten seeds (or one, of few trials)."""
    seeds = 10 if trials >= 500 else 1
    steps = np.unique(np.geomspace(1, 4000, probes).astype(int))
    rng = np.random.default_rng(0)
    hard = 0.5 * rng.standard_normal(BLOCKS)
    for number in range(trials):
        cell, seed = divmod(number, seeds)
        size, rank = cell // len(RANKS), RANKS[cell % len(RANKS)]
        d, id = 64 + 8 * size, f"{number:012x}"
        params = 24 * d * d + 2000 * d
        curve = 3 + 60 / params**0.3 + GAP[rank] + 3 * np.exp(-steps / 300)
        each = curve[:, None] + hard + 0.02 * rng.standard_normal((len(steps), BLOCKS))
        key = {"trial": id, "step": np.repeat(steps, BLOCKS)}
        blocks = {**key, "split": "held_out", "block": np.tile(np.arange(BLOCKS), len(steps))}
        keep(sweep, "blocks", id, {**blocks, "loss": each.ravel()})
        values = {
            ("held_out", "loss", None): each.mean(1),
            ("held_out", "unigram_loss", None): np.full(len(steps), 6.6),
            ("", "singular_entropy", None): 0.3 + steps / 4000,
            ("held_out", "anisotropy", 0): np.full(len(steps), 0.1),
            ("held_out", "anisotropy", -1): 0.2 + steps / 8000,
        }
        frames = [
            pl.DataFrame({"step": steps, "value": value}).with_columns(
                split=pl.lit(split), metric=pl.lit(metric), layer=pl.lit(layer, pl.Int32)
            )
            for (split, metric, layer), value in values.items()
        ]
        scalars = pl.concat(frames).with_columns(
            trial=pl.lit(id), tokens=pl.col("step") * 2048, time=pl.col("step"), stderr=0.1
        )
        keep(sweep, "scalars", id, scalars)
        index = np.arange(24)
        sigma = np.exp(-index[None] / (4 + steps[:, None] / 400))
        spectra = {"trial": id, "step": np.repeat(steps, 24), "matrix": "head"}
        keep(
            sweep,
            "spectra",
            id,
            {**spectra, "index": np.tile(index, len(steps)), "sigma": sigma.ravel()},
        )
        name = f"size-{d} r={rank or 'full'} s={seed}"
        row = {
            "trial": id, "name": name, "kind": "pretrain", "size": f"size-{d}", "rank": rank,
            "head": "low-rank" if rank else "full", "seed": seed, "d": d, "params": params,
            "params_without_embeddings": 24 * d * d, "status": "done", "step": int(steps[-1]),
        }  # fmt: skip
        keep(sweep, "trials", id, {k: [v] for k, v in row.items()})


def keep(sweep: Path, table: str, id: str, columns: dict | pl.DataFrame) -> None:
    path = sweep / "records" / table / id / f"{0:012d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = records.TABLES[table]
    frame = pl.DataFrame(columns)
    full = frame.select(
        pl.col(c).cast(t) if c in frame.columns else pl.lit(None, t).alias(c)
        for c, t in schema.items()
    )
    full.write_parquet(path)


def opened(page: Path, times: int = 5) -> tuple[float, float]:
    """Seconds until laid out, and until the first figure is drawn; medians."""
    laid, drawn = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox"],
        )
        for _ in range(times):
            said: list[str] = []
            tab = browser.new_context(offline=True).new_page()
            tab.on("console", lambda m, said=said: said.append(m.text))
            tab.on("pageerror", lambda e, said=said: said.append(str(e)))
            began = time.perf_counter()
            tab.goto(page.as_uri(), wait_until="load")
            laid.append(time.perf_counter() - began)
            tab.locator(".plot").first.scroll_into_view_if_needed()
            tab.locator(".plot .main-svg").first.wait_for()
            drawn.append(time.perf_counter() - began)
            for plot in tab.locator(".plot").all():
                plot.scroll_into_view_if_needed()
                marks = plot.locator(".scatterlayer .trace, .heatmaplayer .hm").first
                marks.wait_for(state="attached")
            assert not said, said
            tab.context.close()
        browser.close()
    return statistics.median(laid), statistics.median(drawn)


@click.command(help=__doc__)
@click.option("--trials", default=10_000)
@click.option("--probes", default=12)
def main(trials: int, probes: int) -> None:
    print("| trials | read and decide | figures and page | page | laid out | first figure |")
    print("|---|---|---|---|---|---|")
    for number in (21, trials):
        with tempfile.TemporaryDirectory() as folder:
            sweep = Path(folder) / "many"
            simulate(sweep, number, probes)
            began = time.perf_counter()
            made = report.make(evidence.gather([sweep]))
            read = time.perf_counter() - began
            page, *_ = report.write(made, sweep / "report", ("png", "svg"))
            wrote = time.perf_counter() - began - read
            (first, *_) = made.answers[0].lines
            gap = float(re.search(r"rank 4 costs \+([\d.]+)", first)[1])  # type: ignore[index]
            assert abs(gap - 0.4) < 0.02, first
            laid, drawn = opened(page)
            size = page.stat().st_size / 1e6
        print(
            f"| {number:,} | {read:.1f} s | {wrote:.1f} s | {size:.1f} MB | {laid:.2f} s "
            f"| {drawn:.2f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
