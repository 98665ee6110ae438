"""A tokenizer made of a tokenizer.json alone, without transformers, whose import takes a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from model.files import parse_json, read_bytes
from model.net.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"


class PlainTokenizer:
    """What generation needs of a tokenizer: ``encode``, ``decode``, the vocabulary and the end-of-text token."""

    def __init__(self, content: bytes, eos_token: str):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_buffer(content)
        self._tokenizer.encode_special_tokens = True  # a literal <|endoftext|> in a text is text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_token_id = self._tokenizer.token_to_id(eos_token)

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
        """Encode texts; the options are those of ``model.net.prompt.encode``, which always apply here."""
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return {"input_ids": [each.ids for each in encoded]}

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def get_vocab(self) -> dict[str, int]:
        """The id of each token."""
        return dict(self._tokenizer.get_vocab())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def load_plain_tokenizer(
    directory: Path, vocab_size: int, files: Mapping[str, str] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that this project has registered; what it encodes was checked when it was trained.

    A directory without a tokenizer.json is loaded by ``load_tokenizer``.

    Args:
        directory, vocab_size, files: as of ``load_tokenizer``.

    Raises:
        ChangedFileError, ValueError: as ``load_tokenizer``.
    """
    content, config = directory / _FILE, directory / _CONFIG
    if content.is_file() and config.is_file():
        known = files or {}
        settings = parse_json(read_bytes(config, known.get(_CONFIG)), config)
        eos = settings.get("eos_token") if isinstance(settings, dict) else None
        eos = eos.get("content") if isinstance(eos, dict) else eos
        try:
            found = PlainTokenizer(read_bytes(content, known.get(_FILE)), str(eos))
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises plain ones for a file that it cannot read
                raise
            found = None
        if found is not None and found.eos_token_id is not None:
            # It has the part of the interface that generation uses.
            return cast("PreTrainedTokenizerBase", found)
    return load_tokenizer(directory, vocab_size, files)
