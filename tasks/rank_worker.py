"""One rank of a gang: ``torchrun ... -m tasks.rank_worker JOB.json`` starts it.

The task ``train`` starts a gang on the GPUs that its flow run holds. The same command works by hand and under a
cluster's scheduler; then the ranks take the GPUs of their local rank, and print instead of telling the flow.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from ops.machine.member import Member, take_place
from ops.mistakes import exit_status
from ops.text import one_line


def main(arguments: list[str]) -> int:
    """Join the gang and do this rank's part of the job. Returns the exit status."""
    member = take_place()  # first: imports take seconds, in which torchrun may die
    try:
        _work(member, Path(arguments[0]))
    except BaseException as error:
        traceback.print_exc()
        kinds = [kind.__name__ for kind in type(error).__mro__]
        passes = getattr(error, "micro_batch_tokens", None)  # of a PassesTooLongError
        is_mistake = exit_status(error) is not None
        member.send("error", kinds=kinds, text=one_line(error), micro_batch_tokens=passes, is_mistake=is_mistake)
        return 1
    member.send("end")
    return 0


def _work(member: Member, path: Path) -> None:
    from tasks.gang_job import read_job
    from tasks.rank_work import score_rank, train_rank

    job = read_job(path)
    if job.scoring is None:
        train_rank(job, member)
    else:
        score_rank(job, job.scoring, member)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
