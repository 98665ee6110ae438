"""The servers: those of `make up` with the worker, the watcher and the deployments, and Prefect's temporary one."""
