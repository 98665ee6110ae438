"""The command lines of the commands that read MLflow or repair its records.

They stand apart from the commands, which import torch, MLflow or Prefect: help and mistakes are answered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ops.options import OptionParser

_VERSION = "models:/NAME/VERSION or models:/NAME@ALIAS"


def sample_parser() -> OptionParser:
    """Of ``finetune sample``."""
    parser = OptionParser(
        "finetune sample",
        "`finetune sample [PROMPT]`: ask a tuned model of MLflow's registry. Without a prompt it answers line by "
        "line on a terminal, and else reads the prompt from standard input, as `-` does.",
    )
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="the instruction, as in the data set's prompt column"
    )
    parser.add_argument(
        "--model",
        help="models:/NAME/VERSION, models:/NAME@ALIAS, the id of a run, or a registered model, such as "
        "gpt2-code-355m, for its latest version; default: the latest of any size",
    )
    parser.add_argument("--base", action="store_true", help="also show what the untouched base answers")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=128, help="at most, for an answer; default: 128"
    )
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--top-k", metavar="K", type=int, help="draw from the K likeliest tokens only")
    parser.add_argument(
        "--top-p", metavar="P", type=float, help="draw from the likeliest tokens that have this probability together"
    )
    parser.add_argument(
        "--repetition-penalty", metavar="X", type=float, default=1.0, help="1 changes nothing, the default"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the draws, where temperature is not 0; default: 0"
    )
    return parser


def compare_parser() -> OptionParser:
    """Of ``finetune compare``."""
    parser = OptionParser(
        "finetune compare",
        "`finetune compare A B`: what differs between two runs, and which model is better. A and B are run ids, "
        "models:/NAME/VERSION or models:/NAME@ALIAS.",
    )
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the comparison as a page")
    return parser


def report_parser() -> OptionParser:
    """Of ``finetune report``."""
    parser = OptionParser(
        "finetune report", "`finetune report RUN`: write the report of a finished run as one HTML page."
    )
    parser.add_argument("run", metavar="RUN", help=f"a run id, {_VERSION}")
    parser.add_argument("--html", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html")
    return parser


def export_parser() -> OptionParser:
    """Of ``finetune export``."""
    parser = OptionParser(
        "finetune export",
        "`finetune export MODEL`: take a registered version out of MLflow: as a plain Hugging Face directory, as a "
        "repository of a hub, as a GGUF file, or in several of these ways.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"{_VERSION}, as models:/gpt2-code-355m@champion")
    parser.add_argument("--directory", help="write the Hugging Face directory; it must not exist, or be empty")
    parser.add_argument(
        "--push", metavar="USER/NAME", help="upload to the Hugging Face hub (HF_ENDPOINT names another)"
    )
    parser.add_argument("--private", action="store_true", help="a new repository is private, not public")
    parser.add_argument("--gguf", metavar="FILE", help="write a GGUF file for llama.cpp; an older one is replaced")
    parser.add_argument(
        "--dtype", choices=("f32", "f16", "bf16", "q8_0"), default="f32", help="of the matrices in the GGUF file"
    )
    return parser


def rollback_parser() -> OptionParser:
    """Of ``finetune rollback``."""
    parser = OptionParser(
        "finetune rollback",
        "`finetune rollback SIZE`: return the champion of a size to the version that it replaced.",
    )
    parser.add_argument("size", metavar="SIZE", help="tiny, 124m, 355m, 774m or 1558m")
    return parser


def doctor_parser() -> OptionParser:
    """Of ``finetune doctor``."""
    parser = OptionParser(
        "finetune doctor", "Compare limits, leases, locks, states and processes, and print each contradiction."
    )
    parser.add_argument("--fix", action="store_true", help="mend the findings that can be mended")
    return parser


PARSERS: dict[str, Callable[[], OptionParser]] = {
    "sample": sample_parser,
    "compare": compare_parser,
    "report": report_parser,
    "export": export_parser,
    "rollback": rollback_parser,
    "doctor": doctor_parser,
}
