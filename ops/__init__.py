"""What flows and tasks need around the work: settings, tracking, locks, the hub, small commands.

Importing it sets environment defaults that its libraries read at import; a variable that is set wins.
"""

import os

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # MLflow's own default blocks 246 s a call when its server is gone.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # All cores: its threads would not survive a fork, but here nothing forks without starting another program.
    "TOKENIZERS_PARALLELISM": "true",
    # Progress bars would fill the logs of a flow run.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
for _name, _value in _DEFAULTS.items():
    os.environ.setdefault(_name, _value)
