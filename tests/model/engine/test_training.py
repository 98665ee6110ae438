"""The training loop: micro-batches, schedule, validation, the best checkpoint, scarce memory, non-finite values."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2LMHeadModel

from model import GPTModel, freeze_bottom_layers
from model.data.packing import Pack, pack
from model.data.tokens import CodeAlpacaDataset, epoch_order
from model.engine.adamw import AdamW
from model.engine.checkpoint import checkpoint_path, load_trained
from model.engine.engine import Engine
from model.engine.journal import read_journal
from model.engine.scoring import mean_loss, row_losses
from model.engine.stepper import learning_rate_at
from model.engine.trainer import NonFiniteError, StepReport, TrainResult
from model.engine.training import TrainConfig, train
from model.net.device import cast_frozen, ran_out_of_memory
from model.net.loading import hf_state_dict

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = TrainConfig(epochs=1, batch_size=8, learning_rate=1e-2, eval_freq=100, precision="fp32")


@pytest.fixture
def run(gpt2_dir: Path, token_dir: Path, tmp_path: Path) -> Callable[..., tuple[GPTModel, Path, TrainResult]]:
    """run(lr=..., double=True, ...): a fresh model trained in a fresh directory."""
    calls = count()

    def start(
        double: bool = False,
        train_head: bool = False,
        tokens: Path = token_dir,
        warn: Callable[[str], None] = lambda message: None,
        **settings: Any,
    ) -> tuple[GPTModel, Path, TrainResult]:
        model = GPTModel.from_pretrained(gpt2_dir)
        freeze_bottom_layers(model, 1, train_head)
        if double:
            model.double()
        directory = tmp_path / f"training{next(calls)}"
        config = TrainConfig(**{**vars(CONFIG), **settings})
        return model, directory, train(model, tokens, config, directory, "identity", warn=warn)

    return start


def engine_of(gpt2_dir: Path) -> Engine:
    """An engine with the base model."""
    return Engine(GPTModel.from_pretrained(gpt2_dir), torch.float32)


def values(directory: Path, name: str) -> dict[int, float]:
    """Values of a metric by step."""
    records = read_journal(directory / "metrics.jsonl")
    return {record["step"]: record["metrics"][name] for record in records if name in record["metrics"]}


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[key] - right[key]).abs().max().item() for key in left)


# Micro-batches do not change a step


@pytest.mark.parametrize("prompt_loss_weight", [0.0, 0.5])
def test_micro_batches_never_change_the_step(run: Callable[..., Any], prompt_loss_weight: float) -> None:
    """Losses and weights after six steps are equal for any size of micro-batch, in float64 to 1e-10."""
    settings = {"double": True, "prompt_loss_weight": prompt_loss_weight}
    results = [run(micro_batch_tokens=tokens, **settings) for tokens in (10_000, 1, 130, 250)]
    whole, directory, _ = results[0]
    for model, other, _ in results[1:]:
        for name in ("train/loss", "train/grad_norm", "eval/loss"):
            want, got = values(directory, name), values(other, name)
            assert got == pytest.approx(want, rel=0, abs=1e-10), name
        assert difference(hf_state_dict(model), hf_state_dict(whole)) <= 1e-10


def test_training_equals_a_plain_loop_over_transformers(
    run: Callable[..., Any], gpt2_dir: Path, token_dir: Path
) -> None:
    """The plain loop: transformers' model, torch's AdamW, one unpadded row at a time; float64, equal to 1e-10."""
    settings = {"epochs": 2, "max_steps": 8, "max_grad_norm": 0.3, "weight_decay": 0.1, "learning_rate": 3e-3}
    model, directory, _ = run(double=True, **settings)

    reference = GPT2LMHeadModel.from_pretrained(gpt2_dir).eval().double().requires_grad_(False)
    trained = [*reference.transformer.h[2].parameters(), *reference.transformer.ln_f.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    groups = [
        {"params": [p for p in trained if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    dataset = CodeAlpacaDataset(token_dir, "train")
    losses, norms = {}, {}
    for step in range(8):
        epoch, position = divmod(step, math.ceil(len(dataset) / 8))
        rows = epoch_order(len(dataset), CONFIG.seed, epoch)[position * 8 : position * 8 + 8]
        total, targets = torch.zeros((), dtype=torch.float64), 0
        for row in rows:
            ids, prompt = dataset[row]["input_ids"], int(dataset.lengths[row, 1])
            logits = reference(ids[None]).logits[0]
            total = total + F.cross_entropy(logits[prompt - 1 : -1], ids[prompt:], reduction="sum")
            targets += len(ids) - prompt
        (total / targets).backward()
        losses[step + 1] = total.item() / targets
        norms[step + 1] = torch.nn.utils.clip_grad_norm_(trained, 0.3).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, 8, TrainConfig(**{**vars(CONFIG), **settings}))
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms.values()) > 0.3  # clipping acts
    assert values(directory, "train/loss") == pytest.approx(losses, rel=0, abs=1e-10)
    assert values(directory, "train/grad_norm") == pytest.approx(norms, rel=0, abs=1e-10)
    want = {k: v for k, v in reference.state_dict().items() if k != "lm_head.weight"}
    assert difference(hf_state_dict(model), want) <= 1e-10


def test_loss_falls(run: Callable[..., Any]) -> None:
    """The training lowers the response loss on held-out rows."""
    _, _, result = run(epochs=3)
    assert result.best_eval_loss < result.base_eval_loss - 0.7


def test_only_the_planned_parameters_change(run: Callable[..., Any], gpt2_dir: Path) -> None:
    """After a training with weight decay, frozen parameters equal those of the file bit for bit."""
    model, _, _ = run(weight_decay=0.5)
    before = dict(GPTModel.from_pretrained(gpt2_dir).named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith(("h.2.", "ln_f."))}
    assert all(p.grad is None for p in model.parameters())


def test_trained_head_moves_alone(run: Callable[..., Any], gpt2_dir: Path) -> None:
    """An untied head trains, the embedding does not."""
    model, directory, result = run(train_head=True)
    wte = GPTModel.from_pretrained(gpt2_dir).wte.weight
    assert torch.equal(model.wte.weight, wte)
    assert not torch.equal(model.lm_head.weight, wte)
    assert "lm_head.weight" in load_file(checkpoint_path(directory, result.steps) / "model.safetensors")


def test_mixed_precision(gpt2_dir: Path, token_dir: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    """A bf16 trunk, fp32 trained weights and moments; losses near fp32's."""
    _, exact, _ = run()
    model = GPTModel.from_pretrained(gpt2_dir)
    freeze_bottom_layers(model, 1)
    cast_frozen(model, torch.bfloat16)
    train(model, token_dir, TrainConfig(**{**vars(CONFIG), "precision": "bf16"}), tmp_path / "bf16", "identity")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    saved = load_file(tmp_path / "bf16" / "step-00000006" / "trainer.safetensors")
    assert {value.dtype for key, value in saved.items() if key.startswith("exp_avg")} == {torch.float32}
    for name in ("train/loss", "eval/loss"):
        assert values(tmp_path / "bf16", name) == pytest.approx(values(exact, name), rel=0.03)


# Schedule


def test_schedule_is_applied(run: Callable[..., Any], gpt2_dir: Path) -> None:
    """The optimizer uses the rate in the journal: AdamW's first step moves a parameter by the learning rate."""
    model, directory, _ = run(max_steps=1, weight_decay=0.0, warmup_ratio=0.0, learning_rate=0.003)
    assert values(directory, "train/lr") == {1: 0.003}
    moved = (model.ln_f.bias - GPTModel.from_pretrained(gpt2_dir).ln_f.bias).abs()
    assert moved.max().item() == pytest.approx(0.003, rel=1e-3)
    _, directory, _ = run(epochs=2, warmup_ratio=0.25)
    config = TrainConfig(**{**vars(CONFIG), "epochs": 2, "warmup_ratio": 0.25})
    assert values(directory, "train/lr") == {step + 1: learning_rate_at(step, 12, config) for step in range(12)}


def test_total_steps() -> None:
    """The last, smaller batch of an epoch is a step; max_steps only shortens a training."""
    assert TrainConfig(epochs=3, batch_size=8).total_steps(42) == 18
    assert TrainConfig(epochs=3, batch_size=8, max_steps=5).total_steps(42) == 5
    assert TrainConfig(epochs=1, batch_size=50, max_steps=5).total_steps(42) == 1


def test_every_row_once_per_epoch_in_another_order(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """litgpt#1712: an epoch has every row exactly once, and the second epoch has another order."""
    seen: list[int] = []

    def spy(dataset: CodeAlpacaDataset, rows: np.ndarray, device: torch.device) -> Pack:
        batch = pack(dataset, rows, device)
        seen.extend(batch.rows.tolist())
        return batch

    monkeypatch.setattr("model.engine.stepper.pack", spy)  # validation rows are packed in another module
    run(epochs=2, micro_batch_tokens=1)
    first, second = seen[:42], seen[42:]
    assert Counter(first) == Counter(second) == Counter(range(42))
    assert first != second
    for part, epoch in ((first, 0), (second, 1)):
        assert set(part[:8]) == set(epoch_order(42, CONFIG.seed, epoch)[:8].tolist())
        assert part == epoch_order(42, CONFIG.seed, epoch).tolist()


# Validation and the best checkpoint


def test_validation_at_start_on_the_way_and_at_the_end(
    run: Callable[..., Any], gpt2_dir: Path, token_dir: Path
) -> None:
    """Validations come before the first step, every eval_freq steps and after the last; the first is of the base."""
    _, directory, result = run(epochs=2, max_steps=10, eval_freq=4)
    found = values(directory, "eval/loss")
    assert list(found) == [0, 4, 8, 10]
    base = row_losses(engine_of(gpt2_dir), CodeAlpacaDataset(token_dir, "validation"), 500)
    assert result.base_eval_loss == found[0] == pytest.approx(mean_loss(*base), rel=1e-6)
    assert values(directory, "eval/perplexity") == pytest.approx({k: math.exp(v) for k, v in found.items()})
    assert (result.steps, result.resumed_from) == (10, 0)
    assert list(values(directory, "train/loss")) == list(range(1, 11))


def test_validation_is_on_the_response_whatever_the_training_loss(run: Callable[..., Any]) -> None:
    """The prompt_loss_weight changes the training loss, but not the validation loss."""
    results = [run(prompt_loss_weight=weight, max_steps=2) for weight in (0.0, 1.0)]
    assert results[0][2].base_eval_loss == results[1][2].base_eval_loss
    assert values(results[0][1], "train/loss") != values(results[1][1], "train/loss")


def test_eval_rows_limits(run: Callable[..., Any], gpt2_dir: Path, token_dir: Path) -> None:
    """eval_rows scores the first rows only."""
    _, _, result = run(max_steps=1, eval_rows=3)
    dataset = CodeAlpacaDataset(token_dir, "validation", limit=3)
    base = row_losses(engine_of(gpt2_dir), dataset, 500)
    assert result.base_eval_loss == pytest.approx(mean_loss(*base), rel=1e-6)


def test_best_checkpoint_is_the_minimum(
    gpt2_dir: Path, token_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoints of the best of five validations and of the last step are kept; the others are deleted."""
    script = iter([5.0, 4.0, 3.0, 3.5, 3.25])
    monkeypatch.setattr("model.engine.trainer.mean_loss", lambda sums, counts: next(script))
    model = GPTModel.from_pretrained(gpt2_dir)
    freeze_bottom_layers(model, 1)
    bias: dict[int, Tensor] = {}

    def watch(report: StepReport) -> None:
        bias[report.step] = model.ln_f.bias.detach().clone()

    config = TrainConfig(**{**vars(CONFIG), "epochs": 2, "max_steps": 8, "eval_freq": 2})
    result = train(model, token_dir, config, tmp_path, "identity", watch)
    assert (result.best_step, result.best_eval_loss, result.base_eval_loss) == (4, 3.0, 5.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "step-00000004", "step-00000008"]
    assert result.best == tmp_path / "step-00000004"
    for path, step in ((result.best, 4), (tmp_path / "step-00000008", 8)):
        assert torch.equal(load_file(path / "model.safetensors")["ln_f.bias"], bias[step])


def test_base_may_be_the_best(run: Callable[..., Any], gpt2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no validation is better than that of the base, the best checkpoint is the base."""
    script = iter([1.0, 2.0, 1.0])
    monkeypatch.setattr("model.engine.trainer.mean_loss", lambda sums, counts: next(script))
    _, _, result = run(max_steps=4, eval_freq=2)
    assert result.best_step == 0
    assert result.best_eval_loss == result.base_eval_loss == 1.0
    fresh, restored = (GPTModel.from_pretrained(gpt2_dir) for _ in range(2))
    freeze_bottom_layers(restored, 1)
    load_trained(result.best, restored)
    assert difference(dict(restored.named_parameters()), dict(fresh.named_parameters())) == 0.0


def test_best_checkpoint_scores_what_it_says(run: Callable[..., Any], gpt2_dir: Path, token_dir: Path) -> None:
    """The best checkpoint's weights give the loss that was reported."""
    _, directory, result = run(epochs=2, eval_freq=3)
    assert result.best_eval_loss == min(values(directory, "eval/loss").values())
    model = GPTModel.from_pretrained(gpt2_dir)
    freeze_bottom_layers(model, 1)
    load_trained(result.best, model)
    scores = row_losses(Engine(model, torch.float32), CodeAlpacaDataset(token_dir, "validation"), 2048)
    assert mean_loss(*scores) == result.best_eval_loss


def test_reports(gpt2_dir: Path, token_dir: Path, tmp_path: Path) -> None:
    """on_step gets every step, with the validation loss after a validation."""
    model = GPTModel.from_pretrained(gpt2_dir)
    freeze_bottom_layers(model, 1)
    reports: list[StepReport] = []
    config = TrainConfig(**{**vars(CONFIG), "max_steps": 5, "eval_freq": 2})
    train(model, token_dir, config, tmp_path, "identity", reports.append)
    assert [report.step for report in reports] == [0, 1, 2, 3, 4, 5]
    assert {report.total_steps for report in reports} == {5}
    assert {report.step: report.eval_loss for report in reports if report.eval_loss} == values(tmp_path, "eval/loss")
    assert {r.step: r.loss for r in reports[1:]} == values(tmp_path, "train/loss")
    assert all(report.tokens_per_second > 0 for report in reports[1:])


# Seeds


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_same_seed_same_training(run: Callable[..., Any], dropout: float) -> None:
    """Equal bit for bit, also with dropout, whatever was drawn from the global generators before."""
    first, one, _ = run(dropout=dropout)
    torch.rand(3)
    np.random.rand(3)
    second, two, _ = run(dropout=dropout)
    assert values(one, "train/loss") == values(two, "train/loss")
    assert values(one, "eval/loss") == values(two, "eval/loss")
    assert difference(dict(first.named_parameters()), dict(second.named_parameters())) == 0.0


def test_another_seed_another_training(run: Callable[..., Any]) -> None:
    """The seed determines the order of rows and the noise of dropout."""
    losses = [values(run(max_steps=2, seed=seed)[1], "train/loss") for seed in (1, 2)]
    assert losses[0] != losses[1]
    one_batch = [
        values(run(max_steps=1, batch_size=42, dropout=0.1, seed=seed)[1], "train/loss")[1] for seed in (1, 2)
    ]
    assert abs(one_batch[0] - one_batch[1]) > 1e-4  # the same rows: only the noise differs


def test_dropout_acts_and_is_off_by_default(run: Callable[..., Any]) -> None:
    """Dropout has the configured rate in training, and none in validation."""
    model, plain, _ = run(max_steps=1)
    assert model.h[2].dropout == 0.0
    model, noised, _ = run(max_steps=1, dropout=0.3)
    assert model.h[2].dropout == 0.3
    assert abs(values(plain, "train/loss")[1] - values(noised, "train/loss")[1]) > 1e-3
    assert values(plain, "eval/loss")[0] == values(noised, "eval/loss")[0]


# Rows without targets, scarce memory, non-finite values


@pytest.fixture
def without_targets(token_dir: Path, tmp_path: Path) -> Callable[[slice], Path]:
    """without_targets(rows): a token directory in which these training rows have a prompt only."""

    def build(rows: slice) -> Path:
        target = tmp_path / "tokens"
        target.mkdir()
        for path in token_dir.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        lengths = np.load(target / "train.lengths.npy")
        lengths[rows, 1] = lengths[rows, 0]
        np.save(target / "train.lengths.npy", lengths)
        return target

    return build


def test_step_without_targets_is_no_step(
    run: Callable[..., Any], without_targets: Callable[[slice], Path], gpt2_dir: Path
) -> None:
    """trl#6668: the loss is 0, and no parameter changes, not even by weight decay."""
    model, directory, result = run(tokens=without_targets(slice(None)), weight_decay=0.5)
    assert set(values(directory, "train/loss").values()) == {0.0}
    before = dict(GPTModel.from_pretrained(gpt2_dir).named_parameters())
    assert difference(dict(model.named_parameters()), before) == 0.0
    moments = load_file(checkpoint_path(directory, result.steps) / "trainer.safetensors")
    assert moments == {}  # AdamW has no state yet


class ScarceMemory:
    """Mocks memory that, from some pass on, holds no pass of more than 300 tokens."""

    def __init__(self, fails_at: int = 0):
        self.fails_at = fails_at
        self.lengths: list[int] = []  # tokens of all passes
        self.failed: list[int] = []  # tokens of passes that failed
        self.plain = Engine.forward_backward

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def forward_backward(engine: Engine, x: Tensor, batch: Pack, loss: Any, first: bool = False) -> Tensor:
            result = self.plain(engine, x, batch, loss, first)  # so that a step fails when part of it is done
            self.lengths.append(len(batch.ids))
            if len(self.lengths) > self.fails_at and len(batch.ids) > 300:
                self.failed.append(len(batch.ids))
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has no more.")
            return result

        monkeypatch.setattr(Engine, "forward_backward", forward_backward)


@pytest.mark.parametrize("fails_at", [0, 3, 7])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_passes_that_memory_does_not_hold_are_halved(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fails_at: int, dropout: float
) -> None:
    """The training goes on from its last checkpoint with passes half as long, and the same steps."""
    monkeypatch.setattr("model.engine.training._FEWEST_TOKENS", 60)
    settings = {"epochs": 2, "eval_freq": 2, "micro_batch_tokens": 10_000, "dropout": dropout}
    warnings: list[str] = []
    _, directory, result = run(double=True, **settings)
    want, weights, steps = values(directory, "train/loss"), load_file(result.best / "model.safetensors"), result.steps
    memory = ScarceMemory(fails_at)
    memory.patch(monkeypatch)
    _, directory, result = run(double=True, warn=warnings.append, **settings)
    assert result.steps == steps == replace(CONFIG, **settings).total_steps(42)
    assert result.resumed_from == 0
    assert values(directory, "train/loss") == pytest.approx(want, abs=1e-10)
    assert difference(load_file(result.best / "model.safetensors"), weights) < 1e-10
    [failed] = memory.failed
    assert 300 < failed < 1000
    assert result.micro_batch_tokens == failed // 2
    assert warnings == [
        f"memory does not hold passes of {failed} tokens: training goes on from the last checkpoint "
        f"with {failed // 2} (micro_batch_tokens), and steps stay the same "
        "(CUDA out of memory. Tried to allocate 1.00 GiB)"
    ]


def test_resumed_training_keeps_the_shorter_passes(
    token_dir: Path, gpt2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed training keeps the shorter passes, which it needs to equal the uninterrupted one bit for bit."""
    monkeypatch.setattr("model.engine.training._FEWEST_TOKENS", 60)
    config = replace(CONFIG, epochs=2, eval_freq=2, micro_batch_tokens=10_000, dropout=0.1)

    def start(name: str, on_step: Callable[[StepReport], None] = lambda report: None) -> TrainResult:
        model = GPTModel.from_pretrained(gpt2_dir)
        freeze_bottom_layers(model, 1)
        return train(model, token_dir, config, tmp_path / name, "identity", on_step)

    def kill(report: StepReport) -> None:
        if report.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as scarce:
        ScarceMemory().patch(scarce)
        whole = start("whole")
        with pytest.raises(KeyboardInterrupt):
            start("cut", kill)
    cut = start("cut")
    assert (cut.resumed_from, cut.micro_batch_tokens) == (4, whole.micro_batch_tokens)
    assert values(tmp_path / "cut", "train/loss") == values(tmp_path / "whole", "train/loss")
    weights = [load_file(result.best / "model.safetensors") for result in (whole, cut)]
    assert difference(*weights) == 0.0


def test_a_trained_model_is_not_taken_for_the_base(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """If memory runs out and every checkpoint is damaged or gone, the run ends: its model is the base no longer.

    Mocks memory that does not hold long passes.
    """
    monkeypatch.setattr("model.engine.training._FEWEST_TOKENS", 60)
    ScarceMemory(fails_at=3).patch(monkeypatch)
    monkeypatch.setattr("model.engine.saving.write_checkpoint", lambda directory, *arguments: directory)
    with pytest.raises(
        RuntimeError, match="no whole checkpoint to go on from after memory ran out: start the run again"
    ):
        run(epochs=2, eval_freq=2, micro_batch_tokens=10_000)


def test_memory_that_holds_no_pass_is_an_error(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the parameters to lower. Mocks memory that holds no pass."""
    monkeypatch.setattr("model.engine.training._FEWEST_TOKENS", 60)
    tries = []

    def none_left(*arguments: Any, **named: Any) -> Any:
        tries.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Engine, "forward_backward", none_left)
    with pytest.raises(torch.OutOfMemoryError, match=r"hold passes of 60 tokens .* lower num_unfrozen_layers"):
        run(micro_batch_tokens=200)
    assert len(tries) == 3  # 200, 100, 60


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_full_memory_of_a_gpu_is_known_by_all_its_names(error: RuntimeError, full: bool) -> None:
    """Errors of torch's allocator, CUDA, its libraries and Triton are recognised by their messages."""
    assert ran_out_of_memory(error) is full


def test_rows_without_targets_weigh_nothing(
    run: Callable[..., Any], without_targets: Callable[[slice], Path], gpt2_dir: Path
) -> None:
    """If half of the rows have no target, the mean is over the tokens of the other half."""
    tokens = without_targets(slice(0, 21))
    _, directory, _ = run(tokens=tokens, batch_size=42, max_steps=1)
    sums, counts = row_losses(engine_of(gpt2_dir), CodeAlpacaDataset(tokens, "train"), 500)
    assert (counts[:21] == 0).all()
    assert values(directory, "train/loss")[1] == pytest.approx(sums[21:].sum() / counts[21:].sum(), rel=1e-5)


def finite(directory: Path) -> bool:
    tensors = [tensor for path in directory.rglob("*.safetensors") for tensor in load_file(path).values()]
    return bool(tensors) and all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())


def poisoned(model: GPTModel, name: str, step: int) -> Callable[[StepReport], None]:
    def hook(report: StepReport) -> None:
        if report.step == step:
            dict(model.named_parameters())[name].data.view(-1)[3] = math.nan

    return hook


@pytest.mark.parametrize("name", ["h.2.mlp.c_fc.weight", "h.0.attn.c_attn.bias", "ln_f.weight"])
def test_nan_weight_stops_before_the_update(tiny_model: GPTModel, token_dir: Path, tmp_path: Path, name: str) -> None:
    """With a NaN in a trained or frozen weight no update is made, and no checkpoint has it."""
    before: dict[str, Tensor] = {}

    def hook(report: StepReport) -> None:
        poisoned(tiny_model, name, 3)(report)
        if report.step == 3:
            before.update({n: p.detach().clone() for n, p in tiny_model.named_parameters()})

    config = TrainConfig(**{**vars(CONFIG), "eval_freq": 2})
    assert config.precision == "fp32"  # and so it is not suggested
    with pytest.raises(
        NonFiniteError, match=r"at step 4: stopped before the update; lower learning_rate \(now 0.01\)$"
    ):
        train(tiny_model, token_dir, config, tmp_path, "identity", hook)
    for other, parameter in tiny_model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7), before[other].nan_to_num(7)), other
    assert list(values(tmp_path, "train/loss")) == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000002"]
    assert finite(tmp_path)


def test_nan_before_a_validation_is_not_saved(
    tiny_model: GPTModel, token_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN made by an update is found by the validation, before the checkpoint is saved."""
    step = AdamW.step

    def bad_step(self: AdamW, *args: Any) -> None:
        step(self, *args)
        self.groups[0].parameters[0].data[0, 0] = math.nan

    monkeypatch.setattr(AdamW, "step", bad_step)
    config = TrainConfig(**{**vars(CONFIG), "eval_freq": 1})
    with pytest.raises(NonFiniteError, match="validation loss is nan at step 1"):
        train(tiny_model, token_dir, config, tmp_path, "identity")
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000000"]
    assert finite(tmp_path)


def test_nan_from_the_start_saves_nothing(tiny_model: GPTModel, token_dir: Path, tmp_path: Path) -> None:
    """A NaN in the base is found by the validation at step 0."""
    poisoned(tiny_model, "wpe.weight", 0)(StepReport(0, 1, 0.0, 0.0, 0.0, None))
    with pytest.raises(NonFiniteError, match="step 0"):
        train(tiny_model, token_dir, CONFIG, tmp_path, "identity")
    assert not list(tmp_path.glob("step-*"))


def test_infinite_gradient_stops_before_the_update(tiny_model: GPTModel, token_dir: Path, tmp_path: Path) -> None:
    """A gradient may be infinite though the loss is finite; clipping would make all gradients NaN."""
    tiny_model.h[2].attn.c_proj.bias.register_hook(lambda gradient: gradient * math.inf)
    before = {name: p.detach().clone() for name, p in tiny_model.named_parameters()}
    with pytest.raises(NonFiniteError, match="gradient norm"):
        train(tiny_model, token_dir, CONFIG, tmp_path, "identity")
    assert difference(dict(tiny_model.named_parameters()), before) == 0.0
    assert finite(tmp_path)


@pytest.mark.parametrize("learning_rate", [1e3, 1e6, 1e20])
def test_divergence_is_a_non_finite_error(run: Callable[..., Any], tmp_path: Path, learning_rate: float) -> None:
    """A training with an absurd learning rate either ends in a NonFiniteError or finishes with finite weights."""
    with suppress(NonFiniteError):
        run(learning_rate=learning_rate, eval_freq=2)
    assert finite(tmp_path)


def test_unknown_precision_is_refused_by_name(run: Callable[..., Any]) -> None:
    """The error names the precision and comes before any computation."""
    with pytest.raises(ValueError, match="precision 'fp8'"):
        run(precision="fp8")


_IMPORTS = """
import sys
from pathlib import Path
import torch
from model import GPTModel
from model.engine.config import TrainConfig
from model.engine.training import train
from model.net.config import GPTConfig
from model.net.device import cast_frozen, resolve_precision
from model.net.freezing import freeze_bottom_layers
with torch.device(sys.argv[3]):
    model = GPTModel(GPTConfig(vocab_size=320, n_positions=512, n_embd=64, n_layer=2, n_head=1))
freeze_bottom_layers(model, 1)
cast_frozen(model, resolve_precision("auto", torch.device(sys.argv[3])))
train(model, Path(sys.argv[1]), TrainConfig(max_steps=2, batch_size=4, dropout=0.1), Path(sys.argv[2]), "identity")
slow = {"torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy", "scipy", "transformers"} & {*sys.modules}
assert not slow, slow
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_a_training_imports_nothing_slow(token_dir: Path, tmp_path: Path, device: str) -> None:
    """Of torch's compilers and their libraries, whose import takes seconds on a slow processor."""
    command = [sys.executable, "-c", _IMPORTS, str(token_dir), str(tmp_path / "training"), device]
    subprocess.run(command, check=True, timeout=300)
