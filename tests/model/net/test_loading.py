"""Reading and writing weights bit for bit, and what is no whole, unchanged, finite GPT-2."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from transformers import GPT2LMHeadModel

from model import GPTConfig, GPTModel, freeze_bottom_layers, load_gpt_model
from model.files import ChangedFileError, sha256_file
from model.net.loading import check_pretrained, check_size, hash_pretrained, read_pretrained

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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 300, r"names .*, which does not exist"),
        ("a\0b", "names a file outside its directory"),
        ("..", "names a file outside its directory"),
    ],
)
def test_an_index_with_a_name_that_no_file_has(sharded: Path, name: str, reason: str) -> None:
    """One sentence that names the index."""
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["transformer.wte.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises((FileNotFoundError, ValueError), match=rf"index\.json {reason}"):
        GPTModel.from_pretrained(sharded)


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def _bare_pickle(directory: Path, canary: Canary) -> None:
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(canary))


def _torch_save(directory: Path, canary: Canary) -> None:
    torch.save({"wte.weight": canary}, directory / "model.pt")


def _distributed_checkpoint(directory: Path, canary: Canary) -> None:
    """torch's DCP reads .metadata by pickle."""
    from torch.distributed.checkpoint import save

    save({"wte.weight": torch.zeros(2)}, checkpoint_id=directory)
    assert (directory / ".metadata").stat().st_size
    (directory / ".metadata").write_bytes(pickle.dumps(canary))


PICKLES = {
    "pytorch_model.bin": (_bare_pickle, r"pytorch_model\.bin \(a Python pickle\)"),
    "model.pt": (_torch_save, r"model\.pt \(a Python pickle\)"),
    "DCP": (_distributed_checkpoint, r"\.distcp \(a part of a sharded training checkpoint\)"),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickled_weights_are_never_read(gpt2_dir: Path, tmp_path: Path, kind: str) -> None:
    """A pickle is not read in place of safetensors, so code in it does not run; the message names it."""
    write, named = PICKLES[kind]
    directory = Path(shutil.copytree(gpt2_dir, tmp_path / "pickled"))
    (directory / "model.safetensors").unlink()
    write(directory, Canary(tmp_path / "ran"))
    for load in (GPTModel.from_pretrained, check_pretrained, hash_pretrained, lambda d: load_gpt_model("tiny", d)):
        with pytest.raises(FileNotFoundError, match=rf"holds no model\.safetensors, but .*{named}: weights are read"):
            load(directory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_beside_the_weights_are_not_read(gpt2_dir: Path, tmp_path: Path, kind: str) -> None:
    """A poisoned one next to whole safetensors, as in a checkpoint of another trainer."""
    directory = Path(shutil.copytree(gpt2_dir, tmp_path / "both"))
    PICKLES[kind][0](directory, Canary(tmp_path / "ran"))
    assert_same_model(GPTModel.from_pretrained(directory), GPTModel.from_pretrained(gpt2_dir))
    assert not (tmp_path / "ran").exists()


def test_the_canary_runs_where_a_pickle_is_read(tmp_path: Path) -> None:
    """Else the two tests above could not fail."""
    _torch_save(tmp_path, Canary(tmp_path / "ran"))
    torch.load(tmp_path / "model.pt", weights_only=False)["wte.weight"].close()
    assert (tmp_path / "ran").exists()


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
    assert {block.dropout for block in model.h} == {0.0}


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


WRAPPERS = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "DataParallel": lambda key: f"module.{key}",
    "both": lambda key: f"_orig_mod.module.{key}",
    "Lightning": lambda key: f"model.{key}",
    "Lightning, compiled": lambda key: f"model._orig_mod.{key}",
    "a compiled transformer": lambda key: key.replace("transformer.", "transformer._orig_mod."),
    "compiled blocks": lambda key: key.replace(".attn.", "._orig_mod.attn."),
    "a class of one's own": lambda key: f"net.gpt2.{key}",
    "without transformer": lambda key: f"backbone.{key.removeprefix('transformer.')}",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prefixes_of_wrappers_are_read_and_noted(gpt2_dir: Path, edited: Callable[..., Path], wrapper: str) -> None:
    """nanoGPT#325: where every key fits without what a wrapper inserted, the file is read, and a line says so."""

    def wrap(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
        for key in list(weights):
            weights[WRAPPERS[wrapper](key)] = weights.pop(key)

    directory, notes = edited(wrap), list[str]()
    check_pretrained(directory, log=notes.append)
    assert_same_model(GPTModel.from_pretrained(directory), GPTModel.from_pretrained(gpt2_dir))
    (note,) = notes
    assert re.search("keys have more in front than a GPT-2's, such as '.+', read as '.+'", note)


def test_usual_keys_are_no_note(gpt2_dir: Path, edited: Callable[..., Path]) -> None:
    notes: list[str] = []
    check_pretrained(gpt2_dir, log=notes.append)
    check_pretrained(edited(drop_prefix), log=notes.append)
    assert notes == []


def test_keys_that_do_not_fit_are_shown_with_some_of_the_file(edited: Callable[..., Path]) -> None:
    """Another naming altogether: the message shows what the file has, not only what it lacks."""

    def rename(weights: Weights) -> None:
        for key in list(weights):
            weights[key.replace("transformer.h.", "blocks.")] = weights.pop(key)

    with pytest.raises(ValueError, match=r"h\.0\.ln_1\.weight is missing.*have \d+ keys, such as 'blocks\.0\.attn"):
        check_pretrained(edited(rename))


def test_a_tied_head_kept_once_under_its_own_name(gpt2_dir: Path, tmp_path: Path) -> None:
    """accelerate#2875: safetensors' save_model keeps one of two names of a tensor, and takes lm_head.weight."""
    shutil.copytree(gpt2_dir, tmp_path / "saved")
    save_model(GPT2LMHeadModel.from_pretrained(gpt2_dir), str(tmp_path / "saved" / "model.safetensors"))
    assert "transformer.wte.weight" not in load_file(tmp_path / "saved" / "model.safetensors")
    model = GPTModel.from_pretrained(tmp_path / "saved")
    assert model.lm_head.weight is model.wte.weight
    assert_same_model(model, GPTModel.from_pretrained(gpt2_dir))


def _as_dtype(name: str, dtype: torch.dtype) -> Callable[[Weights], object]:
    return lambda w: w.update({name: w[name].to(dtype)})


C_FC = "transformer.h.0.mlp.c_fc.weight"
UNUSUAL: dict[str, tuple[Callable[[Weights], object], str]] = {
    "int8": (_as_dtype(C_FC, torch.int8), "quantised weights .*c_fc.weight' of dtype I8.*dequantize"),
    "uint8": (_as_dtype(C_FC, torch.uint8), "quantised weights .*dtype U8.*dequantize"),
    "fp8": (_as_dtype(C_FC, torch.float8_e4m3fn), "quantised weights .*dtype F8_E4M3.*dequantize"),
    "int64": (_as_dtype("transformer.ln_f.bias", torch.int64), r"ln_f\.bias has dtype I64, expected one of F64, F32"),
    "bool": (_as_dtype("transformer.ln_f.bias", torch.bool), r"ln_f\.bias has dtype BOOL"),
    "bitsandbytes": (
        lambda w: w.update({f"{C_FC}.absmax": torch.ones(4)}), "quantised weights .*absmax.*dequantize",
    ),
    "GPTQ": (
        lambda w: w.update({C_FC.replace("weight", "qweight"): w.pop(C_FC).int()}), "quantised weights .*qweight",
    ),
    "fp8 with scales": (
        lambda w: w.update({f"{C_FC}_scale_inv": torch.ones(1)}), "quantised weights .*weight_scale_inv",
    ),
    "LoRA": (
        lambda w: w.update({"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(4, 32)}),
        "holds an adapter .*lora_A.*merge_and_unload",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSUAL)
def test_weights_of_another_kind_are_named(edited: Callable[..., Path], kind: str) -> None:
    """Quantised weights and adapters, with what to do; any other dtype that is not floating point."""
    change, message = UNUSUAL[kind]
    directory = edited(change)
    for load in (check_pretrained, GPTModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_named(edited: Callable[..., Path], value: float, dtype: torch.dtype) -> None:
    """openvla#49: they are found when the file is read, not by a loss that is NaN."""

    def spoil(weights: Weights) -> None:
        weights[C_FC] = weights[C_FC].to(dtype)
        weights[C_FC][3, 5] = value

    directory = edited(spoil)
    for load in (hash_pretrained, GPTModel.from_pretrained):
        with pytest.raises(ValueError, match=rf"model\.safetensors holds NaN or infinite values, in {C_FC}"):
            load(directory)


def test_fp64_is_read(gpt2_dir: Path, edited: Callable[..., Path]) -> None:
    directory = edited(lambda w: w.update({key: value.double() for key, value in w.items()}))
    assert_same_model(GPTModel.from_pretrained(directory), GPTModel.from_pretrained(gpt2_dir))


def test_fp64_beyond_fp32_is_not_finite(edited: Callable[..., Path]) -> None:
    directory = edited(lambda w: w.update({C_FC: w[C_FC].double() * 1e300}))
    with pytest.raises(ValueError, match="holds NaN or infinite values"):
        GPTModel.from_pretrained(directory)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><title>Sign in</title>" + bytes(80), "an HTML page"),
        (b"", "an empty file"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(80), "a PyTorch checkpoint of the old format"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(80), "a PyTorch checkpoint with a pickle"),
        (b"\x1f\x8b\x08" + bytes(80), "compressed by gzip"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "shard", "index"])
def test_another_file_in_place_of_weights_or_config(
    gpt2_dir: Path, sharded: Path, tmp_path: Path, content: bytes, what: str, name: str
) -> None:
    """GRPO-Zero#1: the message says what the file is and what to do, not "header too large"."""
    directory = sharded if name in ("shard", "index") else Path(shutil.copytree(gpt2_dir, tmp_path / "other"))
    name = {"shard": "model-00002-of-00002.safetensors", "index": "model.safetensors.index.json"}.get(name, name)
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is not .*: it is {what}"):
        check_pretrained(directory)


def _move_into(directory: Path, inner: str) -> None:
    (directory / inner).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (directory / name).rename(directory / inner / name)


def _adapter(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (directory / "config.json").rename(directory / "adapter_config.json")


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "checkpoints": (lambda d: _move_into(d, "checkpoint-500"), "no model.safetensors, but checkpoint-500 in it do"),
    "hub cache": (lambda d: _move_into(d, "snapshots/ab12"), "no model.safetensors, but snapshots/ab12 in it do"),
    "adapter": (_adapter, "holds an adapter .adapter_config.json.*merge_and_unload"),
    "pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "but pytorch_model.bin .a Python",
    ),
    "GGUF": (lambda d: (d / "model.safetensors").rename(d / "gpt2.Q4.gguf"), "but gpt2.Q4.gguf"),
    "renamed": (
        lambda d: (d / "model.safetensors").rename(d / "gpt2.safetensors"),
        "but gpt2.safetensors: rename it",
    ),
    "broken link": (
        lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").symlink_to("../blobs/ab")),
        "is a link to ../blobs/ab, which does not exist",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), r"config.json is missing"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_another_kind_is_named(gpt2_dir: Path, tmp_path: Path, kind: str) -> None:
    """The message says what is there, and what to name or do instead."""
    directory = Path(shutil.copytree(gpt2_dir, tmp_path / "other"))
    change, message = FOLDERS[kind]
    change(directory)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_pretrained(directory)


def test_newest_checkpoints_are_named_last(gpt2_dir: Path, tmp_path: Path) -> None:
    """By number: checkpoint-1000 is newer than checkpoint-500."""
    for step in (500, 1000, 50, 1500):
        shutil.copytree(gpt2_dir, tmp_path / f"checkpoint-{step}")
    with pytest.raises(FileNotFoundError, match="but checkpoint-500, checkpoint-1000, checkpoint-1500 and 1 more of"):
        check_pretrained(tmp_path)


def test_a_key_in_two_shards_is_refused(sharded: Path) -> None:
    """Which of both counts would depend on their order."""
    path = sharded / "model-00002-of-00002.safetensors"
    other = load_file(sharded / "model-00001-of-00002.safetensors")
    key = next(iter(other))
    save_file({**load_file(path), key: other[key] + 1}, path)
    with pytest.raises(ValueError, match=f"has '{re.escape(key)}', and so has another file"):
        check_pretrained(sharded)


# What was hashed is what is loaded.


def _hashes(directory: Path) -> dict[str, str]:
    return {
        path.name: sha256_file(path) for path in directory.glob("*") if path.name != "model.safetensors.index.json"
    }


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_changed_is_never_loaded(gpt2_dir: Path, tmp_path: Path, name: str) -> None:
    """One bit of a value, or a space in the config: nothing else would tell."""
    directory = Path(shutil.copytree(gpt2_dir, tmp_path / "copy"))
    expected = _hashes(directory)
    read_pretrained(directory, torch.device("cpu"), torch.float32, expected)
    content = bytearray((directory / name).read_bytes())
    content[-1] = ord(" ") if name == "config.json" else content[-1] ^ 1
    (directory / name).write_bytes(content)
    with pytest.raises(ChangedFileError, match=rf"{name} has changed since this run began"):
        read_pretrained(directory, torch.device("cpu"), torch.float32, expected)


def test_a_replaced_file_is_named_as_changed_whatever_is_in_it(gpt2_dir: Path, tmp_path: Path) -> None:
    """Not as one whose keys do not fit, or that is cut short."""
    directory = Path(shutil.copytree(gpt2_dir, tmp_path / "copy"))
    expected = _hashes(directory)
    for content in (b"", (directory / "model.safetensors").read_bytes()[:-1]):
        (directory / "model.safetensors").write_bytes(content)
        with pytest.raises(ChangedFileError, match=r"model\.safetensors has changed"):
            check_pretrained(directory, expected)


def test_a_shard_that_was_not_hashed_is_not_loaded(sharded: Path) -> None:
    """An index that names another file than before."""
    expected = _hashes(sharded)
    del expected["model-00002-of-00002.safetensors"]
    with pytest.raises(ChangedFileError, match=r"00002-of-00002\.safetensors has changed.*it was not there then"):
        read_pretrained(sharded, torch.device("cpu"), torch.float32, expected)


def test_hashes_are_those_of_the_files(sharded: Path) -> None:
    """Read once, with the checks, the hashes are those of sha256sum."""
    config, found = hash_pretrained(sharded)
    assert config.n_embd == 32
    assert found == {name: sha for name, sha in _hashes(sharded).items() if name in found}
    assert len(found) == 3
