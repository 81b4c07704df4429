"""Atomic, verified save and resume: on a disk that the workers share, or at any fsspec URL.

    checkpoints/step-000000120/{engine/…, generators-<rank>.json, state.json, manifest.json}

Each worker writes its own shards and sends their checksums to the first, whose manifest commits
the whole: by one rename on a disk, by writing it last at a URL. What has no manifest does not
exist; what fails its checksums is passed over, loudly, for the one before.
"""

import base64
import contextlib
import errno
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from analysis import atomic, sealed
from analysis.errors import one_line
from trainables import engine

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
# How far two losses of the same weights and text may lie apart, relatively: other hardware rounds
# otherwise. In bf16 they were 6e-5 from those in fp32 of the same rounded weights.
AGREE = {"fp32": 1e-4, "bf16": 1e-3}


@dataclass(frozen=True)
class Saved:
    """The last whole checkpoint, on this machine for as long as `latest` holds it."""

    folder: Path
    shards: Path
    """What the engine reads: the folder's, or what they were converted to."""
    state: dict[str, Any]
    universal: bool
    """Written by another number of workers: the engine is to be started with universal=True."""


def place(storage: str | None, sweep: Path, trial: str) -> str:
    """The folder or URL of a trial's checkpoints: in the sweep, or under `storage`."""
    if storage:
        return f"{storage.rstrip('/')}/{trial}"
    return str(sweep / "trials" / trial / "checkpoints")


def save(run: Any, folder: str | Path, state: dict[str, Any], keep: int = 2) -> None:
    """Commit the engine, the generators and `state` (which has a step), and keep the last ones.

    Every worker calls it. `folder` is one that all of them share, or a URL that fsspec knows
    (s3://, gs://, …), whose credentials are those of its own configuration. Raises OSError where
    it cannot be written, with what was there before intact.
    """
    rank, name = dist.get_rank(), f"step-{state['step']:09d}"
    where = _open(folder)
    if rank == 0:
        where.clear(name)
    dist.barrier()
    failed = ""
    with where.desk(name) as desk:
        with _said_if_full(desk):
            # DeepSpeed writes what is this worker's to write, and nobody else's.
            run.save_checkpoint(str(desk), tag="engine", save_latest=False)
            (desk / f"generators-{rank}.json").write_text(json.dumps(_generators()))
            if rank == 0:
                facts = {"world": dist.get_world_size(), "stage": run.zero_optimization_stage()}
                (desk / "state.json").write_text(json.dumps({**state, **facts}))
            # Without the scripts that it adds.
            files = sorted(f for f in desk.rglob("*") if f.is_file() and f.suffix != ".py")
            sums = {f.relative_to(desk).as_posix(): sealed.digest(f) for f in files}
        try:
            for file in sums:
                where.put(desk, name, file)
        except Exception as error:  # each store has its own
            failed = one_line(error)
    found = _gather((sums, failed))  # nobody is left waiting for one that failed
    if failures := sorted({said for _, said in found if said}):
        raise OSError(f"{folder}/{name} could not be written: {'; '.join(failures)}")
    if rank == 0:
        where.commit(name, sealed.text({k: v for part, _ in found for k, v in part.items()}))
        # What is later than this one was damaged, or it would have been gone on from.
        known = [n for n in where.names() if n <= name]
        where.drop({*known[:keep]})
    dist.barrier()


@contextlib.contextmanager
def latest(folder: str | Path, stage: int, sweep: Path) -> Iterator[Saved | None]:
    """The last whole checkpoint, for `load`; what was fetched or converted is gone afterwards.

    Whole is one whose own files are, and those in the sweep that its state knows ("files"). Every
    worker calls it, before it starts its engine. Raises RuntimeError where the checkpoint was
    written by another ZeRO stage: DeepSpeed knows no way from one to the other.
    """
    where, world = _open(folder), dist.get_world_size()
    with tempfile.TemporaryDirectory(prefix="lmsat-") as own:
        # Workers of one machine share the folder of the first of them.
        near = next(Path(path) for path in _gather(own) if Path(path).exists())
        first = str(near) == own
        for name in _gather(where.names())[0]:
            path, bad = where.fetch(name, near, first)
            state: dict[str, Any] = {}
            if not (bad := sorted({b for part in _gather(bad) for b in part})):
                state = json.loads((path / "state.json").read_text())
                known = state["files"] if dist.get_rank() == 0 else {}
                bad = _gather(sealed.wrong(sweep, known))[0]
            if not bad:
                break
            if dist.get_rank() == 0:
                what = ", ".join(bad)
                log.warning("%s/%s: damaged (%s); going on from before", folder, name, what)
        else:
            yield None
            return
        if state["stage"] != stage:
            raise RuntimeError(
                f"{folder}/{name}: written with stage {state['stage']}, cannot go on with stage "
                f"{stage}"
            )
        universal = stage > 0 and state["world"] != world  # stage 0 keeps all in one file
        shards = near / "universal" if universal else path
        if universal and first:
            engine.convert(path / "engine", shards / "engine")
        dist.barrier()
        yield Saved(path, shards, state, universal)
        dist.barrier()  # the folder stays until all have read it


def load(run: Any, saved: Saved) -> None:
    """Bring the engine and this worker's generators, where it was there, to the checkpoint; an
    engine that cannot be is stopped."""
    try:
        engine.restore(run, saved.shards, saved.universal)
    except BaseException:
        engine.stop(run)
        raise
    generators = saved.folder / f"generators-{dist.get_rank()}.json"
    if generators.exists():
        _restore(json.loads(generators.read_text()))


def check(saved: Saved, loss: float, precision: str) -> None:
    """Raise RuntimeError unless `loss`, of the text to come, is the one in its state ("ahead")."""
    before = saved.state["ahead"]
    for now in _gather(loss):
        same = math.isclose(now, before, rel_tol=AGREE[precision])
        if not same and not (math.isnan(now) and math.isnan(before)):
            raise RuntimeError(
                f"the checkpoint of step {saved.state['step']} does not go on where it was "
                f"written: the loss ahead was {before:.6f} then and is {now:.6f} now"
            )


def verify(folder: str | Path) -> Iterator[tuple[str, dict[str, Any], list[str]]]:
    """Each checkpoint of a folder or URL, the last one first: its name, its state, and its missing
    and damaged files."""
    where = _open(folder)
    for name in where.names():
        with tempfile.TemporaryDirectory(prefix="lmsat-") as near:
            path, bad = where.bring(name, Path(near))
            yield name, {} if bad else json.loads((path / "state.json").read_text()), bad


def discard(folder: str | Path, name: str) -> None:
    """Remove a checkpoint."""
    where = _open(folder)
    where.drop({*where.names()} - {name})


@contextlib.contextmanager
def _said_if_full(folder: Path) -> Iterator[None]:
    """torch says of a full disk that it could not write, not why."""
    try:
        yield
    except Exception as error:
        if shutil.disk_usage(folder).free < 2**20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise


class _Disk:
    """A folder that all workers share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self, name: str) -> None:
        shutil.rmtree(self._partial(name), ignore_errors=True)

    def _partial(self, name: str) -> Path:
        return self.folder / f".partial-{name}"

    @contextlib.contextmanager
    def desk(self, name: str) -> Iterator[Path]:
        """Where this worker writes, before it puts its files to those of the others."""
        self._partial(name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._partial(name)) as own:
            yield Path(own)

    def put(self, desk: Path, name: str, file: str) -> None:
        target = self._partial(name) / file
        target.parent.mkdir(exist_ok=True)
        atomic.sync(desk / file)
        os.rename(desk / file, target)

    def commit(self, name: str, manifest: str) -> None:
        partial, final = self._partial(name), self.folder / name
        (partial / _MANIFEST).write_text(manifest)
        for path in (partial / _MANIFEST, partial / "engine", partial):
            atomic.sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        atomic.sync(self.folder)

    def names(self) -> list[str]:
        """Of the checkpoints there are, the last one first."""
        return sorted((p.name for p in self.folder.glob("step-*")), reverse=True)

    def drop(self, kept: set[str]) -> None:
        for path in (*self.folder.glob("step-*"), *self.folder.glob(".partial-*")):
            if path.name not in kept:
                shutil.rmtree(path)

    def bring(self, name: str, near: Path, part: slice = slice(None)) -> tuple[Path, list[str]]:
        """A checkpoint's folder, and what is wrong with its files, or with a part of them."""
        path = self.folder / name
        try:
            sums = sealed.read(path / _MANIFEST)
        except (OSError, ValueError):
            return path, [_MANIFEST]
        return path, sealed.wrong(path, {file: sums[file] for file in sorted(sums)[part]})

    def fetch(self, name: str, near: Path, first: bool) -> tuple[Path, list[str]]:
        """The same; each worker looks at some of the files."""
        return self.bring(name, near, slice(dist.get_rank(), None, dist.get_world_size()))


class _Remote:
    """A folder at a URL: its files come and go through this machine's temporary folder."""

    def __init__(self, files: Any, root: str) -> None:
        self.files, self.root = files, root.rstrip("/")

    def clear(self, name: str) -> None:
        if self.files.exists(f"{self.root}/{name}"):
            self.files.rm(f"{self.root}/{name}", recursive=True)

    @contextlib.contextmanager
    def desk(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="lmsat-") as own:
            yield Path(own)

    def put(self, desk: Path, name: str, file: str) -> None:
        target = f"{self.root}/{name}/{file}"
        self.files.makedirs(target.rpartition("/")[0], exist_ok=True)  # where there are folders
        self.files.put_file(str(desk / file), target)

    def commit(self, name: str, manifest: str) -> None:
        self.files.pipe_file(f"{self.root}/{name}/{_MANIFEST}", manifest.encode())

    def names(self) -> list[str]:
        self.files.invalidate_cache()
        found = self.files.glob(f"{self.root}/step-*/{_MANIFEST}")
        return sorted((path.split("/")[-2] for path in found), reverse=True)

    def drop(self, kept: set[str]) -> None:
        for path in self.files.glob(f"{self.root}/step-*"):
            if path.split("/")[-1] not in kept:
                self.files.rm(path, recursive=True)

    def bring(self, name: str, near: Path) -> tuple[Path, list[str]]:
        path, manifest = near / name, f"{self.root}/{name}/{_MANIFEST}"
        try:
            sums = sealed.parse(self.files.cat_file(manifest), manifest)
        except (FileNotFoundError, ValueError):
            return path, [_MANIFEST]
        for file in sums:
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self.files.get_file(f"{self.root}/{name}/{file}", str(path / file))
        if bad := sealed.wrong(path, sums):
            shutil.rmtree(path)
        return path, bad

    def fetch(self, name: str, near: Path, first: bool) -> tuple[Path, list[str]]:
        """The first worker of a machine brings it for all."""
        return self.bring(name, near) if first else (near / name, [])


def _open(folder: str | Path) -> _Disk | _Remote:
    """Raises ValueError or ImportError, of fsspec, for a URL that nothing here can reach."""
    if "://" not in str(folder):
        return _Disk(Path(folder))
    import fsspec  # a third of a second

    return _Remote(*fsspec.url_to_fs(str(folder)))


def _gather(value: Any) -> list[Any]:
    """The value of every worker, on every worker."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _generators() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {k: base64.b64encode(s.numpy().tobytes()).decode() for k, s in states.items()}


def _restore(generators: dict[str, str]) -> None:
    def state(name: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(generators[name])), dtype=torch.uint8)

    torch.set_rng_state(state("cpu"))
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(state("cuda"))
