"""How a flow run ends: errors that Prefect can store, and a state of its own for a training that MLflow lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from prefect import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.states import Failed

from flows.commands import repeat_command
from flows.full_disk import naming_the_disk
from flows.job import defaults
from flows.trials import job_kind
from ops.display import SHOWN
from ops.mistakes import exit_status, sentence, wants_tracebacks
from ops.redaction import redacted_errors
from ops.settings import Settings
from ops.text import storable_errors
from ops.tracking.shipping import NotLoggedError

NOT_LOGGED = "TrainedNotLogged"  # name of the flow's state


def with_ending(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give the flow's function its endings.

    A mistake (ops/mistakes.py) is one sentence: the message of the state, and a line of the log. A bug has Prefect's
    message, and its traceback in the log. Where MLflow could not take a finished training, the flow run is Failed
    under the name TrainedNotLogged, and its message has the command that logs it. Messages hold no secrets and no
    characters that Prefect cannot store. The error of a full disk names path and bytes.
    """

    @functools.wraps(function)
    def wrapper(**parameters: Any) -> Any:
        try:
            with storable_errors(), redacted_errors(), naming_the_disk(Settings.load().data_root):
                return function(**parameters)
        except NotLoggedError as error:
            flow = str(flow_run.flow_name)
            kind = job_kind(flow)
            command = repeat_command(deployment.name, kind.from_parameters(parameters).flat(), defaults(kind), flow)
            message = f"{error}. This command logs it, without training again: {command}"
            return Failed(name=NOT_LOGGED, message=message, data=NotLoggedError(message))
        except Exception as error:
            if exit_status(error) is None or wants_tracebacks():
                raise
            message = sentence(error)
            get_run_logger().error(message, extra=SHOWN)
            return Failed(message=message, data=error)

    del wrapper.__wrapped__  # type: ignore[attr-defined]  # Prefect would read the signature of what is wrapped
    return wrapper
