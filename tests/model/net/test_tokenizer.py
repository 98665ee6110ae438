"""Tokenizers: broken files, text that comes back changed, and GPT-2's own encoding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2TokenizerFast

from model.demo import EMBEDDED_BASE
from model.files import ChangedFileError
from model.net.prompt import encode
from model.net.tokenizer import hash_tokenizer, load_tokenizer, unknown_ids


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, **settings: str) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def test_tokenizer_of_one_token_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    """GPT2TokenizerFast(vocab_file=..., merges_file=...) returns such a tokenizer in transformers 5."""
    Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).model.save(str(tmp_path))
    trap = GPT2TokenizerFast(vocab_file=str(tmp_path / "vocab.json"), merges_file=str(tmp_path / "merges.txt"))
    if len(trap) > 1:
        pytest.skip("this version of transformers loads the whole tokenizer")
    trap.save_pretrained(tmp_path / "trap")
    with pytest.raises(ValueError, match="its files do not fit"):
        load_tokenizer(tmp_path / "trap", 50257)


def test_vocab_json_and_merges_load_in_full(tokenizer_dir: Path, gpt2_dir: Path, tmp_path: Path) -> None:
    """The same two files with config.json, as in OpenAI's upload, load as the whole tokenizer."""
    Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).model.save(str(tmp_path))
    shutil.copy(gpt2_dir / "config.json", tmp_path)
    tokenizer, whole = load_tokenizer(tmp_path, 320), load_tokenizer(tokenizer_dir, 320)
    assert len(tokenizer) == 320
    assert tokenizer.get_vocab() == whole.get_vocab()
    assert tokenizer.encode("def add_1(price):") == whole.encode("def add_1(price):")


def test_broken_vocabulary_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Entries are missing, so encoding loses text."""
    raw = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocab = {token: i for token, i in raw["model"]["vocab"].items() if token not in ("(", ")")}
    directory = save_tokenizer(byte_level(vocab, []), tmp_path)
    with pytest.raises(ValueError, match="its files do not fit"):
        load_tokenizer(directory, 50257)


GPT2_TOKENS = {"def": 4299, "Ġhello": 23748, "():": 33529, "Ġreturn": 1441, "Ġ'": 705, "world": 6894}


def full_size(directory: Path, known: dict[str, int]) -> Path:
    """A tokenizer of 50,257 entries without merges: bytes first, as in GPT-2's, and ``known`` at their ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)} | known
    vocab |= {f"<filler {i}>": i for i in set(range(50256)) - set(vocab.values())} | {"<|endoftext|>": 50256}
    return save_tokenizer(byte_level(vocab, []), directory)


def test_full_size_tokenizer_must_encode_as_gpt2(tmp_path: Path) -> None:
    """GPT-2's entries and a working round trip are not enough when the merges are not GPT-2's."""
    with pytest.raises(ValueError, match="its files do not fit"):
        load_tokenizer(full_size(tmp_path, GPT2_TOKENS), 50257)


def test_some_swapped_entries_of_gpt2s_are_refused(tmp_path: Path) -> None:
    """A vocabulary that has most of GPT-2's entries is meant to be GPT-2's."""
    swapped = {**GPT2_TOKENS, "def": GPT2_TOKENS["world"], "world": GPT2_TOKENS["def"]}
    with pytest.raises(ValueError, match="its files do not fit"):
        load_tokenizer(full_size(tmp_path, swapped), 50257)


def test_a_bpe_of_ones_own_may_have_as_many_entries(tmp_path: Path) -> None:
    """ru_transformers#3: the number of entries does not make it GPT-2's. Beside OpenAI's weights it is refused."""
    directory = full_size(tmp_path, {})
    tokenizer = load_tokenizer(directory, 50257)
    assert len(tokenizer) == 50257
    assert tokenizer.decode(encode(tokenizer, ["größe = 1\t# x"])[0]) == "größe = 1\t# x"
    with pytest.raises(ValueError, match="its files do not fit"):
        load_tokenizer(directory, 50257, gpt2=True)


def test_tokenizer_larger_than_the_embedding_is_refused(tokenizer_dir: Path) -> None:
    """An id beyond the embedding crashes, on a GPU without a clear message."""
    with pytest.raises(ValueError, match=r"has 320 entries, the model's embedding 319 rows: take the weights' own"):
        load_tokenizer(tokenizer_dir, 319)


def test_tokenizer_pads_with_eos_and_never_warns_of_length(tokenizer_dir: Path) -> None:
    """GPT-2 has no padding token; rows are cut, and counted, by prepare."""
    tokenizer = load_tokenizer(tokenizer_dir, 320)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert tokenizer.model_max_length > 10**6


def test_directory_without_tokenizer_is_named(tmp_path: Path) -> None:
    """Nothing is downloaded; the message names the setting to use."""
    with pytest.raises(ValueError, match=r"(?s)holds no readable tokenizer.*name one in tokenizer_dir"):
        load_tokenizer(tmp_path, 320)


def changed(tokenizer_dir: Path, directory: Path, change: Callable[[Tokenizer], object], **settings: Any) -> Path:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    change(tokenizer)
    return save_tokenizer(tokenizer, directory, tokenizer_class="PreTrainedTokenizerFast", **settings)


def normalizer(value: Any) -> Callable[[Tokenizer], object]:
    return lambda tokenizer: setattr(tokenizer, "normalizer", value)


LOSSES: dict[str, tuple[Callable[[Tokenizer], object], str]] = {
    "lower case": (normalizer(normalizers.Lowercase()), r"to lower case: '.*AB.*' comes back as '.*ab"),
    "NFC": (normalizer(normalizers.NFC()), r"normal form NFC of Unicode: .*comes back as"),
    "NFD": (normalizer(normalizers.NFD()), "comes back as"),
    "NFKC": (normalizer(normalizers.NFKC()), "comes back as"),
    "accents": (normalizer(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])), "comes back as"),
    "tabs": (normalizer(normalizers.Replace("\t", "    ")), r"'.*\\t.*' comes back as '.*    "),
    "several spaces": (normalizer(normalizers.Replace("  ", " ")), "comes back as"),
    "carriage returns": (normalizer(normalizers.Replace("\r\n", "\n")), "comes back as"),
    "strip": (normalizer(normalizers.Strip()), "by removing white space: .*comes back as"),
    "prefix space": (
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        r"by a space in front \(add_prefix_space\): 'def.*' comes back as ' def",
    ),
    "words only": (
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)])),
        "comes back as",
    ),
    "metaspace": (lambda tokenizer: setattr(tokenizer, "decoder", decoders.Metaspace()), "comes back as"),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_a_tokenizer_that_changes_text_is_refused(tokenizer_dir: Path, tmp_path: Path, loss: str) -> None:
    """hf/course#775: training on changed code goes unnoticed. The message shows what came back."""
    change, message = LOSSES[loss]
    with pytest.raises(ValueError, match=message):
        load_tokenizer(changed(tokenizer_dir, tmp_path, change), 320)


@pytest.mark.parametrize("byte", ["\x00", "\t", "A", "~", "\x7f", "\xa0", "\xff", "\u03c0", "\uffff", "\U0010ffff"])
def test_a_missing_byte_is_found(tokenizer_dir: Path, tmp_path: Path, byte: str) -> None:
    """Each of the bytes that UTF-8 has, and not only those of a few words."""
    sign = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(byte)[0][0][0]
    raw = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocab = {token: i for token, i in raw["model"]["vocab"].items() if token == "<|endoftext|>" or sign not in token}
    with pytest.raises(ValueError, match="comes back as"):
        load_tokenizer(save_tokenizer(byte_level(vocab, []), tmp_path), 320)


def test_bytes_are_all_of_utf8() -> None:
    """The texts of the check have every byte that UTF-8 can have: all but C0, C1 and F5 to FF."""
    from model.net.tokenizer import _BYTES

    assert set("".join(_BYTES).encode()) == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


def test_decoding_does_not_tidy_up(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Files of older transformers have clean_up_tokenization_spaces, which turns "a . b" into "a. b"."""
    directory = changed(tokenizer_dir, tmp_path, lambda _: None, clean_up_tokenization_spaces=True)
    tokenizer = load_tokenizer(directory, 320)
    assert tokenizer.decode(encode(tokenizer, ["a . b , c 's"])[0]) == "a . b , c 's"


def test_encoding_by_chance_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    """BPE dropout gives other ids at each call: base and tuned model would see other rows."""
    with pytest.raises(ValueError, match=r"encodes by chance .*dropout of 0\.1.*set dropout to null"):
        load_tokenizer(changed(tokenizer_dir, tmp_path, lambda t: setattr(t.model, "dropout", 0.1)), 320)


def test_two_tokens_of_one_id_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    raw = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    raw["model"]["vocab"]["def"] = raw["model"]["vocab"]["a"]
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"the same id|its files do not fit|no readable tokenizer"):
        load_tokenizer(tmp_path / "t", 320)


def test_an_id_beyond_the_embedding_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Fewer entries than rows, but one with a high id: the number of entries does not tell."""
    raw = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocab = {**raw["model"]["vocab"], "<far>": 330}
    with pytest.raises(ValueError, match="gives '<far>' the id 330, but the model's embedding has 325 rows"):
        load_tokenizer(save_tokenizer(byte_level(vocab, []), tmp_path), 325)


def test_unknown_ids_are_the_rows_without_a_token(tokenizer_dir: Path) -> None:
    assert unknown_ids(load_tokenizer(tokenizer_dir, 384), 384) == list(range(320, 384))
    assert unknown_ids(load_tokenizer(tokenizer_dir, 320), 320) == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_in_another_encoding_are_read(tokenizer_dir: Path, tmp_path: Path, name: str, encoding: str) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    path = tmp_path / "t" / name
    path.write_bytes(path.read_text().encode(encoding))
    assert load_tokenizer(tmp_path / "t", 320).get_vocab() == load_tokenizer(tokenizer_dir, 320).get_vocab()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<html>", "an HTML page"),
        (b"", "an empty file"),
        (b'{"name": "gr\xf6\xdfe"}', "not UTF-8"),
    ],
)
def test_another_file_in_place_of_the_tokenizer(
    tokenizer_dir: Path, tmp_path: Path, content: bytes, what: str
) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json is not valid JSON: it is {what}"):
        load_tokenizer(tmp_path / "t", 320)


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"type": "BPE", "vocab": 3}}', "3"])
def test_json_that_is_no_tokenizer(tokenizer_dir: Path, tmp_path: Path, content: str) -> None:
    """The tokenizers library raises a plain Exception for some of these."""
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"/t holds no readable tokenizer \(it has tokenizer\.json") as caught:
        load_tokenizer(tmp_path / "t", 320)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_lone_surrogate_is_one_sentence(tokenizer_dir: Path, tmp_path: Path, encoding: str) -> None:
    """In any encoding of the file: no UnicodeEncodeError without its name."""
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    raw = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    raw["model"]["vocab"]["\ud800"] = 320
    (tmp_path / "t" / "tokenizer.json").write_bytes(json.dumps(raw).encode(encoding))
    with pytest.raises(ValueError, match="/t holds no readable tokenizer"):
        load_tokenizer(tmp_path / "t", 400)


def test_a_crash_of_the_tokenizers_library(tokenizer_dir: Path, tmp_path: Path) -> None:
    """A panic of its Rust code, here by a merge into a token longer than all of the vocabulary, is no Exception."""
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    raw = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    longest = max(raw["model"]["vocab"], key=lambda token: len(token.encode()) if token[0] != "<" else 0)
    raw["model"]["merges"].append([longest, longest])
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"/t holds no readable tokenizer .*PanicException"):
        load_tokenizer(tmp_path / "t", 320)


def test_swapped_entries_are_a_changed_file(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The text comes back, the ids are others: only the hash tells."""
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    files = hash_tokenizer(tmp_path / "t")
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    load_tokenizer(tmp_path / "t", 320, files)
    raw = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(raw))
    load_tokenizer(tmp_path / "t", 320)
    with pytest.raises(ChangedFileError, match=r"tokenizer\.json has changed since this run began"):
        load_tokenizer(tmp_path / "t", 320, files)
    (tmp_path / "t" / "tokenizer.json").unlink()
    with pytest.raises(ChangedFileError, match=r"tokenizer\.json has changed.*missing"):
        load_tokenizer(tmp_path / "t", 320, files)


def test_a_file_that_came_later_has_no_effect(tokenizer_dir: Path, tmp_path: Path) -> None:
    """What was not hashed is not read: it could add tokens."""
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    files = hash_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "added_tokens.json").write_text(json.dumps({"<late>": 320}))
    assert len(load_tokenizer(tmp_path / "t", 400, files)) == 320


@pytest.mark.parametrize(
    "stated", [None, "GPT2Tokenizer", "GPT2TokenizerFast", "TokenizersBackend", "LlamaTokenizer"]
)
@pytest.mark.parametrize("of_model", [None, {"model_type": "gpt2"}, {"model_type": "bert"}])
def test_the_class_is_that_of_auto_tokenizer(
    tokenizer_dir: Path, tmp_path: Path, stated: str | None, of_model: dict[str, str] | None
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    settings = {"eos_token": "<|endoftext|>", "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"tokenizer_class": stated} if stated else {}))
    )
    if of_model:
        (tmp_path / "config.json").write_text(json.dumps(of_model))
    wanted = AutoTokenizer.from_pretrained(tmp_path)
    try:
        loaded = load_tokenizer(tmp_path, 50_000)
    except ValueError:  # what another class makes of GPT-2's files is refused for the text that it changes
        assert stated == "LlamaTokenizer" or of_model == {"model_type": "bert"}
        return
    assert type(loaded) is type(wanted)
    assert loaded.backend_tokenizer.to_str() == wanted.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == wanted.special_tokens_map | {"pad_token": loaded.eos_token}


_LIGHT = """
import sys
from model.net.tokenizer import load_tokenizer
load_tokenizer(sys.argv[1], 50_000)
heavy = {"transformers.modeling_utils", "transformers.models.auto.modeling_auto", "torch._dynamo", "scipy"}
assert not heavy & {*sys.modules}, heavy & {*sys.modules}
"""


@pytest.mark.parametrize("whose", ["gpt2", "embedded"])
def test_no_models_of_transformers_are_imported(tokenizer_dir: Path, whose: str) -> None:
    directory = EMBEDDED_BASE if whose == "embedded" else tokenizer_dir
    subprocess.run([sys.executable, "-c", _LIGHT, str(directory)], check=True, timeout=120)


def test_equal_files_are_loaded_once(tokenizer_dir: Path, tmp_path: Path) -> None:
    """By their hashes: a file that changes is named, and what it was before does not stand for it."""
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, tmp_path)
    files = hash_tokenizer(tmp_path)
    first = load_tokenizer(tmp_path, 50_000, files)
    assert load_tokenizer(tmp_path, 50_000, files) is first
    assert load_tokenizer(tmp_path, 50_000) is not first
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ChangedFileError, match=config.name):
        load_tokenizer(tmp_path, 50_000, files)
    config.unlink()
    with pytest.raises(ChangedFileError, match="missing"):
        load_tokenizer(tmp_path, 50_000, files)


_AHEAD = """
import sys, threading
from model.net.tokenizer import import_ahead, load_tokenizer
assert "transformers" not in sys.modules
thread = import_ahead()
if sys.argv[2] == "later":
    thread.join()
    before = len(sys.modules)
tokenizer = load_tokenizer(sys.argv[1], 320)
assert tokenizer.decode(tokenizer.encode("print(1)")) == "print(1)"
if sys.argv[2] == "later":
    assert len(sys.modules) - before < 30, len(sys.modules) - before
"""


@pytest.mark.parametrize("moment", ["later", "at once"])
def test_transformers_is_imported_ahead(tokenizer_dir: Path, moment: str) -> None:
    """What loads a tokenizer then imports next to nothing; while the import goes on, it waits for it."""
    subprocess.run([sys.executable, "-c", _AHEAD, str(tokenizer_dir), moment], check=True, timeout=120)
