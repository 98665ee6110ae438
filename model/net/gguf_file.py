"""Writing a GPT-2 as a GGUF file, which llama.cpp and programs built on it read.

Names of tensors, metadata and types of tokens are those of llama.cpp's own convert_hf_to_gguf.py for GPT2LMHeadModel.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from model.files import naming_a_full_disk
from model.net.gpt import GPTModel
from model.net.keys import HEAD, PREFIX
from model.net.loading import read_pretrained
from model.net.prompt import CHAT_TEMPLATE
from model.net.tokenizer import load_tokenizer, tokenizer_hashes, unknown_ids

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedTokenizerBase

Array = np.ndarray[Any, Any]
GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
GGUF_TYPES: tuple[str, ...] = get_args(GGUFType)
_INSTALL = "writing GGUF needs the package gguf: install it with `pip install -c constraints.txt -e '.[gguf]'`"
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # what llama.cpp calls gpt-2


def write_gguf(
    directory: Path, file: Path, dtype: GGUFType = "f32", name: str = "", files: Mapping[str, str] | None = None
) -> None:
    """Write a directory in Hugging Face's GPT-2 layout as one GGUF file; it is whole or absent.

    Args:
        directory: with weights and tokenizer.
        file: is replaced if it exists.
        dtype: of the matrices; vectors and the position embedding are always f32, as llama.cpp wants them.
        name: of the model, for its metadata.
        files: file name -> sha256 that the directory's files must have; None for any.

    Raises:
        ModuleNotFoundError: the library gguf is not installed.
        FileExistsError: ``file`` is a directory, a device or the like, which is not replaced.
        FileNotFoundError, ValueError: as read_pretrained and load_tokenizer; the embedding has rows without a token;
            llama.cpp has no such tokenizer; a weight is too large for f16.
        DiskFullError: the disk is full.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_INSTALL) from error
    if file.exists() and not file.is_file():  # a rename would put the model in the place of /dev/null
        raise FileExistsError(f"{file} exists and is no plain file: name another file for the GGUF")

    model = read_pretrained(directory, torch.device("cpu"), torch.float32, files)
    hashes = None if files is None else tokenizer_hashes(files)
    tokenizer = load_tokenizer(directory, model.config.vocab_size, hashes)
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(scratch, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    try:
        with naming_a_full_disk(file):
            _add_shape(writer, model, dtype, name)
            _add_tokenizer(writer, tokenizer, model.config.vocab_size, directory)
            _write_tensors(writer, model, dtype)
            writer.close()
            scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


def _add_shape(writer: GGUFWriter, model: GPTModel, dtype: GGUFType, name: str) -> None:
    import gguf

    config = model.config
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type(gguf.GGUFType.MODEL)
    if name:
        writer.add_name(name)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int, directory: Path) -> None:
    """Vocabulary with types, merges, special tokens and the prompt format.

    Raises:
        ValueError: a row of the embedding has no token, or llama.cpp would encode text in another way.
    """
    import gguf

    if rows := unknown_ids(tokenizer, vocab_size):
        raise ValueError(
            f"{directory}: the embedding has {vocab_size} rows, and {len(rows)} of them, from {rows[0]} on, have no "
            "token in the tokenizer: GGUF needs a token for each row, so save the model with as many rows as tokens "
            "(resize_token_embeddings of transformers)"
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    found = {key: (backend["pre_tokenizer"] or {}).get(key, value) for key, value in _PRE_TOKENIZER.items()}
    if backend["model"]["type"] != "BPE" or backend["normalizer"] or found != _PRE_TOKENIZER:
        raise ValueError(
            f"{directory}: the tokenizer splits text in another way than GPT-2's byte-level BPE, and no other is "
            "written to GGUF"
        )
    added = tokenizer.added_tokens_decoder
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    types = [
        gguf.TokenType.NORMAL
        if number not in added
        else gguf.TokenType.CONTROL
        if added[number].special
        else gguf.TokenType.USER_DEFINED
        for number in range(vocab_size)
    ]
    merges = backend["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[number] for number in range(vocab_size)])
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.eos_token_id)  # GPT-2 has one special token
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_tensors(writer: GGUFWriter, model: GPTModel, dtype: GGUFType) -> None:
    """Write all tensors, one at a time: a model of 6 GB is in memory once."""
    import gguf

    of_matrices = gguf.GGMLQuantizationType[dtype.upper()]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    tensors: dict[str, tuple[torch.Tensor, GGMLQuantizationType]] = {}
    for name, parameter in _parameters(model):
        key = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert key is not None, f"gguf has no name for {name}"
        vector = parameter.ndim == 1 or name == f"{PREFIX}wpe.weight"
        kind = gguf.GGMLQuantizationType.F32 if vector else of_matrices
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(key, parameter.shape, np.dtype(np.float32), parameter.numel() // block * size, kind)
        tensors[key] = parameter, kind
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, (parameter, kind) in tensors.items():
        writer.write_tensor_data(_encoded(key, parameter.numpy(), kind))


def _parameters(model: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters under Hugging Face's names, each matrix as (out, in); a tied head is the embedding's."""
    for name, parameter in model.named_parameters():
        yield name if name == HEAD else PREFIX + name, parameter.detach()


def _encoded(key: str, values: Array, kind: GGMLQuantizationType) -> Array:
    """The values in a type of GGUF.

    Raises:
        ValueError: f16 cannot hold one of them.
    """
    from gguf.quants import quantize

    with np.errstate(over="ignore"):  # it is refused below
        encoded: Array = quantize(values, kind)
    if kind.name == "F16" and not np.isfinite(encoded).all():
        raise ValueError(f"{key} has values that f16 cannot hold (above 65,504): write bf16 or f32")
    return encoded
