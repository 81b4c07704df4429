"""MLflow, a view of a sweep that can be rebuilt; the only room that knows it.

    tracking.json         what is said of the sweep in any store
    tracking/<key>.key    what finds it there
    tracking/<run>.txt    of the store with this run of the sweep: which trials it has whole

One experiment a sweep; a run for the sweep, and under it one for each trial, with the text that it
reads and the model that it has become. A run is found by its tag `lmsat.key`, and made to be what
the trial's ledger entry and records say: whatever was written before, and however often it is done,
none is there twice.
"""

from orchestrator.tracking.names import Row, flat, metric_name
from orchestrator.tracking.places import (
    NoAnswer,
    check_secrets,
    default_uri,
    pages,
    refused,
    resolve,
    serve,
    why,
)
from orchestrator.tracking.store import Entry, Store, try_out

__all__ = [
    "Entry",
    "NoAnswer",
    "Row",
    "Store",
    "check_secrets",
    "default_uri",
    "flat",
    "metric_name",
    "pages",
    "refused",
    "resolve",
    "serve",
    "try_out",
    "why",
]
