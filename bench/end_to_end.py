"""A whole fine-tuning by the pipeline and by a TRL script on one machine: ``python -m bench.end_to_end --help``.

Measured from the start of the process to an evaluated model on disk, step by step. Both sides get the same random
weights (training them takes as long as training pretrained ones), the same rows, the same number of rows per batch,
and the same prompts to complete. The pipeline's time includes its additional work: it scores the base too, completes
the prompts with both models, validates during the training and keeps checkpoints. The upload to MLflow's registry,
after the evaluation, is shown separately. Side "pipeline" starts with an empty data root and creates the databases of
Prefect and MLflow; side "pipeline-used" has them from a run of the embedded model. The modules of both sides are
imported once before, so that neither pays for a cold disk; compiled kernels are not kept. Progress and a table are
printed; the last line is JSON with everything in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.processes import in_one_sentence, positive, quiet_environment, run_apart, show_one_gpu
from bench.report import Progress, print_report
from bench.timings import READERS, Line, SideError, Timing
from bench.train import describe_machine, versions
from model.net.config import PRESETS
from ops.settings import PROJECT_ROOT

# The modules that each side and its helper processes load.
_IMPORTS = {
    "pipeline": "import flows.finetune, mlflow, transformers, prefect.server.api.server, matplotlib.figure",
    "trl": "import trl.trainer.sft_trainer, datasets, transformers.models.gpt2.modeling_gpt2",
}
_USE = ("tiny", "max_steps=1", "sample_rows=0", "pass_rows=0", "device=cpu")  # no kernel is compiled for a GPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark. Returns the exit status: 0 if no side failed."""
    quiet_environment()
    options = parse(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        show_one_gpu(options.device)
    say = Progress()
    report: dict[str, Any] = {
        "machine": run_apart(describe_machine, options.device.partition(":")[0], "auto", timeout=120),
        "versions": versions(),
        "model_size": options.size,
        "rows": options.rows,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "num_unfrozen_layers": options.num_unfrozen_layers,
        "sides": {},
    }
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        scratch = Path(name)
        run_apart(make_inputs, options, scratch, timeout=600)
        say(f"{options.rows} training rows and a {options.size} GPT-2 are ready in {scratch}")
        for side in options.sides:
            report["sides"][side] = measure_side(side, options, scratch, say)
        if options.profile:
            profile_pipeline(options, scratch, say)
    print_report(table(report["sides"]), report, options.out)
    return int(any("error" in record for record in report["sides"].values()))


def measure_side(side: str, options: argparse.Namespace, scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one side ``options.repeats`` times.

    Returns:
        ``runs``, with the seconds of each run, and ``error`` if one failed; no further run is tried then.
    """
    record: dict[str, Any] = {"runs": []}
    try:
        warm_imports(side)
        for repeat in range(options.repeats):
            timing = run_side(side, repeat, options, scratch)
            record["runs"].append({"seconds": timing.seconds, **asdict(timing)})
            say(f"{side}: {timing.seconds:.1f} s, then {sum(timing.after.values()):.1f} s")
    except SideError as error:
        record["error"] = str(error)
        say(f"{side}: {error}")
    return record


def run_side(side: str, repeat: int, options: argparse.Namespace, scratch: Path) -> Timing:
    """Run one side once, in an environment of its own.

    Raises:
        SideError: the run failed.
    """
    variables = environment(scratch, side)
    if side == "pipeline-used":
        subprocess.run(
            [sys.executable, "-m", "flows", *_USE],
            cwd=PROJECT_ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    status, lines = run_timed(command(side, options, scratch), variables, options.timeout)
    if options.log:
        write_log(options.log / f"{side}-{repeat + 1}.log", lines)
    return READERS[side](status, lines)


def profile_pipeline(options: argparse.Namespace, scratch: Path, say: Callable[[str], None]) -> None:
    """Run the pipeline once more under cProfile."""
    python, *rest = command("pipeline", options, scratch)
    profiled = [python, "-m", "cProfile", "-o", str(options.profile.resolve()), *rest]
    status, lines = run_timed(profiled, environment(scratch, "pipeline"), options.timeout)
    say(f"profiled, status {status}, {lines[-1].seconds:.1f} s")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end",
        description="A whole fine-tuning, from process start to evaluated model, by the pipeline and by TRL.",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the GPU where there is one")
    parser.add_argument("--size", choices=[*PRESETS], default="355m")
    parser.add_argument("--data", type=Path, required=True, help="file or folder of rows")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the tokenizer")
    parser.add_argument(
        "--rows", type=positive, default=20_000, help="training rows; the data's are repeated up to it"
    )
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--batch-size", type=positive, default=128, help="rows per optimizer step")
    parser.add_argument("--num-unfrozen-layers", type=int, default=4, help="blocks that train, from the top")
    parser.add_argument("--sides", default=",".join(READERS), help=f"any of {', '.join(READERS)}")
    parser.add_argument("--repeats", type=positive, default=1, help="runs of each side; the table shows the fastest")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that one run may take")
    parser.add_argument("--log", type=Path, help="directory for the output of each run, with seconds")
    parser.add_argument("--profile", type=Path, help="file for cProfile's statistics of one more run of the pipeline")
    parser.add_argument("--out", type=Path, help="file for the JSON, indented")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.data, options.tokenizer = options.data.resolve(), options.tokenizer.resolve()
    options.sides = options.sides.split(",")
    if unknown := set(options.sides) - set(READERS):
        parser.error(f"--sides: {', '.join(sorted(unknown))} is none of {', '.join(READERS)}")
    return options


def make_inputs(options: argparse.Namespace, scratch: Path) -> None:
    """In a child process: write the data set and the weights that both sides get."""
    from model.net.device import resolve_device
    from model.net.gpt import GPTModel
    from model.net.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer, 2**32)
    write_rows(options.data, tokenizer, options.rows, scratch)
    torch.manual_seed(0)
    with torch.device(resolve_device(options.device.partition(":")[0])):
        model = GPTModel(replace(PRESETS[options.size], vocab_size=len(tokenizer)))
    model.save_pretrained(scratch / "weights", tokenizer.eos_token_id)


def write_rows(source: Path, tokenizer: Any, rows: int, scratch: Path) -> None:
    """Write ``scratch/rows``: held-out splits as the pipeline draws them, and ``rows`` training rows, repeated.

    Training rows whose prompt is held out are left out: the pipeline would drop them, but the TRL script would not.
    """
    from model.data.config import PrepareConfig
    from model.data.formats import read_records
    from model.data.layout import find_splits
    from model.data.preparing import prepare
    from model.data.rows import prompt_key
    from model.data.schemas import UnusableRow, normalize_row

    splits = find_splits(source)
    prepare(splits, tokenizer, PrepareConfig(), scratch / "tokens")
    (scratch / "rows").mkdir()
    held_out = set()
    for split in ("validation", "test"):
        text = (scratch / "tokens" / f"{split}.rows.jsonl").read_text()
        (scratch / "rows" / f"{split}.jsonl").write_text(text)
        held_out |= {prompt_key(json.loads(line)["prompt"]) for line in text.splitlines()}
    train = []
    for record in itertools.chain.from_iterable(map(read_records, splits["train"])):
        try:
            row = normalize_row(record)
        except UnusableRow:
            continue
        if prompt_key(row["prompt"]) not in held_out:
            train.append(json.dumps(row) + "\n")
    (scratch / "rows" / "train.jsonl").write_text("".join(itertools.islice(itertools.cycle(train), rows)))


def command(side: str, options: argparse.Namespace, scratch: Path) -> list[str]:
    """The command that a user would type."""
    if side == "trl":
        return [
            sys.executable, "-m", "bench.end_to_end_trl",
            "--data", str(scratch / "rows"), "--weights", str(scratch / "weights"),
            "--tokenizer", str(options.tokenizer), "--out", tempfile.mkdtemp(dir=scratch),
            "--rows", str(options.rows), "--epochs", str(options.epochs),
            "--batch-size", str(options.batch_size), "--num-unfrozen-layers", str(options.num_unfrozen_layers),
        ]  # fmt: skip
    parameters = {
        "dataset": scratch / "rows",
        "weights_dir": scratch / "weights",
        "tokenizer_dir": options.tokenizer,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "num_unfrozen_layers": options.num_unfrozen_layers,
        "device": options.device.partition(":")[0],
        # The deployment of the embedded model has other values for these; take those of the other deployments.
        "max_length": 512,
        "learning_rate": 1e-4,
        "eval_rows": "null",
        "sample_rows": 16,  # as many as the other side completes
        "pass_rows": 0,
        "max_new_tokens": 128,
        "temperature": 0.7,
        "precision": "auto",
    }
    return [
        sys.executable, "-m", "flows", options.size, *(f"{name}={value}" for name, value in parameters.items()),
    ]  # fmt: skip


def environment(scratch: Path, side: str) -> dict[str, str]:
    """Environment variables of this process, but with new directories for data and compiled kernels."""
    root = Path(tempfile.mkdtemp(prefix=f"{side}-", dir=scratch))
    # Tokenisers use one thread in this process, because it forks; the two sides may use all cores.
    inherited = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    return {
        **inherited,
        "PYTHONUNBUFFERED": "1",
        "FINETUNE_DATA_ROOT": str(root / "data"),
        "TRITON_CACHE_DIR": str(root / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor"),
    }


def warm_imports(side: str) -> None:
    """Import the modules of a side once, so that their files are in memory and byte code exists.

    Raises:
        SideError: an import failed.
    """
    imports = _IMPORTS[side.partition("-")[0]]
    done = subprocess.run([sys.executable, "-c", imports], cwd=PROJECT_ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SideError(done.stderr.strip().splitlines()[-1])


def run_timed(arguments: Sequence[str], variables: Mapping[str, str], timeout: float) -> tuple[int, list[Line]]:
    """Run a command in the project's directory.

    Returns:
        The exit status, and the lines that the command printed to either stream. A further line without text has the
        time of its end.
    """
    begin = time.perf_counter()
    lines = []
    child = subprocess.Popen(
        arguments,
        cwd=PROJECT_ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its helpers end with it
    )
    timer = threading.Timer(timeout, os.killpg, (child.pid, signal.SIGKILL))
    timer.start()
    try:
        assert child.stdout is not None
        for text in child.stdout:
            lines.append(Line(time.perf_counter() - begin, text.rstrip("\n")))
        status = child.wait()
    finally:
        timer.cancel()
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    lines.append(Line(time.perf_counter() - begin, ""))
    return status, lines


def write_log(path: Path, lines: Sequence[Line]) -> None:
    """Write the output of a run to a file, each line with its seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line.seconds:8.2f}  {line.text}\n" for line in lines))


def table(sides: Mapping[str, Mapping[str, Any]]) -> str:
    """The fastest run of each side, step by step; a side that failed has a line with its error."""
    lines = []
    for side, record in sides.items():
        if "error" in record:
            lines += [f"{side}: {record['error']}", ""]
            continue
        run = min(record["runs"], key=lambda run: run["seconds"])
        lines.append(f"{side:<40}{'seconds':>10}{'share':>10}")
        lines += [
            f"  {step:<38}{taken:>10.1f}{taken / run['seconds']:>10.1%}" for step, taken in run["steps"].items()
        ]
        lines.append(f"  {'to the evaluated model':<38}{run['seconds']:>10.1f}{1:>10.1%}")
        lines += [f"  {'then ' + step:<38}{taken:>10.1f}" for step, taken in run["after"].items()]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    with in_one_sentence():
        sys.exit(main())
