"""Training speed of the engine and of its peers on one machine: ``python -m bench.train --help``.

All train GPT-2 of the same size on the same rows, with the same trainable parameters, the loss on the same tokens,
and AdamW. The weights are random: training them takes as long as training pretrained ones. Speed is useful tokens per
second, without padding. Progress and a table are printed; the last line is JSON with everything in them.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.comparison import compare, record, table
from bench.engine import run_engine
from bench.measure import Job, Measurement, Setting, resolved_name, use_processor_time
from bench.memory import AS_IT_COMES, memory_settings, memory_table
from bench.options import parse
from bench.peer_settings import hf_settings, trl_settings
from bench.peers import INSTALL, LIBRARIES
from bench.processes import ChildError, import_all, in_one_sentence, quiet_environment, run_apart, show_one_gpu
from bench.report import Progress, print_report
from bench.tutorial import BATCH_SIZE, LENGTH, run_tutorial
from model.engine.flops import matmul_ceiling
from model.net.device import PRODUCT_CACHES, peak_memory, processor_name, resolve_device, use_precision

_LIBRARIES_SHOWN = ("torch", "transformers", "accelerate", "trl", "liger-kernel", "flash-attn", "flash-attn-4")
_SMALL_PASS = 1024  # tokens: as few as in a peer's smallest passes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    say = Progress()
    quiet_environment()
    options = parse(arguments)
    if options.device != "cpu":
        show_one_gpu(options.device)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        job, data = prepare_job(options, Path(scratch))
        say(f"{data['rows']} rows, {data['tokens']} tokens, {data['target_share']:.1%} of them targets")
        machine = run_apart(describe_machine, job.device, options.precision, job.processor_time, timeout=120)
        job = replace(job, precision=machine["precision"])
        ceiling = machine["matmul_ceiling_flops"]
        say(f"{machine['name']}: {ceiling / 1e12:.3g} TFLOP/s in {job.precision} products")
        results: list[dict[str, Any]] = []
        for name in options.peers:
            results += run_contestant(name, job, options, ceiling, say)
    compare(results)
    report = {
        "machine": machine["name"],
        "device": options.device,
        "precision": job.precision,
        "dropout": job.dropout,
        "matmul_ceiling_flops": ceiling,
        "versions": versions(),
        "model_size": job.model_size,
        "num_unfrozen_layers": job.num_unfrozen_layers,
        "batch_size": job.batch_size,
        "epochs": job.epochs,
        "steps": job.steps,
        "clock": "processor time of one thread" if job.processor_time else "wall",
        "data": data,
        "results": results,
    }
    print_report(memory_table(results) if options.memory_table else table(results), report, options.out)


def prepare_job(options: argparse.Namespace, scratch: Path) -> tuple[Job, dict[str, Any]]:
    """Tokenise the rows as the pipeline does. Returns the job, and a description of its training rows."""
    from model.data.config import PrepareConfig
    from model.data.layout import find_splits
    from model.data.preparing import prepare
    from model.demo import EMBEDDED_BASE
    from model.demo.grammar import write_rows
    from model.net.tokenizer import load_tokenizer

    warm_up = max(1, options.steps // 4)
    rows = options.rows
    if rows is None and options.device == "cpu":
        rows = options.batch_size * (warm_up + options.steps)
    if not options.data:
        write_rows(scratch / "rows")
    job = Job(
        tokens=scratch / "tokens",
        tokenizer=options.tokenizer or EMBEDDED_BASE,
        model_size=options.size,
        num_unfrozen_layers=options.num_unfrozen_layers,
        batch_size=options.batch_size,
        device=options.device.partition(":")[0],
        precision="fp32",  # until the device has said what auto is
        warm_up=warm_up,
        steps=options.steps,
        epochs=options.epochs,
        processor_time=options.processor_time,
        dropout=options.dropout,
    )
    config = PrepareConfig(max_length=options.max_length, subset_count=rows)
    tokenizer = load_tokenizer(job.tokenizer, job.config.vocab_size)
    meta = prepare(find_splits(options.data or scratch / "rows"), tokenizer, config, job.tokens)
    lengths = np.load(job.tokens / "train.lengths.npy")
    counts = {name: int(meta["counts"][name]["train"]) for name in ("rows", "tokens", "target_tokens")}
    data = {
        "source": options.data.name if options.data else "embedded",
        "sha256": meta["data_sha256"],
        **counts,
        "target_share": counts["target_tokens"] / counts["tokens"],
        "mean_length": float(lengths[:, 0].mean()),
        "max_length": int(lengths[:, 0].max()),
    }
    return job, data


def describe_machine(device_name: str, precision: str, processor_time: bool = False) -> dict[str, Any]:
    """In a child process: name of the device, precision, and operations per second in its matrix products."""
    if processor_time:
        torch.set_num_threads(1)
    device = resolve_device(device_name)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    resolved = resolved_name(precision, device)
    ceiling = matmul_ceiling(device, use_precision(resolved, device))
    return {"name": name, "precision": resolved, "matmul_ceiling_flops": ceiling}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that affect speed; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _LIBRARIES_SHOWN:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def settings_of(name: str, job: Job, options: argparse.Namespace) -> list[Setting]:
    """A contestant's settings, best-known first."""
    if name == "engine":
        if options.memory_table:
            return memory_settings(options.micro_batch_tokens, options.trunk_cache_gb)
        settings = [Setting(name, AS_IT_COMES, run_engine)]
        if job.device != "cpu":  # the same optimizer steps in little memory
            text = f"passes of {_SMALL_PASS:,} tokens, trunk outputs not kept"
            small = {"micro_batch_tokens": _SMALL_PASS, "trunk_cache_bytes": 0}
            settings.append(Setting(name, text, run_engine, small))
        return settings
    if name == "tutorial":
        return [Setting(name, f"fp32, {BATCH_SIZE} rows, padded to {LENGTH}", run_tutorial)]
    return hf_settings(job) if name == "hf" else trl_settings(job)


def run_contestant(
    name: str, job: Job, options: argparse.Namespace, ceiling: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Measure a contestant's settings.

    Returns:
        A record for each setting and phase. For a setting that failed or was not run it has ``error`` and no numbers.
    """
    try:
        import_all(LIBRARIES.get(name, ()))
    except ImportError as error:
        say(f"{name}: not installed ({error}): {INSTALL}")
        return [{"contestant": name, "settings": None, "error": f"not installed ({error}): {INSTALL}"}]
    records: list[dict[str, Any]] = []
    tried = 0
    for setting in settings_of(name, job, options):
        if left_out := why_not(setting, tried, options):
            records.append({"contestant": name, "settings": setting.text, "error": left_out})
            continue
        tried += not setting.defaults
        say(f"{name}: {setting.text} ...")
        try:
            measurements, memory = run_apart(run_setting, setting, job, timeout=options.timeout)
        except ChildError as error:
            say(f"{name}: {error}")
            records.append({"contestant": name, "settings": setting.text, "error": str(error)})
            continue
        for measurement in measurements:
            records.append(record(setting, measurement, memory, job, ceiling))
            say(f"{name}, {measurement.phase}: {measurement.tokens_per_second:,.0f} useful tokens/s")
    return records


def why_not(setting: Setting, tried: int, options: argparse.Namespace) -> str:
    """Why a setting is not run; empty if it is.

    Args:
        tried: number of settings of its contestant that were run, its default settings not counted.
    """
    for text in options.skip:
        if text in setting.text:
            return f"not run: --skip {text}"
    if setting.missing:
        return setting.missing
    if tried == options.settings_limit and not setting.defaults:
        return f"not run: --settings-limit {tried}"
    return ""


def run_setting(setting: Setting, job: Job) -> tuple[list[Measurement], int]:
    """In a child process: measure a setting. Returns the measurements, and the peak memory in bytes."""
    if setting.contestant != "engine":  # peers run with their libraries' defaults
        for name in PRODUCT_CACHES:
            os.environ.pop(name, None)
    if job.processor_time:
        use_processor_time()
    measurements = setting.run(job, **setting.options)
    return measurements, peak_memory(resolve_device(job.device))


if __name__ == "__main__":
    with in_one_sentence():
        main()
