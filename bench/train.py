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
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.engine import run_engine
from bench.measure import FIRST_EPOCH, LATER_EPOCHS, Job, Measurement, Setting, use_processor_time
from bench.peers import INSTALL, LIBRARIES, hf_settings, trl_settings
from bench.processes import (
    ChildError,
    import_all,
    in_one_sentence,
    positive,
    quiet_environment,
    run_apart,
    show_one_gpu,
)
from bench.report import Progress, align, print_report
from bench.tutorial import BATCH_SIZE, LENGTH, run_tutorial
from model.engine.flops import matmul_ceiling, necessary_flops
from model.net.config import PRESETS
from model.net.device import PRODUCT_CACHES, peak_memory, resolve_device, resolve_precision

PEERS = ("engine", "tutorial", "hf", "trl")
_LIBRARIES_SHOWN = ("torch", "transformers", "accelerate", "trl", "liger-kernel", "flash-attn")
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
        machine = run_apart(describe_machine, job.device, job.precision, job.processor_time, timeout=120)
        say(f"{machine['name']}: {machine['matmul_ceiling_flops'] / 1e12:.3g} TFLOP/s in {machine['dtype']} products")
        results: list[dict[str, Any]] = []
        for name in options.peers:
            results += run_contestant(name, job, options, machine["matmul_ceiling_flops"], say)
    compare(results)
    report = {
        "machine": machine["name"],
        "device": options.device,
        "dtype": machine["dtype"],
        "matmul_ceiling_flops": machine["matmul_ceiling_flops"],
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
    print_report(table(results), report, options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; defaults depend on device and data."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.train",
        description="Training speed of the engine and of its peers, each at its best, on one machine.",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the GPU where there is one")
    parser.add_argument("--size", choices=[*PRESETS], help="355m; without --data tiny")
    parser.add_argument("--data", type=Path, help="file or folder of rows; the embedded ones, if left out")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer; the embedded one, if left out")
    parser.add_argument(
        "--rows", type=positive, help="training rows; all, on a CPU as many as are measured in an epoch"
    )
    parser.add_argument("--num-unfrozen-layers", type=int, default=4, help="blocks that train, from the top")
    parser.add_argument("--batch-size", type=positive, help="rows per optimizer step; 128, on a CPU 16")
    parser.add_argument("--max-length", type=positive, default=512, help="tokens a row is cut at")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument(
        "--steps", type=positive, help="optimizer steps measured, after a quarter as many; 40, on a CPU 8"
    )
    parser.add_argument("--epochs", type=positive, default=3, help="of the engine: the first is measured apart")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"any of {','.join(PEERS)}")
    parser.add_argument("--settings-limit", type=int, help="settings tried of each peer, best-known first")
    skip = "leave out settings described so, such as torch_compile; may be given more than once"
    parser.add_argument("--skip", metavar="TEXT", action="append", default=[], help=skip)
    parser.add_argument("--quick", action="store_true", help="the best-known setting of each peer only")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="processor time of one thread in place of the clock: for a CPU that others use too",
    )
    parser.add_argument("--timeout", type=float, help="seconds a setting may take; 300, on a CPU 3600")
    parser.add_argument("--out", type=Path, help="file for the JSON, indented")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = options.device == "cpu"
    options.size = options.size or ("355m" if options.data else "tiny")
    options.batch_size = options.batch_size or (16 if on_cpu else 128)
    options.steps = options.steps or (8 if on_cpu else 40)
    options.timeout = options.timeout or (3600.0 if on_cpu else 300.0)
    options.peers = options.peers.split(",")
    if options.quick:
        options.settings_limit = 1
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))} is none of {', '.join(PEERS)}")
    if options.processor_time and not on_cpu:
        parser.error("--processor-time says nothing of a GPU: add --device cpu")
    if options.max_length > PRESETS[options.size].n_positions:
        parser.error(f"--max-length {options.max_length} is beyond the context of {options.size}")
    return options


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
        precision=options.precision,
        warm_up=warm_up,
        steps=options.steps,
        epochs=options.epochs,
        processor_time=options.processor_time,
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
    """Name of the device, dtype of matrix products, and their operations per second."""
    if processor_time:
        torch.set_num_threads(1)
    device = resolve_device(device_name)
    dtype = resolve_precision(precision, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_processor()
    return {"name": name, "dtype": str(dtype), "matmul_ceiling_flops": matmul_ceiling(device, dtype)}


def describe_processor() -> str:
    """Name of the processor, as Linux or else Python reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries that affect speed; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _LIBRARIES_SHOWN:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def settings_of(name: str, job: Job) -> list[Setting]:
    """A contestant's settings, best-known first."""
    if name == "engine":
        settings = [Setting(name, "as it comes", run_engine)]
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
    for setting in settings_of(name, job):
        left_out = next((f"--skip {text}" for text in options.skip if text in setting.text), None)
        if left_out is None and tried == options.settings_limit:
            left_out = f"--settings-limit {tried}"
        if left_out:
            records.append({"contestant": name, "settings": setting.text, "error": f"not run: {left_out}"})
            continue
        tried += 1
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


def run_setting(setting: Setting, job: Job) -> tuple[list[Measurement], int]:
    """In a child process: measure a setting. Returns the measurements, and the peak memory in bytes."""
    if setting.contestant != "engine":  # peers run with their libraries' defaults
        for name in PRODUCT_CACHES:
            os.environ.pop(name, None)
    if job.processor_time:
        use_processor_time()
    measurements = setting.run(job, **setting.options)
    return measurements, peak_memory(resolve_device(job.device))


def record(setting: Setting, measurement: Measurement, memory: int, job: Job, ceiling: float) -> dict[str, Any]:
    """A measurement as JSON.

    Necessary operations include the trunk's, unless its outputs were kept from an earlier epoch. They include a row's
    last token too, although it is only predicted; that is less than 1 % of the tokens.
    """
    tokens = sum(window.tokens for window in measurement.windows)
    targets = sum(window.targets for window in measurement.windows)
    trunk_tokens = 0 if measurement.phase == LATER_EPOCHS else tokens
    frozen = job.config.n_layer - job.num_unfrozen_layers
    flops_per_token = necessary_flops(job.config, frozen, tokens, targets, trunk_tokens) / tokens
    speed = measurement.tokens_per_second
    return {
        "contestant": setting.contestant,
        "phase": measurement.phase,
        "settings": setting.text,
        "dtype": measurement.dtype,
        "useful_tokens_per_second": speed,
        "windows": [
            {"seconds": w.seconds, "tokens": w.tokens, "target_tokens": w.targets} for w in measurement.windows
        ],
        "target_share": measurement.target_share,
        "necessary_flops_per_token": flops_per_token,
        "share_of_matmul_ceiling": flops_per_token * speed / ceiling,
        "peak_memory_bytes": memory,
        "seconds_to_first_step": measurement.seconds_to_first_step,
    }


def compare(results: list[dict[str, Any]]) -> None:
    """Add to each result how many times faster the engine is, and whether it is its contestant's fastest setting."""
    finished = [result for result in results if "error" not in result]
    engine = {
        result["phase"]: result["useful_tokens_per_second"]
        for result in finished
        if result["contestant"] == "engine" and result["phase"] in (FIRST_EPOCH, LATER_EPOCHS)
    }
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for result in finished:
        key = result["contestant"], result["phase"]
        if key not in best or result["useful_tokens_per_second"] > best[key]["useful_tokens_per_second"]:
            best[key] = result
        for phase, speed in engine.items():
            name = f"engine_{phase.replace(' ', '_')}_over_this"
            result[name] = speed / result["useful_tokens_per_second"]
    for result in results:
        result["best"] = any(result is chosen for chosen in best.values())


def table(results: list[dict[str, Any]]) -> str:
    """Results as aligned columns; a star marks each contestant's fastest setting."""
    head = [
        "contestant", "settings", "useful tokens/s", "engine, 1st epoch / this", "engine, later / this",
        "of matmul ceiling", "peak GiB", "s to 1st step",
    ]  # fmt: skip
    lines = [head]
    failures = []
    for result in results:
        if "error" in result:
            failures.append(f"{result['contestant']}, {result['settings'] or 'any setting'}: {result['error']}")
            continue
        phase = "" if result["phase"] == "steady" else f", {result['phase']}"
        lines.append(
            [
                f"{result['contestant']}{phase}{' *' if result['best'] else ''}",
                result["settings"],
                f"{result['useful_tokens_per_second']:,.0f}",
                _times(result.get("engine_first_epoch_over_this")),
                _times(result.get("engine_later_epochs_over_this")),
                f"{result['share_of_matmul_ceiling']:.1%}",
                f"{result['peak_memory_bytes'] / 2**30:.2f}",
                f"{result['seconds_to_first_step']:.1f}",
            ]
        )
    return "\n".join([*align(lines, left=2), *failures])


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    with in_one_sentence():
        main()
