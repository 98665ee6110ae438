"""Tasks ``score_champion`` (tag gpu) and ``promote``: compare the new version with the present champion."""

from __future__ import annotations

import json
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.data.tokens import CodeAlpacaDataset
from model.engine.engine import Engine
from model.engine.scoring import row_losses
from model.files import write_json
from model.net.device import resolve_device, use_precision
from model.net.prompt import encode_examples
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.promotion import Verdict, announce, judge, settle
from ops.tracking.registry import champion, find_version, version_uri
from ops.tracking.runs import RunRef
from ops.tracking.shipping import must_be_logged
from ops.tracking.steps import pipeline_step
from tasks.frozen import load_frozen, load_its_tokenizer
from tasks.load_weights import check_weights
from tasks.references import CheckpointRef, EvaluationRef, RivalRef, TrainingRef
from tasks.weights import registered_weights


@task(name="score_champion", tags=["gpu"], retries=1, retry_delay_seconds=10, cache_policy=NO_CACHE)
@pipeline_step
def score_champion(training: TrainingRef, checkpoint: CheckpointRef, score_rows: int | None, device: str) -> RivalRef:
    """Find the model that the new version is compared with, and score it unless the evaluation has done so.

    The caller holds the device. A champion that cannot be loaded or compared is no failure: the training is done, and
    its version is registered all the same.
    """
    log = get_run_logger()
    settings = Settings.load()
    with must_be_logged(settings.tracking_uri, Path(training.directory)):
        version = champion(settings, training.model.model_size)
    if version is None:
        return RivalRef(f"{training.model.source}, as there is no champion", None)
    uri = version_uri(version)
    rival = RivalRef(f"the champion {uri}", str(version.version))
    if training.model.source == uri:
        return rival
    place = resolve_device(device)
    dtype = use_precision(training.config.precision, place)
    test = CodeAlpacaDataset(Path(training.tokens.directory), "test", limit=score_rows)
    try:
        weights = registered_weights(settings, uri, training.model.model_size, None, log.info)
        champion_model = check_weights(weights, training.model.model_size)
        network = load_frozen(champion_model, training.plan, place, dtype)
        tokenizer = load_its_tokenizer(champion_model)
    except (OSError, ValueError, RuntimeError) as error:
        return RivalRef(rival.name, rival.champion, trouble=str(error))
    examples = encode_examples(
        tokenizer, [row["prompt"] for row in test.rows], [row["completion"] for row in test.rows]
    )
    for index, (ids, _) in enumerate(examples):
        own = test[index]["input_ids"].tolist()
        if ids[: len(own)] != own:
            trouble = f"{uri} has another tokenizer: losses per token of two tokenizers say nothing about each other"
            return RivalRef(rival.name, rival.champion, trouble=trouble)
    max_tokens = checkpoint.micro_batch_tokens
    sums, counts = row_losses(Engine(network.eval(), dtype), test, max_tokens)
    rows = Path(checkpoint.directory) / "champion_rows.json"
    write_json(rows, sums.tolist())
    log.info("the champion %s has a test loss of %.4f over %d rows", uri, sums.sum() / counts.sum(), len(test))
    return RivalRef(rival.name, rival.champion, str(rows))


@task(name="promote", retries=2, retry_delay_seconds=10, cache_policy=NO_CACHE)
@pipeline_step
def promote(run: RunRef, uri: str, evaluation: EvaluationRef, rival: RivalRef, margin: float, seed: int) -> Verdict:
    """Make a new version champion if it is better than its rival beyond doubt, else challenger; send a notice.

    Args:
        uri: of the new version.
        margin: nats per token that the lower bound of the gain must exceed.
        seed: of the bootstrap.

    Raises:
        NotLoggedError: MLflow could not take the decision.
    """
    with must_be_logged(run.tracking_uri, Path(evaluation.rows).parent):
        version = find_version(client(run.tracking_uri), uri)
        if rival.trouble:
            verdict = Verdict(False, f"not compared with {rival.name}: {rival.trouble}", None, rival.champion)
        else:
            records = json.loads(Path(evaluation.rows).read_text())
            losses = json.loads(Path(rival.rows).read_text()) if rival.rows else None
            verdict = judge(records, losses, rival.name, rival.champion, margin, seed)
        verdict = settle(run, version, verdict)
    get_run_logger().info("%s is %s: %s", uri, "champion" if verdict.promoted else "challenger", verdict.reason)
    announce(run, version, verdict)
    return verdict
