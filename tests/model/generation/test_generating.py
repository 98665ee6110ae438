"""Generation: rows that join and leave, their random streams, the context's end, stops."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2LMHeadModel

from model import GPTConfig, GPTModel, generate
from model.generation import generating
from model.generation import padded as by_torch
from model.generation.drawing import Sampler
from model.generation.padded import PaddedDecoder
from model.generation.streams import stream_keys, uniforms
from model.net.device import autocast, cast_frozen


@pytest.fixture(scope="module")
def model(gpt2_dir: Path) -> GPTModel:
    return GPTModel.from_pretrained(gpt2_dir)


@pytest.fixture(scope="module")
def reference(gpt2_dir: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(gpt2_dir).eval()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits (B, V) that ``generate`` draws from, step by step, in fp32."""
    steps: list[Tensor] = []
    draw = Sampler.__call__

    def spy(self: Sampler, logits: Tensor, *settings: Any) -> Tensor:
        steps.append(logits.float())
        return draw(self, logits, *settings)

    monkeypatch.setattr(Sampler, "__call__", spy)
    return steps


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(1, 300, (n,), generator=rng).tolist() for n in lengths]


@torch.no_grad()
def plain_loop(model: GPTModel, prompt: list[int], steps: int) -> list[int]:
    """nanoGPT's generate, greedy: every step computes the last n_positions tokens anew."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids[-model.config.n_positions :]]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_transformers(model: GPTModel, reference: GPT2LMHeadModel) -> None:
    """A batch of prompts of different lengths, token for token."""
    prompts = prompts_of(5, 17, 1, 30)
    got = generate(model, prompts, 40, temperature=0)
    for prompt, row in zip(prompts, got, strict=True):
        want = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        )  # fmt: skip
        assert row == want[0, len(prompt) :].tolist()
    assert len({tuple(row) for row in got}) == 4  # different rows, so that mixing them up would be noticed


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_greedy_equals_transformers_where_rows_join_and_leave(
    model: GPTModel, reference: GPT2LMHeadModel, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token in fp32: rows of any length that stop at different times, more of them than slots."""
    monkeypatch.setitem(by_torch._SLOTS_OF_NARROW, "cpu", slots)
    prompts = prompts_of(5, 17, 1, 30, 44, 2, 60, 8, 21, 13)

    def want(eos: int | None) -> list[list[int]]:
        rows = []
        for prompt in prompts:
            found = reference.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=30, eos_token_id=eos, pad_token_id=0,
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            )  # fmt: skip
            rows.append(found[0, len(prompt) :].tolist())
        return rows

    free = want(None)
    eos = Counter(token for row in free for token in set(row[:20])).most_common(1)[0][0]
    assert generate(model, prompts, 30, temperature=0) == free
    stopped = generate(model, prompts, 30, eos, temperature=0)
    assert stopped == want(eos)
    assert len({len(row) for row in stopped}) > 2


@pytest.fixture(scope="module")
def lively(gpt2_dir: Path) -> GPTModel:
    """A model whose next token depends on the whole text; the tiny one's soon repeats."""
    torch.manual_seed(0)
    small = GPTModel.from_pretrained(gpt2_dir)
    with torch.no_grad():
        for parameter in small.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return small


_PROMPTS = st.lists(st.lists(st.integers(1, 299), min_size=1, max_size=100), min_size=1, max_size=7)


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(prompts=_PROMPTS, slots=st.integers(1, 5), data=st.data())
def test_a_rows_text_does_not_depend_on_its_company(
    lively: GPTModel, prompts: list[list[int]], slots: int, data: st.DataObject
) -> None:
    """Alone, or among others, in any order and with any number of slots: the same text in fp32.

    The second of two equal prompts has a stream of its own, so it is the second in any company.
    """
    sampling: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 5, "eos_token_id": 7}
    order = data.draw(st.permutations(range(len(prompts))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(by_torch._SLOTS_OF_NARROW, "cpu", slots)
        together = generate(lively, [prompts[row] for row in order], 12, **sampling)
    of_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for row, text in zip(order, together, strict=True):
        of_prompt.setdefault(tuple(prompts[row]), []).append(text)
    for prompt, texts in of_prompt.items():
        assert generate(lively, [list(prompt)] * len(texts), 12, **sampling) == texts


@torch.no_grad()
def test_number_n_of_a_stream_draws_token_n(lively: GPTModel) -> None:
    """A loop that computes all tokens again for each next one; also where a row reaches the context's end, or begins
    behind it."""
    prompts = prompts_of(80, 95, 96, 97, 120, 10)
    draw = Sampler(0.9, 40, 0.95, 1.0, 320, [], torch.device("cpu"))
    want = []
    for prompt, key in zip(prompts, stream_keys(prompts), strict=True):
        ids = list(prompt)
        for number in uniforms(torch.tensor([key]), 5, 0, 30)[0]:
            logits = lively(torch.tensor([ids[-96:]]))[:, -1]
            ids.append(int(draw(logits, number[None], None)))
        want.append(ids[len(prompt) :])
    assert generate(lively, prompts, 30, None, 0.9, 40, 0.95, 5) == want
    assert min(len(set(text)) for text in want) > 10


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_in_several_threads_have_the_same_texts(
    lively: GPTModel, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread has the caller's precision and runs its own rows; the number of torch's threads is restored."""
    prompts = prompts_of(80, 95, 3, 97, 120, 10, 10, 30)
    dtypes: set[tuple[int, torch.dtype]] = set()
    draw = Sampler.__call__

    def spy(self: Sampler, logits: Tensor, *rest: Any) -> Tensor:
        dtypes.add((threading.get_ident(), logits.dtype))
        return draw(self, logits, *rest)

    def sample() -> list[list[int]]:
        with autocast(torch.device("cpu"), torch.bfloat16 if mixed else torch.float32):
            return generate(lively, prompts, 12, None, 0.9, 40, 0.95, 5)

    want = sample()
    monkeypatch.setattr(Sampler, "__call__", spy)
    monkeypatch.setattr(generating, "_ROWS_APART", 2)
    torch.set_num_threads(3)
    try:
        got = sample()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    # Not always 3: a thread that is done early may take the rows of another.
    assert len({thread for thread, _ in dtypes} - {threading.get_ident()}) >= 2
    assert {dtype for _, dtype in dtypes} == {torch.bfloat16 if mixed else torch.float32}
    if not mixed:  # in bf16, rounding decides between tokens
        assert got == want


@pytest.mark.parametrize("by_signal", [True, False])
def test_an_interrupt_ends_all_threads_at_their_next_token(
    lively: GPTModel, monkeypatch: pytest.MonkeyPatch, by_signal: bool
) -> None:
    """Ctrl-C, or an error of one thread, at the third token of 90."""
    monkeypatch.setattr(generating, "_ROWS_APART", 2)
    drawn: Counter[int] = Counter()
    failed, main = threading.Event(), threading.get_ident()
    both = threading.Barrier(2, timeout=60)
    draw = Sampler.__call__

    def spy(self: Sampler, logits: Tensor, *rest: Any) -> Tensor:
        drawn[threading.get_ident()] += 1
        if drawn[threading.get_ident()] == 1:
            both.wait()  # else one thread may be interrupted before the other begins
        if drawn[threading.get_ident()] == 3:
            if not failed.is_set():
                failed.set()
                if not by_signal:
                    raise KeyboardInterrupt
                signal.pthread_kill(main, signal.SIGINT)
            time.sleep(1)  # until the other threads know
        return draw(self, logits, *rest)

    monkeypatch.setattr(Sampler, "__call__", spy)
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(lively, prompts_of(3, 3, 3, 3), 90)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert len(drawn) == 2
    assert max(drawn.values()) <= 4


def test_two_calls_at_a_time_leave_the_models_mode(tiny_model: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ends while the second draws: still without dropout, and the training mode comes back at the end."""
    want = generate(tiny_model.eval(), prompts_of(4), 10, temperature=0)
    tiny_model.set_dropout(0.9)
    tiny_model.train()
    begun, ended = threading.Event(), threading.Event()
    draw = Sampler.__call__
    main = threading.get_ident()

    def spy(self: Sampler, logits: Tensor, *rest: Any) -> Tensor:
        if threading.get_ident() == main:
            assert begun.wait(30)
        else:
            begun.set()
            assert ended.wait(30)
        return draw(self, logits, *rest)

    monkeypatch.setattr(Sampler, "__call__", spy)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(generate, tiny_model, prompts_of(4), 10, temperature=0)
        assert begun.wait(30)
        assert generate(tiny_model, prompts_of(4), 10, temperature=0) == want
        ended.set()
        assert second.result() == want
    assert tiny_model.training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.9}])
@pytest.mark.parametrize("length", [5, 120])
def test_logits_that_are_not_finite_are_an_error(
    gpt2_dir: Path, value: float, sampling: dict[str, Any], length: int
) -> None:
    """Not a text: with the cache, and beyond the context."""
    model = GPTModel.from_pretrained(gpt2_dir)
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 3] = value
    with pytest.raises(ArithmeticError, match="the model's logits are not finite, so that no token can be drawn"):
        generate(model, prompts_of(length), 3, **sampling)


def test_one_id_that_is_not_finite_is_an_error(gpt2_dir: Path) -> None:
    """An embedding with a NaN that no prompt has: no hidden state shows it."""
    model = GPTModel.from_pretrained(gpt2_dir)
    with torch.no_grad():
        model.wte.weight[310, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="not finite"):
        generate(model, [[1, 2]], 1, seed=1)


def test_equal_prompts_have_different_texts(lively: GPTModel) -> None:
    """Each has a stream of its own."""
    texts = generate(lively, [[1, 2, 3]] * 8, 12, seed=1)
    assert len({tuple(text) for text in texts}) == 8


def test_repetition_penalty_is_transformers(model: GPTModel, reference: GPT2LMHeadModel) -> None:
    """Token for token, over prompt and new tokens; each row's penalty is of its own text."""
    prompts = prompts_of(5, 17, 1, 30)
    got = generate(model, prompts, 40, temperature=0, repetition_penalty=1.4)
    for prompt, row in zip(prompts, got, strict=True):
        want = reference.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long), repetition_penalty=1.4,
        )  # fmt: skip
        assert row == want[0, len(prompt) :].tolist()
    assert got != generate(model, prompts, 40, temperature=0)


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan"), float("inf"), 1e300, 1e-300])
def test_bad_repetition_penalty_is_refused(model: GPTModel, penalty: float) -> None:
    """A huge one makes logits infinite, and then forbidden ids are drawn."""
    with pytest.raises(ValueError, match="repetition_penalty"):
        generate(model, [[1]], 3, repetition_penalty=penalty)


@pytest.mark.parametrize("penalty", [1e6, 1e-6])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e6])
def test_forbidden_ids_are_not_drawn_at_the_limits_of_settings(
    model: GPTModel, penalty: float, temperature: float
) -> None:
    size = model.config.vocab_size
    settings = {"temperature": temperature, "top_k": 50, "top_p": 0.9, "repetition_penalty": penalty}
    for allowed in ({size // 2}, {0, size - 1}):
        rows = generate(model, prompts_of(5, 60), 8, never=sorted(set(range(size)) - allowed), **settings)
        assert all(set(row) <= allowed and len(row) == 8 for row in rows)


@pytest.mark.parametrize(
    ("prompts", "kept", "sentence"),
    [
        ([[1], [2, 10_000]], (), "prompt 2 has the id 10000: the model's ids are 0 to"),
        ([[-1]], (), "prompt 1 has the id -1"),
        ([[1], [2]], (1,), "kept has 1 numbers for 2 prompts"),
        ([[1]], (10_000,), "kept is"),
        ([[1]], (-1,), "kept is"),
    ],
)
def test_wrong_prompts_are_refused(
    model: GPTModel, prompts: list[list[int]], kept: tuple[int, ...], sentence: str
) -> None:
    """Before the device sees them: an index beyond the embedding ends a GPU's process."""
    with pytest.raises(ValueError, match=sentence):
        generate(model, prompts, 3, kept=kept)


def test_a_text_beyond_the_context_is_penalised_as_a_whole(model: GPTModel) -> None:
    """Tokens that the window no longer shows count, too; with a huge penalty no token comes twice."""
    row = generate(model, prompts_of(90), 40, temperature=0, repetition_penalty=1e6)[0]
    assert len(set(row)) == 40
    assert not set(row) & set(prompts_of(90)[0])


def test_cache_equals_the_plain_loop(model: GPTModel) -> None:
    """The tokens are the same whether keys and values are cached or recomputed."""
    prompts = prompts_of(3, 20, 9)
    assert generate(model, prompts, 30, temperature=0) == [plain_loop(model, p, 30) for p in prompts]


def test_text_beyond_the_context_is_cropped(model: GPTModel) -> None:
    """The context is 96 tokens: one prompt exceeds it, one grows beyond it, one never does."""
    prompts = prompts_of(120, 80, 10)
    assert generate(model, prompts, 30, temperature=0) == [plain_loop(model, p, 30) for p in prompts]


@pytest.mark.parametrize("length", [95, 96, 97])
def test_edge_of_the_context(model: GPTModel, length: int) -> None:
    """No position is off by one where the cache is full."""
    prompts = prompts_of(length)
    assert generate(model, prompts, 4, temperature=0) == [plain_loop(model, p, 4) for p in prompts]


def test_sampled_batch_has_the_plain_loops_logits(model: GPTModel, seen: list[Tensor]) -> None:
    """At T = 1 too, each row's logits are those of its own text, up to rounding."""
    prompts = prompts_of(7, 2)
    new = generate(model, prompts, 12, seed=3)
    for step, logits in enumerate(seen):
        for row in range(2):
            with torch.no_grad():
                want = model(torch.tensor([prompts[row] + new[row][:step]]))[0, -1]
            torch.testing.assert_close(logits[row], want, atol=1e-4, rtol=0)


def test_each_row_stops_at_its_own_eos(model: GPTModel) -> None:
    """EOS ends its row and is its last id; the other rows are unchanged."""
    prompts = prompts_of(5, 17, 1, 30)
    free = generate(model, prompts, 30, seed=5)
    eos = free[1][8]
    got = generate(model, prompts, 30, eos_token_id=eos, seed=5)
    assert got == [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert len(got[1]) <= 9
    assert max(map(len, got)) == 30


def test_generation_ends_when_every_row_has_ended(model: GPTModel, seen: list[Tensor]) -> None:
    """No step is computed once all rows are done."""
    first = generate(model, prompts_of(5), 1, temperature=0)[0][0]
    seen.clear()
    assert generate(model, prompts_of(5), 50, eos_token_id=first, temperature=0) == [[first]]
    assert len(seen) == 1


@pytest.mark.parametrize("length", [90, 120])
def test_a_row_that_is_done_costs_the_others_nothing(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """A done row beyond the context of 96: the other row keeps its cache, or gets one once that row is done."""
    prompts = prompts_of(length, 10)
    free = generate(model, prompts, 30, seed=5)
    eos = next(token for token in free[0][:6] if token not in free[1][:8])
    calls: list[int] = []
    whole = PaddedDecoder._last_logits
    monkeypatch.setattr(PaddedDecoder, "_last_logits", lambda *args: calls.append(1) or whole(*args))
    got = generate(model, prompts, 30, eos_token_id=eos, seed=5)
    assert got == [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert len(calls) == (1 if length < 96 else len(got[0]) + 1)


def test_same_seed_same_text(model: GPTModel) -> None:
    """The draw depends on the seed, not on the state of the global generator."""
    prompts = prompts_of(4, 6)
    first = generate(model, prompts, 20, seed=7)
    torch.rand(5)
    assert generate(model, prompts, 20, seed=7) == first
    assert generate(model, prompts, 20, seed=8) != first


def test_global_generator_is_left_alone(model: GPTModel) -> None:
    """Sampling during training must not change the random numbers of dropout."""
    before = torch.get_rng_state()
    generate(model, prompts_of(4), 10, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_mode_is_restored_and_dropout_is_off(tiny_model: GPTModel) -> None:
    """Generation between training steps runs without dropout and leaves the model in training mode."""
    want = generate(tiny_model.eval(), prompts_of(4), 10, temperature=0)
    assert not tiny_model.training
    tiny_model.set_dropout(0.9)
    tiny_model.train()
    assert generate(tiny_model, prompts_of(4), 10, temperature=0) == want
    assert tiny_model.training
    assert [block.training for block in tiny_model.h] == [False, False, True]  # frozen blocks stay in eval mode


def test_frequencies_follow_the_filtered_distribution() -> None:
    """4,000 first tokens of a model with known logits: top 2 of (0.5, 0.3, 0.2) is 0.625 to 0.375."""
    model = GPTModel(GPTConfig(3, 4, 4, 1, 1))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.wte.weight[:, 0] = torch.tensor([0.5, 0.3, 0.2]).log()
    draws = [row[0] for row in generate(model, [[0]] * 4000, 1, top_k=2, seed=1)]
    assert draws.count(2) == 0
    assert draws.count(0) / 4000 == pytest.approx(0.625, abs=0.03)  # four standard deviations


def test_no_prompts_or_no_tokens(model: GPTModel) -> None:
    """No prompts give no rows; no new tokens give empty rows."""
    assert generate(model, [], 5) == []
    assert generate(model, [[1], [2]], 0) == [[], []]


def test_empty_prompt_is_refused(model: GPTModel) -> None:
    """There is no token to predict from."""
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(model, [[1], []], 5)


def test_generation_in_mixed_precision(tiny_model: GPTModel, seen: list[Tensor]) -> None:
    """A bf16 trunk under an fp32 top generates under autocast, near the fp32 logits."""
    generate(tiny_model, prompts_of(6, 3), 1, temperature=0)
    cast_frozen(tiny_model, torch.bfloat16)
    with autocast(torch.device("cpu"), torch.bfloat16):
        rows = generate(tiny_model, prompts_of(6, 3), 5, temperature=0)
    assert [len(row) for row in rows] == [5, 5]
    assert (seen[1] - seen[0]).abs().max() < 0.1 * seen[0].std()


PADDED = 64  # rows of an embedding that no token belongs to


@pytest.fixture
def padded(gpt2_dir: Path) -> GPTModel:
    """A model whose embedding has rows beyond its tokenizer, which are the most probable ones."""
    small = GPTModel.from_pretrained(gpt2_dir)
    model = GPTModel(replace(small.config, vocab_size=small.config.vocab_size + PADDED))
    rows = torch.cat([small.wte.weight, 5 * small.wte.weight[:PADDED]]).detach()
    model.load_state_dict({**small.state_dict(), "wte.weight": rows, "lm_head.weight": rows})
    return model.eval()


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 3}, {"top_k": 5}, {"top_p": 0.9}])
def test_ids_without_a_token_are_never_drawn(padded: GPTModel, settings: dict[str, Any]) -> None:
    """transformers#24372: greedy or sampled, with a cache or beyond the context."""
    prompts = prompts_of(5, 17, 90)
    real = padded.config.vocab_size - PADDED
    assert max(map(max, generate(padded, prompts, 20, **settings))) >= real
    new = generate(padded, prompts, 20, **settings, never=range(real, padded.config.vocab_size))
    assert max(map(max, new)) < real
    assert [len(row) for row in new] == [20, 20, 20]


def test_without_such_ids_nothing_changes(model: GPTModel) -> None:
    prompts = prompts_of(5, 17)
    assert generate(model, prompts, 20, seed=3, never=[]) == generate(model, prompts, 20, seed=3)


@torch.no_grad()
def test_the_first_tokens_of_a_text_beyond_the_context_are_kept(model: GPTModel) -> None:
    """Each step sees the heading and the last tokens, as a loop that computes both anew."""
    prompts, heads = prompts_of(120, 80, 10), [7, 5, 3]
    want = []
    for prompt, head in zip(prompts, heads, strict=True):
        ids = list(prompt)
        for _ in range(30):
            shown = ids if len(ids) <= 96 else ids[:head] + ids[-(96 - head) :]
            ids.append(int(model(torch.tensor([shown]))[0, -1].argmax()))
        want.append(ids[len(prompt) :])
    assert generate(model, prompts, 30, temperature=0, kept=heads) == want
    assert want != generate(model, prompts, 30, temperature=0)
