"""The command line ``finetune``, also as ``python -m flows``."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys

# The modules of the commands are imported in ``command``, where Ctrl-C is one line.
_statuses: list[int] = []  # the exit status, once the command has ended


def open_streams() -> None:
    """Open /dev/null for a standard stream that is closed: the next file would get its number.

    The temporary server inherits the streams, and ends at once if one of them is another file. Python has None for
    such a stream, which cannot be asked whether it is a terminal.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)  # os.open makes it for this process only
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - until the end


def end_in_order() -> None:
    """Let SIGINT, SIGTERM and SIGHUP (a closed terminal) run Python's exit handlers, which end the temporary server.

    During a flow run Prefect's handler of SIGTERM comes first, and calls this one when the run is closed.
    """
    atexit.register(_end_at_once)  # before others are, so that it runs last
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))


def main(arguments: list[str]) -> int:
    """Run a command; a mistake is one sentence on stderr. Returns the exit status."""
    from flows.command_line import dispatch
    from ops.mistakes import tell

    try:
        return dispatch(arguments)
    except Exception as error:
        return tell(error)


def _end_at_once() -> None:
    """End this process once its command has ended; to be the last of Python's exit handlers.

    Python would take down all modules, for which a user waits a second. After Ctrl-C the process ends by SIGINT: a
    shell that runs a script, and make, go on behind a command that exits with status 130, and end too if the signal
    ended it.
    """
    if not _statuses:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    if _statuses[0] == 128 + signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(_statuses[0])


def command() -> None:
    """The entry point of the command line."""
    open_streams()
    end_in_order()
    try:
        _statuses.append(_run())
        sys.exit(_statuses[0])
    except BrokenPipeError:  # the reader of the output has gone; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _statuses.append(128 + signal.SIGINT)
        sys.exit(_statuses[0])


def _run() -> int:
    """Run the command of the process's arguments. Returns the exit status.

    Raises:
        BrokenPipeError: the reader of the output has gone, perhaps before it got what is still in the buffer.
    """
    from ops.mistakes import exit_status, tell
    from ops.text import escape_output

    escape_output()
    try:
        try:
            return main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # rich's consoles end the process with status 1
            raise ended.__context__ from None
        raise
    except OSError as error:
        if isinstance(error, BrokenPipeError) or exit_status(error) is None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return tell(error)


if __name__ == "__main__":
    command()
