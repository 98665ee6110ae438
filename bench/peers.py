"""transformers' Trainer and TRL's SFTTrainer on the same job; ``bench/peer_settings.py`` lists their settings.

Whether packed documents attend to each other, in transformers 5.17 and 5.23 with TRL 1.16:

- ``packing="wrapped"``: the collator returns an attention mask of ones, so every token attends to the documents
  before its own in the row. This launches less work but is not the same training; it is measured because people use
  it.
- ``packing="bfd"``: the collator joins all rows of a pass and returns position ids that restart with each document,
  and no attention mask. ``create_causal_mask`` of transformers finds the documents by these restarts. With
  flash_attention_2 and flash_attention_4, attention is then computed for each document separately. With sdpa a (T, T)
  mask over all T tokens of a pass is built, and all pairs of tokens are computed: correct, but the cost grows with
  the square of T, so a pass has only a few packed rows. Both versions refuse flex_attention for GPT-2.

**Dropout.** GPT2Config's default is 0.1 after the embeddings, attention's softmax, its projection and the MLP, in
frozen blocks too. A setting that does the job's training has the job's rate, in the trained blocks only. transformers
drops the rate of attention without a word where the kernel takes none, as FlashAttention 4's (4.0.0b36) does: such a
setting trains with less noise than the job, and its description says so.

**Default settings** are those of TrainingArguments, SFTConfig and GPT2Config. Only what the job or the measurement
fixes is set: trained parameters, targets, and as many passes of the default 8 rows as an optimizer step has.

Liger patches models by type, and version 0.8.5 does not know "gpt2". TRL 1.16 moreover computes its loss on response
tokens in chunks by itself, and deprecates the flag.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.measure import WINDOWS, Job, Measurement, Meter, Precision, describe_dropout
from model.data.tokens import IGNORE, CodeAlpacaDataset
from model.net.device import resolve_device

_TOKENS, _TARGETS = "bench_tokens", "bench_targets"  # keys of plain numbers in a batch

# Modules imported before the first setting, and the command that installs them.
LIBRARIES: dict[str, Sequence[str]] = {
    "hf": ("accelerate", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"),
    "trl": ("accelerate", "datasets", "transformers.models.gpt2.modeling_gpt2", "trl.trainer.sft_trainer"),
}
INSTALL = ".venv/bin/pip install -c constraints.txt -e '.[dev,bench]'"
DEFAULT_ROWS = 8  # per pass: default of TrainingArguments.per_device_train_batch_size
WITHOUT_DROPOUT = ("flash_attention_4",)  # attention implementations that take no dropout rate


class CountingCollator:
    """A collator that also counts the real tokens and targets of a batch.

    The tokens are counted in the collator's input, which has no padding.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows)
        batch[_TOKENS] = sum(len(row["input_ids"]) for row in rows)
        batch[_TARGETS] = int((batch["labels"][:, 1:] != IGNORE).sum())
        return batch


class PaddingCollator:
    """Pads rows on the right to the length of the longest, rounded up to a multiple of 8 for tensor cores."""

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        length = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
        batch = {
            "input_ids": torch.zeros(len(rows), length, dtype=torch.long),
            "labels": torch.full((len(rows), length), IGNORE),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        }
        for place, row in enumerate(rows):
            size = len(row["input_ids"])
            batch["input_ids"][place, :size] = row["input_ids"]
            batch["labels"][place, :size] = row["labels"]
            batch["attention_mask"][place, :size] = 1
        return batch


def measured(trainer_class: type, meter: Meter) -> type:
    """A subclass of a Trainer that counts each batch it trains on, and stops when the meter needs no further step."""
    from transformers import TrainerCallback

    class EndOfStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = meter.step_done()
            return control

    class Measured(trainer_class):
        def __init__(self, **arguments: Any):
            super().__init__(**arguments, callbacks=[EndOfStep()])
            self.data_collator: Any = CountingCollator(self.data_collator)

        def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
            meter.count(inputs.pop(_TOKENS), inputs.pop(_TARGETS))
            return super().training_step(model, inputs, *arguments, **named)

    return Measured


def build_model(job: Job, attention: str = "sdpa", defaults: bool = False) -> Any:
    """GPT2LMHeadModel of the job's shape on the device: random weights, frozen like the engine's.

    Args:
        attention: transformers' name of the implementation.
        defaults: whether dropout is GPT2Config's default; else it is the job's, where the job has it.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = job.config.to_json()
    if defaults:
        shape = {name: value for name, value in shape.items() if not name.endswith("_pdrop")}
    config = GPT2Config(**shape)
    torch.manual_seed(0)
    with torch.device(resolve_device(job.device)):
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    model.requires_grad_(False)
    blocks = model.transformer.h
    trained = blocks[len(blocks) - job.num_unfrozen_layers :]
    for module in (*trained, model.transformer.ln_f):
        module.requires_grad_(True)
    if not defaults:
        for block in trained:
            for dropout in _dropouts(block):
                dropout.p = job.dropout
    return model


def _dropouts(block: Any) -> tuple[torch.nn.Dropout, ...]:
    """The places of dropout in a block; attention reads its rate from the first."""
    return block.attn.attn_dropout, block.attn.resid_dropout, block.mlp.dropout


def dropout_of(model: Any) -> str:
    """Rate and places of the dropout in a model that ``build_model`` returned, read from its modules."""
    embeddings: float = model.transformer.drop.p
    frozen: set[float] = set()
    trained: set[float] = set()
    for block in model.transformer.h:
        trains = next(block.parameters()).requires_grad
        (trained if trains else frozen).update(dropout.p for dropout in _dropouts(block))
    if embeddings and frozen | trained == {embeddings}:
        text = f"{embeddings:g} in all blocks and embeddings"
    elif not embeddings and frozen <= {0.0} and len(trained) <= 1:
        text = describe_dropout(max(trained, default=0.0))
    else:
        text = f"{sorted(trained)} in trained and {sorted(frozen)} in frozen blocks, {embeddings:g} in embeddings"
    if text != describe_dropout(0.0) and model.config._attn_implementation in WITHOUT_DROPOUT:
        text += ", none in attention"
    return text


def _arguments(job: Job, rows_per_pass: int, passes: int, **settings: Any) -> dict[str, Any]:
    """TrainingArguments that both trainers share where they do the job."""
    on_gpu = job.device == "cuda"
    return {
        **_fixed_arguments(job, rows_per_pass, passes),
        **precision_arguments(job.precision),
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-4,
        "logging_steps": 50,
        "dataloader_num_workers": 2 if on_gpu else 0,
        "dataloader_persistent_workers": on_gpu,
        "gradient_checkpointing": False,
        **settings,
    }


def _fixed_arguments(job: Job, rows_per_pass: int, passes: int) -> dict[str, Any]:
    """TrainingArguments that the job and the measurement fix, for default settings too."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": rows_per_pass,
        "gradient_accumulation_steps": passes,
        "max_steps": job.warm_up + job.steps,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
    }


def precision_arguments(precision: Precision) -> dict[str, bool]:
    """TrainingArguments for a precision.

    transformers turns TF32 on by itself if a model is compiled. That is left as it is in bf16 and fp16, and is turned
    off in fp32, whose products would not be fp32 otherwise.
    """
    arguments = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    if precision in ("fp32", "tf32"):
        arguments["tf32"] = precision == "tf32"
    return arguments


def hold_precision(precision: Precision) -> None:
    """Set how fp32 products are computed from now on, whatever libraries have set."""
    if precision in ("fp32", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"


def precision_of(arguments: Any, device: torch.device) -> Precision:
    """The precision of a training that has just ended: without bf16 and fp16, found by a product."""
    if arguments.bf16:
        return "bf16"
    if arguments.fp16:
        return "fp16"
    # TF32 has 11 significant bits, and this number needs 13.
    number = torch.full((64, 64), 1 + 2.0**-12, device=device)
    exact = torch.equal(number @ torch.eye(64, device=device), number)
    return "fp32" if exact else "tf32"


def run_hf(
    job: Job, rows_per_pass: int, compiled: bool = False, liger: bool = False, defaults: bool = False
) -> list[Measurement]:
    """transformers' Trainer, with rows of similar length in a pass, padded to the longest.

    Args:
        defaults: whether to leave all settings at their defaults; then rows are in random order.
    """
    from transformers import Trainer, TrainingArguments

    model = build_model(job, defaults=defaults)
    rows = CodeAlpacaDataset(job.tokens, "train")
    job = _warmed_up(job, rows, compiled)
    passes = job.batch_size // rows_per_pass
    settings = _arguments(
        job,
        rows_per_pass,
        passes,
        train_sampling_strategy="group_by_length",
        torch_compile=compiled,
        use_liger_kernel=liger,
        remove_unused_columns=False,
    )
    if defaults:
        settings = _fixed_arguments(job, rows_per_pass, passes)
    arguments = TrainingArguments(**settings)
    meter = Meter(model.device, job.warm_up, job.steps, window=None if defaults else grouped_window(job, rows))
    trainer = measured(Trainer, meter)(
        model=model, args=arguments, train_dataset=rows, data_collator=PaddingCollator()
    )
    if not defaults:
        hold_precision(job.precision)
    trainer.train()
    return [meter.measurement(precision_of(arguments, model.device), dropout_of(model))]


def run_trl(
    job: Job,
    rows_per_pass: int,
    packing: str | None = None,
    attention: str = "sdpa",
    compiled: bool = False,
    liger: bool = False,
    defaults: bool = False,
) -> list[Measurement]:
    """TRL's SFTTrainer with completion-only loss.

    Args:
        rows_per_pass: packed rows per pass, or without packing rows of the data.
        packing: TRL's strategy, or None for padding.
        defaults: whether to leave all settings at their defaults; then rows are in random order.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from model.net.tokenizer import load_tokenizer

    model = build_model(job, attention, defaults)
    rows = CodeAlpacaDataset(job.tokens, "train")
    job = _warmed_up(job, rows, compiled)
    records = Dataset.from_list([_trl_record(rows, index) for index in range(len(rows))])
    tokenizer = load_tokenizer(job.tokenizer, job.config.vocab_size)
    rows_per_step = packed_rows(job, rows) if packing else job.batch_size
    passes = max(1, round(rows_per_step / rows_per_pass))
    rows_per_pass = min(rows_per_pass, rows_per_step)
    settings = _arguments(
        job,
        rows_per_pass,
        passes,
        packing=packing is not None,
        packing_strategy=packing or "bfd",
        max_length=packed_length(job),
        completion_only_loss=True,
        train_sampling_strategy="random" if packing else "group_by_length",
        torch_compile=compiled,
        use_liger_kernel=liger,
    )
    if defaults:
        settings = {**_fixed_arguments(job, rows_per_pass, passes), "completion_only_loss": True}
    arguments = SFTConfig(**settings)
    random = packing or defaults
    meter = Meter(model.device, job.warm_up, job.steps, window=None if random else grouped_window(job, rows))
    trainer = measured(SFTTrainer, meter)(
        model=model, args=arguments, train_dataset=records, processing_class=tokenizer
    )
    if not defaults:
        hold_precision(job.precision)
    trainer.train()
    return [meter.measurement(precision_of(arguments, model.device), dropout_of(model))]


def _warmed_up(job: Job, rows: CodeAlpacaDataset, compiled: bool) -> Job:
    """The job; if compiled, with a warm-up of at least one epoch, so that little is compiled while it is measured."""
    steps = math.ceil(len(rows) / job.batch_size)
    return replace(job, warm_up=max(job.warm_up, steps)) if compiled else job


def _trl_record(rows: CodeAlpacaDataset, index: int) -> dict[str, list[int]]:
    length, prompt = (int(n) for n in rows.lengths[index])
    return {
        "input_ids": rows[index]["input_ids"].tolist(),
        "completion_mask": [0] * prompt + [1] * (length - prompt),
    }


def grouped_window(job: Job, rows: CodeAlpacaDataset) -> int:
    """Steps per window when rows are grouped by length.

    transformers' sampler sorts the rows of each mega-batch, so steps go from long rows to short ones repeatedly. A
    window over a part of a mega-batch would be slower or faster than the training.
    """
    mega_batch = min(max(1, len(rows) // (4 * job.batch_size)), 50)
    return mega_batch * max(1, job.steps // (WINDOWS * mega_batch))


def packed_length(job: Job) -> int:
    """Length of a packed row in tokens."""
    return min(1024, job.config.n_positions)


def packed_rows(job: Job, rows: CodeAlpacaDataset) -> int:
    """Number of packed rows with about as many tokens as one optimizer step of the job."""
    return max(1, round(job.batch_size * float(rows.lengths[:, 0].mean()) / packed_length(job)))
