"""Many heads on one frozen backbone, in one pass: Godey et al. 2024, section 5.1 and Figure 6.

Each batch goes through the backbone once; then every head of the pack takes its own step on the
same hidden states, with its own engine, learning rate, clipping, checkpoints and records, so that
what it learns does not depend on who else is in the pack.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from analysis import atomic
from trainables import (
    checkpoint,
    corpus,
    engine,
    features,
    frozen,
    heads,
    memory,
    pretrained,
    probes,
    schedule,
    zoo,
)
from trainables.evaluation import Evaluation, parts
from trainables.features import Features
from trainables.heads import LinearHead
from trainables.recorder import SECONDS, Recorder

# Hidden states alike for all heads are measured with the model's own.
ALONG = (probes.Loss, probes.HeadSpectrum)
LAST = (*ALONG, probes.AchievedRank)


@dataclass
class _Head:
    """One trial of the pack."""

    trial: dict[str, Any]
    run: Any
    recorder: Recorder
    row: dict[str, Any]
    first: int
    """The step it starts from: 0, or where its checkpoint left it."""
    step: int
    status: str = "running"

    @property
    def head(self) -> LinearHead:
        return self.run.module


def fit(
    trials: list[dict[str, Any]],
    sweep: Path,
    cache: Path,
    report: Callable[[list[dict[str, Any]]], None] = lambda news: None,
    should_stop: Callable[[], bool] = lambda: False,
    storage: str | None = None,
    leaving: Callable[[], bool] = lambda: False,
) -> dict[str, engine.Outcome]:
    """Train the heads of a pack to their end, each from its last checkpoint where there is one.

    The trials differ in head, seed and learning rate alone. Records go to the sweep's tables, a
    head's checkpoints and, at the end, its weights to trials/<id>/. Checkpoints alone may go to
    another folder or URL, `storage`. Outcomes by trial id.
    Raises RuntimeError where a checkpoint does not go on where it was written.
    """
    shared = trials[0]
    gpu = shared["resources"]["gpus"] > 0
    engine.join(shared["resources"]["cpus"], gpu)
    text = corpus.prepare(shared["corpus"], shared["tokenizer"], shared["text"], cache)
    precision = shared["train"]["precision"]
    backbone = frozen.load(shared["model"], precision, torch.device("cuda" if gpu else "cpu"))
    kept = features.directory(shared, cache) if shared["features"] == "cache" else None
    states = Features(backbone, text, shared["train"]["sequence"], kept)
    pack = _Pack(shared, states, sweep, storage, report)
    try:
        return pack.go(trials, should_stop, leaving)
    finally:
        engine.stop(*(head.run for head in pack.heads))


class _Pack:
    """What the heads share."""

    def __init__(
        self,
        shared: dict[str, Any],
        states: Features,
        sweep: Path,
        storage: str | None,
        report: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self.settings, self.probes = shared["train"], shared["probes"]
        self.saves = shared["checkpoints"]
        self.states, self.report = states, report
        self.sweep, self.storage = sweep, storage
        self.backbone, self.text = states.backbone, states.text
        self.shape = pretrained.shape(shared["model"], self.settings["sequence"])
        self.device = self.backbone.device
        t = self.settings
        self.steps = schedule.steps(t["tokens"], t["batch"], t["sequence"])
        share = t["batch"] // dist.get_world_size()
        self.micro = min(shared["deepspeed"]["micro_batch"] or share, share)
        self.evaluation = Evaluation(states, shared["probes"], self.micro)
        self.heads: list[_Head] = []
        self.first: dict[int, tuple[Tensor, Tensor]] = {}  # sequence of the batch of that step
        self.news: list[dict[str, Any]] = []
        self.told = time.monotonic()
        self.seconds, self.tokens = 0.0, 0  # of training proper, since the last probe

    def go(
        self,
        trials: list[dict[str, Any]],
        should_stop: Callable[[], bool],
        leaving: Callable[[], bool],
    ) -> dict[str, engine.Outcome]:
        outcomes = {}
        for trial in trials:
            if trial["head"]["kind"] in zoo.BASELINES:
                outcomes[trial["id"]] = self._baseline(trial)
            else:
                self.heads.append(self._open(trial))
        self._train(should_stop, leaving)
        self._tell()
        return outcomes | {
            h.trial["id"]: engine.Outcome(h.status, h.step, h.recorder.files) for h in self.heads
        }

    def _train(self, should_stop: Callable[[], bool], leaving: Callable[[], bool]) -> None:
        probed = set(schedule.probe_steps(self.steps, self.probes))
        logged = schedule.every(self.steps, 50)
        saved = schedule.every(self.steps, self.saves)
        step = min((h.step for h in self.heads), default=0)
        kept = -self.steps  # the step of the last checkpoints of this process
        while going := [h for h in self.heads if h.status == "running"]:
            here = [h for h in going if h.step == step]
            if step in probed:
                self._probe([h for h in here if step > h.first or step == 0], step)
            asked, hurried = engine.any_worker(self.device, should_stop(), leaving())
            stopping = asked and step < self.steps
            soon = hurried and step - kept >= schedule.hurried(saved)
            saving = step % saved == 0 or stopping or soon
            kept = step if saving else kept
            for h in here:
                if h.status == "running" and h.step > h.first and saving:
                    self._save(h)
                if h.status == "running" and step == self.steps:
                    self._export(h)
                    self._conclude(h, "done")
            if stopping:
                for h in going:
                    h.status = "stopped" if h.status == "running" else h.status
            elif step < self.steps:
                here = [h for h in here if h.status == "running"]
                self._step(here, step, log=(step + 1) % logged == 0)
                step += 1
            if time.monotonic() - self.told > SECONDS:
                self._tell()

    def _save(self, h: _Head) -> None:
        h.recorder.flush(h.step)  # records first: what came before a checkpoint is on disk
        state = {
            "step": h.step,
            "threads": torch.get_num_threads(),
            "ahead": self._ahead(h.run, h.step),
            "files": h.recorder.files,
        }
        checkpoint.save(h.run, checkpoint.place(self.storage, self.sweep, h.trial["id"]), state)

    def _ahead(self, run: Any, step: int) -> float:
        """Loss of the next batch's first sequence: on every worker, however many there are."""
        if step not in self.first:
            blocks = self._blocks(step)[:: dist.get_world_size()]
            # The whole micro-batch, as training will ask for it: one alone has other bits.
            hidden, labels = self.states.both("train", next(iter(parts(blocks, self.micro))))
            self.first = {step: (hidden[:1].clone(), labels[:1])}
        run.eval()
        with torch.no_grad():
            loss = run.module(*self.first[step]).item()
        run.train()
        return loss

    def _blocks(self, step: int) -> list[int]:
        """Those of a batch."""
        t = self.settings
        return corpus.batch_blocks(self.text.shard("train"), t["sequence"], t["batch"], 0, step)

    def _folder(self, trial: dict[str, Any]) -> Path:
        return self.sweep / "trials" / trial["id"]

    def _conclude(self, h: _Head, status: str) -> None:
        h.status = status
        h.recorder.flush(h.step)
        h.recorder.row(h.row, h.status, h.step)

    def _open(self, trial: dict[str, Any]) -> _Head:
        """A head, drawn from its trial's seed as it would be alone, or from its checkpoint."""
        t = trial["train"]
        torch.manual_seed(trial["seed"])
        head = heads.make(trial["head"], *self.backbone.weight.shape)
        svd = self.evaluation.weighted if trial["head"]["init"] == "svd" else None
        heads.start(head, trial["head"]["init"], self.backbone.weight, svd)
        place = checkpoint.place(self.storage, self.sweep, trial["id"])
        with checkpoint.latest(place, trial["deepspeed"]["stage"], self.sweep) as saved:
            run = engine.start(
                head.to(self.device),
                batch=t["batch"],
                micro_batch=self.micro,
                lr=t["lr"],
                weight_decay=t["weight_decay"],
                clip=t["clip"],
                precision="fp32",  # of heads always; the backbone's own is the grid's
                stage=trial["deepspeed"]["stage"],
                offload=trial["deepspeed"]["offload"],
                universal=saved is not None and saved.universal,
            )
            if saved:
                checkpoint.load(run, saved)
        first = 0
        if saved:
            first = saved.state["step"]
            torch.set_num_threads(saved.state["threads"])  # another number gives other bits
            checkpoint.check(saved, self._ahead(run, first), t["precision"])
        recorder = self._recorder(trial, self.steps, saved.state["files"] if saved else {})
        row = self._describe(trial, sum(p.numel() for p in head.parameters()))
        recorder.row(row, "running", first)
        return _Head(trial, run, recorder, row, first, step=first)

    def _recorder(self, trial: dict[str, Any], steps: int, files: dict[str, str]) -> Recorder:
        tokens = self.settings["batch"] * self.settings["sequence"]
        writes = dist.get_rank() == 0
        return Recorder(self.sweep, trial["id"], steps, tokens, self.news.append, writes, files)

    def _describe(self, trial: dict[str, Any], params: int) -> dict[str, Any]:
        """The trial's row in the table `trials`, but for how it ended."""
        whole = self.shape.body + self.shape.embedding + params
        trained = trial["head"]["kind"] not in zoo.BASELINES
        tokens = self.settings["tokens"] if trained else 0
        return {
            "name": trial["name"],
            "kind": trial["kind"],
            "size": pretrained.name(trial["model"]),
            "head": zoo.label(trial["head"]),
            "init": trial["head"]["init"] if trained else None,
            "rank": trial["head"]["rank"],
            "seed": trial["seed"],
            "search": trial["search"],
            "d": self.shape.d,
            "vocabulary": self.shape.vocabulary,
            "params": whole,
            "params_without_embeddings": self.shape.body,
            "lr": trial["train"]["lr"] if trained else None,
            "tokens": tokens,
            "tokens_per_param": tokens / whole,
            "epochs": tokens / self.text.tokens["train"],
        }

    def _step(self, here: list[_Head], step: int, log: bool) -> None:
        """One optimiser step of these heads. One whose loss is not finite, or whose step DeepSpeed
        skips because its gradient is not, is out: diverged."""
        if not here:
            return
        started, t = time.perf_counter(), self.settings
        rank, world = dist.get_rank(), dist.get_world_size()
        blocks = self._blocks(step)[rank::world]
        skipped = [h.run.skipped_steps for h in here]
        losses, norms = torch.zeros(len(here), device=self.device), [0.0] * len(here)
        rates = [schedule.rate(h.trial["train"], step, self.steps) for h in here]
        for h, lr in zip(here, rates, strict=True):
            for group in h.run.optimizer.param_groups:
                group["lr"] = lr
        for part in parts(blocks, self.micro):
            hidden, labels = self.states.both("train", part)
            for i, h in enumerate(here):
                loss = h.run(hidden, labels)
                losses[i] += loss.detach() * len(part) / len(blocks)
                h.run.backward(loss)
                if log and h.run.is_gradient_accumulation_boundary():
                    norms[i] = engine.gradient_norm(h.run) or math.nan
                h.run.step()
        dist.all_reduce(losses)
        self.seconds += time.perf_counter() - started
        self.tokens += t["batch"] * t["sequence"]
        for i, h in enumerate(here):
            value = losses[i].item() / world
            if not math.isfinite(value) or h.run.skipped_steps > skipped[i]:
                self._conclude(h, "diverged")
                continue
            h.step = step + 1
            if log:
                h.recorder.scalar(step + 1, "loss", value, "train")
                norm = float(h.run.get_global_grad_norm()) if math.isnan(norms[i]) else norms[i]
                h.recorder.scalar(step + 1, "gradient_norm", norm, "train")
                h.recorder.scalar(step + 1, "learning_rate", rates[i], "train")
                h.recorder.report(step + 1, always=False)

    def _probe(self, here: list[_Head], step: int) -> None:
        """Measure the heads; one whose held-out loss is not finite has diverged."""
        peak, last = memory.peak(self.device), step == self.steps
        speed = self.tokens / self.seconds if self.tokens else None
        self.seconds, self.tokens = 0.0, 0
        for h in here:
            kinds = LAST if last else ALONG
            finite = self.evaluation.measure(h.head, h.recorder, step, kinds, last)
            h.recorder.scalar(step, "peak_memory", peak)
            if speed:
                h.recorder.scalar(step, "tokens_per_second", speed)
            h.recorder.report(step)
            if not finite:
                self._conclude(h, "diverged")
            self._tell()

    def _baseline(self, trial: dict[str, Any]) -> engine.Outcome:
        """A head that nobody trains: measured as the others are at their end."""
        kind, recorder = trial["head"]["kind"], self._recorder(trial, 0, {})
        head = self.evaluation.baseline(kind, trial["head"]["rank"])
        params = sum(f.numel() for f in head.factors() if f is not None)
        kinds = (*LAST, probes.Layers) if kind == "own" else (probes.Loss,)
        self.evaluation.measure(head, recorder, 0, kinds, last=True)
        recorder.flush(0)
        recorder.row(self._describe(trial, params), "done", 0)
        self._tell()
        return engine.Outcome("done", 0, recorder.files)

    def _export(self, h: _Head) -> None:
        """The trained head, as safetensors."""
        from safetensors.torch import save_file

        with engine.gathered(h.head):
            if dist.get_rank() == 0:
                weights = {n: p.detach().cpu() for n, p in h.head.named_parameters()}
                folder = self._folder(h.trial)
                file = folder / "head.safetensors"
                atomic.write(file, lambda partial: save_file(weights, partial))
                h.recorder.keep(file)
        dist.barrier()

    def _tell(self) -> None:
        """Hand on what the recorders have said."""
        self.told = time.monotonic()
        if self.news:
            self.report(list(self.news))
            self.news.clear()
