"""Task ``train`` (tag gpu): train the top blocks, or resume an earlier try of the same training."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.engine.config import TrainConfig
from model.files import sha256_json
from model.net.device import resolve_device, resolve_precision
from model.net.freezing import FreezePlan
from model.net.tokenizer import import_ahead
from ops.display import KEPT
from ops.settings import Settings
from ops.tracking.runs import RunRef
from ops.tracking.steps import pipeline_step
from tasks.frozen import load_frozen, trunk_cache
from tasks.gang import RAISED, Devices, train_on
from tasks.gang_job import GangJob
from tasks.progress import Progress
from tasks.references import CheckpointRef, ModelRef, TokensRef, TrainingRef
from tasks.resume import describe_kept
from tasks.training import log_training, train_network

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun

_CODE_VERSION = 4  # raise it when equal inputs would train another model


def is_worth_a_retry(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a second try may succeed: a wrong setting, a diverged training or too small a GPU fails again."""
    try:
        state.result(raise_on_failure=True)
    except RAISED:
        return False
    except Exception:
        return True
    return False


def identify_training(
    tokens: TokensRef, model: ModelRef, plan: FreezePlan, config: TrainConfig, device: str
) -> TrainingRef:
    """Collect all that determines a training, and hash it.

    Args:
        device: auto, cpu, cuda or cuda:N; GPUs of one machine count as the same.
    """
    place = resolve_device(device)
    determinants = {
        "code": _CODE_VERSION,
        "tokens": tokens.key,
        "base": model.sha256,
        "trained": plan.names,
        "config": config.determinants(),
        "device": place.type,
        "dtype": str(resolve_precision(config.precision, place)),
    }
    identity = sha256_json(determinants)
    directory = Settings.load().trainings / identity
    return TrainingRef(tokens, model, plan, config, determinants, identity, str(directory))


@task(
    name="train",
    tags=["gpu"],
    retries=1,
    retry_delay_seconds=10,
    retry_condition_fn=is_worth_a_retry,
    cache_policy=NO_CACHE,
)
@pipeline_step
def train(run: RunRef, training: TrainingRef, devices: Devices, trunk_cache_gb: float) -> CheckpointRef:
    """Train, or resume a training of the same data, base, freeze and settings that was interrupted.

    On one device this process trains; on several, a process for each of them, which this one supervises.

    A cancellation or SIGTERM ends it between two steps, with a checkpoint of the last one.

    The caller holds the devices and the training: two at once would overwrite each other's checkpoints.

    Raises:
        GangError: a process of several died, hung, or failed otherwise.
        NonFiniteError: loss or gradient became NaN or infinite.
        RuntimeError: the loaded model trains other parameters than planned.
        NotLoggedError: the training is finished, and MLflow could not take its metrics.
    """
    log = get_run_logger()
    progress = Progress(log)
    import_ahead()  # for the evaluation
    try:
        with progress.courier:
            if devices.need_gang:
                job = GangJob(training, trunk_cache_gb)
                return log_training(run, training, partial(train_on, devices, job, log), progress.show, log)
            return _train_here(run, training, devices.first, trunk_cache_gb, progress, log)
    except BaseException as error:
        if not isinstance(error, Exception):  # a signal, or a cancellation
            log.warning(describe_kept(Path(training.directory)), extra=KEPT)
        raise


def _train_here(
    run: RunRef, training: TrainingRef, device: str, trunk_cache_gb: float, progress: Progress, log: Any
) -> CheckpointRef:
    """Load the base and train it in this process."""
    place = resolve_device(device)
    network = load_frozen(training.model, training.plan, place, resolve_precision(training.config.precision, place))
    with ExitStack() as rest:
        return train_network(network, run, training, trunk_cache(trunk_cache_gb), progress.show, log, rest)()
