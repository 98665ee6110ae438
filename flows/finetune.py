"""Flow ``finetune``: download, prepare, load weights, freeze, train, evaluate, publish, as one MLflow run."""

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger
from prefect.artifacts import create_link_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from pydantic import AfterValidator, Field

from flows.hooks import after_cancellation, after_crash, after_failure
from flows.nightly import Night, begin_night
from flows.plan import check_disk, describe_plan
from flows.waiting import hold_device, hold_training
from model.data.preparing import PrepareConfig
from model.engine.config import TrainConfig
from model.evaluation.completions import SamplingConfig
from model.net.config import PRESETS, normalize_size
from model.net.device import resolve_device
from model.net.freezing import FreezeConfig
from ops.hub import DEFAULT_DATASET
from ops.recovery.limits import ensure_limit
from ops.recovery.reaper import ATTEMPT_TAG, FLOW_RUN_TAG, HOOK_SECONDS, reap
from ops.servers import gpu_count
from ops.settings import Settings
from ops.tracking.promotion import Verdict
from ops.tracking.runs import RunRef, log_data, log_metrics, log_params, set_tags, tracked_run
from ops.tracking.stopwatch import Laps
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.freeze import freeze
from tasks.load_weights import load_weights
from tasks.prepare import prepare
from tasks.promote import promote as promote_version
from tasks.promote import score_champion
from tasks.publish import publish
from tasks.references import TokensRef
from tasks.train import train, training_identity

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
# The pattern lets Prefect's server refuse a wrong size when a run is submitted.
Size = Annotated[
    str,
    AfterValidator(normalize_size),
    Field(json_schema_extra={"pattern": f"^({'|'.join([*PRESETS, *(name.upper() for name in PRESETS)])})$"}),
]


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished flow run leaves behind.

    Attributes:
        run: the MLflow run.
        model: URI of the registered version.
        metrics: scores of base and tuned model.
        samples: the first two prompts with reference and both completions.
        verdict: whether the version became champion, and why; None if that was not asked for.
        seconds: what each step took, in order.
    """

    run: RunRef
    model: str
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    verdict: Verdict | None
    seconds: dict[str, float]


@flow(
    name="finetune",
    log_prints=True,
    on_failure=[after_failure],
    on_crashed=[after_crash],
    on_cancellation=[after_cancellation],
)
def finetune(
    model_size: Size = "124m",
    dataset: str = DEFAULT_DATASET,
    dataset_revision: str | None = None,
    weights_dir: str | None = None,
    tokenizer_dir: str | None = None,
    subset_start: Annotated[int, Field(ge=0)] = 0,
    subset_count: Count | None = None,
    subset: Literal["next"] | None = None,
    replay_share: Share = 0.2,
    start_from: Annotated[str, Field(pattern=r"^(base|champion|models:/.+)$")] = "base",
    promote: bool = False,
    promote_margin: Annotated[float, Field(ge=0)] = 0.001,
    test_share: Share = 0.1,
    validation_share: Share = 0.02,
    max_dropped_share: Annotated[float, Field(ge=0, le=1)] = 0.05,
    max_length: Annotated[int, Field(ge=8)] = 512,
    freeze_layers: bool = True,
    num_unfrozen_layers: Annotated[int, Field(ge=0)] = 4,
    train_head: bool = False,
    epochs: Count = 3,
    max_steps: Count | None = None,
    batch_size: Count = 32,
    micro_batch_tokens: Count | None = None,
    trunk_cache_gb: Annotated[float, Field(ge=0)] = 32.0,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4,
    weight_decay: Annotated[float, Field(ge=0)] = 0.01,
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03,
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0,
    prompt_loss_weight: Annotated[float, Field(ge=0)] = 0.0,
    dropout: Share = 0.0,
    eval_freq: Count = 100,
    eval_rows: Count | None = 1000,
    sample_rows: Annotated[int, Field(ge=0)] = 16,
    pass_rows: Annotated[int, Field(ge=0)] = 500,
    max_new_tokens: Count = 128,
    temperature: Annotated[float, Field(ge=0)] = 0.7,
    top_k: Count | None = 50,
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.95,
    seed: Annotated[int, Field(ge=0)] = 42,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto",
) -> FinetuneResult | None:
    """Fine-tune the top blocks of a GPT-2 on code instructions.

    Args:
        model_size: tiny, 124m, 355m, 774m or 1558m.
        dataset: a hub id, a local .jsonl/.json/.parquet/.csv file or a folder of them, or "demo".
        dataset_revision: of a hub data set: branch, tag or commit; the commit is recorded.
        weights_dir: a local directory in Hugging Face's GPT-2 layout; else the pinned weights of the hub.
        tokenizer_dir: a local directory with the tokenizer, if it is not beside the weights.
        subset_start: first row of train to use, counted from 0.
        subset_count: how many rows of train to use from there; all, if left out.
        subset: "next": instead, at most subset_count rows that no successful night has trained on, by content.
        replay_share: of all rows of a night, the share that was used before, so that it is not forgotten.
        start_from: "base"; "champion" (the base if there is none yet); or a version, models:/NAME/VERSION or @ALIAS.
        promote: make the result champion if it is surely better than the champion of this size, else challenger.
        promote_margin: nats per token by which it must at least be better.
        test_share: share of train that becomes test where the data set has no test split.
        validation_share: share of train that selects the best checkpoint.
        max_dropped_share: more unusable rows than this share is an error.
        max_length: tokens a row is cut at, prompt included.
        freeze_layers: freeze all but the top blocks and the final norm.
        num_unfrozen_layers: blocks that train, counted from the top.
        train_head: also train an untied copy of the output head; without freeze_layers the tied one trains anyway.
        epochs: passes over the training rows.
        max_steps: stop after this many optimizer steps.
        batch_size: rows per optimizer step.
        micro_batch_tokens: tokens per pass: a matter of memory, speed and dropout's noise; halved if too many.
        trunk_cache_gb: GB of the frozen blocks' outputs to keep at most; a matter of speed only, 0 keeps none.
        learning_rate: peak of warm-up and cosine.
        weight_decay: AdamW's decay of matrices; biases and norms have none.
        warmup_ratio: share of the steps spent warming up.
        max_grad_norm: gradients are clipped to this norm.
        prompt_loss_weight: weight of the loss on prompt tokens; 0 trains on responses only.
        dropout: dropout rate in the trained blocks.
        eval_freq: steps between validations; each saves a checkpoint.
        eval_rows: rows of validation and of test that are used at most, for scores and completions.
        sample_rows: prompts of the test split that both models complete.
        pass_rows: rows of the test split with tests whose greedy completions are run in a sandbox.
        max_new_tokens: length limit of a completion.
        temperature: 0 is greedy.
        top_k: sample among this many most probable tokens.
        top_p: sample within this probability mass.
        seed: decides splits, order of rows, dropout and sampling.
        precision: bf16, fp32, or auto: bf16 where the hardware has it.
        device: auto, cpu, cuda or cuda:N.
    """
    parameters = dict(locals())
    laps = Laps()
    log = get_run_logger()
    settings = Settings.load()
    settings.claim_caches()
    if resolve_device(device).type == "cpu" and device == "auto" and model_size != "tiny":
        log.warning("torch sees no GPU: a %s trains on the CPU", model_size)
    if subset and subset_start:
        raise ValueError(
            f"subset_start {subset_start} is a place, and subset={subset} goes by content: leave one out"
        )
    blocks = PRESETS[model_size].n_layer
    if freeze_layers and num_unfrozen_layers > blocks:  # as freeze does, but before gigabytes are fetched
        raise ValueError(f"num_unfrozen_layers {num_unfrozen_layers} is beyond the {blocks} blocks of {model_size}")
    tidy_up(settings, log)
    train_config = TrainConfig(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        micro_batch_tokens=micro_batch_tokens,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_ratio=warmup_ratio,
        max_grad_norm=max_grad_norm,
        prompt_loss_weight=prompt_loss_weight,
        dropout=dropout,
        eval_freq=eval_freq,
        eval_rows=eval_rows,
        precision=precision,
        seed=seed,
    )
    prepare_config = PrepareConfig(
        max_length=max_length,
        subset_start=subset_start,
        subset_count=subset_count,
        test_share=test_share,
        validation_share=validation_share,
        seed=seed,
        max_dropped_share=max_dropped_share,
    )
    sampling = SamplingConfig(
        sample_rows=sample_rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        pass_rows=pass_rows,
    )
    window = f"{subset_start}:{subset_start + subset_count}" if subset_count else f"{subset_start}:"
    tags = {
        FLOW_RUN_TAG: str(flow_run.id),
        ATTEMPT_TAG: str(flow_run.run_count),
        "prefect.deployment": deployment.name or "none",
        "subset": window,
    }
    name = str(flow_run.name)
    if flow_run.ui_url:
        tags["prefect.flow_run_url"] = flow_run.ui_url
        tags["mlflow.note.content"] = f"Prefect: [{name}]({flow_run.ui_url})"
    if deployment.name:
        tags |= {"mlflow.source.name": f"finetune/{deployment.name}", "mlflow.source.type": "JOB"}
    laps.end("plan")
    wanted: dict[str, Any] = {
        "dataset": dataset,
        "dataset_revision": dataset_revision,
        "model_size": model_size,
        "weights_dir": weights_dir,
        "tokenizer_dir": tokenizer_dir,
        "start_from": start_from,
    }
    night: Night | None = None
    if subset == "next":
        due = flow_run.scheduled_start_time
        begun = begin_night(settings, due, wanted, prepare_config, subset_count, replay_share)
        if isinstance(begun, State):
            return begun  # type: ignore[return-value]  # Prefect takes it for the flow's state, and returns None
        night = begun
        laps.end("choose")
        prepare_config = replace(prepare_config, subset_count=None, subset_keys=night.subset.keys)
    with ExitStack() as held:
        if night:
            held.enter_context(night.held)
        with tracked_run(settings, f"{model_size} {name}", parameters, tags) as run:
            log.info("MLflow run %s", run.url or f"{run.run_id} in {run.tracking_uri}")
            if run.url:
                create_link_artifact(run.url, key="mlflow-run", description=f"MLflow run of {name}")
            if night:
                night.record(run, model_size)
            laps.end("mlflow")
            sources = night.sources if night else download(**wanted)
            laps.end("download")
            tokens = prepare(sources, prepare_config)
            laps.end("prepare")
            set_tags(run, {"data_sha256": tokens.data_sha256})
            log_data(run, sources.dataset.source, sources.dataset.revision, tokens.data_sha256)
            log_metrics(run, data_metrics(tokens), step=0)
            laps.end("mlflow")
            model = load_weights(sources.weights, model_size)
            laps.end("load_weights")
            plan = freeze(model, FreezeConfig(freeze_layers, num_unfrozen_layers, train_head))
            laps.end("freeze")
            facts = describe_plan(tokens.counts, f"{model_size} from {model.source}", plan, train_config, device)
            log_params(run, facts.params)
            print(facts.text)
            check_disk(settings.data_root, facts.disk_bytes)
            laps.end("plan")
            held.enter_context(hold_training(settings, training_identity(tokens, model, plan, train_config, device)))
            # Held over both, or another run's training would come between a training and its evaluation.
            with hold_device(settings, device) as chosen:
                place = str(chosen)
                laps.end("wait")
                checkpoint = train(tokens, model, plan, train_config, place, run, trunk_cache_gb)
                laps.end("train")
                evaluation = evaluate(tokens, model, plan, checkpoint, train_config, sampling, place, trunk_cache_gb)
                laps.end("evaluate")
                rival = score_champion(tokens, model, plan, checkpoint, train_config, place) if promote else None
            uri = publish(run, sources, model, plan, checkpoint, evaluation)
            verdict = promote_version(run, uri, evaluation, rival, promote_margin, seed) if rival else None
            samples = json.loads(Path(evaluation.samples).read_text())[:2]
            laps.end("publish")
            log_metrics(run, {f"time/{step}_seconds": seconds for step, seconds in laps.seconds.items()}, step=0)
        # MLflow has the model, the journal and the tables, and its run is closed; a later run of these settings
        # trains afresh.
        shutil.rmtree(checkpoint.directory, ignore_errors=True)
    return FinetuneResult(run, uri, evaluation.metrics, samples, verdict, laps.seconds)


def tidy_up(settings: Settings, log: Any) -> None:
    """Before a run: the limit tag:gpu exists, and no run of a dead process still says RUNNING."""
    with get_client(sync_client=True) as client:
        gpus = gpu_count()
        if ensure_limit(client, gpus):
            log.warning("this Prefect server had no limit tag:gpu: created, %d task(s) at a time", gpus)
        try:
            for line in reap(settings.tracking_uri, client, HOOK_SECONDS):
                log.info(line)
        except Exception as error:
            log.warning("runs that died were not looked for: %s", error)


def data_metrics(tokens: TokensRef) -> dict[str, float]:
    """Rows kept, cut and dropped by reason, under the names MLflow shows."""
    counts = tokens.counts
    metrics = {f"data/{split}_rows": rows for split, rows in counts["rows"].items()}
    metrics["data/train_tokens"] = counts["tokens"]["train"]
    metrics["data/truncated_share"] = counts["truncated"] / sum(counts["rows"].values())
    metrics["data/dropped_rows"] = sum(counts["dropped"].values())
    return metrics | {f"data/dropped/{reason}": count for reason, count in counts["dropped"].items()}
