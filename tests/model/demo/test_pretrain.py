"""The embedded base: its size, its files, its model card, and the script that makes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import GPTConfig, GPTModel
from model.demo import EMBEDDED_BASE
from model.demo.pretrain import documented_functions
from model.net.loading import load_gpt_model


def test_the_base_is_small_and_loads_everywhere() -> None:
    """At most 8 MB in Hugging Face's layout; transformers and GPTModel compute the same."""
    assert sum(path.stat().st_size for path in EMBEDDED_BASE.iterdir()) <= 8e6
    model, tokenizer = load_gpt_model("tiny", EMBEDDED_BASE, num_unfrozen_layers=2)
    assert model.config == GPTConfig.preset("tiny")
    assert len(tokenizer) == 4096
    reference = AutoModelForCausalLM.from_pretrained(EMBEDDED_BASE, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(EMBEDDED_BASE).encode("for key, value in items.items():\n")])
    with torch.no_grad():
        assert (reference(ids).logits - model.eval()(ids)).abs().max() <= 1e-4


def test_the_base_knows_python() -> None:
    """The loss on real code is far below the ln 4096 = 8.3 nats per token of a random model."""
    model, tokenizer = load_gpt_model("tiny", EMBEDDED_BASE)
    code = "def __init__(self, name, value=None):\n    self.name = name\n    self.value = value\n"
    ids = torch.tensor([tokenizer.encode(code)])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    assert loss < 3


def test_the_card_names_the_origin() -> None:
    """README.md beside the weights has data, licence, steps, loss and date."""
    card = (EMBEDDED_BASE / "README.md").read_text()
    for fact in (
        "Python Software Foundation License",
        "| steps |",
        "| validation_loss |",
        "| date |",
        "-m model.demo.pretrain",
    ):
        assert fact in card


def test_documented_functions() -> None:
    """A docstring becomes the request and is removed from the code; invalid source and bare functions are skipped."""
    source = 'def double(x):\n    """Return twice x.\n\n    More."""\n    return 2 * x\n\ndef bare():\n    return 1\n'
    (text,) = documented_functions(source)
    assert (
        text == "### Instruction:\nReturn twice x. Call it double.\n\n### Response:\ndef double(x):\n    return 2 * x"
    )
    assert list(documented_functions("def broken(:")) == []


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path) -> None:
    """A few steps from scratch give a directory that loads."""
    command = [
        sys.executable,
        "-m",
        "model.demo.pretrain",
        str(tmp_path / "base"),
        "--max-steps",
        "2",
        "--batch-size",
        "4",
    ]
    subprocess.run(command, check=True, timeout=400, cwd=Path(__file__).resolve().parents[3])
    assert GPTModel.from_pretrained(tmp_path / "base").config == GPTConfig.preset("tiny")
