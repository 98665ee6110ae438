"""Speed of generation, of this project and of transformers, on one machine: ``python -m bench.generate --help``.

All continue the same prompts by the same number of tokens, with the same settings of sampling, on GPT-2 of the same
size. The weights are random: they take as long as pretrained ones. No row ends early, so that all produce the same
number of tokens. Speed is new tokens per second, prompts included in the time. Progress and a table are printed; the
last line is JSON with everything in them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.generators import GenerationJob, Setting, Speed, settings_of
from bench.measure import use_processor_time
from bench.processes import ChildError, in_one_sentence, positive, quiet_environment, run_apart, show_one_gpu
from bench.report import Progress, align, print_report
from bench.train import describe_machine, versions
from model.files import write_json
from model.net.config import PRESETS
from model.net.device import peak_memory, resolve_device

_CONTESTANTS = ("generate", "transformers")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    say = Progress()
    quiet_environment()
    options = parse(arguments)
    if options.device != "cpu":
        show_one_gpu(options.device)
    device = options.device.partition(":")[0]
    machine = run_apart(describe_machine, device, options.precision, options.processor_time, timeout=120)
    prompts = read_prompts(options)
    job = GenerationJob(
        prompts,
        options.size,
        device,
        machine["precision"],
        options.new_tokens,
        options.temperature,
        options.top_k or None,
        options.top_p,
        options.repeats,
        options.peer_seconds,
        options.processor_time,
    )
    lengths = sorted(map(len, prompts))
    data = {
        "prompts": len(prompts),
        "mean_length": sum(lengths) / len(lengths),
        "median_length": lengths[len(lengths) // 2],
        "max_length": lengths[-1],
    }
    say(f"{machine['name']}, {job.precision}: {data['prompts']} prompts, mean {data['mean_length']:.0f} tokens")
    report: dict[str, Any] = {
        "machine": machine["name"],
        "device": options.device,
        "precision": job.precision,
        "versions": versions(),
        "model_size": job.model_size,
        "new_tokens": job.new_tokens,
        "sampling": {"temperature": job.temperature, "top_k": job.top_k, "top_p": job.top_p},
        "clock": "processor time of one thread" if job.processor_time else "wall",
        "data": data,
        "results": [],
    }
    for setting in settings_of(job, options.batch_sizes):
        report["results"] += run(setting, job, options, say)
        compare(report["results"])
        if options.out:  # after each setting, in case that a later one is killed
            write_json(options.out, report)
    print_report(table(report["results"]), report, options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(prog="python -m bench.generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the GPU where there is one")
    parser.add_argument("--size", choices=[*PRESETS], help="355m, on a CPU 124m")
    parser.add_argument("--data", type=Path, help="file or folder of rows; the embedded ones, if left out")
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer; the embedded one, if left out")
    parser.add_argument("--prompts", type=positive, help="prompts to continue; 2003, on a CPU 16")
    parser.add_argument("--new-tokens", type=positive, default=128, help="of each prompt")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32", "tf32"], default="auto")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-k", type=int, default=50, help="0 for none")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument(
        "--batch-sizes", help="of transformers, separated by commas; 64,256,512, on a CPU all prompts"
    )
    parser.add_argument("--contestants", default=",".join(_CONTESTANTS), help=f"any of {','.join(_CONTESTANTS)}")
    skip = "leave out settings described so, such as static; may be given more than once"
    parser.add_argument("--skip", metavar="TEXT", action="append", default=[], help=skip)
    parser.add_argument("--repeats", type=positive, default=3, help="calls that are measured, after one that is not")
    peer_seconds = "after which transformers begins no other batch of a call"
    parser.add_argument("--peer-seconds", type=float, default=20.0, help=peer_seconds)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="processor time of one thread in place of the clock: for a CPU that others use too",
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a setting may take")
    parser.add_argument("--out", type=Path, help="file for the JSON, indented")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = options.device == "cpu"
    options.size = options.size or ("124m" if on_cpu else "355m")
    options.prompts = options.prompts or (16 if on_cpu else 2003)
    sizes = options.batch_sizes or (str(options.prompts) if on_cpu else "64,256,512")
    options.batch_sizes = [positive(size) for size in sizes.split(",")]
    return options


def read_prompts(options: argparse.Namespace) -> list[list[int]]:
    """Ids of the first prompts of the data, rendered as for training; longer ones than leave room are left out."""
    from model.data.formats import read_records
    from model.data.layout import find_splits
    from model.data.schemas import UnusableRow, normalize_row
    from model.demo import EMBEDDED_BASE
    from model.demo.grammar import write_rows
    from model.net.prompt import encode_prompts
    from model.net.tokenizer import load_tokenizer

    config = PRESETS[options.size]
    tokenizer = load_tokenizer(options.tokenizer or EMBEDDED_BASE, config.vocab_size)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        if not options.data:
            write_rows(Path(scratch) / "rows")
        files = find_splits(options.data or Path(scratch) / "rows")
        records = [each for split in files.values() for path in split for each in read_records(path)]
    texts = []
    for record in records:
        with suppress(UnusableRow):
            texts.append(normalize_row(record)["prompt"])
    ids = encode_prompts(tokenizer, texts)
    fitting = [each for each in ids if len(each) + options.new_tokens <= config.n_positions]
    if len(fitting) < options.prompts:
        raise ValueError(f"the data have {len(fitting)} prompts that fit the context, not {options.prompts}")
    return fitting[: options.prompts]


def run(
    setting: Setting, job: GenerationJob, options: argparse.Namespace, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """The record of a setting, with ``error`` and no numbers if it failed; none if it was to be left out."""
    if setting.contestant not in options.contestants.split(",") or any(skip in setting.text for skip in options.skip):
        return
    say(f"{setting.contestant}: {setting.text} ...")
    told = {"contestant": setting.contestant, "settings": setting.text}
    try:
        speed, memory = run_apart(measure, setting, job, timeout=options.timeout)
    except ChildError as error:
        say(f"{setting.contestant}: {error}")
        yield {**told, "error": str(error)}
        return
    say(f"{setting.contestant}: {speed.median:,.0f} new tokens/s")
    yield {
        **told,
        "new_tokens_per_second": speed.median,
        "calls": [{"seconds": seconds, "new_tokens": tokens} for seconds, tokens in speed.calls],
        "first_call_seconds": speed.first,
        "peak_memory_bytes": memory,
    }


def measure(setting: Setting, job: GenerationJob) -> tuple[Speed, int]:
    """In a child process: measure a setting. Returns its speed, and the peak memory in bytes."""
    if job.processor_time:
        use_processor_time()
    speed = setting.run(job, **setting.options)
    return speed, peak_memory(resolve_device(job.device))


def compare(results: list[dict[str, Any]]) -> None:
    """Add to each result how many times faster this project is, and mark each contestant's fastest setting."""
    finished = [result for result in results if "error" not in result]
    own = [result["new_tokens_per_second"] for result in finished if result["contestant"] == "generate"]
    for result in finished:
        if own:
            result["generate_over_this"] = max(own) / result["new_tokens_per_second"]
        rivals = [each for each in finished if each["contestant"] == result["contestant"]]
        result["best"] = result is max(rivals, key=lambda each: each["new_tokens_per_second"])


def table(results: list[dict[str, Any]]) -> str:
    """Results as aligned columns; a star marks each contestant's fastest setting. Below stand those that failed."""
    lines = [["contestant", "settings", "new tokens/s", "generate / this", "peak GiB", "1st call s"]]
    for result in results:
        if "error" not in result:
            ratio = result.get("generate_over_this")
            lines.append(
                [
                    result["contestant"] + (" *" if result["best"] else ""),
                    result["settings"],
                    f"{result['new_tokens_per_second']:,.0f}",
                    "" if ratio is None else f"{ratio:.2f}",
                    f"{result['peak_memory_bytes'] / 2**30:.2f}",
                    f"{result['first_call_seconds']:.1f}",
                ]
            )
    failures = [f"{each['contestant']}, {each['settings']}: {each['error']}" for each in results if "error" in each]
    return "\n".join([*align(lines, left=2), *failures])


if __name__ == "__main__":
    with in_one_sentence():
        main()
