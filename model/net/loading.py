"""Reading and writing GPT-2 weights in Hugging Face's layout, with every key, shape and value checked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.files import ChangedFileError, save_tensors, sha256_file
from model.net.config import GPTConfig
from model.net.empty import empty_models
from model.net.freezing import freeze_bottom_layers
from model.net.gpt import GPTModel
from model.net.keys import EMBEDDING, HEAD, PREFIX, Match, is_conv1d, match_keys
from model.net.layout import CONFIG_FILE, WEIGHTS_FILE, weight_files
from model.net.prompt import CHAT_TEMPLATE
from model.net.tensor_file import Entry, TensorFile, open_tensors
from model.net.tokenizer import load_tokenizer
from model.threads import begin_ahead, shorten_switch_interval, wait_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Hashes = Mapping[str, str]
"""File name -> sha256."""


@dataclass(frozen=True)
class _Weights:
    """An open model: its files, whose headers fit the config."""

    directory: Path
    config: GPTConfig
    files: list[TensorFile]
    match: Match
    expected: Hashes | None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter with its name, as stored, in the order of the files. All bytes are read, once.

        They are hashed and checked, unless this process has done so with the same file before (model.file_memory).

        A tensor is valid until the next one.

        Raises:
            ChangedFileError: a file has another hash than expected.
            ValueError: a value is not finite, or the config ties the head but the stored head is not the embedding.
        """
        names = {key: name for name, key in self.match.keys.items()}
        tied = {}
        for file in self.files:
            faults = []
            for key, tensor in file.tensors():
                if key not in names:
                    continue
                if not file.is_checked and not _is_finite(tensor):
                    faults.append(key)
                if HEAD in self.match.keys and self.config.tie_word_embeddings and names[key] in (EMBEDDING, HEAD):
                    tied[names[key]] = tensor.clone()
                yield names[key], tensor
            self._check_hash(file)  # first: a changed file may have any values
            if faults:
                more = f" and {len(faults) - 3} more tensors" if len(faults) > 3 else ""
                raise ValueError(
                    f"{file.path} holds NaN or infinite values, in {', '.join(faults[:3])}{more}: they are damaged, "
                    "or their training diverged; take an earlier checkpoint, or copy the file again"
                )
            file.keep_as_checked()
        if HEAD in tied and not torch.equal(tied[HEAD].float(), tied[EMBEDDING].float()):
            raise ValueError(
                f"{self.directory}: lm_head.weight differs from wte.weight, but {CONFIG_FILE} ties them; "
                "set tie_word_embeddings to false there"
            )

    def _check_hash(self, file: TensorFile) -> None:
        if self.expected is not None and self.expected.get(file.path.name) != file.sha256:
            raise ChangedFileError(file.path, self.expected.get(file.path.name), file.sha256)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite in fp32. Their sum tells in a tenth of the time, unless it overflows."""
    if tensor.sum(dtype=torch.float32).isfinite():
        return True
    return all(bool(bound.float().isfinite()) for bound in tensor.aminmax())


@contextmanager
def _open(directory: Path, expected: Hashes | None) -> Iterator[_Weights]:
    """Open a model's files, and check their headers against the config.

    Raises:
        FileNotFoundError, ValueError: as check_pretrained.
    """
    with ExitStack() as stack:
        try:
            paths = weight_files(directory)
            config = GPTConfig.from_json(
                directory / CONFIG_FILE, None if expected is None else expected.get(CONFIG_FILE, "")
            )
            files = [stack.enter_context(open_tensors(path)) for path in paths]
            entries: dict[str, Entry] = {}
            for file in files:
                if twice := entries.keys() & file.entries.keys():
                    raise ValueError(f"{file.path} has {min(twice)!r}, and so has another file of {directory}")
                entries |= file.entries
            match = match_keys(config, entries, directory)
        except (ValueError, FileNotFoundError):
            check_hashes(directory, expected or {})  # a changed file is named as such, whatever is in it now
            raise
        yield _Weights(directory, config, files, match, expected)


def check_hashes(directory: Path, expected: Hashes) -> None:
    """Compare the files of a model with what they were.

    Raises:
        ChangedFileError: one that is there has another hash.
    """
    for name, known in expected.items():
        path = directory / name
        if path.is_file() and (found := sha256_file(path)) != known:
            raise ChangedFileError(path, known, found)


def check_pretrained(
    directory: Path, expected: Hashes | None = None, log: Callable[[str], None] | None = None
) -> GPTConfig:
    """Check a directory's config, keys, shapes and dtypes from the files' headers, without reading the weights.

    Args:
        expected: hashes of config.json and the weights, of which that of config.json is checked here; None for any.
        log: told what was done to the keys to make them fit.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ChangedFileError: a file has another hash than expected.
        ValueError: they do not fit each other, or a file is damaged, an adapter or quantised.
    """
    with _open(directory, expected) as weights:
        if log and weights.match.note:
            log(f"{directory}: {weights.match.note}")
        return weights.config


def hash_pretrained(directory: Path) -> tuple[GPTConfig, dict[str, str]]:
    """Check all that read_pretrained checks, and hash config.json and the weights; each byte is read once.

    Raises:
        FileNotFoundError, ValueError: as read_pretrained.
    """
    found = sha256_file(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else ""
    with _open(directory, None) as weights:
        for _ in weights.tensors():
            pass
        # Once more, with the hash: what was hashed is what was checked.
        config = GPTConfig.from_json(directory / CONFIG_FILE, found)
        return config, {CONFIG_FILE: found, **{file.path.name: file.sha256 for file in weights.files}}


_ahead: list[threading.Thread] = []  # that hash weights


def hash_ahead(directory: Path) -> None:
    """Call ``hash_pretrained`` in a thread, while this one waits for something; what it finds is remembered."""
    shorten_switch_interval()
    begin_ahead(partial(hash_pretrained, directory), _ahead, "hash-ahead")


def wait_for_hashes() -> None:
    """Wait until all that ``hash_ahead`` began is done; any number of threads may wait."""
    wait_for(_ahead)


def read_pretrained(
    directory: Path, device: torch.device, dtype: torch.dtype, expected: Hashes | None = None
) -> GPTModel:
    """Build a GPTModel from a directory in Hugging Face's GPT-2 layout.

    Keys with and without the ``transformer.`` prefix, and with any other that all of them share, are read; mask
    buffers of old checkpoints are ignored. A tied head stays the embedding's own Parameter (LLMs-from-scratch#822: a
    copy drifts). The files are read once, and hashed on the way: what is hashed is what is loaded.

    Args:
        expected: hashes that config.json and the weights must have; None for any.

    Raises:
        FileNotFoundError, ValueError: as check_pretrained.
        ChangedFileError: a file has another hash than expected.
        ValueError: a value is not finite, or the config ties the head but the stored head is not the embedding.
    """
    with _open(directory, expected) as weights:
        return _build(weights, device, dtype)


def _build(weights: _Weights, device: torch.device, dtype: torch.dtype) -> GPTModel:
    """The model of open files; raises as read_pretrained."""
    config = weights.config
    with empty_models():
        model = GPTModel(config)
    wanted = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    for name, tensor in weights.tensors():
        if name in wanted:
            # On its device first: a GPU transposes in no time, and a CPU at a tenth of the speed of copying.
            stored = tensor.to(device, dtype, copy=not is_conv1d(name))
            state[name] = stored.t().contiguous() if is_conv1d(name) else stored
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
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


def write_with_tokenizer(model: GPTModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a directory that transformers' pipeline loads: weights, config, and tokenizer with the prompt format."""
    write_pretrained(model, directory, tokenizer.eos_token_id)
    tokenizer = copy(tokenizer)  # what is set here is not for others
    tokenizer.model_max_length = model.config.n_positions
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(directory))


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
    files: Hashes | None = None,
    tokenizer_files: Hashes | None = None,
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
        files: hashes that config.json and the weights must have; None for any.
        tokenizer_files: hashes of the tokenizer's files; None for any.

    Raises:
        FileNotFoundError, ValueError: as read_pretrained, check_size, load_tokenizer, freeze_bottom_layers.
    """
    directory = Path(weights_dir)
    model = load_frozen_model(
        model_size, directory, freeze_layers, num_unfrozen_layers, train_head, torch.device(device), files
    )
    return model, load_tokenizer(tokenizer_dir or directory, model.config.vocab_size, tokenizer_files)


def load_frozen_model(
    model_size: str,
    directory: Path,
    freeze_layers: bool,
    num_unfrozen_layers: int,
    train_head: bool,
    device: torch.device,
    files: Hashes | None,
) -> GPTModel:
    """What load_gpt_model does, with the same arguments, without the tokenizer.

    Raises:
        FileNotFoundError, ValueError: as read_pretrained, check_size, freeze_bottom_layers.
    """
    with _open(directory, files) as weights:
        check_size(weights.config, model_size, directory)
        model = _build(weights, device, torch.float32)
    if freeze_layers:
        freeze_bottom_layers(model, num_unfrozen_layers, train_head)
    return model
