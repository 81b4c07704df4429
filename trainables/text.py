"""Where documents come from: text inside an installed package, files, or a dataset hub.

`source` is a plain dict: one of package, files or hub; config and split (of a hub dataset); text
and date (columns); documents (at most so many). Everything here raises BadInput for what the
user can mend.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from analysis.errors import BadInput, one_line
from trainables import hub

KINDS = (".txt", ".jsonl", ".parquet")


class Document(NamedTuple):
    """One text and, where the source has one, its date (ISO, so that text order is time order)."""

    text: str
    date: str | None


def identity(source: dict[str, Any]) -> dict[str, Any]:
    """What the source's text depends on: a package's version, files' contents, a hub's revision."""
    columns = {"text": source["text"], "date": source["date"], "documents": source["documents"]}
    if source["package"]:
        _package_files(source["package"])
        try:
            version = importlib.metadata.version(source["package"])
        except importlib.metadata.PackageNotFoundError:
            raise BadInput(
                f"corpus.package: {source['package']!r} has no version of that name"
            ) from None
        return {"package": source["package"], "version": version, **columns}
    if source["files"]:
        digest = hashlib.sha256()
        for fs, path in _open_files(source["files"]):
            digest.update(Path(path).suffix.encode())
            digest.update(_fingerprint(fs, path))
        return {"files": digest.hexdigest(), **columns}
    revision = _hub_revision(source["hub"])
    named = {key: source[key] for key in ("hub", "config", "split")}
    return {**named, "revision": revision, **columns}


def read(source: dict[str, Any]) -> Iterator[Document]:
    """The documents, one after the other, never all in memory."""
    documents: Iterator[Document]
    if source["package"]:
        documents = (_text_file(p.read_bytes(), str(p)) for p in _package_files(source["package"]))
    elif source["files"]:
        documents = _from_files(source)
    else:
        documents = _from_hub(source)
    return islice((d for d in documents if d.text.strip()), source["documents"])


def _package_files(package: str) -> list[Path]:
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # __main__ has none
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(f"corpus.package: no installed package named {package!r}")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.txt"))
    if not files:
        raise BadInput(f"corpus.package: {package!r} carries no .txt files")
    return files


def _text_file(data: bytes, name: str) -> Document:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}: not UTF-8 at byte {error.start}") from None
    dated = re.match(r"\d{4}(-\d\d){0,2}(?!\d)", Path(name).name)
    return Document(text, dated.group() if dated else None)


def _open_files(pattern: str) -> list[tuple[Any, str]]:
    """(file system, path) of every file the glob or fsspec URL names, in order of name."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        paths = sorted(fs.glob(path) if any(c in path for c in "*?[") else fs.find(path))
    except Exception as error:  # each store has its own
        raise BadInput(f"corpus.files: {pattern}: {one_line(error)}") from None
    if not paths:
        raise BadInput(f"corpus.files: nothing at {pattern}")
    for p in paths:
        if _kind(p) not in KINDS:
            raise BadInput(f"corpus.files: {p} is none of {', '.join(KINDS)} (or those with .gz)")
        if "file" in fs.protocol and not Path(p).is_file():  # a pipe would keep us waiting
            raise BadInput(f"corpus.files: {p} is not a file")
    return [(fs, p) for p in paths]


def _kind(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix


def _fingerprint(fs: Any, path: str) -> bytes:
    if "file" not in fs.protocol:
        return str(fs.checksum(path)).encode()  # the store's own: etag, size, date
    with fs.open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").digest()


def _from_files(source: dict[str, Any]) -> Iterator[Document]:
    for fs, path in _open_files(source["files"]):
        try:
            with fs.open(path, "rb") as raw:
                yield from _in_file(raw, path, source)
        except BadInput:
            raise
        except Exception as error:  # of gzip, of parquet, of the store
            kind = _kind(path)[1:]
            raise BadInput(f"{path}: not a {kind} file, or damaged: {one_line(error)}") from None


def _in_file(raw: Any, path: str, source: dict[str, Any]) -> Iterator[Document]:
    import fsspec
    import polars as pl

    if path.endswith(".gz"):
        raw = fsspec.compression.compr["gzip"](raw, mode="rb")
    if _kind(path) == ".txt":
        yield _text_file(raw.read(), path)
    elif _kind(path) == ".jsonl":
        for number, line in enumerate(raw, 1):
            if line.strip():
                yield _row(_json(line, f"{path}:{number}"), source, f"{path}:{number}")
    else:
        for number, row in enumerate(pl.read_parquet(raw).iter_rows(named=True)):
            yield _row(row, source, f"{path}: row {number}")


def _json(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadInput(f"{where}: expected an object with a text, not {type(row).__name__}")
    return row


def _row(row: dict[str, Any], source: dict[str, Any], where: str) -> Document:
    for field in ("text", "date"):
        if source[field] and source[field] not in row:
            found = ", ".join(map(str, row))
            raise BadInput(f"corpus.{field}: no {source[field]!r} in {where}, only {found}")
    text = row[source["text"]]
    if not isinstance(text, str):
        raise BadInput(f"corpus.text: {source['text']!r} is not text in {where}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{where}: half a surrogate pair at character {error.start}") from None
    return Document(text, str(row[source["date"]]) if source["date"] else None)


def _hub_revision(name: str) -> str:
    """The commit a hub dataset stands at, or the contents of a local dataset directory."""
    if not Path(name).is_dir():
        return hub.revision("dataset", name, "corpus.hub")
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(name).rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(name)).encode() + file.read_bytes())
    return digest.hexdigest()


def _from_hub(source: dict[str, Any]) -> Iterator[Document]:
    from datasets import load_dataset

    name = source["hub"]
    try:
        rows = load_dataset(name, source["config"], split=source["split"], streaming=True)
        for number, row in enumerate(rows):
            yield _row(row, source, f"{name}: row {number}")
    except BadInput:
        raise
    except Exception as error:  # of datasets, of the hub, of what reads its files
        raise BadInput(f"corpus.hub: {name}: {one_line(error)}") from None
