"""Reading and writing GPT-2 weights in Hugging Face's layout, with every key and shape checked."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.files import save_tensors
from model.net.config import GPTConfig
from model.net.freezing import freeze_bottom_layers
from model.net.gpt import GPTModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREFIX = "transformer."

# Hugging Face keeps these as Conv1D, (in, out); nn.Linear is (out, in).
_CONV1D = re.compile(r"(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight$")
# Causal-mask buffers, stored by transformers before 4.28.
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")
# "def hello():\n    return 'world'" in GPT-2's 50,257-entry vocabulary.
_GOLDEN_TEXT = "def hello():\n    return 'world'"
_GOLDEN_IDS = [4299, 23748, 33529, 198, 220, 220, 220, 1441, 705, 6894, 6]


def is_conv1d(name: str) -> bool:
    """Whether Hugging Face stores this parameter transposed."""
    return _CONV1D.search(name) is not None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: the single one, or the shards its index names.

    Raises:
        FileNotFoundError: no safetensors weights, or a shard is missing; pickled weights (.bin, .pt) are never read.
        ValueError: the index is damaged, or names a file outside its directory.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if (directory / INDEX_FILE).is_file():
        try:
            names = sorted(set(json.loads((directory / INDEX_FILE).read_text())["weight_map"].values()))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{directory / INDEX_FILE} is damaged: {error!r}") from error
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{directory / INDEX_FILE} names a file outside its directory: {name!r}")
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory / INDEX_FILE} names {name}, which does not exist")
        return [directory / name for name in names]
    raise FileNotFoundError(
        f"{directory} holds no {WEIGHTS_FILE}: weights are read from safetensors only; "
        "transformers' save_pretrained writes it"
    )


def match_keys(config: GPTConfig, shapes: dict[str, tuple[int, ...]], source: Path) -> dict[str, str]:
    """Map each parameter of the model to its key in the file.

    Args:
        config: the model's shape.
        shapes: key -> shape of every tensor in the file.
        source: named in errors.

    Raises:
        ValueError: a key is missing or unknown, or a shape differs; the message names the first ten.
    """
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in GPTModel(config).named_parameters()}
    by_name = {key.removeprefix(PREFIX): key for key in shapes}
    faults = []
    if len(by_name) < len(shapes):
        faults.append("some keys occur both with and without the 'transformer.' prefix")
    for name, shape in expected.items():
        stored = shape[::-1] if is_conv1d(name) else shape
        if name not in by_name:
            faults.append(f"{name} is missing")
        elif shapes[by_name[name]] != stored:
            faults.append(f"{name} has shape {list(shapes[by_name[name]])}, expected {list(stored)}")
    allowed = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in sorted(by_name.keys() - expected.keys() - allowed):
        if not _BUFFERS.match(name):
            faults.append(f"{name} is not a parameter of this model")
    if faults:
        shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        raise ValueError(f"{source} does not fit its {CONFIG_FILE}: {shown}")
    return {name: by_name[name] for name in expected}


def check_pretrained(directory: Path) -> GPTConfig:
    """Check a directory's config, keys and shapes from the files' headers, without reading the weights.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ValueError: they do not fit each other, or a file is damaged.
    """
    config = GPTConfig.from_json(directory / CONFIG_FILE)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as reader:
                shapes.update({key: tuple(reader.get_slice(key).get_shape()) for key in reader.keys()})
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    match_keys(config, shapes, directory)
    return config


def read_pretrained(directory: Path, device: torch.device, dtype: torch.dtype) -> GPTModel:
    """Build a GPTModel from a directory in Hugging Face's GPT-2 layout.

    Keys with and without the ``transformer.`` prefix are read, mask buffers of old checkpoints ignored. A
    tied head stays the embedding's own Parameter (LLMs-from-scratch#822: a copy drifts).

    Raises:
        FileNotFoundError, ValueError: as check_pretrained.
        ValueError: the config ties the head, but the stored head differs from the token embedding.
    """
    config = check_pretrained(directory)
    with torch.device("meta"):
        model = GPTModel(config)
    with ExitStack() as stack:
        readers = [
            stack.enter_context(safe_open(path, framework="pt", device=str(device)))
            for path in weight_files(directory)
        ]
        tensors: dict[str, Any] = {key: reader for reader in readers for key in reader.keys()}
        keys = {key.removeprefix(PREFIX): key for key in tensors}
        state: dict[str, Tensor] = {}
        for name, _ in model.named_parameters():
            tensor = tensors[keys[name]].get_tensor(keys[name])
            # A clone, not a view: the file may be replaced while the model lives.
            state[name] = (
                (tensor.t() if is_conv1d(name) else tensor).to(dtype).clone(memory_format=torch.contiguous_format)
            )
        if config.tie_word_embeddings:
            if "lm_head.weight" in keys:
                head = tensors[keys["lm_head.weight"]].get_tensor(keys["lm_head.weight"])
                if head.shape != state["wte.weight"].shape or not torch.equal(head.to(dtype), state["wte.weight"]):
                    raise ValueError(
                        f"{directory}: lm_head.weight differs from wte.weight, but {CONFIG_FILE} ties them; "
                        "set tie_word_embeddings to false there"
                    )
            state["lm_head.weight"] = state["wte.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.wte.weight
    return model.eval()


def hf_state_dict(model: GPTModel) -> dict[str, Tensor]:
    """The model's parameters under Hugging Face's keys and orientation, a tied head left out."""
    state = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        key = name if name.startswith("lm_head") else PREFIX + name
        state[key] = (tensor.t() if is_conv1d(name) else tensor).contiguous().cpu()
    return state


def write_pretrained(model: GPTModel, directory: Path, eos_token_id: int | None = None) -> None:
    """Write config.json and model.safetensors as transformers' GPT2LMHeadModel reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config.to_json(eos_token_id)
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(hf_state_dict(model), directory / WEIGHTS_FILE, metadata={"format": "pt"})


def load_tokenizer(directory: str | Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """Load a GPT-2 tokenizer, pad = eos, and check that it encodes a known text correctly.

    Loaded by AutoTokenizer, because in transformers 5 ``GPT2TokenizerFast(vocab_file=..., merges_file=...)``
    silently returns a tokenizer with a single token.

    Args:
        directory: holds tokenizer.json, or vocab.json and merges.txt beside a config.json.
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: no tokenizer there, no end-of-text token, more entries than the embedding has rows, or an
            encoding that is not GPT-2's.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{directory} holds no readable tokenizer ({error}): name one in tokenizer_dir") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {directory} has no eos_token")
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} entries, the model's embedding {vocab_size} rows"
        )
    ids = tokenizer.encode(_GOLDEN_TEXT, add_special_tokens=False)
    golden = len(tokenizer) != GPTConfig().vocab_size or ids == _GOLDEN_IDS
    if not golden or tokenizer.decode(ids) != _GOLDEN_TEXT:
        raise ValueError(
            f"the tokenizer in {directory} encodes {_GOLDEN_TEXT!r} as {ids}: its files do not fit, "
            "or some are missing; name another directory in tokenizer_dir"
        )
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(1e9)  # no warning: rows are cut at max_length, and counted, elsewhere
    return tokenizer


def check_size(config: GPTConfig, model_size: str, source: Path) -> None:
    """Check that weights have the shape of a named size (vocabulary and context may differ).

    Raises:
        ValueError: they have another shape; the message has both.
    """
    preset = GPTConfig.preset(model_size)
    found = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}
    wanted = {name: getattr(preset, name) for name in found}
    if found != wanted:
        raise ValueError(f"{source} holds a model of shape {found}, but model_size {model_size} means {wanted}")


def load_gpt_model(
    model_size: str,
    weights_dir: str | Path,
    freeze_layers: bool = True,
    num_unfrozen_layers: int = 4,
    train_head: bool = False,
    tokenizer_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> tuple[GPTModel, PreTrainedTokenizerBase]:
    """Load a GPT-2 of a named size with its tokenizer, frozen for fine-tuning.

    Args:
        model_size: tiny, 124m, 355m, 774m or 1558m; the weights must have that shape.
        weights_dir: a directory in Hugging Face's layout.
        freeze_layers: whether to freeze all but the top blocks and the final norm; else everything trains.
        num_unfrozen_layers: number of blocks left trainable.
        train_head: whether to train an untied copy of the head too.
        tokenizer_dir: directory of the tokenizer, if not weights_dir.
        device: device of the parameters, which are fp32.

    Raises:
        FileNotFoundError, ValueError: as read_pretrained, check_size, load_tokenizer, freeze_bottom_layers.
    """
    directory = Path(weights_dir)
    check_size(GPTConfig.from_json(directory / CONFIG_FILE), model_size, directory)
    model = GPTModel.from_pretrained(directory, device)
    tokenizer = load_tokenizer(tokenizer_dir or directory, model.config.vocab_size)
    if freeze_layers:
        freeze_bottom_layers(model, num_unfrozen_layers, train_head)
    return model, tokenizer
