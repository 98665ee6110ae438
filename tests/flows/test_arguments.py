"""What a command line and a file of parameters ask for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows.arguments import complaint, parse, wrong_paths
from ops.mistakes import UsageError


def test_options_are_parameters() -> None:
    """``--name value`` and ``name=value`` mean the same, and change the deployment's own."""
    words = parse(["355m", "epochs=1", "dataset=demo"])
    assert words == parse(["dataset=demo", "355m"], {"epochs": "1"})
    assert (words.deployment, words.flow) == ("355m", "finetune")
    assert words.parameters == {"model_size": "355m", "epochs": 1, "dataset": "demo"}
    assert parse([], flow="sweep").deployment == "sweep-tiny"
    assert parse(["355m"], flow="sweep").deployment == "sweep-355m"
    assert parse(["sweep-tiny"]).flow == "sweep"
    with pytest.raises(UsageError, match="epochs is given twice"):
        parse(["epochs=1"], {"epochs": "2"})


@pytest.mark.parametrize(
    ("typed", "size"),
    [
        ("124", "124m"),
        ("355", "355m"),
        ("'774'", "774m"),
        ("GPT2-medium", "355m"),
        ("gpt2", "124m"),
        ("1558M", "1558m"),
    ],
)
def test_a_size_in_other_words(typed: str, size: str) -> None:
    """As far as only one size can be meant."""
    assert parse([f"model_size={typed}"]).parameters["model_size"] == size


@pytest.mark.parametrize("typed", ["125", "medium", "1.5", "openai"])
def test_a_size_that_is_not_known(typed: str) -> None:
    """All sizes are named."""
    try:
        said = complaint(parse([f"model_size={typed}"]).parameters)
    except UsageError as error:
        said = str(error)
    assert "model_size" in (said or "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["epoch=1"], "no parameter is called epoch: did you mean epochs?"),
        (["learning-rate=1"], "no parameter is called learning-rate: did you mean learning_rate?"),
        (["LR=1"], "no parameter is called LR: did you mean learning_rate?"),
        (["wd=1"], "no parameter is called wd: `finetune run --help` lists them"),
        (["subset=next", "subset_count=5", "subset_start=1"], "subset_start 1 selects rows by position"),
        (["num_unfrozen_layers=7"], "num_unfrozen_layers 7 is not between 0 and 6"),
    ],
)
def test_a_wrong_parameter(words: list[str], said: str) -> None:
    """With what was probably meant."""
    assert (complaint(parse(words).parameters) or "").startswith(said)


def test_a_wrong_deployment() -> None:
    """With what was probably meant; a size without its letter is understood."""
    assert parse(["355"]).deployment == "355m"
    with pytest.raises(UsageError, match=r"no deployment '35m': did you mean 355m\?"):
        parse(["35m"])
    with pytest.raises(UsageError, match=r"no deployment 'other', only tiny, 124m"):
        parse(["other"])


def test_a_value_without_a_name() -> None:
    """As behind a blank too many."""
    with pytest.raises(UsageError, match=r"^=1 names no parameter: write name=value$"):
        parse(["=1"])


def test_paths_are_looked_at(tmp_path: Path) -> None:
    """What is local; the hub is not asked."""
    assert wrong_paths(parse(["355m"]).parameters) is None
    assert wrong_paths(parse([]).parameters) is None
    (tmp_path / "rows.txt").touch()
    for words, said in (
        ([f"dataset={tmp_path}"], "holds no file of .jsonl"),
        ([f"dataset={tmp_path}/rows.txt"], "is none of .jsonl"),
        ([f"dataset={tmp_path}/none"], "does not exist"),
        ([f"weights_dir={tmp_path}/rows.txt"], "is not a directory but a file"),
        (
            [f"tokenizer_dir={tmp_path}/none"],
            "/none does not exist: give a directory as transformers' save_pretrained",
        ),
        (["dataset=rows.jsonl"], f"rows.jsonl does not exist in {Path.cwd()}, where this process runs: give a file"),
        (["dataset=/dev/null"], "/dev/null is neither a file nor a folder: give a file or folder"),
    ):
        assert said in (wrong_paths(parse(words).parameters) or "")


def test_a_file_of_parameters(tmp_path: Path) -> None:
    """It changes the deployment's own, and the command line changes it."""
    path = tmp_path / "run.yaml"
    path.write_text("# tried on Monday\nepochs: 5\nmodel_size: 355\nlearning_rate: 1.0e-4\n")
    found = parse(["epochs=2"], config=path).parameters
    assert (found["epochs"], found["model_size"], found["learning_rate"]) == (2, "355m", 1e-4)
    assert found["batch_size"] == 16, "of the deployment"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("epochs: 1\n\nepoch: 2\n", "{}, line 3: no parameter is called epoch: did you mean epochs?"),
        ("epochs: 1\nbatch_size: 0\n", "{}, line 2: batch_size: at least 1 is needed, not 0"),
        ("epochs: 1\nseed: [\n", "{}, line 3 is not YAML: "),
        ("epochs: 1\nepochs: 2\n", "{}, line 2 is not YAML: the key 'epochs' is there twice"),
        ("- epochs\n", "{}, line 1: parameters are needed, one a line, such as 'epochs: 3'"),
        (None, "--config {} cannot be read: {}: No such file or directory"),
    ],
)
def test_a_wrong_file_of_parameters(tmp_path: Path, content: str | None, said: str) -> None:
    """One sentence with file and line."""
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=re.escape(said.replace("{}", str(path)))) as caught:
        parse([], config=path)
    assert "\n" not in str(caught.value)
