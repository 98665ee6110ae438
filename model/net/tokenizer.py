"""Loading a tokenizer, and the check that it gives back the text that it encodes."""

from __future__ import annotations

import json
import threading
import unicodedata
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from model.file_contents import describe_content
from model.files import ChangedFileError, parse_json, read_bytes, reason_of, sha256_file
from model.net.prompt import encode
from model.threads import begin_ahead, wait_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files that decide how text is encoded.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The files from which a tokenizer is made; transformers sees no others of its directory. config.json names the class
# where there are vocab.json and merges.txt only.
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
# "def hello():\n    return 'world'" in GPT-2's 50,257-entry vocabulary, with the tokens' text in it.
_GOLDEN_TEXT = "def hello():\n    return 'world'"
_GOLDEN_IDS = [4299, 23748, 33529, 198, 220, 220, 220, 1441, 705, 6894, 6]
_GOLDEN_TOKENS = {"def": 4299, "Ġhello": 23748, "():": 33529, "Ġreturn": 1441, "Ġ'": 705, "world": 6894}

# Text in which every byte occurs that UTF-8 has: ASCII, all continuation bytes, and each first byte of two, three and
# four bytes.
_BYTES = (
    "".join(map(chr, range(0x100))),
    "".join(chr(first << 6) for first in range(4, 32)),
    "".join(chr(max(first << 12, 0x800)) for first in range(16)),
    "".join(map(chr, (0x10000, 0x40000, 0x80000, 0xC0000, 0x100000))),
)
# Text that tokenizers are known to change: each begins without a space in front.
_TEXTS = (
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ def Class HTTPError",
    "x\tif y:\n\t\treturn  a   b    c\n\n\n\r\n  z  ",
    "   leading, and trailing   ",
    "a . b , c ! d ? n't I 'm do not it 's we 've you 're",  # what clean_up_tokenization_spaces joins
    "cafe\u0301 \u00e9 \ufb01 \u00b2 \uff21 \u2460 \u212b \u1e9b\u0323 \u0130 \u00df",  # NFC, NFD, NFKC, case folding
    "\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0627\u0644 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600 \U0001f468\u200d\U0001f4bb \u2764\ufe0f \u200b\u00a0\u3000\ufeff\ufffd",
    "\u2581a \u0120b \u010ac ##d e@@ f</w> <unk> [UNK] <s> <|endoftext|>",  # signs that tokenizers use themselves
)
_MOST_ADDED = 200  # added tokens whose neighbourhood is checked


def load_tokenizer(
    directory: str | Path, vocab_size: int, files: Mapping[str, str] | None = None, gpt2: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, pad = eos, and check that it gives back the text that it encodes.

    It is made from copies of the files that were hashed, so that what is hashed is what is loaded. With the same
    ``files`` a process gets the same object again, which is not to be changed. It decodes without
    ``clean_up_tokenization_spaces``, whatever its files say: that setting changes text.

    Loaded by ``from_pretrained``, because in transformers 5 ``GPT2TokenizerFast(vocab_file=..., merges_file=...)``
    silently returns a tokenizer with a single token.

    Args:
        directory: holds tokenizer.json, or vocab.json and merges.txt beside a config.json.
        vocab_size: rows of the model's embedding.
        files: name -> sha256 of the files to use; None takes those that are there.
        gpt2: whether it has to be GPT-2's own, as for OpenAI's weights.

    Raises:
        ChangedFileError: a file has another hash than in ``files``.
        ValueError: no tokenizer there, no end-of-text token, an id beyond the embedding, text that changes, or an
            encoding that is not GPT-2's although the vocabulary is.
    """
    directory = Path(directory)
    if files is None:
        return _load_checked(directory, vocab_size, None, gpt2)
    for name, known in files.items():
        if (found := _hash(directory / name)) != known:
            raise ChangedFileError(directory / name, known, found)
    return _load_once(directory, vocab_size, tuple(files.items()), gpt2)


@lru_cache(maxsize=4)
def _load_once(
    directory: Path, vocab_size: int, files: tuple[tuple[str, str], ...], gpt2: bool
) -> PreTrainedTokenizerBase:
    """What load_tokenizer does, once for the same files; an error is not kept."""
    return _load_checked(directory, vocab_size, dict(files), gpt2)


def _load_checked(
    directory: Path, vocab_size: int, files: Mapping[str, str] | None, gpt2: bool
) -> PreTrainedTokenizerBase:
    """Load and check a tokenizer; raises as load_tokenizer."""
    tokenizer = _load(directory, files)
    # No text is changed when ids are decoded. Rows are cut at max_length, and counted, elsewhere: no warning.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.model_max_length = int(1e9)
    try:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer in {directory} has no eos_token")
        _check_ids(tokenizer, vocab_size, directory)
        _check_golden(tokenizer, directory, gpt2)
        _check_round_trip(tokenizer, directory)
        tokenizer.pad_token = tokenizer.eos_token
    except BaseException as error:
        if isinstance(error, ValueError) or not _is_of_tokenizers(error):
            raise
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise ValueError(f"the tokenizer in {directory} does not work ({reason}): name another directory") from error
    return tokenizer


def hash_tokenizer(directory: Path) -> dict[str, str]:
    """The sha256 of each file that a tokenizer is made from, by its name."""
    return {name: _hash(directory / name) for name in TOKENIZER_FILES if (directory / name).is_file()}


def _hash(path: Path) -> str:
    return sha256_file(path) if path.is_file() else "none, it is missing"


def tokenizer_hashes(files: Mapping[str, str]) -> dict[str, str]:
    """Of the hashes of a directory's files by name, those of the files that its tokenizer is made from."""
    return {name: files[name] for name in TOKENIZER_FILES if name in files}


def unknown_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The rows of an embedding that no token belongs to, such as those that pad it to a round number."""
    return sorted(set(range(vocab_size)).difference(tokenizer.get_vocab().values()))


_ahead: list[threading.Thread] = []  # that import transformers


def import_ahead() -> threading.Thread:
    """Import transformers' tokenizers in a thread, while this one waits for something; returns the thread.

    The import takes a second, and several with files that are not in the system's cache. ``load_tokenizer`` waits for
    the thread: transformers replaces its own module while it is imported, and who imports it at that moment gets the
    one that has nothing in it. Python locks each module while it is imported. Two threads could wait for one another
    only over modules that import each other in a circle: of the modules imported here none is torch's or Triton's,
    which a training may import meanwhile.
    """
    tokenizers = "transformers.models.gpt2.tokenization_gpt2"
    return begin_ahead(lambda: import_module(tokenizers), _ahead, "import-transformers")


def _load(directory: Path, files: Mapping[str, str] | None) -> PreTrainedTokenizerBase:
    names = [name for name in TOKENIZER_FILES if (directory / name).is_file()] if files is None else list(files)
    with TemporaryDirectory() as scratch:
        contents = {
            name: _content(directory / name, files[name] if files else None)
            for name in TOKENIZER_FILES
            if name in names
        }
        for name, content in contents.items():
            (Path(scratch) / name).write_bytes(content)
        try:
            tokenizer = _tokenizer_class(contents).from_pretrained(
                scratch, local_files_only=True, trust_remote_code=False
            )
        except BaseException as error:
            if not _is_of_tokenizers(error):
                raise
            reason = f"{type(error).__name__}: {reason_of(error)}".replace(scratch, str(directory))
            there = f"it has {', '.join(names)}" if names else f"it has none of {', '.join(TOKENIZER_FILES[:4])}"
            raise ValueError(
                f"{directory} holds no readable tokenizer ({there}; {reason}): name one in tokenizer_dir"
            ) from error
    tokenizer.name_or_path = str(directory)
    return tokenizer


def _tokenizer_class(contents: Mapping[str, bytes]) -> Any:
    """The class that AutoTokenizer chooses for files; AutoTokenizer itself for files that are no GPT-2's.

    AutoTokenizer imports the models of transformers; in 5.17 torch's compiler and scipy with them, for 3 to 5 s.
    """
    wait_for(_ahead)
    import transformers

    stated, of_model = (_object(contents.get(name)) for name in ("tokenizer_config.json", "config.json"))
    if of_model.get("model_type", "gpt2") == "gpt2" and "auto_map" not in stated | of_model:
        name = stated.get("tokenizer_class") or of_model.get("tokenizer_class") or of_model.get("model_type")
        if name in ("gpt2", "GPT2Tokenizer", "GPT2TokenizerFast"):
            return transformers.GPT2Tokenizer
        if name in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def _object(content: bytes | None) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or something else."""
    value = json.loads(content) if content else {}
    return value if isinstance(value, dict) else {}


def _is_of_tokenizers(error: BaseException) -> bool:
    """Whether it is an error of transformers or its tokenizers. They raise all kinds, also plain Exception.

    A panic of the tokenizers' Rust code is no Exception, so that nobody catches it by chance.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _content(path: Path, sha256: str | None) -> bytes:
    """A file's content; JSON in UTF-8, because the tokenizers' own parser reads nothing else.

    Raises:
        ChangedFileError: it is missing, or has another hash.
        ValueError: it is no JSON; the message says what it is instead.
    """
    content = read_bytes(path, sha256)
    if path.suffix != ".json":
        if other := describe_content(path):
            raise ValueError(f"{path} is no tokenizer's file: it is {other}")
        return content
    value = parse_json(content, path)
    if json.detect_encoding(content) == "utf-8":
        return content
    return json.dumps(value).encode()  # a lone surrogate stays an escape


def _check_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int, directory: Path) -> None:
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} entries, the model's embedding {vocab_size} rows: "
            "take the weights' own, without added tokens, or save the model again after resize_token_embeddings()"
        )
    vocabulary = tokenizer.get_vocab()
    token, highest = max(vocabulary.items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} gives {token!r} the id {highest}, but the model's embedding has "
            f"{vocab_size} rows"
        )
    tokens: dict[int, str] = {}
    for token, number in vocabulary.items():
        if number in tokens:
            raise ValueError(
                f"the tokenizer in {directory} gives {tokens[number]!r} and {token!r} the same id {number}: its "
                "files do not fit"
            )
        tokens[number] = token


def _check_golden(tokenizer: PreTrainedTokenizerBase, directory: Path, gpt2: bool) -> None:
    """GPT-2's vocabulary has to encode as GPT-2 does: without its merges it would give back all text nevertheless.

    A vocabulary is GPT-2's if most of a few words have GPT-2's ids in it. That of a tokenizer of one's own has not.
    """
    vocabulary = tokenizer.get_vocab()
    same = sum(vocabulary.get(token) == number for token, number in _GOLDEN_TOKENS.items())
    ids = encode(tokenizer, [_GOLDEN_TEXT])[0]
    if ids != _GOLDEN_IDS and (gpt2 or same > len(_GOLDEN_TOKENS) / 2):
        raise ValueError(
            f"the tokenizer in {directory} encodes {_GOLDEN_TEXT!r} as {ids}, GPT-2's as {_GOLDEN_IDS}: its files do "
            "not fit, or some are missing; name another directory in tokenizer_dir"
        )


def _check_round_trip(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Raise ValueError, with what came back, if encoding and decoding changes text or depends on chance."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if dropout := getattr(getattr(backend, "model", None), "dropout", None):
        raise ValueError(
            f"the tokenizer in {directory} encodes by chance (its BPE has a dropout of {dropout}): set dropout to "
            "null in its tokenizer.json"
        )
    for text in _texts(tokenizer):
        ids = encode(tokenizer, [text])[0]
        got = str(tokenizer.decode(ids))
        if got != text:
            start = next((i for i, pair in enumerate(zip(text, got, strict=False)) if pair[0] != pair[1]), len(got))
            part = slice(max(0, start - 8), start + 16)
            raise ValueError(
                f"the tokenizer in {directory} changes text{_kind_of_change(text, got)}: {text[part]!r} comes back "
                f"as {got[part]!r}, so its files do not fit, or some are missing; name another directory in "
                "tokenizer_dir"
            )
        if "<|endoftext|>" in text and tokenizer.eos_token_id in ids:
            raise ValueError(f"the tokenizer in {directory} takes {text!r} for the end of the text")


def _texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    yield from (_GOLDEN_TEXT, *_TEXTS, *_BYTES)
    yield "\n".join((*_TEXTS, *_BYTES))
    added = [str(token) for token in tokenizer.added_tokens_encoder][:_MOST_ADDED]
    if added:  # their neighbours may be stripped
        yield "".join(f"a  {token}  b{token}c\n" for token in added)


def _kind_of_change(text: str, got: str) -> str:
    """The usual reason, if it is one of the usual."""
    if got == f" {text}":
        return " by a space in front (add_prefix_space)"
    if got == text.lower():
        return " to lower case"
    if got == text.strip():
        return " by removing white space"
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        if got == unicodedata.normalize(form, text):  # type: ignore[arg-type]
            return f" to the normal form {form} of Unicode"
    return ""
