"""A soak: one training and three nights under kills, compared bit for bit with the same without kills.

``make soak ARGS="--kills 50 --seed 1"``, or from a test ``soak(folder, kills, seed)``. Everything runs against the
servers of `make up`, with a data root of its own, free ports, the embedded tiny base and the project's own rows. What
is killed when is drawn from the seed (soak_kills.py); how far the flow is at a moment depends on the machine too.

The rule: after a kill the soak does only what a person or a service manager would do. It runs `make up` again if that
has ended. It starts the flow again, with the same deployment and parameters, if the flow run ended in another state
than Completed. It repairs no file, database, lock or state by hand, and never uses `make doctor ARGS=--fix`.

At the end everything that MLflow has must equal the undisturbed soak (soak_records.py), each run must be over on both
sides, and no lock, slot or process may be left.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from made_up import MadeUp, wait_for
from soak_kills import Hit, Kill, Saboteur, draw
from soak_records import differences, faults_of_attempts, left_running, record_of

from model.demo import grammar
from ops.machine.process import tagged

_STAGE_SECONDS = 2400.0  # limit for a stage with all its attempts
_RUN_SECONDS = 600.0  # limit for one flow run: with nothing killed it takes some 40 s
_SETTLE_SECONDS = 150.0  # until the watcher has closed what died, and the server has freed its slots
_COMMON: dict[str, Any] = {
    "model_size": "tiny", "num_unfrozen_layers": 2, "max_length": 96, "batch_size": 8, "eval_freq": 15,
    "eval_rows": 100, "sample_rows": 3, "pass_rows": 10, "max_new_tokens": 24, "temperature": 0.7,
    "precision": "fp32", "device": "cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A run that must be completed before the next begins.

    Attributes:
        rows: rows of the data set from this stage on; it grows from night to night.
    """

    name: str
    deployment: str
    rows: int
    parameters: dict[str, Any]


def stages(data: Path, steps: int) -> list[Stage]:
    """One training of the embedded rows, and three nights on rows that grow; the third is refused promotion."""
    night = {**_COMMON, "dataset": str(data), "subset_count": None, "validation_share": 0.1, "learning_rate": 0.001}
    night["max_steps"] = steps
    training = {"dataset": "demo", "learning_rate": 0.003, "epochs": 1, "max_steps": steps}
    return [
        Stage("training", "tiny", 100, {**_COMMON, **training}),
        Stage("night 1", "nightly", 300, night),
        Stage("night 2", "nightly", 450, night),
        Stage("night 3", "nightly", 600, {**night, "learning_rate": 1e-7}),
    ]


class Course:
    """The stages, one after the other, in one installation.

    Attributes:
        flow_runs: ids of the flow runs of each stage, one for each attempt.
        restarts: how often `make up` was run again.
    """

    def __init__(self, base: Path, rows: Path, data: Path):
        self.made = MadeUp(
            base, OMP_NUM_THREADS="1", FINETUNE_GPUS="1", FINETUNE_LOCKS=str(base / "locks"), PYTHONFAULTHANDLER="1"
        )
        self.locks = [base / "locks", base / "root" / "locks"]
        self.rows, self.data = rows, data
        self.flow_runs: dict[str, list[str]] = {}
        self.restarts = 0

    def run(
        self, todo: Sequence[Stage], saboteur: Saboteur | None = None, kills: Sequence[Sequence[Kill]] = ()
    ) -> None:
        """Carry every stage through.

        Args:
            kills: what the saboteur gets to do in each stage.

        Raises:
            AssertionError: a flow run did not end, or a stage was not completed, within its limit.
        """
        for number, stage in enumerate(todo):
            lines = (self.rows / "train.jsonl").read_text().splitlines()[: stage.rows]
            (self.data / "train.jsonl").write_text("\n".join(lines) + "\n")
            if saboteur:
                saboteur.kills += kills[number]
                saboteur.registered = None  # as it is when the stage begins
            self._carry_through(stage)
        while saboteur and saboteur.kills:  # the last night is started again, and has nothing to do
            self._carry_through(todo[-1])

    def _carry_through(self, stage: Stage) -> None:
        deadline = time.monotonic() + _STAGE_SECONDS
        attempts = self.flow_runs.setdefault(stage.name, [])
        state = ""
        while state != "COMPLETED":
            assert time.monotonic() < deadline, f"{stage.name}: not completed after {len(attempts)} attempts"
            attempts.append(self._start(stage, len(attempts)))
            state = self._wait_for_the_end(attempts[-1])

    def _start(self, stage: Stage, number: int) -> str:
        """Start a flow run, again and again until the server has taken it once. Returns its id."""
        key = f"{stage.name} {number}"  # the server makes one flow run of several requests with the same key
        body = {"parameters": stage.parameters, "state": {"type": "SCHEDULED"}, "idempotency_key": key}

        def ask() -> str:
            self.keep_up()
            deployment = self.made.api(f"/deployments/name/finetune/{stage.deployment}")
            return str(self.made.api(f"/deployments/{deployment['id']}/create_flow_run", body)["id"])

        return str(wait_for(f"a flow run of {stage.name}", lambda: _patiently(ask), 240))

    def _wait_for_the_end(self, flow_run: str) -> str:
        """The type of its final state."""

        def final() -> str:
            self.keep_up()
            state = self.made.api(f"/flow_runs/{flow_run}")["state"]
            return state["type"] if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else ""

        return str(wait_for(f"the end of the flow run {flow_run}", lambda: _patiently(final), _RUN_SECONDS))

    def keep_up(self) -> None:
        """Run `make up` again if it has ended."""
        if self.made.process is None or self.made.process.poll() is not None:
            self.restarts += 1
            with suppress(AssertionError):  # what still holds a port ends soon: the caller comes back
                self.made.start()

    def settle(self) -> list[str]:
        """Wait until everything has ended on both sides. Returns what has not, and what the doctor finds."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            self.keep_up()
            found = _patiently(lambda: left_running(self.made, self.locks)) or []
            doctor = self.made.make("doctor")
            if doctor.returncode == 0 and not found:
                return []
            if time.monotonic() > deadline:
                return [*found, *(line for line in doctor.stdout.splitlines() if line.startswith("-"))]
            time.sleep(3)


def _patiently(ask: Any) -> Any:
    """Ask a server; an error of HTTP counts as no answer, as a refused connection does."""
    try:
        return ask()
    except HTTPError as error:
        if error.code < 500 and error.code != 404:
            raise
        return None


@contextmanager
def _course(base: Path, rows: Path, data: Path) -> Iterator[Course]:
    """A course with a started installation, without the nightly schedule; all its processes are ended afterwards."""
    course = Course(base, rows, data)
    try:
        course.made.start()
        nightly = course.made.api("/deployments/name/finetune/nightly")
        for schedule in nightly["schedules"]:
            course.made.api(f"/deployments/{nightly['id']}/schedules/{schedule['id']}", {"active": False}, "PATCH")
        yield course
    finally:
        course.made.stop()


@dataclass(frozen=True)
class Report:
    """What a soak found.

    Attributes:
        hits: the kills that were done.
        faults: a line for each thing that is not as it must be.
        attempts: number of flow runs by stage.
        restarts: how often `make up` was run again.
        seconds: of the undisturbed course and of the other.
        compared: number of values that were equal, by kind.
    """

    hits: list[Hit]
    faults: list[str]
    attempts: dict[str, int]
    restarts: int
    seconds: tuple[float, float]
    compared: dict[str, int]


def soak(base: Path, kills: int, seed: int, steps: int = 120, extras: int | None = None, say: Any = print) -> Report:
    """Run the stages undisturbed, then under kills, and compare.

    Args:
        base: an empty folder.
        kills: number of SIGKILLs.
        steps: of each training.
        extras: number of other signals; by default one for five kills.
    """
    rows, data = base / "rows", base / "data"
    rows.mkdir()
    data.mkdir()
    grammar.write_rows(rows)
    test = (rows / "test.jsonl").read_text().splitlines()[:100]
    (data / "test.jsonl").write_text("\n".join(test) + "\n")
    todo = stages(data, steps)
    began = time.monotonic()
    with _course(base / "undisturbed", rows, data) as course:
        course.run(todo)
        expected = record_of(course.made, course.flow_runs)
    undisturbed = time.monotonic() - began
    (base / "undisturbed.json").write_text(json.dumps(expected))
    say(f"undisturbed: {undisturbed:.0f} s, champion {expected['registry']['aliases']}")

    began = time.monotonic()
    with _course(base / "disturbed", rows, data) as course:
        drawn = draw(random.Random(seed), kills, kills // 5 if extras is None else extras, len(todo))
        saboteur = Saboteur(course.made, say)
        thread = threading.Thread(target=saboteur.work, daemon=True)
        thread.start()
        try:
            course.run(todo, saboteur, drawn)
        finally:
            saboteur.ended.set()
            thread.join(60)
        faults = [f"{len(saboteur.kills)} kills were not done"] if saboteur.kills else []
        faults += course.settle()
        found = record_of(course.made, course.flow_runs)
        (base / "disturbed.json").write_text(json.dumps(found))
        faults += differences(expected, found)
        faults += faults_of_attempts(course.made, course.flow_runs, expected)
        done = course.made.make("down")
        assert done.returncode == 0, done.stdout
        faults += [f"left after make down: {p}" for p in tagged("FINETUNE_LOCKS", str(base / "disturbed" / "locks"))]
    attempts = {name: len(runs) for name, runs in course.flow_runs.items()}
    return Report(
        saboteur.hits, faults, attempts, course.restarts, (undisturbed, time.monotonic() - began), _sizes(expected)
    )


def _sizes(record: dict[str, Any]) -> dict[str, int]:
    """How much was compared."""
    stages_found = [facts for name, facts in record.items() if name != "registry"]
    return {
        "versions": len(record["registry"]["versions"]),
        "files of versions": sum(len(version["sha256"]) for version in record["registry"]["versions"].values()),
        "metric points": sum(len(points) for facts in stages_found for points in facts["metrics"].values()),
        "journal lines": sum(len(facts["journal"]) for facts in stages_found),
        "rows in the ledger": sum(len(facts["nightly"].get("used.npy", [])) for facts in stages_found),
        "table rows": sum(len(table["data"]) for facts in stages_found for table in facts["tables"].values()),
    }


def _print(report: Report, say: Any) -> None:
    say(f"signals by victim: {dict(Counter(f'{hit.kill.signal.name} {hit.kill.victim}' for hit in report.hits))}")
    say(f"by phase: {dict(Counter(hit.phase for hit in report.hits))}")
    say(f"flow runs by stage: {report.attempts}; make up was run again {report.restarts} times")
    say(f"seconds: undisturbed {report.seconds[0]:.0f}, with kills {report.seconds[1]:.0f}")
    say(f"compared: {report.compared}")
    for fault in report.faults:
        say(f"FAULT {fault}")
    say("all equal, nothing left" if not report.faults else f"{len(report.faults)} faults")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if there was no fault."""
    parser = argparse.ArgumentParser(prog="make soak", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs; one other signal for five of them is added")
    parser.add_argument("--seed", type=int, default=None, help="of what is killed when; drawn if not given")
    parser.add_argument("--steps", type=int, default=120, help="of each training")
    parser.add_argument("--keep", type=Path, default=None, help="empty folder to keep, instead of a temporary one")
    options = parser.parse_args(arguments)
    seed = random.randrange(2**31) if options.seed is None else options.seed

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that the servers are ended
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    say(f"--kills {options.kills} --seed {seed} --steps {options.steps}")
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as scratch:
        base = options.keep or Path(scratch)
        base.mkdir(parents=True, exist_ok=True)
        report = soak(base, options.kills, seed, options.steps, say=say)
    _print(report, say)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
