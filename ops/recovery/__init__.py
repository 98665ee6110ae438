"""Making the books agree: Prefect's limit, zombie runs, and what a dead process left in Prefect and MLflow."""
