"""How far a sweep is, on stderr: one live line, or plain lines where there is no terminal."""

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, TypeVar

import rich.progress
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from orchestrator.terminal import duration, short

if TYPE_CHECKING:
    from orchestrator.plan import Cost

EVERY = 10.0  # seconds between lines where there is no terminal
REFRESH = 0.25  # and where there is one
CATCHING_UP = "bringing MLflow up to date"
T = TypeVar("T")


class Bar:
    """How many of some pieces of work are done: a bar, or plain lines where there is no
    terminal."""

    def __init__(self, quiet: bool = False) -> None:
        console = Console(stderr=True, quiet=quiet, markup=False, highlight=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.console, self.said = console, time.monotonic()
        self.bar = rich.progress.Progress(*columns, console=console, transient=True)
        self.task = self.bar.add_task("", total=None)
        self.count, self.total = 0, 0
        self.left = 0  # of MLflow's runs, at first

    def __enter__(self) -> "Bar":
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def preparing(self, what: str, count: int = 0) -> None:
        line = f"{what}: {count} documents" if count else what
        self.bar.update(self.task, description=line)
        if not self.console.is_terminal and not count:
            self.console.print(f"{line} ...", soft_wrap=True)

    def started(self, total: int, done: int, what: str = "checkpoints") -> None:
        self.count, self.total = done, total
        self.bar.update(self.task, total=total, completed=done, description="measuring")
        if done:
            self.console.print(f"{done} of {total} {what} are measured already")

    def ended(self, what: str, error: str | None) -> None:
        self.count += 1
        self.bar.update(self.task, completed=self.count, description=what)
        if error:
            self.console.print(f"{what} failed: {error}", soft_wrap=True)
        elif not self.console.is_terminal and time.monotonic() - self.said > EVERY:
            self.console.print(f"{self.count} of {self.total} done", soft_wrap=True)
            self.said = time.monotonic()

    def each(
        self, items: Iterable[T], what: str = "series", total: int | None = None
    ) -> Iterator[T]:
        """The items, counted as they are done; `total`: of those that have no length."""
        self.started(len(items) if isinstance(items, Sized) else total or 0, 0)
        for item in items:
            yield item
            self.ended(what, None)

    def warned(self, what: str) -> None:
        self.console.print(what, soft_wrap=True)

    def catching_up(self, left: int) -> None:
        """Of MLflow's runs, so many are not up to date."""
        self.left = max(left, self.left)
        done = self.left - left
        self.bar.update(self.task, total=self.left, completed=done, description=CATCHING_UP)
        if not self.console.is_terminal and time.monotonic() - self.said > EVERY:
            self.warned(f"{CATCHING_UP}: {left} runs left")
            self.said = time.monotonic()


class Progress:
    """One live line while a sweep runs; a plain line now and then where there is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, markup=False, highlight=False)
        self.live = Live("", console=self.console, transient=True, refresh_per_second=4)
        self.costs: dict[str, Cost] = {}
        self.status: dict[str, str] = {}
        self.left: set[str] = set()  # to end; looked at with each end, when `status` is long
        self.done: dict[str, float] = {}  # share of each trial
        self.began = self.said = time.monotonic()
        self.share_at_start = 0.0
        self.first: dict[str, tuple[float, float]] = {}  # when each running trial was first heard

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def _say(self, line: str) -> None:
        self.console.print(line, soft_wrap=True)

    def preparing(self, what: str, count: int = 0) -> None:
        line = f"{what}: {count} documents" if count else f"{what} ..."
        if self.console.is_terminal:
            self.live.update(Text(line), refresh=True)
        elif not count or time.monotonic() - self.said > EVERY:
            self._say(line)
            self.said = time.monotonic()

    def started(self, costs: "list[Cost]", statuses: dict[str, str]) -> None:
        self.costs, self.status = {c.id: c for c in costs}, statuses
        self.left = {i for i, s in statuses.items() if s in ("waiting", "running")}
        self.done = {i: float(s in ("done", "diverged")) for i, s in statuses.items()}
        self.began, self.share_at_start = time.monotonic(), self._share()
        if finished := sum(d == 1 for d in self.done.values()):
            self._say(f"{finished} of {len(costs)} trials are finished already")

    def running(self, trial: str) -> None:
        self.status[trial] = "running"
        self.left.add(trial)
        self._show()

    def progress(self, trial: str, step: int, steps: int) -> None:
        self.done[trial] = step / max(1, steps)
        self.first.setdefault(trial, (time.monotonic(), self.done[trial]))
        self._show()

    def ended(self, trial: str, status: str, error: str | None) -> None:
        self.status[trial] = status
        self.left.discard(trial)
        self.first.pop(trial, None)
        if status in ("done", "diverged"):
            self.done[trial] = 1.0
        if status in ("diverged", "failed"):
            reason = f": {error}" if error else ""
            self._say(f"{self.costs[trial].name} {status}{reason}")
        self._show(always=not self.left)

    def warned(self, what: str) -> None:
        self._say(what)

    def catching_up(self, left: int) -> None:
        line = f"{CATCHING_UP}: {left} runs left"
        if self.console.is_terminal:
            self.live.update(Text(line))
        elif time.monotonic() - self.said > EVERY:
            self._say(line)
            self.said = time.monotonic()

    def stopping(self) -> None:
        self._say("stopping: running trials are being saved; again to stop at once")

    def _share(self) -> float:
        """Of all the work, by estimated time."""
        total = sum(c.seconds for c in self.costs.values())
        return sum(c.seconds * self.done[i] for i, c in self.costs.items()) / total

    def _show(self, always: bool = False) -> None:
        """Of ten thousand trials a line takes milliseconds: not with every piece of news."""
        terminal = self.console.is_terminal
        if not always and time.monotonic() - self.said < (REFRESH if terminal else EVERY):
            return
        self.said = time.monotonic()
        if terminal:
            self.live.update(Text(self._line()))
        else:
            self._say(self._line())

    def _line(self) -> str:
        count = {s: sum(x == s for x in self.status.values()) for s in set(self.status.values())}
        parts = [f"{count.get(s, 0)} {s}" for s in ("done", "running", "waiting")]
        parts += [f"{n} {s}" for s, n in count.items() if s in ("diverged", "failed", "stopped")]
        now, rate = time.monotonic(), 0.0
        for trial, (since, share) in self.first.items():
            if now > since:
                rate += self.costs[trial].tokens * (self.done[trial] - share) / (now - since)
        if rate:
            parts.append(f"{short(rate)} tokens/s")
        gained = self._share() - self.share_at_start
        if gained > 0.01 and self._share() < 1:
            left = (now - self.began) * (1 - self._share()) / gained
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)
