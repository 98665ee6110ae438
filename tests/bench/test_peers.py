"""What the peers run with: dropout, precision, attention, and which of their settings take part."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, TrainingArguments
from transformers.utils import import_utils

from bench import peers
from bench.measure import DTYPES, Job, Meter, Precision, Setting, resolved_name
from bench.peer_settings import hf_settings, trl_settings
from bench.peers import (
    build_model,
    dropout_of,
    hold_precision,
    measured,
    precision_arguments,
    precision_of,
    run_hf,
    run_trl,
)
from bench.train import why_not
from model import GPTModel, freeze_bottom_layers

FLASH = "documents apart by flash_attention_4"


@pytest.fixture
def job(token_dir: Path, tokenizer_dir: Path) -> Job:
    """A small job on the test rows, with dropout."""
    return Job(token_dir, tokenizer_dir, "tiny", 2, 8, "cpu", "fp32", warm_up=1, steps=2, epochs=2, dropout=0.25)


# Dropout


def noisy_places(model: torch.nn.Module) -> dict[str, float]:
    """Rate of each place of dropout that is not 0, by the name of its module."""
    return {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p}


def test_peers_have_the_jobs_dropout_where_the_engine_has_it(job: Job) -> None:
    """Three places in each trained block, as many as our own blocks have, none in frozen ones or the embeddings."""
    model = build_model(job)
    places = ("attn.attn_dropout", "attn.resid_dropout", "mlp.dropout")
    assert noisy_places(model) == {f"transformer.h.{block}.{place}": 0.25 for block in (4, 5) for place in places}
    assert dropout_of(model) == "0.25 in trained blocks"
    engine = GPTModel(job.config)
    freeze_bottom_layers(engine, job.num_unfrozen_layers)
    engine.set_dropout(job.dropout)
    assert [block.training for block in engine.train().h] == [False] * 4 + [True] * 2
    quiet = build_model(replace(job, dropout=0.0))
    assert noisy_places(quiet) == {}
    assert dropout_of(quiet) == "none"


def test_default_settings_have_transformers_own_dropout(job: Job) -> None:
    """GPT2Config's rates act everywhere, whatever the job's dropout is."""
    config = GPT2Config()
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.1, 0.1, 0.1)
    for dropout in (0.0, 0.25):
        model = build_model(replace(job, dropout=dropout), defaults=True)
        assert set(noisy_places(model).values()) == {0.1}
        assert len(noisy_places(model)) == 3 * job.config.n_layer + 1
        assert dropout_of(model) == "0.1 in all blocks and embeddings"


def test_dropout_is_read_from_the_model(job: Job) -> None:
    """What nobody asked for is said, and so is what a kernel leaves out."""
    model = build_model(job)
    model.transformer.h[0].mlp.dropout.p = 0.5
    assert dropout_of(model) == "[0.25] in trained and [0.0, 0.5] in frozen blocks, 0 in embeddings"
    model = build_model(job)
    model.config._attn_implementation = "flash_attention_4"
    assert dropout_of(model) == "0.25 in trained blocks, none in attention"
    model = build_model(replace(job, dropout=0.0))
    model.config._attn_implementation = "flash_attention_4"
    assert dropout_of(model) == "none"


# Precision


def test_peers_compute_in_the_jobs_precision() -> None:
    """bf16 and fp16 are mixed precision; fp32 refuses TF32, which transformers turns on for compiled models."""
    assert precision_arguments("bf16") == {"bf16": True, "fp16": False}
    assert precision_arguments("fp16") == {"bf16": False, "fp16": True}
    assert precision_arguments("fp32") == {"bf16": False, "fp16": False, "tf32": False}
    assert precision_arguments("tf32") == {"bf16": False, "fp16": False, "tf32": True}
    known = {field for field in TrainingArguments.__dataclass_fields__}
    for name in DTYPES:
        arguments = precision_arguments(name)  # type: ignore[arg-type]
        assert arguments.keys() <= known
        here = "fp32" if name == "tf32" else name  # a CPU has no TF32
        assert precision_of(Namespace(**arguments), torch.device("cpu")) == here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_precision_is_found_by_a_product(precision: Precision) -> None:
    """Whatever a library has set, and whatever the arguments say: the products of the training tell."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if precision == "fp32" else "highest")
        hold_precision(precision)
        arguments = Namespace(bf16=False, fp16=False, tf32=precision != "tf32")
        assert precision_of(arguments, torch.device("cuda")) == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision_auto_is_resolved() -> None:
    """auto is one of the names; others stay; what has no name is an error."""
    cpu = torch.device("cpu")
    assert resolved_name("auto", cpu) in ("bf16", "fp32")
    assert [resolved_name(name, cpu) for name in DTYPES] == [*DTYPES]
    with pytest.raises(ValueError, match="precision 'fp8' is none of bf16, fp16, fp32, tf32"):
        resolved_name("fp8", cpu)


# Attention


def test_flash_attention_4_is_among_the_peers(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing bfd with it stands in the list, compiled and not; where it cannot run, the line says why."""
    gpu = replace(job, device="cuda", precision="bf16")

    def lines(job: Job) -> list[Setting]:
        return [setting for setting in trl_settings(job) if FLASH in setting.text]

    if not import_utils.is_flash_attn_4_available():
        assert {setting.missing for setting in lines(gpu)} == {"not installed: .venv/bin/pip install flash-attn-4"}
    monkeypatch.setattr(import_utils, "is_flash_attn_4_available", lambda: True)
    assert [("torch_compile" in setting.text, setting.missing) for setting in lines(gpu)] == [(True, ""), (False, "")]
    assert all(setting.options["attention"] == "flash_attention_4" for setting in lines(gpu))
    refused = {setting.missing for setting in lines(replace(gpu, precision="fp32"))}
    assert refused == {"not run: flash_attention_4 computes in bf16 and fp16 only"}
    assert lines(job) == [], "it has no kernel for a CPU"


# Which settings take part


def test_default_settings_always_take_part(job: Job) -> None:
    """They are last, of the job's optimizer step, and --settings-limit does not count them; --skip does."""
    for device in ("cpu", "cuda"):
        for size in (8, 20, 128):
            other = replace(job, device=device, batch_size=size)
            for settings in (hf_settings(other), trl_settings(other)):
                assert [setting.defaults for setting in settings] == [False] * (len(settings) - 1) + [True]
                assert settings[-1].text.startswith("default settings")
                assert size % settings[-1].options["rows_per_pass"] == 0
    defaults, other_setting = hf_settings(job)[-1], hf_settings(job)[0]
    limited = Namespace(skip=[], settings_limit=1)
    assert why_not(other_setting, 0, limited) == why_not(defaults, 1, limited) == ""
    assert why_not(other_setting, 1, limited) == "not run: --settings-limit 1"
    assert why_not(defaults, 0, Namespace(skip=["default"], settings_limit=None)) == "not run: --skip default"
    absent = replace(other_setting, missing="not installed: x")
    assert why_not(absent, 0, limited) == "not installed: x"


@pytest.mark.parametrize("peer", ["hf", "trl"])
def test_peers_run_as_their_lines_say(job: Job, peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default settings are the library's: dropout, precision, optimizer, order and more. Others are the job's."""
    library = pytest.importorskip("trl" if peer == "trl" else "transformers")
    pytest.importorskip("accelerate")
    seen: list[Any] = []

    def watched(trainer_class: type, meter: Meter) -> type:
        class Watched(measured(trainer_class, meter)):  # type: ignore[misc]
            def __init__(self, **arguments: Any):
                super().__init__(**arguments)
                seen.append(self.args)

        return Watched

    monkeypatch.setattr(peers, "measured", watched)
    run = run_trl if peer == "trl" else run_hf
    (own,) = run(job, rows_per_pass=8, defaults=True)
    (jobs,) = run(job, rows_per_pass=4)
    usual = (library.SFTConfig if peer == "trl" else library.TrainingArguments)(str(tmp_path), use_cpu=True)
    same = ["optim", "bf16", "fp16", "gradient_checkpointing", "train_sampling_strategy", "learning_rate"]
    same += ["per_device_train_batch_size", "dataloader_num_workers", "remove_unused_columns", "torch_compile"]
    assert {name: getattr(seen[0], name) for name in same} == {name: getattr(usual, name) for name in same}
    assert own.precision == precision_of(usual, torch.device("cpu"))
    assert own.dropout == "0.1 in all blocks and embeddings"
    assert (jobs.precision, jobs.dropout) == ("fp32", "0.25 in trained blocks")
    steps = [args.per_device_train_batch_size * args.gradient_accumulation_steps for args in seen]
    assert steps == [job.batch_size] * 2
    assert not seen[1].gradient_checkpointing
    assert all(window.tokens > 0 for measurement in (own, jobs) for window in measurement.windows)
