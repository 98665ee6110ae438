"""Errors that a benchmark would not show: windows, counts, trained parameters. And one run of the command."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.engine import step_loads
from bench.measure import Job, Measurement, Meter, Window, windows_of_reports
from bench.options import parse
from bench.peer_settings import hf_settings, trl_settings
from bench.peers import CountingCollator, PaddingCollator, build_model
from bench.processes import ChildError, run_apart
from bench.train import run_contestant
from bench.tutorial import LENGTH, NaiveGPT, pad
from model import GPTModel, freeze_bottom_layers
from model.data.tokens import IGNORE, CodeAlpacaDataset
from model.engine.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(token_dir: Path, tokenizer_dir: Path) -> Job:
    """A small job on the test rows."""
    return Job(token_dir, tokenizer_dir, "tiny", 2, 8, "cpu", "fp32", warm_up=1, steps=4, epochs=2)


# Windows


def test_windows_of_punctual_reports() -> None:
    """Each window holds the tokens of the steps that ended in it; a constant delay changes nothing."""
    loads = [(100 + step, 10) for step in range(1, 13)]
    for lag in (0.0, 7.5):
        reports = [(step, 2.0 * step + lag) for step in range(1, 13)]
        windows = windows_of_reports(reports, loads, first=2, last=10)
        assert [window.seconds for window in windows] == [4.0] * 4
        assert [window.tokens for window in windows] == [103 + 104, 105 + 106, 107 + 108, 109 + 110]
        assert [window.targets for window in windows] == [20] * 4


def test_windows_of_reports_in_bursts() -> None:
    """With bursts of five reports, windows end with a burst, and the speed is right."""
    reports = [(step, math.ceil(step / 5) * 5.0 + 1e-4 * ((step - 1) % 5)) for step in range(1, 41)]
    windows = windows_of_reports(reports, [(100, 50)] * 40, first=5, last=35)
    assert [window.tokens / window.seconds for window in windows] == pytest.approx([100.0] * 4)


def test_windows_with_one_slow_step() -> None:
    """One very long step does not make all other reports count as one burst."""
    reports = [(step, 0.01 * step + (60.0 if step > 6 else 0.0)) for step in range(1, 21)]
    windows = windows_of_reports(reports, [(100, 50)] * 20, first=2, last=18)
    assert [round(window.tokens / window.seconds) for window in windows].count(10_000) == 3


def test_too_few_reports_are_no_measurement() -> None:
    """Too few reports are an error."""
    with pytest.raises(RuntimeError, match="too few steps to measure between steps 5 and 6"):
        windows_of_reports([(1, 0.1), (2, 0.2)], [(1, 1)] * 2, first=5, last=6)


def test_meter_leaves_warm_up_out() -> None:
    """No window has tokens of the warm-up, and each has only its own."""
    meter = Meter(torch.device("cpu"), warm_up=2, steps=8)
    ended = []
    for step in range(1, 11):
        meter.count(step, 1)
        meter.count(100 * step, 2)  # a second pass of the same step
        ended.append(meter.step_done())
    assert ended == [False] * 9 + [True]
    measurement = meter.measurement("fp32", "none")
    assert [window.tokens for window in measurement.windows] == [101 * (3 + 4), 101 * 11, 101 * 15, 101 * 19]
    assert [window.targets for window in measurement.windows] == [6] * 4
    assert 0 <= measurement.seconds_to_first_step < 5


def test_meter_without_a_full_window_gives_no_number() -> None:
    """A training that stops early is an error."""
    meter = Meter(torch.device("cpu"), warm_up=1, steps=4, window=4)
    for _ in range(4):
        meter.step_done()
    with pytest.raises(RuntimeError, match="ended after 4 steps"):
        meter.measurement("fp32", "none")


def test_speed_is_the_median_of_the_windows() -> None:
    """One slow window does not change the speed; the share of targets is over all windows."""
    windows = [Window(1.0, 100, 50), Window(10.0, 100, 50), Window(1.0, 110, 80)]
    measurement = Measurement("steady", windows, 0.0, "fp32", "none")
    assert measurement.tokens_per_second == 100
    assert measurement.target_share == 180 / 310


# Useful tokens


def test_engine_steps_add_up_to_the_epochs(token_dir: Path) -> None:
    """Each epoch counts every row once, including those of the last, smaller step."""
    rows = CodeAlpacaDataset(token_dir, "train")
    loads = step_loads(rows, TrainConfig(epochs=2, batch_size=8))
    lengths, prompts = rows.lengths.sum(axis=0).tolist()
    assert len(loads) == 2 * math.ceil(len(rows) / 8)
    for epoch in (loads[: len(loads) // 2], loads[len(loads) // 2 :]):
        assert tuple(map(sum, zip(*epoch, strict=True))) == (lengths, lengths - prompts)


def test_collator_counts_no_padding(token_dir: Path) -> None:
    """Only real tokens and targets are counted, not padding."""
    rows = CodeAlpacaDataset(token_dir, "train")
    chosen = rows.lengths[:, 0].argsort()[[0, 1, -1]]  # two short rows and the longest
    batch = CountingCollator(PaddingCollator())([rows[index] for index in chosen])
    lengths, prompts = rows.lengths[chosen].sum(axis=0).tolist()
    assert batch["bench_tokens"] == lengths == int(batch["attention_mask"].sum())
    assert batch["bench_targets"] == lengths - prompts
    assert batch["input_ids"].size(1) % 8 == 0
    assert batch["input_ids"].numel() > lengths


def test_tutorial_counts_only_tokens_it_keeps() -> None:
    """Tokens beyond the fixed length are neither trained on nor counted."""

    class Rows:
        def __getitem__(self, index: int) -> dict[str, Any]:
            labels = torch.arange(2 * LENGTH)
            labels[: LENGTH - 3] = IGNORE
            return {"input_ids": torch.arange(2 * LENGTH), "labels": labels}

    ids, labels, tokens, targets = pad(Rows(), [0, 1])  # type: ignore[arg-type]
    assert ids.shape == labels.shape == (2, LENGTH)
    assert (tokens, targets) == (2 * LENGTH, 2 * 3)


# All contestants do the same work


def test_all_train_the_same_parameters(job: Job) -> None:
    """Engine, tutorial and transformers' model train the same number of scalars; no others get a gradient."""
    engine = GPTModel(job.config)
    plan = freeze_bottom_layers(engine, job.num_unfrozen_layers)
    naive = NaiveGPT(job.config)
    naive.freeze(job.num_unfrozen_layers)
    reference = build_model(job)
    ids = torch.zeros(1, 8, dtype=torch.long)
    naive(ids).sum().backward()
    reference(input_ids=ids, labels=ids).loss.backward()
    for model in (naive, reference):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == plan.trainable
        assert all(p.grad is not None for p in trained)
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@torch.no_grad()
def test_which_packing_keeps_documents_apart(job: Job) -> None:
    """transformers finds documents by restarting positions, but only without attention mask and cache."""
    model = build_model(job).eval()
    model.config.use_cache = False  # as SFTTrainer calls it
    first, second = torch.randint(job.config.vocab_size, (2, 1, 12))
    packed = torch.cat([first, second], dim=1)
    positions = torch.arange(12).repeat(2)[None]
    alone = model(input_ids=second).logits
    apart = model(input_ids=packed, position_ids=positions).logits[:, 12:]
    together = model(input_ids=packed, position_ids=positions, attention_mask=torch.ones_like(packed)).logits[:, 12:]
    torch.testing.assert_close(apart, alone, rtol=0, atol=1e-5)
    assert (together - alone).abs().max() > 1e-3


def test_settings_keep_the_effective_batch(job: Job) -> None:
    """Rows per pass divide the batch, also if 8 does not, on a GPU and on a CPU."""
    for batch_size, device in ((8, "cpu"), (20, "cpu"), (128, "cuda"), (48, "cuda")):
        other = Job(**{**vars(job), "batch_size": batch_size, "device": device})
        for setting in hf_settings(other):
            assert batch_size % setting.options["rows_per_pass"] == 0, setting.text
        assert len({setting.text for setting in trl_settings(other)}) == len(trl_settings(other))


# Processes


def double(value: float) -> float:
    """Called in a child process below."""
    return 2 * value


def fail(how: str) -> None:
    """Called in a child process below."""
    if how == "raise":
        raise ValueError("no such thing\nand more")
    if how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_children_answer_or_say_why_not() -> None:
    """A result is returned; an exception, lack of memory, death and a timeout each have their own message."""
    assert run_apart(double, 4.0, timeout=60) == 8.0
    for how, message in (
        ("raise", "ValueError: no such thing$"),
        ("memory", "^out of memory$"),
        ("die", "^killed by SIGKILL"),
        ("sleep", "^not done after 1 s$"),
    ):
        with pytest.raises(ChildError, match=message):
            run_apart(fail, how, timeout=1 if how == "sleep" else 60)


# What is reported


def test_command_line_refuses_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown contestants, rows beyond the context and counts of zero are errors."""
    for arguments, message in (
        (["--peers", "engine,other"], "other is none of engine, tutorial, hf, trl"),
        (["--size", "tiny", "--max-length", "1024"], "beyond the context of tiny"),
        (["--epochs", "0"], "0 is not at least 1"),
        (["--dropout", "1"], "1 is not in [0, 1)"),
        (["--device", "cpu", "--precision", "tf32"], "--precision tf32 needs a GPU"),
        (["--trunk-cache-gb", "0"], "add --memory-table"),
        (["--memory-table", "--trunk-cache-gb", "1,-1"], "-1 is not a number of at least 0"),
    ):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert message in capsys.readouterr().err


def test_what_is_wrong_with_the_input_is_one_sentence() -> None:
    """A missing file ends in one line that names it, without a traceback."""
    command = [sys.executable, "-m", "bench.train", "--peers", "engine", "--data", "missing.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "dataset missing.jsonl does not exist: give a file or folder, or a hub id like owner/name\n"


def test_what_was_left_out_is_in_the_report(job: Job) -> None:
    """Settings that were not run are in the report, with the reason."""
    options = Namespace(skip=["padded to"], settings_limit=None, timeout=60)
    (record,) = run_contestant("tutorial", job, options, 1e12, print)
    assert record["contestant"] == "tutorial"
    assert record["error"] == "not run: --skip padded to"
    options = Namespace(skip=[], settings_limit=0, timeout=60)
    (record,) = run_contestant("tutorial", job, options, 1e12, print)
    assert record["error"] == "not run: --settings-limit 0"


def is_default(result: dict[str, Any]) -> bool:
    """Whether a result is of a contestant that ran with its own dropout."""
    return result["contestant"] == "tutorial" or result["settings"].startswith("default settings")


@pytest.mark.slow
def test_a_quick_run(tmp_path: Path) -> None:
    """The command as users run it: progress, table, and a last line with finite numbers of everything measured."""
    command = [sys.executable, "-m", "bench.train", "--device", "cpu", "--quick", "--steps", "2", "--batch-size", "4"]
    command += ["--peers", "engine,tutorial,hf", "--dropout", "0.2", "--out", str(tmp_path / "report.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["machine"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["data"]["rows"] > 0
    assert 0 < report["data"]["target_share"] < 1
    phases = [(result["contestant"], result["phase"]) for result in report["results"] if "error" not in result]
    assert phases[:3] == [("engine", "first epoch"), ("engine", "later epochs"), ("tutorial", "steady")]
    for result in report["results"]:
        if "error" in result:  # transformers' Trainer needs accelerate, which the development tools do not
            assert result["contestant"] == "hf"
            assert "pip install" in result["error"] or result["error"] == "not run: --settings-limit 1"
            continue
        own = "0.1 in all blocks and embeddings" if is_default(result) else "0.2 in trained blocks"
        assert result["dropout"] == own
        numbers = [value for value in result.values() if isinstance(value, float | int)]
        assert len(numbers) >= 8
        assert all(math.isfinite(number) and number >= 0 for number in numbers), result
        assert result["windows"]
