"""The command line ``finetune``, also as ``python -m flows``."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys

# The modules of the commands are imported in ``command``, where Ctrl-C is one line.
_interrupted: list[bool] = []  # not empty once Ctrl-C has ended the command


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
    atexit.register(_end_by_ctrl_c)  # before others are, so that it runs last
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


def _end_by_ctrl_c() -> None:
    """End this process by SIGINT if Ctrl-C ended its command; to be the last of Python's exit handlers.

    A shell that runs a script, and make, go on behind a command that exits with status 130. They end too if the
    signal ended it. Its status is 130 for them then as well.
    """
    if not _interrupted:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # its reader has gone
            stream.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def command() -> None:
    """The entry point of the command line."""
    open_streams()
    end_in_order()
    try:
        status = _run()
        if status == 128 + signal.SIGINT:
            _interrupted.append(True)
        sys.exit(status)
    except BrokenPipeError:  # the reader of the output has gone; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _interrupted.append(True)
        sys.exit(128 + signal.SIGINT)


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
