"""The whole flow, against a real Prefect server and a real MLflow on sqlite."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import wait_for

from model.demo import EMBEDDED_BASE
from model.evaluation.scores import SCOREBOARD, VALIDATION_LOSS
from model.net.gpt import GPTModel
from ops.threads import in_daemon_thread

ROOT = Path(__file__).resolve().parents[2]
PLAN_PARAMETERS = {"total_steps", "trainable_parameters", "total_parameters", "device_name", "dtype"}
DATA_PARAMETERS = {
    "data/train_rows", "data/validation_rows", "data/test_rows", "data/train_tokens", "data/truncated_share",
    "data/dropped_rows",
}  # fmt: skip
METRICS = {
    "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "train/mfu", "train/first_step_seconds",
    "train/peak_memory_gib", "train/trunk_hit_share", "eval/loss", "eval/perplexity",
    "best/step", "untuned/perplexity",
    "test/rows", "untuned/reference_stop_rate", "untuned/reference_syntax_rate",
    "untuned/not_executed", "sample/not_executed",
    "wall_seconds/plan", "wall_seconds/mlflow", "wall_seconds/download", "wall_seconds/prepare",
    "wall_seconds/load_weights", "wall_seconds/freeze", "wall_seconds/wait", "wall_seconds/train",
    "wall_seconds/evaluate", "wall_seconds/publish",
} | {name for score in (VALIDATION_LOSS, *SCOREBOARD) for name in (score.base, score.tuned)}  # fmt: skip
ARTIFACTS = {
    "config.json", "constraints.txt", "metrics.jsonl", "plots/loss.png", "tables/test_rows.json",
    "tables/samples.json", "tables/pass_rate.json", "tables/data_files.json", "tables/scores.json",
    "report/report.html", "changed.json",
}  # fmt: skip
MODEL_FILES = {
    "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip
# MLflow's transformers flavour, of which the directory above is the model.
FLAVOUR = {
    "MLmodel", "code", "components", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json",
    "serving_input_example.json", "registered_model_meta",
}  # fmt: skip


def _artifacts(mlflow: Any, run_id: str, path: str = "") -> set[str]:
    found = set()
    for item in mlflow.list_artifacts(run_id, path):
        found |= _artifacts(mlflow, run_id, item.path) if item.is_dir else {item.path}
    return found


def test_the_run_holds_exactly_what_is_promised(finished: Any, mlflow_of: Callable[[Any], Any]) -> None:
    """Names of params, metrics, artifacts and tags are what users build upon."""
    from flows.job import all_parameters

    mlflow = mlflow_of(finished.run)
    run = mlflow.get_run(finished.run.run_id)
    assert run.info.status == "FINISHED"
    assert (
        set(run.data.params) == {parameter.name for parameter in all_parameters()} | PLAN_PARAMETERS | DATA_PARAMETERS
    )
    assert set(run.data.metrics) == METRICS, set(run.data.metrics) ^ METRICS
    assert _artifacts(mlflow, finished.run.run_id) == ARTIFACTS
    own_tags = {tag for tag in run.data.tags if not tag.startswith("mlflow.")}
    assert own_tags - {"git_sha", "prefect.flow_run_url"} == {
        "prefect.flow_run_id",
        "prefect.run_count",
        "prefect.deployment",
        "process",
        "data_sha256",
        "subset",
        "changed",
        "result",
    }
    assert mlflow.get_experiment(run.info.experiment_id).name == "finetune"
    ((dataset,),) = [run.inputs.dataset_inputs]
    assert run.data.tags["data_sha256"].startswith(dataset.dataset.digest)


def test_params_and_tags_tell_this_run(finished: Any, tiny: dict[str, Any], mlflow_of: Callable[[Any], Any]) -> None:
    """What was asked for is what is recorded, and the Prefect run can be found from the MLflow run."""
    from prefect.client.orchestration import get_client

    run = mlflow_of(finished.run).get_run(finished.run.run_id)
    assert run.info.run_name == "tiny lr 2e-3 top 2, validation_share 0.1, epochs 3, max_steps 12, batch 8"
    assert next(tag for tag in run.data.tags if not tag.startswith("mlflow.")) == "result"
    assert {name: run.data.params[name] for name in tiny} == {name: str(value) for name, value in tiny.items()}
    assert run.data.params["trainable_parameters"] == "890112"
    assert run.data.tags["result"].startswith("better: test loss ")
    assert f"max_steps={tiny['max_steps']}" in run.data.tags["changed"]
    assert f"`max_steps={tiny['max_steps']}`" in run.data.tags["mlflow.note.content"]
    with get_client(sync_client=True) as prefect:
        flow_run = prefect.read_flow_run(run.data.tags["prefect.flow_run_id"])
    assert run.info.run_name == flow_run.name
    assert flow_run.state is not None
    assert flow_run.state.is_completed()


def test_metrics_follow_the_steps(finished: Any, tiny: dict[str, Any], mlflow_of: Callable[[Any], Any]) -> None:
    """Every step has a point, validation stands at 0, every eval_freq and the end; the tuned model is better."""
    mlflow = mlflow_of(finished.run)

    def steps(name: str) -> list[int]:
        return [point.step for point in mlflow.get_metric_history(finished.run.run_id, name)]

    assert steps("train/loss") == list(range(1, tiny["max_steps"] + 1))
    assert steps("eval/loss") == [0, 5, 10, 12]
    metrics = finished.metrics
    history = mlflow.get_metric_history(finished.run.run_id, "eval/loss")
    assert metrics["untuned/eval_loss"] == history[0].value
    assert metrics["best/eval_loss"] == min(point.value for point in history)
    assert metrics["test/loss"] < metrics["untuned/test_loss"] - 1
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]))


def test_the_time_is_accounted_for(finished: Any, mlflow_of: Callable[[Any], Any]) -> None:
    """The seconds of the steps are the run's: what lies between them is in one of them."""
    run = mlflow_of(finished.run).get_run(finished.run.run_id)
    seconds = {name: value for name, value in run.data.metrics.items() if name.startswith("wall_seconds/")}
    assert seconds == {f"wall_seconds/{step}": taken for step, taken in finished.seconds.items()}
    # The run is opened and closed in the first and last of them.
    between = (run.info.end_time - run.info.start_time) / 1000
    assert between - 1 <= sum(seconds.values()) <= between + seconds["wall_seconds/mlflow"] + 5
    assert seconds["wall_seconds/train"] > seconds["wall_seconds/freeze"]


def test_tables_compare_row_by_row(finished: Any, mlflow_of: Callable[[Any], Any]) -> None:
    """One record per row of the whole test split, from which every reported score can be computed again."""
    mlflow = mlflow_of(finished.run)
    rows = mlflow.load_table(finished.run.experiment_id, "tables/test_rows.json", [finished.run.run_id])
    assert len(rows) == mlflow.get_run(finished.run.run_id).data.metrics["test/rows"] == 324
    assert rows.key.nunique() == len(rows)
    for score in SCOREBOARD:
        for metric, column in ((score.base, f"base_{score.column}"), (score.tuned, score.column)):
            there = rows[rows[column].notna()]
            weight = there[score.per].sum() if score.per else len(there)
            assert score.finish(there[column].sum() / weight) == pytest.approx(finished.metrics[metric]), metric
    assert rows.chrf.notna().sum() == 3
    assert rows.passed.notna().sum() == 20
    assert (rows.bytes == rows.reference.str.encode("utf-8").str.len()).all()
    samples = mlflow.load_table(finished.run.experiment_id, "tables/samples.json", [finished.run.run_id])
    assert len(samples) == 3
    assert set(samples.columns) == {
        "row", "prompt", "reference", "base", "base_stopped", "tuned", "tuned_stopped",
    }  # fmt: skip


def test_the_trained_model_is_told_from_the_base(finished: Any, mlflow_of: Callable[[Any], Any]) -> None:
    """Two checkpoints of which one was trained: p below 0.01; the table of scores says so too."""
    found = {difference.score: difference for difference in finished.differences}
    assert set(found) == {score.name for score in SCOREBOARD}
    assert found["loss"].verdict == found["perplexity"].verdict == "better"
    assert found["loss"].corrected < 0.01
    assert found["loss"].difference == pytest.approx(
        finished.metrics["test/loss"] - finished.metrics["untuned/test_loss"]
    )
    table = mlflow_of(finished.run).load_table(
        finished.run.experiment_id, "tables/scores.json", [finished.run.run_id]
    )
    assert list(table.score) == list(found)
    for row in table.itertuples():
        assert (row.verdict, row.rows) == (found[row.score].verdict, found[row.score].rows)
        assert (row.lower, row.upper) == pytest.approx((found[row.score].lower, found[row.score].upper))


def test_a_run_compared_with_itself_is_no_difference(finished: Any, mlflow_of: Callable[[Any], Any]) -> None:
    """The records that MLflow has can be joined and compared again, whatever pandas made of what they lack."""
    from model.evaluation.comparison import compare, join

    rows = mlflow_of(finished.run).load_table(
        finished.run.experiment_id, "tables/test_rows.json", [finished.run.run_id]
    )
    records = rows.to_dict("records")
    joined = join(records, records)
    assert len(joined) == len(records)
    for found in compare(joined, seed=0):
        assert (found.difference, found.lower, found.upper, found.verdict) == (0, 0, 0, "no difference")
    again = {found.score: found for found in compare(records, seed=42)}  # the seed of the run
    assert again["loss"].lower == pytest.approx(finished.differences[0].lower)


def test_every_file_is_named_with_its_rows_and_split(finished: Any, mlflow_of: Callable[[Any], Any]) -> None:
    """MLflow's table of data files accounts for all rows that were read."""
    mlflow = mlflow_of(finished.run)
    table = mlflow.load_table(finished.run.experiment_id, "tables/data_files.json", [finished.run.run_id])
    assert {(Path(row.file).name, row.split) for row in table.itertuples()} == {
        ("train.jsonl", "train"),
        ("test.jsonl", "test"),
    }
    for row in table.itertuples():
        assert row.rows == len(Path(row.file).read_text().splitlines())


def test_registered_model_loads_in_transformers(finished: Any, session_root: Path) -> None:
    """The version is a plain Hugging Face directory: transformers computes the same logits, without this code."""
    import mlflow
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model import GPTModel
    from model.demo import EMBEDDED_BASE

    assert finished.model == "models:/gpt2-code-tiny/1"
    mlflow.set_tracking_uri(finished.run.tracking_uri)
    directory = Path(mlflow.artifacts.download_artifacts(finished.model))
    assert {path.name for path in directory.iterdir()} == MODEL_FILES | FLAVOUR
    assert [path.name for path in directory.rglob("*.safetensors")] == ["model.safetensors"]
    reference = AutoModelForCausalLM.from_pretrained(directory).eval()
    own = GPTModel.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([tokenizer.encode("### Instruction:\nWrite a Python function that adds 2 to a number.")])
    with torch.no_grad():
        assert (reference(ids).logits - own(ids)).abs().max() <= 1e-4
    # Trained where it should be, the base elsewhere.
    base = GPTModel.from_pretrained(EMBEDDED_BASE)
    for (name, before), after in zip(base.named_parameters(), own.parameters(), strict=True):
        trained = name.startswith(("h.4.", "h.5.", "ln_f."))
        assert torch.equal(before, after) is not trained, name


def test_logged_model_carries_metrics(finished: Any, mlflow_of: Callable[[Any], Any]) -> None:
    """The version leads to the run and its LoggedModel to the scores."""
    mlflow = mlflow_of(finished.run)
    version = mlflow.get_model_version("gpt2-code-tiny", "1")
    assert version.run_id == finished.run.run_id
    logged = mlflow.get_logged_model(version.source.removeprefix("models:/"))
    assert str(logged.status) == "READY"
    assert {metric.key for metric in logged.metrics} == {"best/eval_loss", "test/loss", "test/perplexity"}


def test_model_card_names_licences(finished: Any) -> None:
    """Whoever gets the model learns what it is made of; licences are named where they are known to apply."""
    import mlflow

    mlflow.set_tracking_uri(finished.run.tracking_uri)
    card = Path(mlflow.artifacts.download_artifacts(f"{finished.model}/README.md")).read_text()
    assert "- Base: embedded" in card
    assert "PSF License 2" in card
    assert "The demo rows are generated by finetune-gpt2-code, under the Apache License 2.0" in card
    assert "CC BY-NC 4.0" not in card  # these are not CodeAlpaca's rows


def test_nothing_is_left_lying_about(finished: Any, session_root: Path) -> None:
    """A finished training's checkpoints are gone once MLflow has the model; no scratch remains."""
    assert list((session_root / "trainings").iterdir()) == []
    assert list(session_root.glob(".*.tmp")) == []


def test_prefect_shows_progress_and_samples(finished: Any, mlflow_of: Callable[[Any], Any]) -> None:
    """Both artifacts stand in Prefect; the samples lead to the MLflow run."""
    from prefect.artifacts import Artifact

    samples = Artifact.get("samples")
    assert samples is not None
    assert finished.run.run_id in str(samples.data)
    progress = Artifact.get("train-progress")
    assert progress is not None
    assert progress.data == 100.0


def test_all_wrong_parameters_are_named_at_once(prefect_server: None, data_root: Path) -> None:
    """A user with three mistakes should not need three runs, and no MLflow run is opened for them.

    The state has them in one line: Prefect's own check would make a list of several.
    """
    from flows.finetune import finetune

    state = finetune(model_size="125", epochs=0, top_p=2, return_state=True)
    assert state.is_failed()
    assert state.message == (
        "model_size: model_size '125' is unknown: choose one of tiny, 124m, 355m, 774m, 1558m; "
        "epochs: at least 1 is needed, not 0; top_p: at most 1 is needed, not 2"
    )
    state = finetune(model_size="tiny", dataset="/tmp/a\x1bb", return_state=True)
    assert state.message == "dataset: printable characters on one line are allowed, not '\\x1b'"
    assert not (data_root / "mlflow").exists()


def test_too_many_layers_are_refused_before_anything_is_fetched(
    prefect_server: None, data_root: Path, tiny: dict[str, Any]
) -> None:
    """A size's number of blocks is known; weights of gigabytes need not come first."""
    from flows.finetune import finetune

    with pytest.raises(ValueError, match="num_unfrozen_layers 7 is not between 0 and 6, the blocks of tiny"):
        finetune(**{**tiny, "num_unfrozen_layers": 7, "dataset": "missing.jsonl"})
    assert not (data_root / "mlflow").exists()


def test_a_mistake_before_the_training_leaves_no_run(
    prefect_server: None, data_root: Path, tiny: dict[str, Any], mlflow_of: Callable[[Any], Any]
) -> None:
    """The error names the file, and so does the state's message; the run is among MLflow's deleted ones."""
    from mlflow.entities import ViewType

    from flows.finetune import finetune
    from ops.settings import Settings
    from ops.tracking.connection import client

    missing = data_root / "no-such-rows.jsonl"
    with pytest.raises(FileNotFoundError, match=r"no-such-rows\.jsonl"):
        finetune(**{**tiny, "dataset": str(missing)})
    state = finetune(**{**tiny, "dataset": str(missing)}, return_state=True)  # type: ignore[call-overload]
    assert state.is_failed()
    assert state.message == f"dataset {missing} does not exist: give a file or folder, or a hub id like owner/name"
    mlflow = client(Settings.load().tracking_uri)
    experiment = mlflow.get_experiment_by_name("finetune").experiment_id
    assert mlflow.search_runs([experiment]) == []
    assert len(mlflow.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY)) == 2


@pytest.mark.slow
def test_a_run_that_failed_behind_training_does_not_train_again(
    prefect_server: None,
    data_root: Path,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    mlflow_of: Callable[[Any], Any],
) -> None:
    """The rerun takes the finished training over; its MLflow run has every metric, equal to a run in one piece.

    The failure is injected at ``publish``; everything else is real.
    """
    import flows.finetune as module

    def broken(*arguments: Any) -> str:
        raise OSError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", broken)
        with pytest.raises(OSError, match="injected"):
            module.finetune(**tiny)
    (directory,) = (data_root / "trainings").iterdir()
    journal = (directory / "metrics.jsonl").read_text()
    result = module.finetune(**tiny)
    mlflow = mlflow_of(result.run)
    points = mlflow.get_metric_history(result.run.run_id, "train/loss")
    trained = [json.loads(line)["metrics"] for line in journal.splitlines()]
    assert [point.value for point in points] == [m["train/loss"] for m in trained if "train/loss" in m]
    # The very speeds of the first try: nothing was computed twice.
    speeds = mlflow.get_metric_history(result.run.run_id, "train/tokens_per_second")
    name = "train/tokens_per_second"
    assert [point.value for point in speeds] == [m[name] for m in trained if name in m]
    assert not directory.exists()


@pytest.mark.slow
def test_a_run_cut_behind_its_registration_registers_once(
    prefect_server: None, data_root: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rerun takes the version over; a run after a finished one trains anew and registers its own."""
    import flows.finetune as module
    from ops.tracking.connection import client

    publish = module.publish

    def and_fail(*arguments: Any) -> str:
        publish(*arguments)
        raise OSError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", and_fail)
        with pytest.raises(OSError, match="injected"):
            module.finetune(**tiny)
    result = module.finetune(**tiny)
    assert result.model == "models:/gpt2-code-tiny/1"
    mlflow = client(result.run.tracking_uri)
    version = mlflow.get_model_version("gpt2-code-tiny", "1")
    assert version.tags["taken_over_by"] == result.run.run_id
    assert mlflow.get_run(version.run_id).info.status == "FAILED"
    names = result.metrics.keys() & mlflow.get_run(version.run_id).data.metrics.keys()
    assert {"test/loss", "sample/pass_rate"} <= names
    assert {name: mlflow.get_run(result.run.run_id).data.metrics[name] for name in names} == {
        name: result.metrics[name] for name in names
    }
    assert module.finetune(**tiny).model == "models:/gpt2-code-tiny/2"


def test_weights_that_change_in_mid_run_end_it(
    prefect_server: None, data_root: Path, tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is scored or registered that was not trained from: the run is FAILED, and the error names the file.

    The change is injected behind ``train``; everything else is real.
    """
    import flows.finetune as module
    from ops.settings import Settings
    from ops.tracking.connection import client

    base = Path(shutil.copytree(EMBEDDED_BASE, tmp_path / "base"))
    train = module.train

    def and_then_another_file(*arguments: Any) -> Any:
        checkpoint = train(*arguments)
        model = GPTModel.from_pretrained(base)
        model.save_pretrained(base, 0)  # in fp32: the same values in another file
        return checkpoint

    monkeypatch.setattr(module, "train", and_then_another_file)
    with pytest.raises(ValueError, match=r"base/model\.safetensors has changed since this run began"):
        module.finetune(**{**tiny, "max_steps": 1, "weights_dir": str(base)})
    mlflow = client(Settings.load().tracking_uri)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("finetune").experiment_id])
    assert run.info.status == "FAILED"
    assert mlflow.search_registered_models() == []


def test_every_gpu_task_holds_the_tag() -> None:
    """The tag limit serialises what uses the device, and nothing else."""
    from tasks.choose import choose
    from tasks.download import download
    from tasks.evaluate import evaluate
    from tasks.freeze import freeze
    from tasks.load_weights import load_weights
    from tasks.prepare import prepare
    from tasks.promote import promote, score_champion
    from tasks.publish import publish
    from tasks.rank import rank
    from tasks.train import train
    from tasks.trials import train_trials

    assert train.tags == train_trials.tags == evaluate.tags == score_champion.tags == {"gpu"}
    without = (download, choose, prepare, load_weights, freeze, rank, publish, promote)
    assert not set().union(*(task.tags for task in without))


@pytest.mark.slow
def test_a_run_waits_for_the_device(prefect_server: None, data_root: Path, tiny: dict[str, Any]) -> None:
    """Nothing trains while another process holds the device, and the run goes on when that one is gone."""
    from prefect.client.orchestration import get_client

    from flows.finetune import finetune
    from flows.waiting import WAITING_FOR_GPU
    from ops.tracking.connection import client

    hold = "import sys; from pathlib import Path; from ops.machine.lock import exclusive\n"
    hold += "with exclusive(Path(sys.argv[1]), 'cpu', 'somebody', print): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, os.environ["FINETUNE_LOCKS"]],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    released: list[float] = []

    def release_when_it_waits() -> None:
        with get_client(sync_client=True) as prefect:
            wait_for("the run waits", lambda: WAITING_FOR_GPU in {run.state_name for run in newest(prefect)}, 120)
        assert holder.stdin is not None
        released.append(time.time())
        holder.stdin.close()

    def newest(prefect: Any) -> list[Any]:
        return list(prefect.read_flow_runs(limit=1, sort="EXPECTED_START_TIME_DESC"))

    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waiting = in_daemon_thread(release_when_it_waits, "release")
        result = finetune(**{**tiny, "max_steps": 1})
        waiting.result(60)
        assert holder.wait(60) == 0
        (point,) = client(result.run.tracking_uri).get_metric_history(result.run.run_id, "train/loss")
        assert point.timestamp / 1000 > released[0]
    finally:
        holder.kill()
        holder.wait()


def test_pass_rate_by_family(finished: Any, mlflow_of: Callable[[Any], Any]) -> None:
    """The table's families add up to the rows that were run and to the rates that are reported."""
    table = mlflow_of(finished.run).load_table(
        finished.run.experiment_id, "tables/pass_rate.json", [finished.run.run_id]
    )
    assert table.rows.sum() == 20
    for column, metric in (("base", "untuned/pass_rate"), ("tuned", "sample/pass_rate")):
        assert (table[column] * table.rows).sum() / 20 == pytest.approx(finished.metrics[metric])
    assert finished.metrics["untuned/pass_rate"] <= 0.05
