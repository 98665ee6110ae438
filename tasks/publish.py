"""Task ``publish``: log the tables and the loss curve of a finished run, and register its model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from model.engine.checkpoint import load_trained
from model.engine.journal import read_journal
from model.evaluation.scores import headline
from model.net.loading import write_with_tokenizer
from ops.settings import Settings
from ops.text import storable
from ops.tracking.connection import client
from ops.tracking.data import log_table
from ops.tracking.flavour import add_flavour
from ops.tracking.models import log_model
from ops.tracking.registry import interrupted_version, model_name, take_over, version_uri
from ops.tracking.runs import RunRef
from ops.tracking.shipping import must_be_logged
from ops.tracking.steps import pipeline_step
from tasks.cards import model_card, sample_report
from tasks.frozen import load_frozen, load_its_tokenizer
from tasks.references import CheckpointRef, EvaluationRef, Sources, TrainingRef

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


# No retries: MLflow's tables grow with each try. A rerun of the flow takes the finished training over.
@task(name="publish", cache_policy=NO_CACHE)
@pipeline_step
def publish(
    run: RunRef, sources: Sources, training: TrainingRef, checkpoint: CheckpointRef, evaluation: EvaluationRef
) -> str:
    """Log the tables and register the tuned model as ``gpt2-code-<size>``.

    Returns:
        The model's URI, ``models:/gpt2-code-<size>/<version>``.

    Raises:
        NotLoggedError: MLflow could not take all of it.
    """
    from ops.tracking.report import log_report  # here, as it imports the pages and their library

    with must_be_logged(run.tracking_uri, Path(training.directory)):
        _log_tables(run, checkpoint, evaluation)
        directory = Path(checkpoint.directory) / "model"  # removed with the training
        card = model_card(sources, training, evaluation.metrics, evaluation.differences)
        export(training, checkpoint, directory, card)
        version = _register(run, training, checkpoint, headline(evaluation.metrics), directory)
        log_report(run.tracking_uri, run.run_id, evaluation.differences, version)
    uri = version_uri(version)
    samples = json.loads(Path(evaluation.samples).read_text())
    report = storable(sample_report(samples, evaluation, run, uri))
    create_markdown_artifact(report, key="samples", description=f"Samples of {uri}")
    return uri


def _register(
    run: RunRef, training: TrainingRef, checkpoint: CheckpointRef, scores: dict[str, float], directory: Path
) -> ModelVersion:
    """Register the exported model, or take over the version that an interrupted run of this training registered."""
    log = get_run_logger()
    name = model_name(training.model.model_size)
    version = interrupted_version(run, directory, name, training.identity)
    if version is not None:
        take_over(run, version, scores, checkpoint.best_step)
        log.info("took over %s, which an interrupted run of this training had registered", version_uri(version))
        return version
    facts = {
        "model_size": training.model.model_size,
        "base": training.model.source,
        "best_step": checkpoint.best_step,
    }
    version = log_model(run, directory, name, facts, scores, checkpoint.best_step, training.identity)
    log.info("registered %s", version_uri(version))
    return version


def export(training: TrainingRef, checkpoint: CheckpointRef, directory: Path, card: str) -> None:
    """Write base plus trained tensors in Hugging Face's layout, in fp32, with tokenizer, model card and flavour."""
    network = load_frozen(training.model, training.plan, torch.device("cpu"), torch.float32)
    tokenizer = load_its_tokenizer(training.model)
    load_trained(Path(checkpoint.best), network)
    write_with_tokenizer(network, tokenizer, directory)
    (directory / "README.md").write_text(storable(card))
    add_flavour(directory, model_name(training.model.model_size), Settings.load().flavours)


def _log_tables(run: RunRef, checkpoint: CheckpointRef, evaluation: EvaluationRef) -> None:
    """Log the tables of the evaluation, the journal and the loss curve; no pass rate or HumanEval, no such table."""
    mlflow = client(run.tracking_uri)
    files = {"test_rows": evaluation.rows, "samples": evaluation.samples}
    optional = {"pass_rate": evaluation.passes, "humaneval": evaluation.humaneval}
    for name, file in (files | optional).items():
        records = json.loads(Path(file).read_text())
        if records or name in files:
            log_table(run, records, name)
    log_table(run, [asdict(difference) for difference in evaluation.differences], "scores")
    mlflow.log_artifact(run.run_id, checkpoint.journal)
    mlflow.log_figure(run.run_id, _loss_curve(Path(checkpoint.journal)), "plots/loss.png")


def _loss_curve(journal: Path) -> Any:
    """Training and validation loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    records = read_journal(journal)
    for name, style in (("train/loss", "-"), ("eval/loss", "o-")):
        points = [(r["step"], r["metrics"][name]) for r in records if name in r["metrics"]]
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.set(xlabel="optimizer step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
