"""Generation in PyTorch alone: a padded key-value cache, one row of it for each slot. Runs on any device.

Rows are right-padded: a row's next token goes to the place behind its last one, so prompts of different lengths need
neither left padding nor shifted positions. A step reads the cache as far as its longest row.

Shapes: B slots, T tokens of a row, S places of a row in the cache, H heads, K width of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from model.available import available_memory
from model.generation.slots import Row, Slots
from model.net.attention import Layer, Rows
from model.net.config import GPTConfig
from model.net.gpt import MLP, Attention, Block, GPTModel

_SLOTS = {"cpu": 64}  # with more rows, a step of a CPU no longer fits its cache memory
_NARROW, _SLOTS_OF_NARROW = 256, {"cpu": 256}  # width of a model whose steps take longer to begin than to compute
_CACHE_BYTES = {"cpu": 2 << 30}
_OTHER_SLOTS, _OTHER_CACHE_BYTES = 256, 8 << 30  # of any other device
_SHARE = 0.5  # of the free memory that the cache may take
_PASS_TOKENS = 4096  # padded tokens of the prompts that one pass computes
_PACK_BYTES = 2 << 30  # weights, at most, of which a CPU gets a second copy in the layout of its fast kernels
_PACK_TOKENS = 256  # and tokens, at least, for which making the copy pays


class PaddedDecoder:
    """Continues rows in slots.

    Args:
        model: in eval mode.
        rows: all rows that are to be continued, those that need most of the cache first. Thus a row that takes the
            slot of another needs no more than that one.
        slots: makes the state of so many slots.
        dtype: in which the model computes.
        sharers: decoders that run at the same time, and share the device's memory.
    """

    look_every = 1  # steps between two looks at which rows have ended: a CPU waits for nothing

    def __init__(
        self,
        model: GPTModel,
        rows: Sequence[Row],
        slots: Callable[[int], Slots],
        dtype: torch.dtype,
        sharers: int = 1,
    ):
        device = model.wte.weight.device
        self.device, self.dtype, self.vocab_size = device, dtype, model.config.vocab_size
        work = sum(row.need for row in rows)
        self.model = packed(model, dtype) if device.type == "cpu" and work > _PACK_TOKENS else model
        kept = torch.float32 if device.type == "cpu" else dtype  # the CPU's products of a row are slow in bf16
        capacity = rows[0].need if rows else 0
        memory = min(_CACHE_BYTES.get(device.type, _OTHER_CACHE_BYTES), int(_SHARE * _free_bytes(device))) // sharers
        size = _fitting(model.config, capacity, len(rows), device, kept, memory)
        self.slots = slots(size)
        self.cache = PaddedCache(model.config, size, capacity, device, kept)

    def start(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Compute the prompts of rows, and draw the first new token of each."""
        index = self.slots.put(slots, rows)
        for part in _parts([len(row.prompt) for row in rows]):
            chosen = index[part]
            texts = [row.prompt for row in rows[part]]
            self.slots.advance(self._last_logits(texts, NewRows(self.cache, chosen)), chosen)

    def step(self, size: int) -> None:
        """Draw the next token of each of the first ``size`` slots."""
        state, model = self.slots, self.model
        lengths = state.lengths(size).clamp(min=0)
        layout = Continued(self.cache, lengths)
        x = model.trunk(state.ids[:size, None], lengths[:, None], layout)  # (B, 1, D)
        state.advance(model.lm_head(model.top(x, layout)[:, 0]), slice(0, size))

    def last_logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits (B, V) that follow each text, computed without the cache."""
        found = [self._last_logits(texts[part], Rows()) for part in _parts([len(text) for text in texts])]
        return torch.cat(found)

    def fitting(self, rows: int, size: int) -> int:
        """The number of slots with which so many rows are continued; ``size`` is the present one."""
        return rows

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Continue the rows of some slots in others, whose rows have ended."""
        chosen, places = (torch.tensor(slots, device=self.device) for slots in (sources, targets))
        self.slots.move(chosen, places)
        for each in (self.cache.keys, self.cache.values):
            each[:, places] = each[:, chosen]

    def _last_logits(self, texts: Sequence[Sequence[int]], layout: NewRows | Rows) -> Tensor:
        model, device = self.model, self.device
        lengths = torch.tensor([len(text) for text in texts], device=device)
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        positions = torch.arange(ids.size(1), device=device)
        return model.lm_head(_last_hidden(model, ids.to(device), positions, layout, lengths - 1))


def _last_hidden(model: GPTModel, ids: Tensor, positions: Tensor, layout: NewRows | Rows, places: Tensor) -> Tensor:
    """Final hidden states (B, D) of one token of each text (B, T), at ``places`` (B,).

    The last block computes keys and values of all tokens, and all else of these tokens alone.
    """
    rows = torch.arange(len(ids), device=ids.device)
    last = model.h[-1] if model.num_frozen < len(model.h) else None
    if type(last) is not Block or type(last.attn) is not Attention:
        return model.top(model.trunk(ids, positions, layout), layout)[rows, places]
    x = model.trunk(ids, positions, layout)
    for index in range(model.num_frozen, len(model.h) - 1):
        x = model.h[index](x, layout.layer(index))
    q, k, v = last.attn.c_attn(last.ln_1(x)).unflatten(-1, (3, last.attn.n_head, -1)).unbind(-3)
    found = layout.layer(len(model.h) - 1).attend(q, k, v, 0.0)[rows, places]  # (B, H, K)
    x = x[rows, places] + last.attn.c_proj(found.flatten(-2))
    return model.ln_f(x + last.mlp(last.ln_2(x)))


def _fitting(
    config: GPTConfig, capacity: int, rows: int, device: torch.device, dtype: torch.dtype, memory: int
) -> int:
    """Slots: as many as there are rows, as pay on the device, and as so many bytes hold; at least one."""
    row_bytes = 2 * config.n_layer * config.n_embd * dtype.itemsize * max(capacity, 1)
    slots = _SLOTS_OF_NARROW if config.n_embd <= _NARROW else _SLOTS
    return min(rows, slots.get(device.type, _OTHER_SLOTS), max(1, memory // row_bytes))


def _free_bytes(device: torch.device) -> int:
    """Bytes of a device's memory that can be allocated now."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, and not used
        return torch.cuda.mem_get_info(device)[0] + held
    return available_memory()  # a GPU of Apple shares the main memory


def _parts(lengths: Sequence[int]) -> Iterator[slice]:
    """Cut rows into parts of at most ``_PASS_TOKENS`` tokens, padding included; a part has at least one row."""
    begin = longest = 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if row > begin and longest * (row + 1 - begin) > _PASS_TOKENS:
            yield slice(begin, row)
            begin, longest = row, length
    if lengths:
        yield slice(begin, len(lengths))


class PaddedCache:
    """Keys (L, B, H, K, S) and values (L, B, H, S, K) of all slots and layers.

    So the products with one query read memory in its order, which makes them several times faster on a CPU.
    """

    def __init__(self, config: GPTConfig, slots: int, capacity: int, device: torch.device, dtype: torch.dtype):
        rows, width = (config.n_layer, slots, config.n_head), config.n_embd // config.n_head
        # Not empty memory: a place that a row does not have yet gets the weight 0, and 0 times NaN would be NaN.
        self.keys = torch.zeros(*rows, width, capacity, device=device, dtype=dtype)
        self.values = torch.zeros(*rows, capacity, width, device=device, dtype=dtype)


class NewRows:
    """Prompts (B, T), right-padded, whose keys and values begin the rows of some slots."""

    def __init__(self, cache: PaddedCache, slots: Tensor):
        self.cache, self.slots = cache, slots

    def layer(self, index: int) -> Layer:
        return _NewRowsLayer(self.cache.keys[index], self.cache.values[index], self.slots)


class _NewRowsLayer(Rows):
    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor):
        self.keys, self.values, self.slots = keys, values, slots

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        # Keys of padding lie behind the row's own, where its next tokens will overwrite them.
        tokens = k.size(1)
        self.keys[self.slots, :, :, :tokens] = k.permute(0, 2, 3, 1).to(self.keys.dtype)
        self.values[self.slots, :, :tokens] = v.transpose(1, 2).to(self.values.dtype)
        dtype = q.dtype
        if dtype.itemsize == 2 and not q.is_cuda:  # the CPU's kernel is faster in fp32 where rows are short
            q, k, v = q.float(), k.float(), v.float()
        return super().attend(q, k, v, dropout).to(dtype)


class Continued:
    """One more token of each of the first slots.

    Args:
        lengths: tokens of each that the cache has, (B,).
    """

    def __init__(self, cache: PaddedCache, lengths: Tensor):
        self.cache, self.lengths = cache, lengths
        self.rows = torch.arange(len(lengths), device=lengths.device)
        heads = cache.keys.size(2)
        self.read = int(lengths.max()) + 1
        hidden = torch.arange(self.read, device=lengths.device) > lengths[:, None]  # (B, S)
        mask = torch.zeros_like(hidden, dtype=cache.keys.dtype).masked_fill_(hidden, float("-inf"))
        self.mask = mask.repeat_interleave(heads, 0)[:, None]  # (B H, 1, S)

    def layer(self, index: int) -> Layer:
        return _ContinuedLayer(self, self.cache.keys[index], self.cache.values[index])


class _ContinuedLayer(Rows):
    def __init__(self, layout: Continued, keys: Tensor, values: Tensor):
        self.layout, self.keys, self.values = layout, keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """q, k, v (B, 1, H, K) -> (B, 1, H, K). Two batched products: PyTorch's attention is slower for one query."""
        layout = self.layout
        rows, heads, width = q.size(0), q.size(2), q.size(3)
        self.keys[layout.rows, :, :, layout.lengths] = k[:, 0].to(self.keys.dtype)
        self.values[layout.rows, :, layout.lengths] = v[:, 0].to(self.values.dtype)
        keys = self.keys[:rows, :, :, : layout.read].flatten(0, 1)  # (B H, K, S)
        values = self.values[:rows, :, : layout.read].flatten(0, 1)  # (B H, S, K)
        with torch.autocast(q.device.type, enabled=False):
            query = q.reshape(rows * heads, 1, width).to(keys.dtype)
            weights = torch.baddbmm(layout.mask, query, keys, alpha=width**-0.5).softmax(-1)
            return torch.bmm(weights, values).view(rows, 1, heads, width).to(q.dtype)


def packed(model: GPTModel, dtype: torch.dtype) -> GPTModel:
    """A model with the same weights whose linear layers run on oneDNN, which packs their weights once.

    PyTorch multiplies fp32 matrices by MKL, which is two to three times slower on processors that are not Intel's.
    The model itself is left as it is. Layers of a type of their own, such as adapters, are kept.
    """
    size = sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    if size > _PACK_BYTES or dtype not in (torch.float32, torch.bfloat16) or not _has_packed_products():
        return model
    clone = _replace_linear(model, dtype)
    assert isinstance(clone, GPTModel)
    return clone


def _has_packed_products() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _replace_linear(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    if type(module) is nn.Linear:
        return _PackedLinear(module, dtype)
    if type(module) is MLP and type(module.c_fc) is type(module.c_proj) is nn.Linear:
        return nn.Sequential(_PackedLinear(module.c_fc, dtype, gelu=True), _PackedLinear(module.c_proj, dtype))
    clone = copy.copy(module)
    clone._modules = {
        name: child and _replace_linear(child, dtype) for name, child in module._modules.items()
    }  # the other attributes are shared
    return clone


class _PackedLinear(nn.Module):
    """A linear layer by oneDNN, and the tanh approximation of GELU if wanted: (..., I) -> (..., O), in ``dtype``."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, gelu: bool = False):
        super().__init__()
        self.activation: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self.dtype = dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        return product(x.to(self.dtype), self.packed, self.bias, *self.activation)  # type: ignore[no-any-return]
