"""A trial from scratch: backbone and head, on a DeepSpeed engine.

`train` is the one loop for a laptop's core and a cluster's GPUs. It knows no Ray: it is handed
`report` and `should_stop`, and writes its records and checkpoints itself.
"""

import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from analysis import atomic
from trainables import (
    backbones,
    checkpoint,
    corpus,
    engine,
    findings,
    heads,
    machine,
    memory,
    probes,
    schedule,
    zoo,
)
from trainables.heads import LinearHead
from trainables.recorder import Recorder, Report


class LanguageModel(nn.Module):
    """Token ids in, mean loss out: the shape DeepSpeed trains."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def head(self) -> LinearHead:
        head: LinearHead = self.model.get_output_embeddings()
        return head

    def hidden(self, ids: Tensor) -> Tensor:
        """ids (blocks x sequence) -> what the head sees (blocks x sequence x d)."""
        states: Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def layers(self, ids: Tensor, wanted: str) -> tuple[Tensor, dict[int, Tensor]]:
        """The same, and of layers before the last where all are `wanted`: 0 is the embedding."""
        found = self.model.base_model(
            input_ids=ids, use_cache=False, output_hidden_states=wanted == "all"
        )
        return found.last_hidden_state, findings.inner(found.hidden_states, wanted)

    def whole(self) -> Any:
        """The transformers model, its head in its place."""
        return self.model

    def forward(self, ids: Tensor) -> Tensor:
        """ids: blocks x (sequence + 1); the last is a label only."""
        loss: Tensor = self.head(self.hidden(ids[:, :-1]), ids[:, 1:])
        return loss


def build(trial: dict[str, Any], vocabulary: int) -> LanguageModel:
    """The trial's model, initialised from its seed: the same backbone under every head."""
    torch.manual_seed(trial["seed"])
    config = backbones.configuration(trial["model"], vocabulary, trial["train"]["sequence"])
    model = backbones.build(config)
    d = model.get_output_embeddings().weight.shape[1]
    head = heads.make(trial["head"], vocabulary, d)
    heads.start(head, trial["head"]["init"])
    if trial["model"]["tied"]:
        head.weight = model.get_input_embeddings().weight
    # Assigning to the attribute (model.embed_out = ...) would leave the old head in use.
    model.set_output_embeddings(head)
    return LanguageModel(model)


def describe(trial: dict[str, Any], model: LanguageModel, text: corpus.Corpus) -> dict[str, Any]:
    """The trial's row in the table `trials`, but for how it ended."""
    embedding, head = model.model.get_input_embeddings().weight, model.head
    params = sum(p.numel() for p in model.parameters())
    apart = {id(p): p.numel() for p in (embedding, *head.parameters())}
    tokens, rank = trial["train"]["tokens"], trial["head"]["rank"]
    return {
        "name": trial["name"],
        "kind": trial["kind"],
        "size": trial["model"]["size"] or trial["model"]["config"],
        "head": zoo.label(trial["head"]),
        "init": trial["head"]["init"],
        "rank": rank,
        "seed": trial["seed"],
        "search": trial["search"],
        "d": embedding.shape[1],
        "vocabulary": text.vocabulary,
        "params": params,
        "params_without_embeddings": params - sum(apart.values()),
        "lr": trial["train"]["lr"],
        "tokens": tokens,
        "tokens_per_param": tokens / params,
        "epochs": tokens / text.tokens["train"],
    }


def train(
    trial: dict[str, Any],
    sweep: Path,
    cache: Path,
    report: Report = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    storage: str | None = None,
    leaving: Callable[[], bool] = lambda: False,
) -> engine.Outcome:
    """Train the trial to its end, from its last checkpoint where there is one.

    Asked to stop it saves and stops. While its machine is `leaving` it saves five times as often.

    Records go to the sweep's tables; checkpoints and, at the end, the weights (safetensors, with
    configuration and tokenizer) to trials/<id>/. Checkpoints alone may go to another folder or
    URL, `storage`. Raises RuntimeError where the last one does not go on where it was written.
    """
    t, resources = trial["train"], trial["resources"]
    engine.join(resources["cpus"], gpu=resources["gpus"] > 0)
    text = corpus.prepare(trial["corpus"], trial["tokenizer"], trial["text"], cache)
    model = build(trial, text.vocabulary)
    row = describe(trial, model, text)
    place = checkpoint.place(storage, sweep, trial["id"])
    with checkpoint.latest(place, trial["deepspeed"]["stage"], sweep) as saved:
        run = engine.start(
            model,
            batch=t["batch"],
            micro_batch=trial["deepspeed"]["micro_batch"],
            lr=t["lr"],
            weight_decay=t["weight_decay"],
            clip=t["clip"],
            precision=t["precision"],
            stage=trial["deepspeed"]["stage"],
            offload=trial["deepspeed"]["offload"],
            universal=saved is not None and saved.universal,
        )
        torch.manual_seed(trial["seed"] + dist.get_rank())  # dropout, where a model has it
        if saved:
            checkpoint.load(run, saved)
    try:
        steps = schedule.steps(t["tokens"], t["batch"], t["sequence"])
        step_tokens, writes = t["batch"] * t["sequence"], dist.get_rank() == 0
        files = saved.state["files"] if saved else {}
        busy = functools.partial(machine.usage, run.device) if trial["system_metrics"] else None
        recorder = Recorder(sweep, trial["id"], steps, step_tokens, report, writes, files, busy)
        training = _Training(trial, text, model, run, recorder)
        folder = sweep / "trials" / trial["id"]
        return training.go(folder, place, saved, row, should_stop, leaving)
    finally:
        engine.stop(run)


class _Training:
    """What the parts of the loop share."""

    def __init__(
        self,
        trial: dict[str, Any],
        text: corpus.Corpus,
        model: LanguageModel,
        run: Any,
        recorder: Recorder,
    ) -> None:
        self.trial, self.text, self.model = trial, text, model
        self.run, self.recorder = run, recorder
        self.settings = trial["train"]
        self.steps = recorder.steps
        self.known = findings.text(text, run.device)
        self.seconds, self.tokens = 0.0, 0  # of training proper, since the last probe

    def go(
        self,
        folder: Path,
        place: str,
        saved: checkpoint.Saved | None,
        row: dict[str, Any],
        should_stop: Callable[[], bool],
        leaving: Callable[[], bool],
    ) -> engine.Outcome:
        trial, steps, recorder = self.trial, self.steps, self.recorder
        probed = set(schedule.probe_steps(steps, trial["probes"]))
        logged = schedule.every(steps, 200)
        saves = schedule.every(steps, trial["checkpoints"])
        kept = -steps  # the step of the last checkpoint of this process
        state: dict[str, Any] = saved.state if saved else {"step": 0, "falling": None}
        step = first = state["step"]
        self.falling = schedule.Falling(trial["probes"]["loss"], state["falling"])
        due = False
        if saved:
            torch.set_num_threads(state["threads"])  # another number gives other bits
            checkpoint.check(saved, self._ahead(step), self.settings["precision"])
        recorder.row(row, "running", step)

        while True:
            now = due or (step in probed and (step > first or not saved))
            if now and not self._probe(step):
                status = "diverged"
                break
            if step == steps:
                status = "done"
                break
            device = self.run.device
            stopping, hurried = engine.any_worker(device, should_stop(), leaving())
            soon = hurried and step - kept >= schedule.hurried(saves)
            if step > first and (step % saves == 0 or stopping or soon):
                kept = step
                # First what came before it: whatever a checkpoint knows of is on disk.
                recorder.flush(step)
                if trial["keep_weights"] and step % saves == 0:
                    self._export(folder / "weights" / f"step-{step:09d}")
                checkpoint.save(
                    self.run,
                    place,
                    {
                        "step": step,
                        "threads": torch.get_num_threads(),
                        "falling": self.falling.state,
                        "ahead": self._ahead(step),
                        "files": recorder.files,
                    },
                )
            if stopping:
                return engine.Outcome("stopped", step, recorder.files)
            head = self.model.head
            if head.refresh and step % head.refresh == 0:
                with engine.gathered(head):
                    head.renew()
            loss = self._train_step(step, log=(step + 1) % logged == 0)
            if loss is None:
                status = "diverged"
                break
            due = self.falling(loss)
            step += 1

        if status == "done":
            self._export(folder / "model")
        recorder.flush(step)
        recorder.row(row, status, step)
        return engine.Outcome(status, step, recorder.files)

    def _train_step(self, step: int, log: bool) -> float | None:
        """Loss of one optimiser step; None where it is not finite or DeepSpeed skipped the step."""
        run, settings, started = self.run, self.settings, time.perf_counter()
        lr = schedule.rate(settings, step, self.steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        rank, world, skipped = dist.get_rank(), dist.get_world_size(), run.skipped_steps
        ids = torch.from_numpy(self._batch(step)[rank::world]).to(run.device)
        loss, norm = torch.zeros((), device=run.device), None
        for micro in ids.split(run.train_micro_batch_size_per_gpu()):
            part = run(micro)
            loss += part.detach() * len(micro) / len(ids)
            run.backward(part)
            if log and run.is_gradient_accumulation_boundary():
                norm = engine.gradient_norm(run)
            run.step()
        dist.all_reduce(loss)
        value = loss.item() / world
        # DeepSpeed skips a step whose gradients are not finite, and says nothing.
        if not math.isfinite(value) or run.skipped_steps > skipped:
            return None
        self.seconds += time.perf_counter() - started
        self.tokens += settings["batch"] * settings["sequence"]
        if log:
            norm = float(run.get_global_grad_norm()) if norm is None else norm
            self.recorder.scalar(step + 1, "loss", value, "train")
            self.recorder.scalar(step + 1, "gradient_norm", norm, "train")
            self.recorder.scalar(step + 1, "learning_rate", lr, "train")
            self.recorder.report(step + 1, always=False)
        return value

    def _batch(self, step: int, size: int | None = None) -> npt.NDArray[Any]:
        t = self.settings
        shard = self.text.shard("train")
        return corpus.batch(shard, t["sequence"], size or t["batch"], self.trial["seed"], step)

    def _ahead(self, step: int) -> float:
        """Loss of the next batch's first sequence: on every worker, however many there are."""
        ids = torch.from_numpy(self._batch(step)[:1]).to(self.run.device)
        self.run.eval()
        with torch.no_grad():
            loss = self.model(ids).item()
        self.run.train()
        return loss

    def _probe(self, step: int) -> bool:
        """Measure; False where the held-out loss is not finite."""
        peak, started = memory.peak(self.run.device), time.perf_counter()
        self.run.eval()
        with torch.no_grad():
            found = probes.measure(self.model.head, self._evaluation(step), self.known)
        self.run.train()
        found.record(self.recorder, step)
        self.recorder.scalar(step, "peak_memory", peak)
        self.recorder.scalar(step, "probe_seconds", time.perf_counter() - started)
        if self.tokens:
            self.recorder.scalar(step, "tokens_per_second", self.tokens / self.seconds)
            self.recorder.scalar(step, "training_seconds", self.seconds)
            self.seconds, self.tokens = 0.0, 0
        self.recorder.report(step)
        return found.finite

    def _evaluation(self, step: int) -> Iterator[findings.Batch]:
        """Held-out blocks, the same for all trials (more of them at the end), and the blocks that
        training sees first."""
        sequence, p = self.settings["sequence"], self.trial["probes"]
        held_out = self.text.shard("held_out")
        tokens = p["final_tokens"] if step == self.steps else p["tokens"]
        sample = corpus.sample(held_out, sequence, tokens)
        yield from self._forward("held_out", sample, corpus.rows(held_out, sequence, sample))
        seen = max(1, min(p["tokens"], self.settings["tokens"]) // sequence)
        yield from self._forward("seen", list(range(seen)), self._batch(0, seen))

    def _forward(
        self, split: str, blocks: list[int], ids: npt.NDArray[Any]
    ) -> Iterator[findings.Batch]:
        size = self.run.train_micro_batch_size_per_gpu()
        for start in range(0, len(ids), size):
            part = torch.from_numpy(ids[start : start + size]).to(self.run.device)
            wanted = self.trial["probes"]["layers"] if split == "held_out" else "last"
            hidden, inner = self.model.layers(part[:, :-1], wanted)
            now = blocks[start : start + size]
            yield findings.see(self.model.head, split, now, hidden, part[:, 1:], inner)

    def _export(self, folder: Path) -> None:
        """The trained weights, as safetensors beside their configuration and tokenizer."""
        from safetensors.torch import save_file

        model = self.model.model
        with engine.gathered(model):
            if dist.get_rank() == 0:
                partial = folder.with_name(f".{folder.name}")
                partial.mkdir(parents=True, exist_ok=True)
                weights = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
                save_file(weights, partial / "model.safetensors")
                model.config.lmsat_head = self.trial["head"]["kind"]  # weights alone do not tell
                model.config.save_pretrained(partial)
                (partial / "tokenizer.json").write_bytes(self.text.tokenizer.read_bytes())
                for file in partial.iterdir():
                    atomic.sync(file)
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
                for file in folder.iterdir():
                    self.recorder.keep(file)
        dist.barrier()
