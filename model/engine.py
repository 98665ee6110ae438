"""The forward and backward pass of a partly frozen GPT-2 over packed documents, in the dtype to compute in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.attention import Documents
from model.gpt import GPTModel
from model.packing import Pack

# From hidden states (M, D) to a loss and its gradient (M, D).
Loss = Callable[[Tensor], tuple[Tensor, Tensor]]


def _graph_size(tokens: int) -> int:
    """Graphs are captured for multiples of 256 tokens, or of some 2 % of their size: few, and little is unused."""
    quantum = max(256, 1 << max(0, tokens.bit_length() - 6))
    return (tokens // quantum + 1) * quantum


class _Top(nn.Module):
    """``GPTModel.top`` as a module's forward pass, so that ``functional_call`` can swap parameters."""

    def __init__(self, model: GPTModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        return self.model.top(x, documents)


class Engine:
    """Runs a model's trunk and top apart from each other.

    Trained parameters stay fp32 (the optimizer's master weights) and are computed with as copies in ``dtype``,
    as in Megatron-LM; their gradients are accumulated in fp32.

    Args:
        model: on its device, frozen parameters already in ``dtype``.
        dtype: to compute in.
    """

    def __init__(self, model: GPTModel, dtype: torch.dtype):
        self.model = model
        self.dtype = dtype
        self.device = model.wte.weight.device
        self._top = _Top(model)
        used = {id(p) for part in (*model.h[model.num_frozen :], model.ln_f) for p in part.parameters()}
        self._masters = {name: p for name, p in self._top.named_parameters() if id(p) in used}
        self._graphs: dict[int, _Graph] = {}
        self._buffers: _Buffers | None = None

    def trunk(self, batch: Pack) -> Tensor:
        """Residual stream above the frozen blocks, (N, D); with gradients only where nothing is frozen."""
        return self.model.trunk(batch.ids, batch.positions, batch.documents).to(self.dtype)

    def top(self, x: Tensor, documents: Documents) -> Tensor:
        """Final hidden states (N, D) from the trunk's outputs (N, D)."""
        copies = {name: master.to(self.dtype) for name, master in self._masters.items()}
        # No tied weight is among the copies; to look for one would mean a walk over the whole model each time.
        return functional_call(self._top, copies, (x, documents), tie_weights=False)

    def forward_backward(self, x: Tensor, batch: Pack, loss: Loss) -> Tensor:
        """Add the gradients of a batch to the parameters' ``grad``.

        Args:
            x: the trunk's outputs, (N, D).
            loss: from the hidden states of the predicting tokens (M, D) to the loss and its gradient (M, D).

        Returns:
            The loss as ``loss`` gave it.
        """
        if self._replays(x):
            return self._replay(x, batch, loss)
        hidden = self.top(x, batch.documents)
        value, gradient = loss(hidden.detach()[batch.predictors])
        whole = torch.zeros_like(hidden)
        whole[batch.predictors] = gradient
        with deterministic():
            hidden.backward(whole)
        return value

    @property
    def keeps_gradients(self) -> bool:
        """Graphs write to the gradients' memory, which must then stay where it is."""
        return bool(self._graphs)

    def _replays(self, x: Tensor) -> bool:
        """Whether to replay CUDA graphs: where kernels need nothing from the host, and no gradient goes below."""
        return x.is_cuda and x.dtype == torch.bfloat16 and not x.requires_grad and self.model.config.dropout == 0

    def _replay(self, x: Tensor, batch: Pack, loss: Loss) -> Tensor:
        size = _graph_size(x.size(0))
        # Documents for what is left of the size are appended.
        documents = len(batch.documents.lengths) + size // batch.documents.longest + 1
        if self._buffers is None or not self._buffers.fit(size, documents):
            width = self.model.config.n_embd
            self._graphs.clear()
            self._buffers = _Buffers(int(1.25 * size), int(1.25 * documents), width, self.dtype, self.device)
        if size not in self._graphs:
            for master in self._masters.values():
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
            self._graphs[size] = _Graph(self, size, self._buffers, batch.documents)
        return self._graphs[size].run(x, batch, loss)


class _Buffers:
    """Where graphs of all sizes read their inputs; each takes the beginning."""

    def __init__(self, tokens: int, documents: int, width: int, dtype: torch.dtype, device: torch.device):
        self.x = torch.zeros(tokens, width, dtype=dtype, device=device)
        self.gradient = torch.zeros(tokens, width, dtype=dtype, device=device)
        self.offsets = torch.zeros(documents + 1, dtype=torch.int32, device=device)
        self.pool = torch.cuda.graph_pool_handle()

    def fit(self, tokens: int, documents: int) -> bool:
        return tokens <= len(self.x) and documents < len(self.offsets)


class _Graph:
    """Forward and backward pass of the top as two CUDA graphs, for packs of up to ``size`` tokens."""

    def __init__(self, engine: Engine, size: int, buffers: _Buffers, example: Documents):
        self.size = size
        self.buffers = buffers
        self.longest = example.longest
        x, gradient = buffers.x[:size], buffers.gradient[:size]
        documents = Documents([], buffers.offsets, self.longest)
        self._lay_out(example.offsets)  # attention leaves tokens of no document unwritten: NaN, perhaps
        gradient.zero_()  # so that the rehearsal adds nothing to gradients accumulated so far
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), deterministic():
            engine.top(x, documents).backward(gradient)
        torch.cuda.current_stream().wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, pool=buffers.pool):
            hidden = engine.top(x, documents)
        with torch.cuda.graph(self.backward, pool=buffers.pool), deterministic():
            hidden.backward(gradient)
        self.hidden = hidden.detach()

    def run(self, x: Tensor, batch: Pack, loss: Loss) -> Tensor:
        """As ``Engine.forward_backward``."""
        self.buffers.x[: x.size(0)].copy_(x)
        self._lay_out(batch.documents.offsets)
        self.forward.replay()
        value, gradient = loss(self.hidden[batch.predictors])
        self.buffers.gradient[: self.size].zero_()
        self.buffers.gradient[batch.predictors] = gradient
        self.backward.replay()
        return value

    def _lay_out(self, offsets: Tensor) -> None:
        """Documents as given; behind them, the rest of the size as documents of no consequence; then empty ones."""
        buffer = self.buffers.offsets
        count = len(offsets)
        steps = torch.arange(1, len(buffer) - count + 1, dtype=torch.int32, device=buffer.device)
        buffer[:count] = offsets
        buffer[count:] = (offsets[-1] + steps * self.longest).clamp(max=self.size)


@contextmanager
def deterministic() -> Iterator[None]:
    """Backward kernels that sum in a fixed order, so that a resumed training repeats the original bit for bit."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
