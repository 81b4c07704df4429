"""What runs where, and what became of it: grids, plans, sweeps, the ledger, MLflow."""

import gc

# Loading torch, ray, transformers and MLflow makes millions of objects that stay; to look for
# garbage among them after every 700 took a fifth of a start.
gc.set_threshold(50_000)
