"""transformers' Trainer and TRL's SFTTrainer on the same job, in the settings that their manuals recommend for speed.

Whether packed documents attend to each other, in transformers 5.17 and 5.23 with TRL 1.16:

- ``packing="wrapped"``: the collator returns an attention mask of ones, so every token attends to the documents
  before its own in the row. This launches less work but is not the same training; it is measured because people use
  it.
- ``packing="bfd"``: the collator joins all rows of a pass and returns position ids that restart with each document,
  and no attention mask. ``create_causal_mask`` of transformers finds the documents by these restarts. With
  flash_attention_2, attention is then computed for each document separately. With sdpa a (T, T) mask over all T
  tokens of a pass is built, and all pairs of tokens are computed: correct, but the cost grows with the square of T,
  so a pass has only a few packed rows. Both versions refuse flex_attention for GPT-2.

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

from bench.measure import WINDOWS, Job, Measurement, Meter, Setting
from model.data.tokens import IGNORE, CodeAlpacaDataset
from model.net.device import resolve_device, resolve_precision

_GROUPED = "grouped by length, padded"
_TOKENS, _TARGETS = "bench_tokens", "bench_targets"  # keys of plain numbers in a batch

# Modules imported before the first setting, and the command that installs them.
LIBRARIES: dict[str, Sequence[str]] = {
    "hf": ("accelerate", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"),
    "trl": ("accelerate", "datasets", "transformers.models.gpt2.modeling_gpt2", "trl.trainer.sft_trainer"),
}
INSTALL = ".venv/bin/pip install -c constraints.txt -e '.[dev,bench]'"


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


def build_model(job: Job, attention: str = "sdpa") -> Any:
    """GPT2LMHeadModel of the job's shape on the device: random weights, frozen like the engine's, no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(**job.config.to_json())
    torch.manual_seed(0)
    with torch.device(resolve_device(job.device)):
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
    model.requires_grad_(False)
    blocks = model.transformer.h
    for module in (*blocks[len(blocks) - job.num_unfrozen_layers :], model.transformer.ln_f):
        module.requires_grad_(True)
    return model


def _arguments(job: Job, rows_per_pass: int, passes: int, **settings: Any) -> dict[str, Any]:
    """TrainingArguments that both trainers share."""
    device = resolve_device(job.device)
    on_gpu = device.type == "cuda"
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": rows_per_pass,
        "gradient_accumulation_steps": passes,
        "max_steps": job.warm_up + job.steps,
        "bf16": resolve_precision(job.precision, device) == torch.bfloat16,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-4,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_num_workers": 2 if on_gpu else 0,
        "dataloader_persistent_workers": on_gpu,
        "gradient_checkpointing": False,
        "use_cpu": not on_gpu,
        **settings,
    }


def run_hf(job: Job, rows_per_pass: int, compiled: bool = False, liger: bool = False) -> list[Measurement]:
    """transformers' Trainer, with rows of similar length in a pass, padded to the longest."""
    from transformers import Trainer, TrainingArguments

    model = build_model(job)
    rows = CodeAlpacaDataset(job.tokens, "train")
    job = _warmed_up(job, rows, compiled)
    meter = Meter(model.device, job.warm_up, job.steps, window=grouped_window(job, rows))
    settings = _arguments(
        job,
        rows_per_pass,
        job.batch_size // rows_per_pass,
        train_sampling_strategy="group_by_length",
        torch_compile=compiled,
        use_liger_kernel=liger,
        remove_unused_columns=False,
    )
    trainer = measured(Trainer, meter)(
        model=model, args=TrainingArguments(**settings), train_dataset=rows, data_collator=PaddingCollator()
    )
    trainer.train()
    return [meter.measurement(resolve_precision(job.precision, model.device))]


def run_trl(
    job: Job,
    rows_per_pass: int,
    packing: str | None = None,
    attention: str = "sdpa",
    compiled: bool = False,
    liger: bool = False,
) -> list[Measurement]:
    """TRL's SFTTrainer with completion-only loss.

    Args:
        rows_per_pass: packed rows per pass, or without packing rows of the data.
        packing: TRL's strategy, or None for padding.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from model.net.tokenizer import load_tokenizer

    model = build_model(job, attention)
    rows = CodeAlpacaDataset(job.tokens, "train")
    job = _warmed_up(job, rows, compiled)
    records = Dataset.from_list([_trl_record(rows, index) for index in range(len(rows))])
    tokenizer = load_tokenizer(job.tokenizer, job.config.vocab_size)
    length = packed_length(job)
    rows_per_step = packed_rows(job, rows) if packing else job.batch_size
    meter = Meter(model.device, job.warm_up, job.steps, window=None if packing else grouped_window(job, rows))
    settings = _arguments(
        job,
        min(rows_per_pass, rows_per_step),
        max(1, round(rows_per_step / rows_per_pass)),
        packing=packing is not None,
        packing_strategy=packing or "bfd",
        max_length=length,
        completion_only_loss=True,
        train_sampling_strategy="random" if packing else "group_by_length",
        torch_compile=compiled,
        use_liger_kernel=liger,
    )
    trainer = measured(SFTTrainer, meter)(
        model=model, args=SFTConfig(**settings), train_dataset=records, processing_class=tokenizer
    )
    trainer.train()
    return [meter.measurement(resolve_precision(job.precision, model.device))]


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


def hf_settings(job: Job) -> list[Setting]:
    """Settings of transformers' Trainer, in the order in which they are tried: best-known first."""
    full = job.batch_size
    options: list[dict[str, Any]] = [{"rows_per_pass": full}]
    if job.device == "cpu":
        options = [{"rows_per_pass": _divisor(full, 8)}]
        if 8 < full <= 32:
            options.append({"rows_per_pass": full})
        options.append({"rows_per_pass": _divisor(full, 8), "compiled": True})
    else:
        options.append({"rows_per_pass": full, "compiled": True})
        options.append({"rows_per_pass": _divisor(full, 32)})
        if _has_liger():
            options.append({"rows_per_pass": full, "liger": True})
    return [Setting("hf", _describe_hf(job, option), run_hf, option) for option in options]


def trl_settings(job: Job) -> list[Setting]:
    """Settings of TRL's SFTTrainer, in the order in which they are tried: best-known first."""
    per_step = packed_rows(job, CodeAlpacaDataset(job.tokens, "train"))
    options: list[dict[str, Any]]
    if job.device == "cpu":
        options = [
            {"rows_per_pass": 1, "packing": "bfd"},
            {"rows_per_pass": 1, "packing": "wrapped"},
            {"rows_per_pass": _divisor(job.batch_size, 8)},
        ]
    else:
        documents: dict[str, Any] = {"rows_per_pass": min(4, per_step), "packing": "bfd"}
        if _has_flash_attention():
            documents = {"rows_per_pass": per_step, "packing": "bfd", "attention": "flash_attention_2"}
        wrapped = {"rows_per_pass": per_step, "packing": "wrapped"}
        padded = {"rows_per_pass": job.batch_size}
        options = [wrapped, documents, padded, {**wrapped, "compiled": True}]
        if "attention" not in documents:
            options.append({**documents, "rows_per_pass": 1})
        if _has_liger():
            options += [{**option, "liger": True} for option in (wrapped, documents, padded)]
    return [Setting("trl", _describe_trl(job, option, per_step), run_trl, option) for option in options]


def _divisor(rows: int, most: int) -> int:
    """The largest number of rows per pass, up to ``most``, that divides the rows of a step."""
    return max(n for n in range(1, min(rows, most) + 1) if rows % n == 0)


def _describe_hf(job: Job, option: Mapping[str, Any]) -> str:
    passes = job.batch_size // option["rows_per_pass"]
    return ", ".join([f"{option['rows_per_pass']} rows x {passes}", _GROUPED, *_flags(option)])


def _describe_trl(job: Job, option: Mapping[str, Any], per_step: int) -> str:
    rows = option["rows_per_pass"]
    if "packing" not in option:
        return ", ".join([f"{rows} rows x {job.batch_size // rows}", _GROUPED, *_flags(option)])
    passes = max(1, round(per_step / rows))
    parts = [f"{rows} x {packed_length(job)} tokens x {passes}", f"packing {option['packing']}"]
    if option["packing"] == "wrapped":
        parts.append("no document mask")
    elif "attention" in option:
        parts.append(f"documents apart by {option['attention']}")
    else:
        parts.append("documents apart by a dense sdpa mask")
    return ", ".join([*parts, *_flags(option)])


def _flags(option: Mapping[str, Any]) -> list[str]:
    flags = ["torch_compile"] if option.get("compiled") else []
    if option.get("liger"):
        flags.append("Liger")
    return flags


def _has_liger() -> bool:
    from transformers.utils.import_utils import is_liger_kernel_available

    return bool(is_liger_kernel_available())


def _has_flash_attention() -> bool:
    from transformers.utils.import_utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())
