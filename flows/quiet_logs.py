"""Keeps the tracebacks of mistakes out of the log of a flow run, on the terminal and in Prefect.

Prefect's engine logs each exception of a task with its traceback, and then its state. The flow logs a
mistake as one sentence (flows/endings.py), so these records are left out. Bugs keep theirs. With ``--debug`` or
PREFECT_LOGGING_LEVEL=DEBUG nothing is left out.
"""

from __future__ import annotations

import logging

from prefect.exceptions import SignatureMismatchError
from prefect.logging import get_logger

from ops.display import mark_of
from ops.mistakes import exit_status, sentence, wants_tracebacks

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
_STATE = "Finished in state Failed("
_ENGINE = "Engine execution exited"  # of a flow run's own process, which logs the error of the flow once more


class WithoutTracebacks(logging.Filter):
    """Lets no record of a mistake pass whose sentence the flow logs, or has logged, itself."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: set[str] = set()  # task runs that ended with a mistake
        self.told: set[str] = set()  # what the flow has logged as a sentence

    def filter(self, record: logging.LogRecord) -> bool:
        if wants_tracebacks() or get_logger().isEnabledFor(logging.DEBUG):
            return True
        error = record.exc_info[1] if record.exc_info else None
        task_run = str(getattr(record, "task_run_id", ""))
        if mark_of(record) == "shown":
            self.told.add(record.getMessage())
        if isinstance(error, SignatureMismatchError):
            # Of a parameter that the flow does not have: hooks.py names it.
            record.msg, record.args = "the parameters do not fit the flow", ()
            record.exc_info = record.exc_text = None
        elif isinstance(error, Exception) and exit_status(error) is not None:
            self.failed.add(task_run)
            if str(record.msg).startswith("Task run failed"):
                return False
            if str(record.msg).startswith(_ENGINE) and sentence(error) in self.told:
                return False
            record.msg, record.args, record.exc_info = sentence(error), (), None
            record.exc_text = None
        elif record.name == "prefect.task_runs" and str(record.msg).startswith(_STATE):
            return task_run not in self.failed
        elif record.name == "prefect.flow_runs" and str(record.msg).startswith(_STATE):
            record.msg = "Finished in state Failed"  # the message stands in the line before, or behind a traceback
        return True


def keep_tracebacks_out() -> None:
    """Install the filter in this process; once is enough."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, WithoutTracebacks) for each in logger.filters):
            logger.addFilter(WithoutTracebacks())
