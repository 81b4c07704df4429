"""What runs where, and what became of it: grids, plans, sweeps, the ledger, MLflow."""
