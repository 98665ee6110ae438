"""Generation in PyTorch alone: packed weights, passes over prompts, slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model import GPTConfig, GPTModel, generate
from model.generation import padded as by_torch
from model.generation.drawing import Sampler
from model.generation.padded import PaddedDecoder, _fitting, _last_hidden, _parts, packed
from model.generation.slots import Row, Slots
from model.net.attention import Layer, Rows
from model.net.gpt import Attention

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(gpt2_dir: Path) -> GPTModel:
    return GPTModel.from_pretrained(gpt2_dir).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@torch.no_grad()
def test_packed_weights_are_the_models(model: GPTModel, dtype: torch.dtype, tolerance: float) -> None:
    """Within the dtype's error; the model itself is left as it is."""
    before = list(map(id, model.modules()))
    ids = torch.arange(1, 41).view(2, 20)
    copy = packed(model, dtype)
    assert copy is not model
    assert copy.wte.weight is model.wte.weight
    want = model(ids)
    assert (copy(ids).float() - want).norm() < tolerance * want.norm()
    assert list(map(id, model.modules())) == before


@torch.no_grad()
def test_an_adapter_is_not_passed_over() -> None:
    """A layer of a type of its own is called, wherever it stands."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = GPTModel(GPTConfig(50, 16, 32, 2, 2)).eval()
    model.h[0].mlp.c_fc = Doubled(32, 128)
    model.h[1].attn.c_attn = Doubled(32, 96)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(packed(model, torch.float32)(ids), model(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@torch.no_grad()
def test_only_the_last_token_is_computed_in_the_last_block(frozen: int) -> None:
    """Its hidden state is that of a pass over all tokens, wherever the text ends, with a part of any type.

    An attention of a type of its own, such as an adapter's, is called as a whole.
    """

    class Doubled(Attention):
        def forward(self, x: Tensor, layer: Layer, dropout: float = 0.0) -> Tensor:
            return 2 * super().forward(x, layer, dropout)

    torch.manual_seed(0)
    model = GPTModel(GPTConfig(50, 16, 32, 2, 2)).eval()
    model.num_frozen = frozen
    ids, places = torch.randint(50, (5, 12)), torch.tensor([11, 0, 3, 7, 10])
    tokens: list[int] = []
    model.h[1].mlp.register_forward_hook(lambda module, given, found: tokens.append(found.numel() // 32))
    for kind in (Attention, Doubled):
        attention = kind(model.config)
        attention.load_state_dict(model.h[1].attn.state_dict())
        model.h[1].attn = attention
        found = _last_hidden(model, ids, torch.arange(12), Rows(), places)
        torch.testing.assert_close(found, model.hidden(ids)[torch.arange(5), places], atol=1e-5, rtol=0)
    assert tokens == [5 if frozen < 2 else 60, 60, 60, 60]


def test_weights_are_read_anew_in_each_call(model: GPTModel) -> None:
    """A copy of an earlier call would give the texts of a model that has trained since."""
    prompts = [list(range(1, 41))] * 10
    before = generate(model, prompts, 10, temperature=0)
    weight = model.h[2].mlp.c_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.normal_(std=2.0)
    changed = generate(model, prompts, 10, temperature=0)
    with torch.no_grad():
        weight.copy_(kept)
    assert changed != before == generate(model, prompts, 10, temperature=0)


def test_prompts_in_many_passes_are_those_in_one(model: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [list(range(1, n)) for n in (5, 60, 33, 90, 2, 20)]
    want = generate(model, prompts, 10, temperature=0)
    monkeypatch.setattr(by_torch, "_PASS_TOKENS", 50)
    assert generate(model, prompts, 10, temperature=0) == want


def test_rows_are_cut_into_passes() -> None:
    """A pass has at most 4,096 tokens with its padding, or one row."""
    lengths = [2000, 2000, 100, 5000, 1]
    assert [lengths[part] for part in _parts(lengths)] == [[2000, 2000], [100], [5000], [1]]


def test_slots_follow_from_rows_and_memory() -> None:
    """At most 64 on a CPU, 256 of a narrow model; fewer where long rows would take more than 2 GiB; one at least."""
    config = GPTConfig.preset("124m")
    assert _fitting(GPTConfig.preset("tiny"), 100, 500, CPU, torch.float32, 2**31) == 256
    assert _fitting(config, 100, 5, CPU, torch.float32, 2**31) == 5
    assert _fitting(config, 100, 500, CPU, torch.float32, 2**31) == 64
    assert _fitting(config, 1024, 500, CPU, torch.float32, 2**31) == 2**31 // (1024 * 2 * 12 * 768 * 4) == 28
    assert _fitting(config, 10**6, 500, CPU, torch.float32, 2**31) == 1
    for device in ("cuda", "mps", "xpu"):
        assert _fitting(config, 100, 500, torch.device(device), torch.float16, 2**33) == 256


@pytest.mark.parametrize(
    ("free", "sharers", "slots"), [(2**40, 1, 4), (2**40, 2, 2), (2**24, 1, 2), (2**24, 2, 1), (0, 1, 1)]
)
def test_the_cache_takes_a_share_of_what_is_free(
    free: int, sharers: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it, or the limit, whatever is less, for all threads together; a row of this model takes 4 MiB."""
    monkeypatch.setattr(by_torch, "available_memory", lambda: free)
    monkeypatch.setitem(by_torch._CACHE_BYTES, "cpu", 2**24)
    model = GPTModel(GPTConfig(50, 1024, 256, 2, 2)).eval()
    rows = [Row([1] * 1024, (0, 0, number), 0, 1) for number in range(9)]
    sampler = Sampler(0.0, None, None, 1.0, 50, [], CPU)
    found = PaddedDecoder(
        model, rows, lambda count: Slots(count, 1, sampler, 50, None, 0, CPU), torch.float32, sharers
    )
    assert len(found.slots.numbers) == slots
    assert found.cache.keys.nbytes + found.cache.values.nbytes == slots * 2**22
