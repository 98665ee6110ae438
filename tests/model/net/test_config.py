"""GPTConfig: presets and Hugging Face's config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model import GPTConfig
from model.net.config import PRESETS, normalize_size

SMALL = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**SMALL, **changes}))
    return path


@pytest.mark.parametrize("spelling", ["355m", "355M", " 355M "])
def test_size_in_any_spelling(spelling: str) -> None:
    """The seed writes 355M."""
    assert normalize_size(spelling) == "355m"
    assert GPTConfig.preset(spelling).n_embd == 1024


def test_unknown_size_lists_the_known() -> None:
    """A misspelt size is an error that lists the known sizes."""
    with pytest.raises(ValueError, match=r"'345M' is unknown.*124m.*1558m"):
        GPTConfig.preset("345M")


def test_presets_have_gpt2_context_vocabulary_and_epsilon() -> None:
    """The values of the published GPT-2 models, which hand-written configurations often get wrong."""
    for size in ("124m", "355m", "774m", "1558m"):
        config = PRESETS[size]
        assert (config.n_positions, config.vocab_size) == (1024, 50257)
        assert config.layer_norm_epsilon == 1e-5
        assert config.tie_word_embeddings
        assert config.dropout == 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "gelu"),
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("n_inner", 12),
    ],
)
def test_unsupported_setting_is_refused_by_name(tmp_path: Path, name: str, value: Any) -> None:
    """A setting that changes the computation is never ignored."""
    path = write(tmp_path / "config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json: {name} = {value!r} is not supported"):
        GPTConfig.from_json(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "gelu_new"),
        ("activation_function", "gelu_pytorch_tanh"),
        ("n_inner", None),
        ("n_inner", 32),
        ("reorder_and_upcast_attn", True),
    ],
)
def test_equivalent_setting_is_accepted(tmp_path: Path, name: str, value: Any) -> None:
    """Other values for the same computation."""
    assert GPTConfig.from_json(write(tmp_path / "config.json", **{name: value})).n_embd == 8


def test_other_model_type_is_refused(tmp_path: Path) -> None:
    """A Llama directory does not load as GPT-2."""
    with pytest.raises(ValueError, match="'llama', not a gpt2"):
        GPTConfig.from_json(write(tmp_path / "config.json", model_type="llama"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_head", 0), ("n_embd", "8"), ("n_embd", None), ("n_layer", -1), ("vocab_size", 2.0), ("n_positions", True)],
)
def test_sizes_that_are_not_positive_integers_are_named(tmp_path: Path, name: str, value: Any) -> None:
    """The message has the setting and its value in the file."""
    path = write(tmp_path / "config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"config\.json: {name} = {value!r} is not a positive integer"):
        GPTConfig.from_json(path)


def test_json_that_is_not_an_object_is_named(tmp_path: Path) -> None:
    """A list is not a configuration."""
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        GPTConfig.from_json(tmp_path / "config.json")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    """A setting that decides the shape has no default."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    with pytest.raises(ValueError, match="lacks vocab_size, n_layer, n_head"):
        GPTConfig.from_json(tmp_path / "config.json")


def test_broken_json_is_named(tmp_path: Path) -> None:
    """A truncated config.json is an error with its path."""
    (tmp_path / "config.json").write_text('{"model_type": "gp')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        GPTConfig.from_json(tmp_path / "config.json")


def test_config_round_trip(tmp_path: Path) -> None:
    """to_json keeps everything that from_json reads."""
    config = GPTConfig(64, 16, 8, 2, 2, layer_norm_epsilon=1e-4, tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json(eos_token_id=3)))
    assert GPTConfig.from_json(tmp_path / "config.json") == config


def test_dropout_of_the_file_is_not_taken_over(tmp_path: Path) -> None:
    """GPT-2's own config.json says 0.1; fine-tuning starts from 0."""
    path = write(tmp_path / "config.json", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
    assert GPTConfig.from_json(path).dropout == 0.0


@pytest.mark.parametrize("settings", [{"n_embd": 10, "n_head": 3}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_impossible_shapes_are_refused(settings: dict[str, Any]) -> None:
    """Refused when the config is built, not in a forward pass."""
    with pytest.raises(ValueError, match="|".join(settings)):
        GPTConfig(**settings)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_in_another_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    """Editors of Windows write a byte order mark, or UTF-16."""
    (tmp_path / "config.json").write_bytes(
        json.dumps({**SMALL, "name": "größe"}, ensure_ascii=False).encode(encoding)
    )
    assert GPTConfig.from_json(tmp_path / "config.json").n_embd == 8


def test_latin_1_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(
        json.dumps({**SMALL, "name": "größe"}, ensure_ascii=False).encode("latin-1")
    )
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON: it is not UTF-8, save it as UTF-8"):
        GPTConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon = nan is not a number between 0 and 1"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon = inf"),
        ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon = -1e-05"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon = '1e-5'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false' is neither true nor false"),
        ({"n_layer": 10**9}, "n_layer = 1000000000 is more than 1000"),
        ({"vocab_size": 2**64}, "vocab_size = 18446744073709551616 is more than"),
        ({"n_embd": 10, "n_head": 3}, r"config\.json: n_embd 10 is not divisible by n_head 3"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config says .*dequantize"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Also those that would make torch build blocks for hours, or compute NaN."""
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_json(write(tmp_path / "config.json", **changes))
