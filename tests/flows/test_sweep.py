"""The flow sweep, against a real Prefect server and a real MLflow on sqlite."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from made_up import wait_for
from world import World

from model.engine.trainer import StepReport
from model.evaluation.comparison import compare
from model.files import sha256_file
from ops.machine.lock import exclusive
from ops.machine.lock_file import read_locks
from ops.tracking.connection import client
from ops.tracking.finished import read_run
from ops.tracking.runs import PARENT_TAG, RunRef

PLAN_PARAMETERS = {"total_steps", "trainable_parameters", "total_parameters", "device_name", "dtype"}
CURVES = ("train/loss", "train/lr", "train/grad_norm", "eval/loss", "eval/perplexity")
# The shortest evaluation, as most tests are about the trials.
SHORT = {"sample_rows": 0, "pass_rows": 0, "max_steps": 8, "eval_freq": 2, "eval_rows": 20}


@pytest.fixture(scope="session")
def swept(prefect_server: None, session_root: Path, finished: Any, tiny: dict[str, Any]) -> Any:
    """The result of a sweep whose best trial is the run ``finished``. Read only."""
    from flows.sweep import sweep

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_DATA_ROOT", str(session_root))
        patch.setenv("MLFLOW_TRACKING_URI", finished.run.tracking_uri)
        patch.setenv("PREFECT_LOGGING_TO_API_ENABLED", "false")
        return sweep(**tiny, grid={"learning_rate": [0.00002, tiny["learning_rate"]]}, promote=True)


def _children(run: RunRef) -> list[Any]:
    """The runs beneath a run, oldest first."""
    mlflow = client(run.tracking_uri)
    condition = f"tags.`{PARENT_TAG}` = '{run.run_id}'"
    return list(mlflow.search_runs([run.experiment_id], condition, order_by=["attributes.start_time ASC"]))


def _curves(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    mlflow = client(uri)
    return {name: [(m.step, m.value) for m in mlflow.get_metric_history(run_id, name)] for name in CURVES}


def _model(result: Any) -> str:
    """The sha256 of the registered weights."""
    import mlflow

    client(result.run.tracking_uri)
    return sha256_file(Path(mlflow.artifacts.download_artifacts(f"{result.model}/model.safetensors")))


def test_each_trial_is_a_run_beneath_the_sweep(swept: Any, finished: Any, tiny: dict[str, Any]) -> None:
    """With the parameters and metrics of a run of this training alone, so that MLflow compares them."""
    alone = client(finished.run.tracking_uri).get_run(finished.run.run_id)
    # The rows are counted in the sweep's own run.
    of_training_alone = {name: text for name, text in alone.data.params.items() if not name.startswith("data/")}
    children = _children(swept.run)
    assert [run.info.run_name for run in children] == ["lr 2e-05", "lr 0.002"]
    for run, rate in zip(children, ("2e-05", "0.002"), strict=True):
        assert run.info.status == "FINISHED"
        assert run.data.params == of_training_alone | {"learning_rate": rate, "promote": "True"}
        assert run.data.tags["sweep.outcome"] == "finished"
        assert run.data.tags["prefect.flow_run_id"] != alone.data.tags["prefect.flow_run_id"]
        of_training = {name for name in alone.data.metrics if name.startswith(("train/", "eval/"))}
        of_training |= {"best/eval_loss", "best/step", "untuned/eval_loss", "untuned/perplexity"}
        assert set(run.data.metrics) == of_training
        assert run.data.tags["data_sha256"] == alone.data.tags["data_sha256"]


def test_a_trial_equals_the_same_training_alone(swept: Any, finished: Any) -> None:
    """Bit for bit, though another trial has used the same loaded base before it."""
    _, best = _children(swept.run)
    uri = finished.run.tracking_uri
    assert _curves(uri, best.info.run_id) == _curves(uri, finished.run.run_id)
    assert best.data.metrics["best/eval_loss"] == finished.metrics["best/eval_loss"]
    assert best.data.metrics["train/trunk_hit_share"] == 1
    assert _model(swept) == _model(finished)


def test_the_best_is_evaluated_registered_and_promoted(swept: Any, finished: Any, tiny: dict[str, Any]) -> None:
    """The sweep's own run holds what the run of its best trial would hold, and the table of trials."""
    mlflow = client(swept.run.tracking_uri)
    run, alone = (mlflow.get_run(ref.run.run_id) for ref in (swept, finished))
    assert run.info.status == "FINISHED"
    assert swept.best.trial.name == run.data.tags["sweep.best"] == "lr 0.002"
    assert swept.metrics == finished.metrics
    assert run.data.params == alone.data.params | {
        "promote": "True",
        "grid": '{"learning_rate": [2e-05, 0.002]}',
        "end_early": "False",
    }
    assert mlflow.get_model_version("gpt2-code-tiny", swept.model.rpartition("/")[2]).run_id == swept.run.run_id
    assert run.data.tags["promotion"] == ("champion" if swept.verdict.promoted else "challenger")
    assert {name: run.data.metrics[name] for name in ("sweep/trials", "sweep/ended_early", "sweep/failed")} == {
        "sweep/trials": 2, "sweep/ended_early": 0, "sweep/failed": 0,
    }  # fmt: skip
    table = mlflow.load_table(swept.run.experiment_id, "tables/trials.json", [swept.run.run_id])
    assert list(table.trial) == ["lr 0.002", "lr 2e-05"]
    assert list(table.learning_rate) == [0.002, 0.00002]
    assert list(table.run_id) == [run.info.run_id for run in reversed(_children(swept.run))]
    assert table.best_eval_loss.is_monotonic_increasing


def test_prefect_shows_the_trials(swept: Any) -> None:
    """Best first, each with its MLflow run."""
    from prefect.artifacts import Artifact

    artifact = Artifact.get("trials")
    assert artifact is not None
    lines = [line for line in str(artifact.data).splitlines() if line.startswith("| ") and "lr " in line]
    assert [line.split(" | ")[1] for line in lines] == ["lr 0.002", "lr 2e-05"]
    for line, result in zip(lines, reversed(swept.trials), strict=True):
        assert result.run.run_id in line


def test_nothing_is_left_lying_about(swept: Any, session_root: Path) -> None:
    """Checkpoints and records of the sweep are gone once MLflow has the model."""
    assert list((session_root / "trainings").iterdir()) == []


class Interruption(RuntimeError):
    """Injected."""


def _recording(seen: list[tuple[int, int]]) -> Callable[..., None]:
    """A ``Progress.show`` that notes each trial and step that is trained."""
    from tasks.progress import Progress

    show = Progress.show

    def show_and_note(self: Progress, report: StepReport) -> None:
        show(self, report)
        seen.append((self.part, report.step))

    return show_and_note


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(
    prefect_server: None, data_root: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No trial is trained twice, the interrupted one resumes, and each has one MLflow run."""
    import flows.sweep as module
    from tasks.progress import Progress

    parameters = {**tiny, **SHORT, "grid": {"learning_rate": [0.001, 0.002, 0.003]}}
    show = Progress.show
    seen: list[tuple[int, int]] = []

    def and_break(self: Progress, report: StepReport) -> None:
        show(self, report)
        seen.append((self.part, report.step))
        if (self.part, report.step) == (1, 5):
            raise Interruption("injected")

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", and_break)
        patch.setattr(module.train_trials, "retries", 0)
        with pytest.raises(Interruption):
            module.sweep(**parameters)
    mlflow = client(f"sqlite:///{data_root}/mlflow/mlflow.db")
    experiment = mlflow.get_experiment_by_name("finetune").experiment_id
    before = {run.info.run_name: run for run in mlflow.search_runs([experiment]) if PARENT_TAG in run.data.tags}
    assert {name: run.info.status for name, run in before.items()} == {"lr 0.001": "FINISHED", "lr 0.002": "FAILED"}
    seen.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            Progress, "show", lambda self, report: (show(self, report), seen.append((self.part, report.step)))
        )
        result = module.sweep(**parameters)
    # The second trial goes on from the checkpoint of its last validation.
    assert seen == [(1, step) for step in range(5, 9)] + [(2, step) for step in range(9)]
    children = _children(result.run)
    assert [run.info.run_name for run in children] == ["lr 0.001", "lr 0.002", "lr 0.003"]
    assert [run.info.run_id for run in children[:2]] == [
        before[name].info.run_id for name in ("lr 0.001", "lr 0.002")
    ]
    assert {run.info.status for run in children} == {"FINISHED"}
    for run in children:
        assert [step for step, _ in _curves(result.run.tracking_uri, run.info.run_id)["train/loss"]] == [*range(1, 9)]
        assert len(mlflow.get_metric_history(run.info.run_id, "best/eval_loss")) == 1
    whole = module.sweep(**parameters)
    assert _model(whole) == _model(result)
    for again, run in zip(_children(whole.run), children, strict=True):
        assert again.info.run_id != run.info.run_id  # a sweep that is complete begins anew
        curves = [_curves(result.run.tracking_uri, each.info.run_id) for each in (again, run)]
        assert curves[0] == curves[1]
    assert whole.best.trial.name == result.best.trial.name


@pytest.mark.slow
def test_a_trial_that_cannot_be_finished_stops_the_next(
    prefect_server: None, data_root: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one trains meanwhile, and keeps a checkpoint of its last step; no step of either is done twice."""
    import flows.sweep as module
    from tasks import trial_worker
    from tasks.progress import Progress

    parameters = {**tiny, **SHORT, "grid": {"learning_rate": [0.001, 0.002, 0.003]}}
    seen: list[tuple[int, int]] = []
    overlaps, has_failed = threading.Event(), threading.Event()
    show = _recording(seen)

    def and_wait(self: Progress, report: StepReport) -> None:
        show(self, report)
        if (self.part, report.step) == (1, 3):
            overlaps.set()
            assert has_failed.wait(60)
            wait_for("the failure is known", lambda: not _is_running("finish-trial"), 60)

    def broken(trial: Any, outcome: Any) -> None:
        assert overlaps.wait(60), "the next trial trains"
        has_failed.set()
        raise Interruption("injected")

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", and_wait)
        patch.setattr(trial_worker, "write_outcome", broken)
        patch.setattr(module.train_trials, "retries", 0)
        with pytest.raises(Interruption, match="injected"):
            module.sweep(**parameters)
    assert seen == [(0, step) for step in range(9)] + [(1, step) for step in range(4)]
    mlflow = client(f"sqlite:///{data_root}/mlflow/mlflow.db")
    experiment = mlflow.get_experiment_by_name("finetune").experiment_id
    before = {run.info.run_name: run for run in mlflow.search_runs([experiment]) if PARENT_TAG in run.data.tags}
    assert {name: run.info.status for name, run in before.items()} == {"lr 0.001": "FAILED", "lr 0.002": "KILLED"}
    seen.clear()
    monkeypatch.setattr(Progress, "show", _recording(seen))
    result = module.sweep(**parameters)
    assert seen == [(1, step) for step in range(4, 9)] + [(2, step) for step in range(9)]
    children = _children(result.run)
    assert {run.info.status for run in children} == {"FINISHED"}
    assert {run.info.run_id for run in before.values()} < {run.info.run_id for run in children}
    for run in children:
        assert [step for step, _ in _curves(result.run.tracking_uri, run.info.run_id)["train/loss"]] == [*range(1, 9)]


@pytest.mark.slow
def test_a_trial_that_is_given_up_leaves_no_thread(
    prefect_server: None, data_root: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps are done when the trial before fails: its checkpoints, slow ones here, are on disk in the end."""
    import flows.sweep as module
    from model.engine import saving, training_files
    from tasks import trial_worker
    from tasks.progress import Progress

    seen: list[tuple[int, int]] = []
    write = saving.write_checkpoint

    def slowly(*arguments: Any) -> None:
        time.sleep(2)
        write(*arguments)

    def broken(trial: Any, outcome: Any) -> None:
        wait_for("the steps of the next trial are done", lambda: (1, 8) in seen, 60)
        raise Interruption("injected")

    monkeypatch.setattr(saving, "write_checkpoint", slowly)
    in_background = partial(saving.CheckpointWriter, in_background=True)  # as on a GPU
    monkeypatch.setattr(training_files, "CheckpointWriter", in_background)
    monkeypatch.setattr(Progress, "show", _recording(seen))
    monkeypatch.setattr(trial_worker, "write_outcome", broken)
    monkeypatch.setattr(module.train_trials, "retries", 0)
    with pytest.raises(Interruption, match="injected"):
        module.sweep(**{**tiny, **SHORT}, grid={"learning_rate": [0.001, 0.002]})
    assert [name for name in ("finish-trial", "checkpoint", "ship-journal") if _is_running(name)] == []


def _is_running(name: str) -> bool:
    return any(thread.name == name for thread in threading.enumerate())


@pytest.mark.slow
def test_a_sweep_that_failed_behind_its_trials_trains_nothing_again(
    prefect_server: None, data_root: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the best trial has kept its checkpoints; one that is damaged meanwhile is trained again."""
    import flows.sweep as module
    from tasks.progress import Progress

    parameters = {**tiny, **SHORT, "grid": {"learning_rate": [0.003, 0.0001]}}

    def broken(*arguments: Any) -> str:
        raise Interruption("injected")

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", broken)
        with pytest.raises(Interruption):
            module.sweep(**parameters)
    (directory,) = (data_root / "trainings").iterdir()
    kept = {path.parent.name for path in directory.glob("*/step-*")}
    assert kept == {"trial-001"}
    assert {path.parent.name for path in directory.glob("*/outcome.json")} == {"trial-001", "trial-002"}
    steps: list[tuple[int, int]] = []
    show = Progress.show
    monkeypatch.setattr(
        Progress, "show", lambda self, report: (show(self, report), steps.append((self.part, report.step)))
    )
    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", broken)
        with pytest.raises(Interruption):
            module.sweep(**parameters)
    assert steps == []
    best = json.loads((directory / "trial-001" / "outcome.json").read_text())["best_step"]
    (directory / "trial-001" / f"step-{best:08d}" / "model.safetensors").write_bytes(b"damaged")
    result = module.sweep(**parameters)
    assert {part for part, _ in steps} == {0}
    assert result.model == "models:/gpt2-code-tiny/1"
    assert len(_children(result.run)) == 2


@pytest.mark.slow
def test_a_trial_that_diverges_is_a_result(prefect_server: None, data_root: Path, tiny: dict[str, Any]) -> None:
    """The other trials go on, and the best is one of them."""
    from flows.sweep import sweep

    result = sweep(**{**tiny, **SHORT, "grid": {"learning_rate": [1e6, 0.002], "max_grad_norm": [1e6]}})
    failed, finished = _children(result.run)
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert re.match("failed: (validation )?loss", failed.data.tags["sweep.outcome"])
    assert [each.outcome.outcome for each in result.trials] == ["failed", "finished"]
    assert result.best.trial.name == "lr 0.002, max_grad_norm 1000000.0"


@pytest.mark.slow
def test_seeds_are_compared_on_the_same_rows(
    prefect_server: None, data_root: Path, tiny: dict[str, Any], mlflow_of: Callable[[Any], Any]
) -> None:
    """A seed changes the training and not the splits; the best trial is evaluated with its own seed."""
    from flows.sweep import sweep

    result = sweep(**{**tiny, **SHORT, "grid": {"seed": [1, 2]}})
    first, second = _children(result.run)
    losses = [_curves(result.run.tracking_uri, run.info.run_id)["train/loss"] for run in (first, second)]
    assert losses[0] != losses[1]
    assert first.data.metrics["untuned/eval_loss"] == second.data.metrics["untuned/eval_loss"]
    (tokens,) = (data_root / "tokens").iterdir()
    assert json.loads((tokens / "meta.json").read_text())["config"]["split_seed"] == 42
    run = mlflow_of(result.run).get_run(result.run.run_id)
    assert run.data.params["seed"] == str(result.best.trial.changes["seed"])
    records = read_run(result.run.tracking_uri, result.run.run_id).records
    again = {found.score: found for found in compare(records, result.best.trial.changes["seed"])}
    assert again["loss"].lower == pytest.approx(result.differences[0].lower)


def test_a_sweep_without_a_finished_trial_fails(prefect_server: None, data_root: Path, tiny: dict[str, Any]) -> None:
    """In one sentence; the trials are there to be looked at."""
    from flows.sweep import sweep
    from tasks.rank import NoTrialFinishedError

    with pytest.raises(NoTrialFinishedError, match=r"^no trial was trained to its end: lr 1000000.0 failed: .*grid$"):
        sweep(**{**tiny, **SHORT, "grid": {"learning_rate": [1e6]}})


@pytest.mark.slow
def test_unpromising_trials_end_early(
    prefect_server: None, data_root: Path, tiny: dict[str, Any], mlflow_of: Callable[[Any], Any]
) -> None:
    """Named as ended early and not as failed, with all that they logged until then."""
    from flows.sweep import sweep

    rates = [0.001, 0.002, 0.003, 0.000001, 0.0025]
    result = sweep(**{**tiny, **SHORT, "grid": {"learning_rate": rates}, "end_early": True})
    outcomes = {each.trial.name: each.outcome.outcome for each in result.trials}
    assert outcomes == {f"lr {rate}": "finished" for rate in rates} | {"lr 1e-06": "ended early"}
    (run,) = [run for run in _children(result.run) if run.info.run_name == "lr 1e-06"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["sweep.outcome"].startswith("ended early: after 25% of its steps the best validation loss, ")
    mlflow = mlflow_of(result.run)
    assert [point.step for point in mlflow.get_metric_history(run.info.run_id, "eval/loss")] == [0, 2]
    assert [point.step for point in mlflow.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    assert run.data.metrics["best/eval_loss"] == min(
        point.value for point in mlflow.get_metric_history(run.info.run_id, "eval/loss")
    )
    assert mlflow.get_run(result.run.run_id).data.metrics["sweep/ended_early"] == 1


@pytest.mark.slow
def test_helpers_on_other_devices_equal_one_process(
    prefect_server: None,
    data_root: Path,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A process for each further device takes trials that nobody has; the results are those of one process.

    A second lock stands for a second device, as there is one CPU.
    """
    import flows.sweep as module
    from tasks.progress import Progress

    show = Progress.show

    def and_wait(self: Progress, report: StepReport) -> None:
        show(self, report)
        if (self.part, report.step) == (0, 1):
            wait_for("the helper trains", lambda: _steps(data_root / "trainings", 2) > 0, 120)

    parameters = {**tiny, **SHORT, "max_steps": 60, "eval_freq": 20}
    parameters["grid"] = {"learning_rate": [0.0005, 0.001, 0.002, 0.003]}
    alone = module.sweep(**parameters)
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as in this process: on a CPU, sums depend on the number of threads
        patch.setattr(module, "count_devices", lambda device: 2)
        patch.setattr(module, "other_devices", lambda device, held: {"cpu 2": device})
        patch.setattr(Progress, "show", and_wait)
        # Prefect's own set-up, in the first flow of a process, takes pytest's handlers off the root logger.
        patch.setattr(logging.getLogger("prefect.task_runs"), "handlers", [caplog.handler])
        result = module.sweep(**parameters)
    pids = [json.loads(run.data.tags["process"])["pid"] for run in _children(result.run)]
    assert len(pids) == 4
    assert {os.getpid()} < {*pids}, "the helper trained some trials, and this process others"
    [helper] = {*pids} - {os.getpid()}
    assert f"[helper {helper}] helps on cpu" in caplog.text
    assert "ended with the status" not in caplog.text
    for one, two in zip(alone.trials, result.trials, strict=True):
        uri = result.run.tracking_uri
        assert _curves(uri, one.run.run_id) == _curves(uri, two.run.run_id)
        assert two.outcome.outcome == "finished"
    assert _model(alone) == _model(result)
    assert {run.info.status for run in _children(result.run)} == {"FINISHED"}


SWEEP = """
import json, sys, time
import flows.sweep as module
import tasks.trial_worker
if len(sys.argv) > 2:  # trials are never finished, and the next ones train meanwhile
    tasks.trial_worker.write_outcome = lambda trial, outcome: time.sleep(1e6)
module.count_devices = lambda device: 2
module.other_devices = lambda device, held: {"cpu 2": "cpu"}  # a second lock stands for a second device
state = module.sweep(**json.loads(sys.argv[1]), return_state=True)
print(state.name, state.message)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim",
    [
        "the flow, kill -9",
        "the flow's group, SIGTERM",
        "the helper, kill -9",
        "the helper before its trial, kill -9",
        "the flow at the end of a trial, kill -9",
    ],
)
def test_a_killed_sweep_goes_on(tmp_path: Path, tiny: dict[str, Any], victim: str) -> None:
    """With one MLflow run a trial, no process and no lock left behind, and the bits of a sweep in one piece."""
    grid = {"learning_rate": [0.0005, 0.001, 0.002]}
    parameters = json.dumps({**tiny, **SHORT, "max_steps": 400, "eval_freq": 50, "grid": grid})
    with World(tmp_path) as world:
        world.start_prefect()  # a run's own server would outlive it, and keep its pipe open

        def begin(*options: str) -> subprocess.Popen[str]:
            world.processes["run"] = process = subprocess.Popen(
                [sys.executable, "-c", SWEEP, parameters, *options], cwd=tmp_path, env=world.environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                start_new_session=True,
            )  # fmt: skip
            return process

        ends = victim == "the flow at the end of a trial, kill -9"
        process = begin("never finished") if ends else begin()
        trials = world.base / "data" / "trainings"
        if victim == "the helper before its trial, kill -9":
            (helper,) = wait_for("the helper waits", lambda: _helpers_of(process.pid), 120)
            assert not [*trials.glob("*/trial-*")]
        else:
            wait_for("two trials train", lambda: _steps(trials, 1) > 60 and _steps(trials, 2) > 60, 240)
            (helper,) = _helpers_of(process.pid)
        if ends:
            wait_for("the first trial ends", lambda: _steps(trials, 1) == 400 and _steps(trials, 3) > 60, 300)
            assert not [*trials.glob("*/trial-001/outcome.json")]
        if victim == "the flow's group, SIGTERM":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            os.kill(helper.pid if victim.startswith("the helper") else process.pid, signal.SIGKILL)
        if victim.startswith("the helper"):
            assert world.finish(process).splitlines()[-1].startswith("Completed")
        else:
            wait_for("both have ended", lambda: not helper.is_running() and process.poll() is not None, 30)
            assert [lock.what for lock in read_locks(world.base / "locks") if lock.held] == []
            if victim == "the flow's group, SIGTERM":
                for number in (1, 2):  # checkpoints of the last step, and not of the last validation only
                    newest = max(path.name for path in trials.glob(f"*/trial-{number:03d}/step-*"))
                    assert int(newest.removeprefix("step-")) == _steps(trials, number)
            world.kill("run")
            assert world.finish(begin()).splitlines()[-1].startswith("Completed")
        assert world.finish(begin()).splitlines()[-1].startswith("Completed")
        uri = f"sqlite:///{world.database}"
        mlflow = client(uri)
        runs = mlflow.search_runs(
            [mlflow.get_experiment_by_name("finetune").experiment_id], order_by=["attributes.start_time ASC"]
        )
        sweeps = [run for run in runs if PARENT_TAG not in run.data.tags]
        statuses = [run.info.status for run in sweeps]
        assert statuses == ["FINISHED"] * 2 if victim.startswith("the helper") else ["KILLED", "FINISHED", "FINISHED"]
        curves = []
        for run in sweeps[-2:]:
            trials_of = [each for each in runs if each.data.tags.get(PARENT_TAG) == run.info.run_id]
            assert {each.info.run_name for each in trials_of} == {"lr 0.0005", "lr 0.001", "lr 0.002"}
            assert [each.info.status for each in trials_of] == ["FINISHED"] * 3
            curves.append({each.info.run_name: _curves(uri, each.info.run_id) for each in trials_of})
        assert curves[0] == curves[1]
        assert [step for step, _ in curves[0]["lr 0.001"]["train/loss"]] == [*range(1, 401)]
        assert len(runs) == len(sweeps) + 6


def _steps(trials: Path, number: int) -> int:
    """The newest step in the journal of a trial; 0 without one."""
    journals = list(trials.glob(f"*/trial-{number:03d}/metrics.jsonl"))
    lines = journals[0].read_bytes().split(b"\n")[:-1] if journals else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _helpers_of(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "tasks.trial_helper" in child.cmdline()]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill -9", "SIGINT", "SIGTERM", "SIGHUP"])
def test_a_sweep_that_ends_while_it_waits_leaves_no_helper(tmp_path: Path, tiny: dict[str, Any], end: str) -> None:
    """Its helper has no work yet, and holds nothing. Signals go to the whole group, as those of a terminal do."""
    with World(tmp_path) as world, exclusive(world.base / "locks", "cpu", "another run", print):
        world.start_prefect()
        parameters = json.dumps({**tiny, **SHORT, "grid": {"learning_rate": [0.001, 0.002]}})
        world.processes["run"] = process = subprocess.Popen(
            [sys.executable, "-c", SWEEP, parameters], cwd=tmp_path, env=world.environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        (helper,) = wait_for("the helper waits", lambda: _helpers_of(process.pid), 120)
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "waiting for cpu" in line:
                break
        assert "waiting for cpu" in said[-1]
        assert helper.is_running()
        assert [lock.holder for lock in read_locks(world.base / "locks") if lock.held and lock.what != "cpu"] == []
        if end == "kill -9":
            process.kill()
        else:
            os.killpg(process.pid, signal.Signals[end])
        wait_for("the helper has ended", lambda: not helper.is_running(), 10)
        rest, _ = process.communicate(timeout=60)
        assert f"helper {helper.pid}" not in "".join(said) + rest
