"""``python -m ops.machine.torchrun PARENT OPTIONS``: torchrun that dies with the process that started it.

It ignores the signals that ask a flow run to end: the flow asks the ranks, which stop after the same step. A signal
that torchrun forwarded would reach them between any two instructions.
"""

from __future__ import annotations

import os
import signal
import sys

from ops.machine.process import die_with_parent
from ops.machine.stopping import ASKING


def main(arguments: list[str]) -> None:
    """Run torch.distributed.run.

    Args:
        arguments: the pid of the process that started this one, and torchrun's own arguments.
    """
    die_with_parent()
    if os.getppid() != int(arguments[0]):  # it has died already
        return
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    from torch.distributed.run import main as torchrun  # takes seconds

    torchrun(["--signals-to-handle", "SIGUSR2", *arguments[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
