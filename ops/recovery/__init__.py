"""Recovery after crashes: Prefect's limit and leases, zombie runs, runs of dead processes."""
