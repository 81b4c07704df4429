"""MLflow's server as a process that can be killed and started again at once, and a network that
is slow or loses answers."""

import multiprocessing
import os
import socket
import socketserver
import threading
import time
import urllib.request
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mlflow.server"])  # takes seconds, once


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(port: int, store: str, artifacts: str) -> None:
    os.environ |= {
        "_MLFLOW_SERVER_FILE_STORE": store,
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": artifacts,
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
    }
    import logging

    from mlflow.server import app
    from werkzeug.serving import run_simple

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    run_simple("127.0.0.1", port, app, threaded=True)


class Server:
    """With a sqlite store in `folder`; always at one address."""

    def __init__(self, folder: Path) -> None:
        self.port, self.folder = free_port(), folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        where = (f"sqlite:///{self.folder}/server.db", str(self.folder / "artifacts"))
        self.process = FORKS.Process(target=_serve, args=(self.port, *where), daemon=True)
        self.process.start()
        for _ in range(600):
            assert self.process.is_alive(), "the server ended"
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("the server did not answer")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Network:
    """Between client and server, at `uri`: hands each request on and its answer back, unless it is
    told otherwise. Paths are matched by their end."""

    def __init__(self, server: Server) -> None:
        self.seen: list[str] = []
        self.delay = 0.0  # seconds before an answer goes back
        self.losing: list[str] = []  # paths whose next answer is lost
        self.holding: list[str] = []  # paths whose next request goes on after `release`
        self.release = threading.Event()
        network = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                head = b"".join(iter(self.rfile.readline, b"\r\n")) + b"\r\n"
                sizes = [
                    v
                    for k, _, v in (line.partition(b":") for line in head.lower().split(b"\r\n"))
                    if k == b"content-length"
                ]
                body = self.rfile.read(int(sizes[0])) if sizes else b""
                path = head.split(b" ", 2)[1].split(b"?")[0].decode()
                network.seen.append(path)
                if network._take(network.holding, path):
                    network.release.wait(60)
                with socket.create_connection(("127.0.0.1", server.port)) as there:
                    there.sendall(head + body)
                    answer = b"".join(iter(lambda: there.recv(2**16), b""))
                time.sleep(network.delay)
                if not network._take(network.losing, path):
                    self.wfile.write(answer)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.uri = "http://{}:{}".format(*self.server.server_address[:2])
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _take(self, paths: list[str], path: str) -> bool:
        found = next((p for p in paths if path.endswith(p)), None)
        if found:
            paths.remove(found)
        return found is not None

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
