"""Where MLflow's stores are, and how they fail."""

import contextlib
import os
import re
import uuid
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import polars as pl

from analysis.errors import BadInput, one_line
from orchestrator.tracking import names

_PASSING = (401, 403, 408, 429)  # refusals by HTTP that may be over in a while


class NoAnswer(BadInput):
    """The store does not answer."""


class Refused(Exception):
    """By a store that answers otherwise."""


def default_uri(out: Path) -> str:
    """A sqlite file beside the runs."""
    return f"sqlite:///{out.resolve() / 'mlflow.db'}"


def check_secrets(option: str, url: str) -> None:
    """Raises BadInput where a URL holds a password, which would be kept and shown."""
    if re.search(r"^https?://[^/?#]*@|://[^/?#]*:[^/?#]*@", url):
        raise BadInput(
            f"{option}: no user or password in a URL; MLflow and fsspec take them from the "
            "environment or their own files: docs/cluster.md"
        )


def resolve(uri: str | None, out: Path) -> str:
    """The store to use: `uri`, or a sqlite file beside the runs. Raises BadInput where it names no
    store or holds a password, NoAnswer where a server does not answer."""
    import urllib.request

    if uri is None:
        return default_uri(out)
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    if "://" not in uri and not uri.startswith("databricks"):
        raise BadInput(f"--tracking-uri: {uri!r} is no URI; a server is http://HOST:PORT")
    check_secrets("--tracking-uri", uri)
    if uri.startswith("http"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
        except (OSError, ValueError, HTTPException) as error:
            raise NoAnswer(f"--tracking-uri: no MLflow server answers at {uri}: {error}") from None
    return uri


def connect(uri: str) -> Any:
    """MLflow's client for a store, which has answered once. Raises NoAnswer."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # below it there are tracebacks
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # whoever asks does it again
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    file = Path(uri.removeprefix("sqlite:///"))
    try:
        if uri.startswith("sqlite:///") and not file.exists():
            _make(file)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # a store may fail in any way
        raise NoAnswer(f"--tracking-uri: MLflow at {uri}: {why(error)}") from None
    return client


def _make(file: Path) -> None:
    """A sqlite store, whole or not at all: one whose making was killed can never be opened."""
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    MlflowClient(f"sqlite:///{partial}").search_experiments(max_results=1)
    with contextlib.suppress(OSError):  # another sweep was first; or there are no links here
        os.link(partial, file)
    partial.unlink()


def refused(error: Exception) -> bool:
    """Whether it would be so again, however long one waits."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        code = error.get_http_status_code()
        return bool(400 <= code < 500 and code not in _PASSING)
    mine = (Refused, ValueError, TypeError, LookupError, pl.exceptions.PolarsError)
    return isinstance(error, mine) and not isinstance(error, OSError)


def unanswered(error: BaseException | None) -> bool:
    """Whether it came of a connection that broke, or of waiting too long."""
    from urllib3.exceptions import HTTPError

    while error:
        if isinstance(error, HTTPError):
            return True
        error = error.__cause__ or error.__context__
    return False


def why(error: Exception) -> str:
    """The cause, without what MLflow and its libraries say around it."""
    cause = (
        r"(?:\[Errno -?\d+\]|\(\w+\.OperationalError\)) (?P<first>[^'\"()<>\[\]]+)|"
        r"(?P<second>Read timed out|Remote end closed connection)"
    )
    found = re.search(cause, str(error))
    return one_line(found["first"] or found["second"]) if found else one_line(error)


def pages(out: Path, port: int) -> dict[str, str]:
    """Where the UI on the runs of `out` shows each sweep's, newest first."""
    import sqlite3

    store = sqlite3.connect(f"{(out / 'mlflow.db').resolve().as_uri()}?mode=ro", uri=True)
    with contextlib.closing(store):
        found = store.execute(
            "SELECT name, experiment_id FROM experiments JOIN experiment_tags USING (experiment_id)"
            " WHERE lifecycle_stage = 'active' AND key = ? ORDER BY last_update_time DESC",
            (names.VIEW,),
        )
        return {name: f"http://127.0.0.1:{port}{names.view(id)}" for name, id in found}


def serve(out: Path, port: int, say: Callable[[dict[str, str]], None] | None = None) -> None:
    """Become the MLflow UI on the runs of `out`, on loopback, and say where: its url and store, or
    print the pages of the newest sweeps. Raises BadInput where there are none, or the port is
    taken."""
    import socket
    import sys

    if not (out / "mlflow.db").is_file():
        raise BadInput(f"{out}: no runs here; `lmsat sweep --grid ranks.yaml` makes some")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise BadInput(f"--port: {port} cannot be used on 127.0.0.1: {error}") from None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Its runners of jobs, unused here, are eight processes that take half a minute to start.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    if say:
        say({"url": f"http://127.0.0.1:{port}", "store": default_uri(out)})
    else:
        newest = [*pages(out, port).items()][:10]
        print("\n".join(f"{name}: {page}" for name, page in newest), flush=True)
    command = ["-m", "mlflow", "ui", "--backend-store-uri", default_uri(out), "--workers", "1"]
    os.execv(sys.executable, [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)])
