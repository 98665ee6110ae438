"""``finetune rollback SIZE``: return the champion of a size to the version that it replaced."""

from __future__ import annotations

import sys

from model.net.config import normalize_size
from ops.mistakes import refuse
from ops.parsers import rollback_parser
from ops.settings import Settings
from ops.tracking.connection import refusal, require_runs
from ops.tracking.promotion import roll_back
from ops.tracking.registry import model_name


def main(arguments: list[str] | None = None) -> int:
    """Move the alias champion back, and print both versions. Returns the exit status."""
    size = rollback_parser().parse_args(arguments).size
    uri = Settings.load().tracking_uri
    try:
        name = model_name(normalize_size(size))
        require_runs(uri)
    except (LookupError, ValueError) as error:
        return refuse(error)
    from mlflow.exceptions import MlflowException  # takes seconds

    try:
        before, now = roll_back(uri, name)
    except (LookupError, OSError, ValueError) as error:
        return refuse(error)
    except MlflowException as error:
        print(refusal(uri, error), file=sys.stderr)
        return 1
    print(f"{name}: the champion was version {before}, and is version {now} again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
