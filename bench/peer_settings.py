"""Settings of transformers' Trainer and TRL's SFTTrainer: those that their manuals recommend for speed; defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.measure import Job, Setting
from bench.peers import DEFAULT_ROWS, packed_length, packed_rows, run_hf, run_trl
from model.data.tokens import CodeAlpacaDataset

_GROUPED = "grouped by length, padded"
_RANDOM = "random order, padded"
_HALF = ("bf16", "fp16")


def hf_settings(job: Job) -> list[Setting]:
    """Settings of transformers' Trainer, in the order in which they are tried: best-known first, defaults last."""
    full = job.batch_size
    options: list[dict[str, Any]]
    if job.device == "cpu":
        options = [{"rows_per_pass": _divisor(full, 8)}]
        if 8 < full <= 32:
            options.append({"rows_per_pass": full})
        options.append({"rows_per_pass": _divisor(full, 8), "compiled": True})
    else:
        options = [{"rows_per_pass": full, "compiled": True}, {"rows_per_pass": full}]
        options.append({"rows_per_pass": _divisor(full, 32)})
        if _has_liger():
            options.append({"rows_per_pass": full, "liger": True})
    settings = [Setting("hf", _describe_hf(job, option), run_hf, option) for option in options]
    rows = _divisor(full, DEFAULT_ROWS)
    text = f"default settings: {rows} rows x {full // rows}, {_RANDOM}"
    return [*settings, Setting("hf", text, run_hf, {"rows_per_pass": rows, "defaults": True}, defaults=True)]


def trl_settings(job: Job) -> list[Setting]:
    """Settings of TRL's SFTTrainer, in the order in which they are tried: best-known first, defaults last."""
    per_step = packed_rows(job, CodeAlpacaDataset(job.tokens, "train"))
    options: list[dict[str, Any]]
    if job.device == "cpu":
        options = [
            {"rows_per_pass": 1, "packing": "bfd"},
            {"rows_per_pass": 1, "packing": "wrapped"},
            {"rows_per_pass": _divisor(job.batch_size, 8)},
        ]
    else:
        wrapped = {"rows_per_pass": per_step, "packing": "wrapped"}
        apart = {"rows_per_pass": per_step, "packing": "bfd", "attention": "flash_attention_4"}
        padded = {"rows_per_pass": job.batch_size}
        options = [{**wrapped, "compiled": True}, {**apart, "compiled": True}, wrapped, apart, padded]
        passes = sorted({min(4, per_step), 1}, reverse=True)
        dense: list[dict[str, Any]] = [{"rows_per_pass": rows, "packing": "bfd"} for rows in passes]
        if not _missing(job, "flash_attention_2"):
            dense = [{**apart, "attention": "flash_attention_2"}]
        options += dense
        if _has_liger():
            options += [{**option, "liger": True} for option in (wrapped, dense[0], padded)]
    settings = []
    for option in options:
        missing = _missing(job, option.get("attention"))
        settings.append(Setting("trl", _describe_trl(job, option, per_step), run_trl, option, missing=missing))
    rows = _divisor(job.batch_size, DEFAULT_ROWS)
    text = f"default settings: {rows} rows x {job.batch_size // rows}, {_RANDOM}, gradient checkpointing"
    return [*settings, Setting("trl", text, run_trl, {"rows_per_pass": rows, "defaults": True}, defaults=True)]


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


def _missing(job: Job, attention: str | None) -> str:
    """Why an implementation of attention cannot run: its package, or a precision that it has. Empty if it can."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_4_available

    packages = {
        "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
        "flash_attention_4": ("flash-attn-4", is_flash_attn_4_available),
    }
    if attention is None:
        return ""
    package, is_available = packages[attention]
    if job.precision not in _HALF:
        return f"not run: {attention} computes in {' and '.join(_HALF)} only"
    return "" if is_available() else f"not installed: .venv/bin/pip install {package}"
