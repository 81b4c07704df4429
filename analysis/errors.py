"""The errors that end a command with one line; and any error in one line."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class BadInput(ValueError):
    """What is wrong, where, and what would be right, in one line. The command line exits with 2."""


class Failed(RuntimeError):
    """The work cannot go on, in one line: why, and what to do. The command line exits with 1."""


LENGTH = 400  # of a line that says what is wrong
# What may be wrong with a path that somebody gave.
OF_PATHS = (errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def full(error: BaseException | str) -> str | None:
    """What to say where an error, or what brought it about, is that a disk is full; else None.
    Libraries tell it in words only."""
    if isinstance(error, str):
        lines = [
            line for line in error.splitlines() if any(os.strerror(n) in line for n in _NO_ROOM)
        ]
        return f"{lines[-1].strip()}: make room, and the same command goes on" if lines else None
    before = error.__cause__ or error.__context__
    return full(f"{error}") or (full(before) if before else None)


@contextmanager
def blame(where: object) -> Iterator[None]:
    """What is bad input within lies in that file: say so."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def one_line(error: Exception | str) -> str:
    """What it says, or its name where it says nothing. What a terminal would not show as a
    character is escaped, and the middle of a line that is too long left out."""
    words = " ".join(str(error).split()) or type(error).__name__
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in words)
    if len(line) <= LENGTH:
        return line
    return f"{line[: LENGTH // 2]} ... {line[-LENGTH // 2 :]}"
