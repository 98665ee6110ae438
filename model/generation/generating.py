"""``generate``: continues prompts of any number and lengths.

As many rows as the device likes are continued at a time, each in a slot. When a row ends, a waiting one takes its
slot. Rows that need most of the cache come first, so that each row has room wherever it finds a free slot.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from model.generation.drawing import Sampler
from model.generation.fused import FusedDecoder, can_decode
from model.generation.padded import PaddedDecoder
from model.generation.slots import BROKEN, Row, Slots, has_finite_logits, seen_tokens
from model.generation.streams import stream_keys, uniforms
from model.net.config import GPTConfig
from model.net.gpt import GPTModel
from model.net.sampling import crop

_WINDOWS = 32  # rows beyond the context that are computed at a time
_SMALL = 8 << 20  # parameters of a model that fits a processor's cache memory
_ROWS_APART = 16  # rows, at least, that pay for a thread of their own


class Decoder(Protocol):
    """Continues rows in slots, the token after the prompt included."""

    slots: Slots
    look_every: int
    vocab_size: int

    def start(self, slots: Sequence[int], rows: Sequence[Row]) -> None: ...

    def step(self, size: int) -> None: ...

    def last_logits(self, texts: Sequence[Sequence[int]]) -> Tensor: ...

    def fitting(self, rows: int, size: int) -> int: ...

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None: ...


@torch.inference_mode()
def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_id: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    never: Sequence[int] = (),
    kept: Sequence[int] = (),
    repetition_penalty: float = 1.0,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue prompts of any number and lengths.

    A row's random numbers are a function of the seed, its prompt, and the number of earlier rows with the same prompt
    (``model.generation.streams``). So its text does not depend on the rows beside it, on their number or on their
    order, except for rounding: a matrix product of another number of rows may sum in another order. That changes a
    token only where two logits are equal up to rounding, or where a random number lies within rounding of the border
    between two tokens. In fp32 this is rare. In bf16, logits have three significant digits and equal ones are common,
    so long texts may differ between batches, devices and versions.

    Text longer than the context is cropped to ``n_positions`` tokens: its first ones, as many as ``kept`` says, and
    its last ones. Without ``kept`` that is nanoGPT's generate. As long as a row fits, its keys and values are cached;
    beyond, each of its steps computes its whole window.

    Args:
        model: its mode is restored afterwards.
        prompts: B lists of token ids, none empty.
        max_new_tokens: per row.
        eos_token_id: a row stops once it has produced this id.
        temperature, top_k, top_p: as filter_logits; temperature 0 is greedy.
        seed: of this call's random numbers; the global generator is left alone.
        never: ids that are not drawn, whatever their logits.
        kept: for each prompt, the number of its first tokens that are not cropped; fewer than n_positions.
        repetition_penalty: from 1e-6 to 1e6. A positive logit of a token that the row's text has, prompt included, is
            divided by it, a negative one multiplied (Keskar et al. 2019; as in transformers). 1 changes nothing.
        on_token: called with each new id, of one prompt on a CPU.

    Returns:
        B lists of new ids, ending with ``eos_token_id`` where the model produced it.

    Raises:
        ValueError: an empty prompt, an id that the model has not, or a setting out of range.
        ArithmeticError: the model's logits are not finite.
    """
    config, device = model.config, model.wte.weight.device
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, config.vocab_size, never, device)
    _check_prompts(prompts, kept, config)
    if on_token and (len(prompts) > 1 or device.type != "cpu"):
        raise ValueError("on_token needs one prompt, and a model on a CPU")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    context = config.n_positions
    rows = [
        Row(list(prompt), key, head, min(max_new_tokens, context + 1 - len(prompt)))
        for prompt, key, head in zip(prompts, stream_keys(prompts), list(kept) or [0] * len(prompts), strict=True)
    ]
    fitting = sorted((row for row in rows if row.limit > 0), key=lambda row: (-row.need, -len(row.prompt)))
    steps = max((row.limit for row in fitting), default=1)

    def slots(count: int) -> Slots:
        return Slots(count, steps, sampler, config.vocab_size, eos_token_id, seed, device, on_token)

    with _in_eval_mode(model), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        decoder = _continue_apart(model, fitting, slots)
        going = [row for row in rows if len(row.new) < max_new_tokens and row.new[-1:] != [eos_token_id]]
        for begin in range(0, len(going), _WINDOWS):
            part = going[begin : begin + _WINDOWS]
            _continue_beyond(decoder, part, sampler, context, max_new_tokens, eos_token_id, seed, on_token)
    return [row.new for row in rows]


_modes: WeakKeyDictionary[GPTModel, list[bool]] = WeakKeyDictionary()  # of models that generate: one entry a call
_modes_lock = threading.Lock()


@contextmanager
def _in_eval_mode(model: GPTModel) -> Iterator[None]:
    """Eval mode until the last of all calls that use the model at the same time has ended; then its mode before."""
    with _modes_lock:
        modes = _modes.setdefault(model, [])
        modes.append(model.training if not modes else modes[0])
        model.eval()
    try:
        yield
    finally:
        with _modes_lock:
            before = modes.pop()
            if not modes:
                model.train(before)


def _check_prompts(prompts: Sequence[Sequence[int]], kept: Sequence[int], config: GPTConfig) -> None:
    """Raise ValueError, naming the prompt, unless all can be continued: a GPU that meets a wrong id is lost."""
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: generation needs at least one token to start from")
    for number, prompt in enumerate(prompts, 1):
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"prompt {number} has the id {wrong}: the model's ids are 0 to {config.vocab_size - 1}")
    if kept and len(kept) != len(prompts):
        raise ValueError(f"kept has {len(kept)} numbers for {len(prompts)} prompts: it needs one for each")
    if any(not 0 <= head < config.n_positions for head in kept):
        raise ValueError(f"kept is {[*kept]}: each must be from 0 to {config.n_positions - 1}, below the context")


def _continue_apart(model: GPTModel, rows: Sequence[Row], slots: Callable[[int], Slots]) -> Decoder:
    """Continue rows up to their limits; on a CPU, those of a small model in several threads, each with its own rows.

    The threads of a matrix product wait for one another at its end. For a small model that takes as long as the
    product, and where other processes use the processor, many times as long.

    Returns:
        A decoder of the model.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    threads = torch.get_num_threads()
    workers = min(threads, len(rows) // _ROWS_APART)
    if model.wte.weight.device.type != "cpu" or weights > _SMALL or workers < 2:
        decoder = _decoder(model, rows, slots)
        _continue(decoder, rows)
        return decoder
    stop = threading.Event()
    mixed, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def work(part: Sequence[Row]) -> Decoder:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=mixed):  # both are settings of a thread
            try:
                decoder = _decoder(model, part, slots, workers)
                _continue(decoder, part, stop)
            except BaseException:
                stop.set()
                raise
        return decoder

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                decoders = [*pool.map(work, [rows[number::workers] for number in range(workers)])]
            except BaseException:  # Ctrl-C; the pool's end waits for all threads
                stop.set()
                raise
        return decoders[0]
    finally:
        torch.set_num_threads(threads)


def _decoder(model: GPTModel, rows: Sequence[Row], slots: Callable[[int], Slots], sharers: int = 1) -> Decoder:
    device = model.wte.weight.device
    mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if mixed else model.ln_f.weight.dtype
    if can_decode(model, dtype):
        return FusedDecoder(model, rows, slots, dtype)
    return PaddedDecoder(model, rows, slots, dtype, sharers)


def _continue(decoder: Decoder, rows: Sequence[Row], stop: threading.Event | None = None) -> None:
    """Continue rows up to their limits, with the cache.

    Args:
        rows: those that need most of the cache first.
        stop: when it is set, no further token is drawn.
    """
    waiting = deque(rows)
    running: list[Row | None] = [None] * len(decoder.slots.numbers)
    steps = 0
    while running:
        free = [slot for slot, row in enumerate(running) if row is None]
        if waiting and free:
            chosen = free[: len(waiting)]
            begun = [waiting.popleft() for _ in chosen]
            decoder.start(chosen, begun)
            for slot, row in zip(chosen, begun, strict=True):
                running[slot] = row
        else:
            running = _shrink(decoder, running)
            if not running:
                break
            for _ in range(steps):
                if stop and stop.is_set():
                    return
                decoder.step(len(running))
        steps = _collect(decoder, running)


def _collect(decoder: Decoder, running: list[Row | None]) -> int:
    """Take the rows that have ended out of ``running``. Returns the number of steps until the next look."""
    alive, counts = decoder.slots.look(len(running))
    ended = [slot for slot, row in enumerate(running) if row is not None and not alive[slot]]
    if ended:
        for slot, new in zip(ended, decoder.slots.tokens(ended, [counts[slot] for slot in ended]), strict=True):
            row = running[slot]
            assert row is not None
            row.new, running[slot] = new, None
    left = [row.limit - count for row, count in zip(running, counts, strict=True) if row is not None]
    may_end = decoder.slots.eos >= 0  # else rows end at their limits alone
    return min([*left, decoder.look_every] if may_end else left, default=0)


def _shrink(decoder: Decoder, running: list[Row | None]) -> list[Row | None]:
    """Move rows to the first slots, if fewer slots are enough for those that are left."""
    count = sum(row is not None for row in running)
    size = decoder.fitting(count, len(running))
    if size >= len(running):
        return running
    sources = [slot for slot in range(size, len(running)) if running[slot] is not None]
    targets = [slot for slot in range(size) if running[slot] is None][: len(sources)]
    if sources:
        decoder.move(sources, targets)
    for source, target in zip(sources, targets, strict=True):
        running[target] = running[source]
    return running[:size]


def _continue_beyond(
    decoder: Decoder,
    rows: Sequence[Row],
    sampler: Sampler,
    context: int,
    max_new_tokens: int,
    eos_token_id: int | None,
    seed: int,
    on_token: Callable[[int], None] | None = None,
) -> None:
    """Continue rows whose text is longer than the context, or as long: each step computes their whole windows."""
    while rows:
        texts = [[*row.prompt, *row.new] for row in rows]
        logits = decoder.last_logits([crop(text, context, row.head) for text, row in zip(texts, rows, strict=True)])
        if not bool(has_finite_logits(logits).all()):
            raise ArithmeticError(BROKEN)
        seen = None if sampler.penalty == 1 else seen_tokens(texts, decoder.vocab_size, logits.device)
        drawn = [uniforms(torch.tensor([row.key]), seed, len(row.new), 1) for row in rows]
        new = sampler(logits, torch.cat(drawn)[:, 0].to(logits.device), seen).tolist()
        for row, token in zip(rows, new, strict=True):
            row.new.append(token)
            if on_token is not None:
                on_token(token)
        rows = [row for row in rows if len(row.new) < max_new_tokens and row.new[-1] != eos_token_id]
