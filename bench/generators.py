"""The contestants of ``bench.generate``, each with its settings."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from bench.measure import DTYPES, now, read_clock
from model.net.config import PRESETS, GPTConfig
from model.net.device import autocast, resolve_device, use_precision

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel


@dataclass(frozen=True)
class GenerationJob:
    """What is generated.

    Attributes:
        prompts: their ids.
        repeats: calls that are measured.
        peer_seconds: after which transformers begins no other batch of a call.
        processor_time: measure the processor time of one thread instead of wall-clock time.
    """

    prompts: list[list[int]]
    model_size: str
    device: str
    precision: str
    new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    repeats: int
    peer_seconds: float
    processor_time: bool

    @property
    def config(self) -> GPTConfig:
        return PRESETS[self.model_size]


@dataclass(frozen=True)
class Speed:
    """Measured calls.

    Attributes:
        first: seconds of the first call, which loads and compiles.
        calls: seconds and new tokens of each call after it.
    """

    first: float
    calls: list[tuple[float, int]]

    @property
    def median(self) -> float:
        """New tokens per second."""
        return statistics.median(tokens / seconds for seconds, tokens in self.calls)


@dataclass(frozen=True)
class Setting:
    """One way to run a contestant; ``run`` is called with the job and ``options`` in a process of its own."""

    contestant: str
    text: str
    run: Callable[..., Speed]
    options: Mapping[str, Any] = field(default_factory=dict)


def settings_of(job: GenerationJob, batch_sizes: Sequence[int]) -> Iterator[Setting]:
    """All settings, this project's first."""
    yield Setting("generate", "as it comes", run_generate)
    if job.device != "cpu":
        yield Setting("transformers", "generate_batch (continuous batching)", run_continuous)
    for size in batch_sizes:
        yield Setting("transformers", f"dynamic cache, {size} rows", run_transformers, {"rows": size})
        if job.device != "cpu":
            options = {"rows": size, "static": True}
            yield Setting("transformers", f"static cache, compiled, {size} rows", run_transformers, options)


def run_generate(job: GenerationJob) -> Speed:
    """This project, as the evaluation calls it."""
    from model import GPTModel, generate

    device = resolve_device(job.device)
    dtype = use_precision(job.precision, device)
    torch.manual_seed(0)
    with torch.device(device):
        model = GPTModel(job.config).to(dtype)

    def call(seed: int) -> int:
        with autocast(device, dtype):
            rows = generate(
                model, job.prompts, job.new_tokens, None, job.temperature, job.top_k, job.top_p, seed
            )  # fmt: skip
        return sum(map(len, rows))

    return _measure(job, call)


def run_transformers(job: GenerationJob, rows: int, static: bool = False) -> Speed:
    """``generate`` over batches of prompts of similar length, padded on the left.

    Only full batches are measured, in an order drawn at random, as many as ``peer_seconds`` allow. With a static
    cache, the batch with the longest prompts runs first, so that its cache serves all and nothing is compiled again.
    """
    model: Any = _transformers_model(job)
    ordered = sorted(job.prompts, key=len, reverse=True)
    batches = [ordered[begin : begin + rows] for begin in range(0, len(ordered), rows)]
    full = [batch for batch in batches if len(batch) == rows] or batches
    options = {"cache_implementation": "static"} if static else {}

    def run(batch: list[list[int]]) -> int:
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device
        )
        done = model.generate(ids, attention_mask=mask, **_settings(job), **options)
        assert done.shape == (len(batch), width + job.new_tokens), done.shape
        return len(batch) * job.new_tokens

    def call(seed: int) -> int:
        if seed == 0:  # not measured: three times, since a graph is captured at the second call
            return sum(run(full[0]) for _ in range(3 if static else 1))
        begin, tokens = now(), 0
        for batch in random.Random(seed).sample(full, len(full)):
            tokens += run(batch)
            torch.cuda.synchronize() if job.device == "cuda" else None
            if now() - begin > job.peer_seconds:
                break
        return tokens

    return _measure(job, call)


def run_continuous(job: GenerationJob) -> Speed:
    """transformers' own continuous batching, with its default settings."""
    from transformers import GenerationConfig

    model: Any = _transformers_model(job)
    settings = GenerationConfig(**_settings(job))

    def call(seed: int) -> int:
        prompts = job.prompts[: max(1, len(job.prompts) // 8)] if seed == 0 else job.prompts
        found = model.generate_batch(prompts, generation_config=settings, progress_bar=False)
        tokens = sum(len(each.generated_tokens) for each in found.values())
        assert tokens == len(prompts) * job.new_tokens, tokens
        return tokens

    return _measure(replace(job, repeats=1), call)


def _transformers_model(job: GenerationJob) -> GPT2LMHeadModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    device, config = resolve_device(job.device), job.config
    use_precision(job.precision, device)
    torch.manual_seed(0)
    theirs: Any = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.n_positions,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
    )
    theirs._attn_implementation = "sdpa"
    model: Any = GPT2LMHeadModel(theirs)
    model.generation_config.eos_token_id = None
    return model.to(device, DTYPES[job.precision]).eval()  # type: ignore[no-any-return]


def _settings(job: GenerationJob) -> dict[str, Any]:
    settings = {"max_new_tokens": job.new_tokens, "pad_token_id": 0, "eos_token_id": None}
    if job.temperature == 0:
        return {**settings, "do_sample": False}
    filters = {"temperature": job.temperature, "top_k": job.top_k or 0, "top_p": job.top_p}
    return {**settings, "do_sample": True, **filters}


def _measure(job: GenerationJob, call: Callable[[int], int]) -> Speed:
    """Call with the seeds 0, 1, ... and take the time; the first call is not measured."""
    device, calls = resolve_device(job.device), []
    for seed in range(job.repeats + 1):
        begin = read_clock(device)
        tokens = call(seed)
        calls.append((read_clock(device) - begin, tokens))
    return Speed(calls[0][0], calls[1:])
