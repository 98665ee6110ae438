"""The forward and backward pass of a partly frozen GPT-2 over packed documents, in the dtype to compute in."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.data.packing import Pack, choose
from model.engine.fused import can_fuse, run_blocks
from model.net.attention import Documents
from model.net.device import capture_stream, give_memory_back
from model.net.gpt import GPTModel

_REHEARSAL = 512  # tokens: Triton's kernels are compiled for any number of them

# From hidden states (M, D) to a loss and its gradient (M, D).
Loss = Callable[[Tensor], tuple[Tensor, Tensor]]


def _graph_size(tokens: int) -> int:
    """Graphs are captured for multiples of 128 tokens, or of some 1 % of their size: few, and little is unused."""
    quantum = max(128, 1 << max(0, tokens.bit_length() - 7))
    return (tokens // quantum + 1) * quantum


class _Top(nn.Module):
    """The top's forward pass as a module's, so that ``functional_call`` can swap parameters."""

    def __init__(self, model: GPTModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, documents: Documents, chosen: Tensor) -> Tensor:
        model = self.model
        drops = model.training and model.config.dropout > 0
        if not drops and can_fuse(model, x.device, x.dtype):
            return run_blocks(model.h[model.num_frozen :], model.ln_f, x, documents, chosen)
        return choose(model.top(x, documents), chosen)


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
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where Triton launches kernels, and graphs are captured
        self._top = _Top(model)
        used = {id(p) for part in (*model.h[model.num_frozen :], model.ln_f) for p in part.parameters()}
        self._masters = {name: p for name, p in self._top.named_parameters() if id(p) in used}
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._buffers: _Buffers | None = None
        self.latest_tokens = 0  # of the pass that was begun last

    @functools.cached_property
    def trunk_sha256(self) -> str:
        """Over the frozen weights, which nobody changes while the engine lives."""
        model = self.model
        digest = hashlib.sha256()
        for module in (model.wte, model.wpe, *model.h[: model.num_frozen]):
            for tensor in module.state_dict().values():
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def trunk(self, batch: Pack) -> Tensor:
        """Residual stream above the frozen blocks, (N, D); with gradients only where nothing is frozen."""
        model, self.latest_tokens = self.model, len(batch.ids)
        if model.num_frozen and can_fuse(model, self.device, self.dtype):
            with torch.no_grad():
                x = (model.wte(batch.ids) + model.wpe(batch.positions)).to(self.dtype)
                return run_blocks(model.h[: model.num_frozen], None, x, batch.documents)
        return model.trunk(batch.ids, batch.positions, batch.documents).to(self.dtype)

    def top(self, x: Tensor, batch: Pack) -> Tensor:
        """Final hidden states of the predicting tokens (M, D) from the trunk's outputs (N, D)."""
        self.latest_tokens = len(batch.ids)
        copies = {name: master.to(self.dtype) for name, master in self._masters.items()}
        # No tied weight is among the copies; to look for one would mean a walk over the whole model each time.
        inputs = (x, batch.documents, batch.predictors)
        return functional_call(self._top, copies, inputs, tie_weights=False)

    def forward_backward(self, x: Tensor, batch: Pack, loss: Loss, first: bool = False) -> Tensor:
        """Add the gradients of a batch to the parameters' ``grad``.

        Args:
            x: the trunk's outputs, (N, D).
            loss: from the hidden states of the predicting tokens (M, D) to the loss and its gradient (M, D).
            first: of an optimizer step: what ``keeps_gradients`` kept from the step before is written over.

        Returns:
            The loss as ``loss`` gave it.
        """
        self.latest_tokens = len(batch.ids)
        if self._replays(x):
            return self._replay(x, batch, loss, first)
        hidden = self.top(x, batch)
        value, gradient = loss(hidden.detach())
        with deterministic():
            hidden.backward(gradient)
        return value

    @property
    def keeps_gradients(self) -> bool:
        """Graphs write to the gradients' memory: it must stay where it is, and need not be zeroed."""
        return bool(self._graphs)

    def _replays(self, x: Tensor) -> bool:
        """Whether to replay CUDA graphs: where kernels need nothing from the host, and no gradient goes below."""
        can_capture = self.model.config.dropout == 0 and can_fuse(self.model, x.device, x.dtype)
        return can_capture and not x.requires_grad

    def _replay(self, x: Tensor, batch: Pack, loss: Loss, first: bool) -> Tensor:
        # A graph's shapes follow from its pack alone: they decide how a matrix product rounds, and a resumed training
        # must repeat the original though it begins with another pack.
        size = _graph_size(x.size(0))
        places = -(-4 * len(batch.predictors) // size) * size // 4  # in quarters of it
        if self._buffers is None or size > len(self._buffers.x):
            self._make_room(size, x)
        assert self._buffers is not None
        key = size, places, first
        if key not in self._graphs:
            for master in self._masters.values():
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
            self._graphs[key] = _Graph(self._top, self._masters, size, places, first, self._buffers)
        return self._graphs[key].run(x, batch, loss)

    def _make_room(self, size: int, x: Tensor) -> None:
        """Buffers for graphs of up to a quarter more than ``size`` tokens."""
        if self._buffers is not None:
            self._graphs.clear()
            self._buffers = None
            give_memory_back()
        self._buffers = _Buffers(int(1.25 * size), x)


class _Buffers:
    """What graphs of all sizes read, and the hidden states that they leave; each takes the beginning.

    Args:
        tokens: of the largest graph.
        example: of the trunk's outputs.
    """

    def __init__(self, tokens: int, example: Tensor):
        self.x = example.new_zeros(tokens, example.size(1))
        self.chosen = torch.zeros(tokens, dtype=torch.long, device=example.device)
        # Zero, so that the rehearsal adds nothing to gradients accumulated so far.
        self.hidden, self.gradient = torch.zeros_like(self.x), torch.zeros_like(self.x)
        # What a pack leaves unused is documents of one token each, of no consequence.
        self.alone = torch.arange(tokens + 1, dtype=torch.int32, device=example.device)
        self.begins, self.ends = self.alone[:-1].clone(), self.alone[1:].clone()
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = capture_stream(example.device)
        self.rehearsed = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On a stream of their own, as capturing must be."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)


class _Graph:
    """Forward and backward pass of the top as two CUDA graphs, for packs of fewer than ``size`` tokens.

    ``places`` of them may predict. Parameters are cast, and the gradients of a step's first pack written, in a few
    kernels: by autograd it would be three for each parameter.
    """

    def __init__(
        self, top: _Top, masters: Mapping[str, Tensor], size: int, places: int, first: bool, buffers: _Buffers
    ):
        self.size = size
        self.places = places
        self.buffers = buffers
        totals = [master.grad for master in masters.values() if master.grad is not None]

        def forward(size: int, places: int) -> tuple[list[Tensor], Tensor]:
            copies = [torch.empty_like(master, dtype=buffers.x.dtype) for master in masters.values()]
            with torch.no_grad():
                torch._foreach_copy_(copies, list(masters.values()))
            for copy in copies:
                copy.requires_grad_()
            parameters = dict(zip(masters, copies, strict=True))
            documents = Documents([], buffers.begins[:size], buffers.ends[:size])
            inputs = (buffers.x[:size], documents, buffers.chosen[:places])
            hidden = functional_call(top, parameters, inputs, tie_weights=False)
            buffers.hidden[:places].copy_(hidden.detach())
            return copies, hidden

        def backward(copies: list[Tensor], hidden: Tensor) -> None:
            gradients = torch.autograd.grad(hidden, copies, buffers.gradient[: len(hidden)])
            if first:
                torch._foreach_copy_(totals, gradients)
            else:
                for total, gradient in zip(totals, gradients, strict=True):
                    total.add_(gradient)

        if not buffers.rehearsed:  # libraries set themselves up, kernels are compiled
            with deterministic():
                backward(*forward(min(size, _REHEARSAL), min(places, _REHEARSAL)))
            buffers.rehearsed = True
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with buffers.aside(), deterministic():
            with _capturing(self.forward, buffers):
                copies, hidden = forward(size, places)
            with _capturing(self.backward, buffers):
                backward(copies, hidden)

    def run(self, x: Tensor, batch: Pack, loss: Loss) -> Tensor:
        """As ``Engine.forward_backward``."""
        buffers, tokens, predictors = self.buffers, x.size(0), len(batch.predictors)
        assert tokens < self.size  # the last place belongs to no pack
        buffers.x[:tokens].copy_(x)
        for buffer, given, alone in (
            (buffers.begins, batch.documents.begins, buffers.alone[:-1]),
            (buffers.ends, batch.documents.ends, buffers.alone[1:]),
        ):
            buffer[:tokens].copy_(given)
            buffer[tokens : self.size].copy_(alone[tokens : self.size])
        buffers.chosen[:predictors].copy_(batch.predictors)
        buffers.chosen[predictors : self.places].fill_(self.size - 1)  # of no pack: its gradient is nobody's
        self.forward.replay()
        value, gradient = loss(buffers.hidden[:predictors])
        buffers.gradient[:predictors].copy_(gradient)
        buffers.gradient[predictors : self.places].zero_()
        self.backward.replay()
        return value


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, buffers: _Buffers) -> Iterator[None]:
    """Not torch.cuda.graph: it would wait for the device and empty the allocator's cache at every graph."""
    graph.capture_begin(buffers.pool, "relaxed")
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # what failed counts, memory that ran out above all
            graph.capture_end()  # else all that follows on the stream would be captured
        raise
    graph.capture_end()


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
