"""The steps of the pipeline, one Prefect task a file; each hands on a small reference, never data."""
