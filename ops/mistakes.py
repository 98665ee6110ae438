"""Which errors are mistakes: of the user, or of the machine. A mistake is told in one sentence, a bug as a traceback.

An error is a mistake if a ``raise`` statement of this project raised it, or if the operating system refused a file
for a reason that lies outside of the code (a full or read-only disk, no permission). All other errors, such as the
ValueError of a library or a failed assertion, are bugs. So the sites that raise need no marker, and a wrong call of a
library is never taken for a mistake.
"""

from __future__ import annotations

import dis
import errno
import os
import sys
from pathlib import Path
from types import TracebackType

from ops.redaction import redact
from ops.text import one_line, storable

USER, MACHINE = 2, 1  # exit statuses
DEBUG_VARIABLE = "FINETUNE_DEBUG"  # set by --debug: mistakes have their tracebacks too
_PROJECT = Path(__file__).resolve().parent.parent
_PACKAGES = ("flows", "tasks", "ops", "model")
# What a user wrote is wrong; of other types, the machine cannot do what was asked.
_OF_USERS = (ValueError, LookupError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError)
_OF_BUGS = (AssertionError, KeyError, IndexError, AttributeError, NotImplementedError)
_OF_SYSTEMS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EADDRINUSE)
_RAISE = dis.opmap["RAISE_VARARGS"]


class UsageError(Exception):
    """The command line, or a file that it names, is wrong; the message is for the terminal."""


def exit_status(error: BaseException) -> int | None:
    """The exit status for a mistake: 2 of a user, 1 of the machine; None for a bug."""
    if isinstance(error, UsageError):
        return USER
    if not isinstance(error, Exception) or isinstance(error, _OF_BUGS):
        return None
    if _is_raised_here(error.__traceback__):
        return USER if isinstance(error, _OF_USERS) else MACHINE
    return MACHINE if isinstance(error, OSError) and error.errno in _OF_SYSTEMS else None


def _is_raised_here(trace: TracebackType | None) -> bool:
    """Whether the innermost frame of a traceback stands at a ``raise`` statement of this project."""
    if trace is None:
        return False
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    # In the same frame a function written in C may have raised it, such as int(): then the instruction is a call.
    return is_of_project(code.co_filename) and code.co_code[trace.tb_lasti] == _RAISE


def is_of_project(file: str) -> bool:
    """Whether a source file is of this project's packages; tests and libraries are not."""
    path = Path(file)
    return path.is_relative_to(_PROJECT) and path.relative_to(_PROJECT).parts[0] in _PACKAGES


def sentence(error: BaseException) -> str:
    """A mistake in one line, without secrets and without characters that cannot be stored."""
    text = one_line(error)
    if isinstance(error, OSError) and error.strerror:  # without "[Errno 2]"
        place = f"{error.filename}: " if error.filename else ""
        text = place + " ".join(str(error.strerror).split())
    return redact(storable(text)) or type(error).__name__


def wants_tracebacks() -> bool:
    """Whether mistakes are to have their tracebacks too, as with --debug."""
    return bool(os.environ.get(DEBUG_VARIABLE))


def refuse(error: Exception) -> int:
    """Print an error that a command expects, of whatever origin. Returns the exit status."""
    if wants_tracebacks():
        raise error
    print(sentence(error), file=sys.stderr)
    of_user = isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError))  # also by the system
    return exit_status(error) or (USER if of_user else MACHINE)


def tell(error: Exception) -> int:
    """Print a mistake on stderr, as the end of a command. Returns its exit status.

    Raises:
        Exception: the error itself, if it is a bug, or if tracebacks are wanted.
    """
    status = exit_status(error)
    if status is None or wants_tracebacks():
        raise error
    print(sentence(error), file=sys.stderr)
    return status
