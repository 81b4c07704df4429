"""A real terminal for tests that look at one, and type."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

LMSAT = Path(sys.executable).parent / "lmsat"
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>])")


class Terminal:
    """A command on a terminal of its own, so wide; what it has shown is in `shown`, as it came."""

    def __init__(
        self, *command: object, cwd: Path, columns: int = 80, rows: int = 40, **env: str
    ) -> None:
        self.own, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        known = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        streams: Any = {"stdin": other, "stdout": other, "stderr": other}
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env={**known, "TERM": "xterm", **env},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # or Ctrl-C reaches nobody
            **streams,
        )
        os.close(other)
        self.shown, self._seen = "", 0

    def see(self, text: str, seconds: float = 30) -> None:
        """Wait until that is shown, after what was seen before."""
        began = time.monotonic()
        while (at := self.shown.find(text, self._seen)) < 0:
            left = began + seconds - time.monotonic()
            assert left > 0 and self._read(left), f"no {text!r} in {self.shown[self._seen :]!r}"
        self._seen = at + len(text)

    def type(self, keys: str) -> None:
        os.write(self.own, keys.encode())

    def end(self, seconds: float = 60) -> int:
        """Wait until it ends; its exit code."""
        began = time.monotonic()
        while self._read(began + seconds - time.monotonic()):
            pass
        os.close(self.own)
        return self.process.wait(seconds)

    def _read(self, seconds: float) -> bool:
        """Whether more has come."""
        if not select.select([self.own], [], [], max(0, seconds))[0]:
            self.process.kill()
            return False
        try:
            more = os.read(self.own, 65536)
        except OSError:  # the other side is closed
            return False
        self.shown += more.decode(errors="replace")
        return bool(more)

    @property
    def lines(self) -> list[str]:
        """Without colour and what moves the cursor; of a line that was written over the last."""
        whole = ESCAPES.sub("", self.shown).replace("\r\n", "\n").split("\n")
        return [line.rpartition("\r")[2] for line in whole]
