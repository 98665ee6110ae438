"""Generation on a GPU: a packed cache, fused kernels, and a CUDA graph for a step of all slots.

The cache is one array of places. Each slot owns as many of them, in one piece, as its first row needs; later rows
of the slot need no more. A step is replayed as a graph, because launching its kernels takes longer than running them.

Shapes: B slots, N tokens of packed prompts, H heads, K width of a head, P places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.engine.engine import capturing
from model.engine.fused import has_kernels, has_plain_layers
from model.engine.loss import padded_head
from model.generation.slots import Row, Slots
from model.net.config import GPTConfig
from model.net.device import on_capture_stream
from model.net.gpt import GPTModel

_MOST_SLOTS = 2048  # with more rows, a step takes longer in proportion
_PASS_TOKENS = 32768  # tokens of the prompts, at most, that one pass computes
_PASS_NUMBERS = 16  # numbers that exist at a time in such a pass, in multiples of tokens and width
_SHARE = 0.8  # of the free memory that cache and logits may take
_ALIGNED = 8  # a row's places begin at a multiple of this

Attend = Callable[[int, Tensor], Tensor]
"""Number of the layer, and queries, keys and values of its tokens (..., 3 H K) -> (..., H K)."""


def can_decode(model: GPTModel, dtype: torch.dtype) -> bool:
    """Whether ``FusedDecoder`` can run the model."""
    plain = has_plain_layers(model.h, model.ln_f) and type(model.lm_head) is nn.Linear
    return plain and has_kernels(model.config, model.wte.weight.device, dtype)


class FusedDecoder:
    """Continues rows in slots; for the methods, see ``model.generation.padded.PaddedDecoder``.

    Args:
        model: on a GPU, which is torch's current device meanwhile: Triton launches kernels, and graphs are captured,
            on that one. In eval mode.
        rows: all rows that are to be continued, those that need most of the cache first.
        slots: makes the state of so many slots.
        dtype: in which the model computes.
    """

    look_every = 8  # a row that has ended keeps its slot for half as many steps on average

    def __init__(self, model: GPTModel, rows: Sequence[Row], slots: Callable[[int], Slots], dtype: torch.dtype):
        config, self.device, self.dtype = model.config, model.wte.weight.device, dtype
        self.vocab_size, self.heads = config.vocab_size, config.n_head
        self.network = _Network(model, dtype)
        needs = [-(-row.need // _ALIGNED) * _ALIGNED for row in rows]
        free = torch.cuda.mem_get_info(self.device)[0] + _unused(self.device)
        size = fitting_slots(config, needs, dtype.itemsize, int(_SHARE * free))
        left = int((1 - _SHARE) * free) // (_PASS_NUMBERS * config.n_embd * dtype.itemsize)
        self.pass_tokens = min(_PASS_TOKENS, max(left, config.n_positions))
        self.slots = slots(size)
        ends = list(accumulate(needs[:size], initial=0))
        self.begins = torch.tensor(ends[:-1], dtype=torch.long, device=self.device)
        shape = (config.n_layer, config.n_head, ends[-1], config.n_embd // config.n_head)
        self.keys, self.values = (torch.empty(shape, device=self.device, dtype=dtype) for _ in range(2))
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # None: its kernels were launched once
        self.pool = torch.cuda.graph_pool_handle()

    def start(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        index = self.slots.put(slots, rows)
        for part in _parts([len(row.prompt) for row in rows], self.pass_tokens):
            chosen = index[part]
            logits = self._last_logits([row.prompt for row in rows[part]], self.begins[chosen])
            self.slots.advance(logits, chosen)

    def step(self, size: int) -> None:
        if size not in self.graphs:  # the first time kernels are loaded, which no graph may do
            self._step(size)
            self.graphs[size] = None
            return
        graph = self.graphs[size]
        if graph is None:
            self.graphs[size] = graph = torch.cuda.CUDAGraph()
            with on_capture_stream(self.device), capturing(graph, self.pool):
                self._step(size)
        graph.replay()

    def last_logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        parts = _parts([len(text) for text in texts], self.pass_tokens)
        return torch.cat([self._last_logits(texts[part]) for part in parts])

    def fitting(self, rows: int, size: int) -> int:
        # A new size needs a new graph. A slot whose row has ended costs little: attention skips it.
        return size if rows > size // 4 else min(size, -(-rows // 16) * 16)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        chosen, places = (torch.tensor(slots, device=self.device) for slots in (sources, targets))
        self.slots.move(chosen, places)
        self.begins[places] = self.begins[chosen]

    def _step(self, size: int) -> None:
        from model.generation.decode_kernels import attend

        lengths, begins = self.slots.lengths(size), self.begins[:size]

        def attention(layer: int, qkv: Tensor) -> Tensor:
            return attend(qkv, self.keys[layer], self.values[layer], begins, lengths, self.heads)

        hidden = self.network.hidden(self.slots.ids[:size], lengths.clamp(min=0), attention)
        self.slots.advance(self.network.logits(hidden), slice(0, size))

    def _last_logits(self, texts: Sequence[Sequence[int]], places: Tensor | None = None) -> Tensor:
        """Logits that follow each text.

        Args:
            places: where in the cache each text's keys and values begin, (B,); None keeps none.
        """
        from model.engine.attention_kernels import attention

        lengths = torch.tensor([len(text) for text in texts]).to(self.device)
        ids = torch.tensor([id for text in texts for id in text]).to(self.device)
        ends = lengths.cumsum(0)
        rows = torch.repeat_interleave(lengths, output_size=len(ids))  # (N,)
        begins, positions = (ends - lengths)[rows], torch.arange(len(ids), device=self.device)
        positions -= begins
        bounds = begins.int(), ends[rows].int()
        kept = None if places is None else places[rows] + positions

        def attend(layer: int, qkv: Tensor) -> Tensor:
            if kept is not None:
                _, k, v = qkv.unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)  # (H, N, K)
                self.keys[layer].index_copy_(1, kept, k)
                self.values[layer].index_copy_(1, kept, v)
            return attention(qkv, *bounds, self.heads)

        return self.network.logits(self.network.hidden(ids, positions, attend)[ends - 1])


class _Network:
    """GPT-2 with the trainer's fused kernels, its weights in one dtype."""

    def __init__(self, model: GPTModel, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        self.head = padded_head(model.lm_head.weight, dtype)
        self.layers = [
            [
                (linear.weight.detach().to(dtype), linear.bias.detach().to(dtype))
                for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
            ]
            for block in model.h
        ]

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states (N, D) of tokens and their positions (N,)."""
        from model.engine.pointwise_kernels import add_norm

        model, blocks = self.model, self.model.h
        x = (model.wte(ids) + model.wpe(positions)).to(self.dtype)
        norm = blocks[0].ln_1 if blocks else model.ln_f
        n = F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
        n = n.to(self.dtype)  # autocast makes it fp32
        for number, (block, (qkv, project, fold, unfold)) in enumerate(zip(blocks, self.layers, strict=True)):
            y = attend(number, F.linear(n, *qkv))
            x, n = add_norm(x, F.linear(y, project[0]), project[1], block.ln_2)
            h = torch._addmm_activation(fold[1], n, fold[0].t(), use_gelu=True)
            following = blocks[number + 1].ln_1 if number + 1 < len(blocks) else model.ln_f
            x, n = add_norm(x, F.linear(h, unfold[0]), unfold[1], following)
        return n

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B, W): V logits, and columns up to a multiple of 64 that are no tokens'."""
        return F.linear(hidden, self.head)


def fitting_slots(config: GPTConfig, needs: Sequence[int], itemsize: int, memory: int) -> int:
    """Number of slots: as many as there are rows, as pay, and as the memory holds; at least one if there is a row.

    Args:
        needs: places of each row in the cache, descending.
        itemsize: bytes of a number.
        memory: bytes that the slots may take.
    """
    place = 2 * config.n_layer * config.n_embd * itemsize  # keys and values of a token
    logits = 12 * config.vocab_size  # bytes of a slot: logits and, where all are kept, their copies in fp32
    bytes_so_far = accumulate(need * place + logits for need in needs[:_MOST_SLOTS])
    return max(min(len(needs), 1), sum(each <= memory for each in bytes_so_far))


def _unused(device: torch.device) -> int:
    """Bytes that torch's allocator holds and does not use."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _parts(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Cut texts into parts of at most ``most`` tokens; a part has at least one text."""
    begin = total = 0
    for row, length in enumerate(lengths):
        if row > begin and total + length > most:
            yield slice(begin, row)
            begin, total = row, 0
        total += length
    if lengths:
        yield slice(begin, len(lengths))
