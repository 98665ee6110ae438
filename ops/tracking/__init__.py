"""MLflow: runs, the model registry, promotion, and the ledger of nights."""
