"""Task ``publish``: everything a finished run leaves in MLflow: metrics, tables, the loss curve, the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from model.engine.checkpoint import load_trained
from model.engine.journal import read_journal
from model.files import sha256_json
from model.net.freezing import FreezePlan
from model.net.gpt import GPTModel
from ops.hub import DEFAULT_DATASET, PINNED_WEIGHTS
from ops.sandbox.guards import INSTALL
from ops.tracking.registry import model_name, version_uri
from ops.tracking.runs import RunRef, client, log_metrics, log_model
from tasks.frozen import load_frozen
from tasks.references import CheckpointRef, EvaluationRef, ModelRef, Sources

_WEIGHTS_LICENCE = "OpenAI's GPT-2 weights are under a modified MIT licence."
_ROWS_LICENCE = "CC BY-NC 4.0: a model trained on them is for non-commercial use."
_SHOWN = 5  # samples in Prefect's artifact
_SHOWN_CHARACTERS = 600


# No retries: MLflow's tables grow with each try. A rerun of the flow takes the finished training over.
@task(name="publish", cache_policy=NO_CACHE)
def publish(
    run: RunRef,
    sources: Sources,
    model: ModelRef,
    plan: FreezePlan,
    checkpoint: CheckpointRef,
    evaluation: EvaluationRef,
) -> str:
    """Log the results and register the tuned model as ``gpt2-code-<size>``.

    Returns:
        The model's URI, ``models:/gpt2-code-<size>/<version>``.
    """
    log = get_run_logger()
    mlflow = client(run.tracking_uri)
    rows = json.loads(Path(evaluation.rows).read_text())
    samples = json.loads(Path(evaluation.samples).read_text())
    headline = {key: evaluation.metrics[key] for key in ("best/eval_loss", "test/loss", "test/perplexity")}
    log_metrics(run, {key: v for key, v in evaluation.metrics.items() if key not in headline}, 0)
    mlflow.log_table(run.run_id, _columns(rows), "tables/test_rows.json")
    mlflow.log_table(run.run_id, _columns(samples), "tables/samples.json")
    passes = json.loads(Path(evaluation.passes).read_text())
    if passes:
        mlflow.log_table(run.run_id, _columns(passes), "tables/pass_rate.json")
    mlflow.log_artifact(run.run_id, checkpoint.journal)
    mlflow.log_figure(run.run_id, _loss_curve(Path(checkpoint.journal)), "plots/loss.png")
    directory = Path(checkpoint.directory) / "model"  # removed with the training
    export(model, plan, Path(checkpoint.best), directory, sources, evaluation.metrics)
    version = log_model(
        run,
        directory,
        model_name(model.model_size),
        {"model_size": model.model_size, "base": model.source, "best_step": checkpoint.best_step},
        headline,
        checkpoint.best_step,
    )
    uri = version_uri(version)
    log.info("registered %s", uri)
    create_markdown_artifact(
        sample_report(samples, evaluation.metrics, run, uri), key="samples", description=f"Samples of {uri}"
    )
    return uri


def export(
    model: ModelRef,
    plan: FreezePlan,
    checkpoint: Path,
    directory: Path,
    sources: Sources,
    metrics: Mapping[str, float],
) -> None:
    """Write base plus trained tensors in Hugging Face's layout, in fp32, with tokenizer and model card."""
    network, tokenizer = load_frozen(model, plan, torch.device("cpu"), torch.float32)
    load_trained(checkpoint, network)
    network.save_pretrained(directory, tokenizer.eos_token_id)
    tokenizer.model_max_length = network.config.n_positions
    tokenizer.save_pretrained(str(directory))
    (directory / "README.md").write_text(_model_card(network, plan, model, sources, metrics))


def _model_card(
    network: GPTModel, plan: FreezePlan, model: ModelRef, sources: Sources, metrics: Mapping[str, float]
) -> str:
    lines = [f"- Base: {model.source}, {_origin(sources.weights.revision, model.sha256)}."]
    # A version that this one goes on from hands its licences down.
    card = Path(model.directory) / "README.md"
    inherited = card.read_text() if model.source.startswith("models:/") and card.exists() else ""
    if model.source in {repo for repo, _ in PINNED_WEIGHTS.values()} or _WEIGHTS_LICENCE in inherited:
        lines.append(f"  {_WEIGHTS_LICENCE}")
    data = sources.dataset
    files = sha256_json([file.sha256 for files in data.splits.values() for file in files])
    lines.append(f"- Data: {data.source}, {_origin(data.revision, files)}.")
    if data.source == DEFAULT_DATASET:
        lines.append(f"  Its rows are under {_ROWS_LICENCE}")
    elif _ROWS_LICENCE in inherited:
        lines.append(f"  {DEFAULT_DATASET}'s rows, which the base was trained on, are under {_ROWS_LICENCE}")
    lines.append(f"- Trained: {plan.trainable:,} of {plan.total:,} parameters; the other tensors equal the base's.")
    lines.append(f"- Context: {network.config.n_positions} tokens. Prompt: `### Instruction:`, newline, the request,")
    lines.append("  blank line, `### Response:`, newline.")
    head = ["pipeline_tag: text-generation"]
    if sources.weights.revision:
        head.insert(0, f"base_model: {model.source}")
    return "\n".join(
        [
            "---",
            *head,
            "---",
            f"# GPT-2 {model.model_size}, fine-tuned for code instructions",
            "",
            *lines,
            "",
            "| metric | value |",
            "|---|---|",
            *(f"| {name} | {value:.4f} |" for name, value in metrics.items()),
            "",
        ]
    )


def _origin(revision: str | None, sha256: str) -> str:
    return f"hub commit {revision}" if revision else f"a local copy (sha256 {sha256[:12]}), licence not known here"


def _columns(records: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Records as MLflow's tables want them, by column."""
    return {key: [record[key] for record in records] for key in records[0]} if records else {"row": []}


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


def sample_report(samples: list[dict[str, Any]], metrics: Mapping[str, float], run: RunRef, uri: str) -> str:
    """Prefect's artifact: scores of both models, a few completions, and the way to the MLflow run."""
    lines = [
        f"MLflow run {run.link}, model `{uri}`",
        "",
        "| | base | tuned |",
        "|---|---|---|",
        f"| validation loss | {metrics['base/eval_loss']:.4f} | {metrics['best/eval_loss']:.4f} |",
        f"| test loss | {metrics['base/test_loss']:.4f} | {metrics['test/loss']:.4f} |",
        f"| test perplexity | {metrics['base/test_perplexity']:.2f} | {metrics['test/perplexity']:.2f} |",
    ]
    if samples:
        lines.append(f"| stop rate | {metrics['base/stop_rate']:.2f} | {metrics['sample/stop_rate']:.2f} |")
    if "sample/pass_rate" in metrics:
        lines.append(f"| pass rate | {metrics['base/pass_rate']:.2f} | {metrics['sample/pass_rate']:.2f} |")
        refused = metrics["base/not_executed"] + metrics["sample/not_executed"]
        if refused:
            lines += ["", f"{refused:.0f} completions were not executed and count as failed: {INSTALL}"]
    for sample in samples[:_SHOWN]:
        lines += ["", f"### Row {sample['row']}"]
        for title, key in (("Prompt", "prompt"), ("Reference", "reference"), ("Base", "base"), ("Tuned", "tuned")):
            # Indented, not fenced: a completion may hold a fence of its own.
            text = sample[key][:_SHOWN_CHARACTERS].splitlines()
            if not sample[key].strip():
                text = [f"(only white space, {len(sample[key])} characters)"]
            lines += ["", f"{title}:", "", *(f"    {line}" for line in text)]
    return "\n".join(lines) + "\n"
