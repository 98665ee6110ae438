"""From rows to token files: which rows are kept, dropped, cut or held out, and what is counted and hashed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.data.config import PrepareConfig
from model.data.layout import find_splits
from model.data.preparing import prepare, small_splits, training_keys
from model.data.rows import row_key
from model.data.schemas import normalize_row
from model.data.tokens import CodeAlpacaDataset, read_meta
from model.net.prompt import encode, encode_examples, format_prompt

CONFIG = PrepareConfig(max_length=80, test_share=0.2, validation_share=0.2)
SPLITS = ("train", "validation", "test")


@pytest.fixture
def run(
    tmp_path: Path, tokenizer: Any, write_jsonl: Callable[..., Path]
) -> Callable[..., tuple[dict[str, Any], Path]]:
    """run(rows, test=..., max_length=...): prepare those records; meta and directory."""
    calls = count()

    def prepare_rows(
        train: list[Any], test: list[Any] | None = None, validation: list[Any] | None = None, **settings: Any
    ) -> tuple[dict[str, Any], Path]:
        folder = tmp_path / f"data{next(calls)}"
        for split, rows in (("train", train), ("test", test), ("validation", validation)):
            if rows is not None:
                write_jsonl(folder / f"{split}.jsonl", rows)
        target = folder / "tokens"
        config = PrepareConfig(**{**vars(CONFIG), **settings})
        return prepare(find_splits(folder), tokenizer, config, target), target

    return prepare_rows


def held_out(directory: Path, split: str) -> dict[str, str]:
    lines = (directory / f"{split}.rows.jsonl").read_text().splitlines()
    return {row["prompt"]: row["completion"] for row in map(json.loads, lines)}


def examples(directory: Path, split: str) -> list[tuple[list[int], int]]:
    dataset = CodeAlpacaDataset(directory, split)
    return [(dataset[i]["input_ids"].tolist(), int(dataset.lengths[i, 1])) for i in range(len(dataset))]


def test_files_hold_the_encoding_of_every_row(
    make_rows: Callable[..., Any], run: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory-mapped ids equal a direct encoding, for every row of every split, also across chunks."""
    monkeypatch.setattr("model.data.writing._CHUNK", 7)
    rows = make_rows(60)
    _, directory = run(rows)
    texts = [normalize_row(row) for row in rows]
    direct = {
        row["prompt"]: example
        for row, example in zip(
            texts,
            encode_examples(tokenizer, [r["prompt"] for r in texts], [r["completion"] for r in texts]),
            strict=True,
        )
    }
    chosen = {split: held_out(directory, split) for split in ("validation", "test")}
    for split, part in chosen.items():
        assert examples(directory, split) == [direct[prompt] for prompt in part]
    rest = [row["prompt"] for row in texts if not any(row["prompt"] in part for part in chosen.values())]
    assert examples(directory, "train") == [direct[prompt] for prompt in rest]
    assert sum(len(examples(directory, split)) for split in SPLITS) == 60


def test_chunks_do_not_change_the_files(
    make_rows: Callable[..., Any], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids and lengths of each split do not depend on the size of a chunk."""
    _, whole = run(make_rows(60))
    monkeypatch.setattr("model.data.writing._CHUNK", 4)
    _, chunked = run(make_rows(60))
    for split in SPLITS:
        assert examples(whole, split) == examples(chunked, split)


def test_counts(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """The counts in meta.json equal the contents of the files."""
    meta, directory = run(make_rows(60))
    counts = meta["counts"]
    assert counts["seen"] == 60
    assert sum(counts["rows"].values()) == 60
    assert counts["dropped"] == {}
    for split in SPLITS:
        found = examples(directory, split)
        assert counts["rows"][split] == len(found) > 0
        assert counts["tokens"][split] == sum(len(ids) for ids, _ in found)
        assert counts["target_tokens"][split] == sum(len(ids) - prompt for ids, prompt in found)
    assert read_meta(directory) == meta


def test_truncated_row_has_no_eos_and_is_counted(
    make_rows: Callable[..., Any], run: Callable[..., Any], tokenizer: Any
) -> None:
    """A cut row keeps its first max_length tokens and has no EOS."""
    meta, directory = run(make_rows(60), max_length=50)
    _, whole = run(make_rows(60))
    cut = [ids for split in SPLITS for ids, _ in examples(directory, split) if ids[-1] != tokenizer.eos_token_id]
    assert meta["counts"]["truncated"] == len(cut) > 5
    assert {len(ids) for ids in cut} == {50}
    for split in SPLITS:
        for (short, _), (full, _) in zip(examples(directory, split), examples(whole, split), strict=True):
            assert short == full[:50]


def test_row_that_just_fits_is_not_truncated(run: Callable[..., Any], make_rows: Callable[..., Any]) -> None:
    """EOS may be the last of max_length tokens."""
    _, directory = run(make_rows(60))
    longest = max(len(ids) for split in SPLITS for ids, _ in examples(directory, split))
    assert run(make_rows(60), max_length=longest)[0]["counts"]["truncated"] == 0
    assert run(make_rows(60), max_length=longest - 1)[0]["counts"]["truncated"] > 0


def test_long_prompt_is_dropped_and_counted(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """A row whose prompt alone fills max_length is dropped."""
    long = [{"prompt": f"{i} " + "very " * 200, "completion": "x"} for i in range(3)]
    meta, directory = run(make_rows(60) + long, max_dropped_share=0)
    assert meta["counts"]["dropped"] == {"prompt_too_long": 3}
    assert sum(meta["counts"]["rows"].values()) == 60
    assert all(prompt < len(ids) for split in SPLITS for ids, prompt in examples(directory, split))


def test_prompt_of_exactly_max_length_is_dropped(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """A prompt must leave room for at least one token."""
    _, whole = run(make_rows(60))
    lengths = [prompt for split in SPLITS for _, prompt in examples(whole, split)]
    limit = max(n for n in lengths if n - 1 in lengths)
    meta, directory = run(make_rows(60), max_length=limit)
    assert meta["counts"]["dropped"] == {"prompt_too_long": sum(length >= limit for length in lengths)}
    assert all(prompt < len(ids) for split in SPLITS for ids, prompt in examples(directory, split))
    assert any(prompt + 1 == len(ids) for split in SPLITS for ids, prompt in examples(directory, split))


def test_all_prompts_too_long_fails_with_numbers(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Preparation fails, with max_length and the number of dropped rows."""
    with pytest.raises(ValueError, match=r"no training row is left .*max_length 10; .*60 prompt_too_long"):
        run(make_rows(60), max_length=10)


def test_huge_row_is_cut(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """A response of 400,000 characters is cut to max_length tokens."""
    huge = [{"prompt": f"Huge {i}", "completion": "spam " * 80_000} for i in range(2)]
    meta, directory = run(make_rows(60) + huge)
    assert meta["counts"]["truncated"] == 2
    assert sum(len(ids) == 80 for split in SPLITS for ids, _ in examples(directory, split)) >= 2


def test_literal_end_of_text_is_never_eos(
    make_rows: Callable[..., Any], run: Callable[..., Any], tokenizer: Any
) -> None:
    """After prepare, each row has one EOS, the appended one."""
    marked = [{"prompt": f"<|endoftext|> {i}", "completion": f"a<|endoftext|>b\n<|endoftext|>{i}"} for i in range(10)]
    _, directory = run(make_rows(60) + marked)
    rows = [ids for split in SPLITS for ids, _ in examples(directory, split)]
    assert len(rows) == 70
    assert {ids.count(tokenizer.eos_token_id) for ids in rows} == {1}


BAD = {
    "invalid_json": '{"prompt": ',
    "not_an_object": [1],
    "missing_field": {"prompt": "p"},
    "null_field": {"prompt": "p", "completion": None},
    "not_a_string": {"prompt": "p", "completion": 3},
    "empty_field": {"prompt": "p", "completion": " "},
    "invalid_unicode": '{"prompt": "\\ud800", "completion": "c"}',
    "tests_not_strings_in_a_list": {"prompt": "p", "completion": "c", "tests": "assert True"},
}


def test_unusable_rows_are_counted_by_reason(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Each reason is counted once, and all good rows are kept."""
    meta, _ = run(make_rows(60) + list(BAD.values()), max_dropped_share=0.2)
    assert meta["counts"]["dropped"] == dict.fromkeys(BAD, 1)
    assert meta["counts"]["seen"] == 68
    assert sum(meta["counts"]["rows"].values()) == 60


def test_too_many_unusable_rows_name_the_first_five(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Above max_dropped_share the error has file, row number and reason of the first five."""
    rows = make_rows(53)
    for position, bad in zip((2, 10, 11, 30, 45, 50, 52, 53), BAD.values(), strict=True):
        rows.insert(position, bad)
    with pytest.raises(ValueError, match="8 of 61 rows") as caught:
        run(rows)
    first = [(2, "invalid_json"), (10, "not_an_object"), (11, "missing_field"), (30, "null_field")]
    first.append((45, "not_a_string"))
    assert "; ".join(f"train.jsonl row {n} ({reason})" for n, reason in first) in str(caught.value)
    assert "row 50" not in str(caught.value)


def test_rows_are_named_by_their_position_in_their_file(
    make_rows: Callable[..., Any], write_jsonl: Callable[..., Path], tokenizer: Any, tmp_path: Path
) -> None:
    """Also if a split has several files; the message lists the fields that a row needs."""
    for name, rows in (("a", make_rows(40)), ("b", [*make_rows(3), {"text": "t"}])):
        write_jsonl(tmp_path / f"train-{name}.jsonl", rows)
    with pytest.raises(ValueError, match="Rows have prompt and completion") as caught:
        prepare(find_splits(tmp_path), tokenizer, PrepareConfig(max_dropped_share=0.0), tmp_path / "tokens")
    assert "train-b.jsonl row 3 (missing_field)" in str(caught.value)


def test_an_empty_split_names_a_share_that_fills_it(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """A share so small that it draws no row is an error with a share that does."""
    rows = make_rows(20)
    with pytest.raises(ValueError, match=r"the test split of .* is empty: raise test_share, 0\.25 will do") as caught:
        run(rows, test_share=0.0)
    share = float(re.search(r"([0-9.]+) will do", str(caught.value))[1])  # type: ignore[index]
    meta, _ = run(rows, test_share=share, validation_share=share)
    assert meta["counts"]["rows"]["test"] > 0


@pytest.mark.parametrize("count", [1, 3, 9])
def test_too_few_rows_for_three_splits(make_rows: Callable[..., Any], run: Callable[..., Any], count: int) -> None:
    """LLaMA-Factory#245: no share fills the splits of so few rows, so none is suggested."""
    rows = "1 rows" if count == 1 else f"{count} rows"
    with pytest.raises(ValueError, match=rf"split of .* is empty, and {rows} are too few to draw it from: add rows"):
        run(make_rows(count), test_share=0.0)


@pytest.mark.parametrize("content", ["", "\n\n \n"])
def test_a_file_without_a_row(tmp_path: Path, tokenizer: Any, content: str) -> None:
    """litgpt#260: the message says so, and does not speak of windows and lengths."""
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"there is no row in .*rows\.jsonl: is the file complete\?"):
        prepare(find_splits(tmp_path), tokenizer, PrepareConfig(), tmp_path / "tokens")


def test_threshold_is_a_share(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Exactly max_dropped_share passes; one unusable row more fails."""
    bad = [{"prompt": "p"}] * 3
    run(make_rows(57) + bad, max_dropped_share=0.05)
    with pytest.raises(ValueError, match="max_dropped_share"):
        run(make_rows(56) + bad + bad[:1], max_dropped_share=0.05)


def test_failed_prepare_leaves_nothing(
    make_rows: Callable[..., Any], run: Callable[..., Any], tmp_path: Path
) -> None:
    """A failed preparation leaves no token directory, not even an incomplete one."""
    with pytest.raises(ValueError, match="no training row"):
        run(make_rows(60), max_length=10)
    assert [p.name for p in (tmp_path / "data0").iterdir()] == ["train.jsonl"]


def test_splits_share_no_prompt(make_rows: Callable[..., Any], run: Callable[..., Any], tokenizer: Any) -> None:
    """Copies of a prompt in another case and with another answer are in the same split."""
    copies = [{"prompt": f"  {normalize_row(row)['prompt'].upper()}", "completion": "other"} for row in make_rows(60)]
    meta, directory = run(make_rows(60) + copies, max_length=512)
    assert sum(meta["counts"]["rows"].values()) == 120
    prompts: dict[str, set[str]] = {}
    for split in SPLITS:
        texts = [tokenizer.decode(ids[:n]) for ids, n in examples(directory, split)]
        prompts[split] = {" ".join(text.lower().split()) for text in texts}
        assert len(texts) == 2 * len(prompts[split]) > 5  # both copies of each
    assert len(set.union(*prompts.values())) == 60 == sum(map(len, prompts.values()))


def test_given_splits_are_used_and_leaks_dropped(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Test and validation files are used completely; training rows with a prompt of theirs are dropped."""
    rows = make_rows(60)
    meta, directory = run(rows, test=rows[:4], validation=rows[3:8])
    assert meta["counts"]["rows"] == {"train": 52, "validation": 4, "test": 4}
    assert meta["counts"]["dropped"] == {"prompt_in_held_out": 9}  # 8 of train, 1 of validation
    assert list(held_out(directory, "test")) == [normalize_row(row)["prompt"] for row in rows[:4]]


def test_splits_do_not_move_when_rows_are_added(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Held-out rows stay held out when rows are added before, after or between them."""
    old, new = make_rows(60), make_rows(200)[60:]
    _, before = run(old)
    for grown in (old + new, new + old, new[:70] + list(reversed(old)) + new[70:]):
        _, after = run(grown)
        for split in ("validation", "test"):
            was, now = held_out(before, split), held_out(after, split)
            assert was.items() <= now.items()
            added = {normalize_row(row)["prompt"] for row in new}
            assert now.keys() - was.keys() <= added


def test_split_seed(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """The same seed draws the same held-out rows; another seed draws others."""
    first, again, other = (held_out(run(make_rows(60), split_seed=seed)[1], "test") for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_subset_windows(make_rows: Callable[..., Any], run: Callable[..., Any], tokenizer: Any) -> None:
    """Consecutive windows cover train exactly once and have the same held-out rows."""
    _, whole = run(make_rows(60))
    trained: list[Any] = []
    for start in (0, 20, 40):
        meta, part = run(make_rows(60), subset_start=start, subset_count=20)
        assert meta["counts"]["seen"] == 20
        for split in ("validation", "test"):
            assert examples(part, split) == examples(whole, split)
        trained += examples(part, "train")
    assert trained == examples(whole, "train")
    tail = examples(run(make_rows(60), subset_start=50)[1], "train")
    assert trained[-len(tail) :] == tail


def test_subset_beyond_the_end_is_refused(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """A window without rows is an error that names it."""
    with pytest.raises(ValueError, match=r"no training row is left .*subset_start 60"):
        run(make_rows(60), subset_start=60)


def test_bad_rows_outside_the_subset_do_not_count(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """max_dropped_share applies to the rows of the subset only."""
    meta, _ = run(make_rows(60) + [{"prompt": "p"}] * 30, subset_count=60, max_dropped_share=0)
    assert meta["counts"]["dropped"] == {}


def test_empty_held_out_split_is_refused(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """Training without held-out rows is refused; the message names the setting to raise."""
    with pytest.raises(ValueError, match="raise validation_share"):
        run(make_rows(60), validation_share=0.0)
    with pytest.raises(ValueError, match="raise test_share"):
        run(make_rows(60), test_share=0.0)


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_data_sha256_is_over_all_rows(make_rows: Callable[..., Any], run: Callable[..., Any], field: str) -> None:
    """A change of one character in any row changes the sha256; equal rows have equal ones."""
    rows = [normalize_row(row) for row in make_rows(60)]
    shas = {run(rows)[0]["data_sha256"], run(rows)[0]["data_sha256"]}
    assert len(shas) == 1
    for i in (0, 31, 57, 58, 59):
        changed = [dict(row) for row in rows]
        changed[i][field] += "!"
        shas.add(run(changed)[0]["data_sha256"])
    assert len(shas) == 6


def test_data_sha256_sees_text_that_is_cut(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """It is computed over the rows' text, including text beyond max_length."""
    rows = [normalize_row(row) for row in make_rows(60)]
    changed = [dict(row) for row in rows]
    changed[59]["completion"] += " " * 3 + "# the end"
    assert run(rows, max_length=45)[0]["data_sha256"] != run(changed, max_length=45)[0]["data_sha256"]


# Subsets by content


def _keys(rows: list[Any]) -> list[int]:
    return [row_key(normalize_row(row)) for row in rows]


@pytest.fixture
def keys_of(tmp_path: Path, tokenizer: Any, write_jsonl: Callable[..., Path]) -> Callable[..., tuple[Any, Any]]:
    """keys_of(rows, test=..., max_length=...): the keys of rows that may train, and of those held out."""

    def read(train: list[Any], test: list[Any] | None = None, **settings: Any) -> tuple[Any, Any]:
        folder = tmp_path / f"keys{len(list(tmp_path.iterdir()))}"
        for split, rows in (("train", train), ("test", test)):
            if rows is not None:
                write_jsonl(folder / f"{split}.jsonl", rows)
        return training_keys(find_splits(folder), tokenizer, PrepareConfig(**{**vars(CONFIG), **settings}))

    return read


@pytest.mark.parametrize("own_test", [True, False])
def test_training_keys_are_of_the_rows_that_train(
    make_rows: Callable[..., Any],
    run: Callable[..., Any],
    keys_of: Callable[..., Any],
    tmp_path: Path,
    tokenizer: Any,
    own_test: bool,
) -> None:
    """The keys are exactly those of the rows that prepare keeps: none held out, repeated, unusable or too long."""
    rows = [normalize_row(row) for row in make_rows(60)]
    test = rows[:6] if own_test else None
    long = {"prompt": "q r " * 60, "completion": "c"}  # like the next row, drawn into train
    just = {"prompt": "Write a function that adds 1 to a price, and so on.", "completion": "c"}
    text = format_prompt(just)
    assert len(encode(tokenizer, [text])[0]) < CONFIG.max_length <= len(text.encode())  # more bytes, but not tokens
    given = [*rows, long, just, rows[30], {"prompt": "p"}]
    train, held_out = keys_of(given, test)
    meta, directory = run(given, test)
    assert meta["counts"]["dropped"]["prompt_too_long"] == 1
    own = [row for split in ("validation", "test") for row in _rows_of(directory, split)]
    assert sorted(held_out.tolist()) == sorted(set(_keys(own)))
    assert set(train.tolist()) == set(_keys([*rows, just])) - set(held_out.tolist())
    assert len(set(train.tolist())) == len(train)
    assert train.tolist() == [key for key in _keys([*rows, just]) if key in set(train.tolist())]
    np.save(tmp_path / "all.npy", train)
    chosen, _ = run(given, test, subset_keys=str(tmp_path / "all.npy"), max_dropped_share=0)
    assert chosen["counts"]["tokens"] == meta["counts"]["tokens"]
    assert chosen["data_sha256"] == meta["data_sha256"]


def _rows_of(directory: Path, split: str) -> list[dict[str, Any]]:
    lines = (directory / f"{split}.rows.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "row"} for line in lines]


def test_a_subset_by_content_is_found_in_any_order(
    make_rows: Callable[..., Any], run: Callable[..., Any], keys_of: Callable[..., Any], tmp_path: Path
) -> None:
    """The same rows are found in a reordered file with others between them; held-out rows stay the same."""
    rows = [normalize_row(row) for row in make_rows(90)]
    train, _ = keys_of(rows[:60])
    np.save(tmp_path / "some.npy", train[5:15])
    _, here = run(rows[:60], subset_keys=str(tmp_path / "some.npy"))
    meta, there = run(rows[::-1], subset_keys=str(tmp_path / "some.npy"))
    assert examples(there, "train") == examples(here, "train")[::-1]
    assert meta["counts"]["rows"]["train"] == 10
    _, whole = run(rows[::-1])
    assert held_out(there, "test") == held_out(whole, "test")
    assert held_out(there, "validation") == held_out(whole, "validation")


def test_unusable_rows_are_an_error_before_anything_is_chosen(
    make_rows: Callable[..., Any], keys_of: Callable[..., Any]
) -> None:
    """training_keys refuses too many unusable rows and names the first."""
    with pytest.raises(ValueError, match=r"20 of 80 rows .*max_dropped_share.*train\.jsonl row 60 \(missing_field\)"):
        keys_of(make_rows(60) + [{"prompt": "p"}] * 20)


def test_large_vocabulary_is_stored_in_four_bytes(
    make_rows: Callable[..., Any], run: Callable[..., Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids above 65,535 are stored without overflow."""
    assert run(make_rows(60))[0]["dtype"] == "<u2"
    real = encode_examples
    shift = 70_000
    monkeypatch.setattr(type(tokenizer), "__len__", lambda self: 100_000)
    monkeypatch.setattr(
        "model.data.writing.encode_examples",
        lambda *args: [([i + shift for i in ids], prompt) for ids, prompt in real(*args)],
    )
    meta, directory = run(make_rows(60))
    assert meta["dtype"] == "<u4"
    assert min(i for ids, _ in examples(directory, "train") for i in ids) >= shift


def test_what_a_small_split_needs(make_rows: Callable[..., Any], run: Callable[..., Any]) -> None:
    """None of 30 rows warns; the share that is named gives enough; a split with files of its own needs rows there."""
    meta, _ = run(make_rows(200), validation_share=0.1, test_share=0.3)
    (warning,) = small_splits(meta["counts"]["rows"], meta["sources"])
    assert "set validation_share=0.225, or add rows" in warning
    meta, _ = run(make_rows(200), validation_share=0.225, test_share=0.3)
    assert meta["counts"]["rows"]["validation"] >= 30
    assert small_splits(meta["counts"]["rows"], meta["sources"]) == []
    own = [{"split": "train", "rows": 100}, {"split": "test", "rows": 29}]
    (warning,) = small_splits({"validation": 30, "test": 29}, own)
    assert warning.endswith("add rows to the files of test")
