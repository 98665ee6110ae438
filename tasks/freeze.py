"""Task ``freeze``: decide by name which parameters train, and count them."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.net.config import FreezeConfig, GPTConfig
from model.net.freezing import FreezePlan, plan_freeze
from ops.tracking.steps import pipeline_step
from tasks.references import ModelRef


@task(name="freeze", cache_policy=NO_CACHE)
@pipeline_step
def freeze(model: ModelRef, config: FreezeConfig) -> FreezePlan:
    """Plan the freeze; ``train`` and ``evaluate`` apply it to the model they load.

    Raises:
        ValueError: num_unfrozen_layers is more than the model's blocks.
    """
    plan = plan_freeze(GPTConfig(**model.config), config)
    get_run_logger().info(
        "%s of %s parameters train (%.1f %%), in %d tensors",
        f"{plan.trainable:,}",
        f"{plan.total:,}",
        100 * plan.share,
        len(plan.names),
    )
    return plan
