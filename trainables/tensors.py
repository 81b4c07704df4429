"""One tensor out of a checkpoint, and nothing else of it: a model's head, or a bare matrix.

Of a safetensors or GGUF file only the bytes of the tensor are read, from a hub too.
"""

import json
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.errors import BadInput
from trainables import gguf_header, hub, pretrained
from trainables.heads import Fixed

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MATRICES = (".npy", ".safetensors")
HEADER = 100_000_000  # bytes that a safetensors header has at most


def head(model: dict[str, Any], cache: Path | None = None) -> Fixed:
    """The output head of a pretrained model, in fp32; of tied ones the input embedding. Pickles
    cannot be read in part: those of a hub are fetched, into `cache` or the user's own.

    Raises BadInput where the checkpoint has none.
    """
    if model["gguf_file"]:
        return Fixed(_from_gguf(Path(model["pretrained"]) / model["gguf_file"]), None, None)
    files = _Files(model, cache)
    names = pretrained.head_names(model, files.names)
    found = {part: files.read(name) for part, name in names.items()}
    if "A" in found:
        return Fixed(found["A"], found["B"], None)
    if "weight" not in found:
        raise BadInput(f"{model['pretrained']}: no output head in its weights")
    return Fixed(found["weight"], None, found.get("bias"))


def matrix(file: Path, name: str | None) -> Fixed:
    """A bare V x d matrix of a .npy or .safetensors file; `name` chooses among its tensors."""
    if file.suffix == ".npy":
        array = _array(file)
        wide = np.float64 if array.dtype.itemsize >= 8 else np.float32
        return Fixed(torch.from_numpy(np.array(array, dtype=wide)), None, None)
    with file.open("rb") as raw:
        weight = _tensor(raw, str(file), *_entry(raw, file, name))
    return Fixed(weight if weight.dtype == torch.float64 else weight.float(), None, None)


def check(file: Path, name: str | None) -> None:
    """Raises BadInput as `matrix` does, but reads no data."""
    if file.suffix == ".npy":
        _array(file)
        return
    with file.open("rb") as raw:
        _type(raw, str(file), *_entry(raw, file, name))


def _array(file: Path) -> Any:
    """Mapped."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever comes of reading a header as Python
        raise BadInput(f"{file}: not a matrix in numpy's format: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise BadInput(f"{file}: not a matrix of numbers")
    _check_shape(file, array.shape)
    return array


def _entry(raw: Any, file: Path, name: str | None) -> tuple[dict[str, Any], int]:
    """Of the matrix that is meant, and where the data begin."""
    entries, start = _header(raw, str(file))
    chosen = [n for n, e in entries.items() if (n == name if name else len(e["shape"]) == 2)]
    if len(chosen) != 1:
        shapes = [f"{n} {'x'.join(map(str, e['shape']))}" for n, e in entries.items()]
        raise BadInput(f"{file}: --tensor NAME is one of: {', '.join(shapes) or 'none'}")
    _check_shape(file, entries[chosen[0]]["shape"])
    return entries[chosen[0]], start


def _check_shape(file: Path, shape: Any) -> None:
    if len(shape) != 2 or 0 in shape:
        raise BadInput(f"{file}: a matrix has two dimensions, not shape {tuple(shape)}")


class _Files:
    """The safetensors of a folder or a hub revision, by tensor."""

    def __init__(self, model: dict[str, Any], cache: Path | None) -> None:
        import fsspec

        self.whole: dict[str, Tensor] = {}
        self.where, pickle = model["pretrained"], bool(model.get("pickle"))
        at = pretrained.folder(self.where) or hub.cached(self.where, model["revision"], pickle)
        self.fs = fsspec.filesystem("file" if at else "hf")
        self.root = str(at) if at else "@".join(filter(None, (self.where, model["revision"])))
        index = f"{self.root}/model.safetensors.index.json"
        if self.fs.exists(index):
            try:
                places = dict(json.loads(self.fs.read_text(index))["weight_map"])
            except (ValueError, LookupError, TypeError, RecursionError):
                raise BadInput(f"{index}: not an index of safetensors") from None
        elif self.fs.exists(f"{self.root}/model.safetensors"):
            with self._open("model.safetensors") as raw:
                places = dict.fromkeys(_header(raw, self.where)[0], "model.safetensors")
        elif pickle:
            places = {}
            self._unpickle(at or hub.download(self.where, model["revision"], True, cache))
        else:
            raise BadInput(
                f"{self.where}: no safetensors here; PyTorch pickles are read with --pickle alone"
            )
        self.places: dict[str, str] = places

    def _unpickle(self, folder: Path) -> None:
        """Mapped where the format allows that, and of tensors alone."""
        for file in sorted(folder.glob("pytorch_model*.bin")):
            mapped = zipfile.is_zipfile(file)
            try:
                self.whole |= torch.load(file, map_location="cpu", mmap=mapped, weights_only=True)
            except Exception:  # whatever the pickle asks for
                raise BadInput(f"{file}: not a pickle of tensors alone, or cut short") from None

    @property
    def names(self) -> list[str]:
        return [*self.places, *self.whole]

    def read(self, name: str) -> Tensor:
        if name in self.whole:
            return self.whole[name].float()
        where = f"{self.where}: {self.places[name]}"
        with self._open(self.places[name]) as raw:
            entries, start = _header(raw, where)
            if name not in entries:
                raise BadInput(f"{where}: no {name} in it, which its index names")
            return _tensor(raw, where, entries[name], start).float()

    def _open(self, file: str) -> Any:
        # What is read is known to the byte: nothing ahead of it.
        try:
            return self.fs.open(f"{self.root}/{file}", block_size=2**16, cache_type="none")
        except FileNotFoundError:
            raise BadInput(f"{self.where}: no {file} here, which its index names") from None


def _header(raw: Any, where: str) -> tuple[dict[str, Any], int]:
    """Entries by name, and where their data begin."""
    try:
        (size,) = struct.unpack("<Q", raw.read(8))
        entries = json.loads(raw.read(size) if size <= HEADER else b"")
        entries = {name: e for name, e in dict(entries).items() if name != "__metadata__"}
        sound = all(map(_is_entry, entries.values()))
    except (struct.error, ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise BadInput(f"{where}: not a safetensors file, or cut short")
    return entries, 8 + size


def _is_entry(given: Any) -> bool:
    match given:
        case {"dtype": str(), "shape": [*shape], "data_offsets": [int(first), int(last)]}:
            return 0 <= first <= last and all(type(n) is int and n >= 0 for n in shape)
    return False


def _type(raw: Any, where: str, entry: dict[str, Any], start: int) -> torch.dtype:
    """Raises BadInput unless the tensor is there, and of floats."""
    dtype, shape, (first, last) = _TYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None:
        raise BadInput(f"{where}: a tensor of type {entry['dtype']}, not of floats")
    whole = 0 < last - first == math.prod(shape) * dtype.itemsize
    if not whole or start + last > raw.seek(0, os.SEEK_END):
        raise BadInput(f"{where}: a tensor of shape {tuple(shape)} that is cut short")
    return dtype


def _tensor(raw: Any, where: str, entry: dict[str, Any], start: int) -> Tensor:
    dtype, (first, last) = _type(raw, where, entry, start), entry["data_offsets"]
    raw.seek(start + first)
    data = bytearray(raw.read(last - first))
    return torch.frombuffer(data, dtype=dtype).view(entry["shape"])


def _from_gguf(file: Path) -> Tensor:
    import gguf

    gguf_header.check(file)
    try:
        tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}  # mapped, not read
    except Exception as error:  # whatever its bytes are taken for
        raise BadInput(f"{file}: not a GGUF file, or cut short: {error}") from None
    for name in ("output.weight", "token_embd.weight"):
        if name in tensors:
            try:
                data = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
            except NotImplementedError as error:
                raise BadInput(f"{file}: {error}") from None
            return torch.from_numpy(np.array(data, dtype=np.float32))
    raise BadInput(f"{file}: no output.weight and no token_embd.weight in it")
