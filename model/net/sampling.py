"""Sampling: temperature, top-k and top-p (nucleus), and batched generation with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.net.attention import KVCache
from model.net.device import capture_stream
from model.net.gpt import GPTModel


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError, naming the setting, unless the three can be sampled with."""
    if not temperature >= 0:
        raise ValueError(f"temperature {temperature} is negative: 0 is greedy, 1 leaves the model as it is")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} keeps no token: leave it out to keep all")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} is not in (0, 1]")


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Scale by temperature, then keep the top k tokens, then the nucleus of mass p.

    The nucleus is the smallest set of most probable tokens whose mass reaches ``top_p``: the token that
    crosses it belongs to it, and the most probable one is always kept (Holtzman et al. 2020, section 3.1).

    Args:
        logits: (B, V), any floating dtype.
        temperature: 0 keeps the most probable token alone.
        top_k: tokens to keep, at most V; exactly that many where logits tie.
        top_p: probability mass to keep, in (0, 1].

    Returns:
        (B, V) in float32, logits / temperature but for a shift that changes no probability, with removed tokens at
        -inf; the argument is not changed.

    Raises:
        ValueError: a setting is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    logits = logits.float()
    if temperature == 0:
        top_k, top_p = 1, None
    elif temperature != 1:
        # Less the largest: however low the temperature, that one stays finite.
        logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.size(-1):
        values, indices = torch.topk(logits, top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, indices, values)
    if top_p is not None and top_p < 1:
        ordered, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
        probabilities = F.softmax(ordered, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens ahead of each
        removed = before >= top_p
        removed[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, indices, removed), float("-inf"))
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
) -> list[list[int]]:
    """Continue a batch of prompts of any lengths.

    Text longer than the context is cropped to its last ``n_positions`` tokens, as in nanoGPT's generate:
    as long as every row fits, keys and values are cached; beyond, each step computes the whole window.

    Args:
        model: its mode is restored afterwards.
        prompts: B lists of token ids, none empty.
        max_new_tokens: per row.
        eos_token_id: a row stops once it has produced this id.
        temperature, top_k, top_p: as filter_logits; temperature 0 is greedy.
        seed: of this call's own generator; the global one is left alone.

    Returns:
        B lists of new ids, ending with ``eos_token_id`` where the row stopped by itself.

    Raises:
        ValueError: an empty prompt, or a setting out of range.
    """
    check_sampling(temperature, top_k, top_p)
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt is empty: generation needs at least one token to start from")
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    device = model.wte.weight.device
    context = model.config.n_positions
    rng = torch.Generator(device).manual_seed(seed)
    texts = [list(prompt) for prompt in prompts]
    done = [False] * len(texts)
    training = model.training
    model.eval()
    decoder: _Decoder | None = None
    new = torch.empty(0, dtype=torch.long)
    try:
        for _ in range(max_new_tokens):
            # Rows that are done only keep the batch in shape, and may run out of the cache.
            if max(len(text) for text, over in zip(texts, done, strict=True) if not over) > context:
                decoder = None
                logits = _last_logits(model, [text[-context:] for text in texts], None)
            elif decoder is None:
                kept = [text[-context:] for text in texts]
                capacity = min(context, max(map(len, kept)) + max_new_tokens)
                mixed = torch.is_autocast_enabled(device.type)
                dtype = torch.get_autocast_dtype(device.type) if mixed else model.ln_f.weight.dtype
                cache = KVCache(model.config, len(texts), capacity, device, dtype)
                logits = _last_logits(model, kept, cache)
                decoder = _Decoder(model, cache)
            else:
                logits = decoder(new)
            logits = filter_logits(logits, temperature, top_k, top_p)  # (B, V)
            if temperature == 0:
                new = logits.argmax(dim=-1)
            else:
                new = torch.multinomial(F.softmax(logits, dim=-1), 1, generator=rng)[:, 0]
            for row, token in enumerate(new.tolist()):
                texts[row].append(token)  # also where the row is done, so that the batch keeps its shape
                if not done[row]:
                    done[row] = token == eos_token_id
            if all(done):
                break
    finally:
        model.train(training)
    return [_until_eos(text[len(prompt) :], eos_token_id) for text, prompt in zip(texts, prompts, strict=True)]


class _Decoder:
    """One more token of each row through the cache: ids (B,) -> logits (B, V), overwritten by the next call.

    On a GPU a CUDA graph from the second call on: launching a token's kernels takes longer than running them.
    """

    def __init__(self, model: GPTModel, cache: KVCache):
        self.model = model
        self.cache = cache
        self.rehearsed = False  # kernels are loaded, weights cast
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
    """Logits behind each row's last token, (B, V); with a cache, which is filled."""
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
    """Cut behind the first end-of-text id."""
    if eos_token_id is None or eos_token_id not in ids:
        return ids
    return ids[: ids.index(eos_token_id) + 1]
