"""Sampling: temperature, top-k and top-p (nucleus), and batched generation with a key-value cache.

A sampling filter is one function that checks its setting and returns the filter, and its line in ``build_filters``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.net.attention import KVCache
from model.net.device import capture_stream
from model.net.gpt import GPTModel

Filter = Callable[[Tensor], Tensor]
"""Logits (B, V) in float32 -> logits (B, V) with removed tokens at -inf; the argument is not changed."""


LARGEST_TEMPERATURE = 1e6  # all tokens are equally probable long before


def leave_out(ids: Sequence[int], device: torch.device) -> Filter:
    """Remove tokens, such as the rows of a padded embedding that the tokenizer has no token for.

    Args:
        device: of the logits; the ids are copied there once.
    """
    index = torch.tensor(ids, device=device)

    def apply(logits: Tensor) -> Tensor:
        return logits.index_fill(-1, index, float("-inf"))

    return apply


def scale(temperature: float) -> Filter:
    """Divide by a temperature above 0; the result may be shifted by a constant, which changes no probability."""
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} is negative: 0 is greedy, 1 leaves the model as it is")
    if temperature > LARGEST_TEMPERATURE:
        raise ValueError(
            f"temperature {temperature} is more than {LARGEST_TEMPERATURE:g}: 1 leaves the model as it is"
        )

    def apply(logits: Tensor) -> Tensor:
        if temperature == 1:
            return logits
        # Less the largest logit: however low the temperature, that one stays finite.
        return (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)

    return apply


def keep_top_k(k: int) -> Filter:
    """Keep the k most probable tokens: exactly k where logits tie, all where k is larger than V."""
    if k < 1:
        raise ValueError(f"top_k {k} keeps no token: leave it out to keep all")

    def apply(logits: Tensor) -> Tensor:
        if k >= logits.size(-1):
            return logits
        values, indices = torch.topk(logits, k, dim=-1)
        return torch.full_like(logits, float("-inf")).scatter(-1, indices, values)

    return apply


def keep_top_p(p: float) -> Filter:
    """Keep the nucleus of mass p: the smallest set of most probable tokens whose mass reaches p.

    The token that crosses p belongs to it, and the most probable one is always kept (Holtzman et al. 2020,
    section 3.1).
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p {p} is not in (0, 1]")

    def apply(logits: Tensor) -> Tensor:
        if p == 1:
            return logits
        ordered, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
        probabilities = F.softmax(ordered, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens ahead of each
        removed = before >= p
        removed[..., 0] = False
        return logits.masked_fill(torch.zeros_like(removed).scatter(-1, indices, removed), float("-inf"))

    return apply


def build_filters(temperature: float, top_k: int | None, top_p: float | None) -> list[Filter]:
    """The filters of the settings, in the order in which they are applied; at temperature 0 the best token is left.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """
    filters = [scale(temperature)]
    if top_k is not None:
        filters.append(keep_top_k(top_k))
    if top_p is not None:
        filters.append(keep_top_p(top_p))
    return [keep_top_k(1)] if temperature == 0 else filters


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError, naming the setting, unless the settings can be sampled with."""
    build_filters(temperature, top_k, top_p)


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Scale by temperature, then keep the top k tokens, then the nucleus of mass p.

    Args:
        logits: (B, V), any floating dtype.
        temperature: 0 keeps the most probable token alone.
        top_k: tokens to keep, as keep_top_k; None keeps all.
        top_p: probability mass to keep, in (0, 1], as keep_top_p; None keeps all.

    Returns:
        (B, V) in float32, logits / temperature except for a shift that changes no probability, with removed tokens
        at -inf; the argument is not changed.

    Raises:
        ValueError: a setting is out of range.
    """
    return _apply(build_filters(temperature, top_k, top_p), logits)


def _apply(filters: Sequence[Filter], logits: Tensor) -> Tensor:
    """(B, V), any floating dtype -> (B, V) in float32."""
    logits = logits.float()
    for each in filters:
        logits = each(logits)
    return logits


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
) -> list[list[int]]:
    """Continue a batch of prompts of any lengths.

    Text longer than the context is cropped to ``n_positions`` tokens: its first ones, as many as ``kept`` says, and
    its last ones. Without ``kept`` that is nanoGPT's generate. As long as every row fits, keys and values are cached;
    beyond, each step computes the whole window.

    Args:
        model: its mode is restored afterwards.
        prompts: B lists of token ids, none empty.
        max_new_tokens: per row.
        eos_token_id: a row stops once it has produced this id.
        temperature, top_k, top_p: as filter_logits; temperature 0 is greedy.
        seed: of this call's own generator; the global one is left alone.
        never: ids that are not drawn, whatever their logits.
        kept: for each prompt, the number of its first tokens that are not cropped; fewer than n_positions.

    Returns:
        B lists of new ids, ending with ``eos_token_id`` where the model produced it.

    Raises:
        ValueError: an empty prompt, or a setting out of range.
    """
    filters = build_filters(temperature, top_k, top_p)
    if never:
        filters.insert(0, leave_out(never, model.wte.weight.device))
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: generation needs at least one token to start from")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    generator = None if temperature == 0 else torch.Generator(model.wte.weight.device).manual_seed(seed)
    training = model.training
    model.eval()
    try:
        texts = _continue(model, prompts, max_new_tokens, eos_token_id, lambda x: _draw(x, filters, generator), kept)
    finally:
        model.train(training)
    return [_until_eos(text[len(prompt) :], eos_token_id) for text, prompt in zip(texts, prompts, strict=True)]


def _draw(logits: Tensor, filters: Sequence[Filter], generator: torch.Generator | None) -> Tensor:
    """The next token of each row, logits (B, V) -> (B,): the most probable one if there is no generator."""
    logits = _apply(filters, logits)
    if generator is None:
        return logits.argmax(dim=-1)
    return torch.multinomial(F.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


def _continue(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_id: int | None,
    draw: Callable[[Tensor], Tensor],
    kept: Sequence[int],
) -> list[list[int]]:
    """Prompts with their new tokens; rows that have ended may have tokens behind their EOS.

    Args:
        draw: logits (B, V) -> the next token of each row (B,).
        kept: as generate.
    """
    context = model.config.n_positions
    texts = [list(prompt) for prompt in prompts]
    heads = list(kept) or [0] * len(texts)

    def windows() -> list[list[int]]:
        return [crop(text, context, head) for text, head in zip(texts, heads, strict=True)]

    done = [False] * len(texts)
    decoder: _Decoder | None = None
    new = torch.empty(0, dtype=torch.long)
    for _ in range(max_new_tokens):
        # Rows that are done only keep the batch's shape, and may grow beyond the cache.
        if max(len(text) for text, over in zip(texts, done, strict=True) if not over) > context:
            decoder = None
            logits = _last_logits(model, windows(), None)
        elif decoder is None:
            shown = windows()
            cache = _new_cache(model, len(shown), min(context, max(map(len, shown)) + max_new_tokens))
            logits = _last_logits(model, shown, cache)
            decoder = _Decoder(model, cache)
        else:
            logits = decoder(new)
        new = draw(logits)
        for row, token in enumerate(new.tolist()):
            texts[row].append(token)  # also where the row is done, so that the batch keeps its shape
            if not done[row]:
                done[row] = token == eos_token_id
        if all(done):
            break
    return texts


def crop(text: Sequence[int], length: int, head: int = 0) -> list[int]:
    """At most ``length`` tokens of a text: its first ``head`` ones, and its last ones."""
    if len(text) <= length:
        return list(text)
    return [*text[:head], *text[len(text) - (length - head) :]]


def _new_cache(model: GPTModel, rows: int, capacity: int) -> KVCache:
    """An empty cache of ``capacity`` tokens a row, in the dtype in which the model computes."""
    device = model.wte.weight.device
    mixed = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if mixed else model.ln_f.weight.dtype
    return KVCache(model.config, rows, capacity, device, dtype)


class _Decoder:
    """One more token of each row through the cache: ids (B,) -> logits (B, V), overwritten by the next call.

    On a GPU, a CUDA graph from the second call on: launching a token's kernels takes longer than running them.
    """

    def __init__(self, model: GPTModel, cache: KVCache):
        self.model = model
        self.cache = cache
        self.rehearsed = False  # True once kernels are loaded and weights cast
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        if not (ids.is_cuda and self.rehearsed):
            self.rehearsed = True
            return self._compute(ids)
        if self.graph is None:
            self.ids, self.graph = ids.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.device(ids.device), torch.cuda.graph(self.graph, stream=capture_stream(ids.device)):
                self.logits = self._compute(self.ids)
        self.ids.copy_(ids)
        with torch.cuda.device(ids.device):
            self.graph.replay()
        return self.logits

    def _compute(self, ids: Tensor) -> Tensor:
        hidden = self.model.hidden(ids[:, None], self.cache)
        self.cache.lengths += 1
        return self.model.lm_head(hidden[:, 0])


def _last_logits(model: GPTModel, texts: Sequence[Sequence[int]], cache: KVCache | None) -> Tensor:
    """Logits that follow each row's last token, (B, V). A cache, if given, is filled with the texts."""
    device = model.wte.weight.device
    lengths = torch.tensor([len(text) for text in texts], device=device)
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    hidden = model.hidden(ids.to(device), cache)
    if cache is not None:
        cache.lengths += lengths
    return model.lm_head(hidden[torch.arange(len(texts), device=device), lengths - 1])


def _until_eos(ids: list[int], eos_token_id: int | None) -> list[int]:
    """Cut after the first end-of-text id."""
    if eos_token_id is None or eos_token_id not in ids:
        return ids
    return ids[: ids.index(eos_token_id) + 1]
