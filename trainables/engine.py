"""A DeepSpeed engine around a model. DeepSpeed is imported in here only, inside the worker."""

import argparse
import contextlib
import ctypes
import gc
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore


class Outcome(NamedTuple):
    """How a trial left its loop."""

    status: str
    """done, diverged (its loss became NaN or infinite), or stopped (asked to; resumes later)."""
    step: int
    files: dict[str, str]
    """What there is of it, by path in the sweep, with checksums (sha256)."""


def join(threads: int, gpu: bool) -> None:
    """Make this process a DeepSpeed worker: of the world it was started in, else of its own."""
    torch.set_num_threads(threads)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if gpu else "cpu")
    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        # No port and no rendezvous: a world of one needs neither.
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    if gpu:  # of several on a machine each has its own, as DeepSpeed will choose it
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its autotuner, unused here, would load MLflow: more than all the rest of it.
    hidden = sys.modules.setdefault("mlflow", None) is None  # type: ignore[arg-type]
    import deepspeed

    if hidden:
        del sys.modules["mlflow"]
    # It would ask which of its extensions can be compiled here, by compiling, and then compile its
    # shared-memory collectives. A machine may have no compiler: it is told that none can.
    deepspeed.ops.__compatible_ops__ = {}


def start(
    model: nn.Module,
    batch: int,
    micro_batch: int | None,
    lr: float,
    weight_decay: float,
    clip: float,
    precision: str,
    stage: int,
    offload: bool = False,
    universal: bool = False,
) -> Any:
    """The engine: AdamW with Pythia's betas (0.9, 0.95) and eps 1e-8, decay on matrices only.

    batch is global, in sequences; micro_batch what one worker holds at once (None: its share).
    offload: the optimizer and its step are the host's (stage 2 or 3; Ren et al. 2021).
    universal: it will be restored from what another number of workers wrote.
    """
    import deepspeed

    share = batch // dist.get_world_size()
    micro = min(micro_batch or share, share)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # Torch's fused AdamW: DeepSpeed's own would be compiled at run time.
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": share // micro,
            "gradient_clipping": clip,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "checkpoint": {"load_universal": universal},
            "steps_per_print": 2**62,
        },
    )
    if precision == "bf16" and stage == 0:
        # DeepSpeed 0.19.8 has made one step without a gradient by now: AdamW would count it, and
        # has decayed the fp32 weights.
        engine.optimizer.optimizer.state.clear()
        engine.optimizer.refresh_fp32_params()
    return engine


def convert(source: Path, target: Path) -> None:
    """Shards of stage 1 to 3, written by any number of workers -> DeepSpeed's universal checkpoint,
    which any number can read."""
    from deepspeed.checkpoint import ds_to_universal

    wanted = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # more would each load DeepSpeed first
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        ds_to_universal.main(wanted)


def restore(run: Any, folder: Path, universal: bool) -> None:
    """Bring the engine to what it, or another, saved under the tag `engine`.

    Raises RuntimeError where universal shards cannot be shared out among so many workers."""
    zero = run.optimizer
    if universal and not run.zero_optimization_partition_weights():
        # DeepSpeed 0.19.8 then fails with an IndexError.
        none = any(all(p._hp_mapping is None for p in group) for group in zero.bit16_groups)
        if any_worker(run.device, none)[0]:
            raise RuntimeError(
                f"a group of parameters is too small for {dist.get_world_size()} workers to share "
                "from a checkpoint of another number: go on with fewer, or with as many as wrote it"
            )
    decays = [group["weight_decay"] for group in zero.param_groups]
    run.load_checkpoint(str(folder), tag="engine")
    if universal and run.zero_optimization_partition_weights():
        # DeepSpeed 0.19.8 gives every group what the first one has, and lets all of them count
        # their steps in one tensor, so that each counts those of the others too.
        for group, decay in zip(zero.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for moments in zero.optimizer.state.values():
            moments["step"] = moments["step"].clone()


def stop(*engines: Any) -> None:
    """Free the engines, so that the process can serve the next trial."""
    for engine in engines:
        engine.destroy()
    gc.collect()  # through all that is loaded: a quarter of a second
    # Each trial runs in a thread of its own, whose freed memory glibc would keep: 60 MB a trial.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within, the module's parameters are whole on every worker (ZeRO-3 keeps only shards)."""
    parameters = list(module.parameters())
    if not any(hasattr(p, "ds_id") for p in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def gradient_norm(engine: Any) -> float | None:
    """Norm of the whole gradient before clipping; None where only the step itself computes it."""
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def any_worker(device: torch.device, *asked: bool) -> list[bool]:
    """Of each question, whether any worker says yes: all of them do the same at the same step."""
    if dist.get_world_size() == 1:
        return list(asked)
    votes = torch.tensor(asked, dtype=torch.float32, device=device)
    dist.all_reduce(votes)
    return [vote > 0 for vote in votes.tolist()]
