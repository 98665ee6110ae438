"""``finetune rollback SIZE``: return the champion of a size to the version that it replaced."""

from __future__ import annotations

import sys

from model.net.config import normalize_size
from ops.mistakes import refuse
from ops.options import OptionParser
from ops.settings import Settings
from ops.tracking.promotion import roll_back
from ops.tracking.registry import model_name
from ops.tracking.runs import refusal


def main(arguments: list[str] | None = None) -> int:
    """Move the alias champion back, and print both versions. Returns the exit status."""
    from mlflow.exceptions import MlflowException

    parser = OptionParser(prog="finetune rollback", description=__doc__)
    parser.add_argument("size", metavar="SIZE", help="tiny, 124m, 355m, 774m or 1558m")
    uri = Settings.load().tracking_uri
    try:
        name = model_name(normalize_size(parser.parse_args(arguments).size))
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
