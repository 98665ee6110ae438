"""Code that only a GPU runs: kernels for packed documents, CUDA graphs, the fused loss. Skipped without a GPU."""

from __future__ import annotations

import gc
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.data.packing import pack
from model.data.tokens import CodeAlpacaDataset
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.journal import read_journal
from model.engine.loss import cross_entropy, head_loss, padded_head
from model.engine.scoring import row_losses
from model.engine.trainer import StepReport, TrainingStoppedError
from model.engine.training import train
from model.engine.trunk import TrunkCacheConfig, TrunkOutputs
from model.net.attention import Documents
from model.net.config import GPTConfig
from model.net.device import cast_frozen, device_choices, device_key, resolve_precision
from model.net.freezing import freeze_bottom_layers
from model.net.gpt import GPTModel
from model.net.noise import FIRST_HEAD, MLP_BRANCH, Noise
from ops.machine.lock import exclusive_any

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def small_model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> GPTModel:
    """A GPT-2 with heads of width 64, like the real sizes; all but its top two blocks are frozen."""
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = GPTModel(GPTConfig(vocab_size=320, n_positions=512, n_embd=128, n_layer=4, n_head=2))
    freeze_bottom_layers(model, 2)
    cast_frozen(model, dtype)
    return model.train()


def documents_of(lengths: list[int], rate: float = 0.0) -> Documents:
    """Packed documents of these lengths, on the GPU, with noise if there is a rate of dropout."""
    sizes = torch.tensor(lengths)
    ends = torch.repeat_interleave(sizes.cumsum(0), sizes).int().cuda()
    begins = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes).int().cuda()
    rows = torch.repeat_interleave(3 * torch.arange(len(lengths)), sizes).cuda()
    tokens = (rows << 32) + torch.arange(len(rows), device="cuda") - begins
    noise = Noise(rate, torch.tensor([11, 4], device="cuda"), tokens) if rate else None
    return Documents(lengths, begins, ends, noise)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float32, 2e-5)], ids=str
)
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (2, 32), (3, 16), (1, 128)])
def test_packed_attention_agrees_with_plain_attention(
    heads: int, width: int, dtype: torch.dtype, tolerance: float, rate: float
) -> None:
    """Output and gradients of the kernel are within its dtype's error of plain attention in float64."""
    from model.engine import attention_kernels, noise_kernels

    documents = documents_of([1, 200, 3, 64, 128, 129, 511, 1, 1, 33], rate)
    torch.manual_seed(0)
    qkv = torch.randn(sum(documents.lengths), 3 * heads * width, device="cuda").to(dtype).requires_grad_()
    mask = noise_kernels.masks(documents.noise, 5, heads)[0] if documents.noise else None
    got = attention_kernels.attention(qkv, documents.begins, documents.ends, heads, mask)
    upstream = torch.randn_like(got)
    got_gradient = torch.autograd.grad(got, qkv, upstream)[0]
    exact = qkv.detach().double().requires_grad_()
    plain = documents.layer(5).attend(*exact.unflatten(1, (3, heads, width)).unbind(1), rate).flatten(1)
    want_gradient = torch.autograd.grad(plain, exact, upstream.double())[0]
    torch.testing.assert_close(got.double(), plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got_gradient.double(), want_gradient, rtol=2 * tolerance, atol=4 * tolerance)


def test_noise_is_the_same_on_cpu_and_gpu() -> None:
    """Keys, masks of the residual branches and masks of the attention weights, bit for bit."""
    from model.engine import attention_kernels, noise_kernels, pointwise_kernels

    lengths, heads, width, rate = [60, 1, 64, 33], 3, 64, 0.37
    documents = documents_of(lengths, rate)
    noise = documents.noise
    assert noise is not None
    on_cpu = Noise(rate, noise.origin.cpu(), noise.tokens.cpu())
    keys = on_cpu.keys(23, heads)
    assert torch.equal(noise.keys(23, heads).cpu(), keys)
    assert torch.equal(noise_kernels.token_keys(noise, 23, heads).cpu().long() & 0xFFFFFFFF, keys)

    of_weights, *branches = noise_kernels.masks(noise, 23, heads)
    count, zero = sum(lengths), torch.zeros(1000, device="cuda")
    for mask, stream in zip(branches, keys, strict=False):
        ones = torch.ones(count, 1000, device="cuda", requires_grad=True)
        norm = torch.nn.LayerNorm(1000, device="cuda")
        total, normal = pointwise_kernels.add_norm(torch.zeros_like(ones), ones, zero, norm, mask)
        want = on_cpu.drop(torch.ones(count, 1000), stream)
        assert torch.equal(total.cpu(), want)
        gradient = torch.autograd.grad([total, normal], ones, [torch.ones_like(total), torch.zeros_like(normal)])[0]
        assert torch.equal(gradient.cpu(), want)

    # Queries and keys of zeros give equal weights; values that are unit vectors show which of them were kept.
    qkv = torch.zeros(count, 3, heads, width, device="cuda")
    position = (noise.tokens & 0xFFFFFFFF).view(-1, 1, 1)
    qkv[:, 2] = (torch.arange(width, device="cuda") == position).float()
    out = attention_kernels.attention(qkv.flatten(1), documents.begins, documents.ends, heads, of_weights)
    visible = torch.arange(width) <= position.view(-1, 1).cpu()
    for head, got in enumerate(out.unflatten(1, (heads, width)).unbind(1)):
        assert torch.equal(got.cpu() != 0, on_cpu.kept(keys[FIRST_HEAD + head], width) & visible)


def test_documents_do_not_see_each_other() -> None:
    """Values of other documents change neither output nor gradient, bit for bit."""
    from model.engine import attention_kernels

    documents = documents_of([100, 50, 90])
    qkv = torch.randn(240, 3 * 128, device="cuda").bfloat16()
    upstream = torch.randn(240, 128, device="cuda").bfloat16()

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = attention_kernels.attention(leaf, documents.begins, documents.ends, 2)
        return out[100:150], torch.autograd.grad(out, leaf, upstream)[0][100:150]

    want = run()
    qkv[:100], qkv[150:], upstream[:100], upstream[150:] = 7.0, -7.0, 5.0, -5.0
    assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("width", [192, 768, 1024, 1600])
def test_add_norm_agrees_with_fp32(width: int, rate: float) -> None:
    """Sum, norm and all five gradients of the fused kernels against torch's in fp32."""
    from model.engine import noise_kernels, pointwise_kernels

    torch.manual_seed(0)
    x, y = (torch.randn(1000, width, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    bias = torch.randn(width, device="cuda").bfloat16().requires_grad_()
    norm = torch.nn.LayerNorm(width, device="cuda")
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    noise = documents_of([999, 1], rate).noise
    mask = noise_kernels.masks(noise, 2, 4)[MLP_BRANCH + 1] if noise else None
    outputs = pointwise_kernels.add_norm(x, y, bias, norm, mask)
    upstream = [torch.randn_like(out) for out in outputs]
    inputs = [x, y, bias, norm.weight, norm.bias]
    got = torch.autograd.grad(outputs, inputs, upstream)
    exact = [p.detach().float().requires_grad_() for p in inputs]
    branch = exact[1] + exact[2]
    total = exact[0] + (noise.drop(branch, noise.keys(2, 4)[MLP_BRANCH]) if noise else branch)
    normal = F.layer_norm(total, (width,), exact[3], exact[4], norm.eps)
    want = torch.autograd.grad([total, normal], exact, [u.float() for u in upstream])
    for a, b in zip([*outputs, *got], [total, normal, *want], strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.parametrize("width", [640, 3072, 4096, 6400])
def test_bias_gelu_agrees_with_fp32(width: int) -> None:
    """Output and both gradients against torch's in fp32."""
    from model.engine import pointwise_kernels

    torch.manual_seed(0)
    x = (3 * torch.randn(700, width, device="cuda")).bfloat16().requires_grad_()
    bias = torch.randn(width, device="cuda").bfloat16().requires_grad_()
    out = pointwise_kernels.bias_gelu(x, bias)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, [x, bias], upstream)
    exact = [p.detach().float().requires_grad_() for p in (x, bias)]
    plain = F.gelu(exact[0] + exact[1], approximate="tanh")
    want = torch.autograd.grad(plain, exact, upstream.float())
    for a, b in zip([out, *got], [plain, *want], strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=1e-2 * b.abs().max().item())


def test_chosen_rows_gradients_go_where_they_came_from() -> None:
    """Gradients equal those of torch's indexing bit for bit; rows that were not chosen get zeros."""
    from model.engine import pointwise_kernels

    torch.manual_seed(0)
    x = torch.randn(500, 192, device="cuda").bfloat16().requires_grad_()
    index = torch.randperm(500, device="cuda")[:170]
    upstream = torch.randn(170, 192, device="cuda").bfloat16()
    chosen = pointwise_kernels.choose(x, index)
    assert torch.equal(chosen, x[index])
    got = torch.autograd.grad(chosen, x, upstream)[0]
    assert torch.equal(got, torch.autograd.grad(x[index], x, upstream)[0])
    assert pointwise_kernels.choose(x, index[:0]).shape == (0, 192)


@pytest.mark.parametrize("rate", [0.0, 0.2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 8e-3), (torch.float32, 1e-4)], ids=str
)
def test_fused_blocks_are_the_models(token_dir: Path, dtype: torch.dtype, tolerance: float, rate: float) -> None:
    """Trunk and top with the fused kernels are within the dtype's error of the plain blocks in float64."""
    dataset = CodeAlpacaDataset(token_dir, "train")
    model, exact = small_model(dtype=dtype), small_model(dtype=dtype).double()
    for each in (model, exact):
        each.set_dropout(rate)
    engine, plain = Engine(model, dtype, seed=3), Engine(exact, torch.float64, seed=3)
    batch = pack(dataset, np.arange(30), engine.device)
    with torch.no_grad():
        trunk = plain.trunk(batch)
        torch.testing.assert_close(engine.trunk(batch).double(), trunk, rtol=tolerance, atol=tolerance)
        hidden = exact.top(trunk, plain.documents(batch))[batch.predictors]
        torch.testing.assert_close(
            engine.top(trunk.to(dtype), batch).double(), hidden, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_gpus_without_triton_train_the_same(
    token_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """PyTorch's own kernels, as on a T4, in fp16: the losses of the fused kernels. Mocks an older GPU."""
    config = TrainConfig(epochs=2, batch_size=8, precision="fp16", learning_rate=1e-3, dropout=rate)

    def losses(name: str) -> list[float]:
        train(small_model(dtype=torch.float16), token_dir, config, tmp_path / name, "x")
        lines = read_journal(tmp_path / name / "metrics.jsonl")
        return [line["metrics"]["train/loss"] for line in lines if "train/loss" in line["metrics"]]

    fused = losses("fused")
    monkeypatch.setattr("model.engine.fused.runs_triton", lambda device: False)
    assert losses("plain") == pytest.approx(fused, rel=3e-3)


def test_adapter_in_a_block_is_not_skipped(token_dir: Path) -> None:
    """A linear layer with an extra term, as a low-rank adapter adds one: scores are those of the plain blocks."""

    class Adapted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 2.0 * x[..., : self.out_features]

    model = small_model().eval()
    engine = Engine(model, torch.bfloat16)
    batch = pack(CodeAlpacaDataset(token_dir, "train"), np.arange(30), engine.device)
    x = engine.trunk(batch)
    with torch.no_grad():
        before = engine.top(x, batch)
        model.h[3].mlp.c_proj.__class__ = Adapted
        got = engine.top(x, batch)
        exact = small_model().float()
        exact.h[3].mlp.c_proj.__class__ = Adapted
        want = exact.top(x.float(), batch.documents)[batch.predictors]
    torch.testing.assert_close(got.float(), want, rtol=5e-2, atol=5e-2)
    assert (got - before).abs().max() > 0.1
    assert not engine._can_replay(x)


@pytest.mark.parametrize("vocabulary", [320, 321, 50257])
def test_fused_loss_agrees_with_autograd(vocabulary: int) -> None:
    """Loss and gradient of the head in bf16 against fp32 autograd, whatever the padding of the vocabulary."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, device="cuda").bfloat16(), torch.randn(vocabulary, 64, device="cuda") * 0.2
    targets = torch.randint(vocabulary, (300,), device="cuda")
    total, gradient = head_loss(hidden, padded_head(weight, torch.bfloat16), vocabulary, targets)
    exact = hidden.float().requires_grad_()
    want = F.cross_entropy(exact @ weight.bfloat16().float().t(), targets, reduction="sum")
    want.backward()
    assert total.item() == pytest.approx(want.item(), rel=2e-4)
    assert exact.grad is not None
    torch.testing.assert_close(gradient.float(), exact.grad, rtol=3e-2, atol=1e-2)


def test_every_loss_is_of_the_logits_that_were_given() -> None:
    """The kernel overwrites the logits: no loss may be read from a gradient, which a faster warp has written."""
    torch.manual_seed(0)
    logits = torch.zeros(8192, 50304, device="cuda", dtype=torch.bfloat16)
    logits[:, :50257] = 4 * torch.randn(8192, 50257, device="cuda")
    targets = torch.randint(50257, (8192,), device="cuda")
    want = F.cross_entropy(logits[:, :50257].float(), targets, reduction="none")
    first, _ = cross_entropy(logits.clone(), targets, 50257)
    torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-4)
    for _ in range(50):
        again, _ = cross_entropy(logits.clone(), targets, 50257)
        assert torch.equal(again, first)


def test_sure_target_keeps_its_gradient() -> None:
    """The gradient p - 1 of a target with p near 1 is not rounded to 0 in bf16."""
    logits = torch.zeros(1, 64, device="cuda", dtype=torch.bfloat16)
    logits[0, 3] = 12.0
    exact = logits.double()[:, :60].requires_grad_()
    F.cross_entropy(exact, torch.tensor([3], device="cuda")).backward()
    assert exact.grad is not None
    _, gradient = cross_entropy(logits, torch.tensor([3], device="cuda"), 60)
    assert gradient[0, 3].item() == pytest.approx(exact.grad[0, 3].item(), rel=1e-2)


def test_graphs_give_the_gradients_of_eager_steps(token_dir: Path) -> None:
    """Replayed passes add the same gradients as plain passes, for packs of several sizes."""
    dataset = CodeAlpacaDataset(token_dir, "train")
    results = []
    for replay in (True, False):
        model = small_model()
        engine = Engine(model, torch.bfloat16)
        if not replay:
            engine._can_replay = lambda x: False  # type: ignore[method-assign]
        head = padded_head(model.lm_head.weight, torch.bfloat16)
        losses = []
        for parameter in model.parameters():
            if replay and parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 7.0)  # of the step before
        for place, rows in enumerate(([0, 1], [2, 3, 4, 5, 6, 7, 8], [9], list(range(10, 40)))):
            batch = pack(dataset, np.array(rows), engine.device)
            losses.append(
                engine.forward_backward(
                    engine.trunk(batch), batch, lambda h, b=batch, w=head: head_loss(h, w, 320, b.targets), place == 0
                ).item()
            )
        assert engine.keeps_gradients == replay
        results.append((losses, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (replayed, got), (plain, want) = results
    assert replayed == pytest.approx(plain, rel=1e-3)
    for name, gradient in want.items():
        assert gradient is not None
        assert got[name] is not None
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=2e-2, atol=2e-2 * scale)


def test_replayed_gradients_do_not_depend_on_earlier_packs(token_dir: Path) -> None:
    """A pack gives the same gradients bit for bit, whichever packs came before it."""
    dataset = CodeAlpacaDataset(token_dir, "train")
    results = []
    for earlier in ([], [[0]], [[1, 2], list(range(42)), [5]]):
        model = small_model()
        engine = Engine(model, torch.bfloat16)
        head = padded_head(model.lm_head.weight, torch.bfloat16)
        for rows in (*earlier, list(range(10, 40))):
            batch = pack(dataset, np.array(rows), engine.device)
            engine.forward_backward(
                engine.trunk(batch), batch, lambda h, b=batch, w=head: head_loss(h, w, 320, b.targets), first=True
            )
        results.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]


def test_passes_that_memory_does_not_hold_are_halved(token_dir: Path, tmp_path: Path) -> None:
    """With memory enough for short passes only, training goes on with them, to the same losses."""
    total = torch.cuda.get_device_properties(0).total_memory
    said: list[str] = []

    def run(name: str, tokens_per_pass: int | None) -> tuple[int, list[float]]:
        gc.collect()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = GPTModel(GPTConfig(vocab_size=320, n_positions=512, n_embd=768, n_layer=6, n_head=12))
        freeze_bottom_layers(model, 5)
        cast_frozen(model, torch.bfloat16)
        config = TrainConfig(epochs=3, batch_size=42, precision="bf16", micro_batch_tokens=tokens_per_pass)
        result = train(model, token_dir, config, tmp_path / name, "x", warn=said.append)
        metrics = [record["metrics"] for record in read_journal(tmp_path / name / "metrics.jsonl")]
        return result.peak_memory_bytes, [of["train/loss"] for of in metrics if "train/loss" in of]

    (short, want), (long, _) = run("short", 1_024), run("long", None)
    assert not said
    cap = (short + long) // 2
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        took, got = run("capped", None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said
    assert all("does not hold passes of" in message for message in said)
    assert took <= cap
    assert len(got) == 3
    assert got == pytest.approx(want, rel=1e-3)


def assert_same_training(whole: GPTModel, resumed: GPTModel, directory: Path) -> None:
    """Weights, and losses in the journals of ``directory / "whole"`` and ``directory / "cut"``, are equal."""
    for (name, want), got in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(want, got), name
    losses = [
        [r["metrics"].get("train/loss") for r in read_journal(directory / d / "metrics.jsonl")]
        for d in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("max_bytes", [0, 10**9])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_resume_equals_uninterrupted_bit_for_bit(
    token_dir: Path, tmp_path: Path, precision: Any, dropout: float, max_bytes: int
) -> None:
    """Killed between two checkpoints, with the outputs on the device lost: losses and weights are equal."""
    config = TrainConfig(
        epochs=4, batch_size=8, eval_freq=5, precision=precision, learning_rate=1e-3, dropout=dropout
    )
    cache = TrunkCacheConfig(max_bytes=max_bytes)
    dtype = resolve_precision(precision, torch.device("cuda"))

    class KilledError(Exception):
        pass

    def kill(report: object) -> None:
        if getattr(report, "step", 0) == 13:
            raise KilledError

    whole, cut, again = (small_model(dtype=dtype) for _ in range(3))
    train(whole, token_dir, config, tmp_path / "whole", "x", cache=cache)
    with pytest.raises(KilledError):
        train(cut, token_dir, config, tmp_path / "cut", "x", kill, cache=cache)
    result = train(again, token_dir, config, tmp_path / "cut", "x", cache=cache)
    assert result.resumed_from == 10
    assert_same_training(whole, again, tmp_path)


@pytest.mark.parametrize("step", [1, 7, 13])
def test_stopped_on_request_equals_uninterrupted_bit_for_bit(token_dir: Path, tmp_path: Path, step: int) -> None:
    """Queued steps are finished and reported, and the checkpoint is of the last of them."""
    config = TrainConfig(epochs=4, batch_size=8, eval_freq=5, precision="bf16", learning_rate=1e-3, dropout=0.1)
    asked = count()
    reports: list[StepReport] = []
    whole, cut, again = small_model(), small_model(), small_model()
    train(whole, token_dir, config, tmp_path / "whole", "x")

    def should_stop() -> bool:
        return bool(reports) and next(asked) == step  # reports are late, but for that of the base

    with pytest.raises(TrainingStoppedError, match=f"after step {step} of"):
        train(cut, token_dir, config, tmp_path / "cut", "x", reports.append, should_stop=should_stop)
    assert [p.name for p in (tmp_path / "cut").glob(f"step-{step:08d}")]
    assert train(again, token_dir, config, tmp_path / "cut", "x").resumed_from == step
    assert_same_training(whole, again, tmp_path)


def test_dropout_does_not_touch_scores(token_dir: Path) -> None:
    """Dropout does not change the scores of rows, bit for bit, and is still on for training afterwards."""
    dataset = CodeAlpacaDataset(token_dir, "validation")
    model = small_model()
    want = row_losses(Engine(model, torch.bfloat16), dataset, 512)[0]
    model.set_dropout(0.5)
    assert np.array_equal(row_losses(Engine(model, torch.bfloat16), dataset, 512)[0], want)
    assert model.training


def test_two_devices_give_two_holders(tmp_path: Path) -> None:
    """auto means any GPU: if the first is locked, the second is used. Locks have the names of physical devices."""
    names = [device_key(place) for place in device_choices("auto")]
    assert len(set(names)) == torch.cuda.device_count()
    assert device_choices("cuda:0") == [torch.device("cuda", 0)]
    with exclusive_any(tmp_path, names, "one", print) as first:
        assert first.what == names[0] == device_key(torch.device("cuda", 0))
        if len(names) > 1:
            with exclusive_any(tmp_path, names, "two", print) as second:
                assert second.what == names[1]


def test_step_that_is_not_finite_changes_nothing(
    token_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads the loss steps later; the model is still unchanged since the step before the first such one."""
    model = small_model()
    state: dict[str, torch.Tensor] = {}
    passes = 0
    plain = Engine.forward_backward

    def poisoned(self: Engine, *arguments: object) -> torch.Tensor:
        nonlocal passes
        loss = plain(self, *arguments)  # type: ignore[arg-type]
        passes += 1
        if passes == 3:
            state.update({n: p.detach().clone() for n, p in model.named_parameters()})
            gradient = model.h[3].attn.c_proj.bias.grad
            assert gradient is not None
            gradient[5] = float("nan")
        return loss

    monkeypatch.setattr(Engine, "forward_backward", poisoned)
    config = TrainConfig(epochs=4, batch_size=8, eval_freq=100, precision="bf16")
    with pytest.raises(ArithmeticError, match="step 3"):
        train(model, token_dir, config, tmp_path, "x")
    assert passes > 3  # later steps were queued, and skipped
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name]), name


def test_outputs_kept_on_the_device_are_the_models(
    token_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs kept on the device or the host equal the computed ones bit for bit; no file is written."""
    monkeypatch.setattr("model.engine.trunk._READ_BYTES", 1e30)
    dataset = CodeAlpacaDataset(token_dir, "train")
    engine = Engine(small_model(), torch.bfloat16)
    order = np.arange(len(dataset))
    kept = TrunkOutputs(engine, dataset, order, 512, 3, TrunkCacheConfig(tmp_path))
    assert (kept.place, [*tmp_path.iterdir()]) == ("device", [])
    first = pack(dataset, order[:20], engine.device)
    mixed = pack(dataset, order[[3, 30, 1]], engine.device)
    want = engine.trunk(first)
    torch.testing.assert_close(kept(first), want, rtol=2e-2, atol=2e-2)
    again = kept(mixed)
    one = pack(dataset, order[[3]], engine.device)
    third = int(np.cumsum(first.documents.lengths)[2])
    assert torch.equal(again[: len(one.ids)], kept(first)[third : third + len(one.ids)])
    kept.place, kept.values = "host", kept.values.cpu()  # type: ignore[union-attr]
    assert torch.equal(kept(mixed), again)
