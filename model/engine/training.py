"""The public entry of a training: it resumes, and halves the passes that memory does not hold."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from model.data.tokens import CodeAlpacaDataset
from model.engine.checkpoint import FoundCheckpoint, newest_checkpoint
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.journal import check_journal
from model.engine.ranks import ALONE, Ranks
from model.engine.state import CheckpointRecord
from model.engine.trainer import JOURNAL_FILE, Call, StepReport, Trainer, TrainResult
from model.engine.trunk import TrunkCacheConfig
from model.net.device import give_memory_back, let_memory_grow, ran_out_of_memory, use_precision
from model.net.gpt import GPTModel

# A rank has a part of each step, and a capture takes as long as some of its steps: fewer graphs, a bit more padding.
_GRAPH_STEPS_OF_RANKS = 32
# Tokens per pass, about, on a GPU. Longer passes are no faster, but for ranks: a share is one pass rather than two.
_MOST_TOKENS = 32_768
_MOST_TOKENS_OF_RANKS = 40_960
_FEWEST_TOKENS = 1_024  # per pass, about: the shortest that passes become when memory runs out


class PassesTooLongError(RuntimeError):
    """The memory of one rank among several does not hold a pass. All ranks are to be ended, and started again.

    Attributes:
        micro_batch_tokens: tokens per pass to start them with.
    """

    def __init__(self, message: str, micro_batch_tokens: int):
        super().__init__(message)
        self.micro_batch_tokens = micro_batch_tokens


def default_micro_batch_tokens(model: GPTModel, ranks: Ranks = ALONE) -> int:
    """Tokens per pass if the configuration names none.

    On a GPU the activations of a pass take a quarter of its memory, at some 40 bytes x D per token and trained block,
    and a pass has ``_MOST_TOKENS`` or ``_MOST_TOKENS_OF_RANKS`` at most. On a CPU it has 2,048, as longer passes are
    no faster.
    """
    device = model.wte.weight.device
    if device.type != "cuda":
        return 2_048
    kept = 40 * model.config.n_embd * max(1, model.config.n_layer - model.num_frozen)
    memory = torch.cuda.get_device_properties(device).total_memory
    most = _MOST_TOKENS if ranks.world == 1 else _MOST_TOKENS_OF_RANKS
    return max(_FEWEST_TOKENS, min(most, int(memory / 4 / kept) // 1_024 * 1_024))


def train(
    model: GPTModel,
    tokens: Path,
    config: TrainConfig,
    directory: Path,
    identity: str,
    on_step: Callable[[StepReport], None] = lambda report: None,
    warn: Callable[[str], None] = lambda message: None,
    cache: TrunkCacheConfig = TrunkCacheConfig(),  # noqa: B008
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
    finish: Callable[[Callable[[], None]], None] = lambda wait: wait(),
) -> TrainResult:
    """Train a model in place, from the newest checkpoint in ``directory`` if it belongs to the same training.

    The loss of a step is the sum over all its target tokens, divided once by their number (with a prompt_loss_weight,
    by the sum of their weights), however the rows are cut into micro-batches. Order, dropout and schedule depend only
    on seed and step: a resumed training equals an uninterrupted one bit for bit on the same hardware and versions.

    If a GPU's memory does not hold a pass, the training goes on from its last checkpoint with passes half as long. A
    training that resumes this one keeps them. Shorter passes round differently.

    Several ranks call it together with equal arguments. Their batches are those of one process; each rank computes
    the gradients of its share of a step's rows. The result is that of one process but for rounding, and repeats bit
    for bit at the same number of ranks. Only rank 0 uses ``directory``, ``on_step`` and ``warn``.

    Args:
        model: on its device, frozen parameters cast.
        tokens: directory written by ``model.data.preparing.prepare``.
        config: hyper-parameters.
        directory: directory of this training only, for checkpoints ``step-*`` and the journal ``metrics.jsonl``.
        identity: sha256 over everything that determines the training; checkpoints with another one are ignored.
        on_step: called after every step and validation, in order; on a GPU a few steps late. Steps repeated after
            memory ran out are reported again.
        warn: called with a message for each damaged checkpoint, and each time that memory does not hold a pass.
        cache: where the frozen blocks' outputs may be kept; it affects speed only.
        should_stop: called before each step, and often before the first one, while the base is validated; if it
            returns true, the training ends there and can be resumed. With several ranks it ends one step later on all
            of them, if it returned true on any.
        ranks: processes that train together.
        finish: called after the last step with what waits until the last checkpoints are on disk, and raises OSError
            if one cannot be written. The default waits. Without it ``train`` returns earlier, and the model may be
            used for another training meanwhile.

    Raises:
        TrainingStoppedError: should_stop returned true; a checkpoint of the last step, if any, was saved. Raised on
            all ranks.
        NonFiniteError: loss or gradient is not finite; the model is unchanged since the step before, and every
            checkpoint is finite. Raised on all ranks.
        RanksDifferError: parameters are not equal on all ranks. Raised on all ranks.
        PassesTooLongError: one of several ranks cannot hold a pass. Raised on that rank; the others wait for it.
        ValueError: the precision is unknown.
        torch.OutOfMemoryError: memory does not hold the shortest passes either.
    """
    device = model.wte.weight.device
    dtype = use_precision(config.precision, device)
    if model.ln_f.weight.dtype == torch.float64:
        dtype = torch.float64  # for tests that compare to many digits
    model.set_dropout(config.dropout)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products
        let_memory_grow(device)
        torch.cuda.reset_peak_memory_stats(device)
    if not ranks.leads:
        on_step, warn = (lambda report: None), (lambda message: None)
    call = Call(tokens, config, directory, identity, on_step, warn, cache, should_stop, ranks, finish, 0)
    found = ranks.from_first(lambda: _find_checkpoint(call))
    resumed_from = int(found.state["step"]) if found else 0
    return _train_in_passes_that_fit(model, dtype, replace(call, resumed_from=resumed_from), found)


def _find_checkpoint(call: Call) -> FoundCheckpoint | None:
    """The newest checkpoint that fits the training and its journal; None for a fresh start."""
    total_steps = call.config.total_steps(len(CodeAlpacaDataset(call.tokens, "train")))

    def check(record: CheckpointRecord) -> None:
        if record.step > total_steps:
            raise ValueError(f"a checkpoint says step {record.step}, and the training has {total_steps} steps")
        check_journal(call.directory / JOURNAL_FILE, record.journal_lines, record.step, record.eval_losses)

    return newest_checkpoint(call.directory, call.identity, call.warn, check)


def _train_in_passes_that_fit(
    model: GPTModel, dtype: torch.dtype, call: Call, found: FoundCheckpoint | None
) -> TrainResult:
    """Train; where memory runs out, try again from the newest checkpoint with passes half as long.

    Args:
        dtype: to compute in.
        found: the newest checkpoint; None for a fresh start.

    Raises:
        torch.OutOfMemoryError: memory ran out in passes of ``_FEWEST_TOKENS``.
        PassesTooLongError: memory ran out, and this is one of several ranks.
        RuntimeError: memory ran out, and no whole checkpoint is left to go on from.
    """
    wanted = call.config.micro_batch_tokens or default_micro_batch_tokens(model, call.ranks)
    tokens_per_pass = call.ranks.lowest(wanted)
    while True:
        if found:  # a resumed training keeps the passes that memory held
            tokens_per_pass = min(tokens_per_pass, found.state.get("micro_batch_tokens") or tokens_per_pass)
        engine = Engine(model, dtype, call.config.seed, 128 if call.ranks.world == 1 else _GRAPH_STEPS_OF_RANKS)
        if call.cache.shared is not None:
            passes = tokens_per_pass, call.config.batch_size
            engine = call.cache.shared.engine(engine, call.config.seed, passes)
        trainer: Trainer | None = None
        try:
            trainer = Trainer(engine, call, tokens_per_pass, found)
            return trainer.run()
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            reason = ". ".join(str(error).split(". ")[:2])  # memory ran out, and how much was requested
            if _FEWEST_TOKENS < engine.latest_tokens < tokens_per_pass:
                tokens_per_pass = engine.latest_tokens  # the pass that failed was shorter than the limit
            if tokens_per_pass <= _FEWEST_TOKENS:
                raise torch.OutOfMemoryError(
                    f"memory does not hold passes of {tokens_per_pass:,} tokens (micro_batch_tokens): end other "
                    f"processes that use it, lower num_unfrozen_layers or trunk_cache_gb, or use a smaller model "
                    f"({reason})"
                ) from error
            if call.ranks.world > 1:
                raise PassesTooLongError(
                    f"memory of rank {call.ranks.rank} does not hold passes of {tokens_per_pass:,} tokens: start all "
                    f"ranks again with passes half as long ({reason})",
                    max(_FEWEST_TOKENS, tokens_per_pass // 2),
                ) from error
        # Outside the except clause: the error refers to everything that the failed attempt allocated.
        fewer = max(_FEWEST_TOKENS, tokens_per_pass // 2)
        call.warn(
            f"memory does not hold passes of {tokens_per_pass:,} tokens: training goes on from the last checkpoint "
            f"with {fewer:,} (micro_batch_tokens), and steps stay the same ({reason})"
        )
        tokens_per_pass = fewer
        has_trained = trainer is not None and trainer.state.step > 0
        del engine, trainer
        if call.cache.shared is not None:
            call.cache.shared.clear()
        _free_memory(model)
        found = _find_checkpoint(call)
        if has_trained and not found:  # the model is the base no longer, and must not be taken for it
            raise RuntimeError(
                f"{call.directory} has no whole checkpoint to go on from after memory ran out: start the run again, "
                f"with micro_batch_tokens={fewer}"
            )


def _free_memory(model: GPTModel) -> None:
    """Free what a failed attempt allocated: gradients, objects in reference cycles, cached memory."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    give_memory_back()
