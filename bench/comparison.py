"""Measurements as records, their comparison with the engine, and the table of both."""

from __future__ import annotations

from typing import Any

from bench.measure import LATER_EPOCHS, Job, Measurement, Setting
from bench.report import align
from model.engine.flops import necessary_flops


def record(setting: Setting, measurement: Measurement, memory: int, job: Job, ceiling: float) -> dict[str, Any]:
    """A measurement as JSON.

    Necessary operations include the trunk's, unless its outputs were kept from an earlier epoch. They include a row's
    last token too, although it is only predicted; that is less than 1 % of the tokens.
    """
    tokens = sum(window.tokens for window in measurement.windows)
    targets = sum(window.targets for window in measurement.windows)
    trunk_tokens = 0 if measurement.phase == LATER_EPOCHS else tokens
    frozen = job.config.n_layer - job.num_unfrozen_layers
    flops_per_token = necessary_flops(job.config, frozen, tokens, targets, trunk_tokens) / tokens
    speed = measurement.tokens_per_second
    return {
        "contestant": setting.contestant,
        "phase": measurement.phase,
        "settings": setting.text,
        "precision": measurement.precision,
        "dropout": measurement.dropout,
        "useful_tokens_per_second": speed,
        "windows": [
            {"seconds": w.seconds, "tokens": w.tokens, "target_tokens": w.targets} for w in measurement.windows
        ],
        "target_share": measurement.target_share,
        "necessary_flops_per_token": flops_per_token,
        "share_of_matmul_ceiling": flops_per_token * speed / ceiling,
        "peak_memory_bytes": memory,
        "seconds_to_first_step": measurement.seconds_to_first_step,
    }


def compare(results: list[dict[str, Any]]) -> None:
    """Add to each result how many times faster the engine is, and whether it is its contestant's fastest setting.

    The engine is its first setting, as it comes. ``engine_is_behind`` lists the phases in which it is slower.
    """
    finished = [result for result in results if "error" not in result]
    engine = {result["phase"]: result["useful_tokens_per_second"] for result in as_it_comes(results)}
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for result in finished:
        key = result["contestant"], result["phase"]
        if key not in best or result["useful_tokens_per_second"] > best[key]["useful_tokens_per_second"]:
            best[key] = result
        for phase, speed in engine.items():
            name = f"engine_{phase.replace(' ', '_')}_over_this"
            result[name] = speed / result["useful_tokens_per_second"]
        if result["contestant"] != "engine":
            speed = result["useful_tokens_per_second"]
            result["engine_is_behind"] = [phase for phase, own in engine.items() if own < speed]
    for result in results:
        result["best"] = any(result is chosen for chosen in best.values())


def as_it_comes(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The phases of the engine's first setting; none if it failed or was not run."""
    engine = [result for result in results if result["contestant"] == "engine"]
    return [r for r in engine if r["settings"] == engine[0]["settings"] and "error" not in r]


def table(results: list[dict[str, Any]]) -> str:
    """Results as aligned columns, what does not speak for the engine first.

    The lines that are faster than the engine come first, the fastest of them at the top; the others follow in the
    order in which they ran. A star marks each contestant's fastest setting. Below the table stand what failed or was
    not run, and what the engine is behind in.
    """
    head = [
        "contestant", "settings", "precision", "dropout", "useful tokens/s", "engine, 1st epoch / this",
        "engine, later / this", "of matmul ceiling", "peak GiB", "s to 1st step",
    ]  # fmt: skip
    finished = [result for result in results if "error" not in result]
    behind = [result for result in finished if result.get("engine_is_behind")]
    behind.sort(key=lambda result: result["useful_tokens_per_second"], reverse=True)
    others = [result for result in finished if not result.get("engine_is_behind")]
    failures = [
        f"{result['contestant']}, {result['settings'] or 'any setting'}: {result['error']}"
        for result in results
        if "error" in result
    ]
    lines = [head, *map(_line, behind), *map(_line, others)]
    return "\n".join([*align(lines, left=4), *failures, *_said_of_the_engine(results, len(behind))])


def _line(result: dict[str, Any]) -> list[str]:
    phase = "" if result["phase"] == "steady" else f", {result['phase']}"
    return [
        f"{result['contestant']}{phase}{' *' if result['best'] else ''}",
        result["settings"],
        result["precision"],
        result["dropout"],
        f"{result['useful_tokens_per_second']:,.0f}",
        _times(result.get("engine_first_epoch_over_this")),
        _times(result.get("engine_later_epochs_over_this")),
        f"{result['share_of_matmul_ceiling']:.1%}",
        f"{result['peak_memory_bytes'] / 2**30:.2f}",
        f"{result['seconds_to_first_step']:.1f}",
    ]


def _said_of_the_engine(results: list[dict[str, Any]], behind: int) -> list[str]:
    """Sentences: how many settings are faster than the engine as it comes, and which take less memory."""
    engine = as_it_comes(results)
    others = [result for result in results if result["contestant"] != "engine" and "error" not in result]
    if not engine or not others:
        return []
    memory = max(result["peak_memory_bytes"] for result in engine)
    less = [result for result in others if result["peak_memory_bytes"] < memory]
    less.sort(key=lambda result: result["peak_memory_bytes"])
    lines = f"the first {behind} lines" if behind > 1 else "the first line" if behind else "none"
    return [
        f"Faster than the engine in its first or later epochs: {lines}.",
        f"Less memory than the engine's {memory / 2**30:.2f} GiB: {f'{len(less)} settings' if less else 'none'}",
        *(f"- {r['peak_memory_bytes'] / 2**30:.2f} GiB: {r['contestant']}, {r['settings']}" for r in less),
    ]


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"
