"""The pipeline's job as a user of TRL would script it: ``python -m bench.end_to_end_trl --help``.

Stages: read weights and rows, tokenise, train with packing, evaluate, generate, save. After each of them
it prints the seconds since the start of the process.
"""

from __future__ import annotations

import time

_START = time.perf_counter()  # before all other imports, because a user waits for them too

import argparse  # noqa: E402
import itertools  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

_TEST_SHARE, _VALIDATION_SHARE = 0.1, 0.02  # the pipeline's defaults, for data without these splits
_SAMPLES, _NEW_TOKENS = 16, 128
_PACKED = 1024
_MAX_LENGTH = 512


def main() -> None:
    """Run the stages one after the other."""
    options = parse()
    import torch
    import trl.trainer.sft_trainer  # noqa: F401  # trl itself imports nothing before it is used
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.import_utils import is_flash_attn_2_available, is_liger_kernel_available

    done("imports")
    flash = is_flash_attn_2_available() and torch.cuda.is_available()
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.weights,
        attn_implementation="flash_attention_2" if flash else "sdpa",
        dtype=torch.float32,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
    )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    freeze(model, options.num_unfrozen_layers)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.weights)
    tokenizer.pad_token = tokenizer.eos_token
    done("weights")

    rows = read_rows(options.data)
    rows["train"] = list(itertools.islice(itertools.cycle(rows["train"]), options.rows))
    data = {split: tokenise(tokenizer, part) for split, part in rows.items()}
    done(f"{len(data['train'])} training rows tokenised")

    liger = is_liger_kernel_available() and torch.cuda.is_available()
    trainer = build_trainer(model, tokenizer, data, options, flash, liger)
    done("packing")
    trainer.train()
    done(f"{options.epochs} epochs, {trainer.state.global_step} steps")
    for split in ("validation", "test"):
        loss = trainer.evaluate(data[split], metric_key_prefix=split)[f"{split}_loss"]
        done(f"{split} loss {loss:.4f}")
    texts = generate(model, tokenizer, [row["prompt"] for row in rows["test"][:_SAMPLES]])
    done(f"{len(texts)} samples")
    trainer.save_model(options.out)
    done("saved")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end_trl")
    parser.add_argument("--data", type=Path, required=True, help="file or folder of rows")
    parser.add_argument("--weights", type=Path, required=True, help="GPT-2 in Hugging Face's layout")
    parser.add_argument("--tokenizer", type=Path, help="if it is not beside the weights")
    parser.add_argument("--out", type=Path, required=True, help="directory for the tuned model")
    parser.add_argument("--rows", type=int, default=20_000, help="training rows; the data's are repeated up to it")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128, help="rows per optimizer step, about")
    parser.add_argument("--num-unfrozen-layers", type=int, default=4)
    return parser.parse_args()


def done(stage: str) -> None:
    """Print a finished stage with the seconds since the start of the process."""
    print(f"{time.perf_counter() - _START:8.1f} s  {stage}", flush=True)


def freeze(model: Any, num_unfrozen_layers: int) -> None:
    """Leave the top blocks and the final norm trainable."""
    model.requires_grad_(False)
    blocks = model.transformer.h
    for module in (*blocks[len(blocks) - num_unfrozen_layers :], model.transformer.ln_f):
        module.requires_grad_(True)


def read_rows(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by split; if the data has no test or validation split, it is drawn from the training rows."""
    from datasets import Dataset

    from model.data.formats import read_records
    from model.data.layout import find_splits
    from model.data.schemas import normalize_row

    rows = {
        split: [normalize_row(record) for path in paths for record in read_records(path)]
        for split, paths in find_splits(data).items()
    }
    for split, share in (("test", _TEST_SHARE), ("validation", _VALIDATION_SHARE)):
        if split not in rows:
            parts = Dataset.from_list(rows["train"]).train_test_split(share, seed=42)
            rows["train"], rows[split] = parts["train"].to_list(), parts["test"].to_list()
    return rows


def tokenise(tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    """Tokenise rows into TRL's format: ids, and a mask of the response."""
    from datasets import Dataset

    from model.net.prompt import encode_examples

    examples = encode_examples(tokenizer, [row["prompt"] for row in rows], [row["completion"] for row in rows])
    kept = [(ids[:_MAX_LENGTH], prompt) for ids, prompt in examples if prompt < _MAX_LENGTH]
    return Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in kept],
            "completion_mask": [[0] * prompt + [1] * (len(ids) - prompt) for ids, prompt in kept],
        }
    )


def build_trainer(
    model: Any, tokenizer: Any, data: dict[str, Any], options: argparse.Namespace, flash: bool, liger: bool
) -> Any:
    """SFTTrainer with packing, with about ``batch_size`` rows of the data per step."""
    from trl import SFTConfig, SFTTrainer

    length = min(_PACKED, model.config.n_positions)
    mean = sum(map(len, data["train"]["input_ids"])) / len(data["train"])
    per_step = max(1, round(options.batch_size * mean / length))
    arguments = SFTConfig(
        output_dir=str(options.out),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=per_step,
        per_device_eval_batch_size=per_step,
        packing=True,
        # Without flash attention, keeping documents apart takes a dense mask and is three times slower. TRL's fastest
        # setting is used then, in which documents attend to each other.
        packing_strategy="bfd" if flash else "wrapped",
        max_length=length,
        completion_only_loss=True,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        bf16=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        gradient_checkpointing=False,
        use_liger_kernel=liger,
        dataloader_num_workers=2 if model.device.type == "cuda" else 0,
        prediction_loss_only=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return SFTTrainer(model=model, args=arguments, train_dataset=data["train"], processing_class=tokenizer)


def generate(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Sample completions of all prompts in one batch, padded on the left."""
    import torch

    from model.net.prompt import format_prompt

    texts = [format_prompt({"prompt": prompt}) for prompt in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        ids = model.generate(
            **batch,
            max_new_tokens=_NEW_TOKENS,
            do_sample=True,
            temperature=0.7,
            top_k=50,
            top_p=0.95,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    return [str(text) for text in tokenizer.batch_decode(ids[:, batch["input_ids"].size(1) :])]


if __name__ == "__main__":
    main()
