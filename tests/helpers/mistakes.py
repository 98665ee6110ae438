"""Twelve mistakes that people make, and what a command prints for each, in real processes.

``python mistakes.py DIRECTORY PYTHONPATH`` writes all outputs, for a look at two versions side by side.
"""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from made_up import FOREIGN
from small_disk import fill, small_disk

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("max_steps=1", "sample_rows=0", "pass_rows=0", "eval_rows=20")
_OLD_REVISION = "451aebb31d03"  # the first schema of MLflow


@dataclass(frozen=True)
class Case:
    """A mistake that is ready to be made.

    Attributes:
        parameters: name=value of a run.
        environment: additional variables.
        command: of the command line, instead of a run.
    """

    parameters: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ("run",)


@dataclass(frozen=True)
class Outcome:
    """What a process did.

    Attributes:
        status: its exit status.
        output: stdout and stderr, as a terminal shows them.
        seconds: until it ended.
    """

    status: int
    output: str
    seconds: float


@contextmanager
def _wrong_path(folder: Path) -> Iterator[Case]:
    yield Case((f"dataset={folder}/rows.jsonl",))


@contextmanager
def _no_rows(folder: Path) -> Iterator[Case]:
    (folder / "data").mkdir()
    (folder / "data" / "notes.md").write_text("to do")
    yield Case((f"dataset={folder}/data",))


@contextmanager
def _no_hub(folder: Path) -> Iterator[Case]:
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hub")}
    yield Case(("model_size=124m",), hub)


@contextmanager
def _wrong_weights(folder: Path) -> Iterator[Case]:
    weights = shutil.copytree(ROOT / "model" / "demo" / "base", folder / "weights")
    for path in weights.glob("*.safetensors"):
        os.truncate(path, path.stat().st_size // 2)
    yield Case((f"weights_dir={weights}",))


@contextmanager
def _too_many_layers(folder: Path) -> Iterator[Case]:
    yield Case(("num_unfrozen_layers=7",))


@contextmanager
def _no_gpu(folder: Path) -> Iterator[Case]:
    yield Case(("device=cuda",), {"CUDA_VISIBLE_DEVICES": ""})


@contextmanager
def _full_disk(folder: Path) -> Iterator[Case]:
    with small_disk(folder / "disk", 60) as disk:
        fill(disk, leave=20_000_000)  # the databases fit, the training does not
        yield Case((), {"FINETUNE_DATA_ROOT": str(disk / "root")})


@contextmanager
def _read_only_root(folder: Path) -> Iterator[Case]:
    with small_disk(folder / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield Case((), {"FINETUNE_DATA_ROOT": str(disk / "root")})


@contextmanager
def _port_taken(folder: Path) -> Iterator[Case]:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield Case((), {"FINETUNE_PREFECT_PORT": str(taken.getsockname()[1])}, ("up",))


@contextmanager
def _old_database(folder: Path) -> Iterator[Case]:
    path = folder / "root" / "mlflow" / "mlflow.db"
    path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("INSERT INTO alembic_version VALUES (?)", (_OLD_REVISION,))
    yield Case()


@contextmanager
def _damaged_database(folder: Path) -> Iterator[Case]:
    path = folder / "root" / "prefect" / "prefect.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 5000)
    yield Case()


@contextmanager
def _unknown_parameter(folder: Path) -> Iterator[Case]:
    yield Case(("epoch=1",))


MISTAKES: dict[str, Callable[[Path], object]] = {
    "wrong path": _wrong_path,
    "folder without rows": _no_rows,
    "no network": _no_hub,
    "wrong weights": _wrong_weights,
    "too many layers": _too_many_layers,
    "no GPU": _no_gpu,
    "full disk": _full_disk,
    "read-only data root": _read_only_root,
    "port taken": _port_taken,
    "older database": _old_database,
    "damaged database": _damaged_database,
    "unknown parameter": _unknown_parameter,
}


def environment_of(folder: Path, case: Case) -> dict[str, str]:
    """The variables of a mistake: nothing of the user's servers, and a data root in the test's folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own = {
        "FINETUNE_DATA_ROOT": str(folder / "root"),
        "FINETUNE_LOCKS": str(folder / "locks"),
        "OMP_NUM_THREADS": "1",
    }
    return kept | own | case.environment


def run_command(words: list[str], environment: dict[str, str], cwd: Path = ROOT) -> Outcome:
    """Run a process to its end; stdout and stderr are one pipe."""
    began = time.monotonic()
    done = subprocess.run(
        words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return Outcome(done.returncode, done.stdout, time.monotonic() - began)


def _write_all(directory: Path, pythonpath: str, old: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for number, (name, mistake) in enumerate(MISTAKES.items(), 1):
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            case: Case = stack.enter_context(mistake(folder))  # type: ignore[arg-type]
            module = "ops.stack.up" if old and case.command == ("up",) else "flows"
            command = () if old else case.command
            short = SHORT if case.command == ("run",) else ()
            words = [sys.executable, "-m", module, *command, *short, *case.parameters]
            found = run_command(words, environment_of(folder, case) | {"PYTHONPATH": pythonpath}, Path(pythonpath))
        text = f"# {name}: {' '.join(words[1:])}\n# exit status {found.status}, {found.seconds:.1f} s\n{found.output}"
        (directory / f"{number:02}.txt").write_text(text)
        print(
            f"{number:02} {name}: {found.output.count(chr(10))} lines, status {found.status}, {found.seconds:.1f} s"
        )


if __name__ == "__main__":
    _write_all(Path(sys.argv[1]), sys.argv[2], "--old" in sys.argv)
