"""A Hugging Face hub on this machine: as much of its protocol as its client speaks when it reads
models and datasets, and a record of what was asked.

    with Hub({"owner/name": {"main": folder, "step1000": other}}) as hub:
        subprocess.run(command, env=hub.environment(tmp_path))
        assert hub.sent("model.safetensors") < 10_000

The folders are listed once, when the hub is made. Datasets are called datasets/owner/name.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 2**16


class Missing(Exception):
    """By the name the client knows it: RepoNotFound, RevisionNotFound, EntryNotFound."""


@dataclass
class Request:
    """What a client asked for."""

    method: str
    path: str
    sent: int = 0
    """Bytes of the answer's body."""


@dataclass(frozen=True)
class Blob:
    """A file as git names it."""

    file: Path
    size: int
    oid: str


class Tree:
    """The files of a folder by their paths in it, and the commit they come to."""

    def __init__(self, folder: Path) -> None:
        self.blobs: dict[str, Blob] = {}
        for file in sorted(f for f in folder.rglob("*") if f.is_file()):
            data = file.read_bytes()
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            self.blobs[file.relative_to(folder).as_posix()] = Blob(file, len(data), oid)
        oids = {path: blob.oid for path, blob in self.blobs.items()}
        self.commit = hashlib.sha1(json.dumps(oids).encode()).hexdigest()

    def entries(self, path: str, recursive: bool) -> list[dict[str, Any]]:
        """What lies in a folder of the tree, or also below it."""
        at = PurePosixPath(path)
        below = {p: b for p, b in self.blobs.items() if at in PurePosixPath(p).parents}
        if path and not below:
            raise Missing("EntryNotFound")
        folders = {str(d) for p in below for d in PurePosixPath(p).parents if at in d.parents}
        found: list[dict[str, Any]] = [
            {"type": "directory", "oid": self.commit, "size": 0, "path": d} for d in sorted(folders)
        ]
        found += [
            {"type": "file", "oid": b.oid, "size": b.size, "path": p} for p, b in below.items()
        ]
        return [e for e in found if recursive or PurePosixPath(e["path"]).parent == at]


class Hub(ThreadingHTTPServer):
    """Serves repositories, {"owner/name": {revision: folder}}, while it is entered."""

    def __init__(self, repositories: Mapping[str, Mapping[str, Path]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.trees = {
            name: {revision: Tree(folder) for revision, folder in revisions.items()}
            for name, revisions in repositories.items()
        }
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process that has this hub for the Hub, and keeps what it downloads in `home`."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def tree(self, name: str, revision: str = "main") -> Tree:
        """By branch or commit."""
        if name not in self.trees:
            raise Missing("RepoNotFound")
        for branch, tree in self.trees[name].items():
            if revision in (branch, tree.commit):
                return tree
        raise Missing("RevisionNotFound")

    def sent(self, file: str = "") -> int:
        """Bytes of all answers, or of those for a file of this name."""
        return sum(r.sent for r in self.requests if not file or r.path.endswith(f"/{file}"))

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.asked = Request(self.command, unquote(url.path))
        self.server.requests.append(self.asked)
        try:
            self._answer([unquote(part) for part in url.path.split("/")[1:]], parse_qs(url.query))
        except Missing as missing:
            self._json({"error": str(missing)}, 404, {"X-Error-Code": str(missing)})
        except ConnectionError:  # who asked has enough
            self.close_connection = True

    def do_HEAD(self) -> None:
        self.do_GET()

    def _repository(self, parts: list[str]) -> list[str]:
        """A path whose repository is one part: owner/name of models, datasets/owner/name."""
        match parts:
            case ["api", "models", owner, name, *rest]:
                return ["api", f"{owner}/{name}", *rest]
            case ["api", "datasets", owner, name, *rest]:
                return ["api", f"datasets/{owner}/{name}", *rest]
            case ["datasets", owner, name, *rest]:
                return [f"datasets/{owner}/{name}", *rest]
            case [owner, name, *rest]:
                return [f"{owner}/{name}", *rest]
        return parts

    def _answer(self, parts: list[str], query: dict[str, list[str]]) -> None:
        match self._repository(parts):
            case ["api", name, "refs"]:
                self.server.tree(name)
                branches = [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": tree.commit}
                    for branch, tree in self.server.trees[name].items()
                ]
                self._json({"branches": branches, "converts": [], "tags": []})
            case ["api", name, "tree", revision, *path]:
                tree = self.server.tree(name, revision)
                recursive = query.get("recursive", ["false"])[0].lower() == "true"
                self._json(tree.entries("/".join(path), recursive))
            case ["api", name, *rest] if rest[:1] in ([], ["revision"]):
                tree = self.server.tree(name, *rest[1:])
                siblings = [{"rfilename": path} for path in tree.blobs]
                id = name.removeprefix("datasets/")
                self._json({"id": id, "sha": tree.commit, "siblings": siblings})
            case [name, "resolve", revision, *path]:
                self._file(self.server.tree(name, revision), "/".join(path))
            case _:
                raise Missing("EntryNotFound")

    def _file(self, tree: Tree, path: str) -> None:
        headers = {"X-Repo-Commit": tree.commit, "Accept-Ranges": "bytes"}
        if (blob := tree.blobs.get(path)) is None:
            self._json({}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        start, end, status = 0, blob.size, 200
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, blob.size - int(last))
            end = min(int(last) + 1, blob.size) if first and last else blob.size
            status = 206
            if start >= end:
                self._json({}, 416, {"Content-Range": f"bytes */{blob.size}"})
                return
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
        headers["Content-Type"] = "application/octet-stream"
        with blob.file.open("rb") as file:
            file.seek(start)
            self._head(status, end - start, {**headers, "ETag": f'"{blob.oid}"'})
            while start < end and (chunk := file.read(min(CHUNK, end - start))):
                self._body(chunk)
                start += len(chunk)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self._head(status, len(data), {"Content-Type": "application/json", **(headers or {})})
        self._body(data)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()

    def _body(self, data: bytes) -> None:
        if self.command != "HEAD":
            self.asked.sent += len(data)  # before the client can have seen it
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
