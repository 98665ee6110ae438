"""Generation on a GPU: the kernels, the packed cache, the graph of a step. Skipped without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import GPTConfig, GPTModel, generate
from model.generation import fused, generating
from model.generation.drawing import top
from model.generation.fused import FusedDecoder
from model.net.device import cast_frozen
from model.net.freezing import freeze_bottom_layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def small_model(dtype: torch.dtype = torch.bfloat16) -> GPTModel:
    """A GPT-2 with heads of width 64, like the real sizes; all but its top two blocks are frozen, in ``dtype``."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPTModel(GPTConfig(vocab_size=320, n_positions=96, n_embd=128, n_layer=4, n_head=2))
    freeze_bottom_layers(model, 2)
    cast_frozen(model, dtype)
    return model.eval()


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(1, 300, (n,), generator=rng).tolist() for n in lengths]


@torch.no_grad()
def plain_loop(model: GPTModel, prompt: list[int], steps: int, eos: int | None = None) -> list[int]:
    """nanoGPT's generate, greedy: every step computes the last n_positions tokens anew."""
    ids = list(prompt)
    while len(ids) < len(prompt) + steps and ids[len(prompt) :][-1:] != [eos]:
        shown = torch.tensor([ids[-model.config.n_positions :]], device="cuda")
        ids.append(int(model(shown)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (2, 32), (3, 16), (1, 128)])
@pytest.mark.parametrize("programs", [1, 64, 4096])
def test_decode_attention_agrees_with_plain_attention(
    heads: int, width: int, dtype: torch.dtype, tolerance: float, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the dtype's error of float64, for rows of any length, however many programs share a row.

    The cache has the new keys and values afterwards, and nothing else has changed: an ended row's memory, too.
    """
    from model.generation import decode_kernels

    monkeypatch.setattr(decode_kernels, "_PROGRAMS", programs)
    torch.manual_seed(0)
    lengths = torch.tensor([1, 5, 64, 65, 700, -1, 127], device="cuda")
    room = lengths.clamp(min=0) + 5
    begins = room.cumsum(0) - room
    places = int(room.sum())
    keys, values = (torch.randn(heads, places, width, device="cuda").to(dtype) for _ in range(2))
    qkv = torch.randn(7, 3 * heads * width, device="cuda").to(dtype)
    want_keys, want_values = keys.clone(), values.clone()
    got = decode_kernels.attend(qkv, keys, values, begins, lengths, heads).unflatten(1, (heads, width))
    q, k, v = qkv.unflatten(1, (3, heads, width)).unbind(1)
    for row, length in enumerate(lengths.tolist()):
        if length < 0:
            continue
        begin = int(begins[row])
        want_keys[:, begin + length], want_values[:, begin + length] = k[row], v[row]
        seen = slice(begin, begin + length + 1)
        scores = (want_keys[:, seen].double() @ q[row].double()[:, :, None])[..., 0] * width**-0.5
        want = (scores.softmax(-1)[:, None] @ want_values[:, seen].double())[:, 0]
        torch.testing.assert_close(got[row].double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(keys, want_keys)
    assert torch.equal(values, want_values)


@pytest.mark.parametrize("slots", [3, 2048])
def test_greedy_is_the_plain_loop_where_rows_join_and_leave(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, with rows that stop, wait, begin beyond the context of 96 and grow beyond it."""
    monkeypatch.setattr(fused, "_MOST_SLOTS", slots)
    model = small_model(torch.float32)
    prompts = prompts_of(3, 40, 11, 80, 120, 1, 25, 33, 60)
    eos = plain_loop(model, prompts[1], 8)[-1]
    want = [plain_loop(model, prompt, 30, eos) for prompt in prompts]
    assert generate(model, prompts, 30, eos, temperature=0) == want
    assert min(map(len, want)) <= 8 < max(map(len, want)) == 30


def test_many_rows_that_leave_need_smaller_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 rows in fp32, each of which ends with one chance in eight at a step: few are left soon, in fewer slots."""
    model = small_model(torch.float32)
    prompts = prompts_of(*([5] * 100), *([9] * 100))
    sizes: list[int] = []
    step = FusedDecoder.step
    monkeypatch.setattr(FusedDecoder, "step", lambda self, size: sizes.append(size) or step(self, size))

    def sample() -> list[list[int]]:
        return generate(model, prompts, 60, 3, seed=2, never=range(8, 320))

    got = sample()
    assert len(set(sizes)) > 2
    sizes.clear()
    monkeypatch.setattr(FusedDecoder, "fitting", lambda self, rows, size: size if rows else 0)
    assert sample() == got
    assert len(set(sizes)) == 1
    assert len({len(row) for row in got}) > 10


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 50, "top_p": 0.9}, {"repetition_penalty": 1.3}],
    ids=str,
)
def test_a_gpu_draws_what_a_cpu_draws(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, by the fused kernels and by PyTorch alone: the random numbers are the same."""
    model = small_model(torch.float32)
    prompts = prompts_of(3, 40, 11, 80)
    by_kernels = generate(model, prompts, 20, temperature=0.8, seed=3, **settings)
    monkeypatch.setattr(generating, "can_decode", lambda *args: False)
    assert generate(model, prompts, 20, temperature=0.8, seed=3, **settings) == by_kernels
    assert generate(model.cpu(), prompts, 20, temperature=0.8, seed=3, **settings) == by_kernels


def test_ids_without_a_token_are_never_drawn_by_a_graph() -> None:
    """transformers#24372: greedy and sampled, in bf16 as in the evaluation."""
    model = small_model()
    never = range(0, model.config.vocab_size, 2)
    for settings in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 50, "top_p": 0.95}):
        with torch.autocast("cuda", torch.bfloat16):
            rows = generate(model, [[5, 6, 7], list(range(5, 45))], 30, **settings, seed=3, never=never)
        assert all(token % 2 for row in rows for token in row)


def test_sampling_by_a_graph_is_that_by_launched_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling in bf16, as in the evaluation: repeated calls are equal, so no call reads state of the one before."""
    model = small_model()
    prompts = [list(range(5, 5 + length)) for length in (3, 40, 11)]

    def sample() -> list[list[int]]:
        with torch.autocast("cuda", torch.bfloat16):
            return generate(model, prompts, 30, temperature=0.8, top_k=50, top_p=0.95, seed=3)

    graphs = [sample(), sample()]
    monkeypatch.setattr(FusedDecoder, "step", FusedDecoder._step)
    assert graphs == [sample()] * 2
    with torch.no_grad():
        model.ln_f.weight.mul_(-1)
    changed = sample()
    monkeypatch.undo()
    assert sample() == changed != graphs[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_logits_are_found_in_chunks(dtype: torch.dtype) -> None:
    """The values of torch.topk, and ids that have them; in bf16 many logits tie."""
    torch.manual_seed(0)
    logits = torch.randn(7, 64 * 200, device="cuda").to(dtype)
    values, ids = top(logits, 50)
    assert torch.equal(values, torch.topk(logits, 50).values)
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == 50 for row in ids.tolist())


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"top_k": 50, "top_p": 0.95}, {"top_p": 0.9}, {}])
@pytest.mark.parametrize("length", [3, 120])
def test_logits_that_are_not_finite_are_an_error(sampling: dict[str, Any], length: int) -> None:
    """With the cache, and beyond the context; rows that have ended beside living ones are no error."""
    model = small_model()
    with torch.autocast("cuda", torch.bfloat16):
        free = generate(model, prompts_of(length, 3, 40), 30, seed=3, **sampling)
        eos = free[0][2]
        generate(model, prompts_of(length, 3, 40), 30, eos, seed=3, **sampling)
        with torch.no_grad():
            model.h[3].mlp.c_fc.bias[3] = float("nan")
        with pytest.raises(ArithmeticError, match="logits are not finite"):
            generate(model, prompts_of(length, 3, 40), 30, seed=3, **sampling)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_current_device_is_restored() -> None:
    model = small_model().to("cuda:1")
    assert torch.cuda.current_device() == 0
    generate(model, prompts_of(3, 5), 5, temperature=0)
    assert torch.cuda.current_device() == 0
