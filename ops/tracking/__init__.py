"""What MLflow remembers: runs, the model registry, promotion and the ledger of nights."""
