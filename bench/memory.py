"""Speed against memory: the engine with several ``micro_batch_tokens`` and ``trunk_cache_gb``, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.engine import run_engine
from bench.measure import FIRST_EPOCH, Setting
from bench.report import align

AS_IT_COMES = "as it comes"


def memory_settings(micro_batches: Sequence[int], caches_gb: Sequence[float]) -> list[Setting]:
    """The engine as it comes, and with every combination of the values.

    Args:
        micro_batches: values of micro_batch_tokens, besides the engine's own choice.
        caches_gb: values of trunk_cache_gb, in units of 1e9 bytes; 0 keeps no outputs of the trunk.
    """
    settings = [Setting("engine", AS_IT_COMES, run_engine)]
    for gigabytes in caches_gb:
        for tokens in (None, *micro_batches):
            text = f"micro_batch_tokens {'null' if tokens is None else f'{tokens:,}'}, trunk_cache_gb {gigabytes:g}"
            options = {"micro_batch_tokens": tokens, "trunk_cache_bytes": int(gigabytes * 1e9)}
            settings.append(Setting("engine", text, run_engine, options))
    return settings


def memory_table(results: list[dict[str, Any]]) -> str:
    """One line for each setting, the least memory first: tokens/s of the first and of later epochs, and peak memory.

    Phases of a setting that do not tell its epochs apart fill both columns. What failed stands below the table.
    """
    phases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        if "error" not in result:
            phases.setdefault((result["contestant"], result["settings"]), []).append(result)
    lines = [["contestant", "settings", "1st epoch, useful tokens/s", "later epochs", "peak GiB"]]
    for (contestant, settings), found in sorted(phases.items(), key=lambda item: item[1][0]["peak_memory_bytes"]):
        first = next((r for r in found if r["phase"] == FIRST_EPOCH), found[0])
        memory = max(result["peak_memory_bytes"] for result in found)
        speeds = [f"{r['useful_tokens_per_second']:,.0f}" for r in (first, found[-1])]
        lines.append([contestant, settings, *speeds, f"{memory / 2**30:.2f}"])
    failures = [f"{r['contestant']}, {r['settings'] or 'any setting'}: {r['error']}" for r in results if "error" in r]
    return "\n".join([*align(lines, left=2), *failures])
