"""Command line of ``finetune bench``, also as ``python -m bench.train``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measure import DTYPES
from bench.processes import not_negative, parse_list, positive, share
from model.engine.trunk import TrunkCacheConfig
from model.net.config import PRESETS
from ops.options import OptionParser

PEERS = ("engine", "tutorial", "hf", "trl")
_GPU_ONLY = ("fp16", "tf32")
# Values of the memory table besides what the engine chooses by itself.
_MICRO_BATCHES = {"cuda": "16384,8192,4096,2048,1024", "cpu": "1024,512"}
_CACHE_GB = f"{TrunkCacheConfig.max_bytes / 1e9:g},0"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; defaults depend on device and data."""
    parser = OptionParser(
        prog="finetune bench",
        description="Training speed of the engine and of its peers, at their best and at their defaults.",
    )
    _add_job(parser)
    _add_measurement(parser)
    _add_memory_table(parser)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = options.device == "cpu"
    options.size = options.size or ("355m" if options.data else "tiny")
    options.batch_size = options.batch_size or (16 if on_cpu else 128)
    options.steps = options.steps or (8 if on_cpu else 40)
    options.timeout = options.timeout or (3600.0 if on_cpu else 300.0)
    options.peers = (options.peers or ("engine" if options.memory_table else ",".join(PEERS))).split(",")
    if options.quick:
        options.settings_limit = 1
    if options.memory_table:
        micro_batches = _MICRO_BATCHES["cpu" if on_cpu else "cuda"]
        options.micro_batch_tokens = options.micro_batch_tokens or parse_list(positive, micro_batches)
        options.trunk_cache_gb = options.trunk_cache_gb or parse_list(not_negative, _CACHE_GB)
    _check(options, parser)
    return options


def _add_job(parser: argparse.ArgumentParser) -> None:
    """Options that say what is trained."""
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
    parser.add_argument(
        "--precision",
        choices=["auto", *DTYPES],
        default="auto",
        help="of all but the peers' default settings; auto is the engine's choice",
    )
    parser.add_argument(
        "--dropout",
        type=share,
        default=0.0,
        metavar="RATE",
        help="in the blocks that train, of all but the peers' default settings (GPT2Config's dropout); 0",
    )


def _add_measurement(parser: argparse.ArgumentParser) -> None:
    """Options that say what is measured, and how."""
    parser.add_argument(
        "--steps", type=positive, help="optimizer steps measured, after a quarter as many; 40, on a CPU 8"
    )
    parser.add_argument("--epochs", type=positive, default=3, help="of the engine: the first is measured apart")
    parser.add_argument("--peers", help=f"any of {','.join(PEERS)}; all, with --memory-table engine")
    limit = "settings tried of each peer, best-known first, besides its default settings"
    parser.add_argument("--settings-limit", type=int, help=limit)
    skip = "leave out settings described so, such as torch_compile; may be given more than once"
    parser.add_argument("--skip", metavar="TEXT", action="append", default=[], help=skip)
    parser.add_argument(
        "--quick", action="store_true", help="the best-known setting of each peer only, and its default settings"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="processor time of one thread in place of the clock: for a CPU that others use too",
    )
    parser.add_argument("--timeout", type=float, help="seconds a setting may take; 300, on a CPU 3600")
    parser.add_argument("--out", type=Path, help="file for the JSON, indented")


def _add_memory_table(parser: argparse.ArgumentParser) -> None:
    """Options of the memory table."""
    parser.add_argument(
        "--memory-table",
        action="store_true",
        help="the engine with several micro_batch_tokens and trunk_cache_gb: a table of speed against peak memory",
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=lambda text: parse_list(positive, text),
        metavar="N,N,...",
        help="of the memory table, besides the engine's choice; {cuda}, on a CPU {cpu}".format(**_MICRO_BATCHES),
    )
    parser.add_argument(
        "--trunk-cache-gb",
        type=lambda text: parse_list(not_negative, text),
        metavar="GB,GB,...",
        help=f"of the memory table; {_CACHE_GB}",
    )


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with a message if options do not fit together."""
    on_cpu = options.device == "cpu"
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))} is none of {', '.join(PEERS)}")
    if options.processor_time and not on_cpu:
        parser.error("--processor-time says nothing of a GPU: add --device cpu")
    if on_cpu and options.precision in _GPU_ONLY:
        parser.error(f"--precision {options.precision} needs a GPU: choose bf16 or fp32 on a CPU")
    if options.max_length > PRESETS[options.size].n_positions:
        parser.error(f"--max-length {options.max_length} is beyond the context of {options.size}")
    if (options.micro_batch_tokens or options.trunk_cache_gb) and not options.memory_table:
        parser.error("--micro-batch-tokens and --trunk-cache-gb are the values of a table: add --memory-table")
