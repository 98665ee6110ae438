"""A rank of a gang for tests: ``-m gang_ranks WHAT`` does what is said, and nothing of a training."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback

from ops.machine.member import HOST_VARIABLE, Member, take_place

RANK = int(os.environ["RANK"])


def do(what: str, member: Member) -> None:
    """The first rank waits, if the other one is to do something else."""
    member.send("here", pid=os.getpid(), parent=os.getppid(), device=member.device)
    if what == "end":
        return
    if what == "fail":
        raise LookupError("the first one") if RANK else RuntimeError("the consequence")
    if what == "stop":
        while not member.stopping.wait(0.05):
            pass
        member.send("stopped")
        return
    if what == "say much":
        for number in range(20_000):
            member.send("number", value=number, nothing=float("nan"))
        return
    if RANK and what == "die":
        print("one line\nand another", flush=True)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if RANK and what == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)  # also where it is to ignore that it should stop


def fail_to_join(what: str) -> None:
    """Connect to the host as ``take_place`` does, and die, or hang, before the host's welcome has arrived."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(os.environ[HOST_VARIABLE])
    connection.shutdown(socket.SHUT_RD)  # as after its death: what the host sends does not arrive
    hello = {"kind": "hello", "rank": RANK, "local_rank": RANK, "pid": os.getpid()}
    text = json.dumps(hello).encode() + b"\n"
    if what != "say nothing":
        connection.sendall(text[:10] if what == "die in its hello" else text)
    if what == "say nothing":
        time.sleep(600)
    os._exit(1)


def main() -> int:
    if RANK and sys.argv[1] in ("die before its welcome", "die in its hello", "say nothing"):
        fail_to_join(sys.argv[1])
    member = take_place()
    try:
        do(sys.argv[1], member)
    except BaseException as error:
        traceback.print_exc()
        if RANK:
            time.sleep(0.3)
        member.send("error", kinds=[kind.__name__ for kind in type(error).__mro__], text=str(error))
        return 1
    member.send("end")
    return 0


if __name__ == "__main__":
    print(json.dumps(sys.argv))
    sys.exit(main())
