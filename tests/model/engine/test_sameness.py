"""The engine (packing, cached trunk outputs, micro-batches) trains exactly like a plain loop over padded batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import GPTModel, freeze_bottom_layers
from model.data.packing import pack
from model.data.tokens import CodeAlpacaDataset, epoch_order
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.journal import read_journal
from model.engine.loss import head_loss, padded_head
from model.engine.stepper import learning_rate_at
from model.engine.trainer import TrainResult
from model.engine.training import train
from model.engine.trunk import TrunkCacheConfig
from model.net.attention import Layer, Layout, Rows
from model.net.noise import FIRST_HEAD, Noise

BASE = TrainConfig(
    epochs=20,
    batch_size=8,
    micro_batch_tokens=130,  # a step of some 400 tokens takes several passes
    learning_rate=3e-3,
    weight_decay=0.1,
    max_grad_norm=0.5,
    eval_freq=1000,
    eval_rows=2,
    precision="fp32",
)
Build = Callable[..., GPTModel]
Losses = dict[str, list[float]]


@pytest.fixture
def build(gpt2_dir: Path) -> Build:
    """build(double=..., frozen=..., train_head=...): the model, fresh."""

    def load(double: bool = True, frozen: bool = True, train_head: bool = False) -> GPTModel:
        model = GPTModel.from_pretrained(gpt2_dir)
        if frozen:
            freeze_bottom_layers(model, 1, train_head)
        return model.double() if double else model

    return load


@pytest.fixture
def run(token_dir: Path, tmp_path: Path) -> Callable[..., tuple[Losses, TrainResult]]:
    """run(model, config, cache): losses and gradient norms of all steps of the engine."""
    calls = count()

    def start(model: GPTModel, config: TrainConfig, **kwargs: Any) -> tuple[Losses, TrainResult]:
        directory = tmp_path / f"training{next(calls)}"
        result = train(model, token_dir, config, directory, "me", **kwargs)
        steps = [line["metrics"] for line in read_journal(directory / "metrics.jsonl")]
        steps = [metrics for metrics in steps if "train/loss" in metrics]
        return {name: [m[f"train/{name}"] for m in steps] for name in ("loss", "grad_norm")}, result

    return start


class MaskedRows(Rows):
    """Right-padded rows with the masks of the engine's dropout, applied one row, head and branch at a time.

    Args:
        config: of the training.
        step: optimizer step.
        rows: numbers of the rows.
        longest: tokens of the longest.
    """

    def __init__(self, config: TrainConfig, step: int, rows: np.ndarray[Any, Any], longest: int):
        positions = torch.arange(longest)
        origin = torch.tensor([config.seed, step])
        self.noises = [Noise(config.dropout, origin, (int(row) << 32) + positions) for row in rows]
        self.index = 0

    def layer(self, index: int) -> Layer:
        self.index = index
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        if not dropout:
            return super().attend(q, k, v, dropout)
        length, heads = q.size(1), q.size(2)
        out = torch.empty_like(q)
        for row, noise in enumerate(self.noises):
            keys = noise.keys(self.index, heads)
            for head in range(heads):
                scores = q[row, :, head] @ k[row, :, head].T / math.sqrt(q.size(-1))
                scores = scores + torch.full((length, length), -math.inf).triu(1)
                weights = noise.drop(F.softmax(scores, -1), keys[FIRST_HEAD + head])
                out[row, :, head] = weights @ v[row, :, head]
        return out

    def drop(self, x: Tensor, branch: int, dropout: float) -> Tensor:
        if not dropout:
            return x
        parts = zip(x, self.noises, strict=True)
        return torch.stack([noise.drop(row, noise.keys(self.index, 0)[branch]) for row, noise in parts])


def logits_of(model: GPTModel, batch: Tensor, layout: Layout) -> Tensor:
    """Of right-padded rows (B, T)."""
    return model.lm_head(model.top(model.trunk(batch, torch.arange(batch.size(1)), layout), layout))


def plain_loop(model: GPTModel, token_dir: Path, config: TrainConfig) -> Losses:
    """A loop without the engine: right-padded batches, the whole model, torch's cross-entropy, clipping and AdamW."""
    data = CodeAlpacaDataset(token_dir, "train")
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=False, fused=False)
    per_epoch = math.ceil(len(data) / config.batch_size)
    losses: Losses = {"loss": [], "grad_norm": []}
    total_steps = config.max_steps or 0
    model.set_dropout(config.dropout)
    model.train()
    for step in range(total_steps):
        epoch, position = divmod(step, per_epoch)
        start = position * config.batch_size
        rows = epoch_order(len(data), config.seed, epoch)[start : start + config.batch_size]
        ids = [data[int(row)]["input_ids"] for row in rows]
        weights = []
        for row, tokens in zip(rows, ids, strict=True):
            weight = torch.ones(len(tokens), dtype=torch.float64)
            weight[: data.lengths[row, 1]] = config.prompt_loss_weight
            weight[0] = 0  # nothing predicts the first token
            weights.append(weight)
        batch, weight = pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)
        logits = logits_of(model, batch, MaskedRows(config, step, rows, batch.size(1)))[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        loss = (each * weight[:, 1:].flatten().to(each.dtype)).sum() / weight.sum()
        loss.backward()
        losses["loss"].append(loss.item())
        losses["grad_norm"].append(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, total_steps, config)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def config_of(**settings: Any) -> TrainConfig:
    return TrainConfig(**{**vars(BASE), **settings})


def assert_same(got: Losses, want: Losses, tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert len(got[name]) == len(want[name])
        np.testing.assert_allclose(got[name], want[name], rtol=tolerance, atol=0, err_msg=name)


def assert_same_weights(got: GPTModel, want: GPTModel, tolerance: float) -> None:
    for (name, mine), theirs in zip(got.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=name)


def test_hundred_steps_in_float64(build: Build, run: Callable[..., Any], token_dir: Path) -> None:
    """Losses, gradient norms and weights equal a plain loop's over 17 epochs, with cached trunk outputs."""
    config = config_of(max_steps=100)
    model, reference = build(), build()
    got, result = run(model, config)
    want = plain_loop(reference, token_dir, config)
    assert "in memory" in result.trunk
    assert result.trunk_hit_share > 0.9
    assert min(want["grad_norm"]) > 0
    assert max(want["grad_norm"]) > config.max_grad_norm  # clipping acts
    assert want["loss"][-1] < want["loss"][0] - 1  # the model learns
    assert_same(got, want, 1e-10)
    assert_same_weights(model, reference, 1e-9)


def test_twenty_steps_in_fp32(build: Build, run: Callable[..., Any], token_dir: Path) -> None:
    """In fp32 the loss is equal to 1e-5."""
    config = config_of(max_steps=20)
    got, _ = run(build(double=False), config)
    want = plain_loop(build(double=False), token_dir, config)
    assert_same({"loss": got["loss"]}, {"loss": want["loss"]}, 1e-5)


def test_cache_changes_nothing(
    build: Build, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs kept in memory, in a file, or computed each time: float64 losses are equal to 1e-10."""
    monkeypatch.setattr("model.engine.trunk._READ_BYTES", 1e30)  # so small a trunk would be computed faster than read
    config = config_of(max_steps=20)
    anew, result = run(build(), config, cache=TrunkCacheConfig(max_bytes=0))
    assert result.trunk == "frozen blocks' outputs are computed anew in each pass"
    assert result.trunk_hit_share == 0
    for place, cache in (("in memory", TrunkCacheConfig()), ("in a file", TrunkCacheConfig(tmp_path / "cache"))):
        kept, result = run(build(), config, cache=cache)
        assert f"kept {place}:" in result.trunk
        assert result.trunk_hit_share > 0.5
        assert_same(kept, anew, 1e-10)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"prompt_loss_weight": 0.3}, {}),
        ({}, {"train_head": True}),
        ({}, {"frozen": False}),
        ({"prompt_loss_weight": 0.3}, {"train_head": True}),
        ({"prompt_loss_weight": 0.3}, {"frozen": False}),
    ],
    ids=["prompt weight", "head", "nothing frozen", "prompt weight and head", "prompt weight and nothing frozen"],
)
def test_ten_steps_of_other_kinds(
    build: Build, run: Callable[..., Any], token_dir: Path, settings: dict[str, Any], shape: dict[str, bool]
) -> None:
    """Prompt loss, a trained head, everything trained (with a tied head): equal to a plain loop to 1e-10."""
    config = config_of(max_steps=10, **settings)
    model, reference = build(**shape), build(**shape)
    got, _ = run(model, config)
    assert_same(got, plain_loop(reference, token_dir, config), 1e-10)
    assert_same_weights(model, reference, 1e-9)


@pytest.mark.parametrize("shape", [{}, {"frozen": False}], ids=["top", "everything"])
def test_twelve_steps_with_dropout(
    build: Build, run: Callable[..., Any], token_dir: Path, shape: dict[str, bool]
) -> None:
    """Losses, gradient norms and weights equal a plain loop's that is given the same masks, to 1e-10 in float64."""
    config = config_of(max_steps=12, dropout=0.2)
    model, reference = build(**shape), build(**shape)
    got, _ = run(model, config)
    want = plain_loop(reference, token_dir, config)
    assert_same(got, want, 1e-10)
    assert_same_weights(model, reference, 1e-9)
    plain, _ = run(build(**shape), config_of(max_steps=1))
    assert abs(plain["loss"][0] - got["loss"][0]) > 1e-4  # dropout acts


def test_noise_is_the_same_for_any_passes(build: Build, run: Callable[..., Any]) -> None:
    """Passes of one row or of a whole step, cached or computed trunk outputs: the same losses to 1e-10."""
    config = config_of(max_steps=12, dropout=0.2)
    whole, _ = run(build(), config_of(max_steps=12, dropout=0.2, micro_batch_tokens=10_000))
    for tokens, cache in ((1, TrunkCacheConfig()), (130, TrunkCacheConfig(max_bytes=0))):
        got, _ = run(build(), config_of(**{**vars(config), "micro_batch_tokens": tokens}), cache=cache)
        assert_same(got, whole, 1e-10)


@pytest.mark.parametrize("shape", [{}, {"train_head": True}, {"frozen": False}], ids=["top", "head", "everything"])
def test_gradients_of_a_pack_are_the_sum_of_its_documents(
    build: Build, token_dir: Path, shape: dict[str, bool]
) -> None:
    """No document affects the gradients of another: float64 to 1e-12."""
    data = CodeAlpacaDataset(token_dir, "train")

    def gradients(packs: list[list[int]]) -> dict[str, Tensor]:
        model = build(**shape)
        engine, weight = Engine(model, torch.float64), model.lm_head.weight
        of_head = torch.zeros_like(weight) if weight.requires_grad else None
        for rows in packs:
            batch = pack(data, np.array(rows), torch.device("cpu"))

            def loss(hidden: Tensor, targets: Tensor = batch.targets) -> tuple[Tensor, Tensor]:
                head = padded_head(weight, torch.float64)
                return head_loss(hidden, head, weight.size(0), targets, head_gradient=of_head)

            engine.forward_backward(engine.trunk(batch), batch, loss)
        found = {name: p.grad for name, p in engine.model.named_parameters() if p.grad is not None}
        return found if of_head is None else {**found, "head": of_head}

    together, alone = gradients([[4, 0, 9, 2, 7]]), gradients([[4], [0], [9], [2], [7]])
    assert together.keys() == alone.keys()
    assert len(together) >= 14
    for name in alone:
        assert alone[name].abs().max() > 1e-3
        torch.testing.assert_close(together[name], alone[name], rtol=1e-12, atol=1e-12)
