"""Forward and backward passes of a partly frozen GPT-2 over packed documents, in one computing dtype."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from model.data.packing import Pack, choose
from model.engine.fused import can_fuse, run_blocks
from model.net.attention import Documents
from model.net.device import give_memory_back, on_capture_stream
from model.net.gpt import GPTModel
from model.net.noise import Noise

_WARM_UP_TOKENS = 512  # enough for a warm-up: a Triton kernel compiled for one number of tokens serves all

_LONG_PASS = 32_768  # tokens: from here on a pass of 355M takes longer than a capture, so more graphs cost nothing

# From hidden states (M, D) to a loss and the gradient with respect to them (M, D).
Loss = Callable[[Tensor], tuple[Tensor, Tensor]]


def _graph_size(tokens: int, steps: int) -> int:
    """Capacity of the graph for a pack: the next multiple of a step above ``tokens``.

    The step is about ``tokens / steps``, but 128 at least, and 512 or for long passes 256 at most. So there are few
    graphs, and little of each is unused.
    """
    most = 512 if tokens < _LONG_PASS else 256
    quantum = max(128, min(most, (1 << tokens.bit_length()) // steps))
    return (tokens // quantum + 1) * quantum


class _Top(nn.Module):
    """The top's forward pass as a module of its own, so that ``functional_call`` can swap its parameters."""

    def __init__(self, model: GPTModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, documents: Documents, chosen: Tensor) -> Tensor:
        model = self.model
        blocks = model.h[model.num_frozen :]
        if can_fuse(model, blocks, model.ln_f, x.device, x.dtype):
            return run_blocks(blocks, model.ln_f, x, documents, chosen, model.num_frozen)
        return choose(model.top(x, documents), chosen)


class Engine:
    """Runs the two parts of a model separately: the frozen trunk, and the top (trained blocks and final norm).

    Trained parameters stay in fp32, as the optimizer's master weights. The computation uses copies of them in
    ``dtype``, as in Megatron-LM; their gradients are accumulated in fp32.

    Args:
        model: on its device, frozen parameters already in ``dtype``.
        dtype: computing dtype.
        seed: of the noise of dropout.
        graph_steps: power of two; the sizes of CUDA graphs are multiples of about ``tokens / graph_steps``. With few,
            fewer graphs are captured, and more of each is unused.
    """

    def __init__(self, model: GPTModel, dtype: torch.dtype, seed: int = 0, graph_steps: int = 128):
        self.model = model
        self.dtype = dtype
        self.device = model.wte.weight.device
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton launches kernels, and graphs are captured, on this device
        self._top = _Top(model)
        used = {id(p) for part in (*model.h[model.num_frozen :], model.ln_f) for p in part.parameters()}
        self._masters = {name: p for name, p in self._top.named_parameters() if id(p) in used}
        self._origin = torch.tensor([seed, 0], device=self.device)
        self.graph_steps = graph_steps
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._gradients: dict[str, Tensor] = {}  # to whose memory the graphs write
        self._buffers: _Buffers | None = None
        self.latest_tokens = 0  # tokens of the pass that was started last

    def dtype_in_passes(self, parameters: Sequence[nn.Parameter]) -> torch.dtype:
        """``dtype`` if passes use these parameters, as those of the top, only as copies in it; else their own."""
        masters = {id(master) for master in self._masters.values()}
        return self.dtype if all(id(each) in masters for each in parameters) else parameters[0].dtype

    def restart(self, seed: int) -> None:
        """Serve another training of the same model with the same dropout, in any thread; graphs stay.

        Its trained parameters may have been overwritten, but not replaced. Gradients of the training before are
        there again, as they are from one step to the next.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread
        self._origin.copy_(torch.tensor([seed, 0]))
        for name, gradient in self._gradients.items():
            self._masters[name].grad = gradient
        self.latest_tokens = 0

    @functools.cached_property
    def trunk_sha256(self) -> str:
        """sha256 of the frozen weights, which must not change while the engine exists."""
        model = self.model
        digest = hashlib.sha256()
        for module in (model.wte, model.wpe, *model.h[: model.num_frozen]):
            for tensor in module.state_dict().values():
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def trunk(self, batch: Pack) -> Tensor:
        """Residual stream above the frozen blocks (N, D); part of the autograd graph only if nothing is frozen."""
        model, self.latest_tokens = self.model, len(batch.ids)
        blocks = model.h[: model.num_frozen]
        if model.num_frozen and can_fuse(model, blocks, None, self.device, self.dtype):
            with torch.no_grad():
                x = (model.wte(batch.ids) + model.wpe(batch.positions)).to(self.dtype)
                return run_blocks(blocks, None, x, batch.documents)
        return model.trunk(batch.ids, batch.positions, batch.documents).to(self.dtype)

    def start_step(self, step: int) -> None:
        """Use the noise of this optimizer step from now on."""
        self._origin[1].fill_(step)

    def documents(self, batch: Pack) -> Documents:
        """The documents of a pack, with the noise of dropout if it acts."""
        rate = self.model.config.dropout if self.model.training else 0.0
        if not rate:
            return batch.documents
        return replace(batch.documents, noise=Noise(rate, self._origin, batch.token_names()))

    def top(self, x: Tensor, batch: Pack) -> Tensor:
        """Final hidden states of the predicting tokens (M, D) from the trunk's outputs (N, D)."""
        self.latest_tokens = len(batch.ids)
        copies = {name: master.to(self.dtype) for name, master in self._masters.items()}
        # tie_weights=False: no copy is of a tied weight, and the search for one visits the whole model each time.
        inputs = (x, self.documents(batch), batch.predictors)
        return functional_call(self._top, copies, inputs, tie_weights=False)

    def forward_backward(self, x: Tensor, batch: Pack, loss: Loss, first: bool = False) -> Tensor:
        """Add the gradients of a batch to the parameters' ``grad``.

        Args:
            x: the trunk's outputs, (N, D).
            loss: from the hidden states of the predicting tokens (M, D) to the loss and its gradient (M, D).
            first: whether this is the first pass of an optimizer step. If so, gradients of the step before, which
                ``keeps_gradients`` left in place, are overwritten.

        Returns:
            The first result of ``loss``.
        """
        self.latest_tokens = len(batch.ids)
        if self._can_replay(x):
            return self._replay(x, batch, loss, first)
        hidden = self.top(x, batch)
        value, gradient = loss(hidden.detach())
        with deterministic():
            known_gradient(hidden, gradient).backward()
        return value

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients must stay allocated between steps, because graphs write to their memory."""
        return bool(self._graphs)

    def _can_replay(self, x: Tensor) -> bool:
        """Whether CUDA graphs can do the pass: it needs nothing from the host, and no gradient goes below the top."""
        model = self.model
        if x.requires_grad:
            return False
        return can_fuse(model, islice(model.h, model.num_frozen, None), model.ln_f, x.device, x.dtype)

    def _replay(self, x: Tensor, batch: Pack, loss: Loss, first: bool) -> Tensor:
        # The shapes of a graph follow from its pack alone. They decide how a matrix product rounds, and a resumed
        # training, whose first pack is another, must repeat the original bit for bit.
        size = _graph_size(x.size(0), self.graph_steps)
        predictors = -(-4 * len(batch.predictors) // size) * size // 4  # rounded up to a quarter of the size
        if self._buffers is None or size > len(self._buffers.x):
            self._allocate_buffers(size, x)
        assert self._buffers is not None
        noise = self.documents(batch).noise
        key = size, predictors, first
        if key not in self._graphs:
            for name, master in self._masters.items():
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                self._gradients[name] = master.grad
            self._graphs[key] = _Graph(self._top, self._masters, *key, self._buffers, noise)
        if any(self._masters[name].grad is not gradient for name, gradient in self._gradients.items()):
            raise RuntimeError(
                "gradients were replaced, and CUDA graphs write to those of before: keep them allocated"
            )
        return self._graphs[key].run(x, batch, noise, loss)

    def _allocate_buffers(self, size: int, x: Tensor) -> None:
        """Allocate buffers for graphs of up to 1.25 x ``size`` tokens, and drop the graphs that use smaller ones."""
        if self._buffers is not None:
            self._graphs.clear()
            self._buffers = None
            give_memory_back()
        self._buffers = _Buffers(int(1.25 * size), x)


class _Buffers:
    """Inputs of the graphs and the hidden states that they compute; a graph of any size uses the first elements.

    Args:
        tokens: capacity of the largest graph.
        example: outputs of the trunk, for their width, dtype and device.
    """

    def __init__(self, tokens: int, example: Tensor):
        self.x = example.new_zeros(tokens, example.size(1))
        self.chosen = torch.zeros(tokens, dtype=torch.long, device=example.device)
        self.tokens = torch.zeros(tokens, dtype=torch.long, device=example.device)
        # Zeros, so that the warm-up adds nothing to gradients accumulated so far.
        self.hidden, self.gradient = torch.zeros_like(self.x), torch.zeros_like(self.x)
        # Unused tokens after a pack are padding: documents of one token each, whose outputs are never read.
        self.bounds = torch.arange(tokens + 1, dtype=torch.int32, device=example.device)
        self.begins, self.ends = self.bounds[:-1].clone(), self.bounds[1:].clone()
        self.pool = torch.cuda.graph_pool_handle()
        self.warmed_up = False


class _Graph:
    """Forward and backward pass of the top as two CUDA graphs.

    The graphs cast all parameters, and write the gradients of a step's first pack, in a few kernels; autograd would
    launch three for each parameter.

    Args:
        top: of the model.
        masters: trained parameters of the top by name, each with a ``grad``.
        size: capacity; a pack must have fewer tokens, as the last one is always padding.
        predictors: capacity for predicting tokens.
        first: whether gradients are overwritten, or else added to.
        buffers: inputs and outputs.
        noise: of dropout, whose tokens are replaced by those in the buffers; None where no dropout acts.
    """

    def __init__(
        self,
        top: _Top,
        masters: Mapping[str, Tensor],
        size: int,
        predictors: int,
        first: bool,
        buffers: _Buffers,
        noise: Noise | None,
    ):
        self.size = size
        self.predictors = predictors
        self.buffers = buffers
        totals = [master.grad for master in masters.values() if master.grad is not None]

        def forward(size: int, predictors: int) -> tuple[list[Tensor], Tensor]:
            copies = [torch.empty_like(master, dtype=buffers.x.dtype) for master in masters.values()]
            with torch.no_grad():
                torch._foreach_copy_(copies, list(masters.values()))
            for copy in copies:
                copy.requires_grad_()
            parameters = dict(zip(masters, copies, strict=True))
            mine = None if noise is None else replace(noise, tokens=buffers.tokens[:size])
            documents = Documents([], buffers.begins[:size], buffers.ends[:size], mine)
            inputs = (buffers.x[:size], documents, buffers.chosen[:predictors])
            hidden = functional_call(top, parameters, inputs, tie_weights=False)
            buffers.hidden[:predictors].copy_(hidden.detach())
            return copies, hidden

        def backward(copies: list[Tensor], hidden: Tensor) -> None:
            gradients = torch.autograd.grad(known_gradient(hidden, buffers.gradient[: len(hidden)]), copies)
            if first:
                torch._foreach_copy_(totals, gradients)
            else:
                for total, gradient in zip(totals, gradients, strict=True):
                    total.add_(gradient)

        if not buffers.warmed_up:  # before a capture, libraries must be initialised and kernels compiled
            with deterministic():
                backward(*forward(min(size, _WARM_UP_TOKENS), min(predictors, _WARM_UP_TOKENS)))
            buffers.warmed_up = True
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with on_capture_stream(buffers.x.device), deterministic():
            with capturing(self.forward, buffers.pool):
                copies, hidden = forward(size, predictors)
            with capturing(self.backward, buffers.pool):
                backward(copies, hidden)

    def run(self, x: Tensor, batch: Pack, noise: Noise | None, loss: Loss) -> Tensor:
        """As ``Engine.forward_backward``, with the noise of the pack."""
        buffers, tokens, predictors = self.buffers, x.size(0), len(batch.predictors)
        assert tokens < self.size  # the last token is padding
        buffers.x[:tokens].copy_(x)
        if noise is not None:
            buffers.tokens[:tokens].copy_(noise.tokens)
        for buffer, given, padding in (
            (buffers.begins, batch.documents.begins, buffers.bounds[:-1]),
            (buffers.ends, batch.documents.ends, buffers.bounds[1:]),
        ):
            buffer[:tokens].copy_(given)
            buffer[tokens : self.size].copy_(padding[tokens : self.size])
        buffers.chosen[:predictors].copy_(batch.predictors)
        buffers.chosen[predictors : self.predictors].fill_(self.size - 1)  # padding: receives no gradient
        self.forward.replay()
        value, gradient = loss(buffers.hidden[:predictors])
        buffers.gradient[:predictors].copy_(gradient)
        buffers.gradient[predictors : self.predictors].zero_()
        self.backward.replay()
        return value


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gradient)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient, None


def known_gradient(hidden: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose backward pass begins with this gradient with respect to ``hidden``, bit for bit.

    torch.autograd takes a gradient too, but to check its shape it imports sympy and more (seen in torch 2.11 and
    2.13), which takes 1 to 4 s.
    """
    return _KnownGradient.apply(hidden, gradient)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Capture the body; torch.cuda.graph would wait for the device and empty the allocator's cache at every graph.

    Args:
        pool: of memory, as ``torch.cuda.graph_pool_handle`` gives it.
    """
    graph.capture_begin(pool, "relaxed")
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # the body's error is the one to raise: most often memory ran out
            graph.capture_end()  # else the capture would go on with everything queued on the stream later
        raise
    graph.capture_end()


@contextmanager
def deterministic() -> Iterator[None]:
    """Use backward kernels that sum in a fixed order: a resumed training then repeats the original bit for bit."""
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms would import torch._inductor
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
