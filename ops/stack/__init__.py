"""`make up`: both servers, the worker and the watcher, and the deployments."""
