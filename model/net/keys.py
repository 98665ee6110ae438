"""The keys of a weight file, matched with the parameters of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.files import shown, shown_bare
from model.net.config import DEQUANTISE, GPTConfig
from model.net.empty import empty_models
from model.net.gpt import GPTModel
from model.net.layout import CONFIG_FILE
from model.net.tensor_file import FLOATS, Entry

PREFIX = "transformer."
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"

# Hugging Face keeps these as Conv1D, (in, out); nn.Linear is (out, in).
_CONV1D = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
# Causal-mask buffers, stored by transformers before 4.28.
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")
# What torch.compile, DataParallel and FSDP insert into the names of parameters.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ADAPTERS = re.compile(r"^base_model\.model\.|lora_|ia3_|\.base_layer\.|adapter|prompt_embeddings")
# Scales and codes that bitsandbytes, GPTQ, AWQ and fp8 formats keep beside their weights.
_QUANTISED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB|weight_format|qweight|qzeros|scales|g_idx|"
    r"weight_packed|weight_scale|weight_scale_inv|weight_zero_point|input_scale|_packed_params.*)$"
)
_QUANTISED_DTYPES = ("I8", "U8", "I4", "U4", "F8_", "F6_", "F4")


def is_conv1d(name: str) -> bool:
    """Whether Hugging Face stores this parameter transposed."""
    return _CONV1D.search(name) is not None


@dataclass(frozen=True)
class Match:
    """The result of a match.

    Attributes:
        keys: name of each parameter -> its key in the files. A tied head may be among them.
        note: what was done to the keys to make them fit, for the log; None if nothing was.
    """

    keys: dict[str, str]
    note: str | None


def match_keys(config: GPTConfig, entries: Mapping[str, Entry], source: Path) -> Match:
    """Find the key of each parameter.

    Keys may have the prefix ``transformer.``, and any one other in front that all keys share. A tied head may be
    stored beside the embedding or, as safetensors' save_model does, in place of it.

    Args:
        config: the model's shape.
        entries: key -> dtype and shape of every tensor in the files.
        source: named in errors.

    Raises:
        ValueError: a key is missing or unknown, or a shape or dtype differs; the message names the first ten, and
            some keys of the files. Adapters and quantised weights are named as such.
    """
    _refuse_others(entries, source)
    names = _plain_names(entries)
    by_name = {name: key for key, name in names.items()}
    with empty_models():
        expected = {name: tuple(p.shape) for name, p in GPTModel(config).named_parameters()}
    faults = []
    if len(by_name) < len(names):
        twice = next(key for key, name in names.items() if by_name[name] != key)
        faults.append(
            f"some keys occur both with and without the '{PREFIX}' prefix or another ({shown(twice)} and "
            f"{shown(by_name[names[twice]])})"
        )
    tied = config.tie_word_embeddings
    if tied and EMBEDDING not in by_name and HEAD in by_name:
        by_name[EMBEDDING] = by_name.pop(HEAD)
    for name, shape in expected.items():
        stored = shape[::-1] if is_conv1d(name) else shape
        entry = entries[by_name[name]] if name in by_name else None
        if entry is None:
            faults.append(f"{name} is missing")
        elif entry.shape != stored:
            faults.append(f"{name} has shape {shown(list(entry.shape))}, expected {list(stored)}")
        elif entry.dtype not in FLOATS:
            faults.append(f"{name} has dtype {shown_bare(entry.dtype)}, expected one of {', '.join(FLOATS)}")
    allowed = {HEAD} if tied else set()
    for name in sorted(by_name.keys() - expected.keys() - allowed):
        if not _BUFFERS.match(name):
            faults.append(f"{shown_bare(name)} is not a parameter of this model")
    if faults:
        first = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise ValueError(f"{source} does not fit its {CONFIG_FILE}: {first}. {_some(entries)}")
    wanted = expected.keys() | (allowed & by_name.keys())
    return Match({name: by_name[name] for name in by_name if name in wanted}, _note(names))


def _refuse_others(entries: Mapping[str, Entry], source: Path) -> None:
    """Raise ValueError for an adapter and for quantised weights."""
    if adapter := next((key for key in entries if _ADAPTERS.search(key)), None):
        raise ValueError(
            f"{source} holds an adapter (it has the key {shown(adapter)}), which is not a whole model: merge it into "
            "its base with peft's merge_and_unload(), and save the result with save_pretrained()"
        )
    scale = next((f"the key {shown(key)}" for key in entries if _QUANTISED.search(key)), None)
    small = (
        f"{shown(key)} of dtype {shown_bare(entry.dtype)}"
        for key, entry in entries.items()
        if entry.dtype.startswith(_QUANTISED_DTYPES) and not re.search(r"\.attn\.(bias|masked_bias)$", key)
    )
    if quantised := scale or next(small, None):
        raise ValueError(f"{source} holds quantised weights ({quantised}): {DEQUANTISE}")


def _plain_names(keys: Iterable[str]) -> dict[str, str]:
    """key -> name without what wrappers inserted, and without the prefixes that all keys share."""
    bare = {key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in keys}
    positions = "wpe.weight"  # each model has exactly one
    prefixes = {name.removesuffix(positions) for name in bare.values() if f".{name}".endswith(f".{positions}")}
    inner = prefixes.pop() if len(prefixes) == 1 else ""
    outer = inner.removesuffix(PREFIX)  # where the head is
    return {key: name.removeprefix(inner).removeprefix(outer).removeprefix(PREFIX) for key, name in bare.items()}


def _note(names: Mapping[str, str]) -> str | None:
    changed = [(key, name) for key, name in names.items() if key.removeprefix(PREFIX) != name]
    if not changed:
        return None
    key, name = changed[0]
    example = f"{shown(key)}, read as {shown(name)}"
    return f"{len(changed)} of {len(names)} keys have more in front than a GPT-2's, such as {example}"


def _some(entries: Mapping[str, Entry]) -> str:
    if not entries:
        return "Its files have no key at all"
    some = ", ".join(shown(key) for key in sorted(entries)[:4])
    return f"Its files have {len(entries)} keys, such as {some}"
