"""Whether a GGUF file is as long as its header says, before a library believes it: one flipped bit
in a count, and the reader of the gguf package never comes to an end.

    magic, version, counts of tensors and fields; fields: name, type, value; tensors: name, ...
"""

import functools
import mmap
import struct
from pathlib import Path

from analysis.errors import BadInput

# Of numbers, by type.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def check(file: Path) -> None:
    """Raises BadInput where it is no GGUF file, or cut short within its header."""
    stat = file.stat()
    _check(file, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _check(file: Path, size: int, time: int) -> None:
    try:
        with file.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Header(data).walk()
    except (OSError, ValueError, LookupError, ArithmeticError, struct.error, RecursionError):
        raise BadInput(f"{file}: not a GGUF file, or cut short") from None


class _Header:
    """A place in the file; beyond its end struct.error is raised."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.order = data, 0, "<"

    def walk(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError
        self.at = 4
        if not self.number("I") & 0xFFFF:  # the version, of the other byte order
            self.order = ">"
        tensors, fields = self.number("Q"), self.number("Q")
        for _ in range(fields):
            self.skip(_STRING)
            self.skip(self.number("I"))
        for _ in range(tensors):
            self.skip(_STRING)
            for _ in range(self.number("I")):  # its shape
                self.number("Q")
            self.number("I")
            self.number("Q")
        if self.at > len(self.data):
            raise ValueError

    def number(self, kind: str) -> int:
        (found,) = struct.unpack_from(self.order + kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return int(found)

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            length = self.number("Q")
            self.at += length
        elif kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SIZES:
                self.at += count * _SIZES[inner]
            else:
                for _ in range(count):
                    self.skip(inner)
        else:
            self.at += _SIZES[kind]
