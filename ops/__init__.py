"""Operations around the training: settings, tracking, locks, the hub, servers, recovery and small commands.

Importing this package sets environment defaults that libraries read when they are imported. A variable that is set
already is kept. Servers on this machine are reached without a proxy. From then on secrets are redacted in the log
records of the process.
"""

import os

from ops.proxies import spare_loopback
from ops.redaction import redact_logs

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # With MLflow's own defaults a call blocks for 246 s when its server is down.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Tokenize on all cores. The library's threads do not survive a fork, but no process here forks without an exec.
    "TOKENIZERS_PARALLELISM": "true",
    # Progress bars would fill the logs of a flow run.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
spare_loopback(os.environ)
redact_logs()
