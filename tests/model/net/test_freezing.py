"""Freezing: exactly the top blocks and the final norm train; the trunk has no gradient, dropout or backward pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model import GPTConfig, GPTModel, freeze_bottom_layers
from model.data.packing import pack
from model.data.tokens import CodeAlpacaDataset
from model.engine.config import TrainConfig
from model.engine.engine import Engine
from model.engine.loss import head_loss, padded_head
from model.engine.stepper import build_optimizer
from model.net.attention import Rows
from model.net.config import FreezeConfig
from model.net.freezing import plan_freeze


def one_step(model: GPTModel, token_dir: Path) -> dict[str, Tensor]:
    """Take one optimizer step on eight rows, keep the gradients, and return the parameters before the step."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dataset = CodeAlpacaDataset(token_dir, "train")
    optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-2))
    model.train()
    engine, head = Engine(model, torch.float32), model.lm_head.weight
    batch = pack(dataset, np.arange(8), torch.device("cpu"))
    head_gradient = torch.zeros_like(head) if head.requires_grad else None

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return head_loss(
            hidden, padded_head(head, torch.float32), head.size(0), batch.targets, head_gradient=head_gradient
        )

    engine.forward_backward(engine.trunk(batch), batch, loss)
    if head_gradient is not None:
        head.grad = head_gradient
    optimizer.step()
    return before


def trunk(model: GPTModel, ids: Tensor) -> Tensor:
    """The trunk's outputs for rows."""
    return model.trunk(ids, torch.arange(ids.size(1)), Rows())


@pytest.mark.parametrize(
    ("size", "trainable", "total"),
    [
        ("124m", 28_353_024, 124_439_808),
        ("355m", 50_386_944, 354_823_168),
        ("774m", 78_712_320, 774_030_080),
        ("1558m", 122_966_400, 1_557_611_200),
    ],
)
def test_exact_counts_at_four_blocks(size: str, trainable: int, total: int) -> None:
    """The counts equal the formula, so neither embeddings nor head train."""
    width = GPTConfig.preset(size).n_embd
    block = 12 * width**2 + 13 * width  # qkv, projection, two MLP matrices; their biases; two norms
    plan = plan_freeze(GPTConfig.preset(size), FreezeConfig(num_unfrozen_layers=4))
    assert plan.trainable == trainable == 4 * block + 2 * width
    assert plan.total == total
    assert plan.share == trainable / total
    assert (plan.num_unfrozen_layers, plan.train_head) == (4, False)


def test_names_of_trainable_parameters() -> None:
    """The top blocks and the final norm; no lower block, no embedding, no head."""
    plan = plan_freeze(GPTConfig(50, 16, 32, 3, 2), FreezeConfig(num_unfrozen_layers=2))
    assert {name.rsplit(".", 1)[0].split(".")[0] for name in plan.names} == {"h", "ln_f"}
    assert {name.split(".")[1] for name in plan.names if name.startswith("h.")} == {"1", "2"}
    assert len(plan.names) == 2 * 12 + 2


def test_no_block_unfrozen_trains_the_final_norm() -> None:
    """0 is allowed."""
    assert plan_freeze(GPTConfig(50, 16, 32, 3, 2), FreezeConfig(num_unfrozen_layers=0)).names == (
        "ln_f.weight",
        "ln_f.bias",
    )


def test_freeze_layers_false_trains_everything() -> None:
    """Trainable and total counts are equal."""
    plan = plan_freeze(GPTConfig.preset("124m"), FreezeConfig(freeze_layers=False))
    assert plan.trainable == plan.total == 124_439_808
    assert plan.num_unfrozen_layers is None


@pytest.mark.parametrize("n", [-1, 4])
def test_impossible_number_of_blocks_is_refused(n: int) -> None:
    """-1 would slice from the wrong end; too many blocks would pass unnoticed."""
    with pytest.raises(ValueError, match=rf"num_unfrozen_layers {n} is not between 0 and 3"):
        plan_freeze(GPTConfig(50, 16, 32, 3, 2), FreezeConfig(num_unfrozen_layers=n))


def test_frozen_parameters_stay_bitwise_and_have_no_gradient(tiny_model: GPTModel, token_dir: Path) -> None:
    """llama-cookbook#438: frozen parameters have .grad None; every trained parameter changes."""
    trained = freeze_bottom_layers(tiny_model, 1).names
    assert len(trained) == 12 + 2
    before = one_step(tiny_model, token_dir)
    for name, parameter in tiny_model.named_parameters():
        if name in trained:
            assert parameter.grad is not None, name
            assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name


def test_trunk_stores_no_activations(tiny_model: GPTModel) -> None:
    """llama-cookbook#438: only the top block saves tensors for the backward pass."""

    def saved_bytes(model: GPTModel) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.hidden(torch.randint(300, (4, 64))).sum()
        return sum(sizes.values())

    with_trunk = saved_bytes(tiny_model)
    assert not trunk(tiny_model, torch.zeros(1, 4, dtype=torch.long)).requires_grad
    tiny_model.num_frozen = 0  # the same weights train, but the frozen blocks run under autograd
    tiny_model.requires_grad_(True)
    assert with_trunk < 0.5 * saved_bytes(tiny_model)


def test_train_head_unties(tiny_model: GPTModel, token_dir: Path) -> None:
    """A trained head is a copy; the embedding stays frozen, bit for bit."""
    plan = freeze_bottom_layers(tiny_model, 1, train_head=True)
    width, vocabulary = tiny_model.config.n_embd, tiny_model.config.vocab_size
    assert plan.trainable == 12 * width**2 + 13 * width + 2 * width + vocabulary * width
    assert "lm_head.weight" in plan.names
    assert tiny_model.lm_head.weight.data_ptr() != tiny_model.wte.weight.data_ptr()
    assert torch.equal(tiny_model.lm_head.weight, tiny_model.wte.weight)
    assert not tiny_model.config.tie_word_embeddings
    before = one_step(tiny_model, token_dir)
    assert tiny_model.wte.weight.grad is None
    assert torch.equal(tiny_model.wte.weight, before["wte.weight"])
    assert not torch.equal(tiny_model.lm_head.weight, before["lm_head.weight"])


def test_head_stays_tied_and_frozen_by_default(tiny_model: GPTModel) -> None:
    """Freezing does not untie the head unless train_head is set."""
    assert tiny_model.lm_head.weight is tiny_model.wte.weight
    assert not tiny_model.lm_head.weight.requires_grad


def test_freezing_again_replaces_the_plan(tiny_model: GPTModel) -> None:
    """The second call freezes what the first one left trainable."""
    freeze_bottom_layers(tiny_model, 3)
    plan = freeze_bottom_layers(tiny_model, 1)
    assert plan.names[0] == "h.2.ln_1.weight"
    assert tiny_model.num_frozen == 2


def test_dropout_never_acts_in_the_trunk(tiny_model: GPTModel) -> None:
    """Only the top blocks use dropout, whether model.train() is called before or after freezing."""
    tiny_model.set_dropout(0.5)
    ids = torch.randint(300, (2, 30))
    for again in (False, True):
        tiny_model.train()
        if again:
            freeze_bottom_layers(tiny_model, 1)
        with torch.no_grad():
            assert torch.equal(trunk(tiny_model, ids), trunk(tiny_model, ids))
            assert not torch.equal(tiny_model.hidden(ids), tiny_model.hidden(ids))
            tiny_model.eval()
            assert torch.equal(tiny_model.hidden(ids), tiny_model.hidden(ids))
