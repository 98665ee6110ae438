"""Training speed on several GPUs of one host, against one: ``python -m bench.scale --help``.

For each number of GPUs torchrun starts that many processes once; they train each batch size several times, each time
from fresh random weights. Lines are printed as they are measured, and a table of medians at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.processes import ChildError, in_one_sentence, positive, quiet_environment, share
from bench.report import Progress, align
from bench.scale_worker import ScaleJob
from bench.train import prepare_job, versions
from model.files import write_json
from model.net.config import PRESETS
from model.net.device import count_processes, processor_name

ROOT = Path(__file__).resolve().parent.parent
_MEASURES = ("first_epoch", "cached_epochs", "step_ms", "slowest_step_ms", "exchange_ms", "waiting_ms")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    say = Progress()
    quiet_environment()
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        settings = {**vars(options), "batch_size": options.batch_size[0], "steps": 1, "processor_time": False}
        job, data = prepare_job(argparse.Namespace(**settings), Path(scratch))
        say(f"{data['rows']} rows, {data['tokens']} tokens, {data['target_share']:.1%} of them targets")
        lines = Path(scratch) / "timings.jsonl"
        for gpus in options.gpus:
            say(f"{gpus} ranks ...")
            run_ranks(gpus, scale_job(options, job.tokens, lines), options.timeout)
        timings = [json.loads(line) for line in lines.read_text().splitlines()]
    results = summarise(timings)
    report = {
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else processor_name(),
        "versions": versions(),
        "model_size": options.size,
        "num_unfrozen_layers": options.num_unfrozen_layers,
        "dropout": options.dropout,
        "epochs": options.epochs,
        "repeats": options.repeats,
        "data": data,
        "results": results,
        "trainings": timings,
    }
    if options.json:
        write_json(options.json, report)
    print("\n" + table(results), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description="Training speed on several GPUs of one host, against one."
    )
    parser.add_argument("--gpus", type=positive, nargs="+", default=[1, 2], help="numbers of GPUs; 1 2")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: as many processes; cuda")
    parser.add_argument("--size", choices=[*PRESETS], default="355m", help="355m")
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[128], help="rows per optimizer step; 128")
    parser.add_argument("--data", type=Path, help="file or folder of rows; the embedded ones, if left out")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer; the embedded one, if left out")
    parser.add_argument("--rows", type=positive, help="training rows; all")
    parser.add_argument("--max-length", type=positive, default=512, help="tokens a row is cut at; 512")
    parser.add_argument("--num-unfrozen-layers", type=int, default=4, help="blocks that train, from the top; 4")
    parser.add_argument("--dropout", type=share, default=0.0, metavar="RATE", help="in the blocks that train; 0")
    parser.add_argument("--epochs", type=positive, default=4, help="the first is measured apart; 4")
    parser.add_argument("--repeats", type=positive, default=3, help="trainings of each, for a median; 3")
    parser.add_argument("--quick", action="store_true", help="one training of each")
    parser.add_argument("--profile", action="store_true", help="measure the exchange of gradients in a step too")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a number of GPUs; 600")
    parser.add_argument("--json", type=Path, help="file for all results")
    options = parser.parse_args(arguments)
    options.gpus = sorted(set(options.gpus))
    if options.epochs < 2:
        parser.error("--epochs 1 has no epoch after the first: 2 are the fewest")
    if options.quick:
        options.repeats = 1
    if options.device == "cuda" and max(options.gpus) > torch.cuda.device_count():
        parser.error(f"--gpus {max(options.gpus)}: torch sees {torch.cuda.device_count()}; add --device cpu or fewer")
    if options.device == "cpu":
        try:
            count_processes("cpu", max(options.gpus))
        except ValueError as error:
            parser.error(f"--{error}")
    return options


def scale_job(options: argparse.Namespace, tokens: Path, out: Path) -> ScaleJob:
    """What the ranks of one process group measure."""
    return ScaleJob(
        tokens=str(tokens),
        out=str(out),
        size=options.size,
        num_unfrozen_layers=options.num_unfrozen_layers,
        batch_sizes=options.batch_size,
        epochs=options.epochs,
        repeats=options.repeats,
        device=options.device,
        dropout=options.dropout,
        profile=options.profile,
    )


def run_ranks(world: int, job: ScaleJob, timeout: float) -> None:
    """Run a job in as many ranks, which print what they measure and write it to the job's file.

    Raises:
        ChildError: they failed, or were not done in time.
    """
    # The address: a host's own name may not lead to it.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={world}", "-m", "bench.scale_worker"]
    file = Path(job.out).with_suffix(f".{world}.json")
    file.write_text(json.dumps(asdict(job)))
    try:
        done = subprocess.run([*command, str(file)], cwd=ROOT, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"{world} ranks: not done after {timeout:.0f} s") from error
    if done.returncode:
        raise ChildError(f"{world} ranks ended with status {done.returncode}: see their output above")


def summarise(timings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of the trainings of each batch size and number of ranks, and their ratios to one rank."""
    results: list[dict[str, Any]] = []
    for batch_size, world in sorted({(timing["batch_size"], timing["world"]) for timing in timings}):
        some = [t for t in timings if (t["batch_size"], t["world"]) == (batch_size, world)]
        result: dict[str, Any] = {"batch_size": batch_size, "world": world, "trainings": len(some)}
        for name in _MEASURES:
            values = [timing[name] for timing in some]
            result[name] = None if None in values else statistics.median(values)
        one = next((r for r in results if (r["batch_size"], r["world"]) == (batch_size, 1)), result)
        for name in ("first_epoch", "cached_epochs"):
            known = one["world"] == 1
            result[f"{name}_ratio"] = result[name] / one[name] if known else None
        results.append(result)
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as aligned columns, the ratios to one GPU last."""
    head = ["rows", "GPUs", "first epoch tok/s", "cached tok/s", "step ms", "slowest", "exchange", "waiting"]
    lines = [[*head, "first epoch, of one", "cached, of one"]]
    for result in results:
        times = [result[name] for name in _MEASURES[2:]]
        ratios = [result["first_epoch_ratio"], result["cached_epochs_ratio"]]
        lines.append(
            [
                str(result["batch_size"]),
                str(result["world"]),
                f"{result['first_epoch']:,.0f}",
                f"{result['cached_epochs']:,.0f}",
                *("" if value is None else f"{value:.2f}" for value in times),
                *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
            ]
        )
    return "\n".join(align(lines, left=0))


if __name__ == "__main__":
    with in_one_sentence():
        main()
