"""Time per token and memory as a data set grows: ``python -m bench.scaling --help``.

The rows of a small data set are repeated, with a number after each prompt, so that no two prompts are equal. Each
measurement runs on one thread in a process of its own and takes its processor time, which other processes hardly
affect. The cheapest of several tries counts. A table is printed; the last line is JSON with everything in it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.engine import step_loads
from bench.measure import windows_of_reports
from bench.processes import in_one_sentence, positive, quiet_environment, run_apart
from bench.report import Progress, align, print_report
from bench.train import versions
from model.data.config import PrepareConfig
from model.data.formats import read_records
from model.data.layout import find_splits
from model.data.packing import pack, split_evenly
from model.data.preparing import prepare
from model.data.schemas import UnusableRow, normalize_row
from model.data.tokens import CodeAlpacaDataset
from model.demo import EMBEDDED_BASE
from model.demo.grammar import write_rows
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.trainer import StepReport
from model.engine.training import default_micro_batch_tokens, train
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.net.config import GPTConfig
from model.net.device import cast_frozen, peak_memory, processor_name, resolve_precision
from model.net.freezing import freeze_bottom_layers
from model.net.gpt import GPTModel
from model.net.tokenizer import load_tokenizer

CPU = torch.device("cpu")
TOKENISE, COMPUTE, FILL, READ = "tokenise", "train, trunk computed", "fill the trunk file", "train, trunk from file"
_UNFROZEN = 1
_BATCH_SIZE = 16
_EVAL_ROWS = 64
_MEASURED_ONCE = 200_000  # rows; a larger data set is measured only once


@dataclass(frozen=True)
class Cost:
    """One measurement.

    Attributes:
        stage: name of the measured work.
        rows: rows of the source, including those held out.
        tokens: tokens processed in the measured time.
        cpu_seconds: processor time for these tokens.
        seconds: wall-clock time for these tokens.
        setup_seconds: wall-clock time before the first token; None where the measured time includes it.
        peak_memory_bytes: peak of the resident memory, including mapped files, which the system can reclaim.
        private_memory_bytes: resident memory at the end without mapped files; None if the system does not report it.
    """

    stage: str
    rows: int
    tokens: int
    cpu_seconds: float
    seconds: float
    setup_seconds: float | None
    peak_memory_bytes: int
    private_memory_bytes: int | None

    @property
    def cpu_per_token(self) -> float:
        """Processor time in seconds."""
        return self.cpu_seconds / self.tokens


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    say = Progress()
    quiet_environment()
    options = parse(arguments)
    model = model_config(options.tokenizer)
    costs: list[Cost] = []

    def measure(function: Callable[..., Cost], *arguments: Any) -> None:
        cost = run_apart(function, *arguments, timeout=options.timeout)
        costs.append(cost)
        memory = cost.peak_memory_bytes / 1e9
        say(f"{cost.stage}, {cost.rows:,} rows: {1e6 * cost.cpu_per_token:.2f} us a token, {memory:.2f} GB")

    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        source = options.data or Path(scratch) / "rows"
        if not options.data:
            write_rows(source)
        for attempt in range(options.tries):
            for rows in options.rows:
                if attempt and rows > _MEASURED_ONCE:
                    continue
                place = Path(scratch) / str(rows)
                if not attempt:
                    place.mkdir()
                    write_numbered_rows(source, rows, place / "rows.jsonl")
                measure(tokenise, rows, place, options.tokenizer, model)
                measure(train_steps, rows, place, model, options.steps, False)
                if rows <= options.trunk_rows:
                    if not attempt:
                        measure(fill_trunk_file, rows, place, model)
                    measure(train_steps, rows, place, model, options.steps, True)
    results = summarise(costs)
    report = {
        "machine": processor_name(),
        "dtype": str(resolve_precision("auto", CPU)),
        "versions": versions(),
        "data": options.data.name if options.data else "embedded",
        "model": model.to_json(),
        "num_unfrozen_layers": _UNFROZEN,
        "batch_size": _BATCH_SIZE,
        "steps": options.steps,
        "tries": options.tries,
        "results": results,
    }
    print_report(table(results), report, options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling",
        description="What a token costs in tokenising and training, and how much memory is held, as rows grow.",
    )
    counts = "1000,10000,200000,1000000"
    parser.add_argument(
        "--data", type=Path, help="file or folder whose rows are repeated; the embedded ones, if left out"
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=EMBEDDED_BASE, help="its directory; the embedded one, if left out"
    )
    parser.add_argument("--rows", default=counts, help=f"sizes of the data set; {counts}")
    parser.add_argument(
        "--trunk-rows", type=int, default=10_000, help="with a full trunk file up to this size; 10000"
    )
    parser.add_argument(
        "--steps", type=positive, default=40, help="optimizer steps measured, after a quarter as many; 40"
    )
    parser.add_argument(
        "--tries", type=positive, default=3, help=f"measurements of each; one above {_MEASURED_ONCE:,} rows; 3"
    )
    parser.add_argument("--timeout", type=float, default=7200, help="seconds a measurement may take; 7200")
    parser.add_argument("--out", type=Path, help="file for the JSON, indented")
    options = parser.parse_args(arguments)
    try:
        options.rows = sorted({int(rows) for rows in options.rows.split(",")})
    except ValueError:
        parser.error(f"--rows {options.rows} are no whole numbers with commas between them")
    if options.rows[0] < 500:
        parser.error(f"--rows {options.rows[0]}: with less than 500 hardly one is left for validation")
    return options


def write_numbered_rows(source: Path, rows: int, target: Path) -> None:
    """Write a JSONL file of ``rows`` rows: the source's usable training rows, repeated and numbered."""
    records = []
    for path in find_splits(source)["train"]:
        for record in read_records(path):
            with contextlib.suppress(UnusableRow):
                records.append(normalize_row(record))
    random.Random(0).shuffle(records)  # so that the first few are a fair sample
    with target.open("w") as stream:
        for number, record in enumerate(itertools.islice(itertools.cycle(records), rows)):
            row = {"prompt": f"{record['prompt']}\n({number})", "completion": record["completion"]}
            stream.write(json.dumps(row) + "\n")


def model_config(tokenizer: Path) -> GPTConfig:
    """Shape of a model that is just large enough for the trunk's outputs to be kept in a file."""
    from transformers import AutoTokenizer

    vocabulary = len(AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True))
    return GPTConfig(vocab_size=vocabulary, n_positions=512, n_embd=192, n_layer=3, n_head=6)


def tokenise(rows: int, place: Path, tokenizer: Path, shape: GPTConfig) -> Cost:
    """In a child process: tokenise rows.jsonl into token files."""
    encoder = load_tokenizer(tokenizer, shape.vocab_size)
    begin, cpu = time.perf_counter(), time.process_time()
    meta = prepare(find_splits(place / "rows.jsonl"), encoder, PrepareConfig(), place / "tokens")
    spent = time.process_time() - cpu, time.perf_counter() - begin
    tokens = sum(meta["counts"]["tokens"].values())
    return Cost(TOKENISE, rows, tokens, *spent, None, peak_memory(CPU), private_memory())


def build_model(shape: GPTConfig) -> GPTModel:
    """A model with the same random weights each time; limits the process to one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPTModel(shape)
    freeze_bottom_layers(model, _UNFROZEN)
    cast_frozen(model, resolve_precision("auto", CPU))
    return model


def train_steps(rows: int, place: Path, shape: GPTConfig, steps: int, cached: bool) -> Cost:
    """In a child process: train a few optimizer steps on the token files.

    Args:
        cached: read the trunk's outputs from a file that has all of them, or else compute them.
    """
    model = build_model(shape)
    dataset = CodeAlpacaDataset(place / "tokens", "train")
    warm_up = max(1, steps // 4)
    config = TrainConfig(
        epochs=math.ceil((warm_up + steps + 1) / (len(dataset) // _BATCH_SIZE)),
        max_steps=warm_up + steps + 1,  # one more: the last window ends with the report of a later step
        batch_size=_BATCH_SIZE,
        eval_freq=warm_up + steps + 2,
        eval_rows=_EVAL_ROWS,
    )
    reports: dict[str, list[tuple[int, float]]] = {"cpu": [], "clock": []}

    def on_step(report: StepReport) -> None:
        if report.step:
            reports["cpu"].append((report.step, time.process_time()))
            reports["clock"].append((report.step, time.perf_counter()))

    cache = TrunkCacheConfig(place / "trunk") if cached else TrunkCacheConfig(max_bytes=0)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        result = train(model, place / "tokens", config, Path(directory), "scaling", on_step, cache=cache)
    if cached and result.trunk_hit_share < 1:
        raise RuntimeError(f"the trunk file is not full: {result.trunk}")
    loads = step_loads(dataset, config)
    windows = {clock: windows_of_reports(marks, loads, warm_up, warm_up + steps) for clock, marks in reports.items()}
    tokens = sum(window.tokens for window in windows["cpu"])
    per_token = {clock: statistics.median(w.seconds / w.tokens for w in found) for clock, found in windows.items()}
    return Cost(
        READ if cached else COMPUTE,
        rows,
        tokens,
        tokens * per_token["cpu"],
        tokens * per_token["clock"],
        reports["clock"][0][1] - begin,
        peak_memory(CPU),
        private_memory(),
    )


def fill_trunk_file(rows: int, place: Path, shape: GPTConfig) -> Cost:
    """In a child process: write the trunk's outputs for all training and validation rows to files."""
    model = build_model(shape)
    engine = Engine(model, resolve_precision("auto", CPU))
    at_a_time = default_micro_batch_tokens(model)
    tokens, begin, cpu = 0, time.perf_counter(), time.process_time()
    for split, limit in (("train", None), ("validation", _EVAL_ROWS)):
        dataset = CodeAlpacaDataset(place / "tokens", split, limit=limit)
        order = np.arange(len(dataset))
        outputs = TrunkOutputs(engine, dataset, order, at_a_time, 1, TrunkCacheConfig(place / "trunk"))
        for part in split_evenly(order, dataset.lengths[:, 0], at_a_time):
            outputs(pack(dataset, part, CPU))
        if outputs.place != "file":
            raise RuntimeError(f"no trunk file: {outputs.describe()}")
        tokens += int(dataset.lengths[:, 0].sum())
    spent = time.process_time() - cpu, time.perf_counter() - begin
    return Cost(FILL, rows, tokens, *spent, None, peak_memory(CPU), private_memory())


def private_memory() -> int | None:
    """Resident bytes of this process without mapped files; None where Linux does not report them."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
    return found[0] if found else None


def summarise(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    """For each stage and size the cheapest try, its ratio to the smallest size, and the highest peak memory."""
    results: list[dict[str, Any]] = []
    for stage in (TOKENISE, COMPUTE, FILL, READ):
        sizes = sorted({cost.rows for cost in costs if cost.stage == stage})
        tries = [[cost for cost in costs if (cost.stage, cost.rows) == (stage, rows)] for rows in sizes]
        cheapest = [min(some, key=lambda cost: cost.cpu_per_token) for some in tries]
        results += [
            {
                "stage": stage,
                "rows": best.rows,
                "tokens": best.tokens,
                "cpu_us_per_token": [1e6 * cost.cpu_per_token for cost in some],
                "best_cpu_us_per_token": 1e6 * best.cpu_per_token,
                "best_us_per_token": min(1e6 * cost.seconds / cost.tokens for cost in some),
                "of_smallest": best.cpu_per_token / cheapest[0].cpu_per_token,
                "setup_seconds": best.setup_seconds,
                "peak_memory_bytes": max(cost.peak_memory_bytes for cost in some),
                "private_memory_bytes": best.private_memory_bytes,
            }
            for some, best in zip(tries, cheapest, strict=True)
        ]
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results as aligned columns."""
    lines = [["stage", "rows", "CPU us a token", "of smallest", "us a token", "set-up s", "peak GB"]]
    for result in results:
        setup = result["setup_seconds"]
        lines.append(
            [
                result["stage"],
                f"{result['rows']:,}",
                f"{result['best_cpu_us_per_token']:.2f}",
                f"{result['of_smallest']:.2f}",
                f"{result['best_us_per_token']:.2f}",
                "" if setup is None else f"{setup:.1f}",
                f"{result['peak_memory_bytes'] / 1e9:.2f}",
            ]
        )
    return "\n".join(align(lines, left=1))


if __name__ == "__main__":
    with in_one_sentence():
        main()
