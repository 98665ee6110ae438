"""The rows that are being generated, as tensors on the device: a slot for each row of the batch.

Nothing here waits for the device but ``look`` and ``tokens``, so that a CUDA graph can hold a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.generation.drawing import Sampler
from model.generation.streams import uniforms

BROKEN = (
    "the model's logits are not finite, so that no token can be drawn: its weights have NaN or infinite values, or "
    "its precision is too low (use fp32 or bf16 in place of fp16)"
)


@dataclass(eq=False)
class Row:
    """A text that is continued.

    Attributes:
        prompt: ids, at least one.
        key: of its random stream.
        head: number of its first ids that stay where the text is cropped to the context.
        limit: new tokens that the cache has room for.
        new: ids generated so far.
    """

    prompt: list[int]
    key: tuple[int, int, int]
    head: int
    limit: int
    new: list[int] = field(default_factory=list)

    @property
    def need(self) -> int:
        """Tokens of the cache that it needs at most: the last new token is never fed back."""
        return len(self.prompt) + self.limit - 1


class Slots:
    """State of all slots.

    Args:
        count: B, number of slots.
        steps: most new tokens of a row.
        eos_token_id: ends a row; None for no such id.
        seed: of the random streams.
        on_token: called with each new token of the row in the only slot; on a CPU.

    Attributes:
        ids: last token of each slot, (B,).
        alive: whether the slot's row is still being continued, (B,).
        counts: new tokens so far, (B,).
        broken: whether a logit of a living row was NaN or infinite, (B,).
    """

    def __init__(
        self,
        count: int,
        steps: int,
        sampler: Sampler,
        vocab_size: int,
        eos_token_id: int | None,
        seed: int,
        device: torch.device,
        on_token: Callable[[int], None] | None = None,
    ):
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.sampler, self.seed, self.device = sampler, seed, device
        self.on_token = on_token
        self.steps = steps
        self.eos = -1 if eos_token_id is None else eos_token_id
        self.numbers = torch.arange(count, device=device)
        self.ids, self.counts, self.limits, self.prompts = (zeros(count) for _ in range(4))
        self.alive, self.broken = (zeros(count, dtype=torch.bool) for _ in range(2))
        self.out = zeros(count, steps + 1)  # behind its tokens, an ended row has one without a meaning
        self.uniforms = zeros(count, steps, dtype=torch.float32)
        self.seen = zeros(count, vocab_size, dtype=torch.bool) if sampler.penalty != 1 else None

    def lengths(self, size: int) -> Tensor:
        """Tokens in the cache of the first ``size`` slots, (size,); -1 where the row has ended."""
        return torch.where(self.alive[:size], self.prompts[:size] + self.counts[:size] - 1, -1)

    def put(self, slots: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """Let rows begin in slots. Returns the slots as a tensor."""
        index = torch.tensor(slots, device=self.device)
        self.prompts[index] = torch.tensor([len(row.prompt) for row in rows], device=self.device)
        self.limits[index] = torch.tensor([row.limit for row in rows], device=self.device)
        self.counts[index] = 0
        self.alive[index] = True
        if not self.sampler.greedy:
            keys = torch.tensor([row.key for row in rows], device=self.device)
            self.uniforms[index] = uniforms(keys, self.seed, 0, self.steps)
        if self.seen is not None:
            self.seen[index] = seen_tokens([row.prompt for row in rows], self.seen.size(1), self.device)
        return index

    def advance(self, logits: Tensor, chosen: slice | Tensor) -> None:
        """Draw the next token of the chosen slots from their logits (b, W), and end the rows that it ends."""
        numbers, counts, alive = self.numbers[chosen], self.counts[chosen], self.alive[chosen]
        self.broken[chosen] |= alive & ~has_finite_logits(logits)
        drawn = self.uniforms[numbers, counts.clamp(max=self.steps - 1)]
        new = self.sampler(logits, drawn, None if self.seen is None else self.seen[chosen])
        self.ids[chosen] = new
        self.out[numbers, counts] = new
        if self.on_token is not None and alive[0]:
            self.on_token(int(new[0]))
        if self.seen is not None:
            self.seen.view(-1).index_fill_(0, numbers * self.seen.size(1) + new, True)
        counts = counts + alive
        self.counts[chosen] = counts
        self.alive[chosen] = alive & (new != self.eos) & (counts < self.limits[chosen])

    def look(self, size: int) -> tuple[list[bool], list[int]]:
        """Whether each of the first ``size`` rows goes on, and its new tokens so far. Waits for the device.

        Raises:
            ArithmeticError: the model gave logits that are not finite.
        """
        found = torch.stack([self.alive[:size].long(), self.counts[:size], self.broken[:size].long()])
        alive, counts, broken = found.tolist()
        if any(broken):
            raise ArithmeticError(BROKEN)
        return [bool(each) for each in alive], counts

    def tokens(self, slots: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """The new tokens of slots, by their number. Waits for the device."""
        found = self.out[torch.tensor(slots, device=self.device), : max(counts)].tolist()
        return [ids[:count] for ids, count in zip(found, counts, strict=True)]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Continue the rows of some slots in others, whose rows have ended."""
        for each in (
            self.ids, self.counts, self.limits, self.prompts, self.alive, self.broken, self.out, self.uniforms,
            self.seen,
        ):  # fmt: skip
            if each is not None:
                each[targets] = each[sources]
        self.alive[sources] = False


def has_finite_logits(logits: Tensor) -> Tensor:
    """Whether the largest of each row's logits (B, W) is finite, (B,): NaN counts as larger than any number."""
    return logits.amax(-1).isfinite()


def seen_tokens(texts: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> Tensor:
    """Which tokens each text has, (B, V), bool."""
    seen = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
    for row, text in enumerate(texts):
        seen[row, torch.tensor(text)] = True
    return seen.to(device)
