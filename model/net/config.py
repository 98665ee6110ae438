"""The shape of a GPT-2 (presets by size, Hugging Face's config.json in both directions), and what of it trains."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.files import parse_json, read_bytes, shown
from model.parameters import Parameters, WholeNumber

# What to do with quantised weights.
DEQUANTISE = (
    "load them with transformers, call dequantize(), and save them by save_pretrained() in float16 or float32"
)

# Settings of transformers' GPT2Config that change the computation, with the only values GPTModel implements.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False, True),  # affects rounding only
    "add_cross_attention": (False,),
}
# Far beyond any GPT-2: a damaged number must not make torch build blocks for hours.
_LARGEST = {
    "vocab_size": 10**7,
    "n_positions": 10**7,
    "n_ctx": 10**7,
    "n_embd": 10**5,
    "n_layer": 1000,
    "n_head": 10**5,
}


@dataclass(frozen=True)
class GPTConfig:
    """Hyper-parameters of the architecture, under the names of Hugging Face's config.json.

    Attributes:
        vocab_size: V, entries of the token embedding.
        n_positions: C, the longest context in tokens.
        n_embd: D, width of the residual stream.
        n_layer: number of Transformer blocks.
        n_head: H, attention heads; divides n_embd.
        layer_norm_epsilon: added to the variance in every layer norm.
        dropout: dropout rate after attention, attention projection and MLP, in training blocks only.
        tie_word_embeddings: whether the head shares the token embedding's Parameter.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")

    @classmethod
    def preset(cls, model_size: str) -> GPTConfig:
        """The configuration of a named size: tiny, 124m, 355m, 774m or 1558m, in any case."""
        return PRESETS[normalize_size(model_size)]

    @classmethod
    def from_json(cls, path: Path, sha256: str | None = None) -> GPTConfig:
        """Read Hugging Face's config.json. Its dropout rates are ignored: fine-tuning sets its own.

        Args:
            sha256: what the file's hash has to be; None for any.

        Raises:
            FileNotFoundError: there is no such file.
            ChangedFileError: it has another hash.
            ValueError: the file is not a GPT-2 that GPTModel can represent; the message names the setting.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: weights need Hugging Face's GPT-2 layout")
        raw = parse_json(read_bytes(path, sha256), path)
        if not isinstance(raw, dict):
            raise ValueError(f"{path} is not a JSON object with a model's settings")
        _check_settings(raw, path)
        context: int = raw.get("n_ctx", 1024)  # the older name of n_positions
        try:
            return cls(
                vocab_size=raw["vocab_size"],
                n_positions=raw.get("n_positions", context),
                n_embd=raw["n_embd"],
                n_layer=raw["n_layer"],
                n_head=raw["n_head"],
                layer_norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
                tie_word_embeddings=raw.get("tie_word_embeddings", True),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_json(self, eos_token_id: int | None = None) -> dict[str, Any]:
        """Hugging Face's config.json for this shape, readable by transformers' GPT2LMHeadModel."""
        raw = asdict(self)
        dropout = raw.pop("dropout")
        raw.update(
            model_type="gpt2",
            architectures=["GPT2LMHeadModel"],
            activation_function="gelu_new",
            n_ctx=self.n_positions,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            embd_pdrop=0.0,
        )
        if eos_token_id is not None:
            raw.update(bos_token_id=eos_token_id, eos_token_id=eos_token_id)
        return raw


def _check_settings(raw: dict[str, Any], path: Path) -> None:
    """Raise ValueError, naming file and setting, for what GPTModel cannot represent."""
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"{path} describes a {shown(raw['model_type'])}, not a gpt2")
    if raw.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config says that the weights are quantised: {DEQUANTISE}")
    for name, values in _SUPPORTED.items():
        if name in raw and raw[name] not in values:
            raise ValueError(f"{path}: {name} = {shown(raw[name])} is not supported, only {values}")
    missing = [name for name in ("vocab_size", "n_embd", "n_layer", "n_head") if name not in raw]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for name, largest in _LARGEST.items():
        if name in raw and (type(raw[name]) is not int or raw[name] < 1):
            raise ValueError(f"{path}: {name} = {shown(raw[name])} is not a positive integer")
        if raw.get(name, 1) > largest:
            raise ValueError(f"{path}: {name} = {shown(raw[name])} is more than {largest}")
    if raw.get("n_inner") not in (None, 4 * raw["n_embd"]):
        raise ValueError(f"{path}: n_inner = {shown(raw['n_inner'])} is not supported, only 4 * n_embd")
    epsilon = raw.get("layer_norm_epsilon", 1e-5)
    if type(epsilon) not in (int, float) or not math.isfinite(epsilon) or not 0 < epsilon < 1:
        raise ValueError(f"{path}: layer_norm_epsilon = {shown(epsilon)} is not a number between 0 and 1")
    if type(raw.get("tie_word_embeddings", True)) is not bool:
        raise ValueError(
            f"{path}: tie_word_embeddings = {shown(raw['tie_word_embeddings'])} is neither true nor false"
        )


# Radford et al. 2019, table 2. "tiny" is this project's own, small enough to train on two CPU cores.
PRESETS: dict[str, GPTConfig] = {
    "tiny": GPTConfig(n_layer=6, n_head=6, n_embd=192, n_positions=512, vocab_size=4096),
    "124m": GPTConfig(n_layer=12, n_head=12, n_embd=768),
    "355m": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "774m": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1558m": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}


# Names of the hub, and sizes without their letter, which YAML reads as numbers.
_OTHER_NAMES = {"gpt2": "124m", "gpt2-medium": "355m", "gpt2-large": "774m", "gpt2-xl": "1558m"}
_OTHER_NAMES |= {name.removesuffix("m"): name for name in _OTHER_NAMES.values()}


def normalize_size(model_size: str | int) -> str:
    """Return the preset's name for a size in any spelling ("124M", 124 and "gpt2" are "124m").

    Raises:
        ValueError: the size is not a preset; the message lists the presets.
    """
    name = str(model_size).strip().lower()
    name = _OTHER_NAMES.get(name, name)
    if name not in PRESETS:
        raise ValueError(f"model_size {model_size!r} is unknown: choose one of {', '.join(PRESETS)}")
    return name


@dataclass(frozen=True)
class FreezeConfig(Parameters):
    """Which parameters train."""

    freeze_layers: bool = True
    """Freeze all but the top blocks and the final norm."""
    num_unfrozen_layers: WholeNumber = 4
    """Blocks that train, counted from the top; 0 trains the final norm alone."""
    train_head: bool = False
    """Also train an untied copy of the output head; with freeze_layers=false the tied head trains anyway."""

    def check(self, blocks: int, model: str = "the model") -> None:
        """Refuse more blocks than a model has; without freeze_layers the number is ignored.

        Raises:
            ValueError: num_unfrozen_layers is not between 0 and ``blocks``.
        """
        if self.freeze_layers and not 0 <= self.num_unfrozen_layers <= blocks:
            raise ValueError(
                f"num_unfrozen_layers {self.num_unfrozen_layers} is not between 0 and {blocks}, the blocks of {model}"
            )
