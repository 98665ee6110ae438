"""Reading and writing weights bit for bit, wrong keys and shapes, and broken tokenizers."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from model import GPTConfig, GPTModel, freeze_bottom_layers, load_gpt_model
from model.net.loading import check_pretrained, check_size, load_tokenizer

Weights = dict[str, torch.Tensor]


@pytest.fixture
def edited(gpt2_dir: Path, tmp_path: Path) -> Callable[[Callable[[Weights], object]], Path]:
    """edited(change): a copy of the tiny model with its tensors, under Hugging Face's names, changed in place."""

    def build(change: Callable[[Weights], object]) -> Path:
        target = tmp_path / "edited"
        shutil.copytree(gpt2_dir, target)
        weights = load_file(target / "model.safetensors")
        change(weights)
        save_file({k: v.contiguous() for k, v in weights.items()}, target / "model.safetensors")
        return target

    return build


def drop_prefix(weights: Weights) -> None:
    for key in list(weights):
        weights[key.removeprefix("transformer.")] = weights.pop(key)


def set_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_same_model(left: GPTModel, right: GPTModel) -> None:
    got, want = dict(left.named_parameters()), dict(right.named_parameters())
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_round_trip_is_bitwise(gpt2_dir: Path, tmp_path: Path) -> None:
    """Loading and saving again reproduces the tensors that transformers wrote."""
    GPTModel.from_pretrained(gpt2_dir).save_pretrained(tmp_path)
    before, after = load_file(gpt2_dir / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    for key in before:
        assert torch.equal(after[key], before[key]), key


def test_export_loads_in_transformers(gpt2_dir: Path, tmp_path: Path) -> None:
    """nanoGPT#241: the export is complete for transformers, and computes the same."""
    model = GPTModel.from_pretrained(gpt2_dir)
    model.save_pretrained(tmp_path, eos_token_id=0)
    reference, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert reference.config.eos_token_id == 0
    ids = torch.randint(300, (2, 20))
    with torch.no_grad():
        assert (model(ids) - reference.eval()(ids).logits).abs().max() <= 1e-4


def test_untied_export_loads_in_transformers(gpt2_dir: Path, tmp_path: Path) -> None:
    """A trained head is saved as a separate tensor, and is untied when transformers or GPTModel loads it."""
    model = GPTModel.from_pretrained(gpt2_dir)
    freeze_bottom_layers(model, 1, train_head=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    reference = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert reference.lm_head.weight is not reference.transformer.wte.weight
    ids = torch.randint(300, (2, 20))
    with torch.no_grad():
        assert (model(ids) - reference(ids).logits).abs().max() <= 1e-4
    again = GPTModel.from_pretrained(tmp_path)
    assert again.lm_head.weight.data_ptr() != again.wte.weight.data_ptr()
    assert_same_model(again, model)


def test_keys_without_prefix(gpt2_dir: Path, edited: Callable[..., Path]) -> None:
    """OpenAI's upload has wte.weight, later files have transformer.wte.weight."""
    assert_same_model(GPTModel.from_pretrained(edited(drop_prefix)), GPTModel.from_pretrained(gpt2_dir))


def test_keys_with_and_without_prefix_are_refused(edited: Callable[..., Path]) -> None:
    """A file with both keys is ambiguous."""
    directory = edited(lambda w: w.update({"wte.weight": w["transformer.wte.weight"].clone()}))
    with pytest.raises(ValueError, match="both with and without"):
        GPTModel.from_pretrained(directory)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_mask_buffers_of_old_files_are_ignored(gpt2_dir: Path, edited: Callable[..., Path], prefix: str) -> None:
    """transformers before 4.28 stored the causal mask."""

    def add_buffers(weights: Weights) -> None:
        if not prefix:
            drop_prefix(weights)
        for layer in range(3):
            weights[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 96, 96).tril()
            weights[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    assert_same_model(GPTModel.from_pretrained(edited(add_buffers)), GPTModel.from_pretrained(gpt2_dir))


def test_head_is_the_embedding_itself(gpt2_dir: Path) -> None:
    """One Parameter, not a copy that drifts, and counted once."""
    model = GPTModel.from_pretrained(gpt2_dir)
    assert model.lm_head.weight is model.wte.weight
    assert model.lm_head.weight.data_ptr() == model.wte.weight.data_ptr()
    names = [name for name, _ in model.named_parameters()]
    assert "wte.weight" in names
    assert "lm_head.weight" not in names


def test_stored_head_equal_to_the_embedding_is_fine(gpt2_dir: Path, edited: Callable[..., Path]) -> None:
    """Old files hold the tied head a second time."""
    directory = edited(lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    model = GPTModel.from_pretrained(directory)
    assert model.lm_head.weight.data_ptr() == model.wte.weight.data_ptr()
    assert_same_model(model, GPTModel.from_pretrained(gpt2_dir))


def test_stored_head_that_contradicts_the_tie_is_refused(edited: Callable[..., Path]) -> None:
    """A trained head is not silently thrown away."""
    directory = edited(lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from wte\.weight"):
        GPTModel.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"), r"h\.1\.mlp\.c_fc\.bias is missing"),
        (lambda w: w.update({"transformer.h.3.ln_1.bias": torch.zeros(32)}), r"h\.3\.ln_1\.bias is not a parameter"),
        (lambda w: w.update({"score.weight": torch.zeros(2, 32)}), r"score\.weight is not a parameter"),
        (
            lambda w: w.update({"transformer.h.0.ln_1.weight": torch.ones(1)}),
            r"h\.0\.ln_1\.weight has shape \[1\], expected \[32\]",
        ),
        (
            lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(1, 128)}),
            r"h\.0\.mlp\.c_fc\.weight has shape \[1, 128\], expected \[32, 128\]",
        ),
        (
            lambda w: w.update({"transformer.h.2.attn.c_attn.weight": torch.zeros(96, 32)}),
            r"h\.2\.attn\.c_attn\.weight has shape \[96, 32\], expected \[32, 96\]",
        ),
        (
            lambda w: w.update({"transformer.wpe.weight": torch.zeros(95, 32)}),
            r"wpe\.weight has shape \[95, 32\], expected \[96, 32\]",
        ),
    ],
    ids=["missing", "extra block", "extra head", "broadcastable norm", "broadcastable matrix", "transposed", "short"],
)
def test_wrong_keys_and_shapes_are_named(
    edited: Callable[..., Path], change: Callable[[Weights], object], message: str
) -> None:
    """Missing, extra and mis-shaped tensors; copy_ would broadcast some of them."""
    directory = edited(change)
    with pytest.raises(ValueError, match=message):
        check_pretrained(directory)
    with pytest.raises(ValueError, match=message):
        GPTModel.from_pretrained(directory)


def test_all_faults_are_named_at_once(edited: Callable[..., Path]) -> None:
    """One error lists missing, unknown and mis-shaped keys together."""

    def change(weights: Weights) -> None:
        del weights["transformer.ln_f.bias"]
        weights["transformer.ln_f.weight"] = torch.ones(31)
        weights["odd"] = torch.ones(1)

    with pytest.raises(ValueError, match=r"(?s)ln_f\.weight has shape.*ln_f\.bias is missing.*odd is not"):
        GPTModel.from_pretrained(edited(change))


@pytest.mark.parametrize("cut", ["half", "one byte", "in the header", "empty"])
def test_truncated_file_is_refused_by_name(gpt2_dir: Path, tmp_path: Path, cut: str) -> None:
    """A file from an interrupted copy is never loaded."""
    shutil.copytree(gpt2_dir, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    data = path.read_bytes()
    size = {"half": len(data) // 2, "one byte": len(data) - 1, "in the header": 100, "empty": 0}[cut]
    path.write_bytes(data[:size])
    for load in (check_pretrained, GPTModel.from_pretrained):
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            load(tmp_path / "cut")


@pytest.fixture
def sharded(gpt2_dir: Path, tmp_path: Path) -> Path:
    """The tiny model in two files and an index."""
    target = tmp_path / "sharded"
    shutil.copytree(gpt2_dir, target)
    weights = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    keys = sorted(weights)
    parts = {f"model-0000{i}-of-00002.safetensors": keys[i - 1 :: 2] for i in (1, 2)}
    for name, part in parts.items():
        save_file({key: weights[key] for key in part}, target / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def test_sharded_weights(gpt2_dir: Path, sharded: Path) -> None:
    """Several files with an index load as the same model."""
    assert_same_model(GPTModel.from_pretrained(sharded), GPTModel.from_pretrained(gpt2_dir))


def test_missing_shard_is_named(sharded: Path) -> None:
    """After an interrupted download of shards, the error names the missing one."""
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names model-00002-of-00002"):
        GPTModel.from_pretrained(sharded)


def test_index_cannot_leave_its_directory(sharded: Path) -> None:
    """An index that names a file in another directory is refused."""
    (sharded / "model-00001-of-00002.safetensors").rename(sharded.parent / "x.safetensors")
    path = sharded / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001-of-00002.safetensors", "../x.safetensors"))
    with pytest.raises(ValueError, match="outside its directory"):
        GPTModel.from_pretrained(sharded)


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_pickled_weights_are_never_read(gpt2_dir: Path, tmp_path: Path) -> None:
    """A pytorch_model.bin is not read in place of safetensors, so code in it does not run."""
    shutil.copytree(gpt2_dir, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        GPTModel.from_pretrained(tmp_path / "pickled")
    assert not (tmp_path / "ran").exists()


def test_loaded_model_does_not_depend_on_the_file(gpt2_dir: Path, tmp_path: Path) -> None:
    """The file may be replaced while the model lives."""
    shutil.copytree(gpt2_dir, tmp_path / "copy")
    model = GPTModel.from_pretrained(tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    with path.open("r+b") as stream:
        stream.write(b"\xff" * path.stat().st_size)
    assert_same_model(model, GPTModel.from_pretrained(gpt2_dir))


def test_check_size_names_both_shapes() -> None:
    """355M weights under the name 124M are refused; another vocabulary or context is not."""
    check_size(GPTConfig(vocab_size=99, n_positions=7), "124M", Path("weights"))
    with pytest.raises(ValueError, match=r"weights holds .*'n_layer': 24.*124M means .*'n_layer': 12"):
        check_size(GPTConfig.preset("355m"), "124M", Path("weights"))


@pytest.fixture(scope="module")
def preset_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A model of the preset "tiny", with a small vocabulary and context, and its tokenizer."""
    directory = tmp_path_factory.mktemp("preset")
    GPTModel(GPTConfig(320, 32, 192, 6, 6)).save_pretrained(directory, eos_token_id=0)
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, directory)
    return directory


def test_load_gpt_model(preset_dir: Path) -> None:
    """The call of the original scripts: size, directory, freeze_layers, num_unfrozen_layers."""
    model, tokenizer = load_gpt_model(
        model_size="Tiny", weights_dir=preset_dir, freeze_layers=True, num_unfrozen_layers=2
    )
    assert next(n for n, p in model.named_parameters() if p.requires_grad) == "h.4.ln_1.weight"
    assert model.num_frozen == 4
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    assert {rate for block in model.h for rate in (block.attn.dropout, block.mlp.dropout)} == {0.0}


def test_load_gpt_model_unfrozen(preset_dir: Path) -> None:
    """freeze_layers=False trains everything."""
    model, _ = load_gpt_model("tiny", preset_dir, freeze_layers=False)
    assert all(p.requires_grad for p in model.parameters())


def test_load_gpt_model_of_another_size_is_refused(preset_dir: Path) -> None:
    """The shape is read from the directory's config, not taken from the caller."""
    with pytest.raises(ValueError, match="model_size 124m means"):
        load_gpt_model("124m", preset_dir)


def test_load_gpt_model_with_tokenizer_elsewhere(preset_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Weights without a tokenizer are an error that names tokenizer_dir; with it, they load."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(preset_dir / name, tmp_path)
    with pytest.raises(ValueError, match="in tokenizer_dir"):
        load_gpt_model("tiny", tmp_path)
    assert len(load_gpt_model("tiny", tmp_path, tokenizer_dir=tokenizer_dir)[1]) == 320


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


def test_full_size_tokenizer_must_encode_as_gpt2(tmp_path: Path) -> None:
    """50,257 entries and a working round trip are not enough when the merges are not GPT-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(alphabet)}
    vocab |= {f"<filler {i}>": i for i in range(len(vocab), 50256)} | {"<|endoftext|>": 50256}
    directory = save_tokenizer(byte_level(vocab, []), tmp_path)
    with pytest.raises(ValueError, match="its files do not fit"):
        load_tokenizer(directory, 50257)


def test_tokenizer_larger_than_the_embedding_is_refused(tokenizer_dir: Path) -> None:
    """An id beyond the embedding crashes, on a GPU without a clear message."""
    with pytest.raises(ValueError, match="has 320 entries, the model's embedding 319 rows"):
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
