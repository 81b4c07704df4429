"""News of trials go to MLflow on a thread of its own: nobody waits for a store that is slow or
away, and what it missed it gets from the records, once, later."""

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from orchestrator import tracking
from orchestrator.tracking import Entry, Row

PATIENCE = 90.0  # seconds that the end waits for a store which does not answer
PAUSES = (0.5, 10.0)  # seconds from one attempt to the next, at first and at most
ROWS = 10_000  # of one trial that wait in memory; beyond, its records are read

_SWEEP = ""  # in the place of a trial's id


class Watcher(Protocol):
    """Whoever is told how MLflow fares."""

    def warned(self, what: str) -> None: ...
    def catching_up(self, left: int) -> None: ...


class Tracker:
    """Makes runs what the ledger's entries say. What waits to be written is one entry a trial, with
    its news or without: so an outage of any length costs no memory."""

    def __init__(
        self,
        uri: str,
        sweep: Path,
        watcher: Watcher,
        note: str = "",
        grid: str = "",
        anew: bool = False,
    ) -> None:
        """As tracking.Store; raises tracking.NoAnswer."""
        self.store = tracking.Store(uri, sweep, note, grid, anew)
        self.watcher = watcher
        self.problems = 0
        """Of things that MLflow lacks in the end."""
        self._statuses: dict[str, str] = {}
        self._news: dict[str, tuple[Entry, list[Row] | None]] = {}
        self._changed = threading.Condition()
        self._away: tuple[float, str] | None = None  # since when, and why
        self._said = self._closing = self._given_up = False
        self._refused: dict[str, int] = {}  # how often
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def update(self, entry: Entry, rows: Iterable[Row] | None = None) -> None:
        """Make a trial's run what its entry says, soon: with more rows of `scalars`; or, without
        any, brought up to its records."""
        id = entry["id"]
        with self._changed:
            self._statuses[id] = entry["status"]
            _, waiting = self._news.get(id, (None, []))
            if rows is None or waiting is None or len(waiting) > ROWS or self._away:
                waiting = None
            else:
                waiting = [*waiting, *rows]
            self._news[id] = entry, waiting
            self._changed.notify()

    def close(self) -> None:
        """End the sweep's run, and wait until everything is written. Where the store has not
        answered for PATIENCE, say what to do, and leave it."""
        done = {*self._statuses.values()} <= {"done", "diverged"}
        with self._changed:
            self._news[_SWEEP] = {"id": _SWEEP, "status": "done" if done else "stopped"}, None
            self._closing = True
            self._changed.notify()
        began = time.time()
        while self._thread.is_alive() and not self._given_up:
            self._thread.join(0.2)
            if time.time() - began > 2:
                self.watcher.catching_up(len(self._news))
            if self._away and time.time() - max(began, self._away[0]) > PATIENCE:
                self._give_up(*self._away)

    def _give_up(self, since: float, why: str) -> None:
        with self._changed:
            self._given_up = True
            self._changed.notify()
        self.problems += 1
        uri, when = self.store.uri, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
        again = f"lmsat track {self.store.sweep} --tracking-uri {uri}"
        self.watcher.warned(f"MLflow at {uri} lacks what came since {when} ({why}): `{again}`")

    def _work(self) -> None:
        pause = PAUSES[0]
        while (news := self._next()) is not None:
            entry, rows = news
            try:
                if entry["id"] == _SWEEP:
                    self.store.finish(entry["status"])
                else:
                    self.store.bring_up(entry, rows)
            except Exception as error:  # a store may fail in any way
                opened = bool(self.store.parent)
                self.store.forget()
                if opened and tracking.refused(error):
                    self._refuse(entry, tracking.why(error))
                else:
                    self._wait(entry, tracking.why(error), pause)
                    pause = min(2 * pause, PAUSES[1])
            else:
                pause = PAUSES[0]
                if self._said:
                    self.watcher.warned(f"MLflow at {self.store.uri} answers again")
                self._away, self._said = None, False

    def _next(self) -> tuple[Entry, list[Row] | None] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._news or self._closing)
            if self._given_up or not self._news:
                return None
            return self._news.pop(next(iter(self._news)))

    def _again(self, entry: Entry) -> None:
        """First of all, and from the records: what is known of the run is no longer sure."""
        newest, _ = self._news.pop(entry["id"], (entry, None))
        self._news = {entry["id"]: (newest, None), **self._news}

    def _refuse(self, entry: Entry, why: str) -> None:
        """Once more, as somebody may have deleted the run; then never again."""
        id = entry["id"]
        self._refused[id] = self._refused.get(id, 0) + 1
        if self._refused[id] == 1:
            with self._changed:
                self._again(entry)
        elif self._refused[id] == 2:
            self.problems += 1
            what = "the sweep's own run" if id == _SWEEP else f"trial {id}"
            self.watcher.warned(f"MLflow at {self.store.uri} does not take {what}: {why}")

    def _wait(self, entry: Entry, why: str, pause: float) -> None:
        if self._away and not self._said:  # at once it may be nothing
            self._said = True
            self.watcher.warned(
                f"MLflow at {self.store.uri} does not answer ({why}); what it lacks comes later"
            )
        since = self._away[0] if self._away else time.time()
        with self._changed:
            self._away = since, why
            self._again(entry)
            self._changed.wait_for(lambda: self._given_up, pause)
