"""Task ``choose``: choose the rows of a night by the ledger of the nights before."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from model.data.config import PrepareConfig
from model.data.preparing import training_keys
from model.files import atomic_directory, sha256_json
from model.net.config import GPTConfig
from model.net.layout import CONFIG_FILE
from model.net.tokenizer import load_tokenizer
from ops.settings import Settings
from ops.tracking.ledger import choose_rows, read_ledger, write_choice
from ops.tracking.registry import model_name
from ops.tracking.steps import pipeline_step
from tasks.references import Sources, SubsetRef


@task(name="choose", cache_policy=NO_CACHE)
@pipeline_step
def choose(
    sources: Sources, size: str, dataset: str, config: PrepareConfig, count: int | None, replay_share: float
) -> SubsetRef | None:
    """Choose rows that no successful night of this size has trained on, and rows that one has, for replay.

    The caller holds the nights of this size: two at once would choose the same rows.

    Args:
        dataset: as the user gave it.
        config: how the rows are going to be prepared.
        count: fresh rows at most.
        replay_share: of all rows of the night, the share that was used before.

    Returns:
        The rows; None if there are no fresh ones.

    Raises:
        ValueError: too many unusable rows.
        RuntimeError: the ledger cannot be read.
    """
    log = get_run_logger()
    settings = Settings.load()
    weights = sources.weights
    shape = GPTConfig.from_json(Path(weights.directory) / CONFIG_FILE, weights.files[CONFIG_FILE])
    tokenizer = load_tokenizer(weights.tokenizer_directory, shape.vocab_size, weights.tokenizer_files)
    present, held_out = training_keys(sources.dataset.paths, tokenizer, config)
    sources.dataset.check()
    ledger = read_ledger(settings.tracking_uri, model_name(size), dataset, settings.ledger)
    leaked = len(set(held_out.tolist()) & set(ledger.used.tolist()))
    if leaked:
        log.warning(
            "earlier nights trained on %d of the %d rows held out now, so that the champion looks better than it is: "
            "set split_seed, test_share and validation_share as they were then, or return the rows to their split",
            leaked,
            len(held_out),
        )
    choice = choose_rows(present, ledger, count, replay_share, config.split_seed)
    if not len(choice.fresh):
        log.info("nights have trained on each of the %d rows, and there are no new rows", len(present))
        return None
    left = len(present) - len(choice.fresh) - len(set(present.tolist()) & set(ledger.used.tolist()))
    log.info("%d fresh rows, %d old ones; %d are left for later nights", len(choice.fresh), len(choice.replay), left)
    folder = settings.subsets / sha256_json([choice.sha256, config.determinants(), sorted(choice.fresh.tolist())])
    with atomic_directory(folder) as scratch:
        name = write_choice(choice, scratch).name
    return SubsetRef(str(folder), str(folder / name), choice.sha256, len(choice.fresh), len(choice.replay))
