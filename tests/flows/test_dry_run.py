"""What a run would need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.arguments import parse
from flows.dry_run import show_estimate

Show = Callable[..., dict[str, str]]


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """show(words): the table of a dry run, by name; it writes nothing into the data root."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: str) -> dict[str, str]:
        show_estimate(parse(words))
        assert not (tmp_path / "root").exists()
        lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        return {name.strip(): value.strip() for _, name, value, _ in lines}

    return run


def test_the_embedded_rows(show: Show) -> None:
    """The same numbers as in the plan of a run."""
    table = show("tiny")
    assert list(table) == ["model", "rows", "tokens", "steps", "device", "memory", "disk", "time"]
    assert table["model"] == "tiny, 3,554,304 parameters, 890,112 train (25.0%)"
    assert table["rows"] == "3,426 train, 174 validation, 324 test"
    assert table["tokens"] == "189,188 an epoch"
    assert table["steps"] == "430 of 16 rows"
    # 4 bytes for each frozen parameter; 16 for each that trains: itself, its gradient and two moments.
    gigabytes = (4 * (3_554_304 - 890_112) + 16 * 890_112) / 1e9
    assert table["memory"].startswith(f"{gigabytes:.2f} GB for weights, gradients and AdamW")
    assert table["time"].startswith("about ")


def test_processes_on_a_cpu(show: Show) -> None:
    """As in the plan of a run: gpus=2 must not look like gpus=1."""
    assert show("tiny", "device=cpu")["device"].startswith("cpu, ")
    assert show("tiny", "device=cpu", "gpus=2")["device"].startswith("2 processes on cpu, ")


@pytest.mark.parametrize(
    ("speed", "shown"),
    [(4e9, "4 GFLOP/s"), (0.0876e12, "87.6 GFLOP/s"), (1.2e6, "0.0012 GFLOP/s"), (7.123e14, "712 TFLOP/s")],
)
def test_a_slow_and_a_fast_device(speed: float, shown: str, show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    """The speed has three digits, and no time is 0 s."""
    monkeypatch.setattr("flows.dry_run.matmul_ceiling", lambda device, dtype: speed)
    time = show("tiny", "max_steps=1")["time"]
    assert f" at {shown} as on this device" in time
    assert not time.startswith("about 0 s")


def test_a_data_set_of_the_hub(show: Show) -> None:
    """Nothing is downloaded; what is not known is said to be so."""
    table = show("355m")
    assert table["rows"] == table["tokens"] == table["time"] == "not known before the data set is downloaded"
    assert table["model"].startswith("355m, 354,823,168 parameters")
    assert show("355m", "max_steps=70")["steps"] == "70 at most (max_steps)"


def test_rows_of_a_file_for_a_model_of_the_hub(show: Show, tmp_path: Path) -> None:
    """Rows are counted; tokens are estimated, since the tokenizer is not here."""
    rows = [{"prompt": f"Add {n}.", "completion": f"x + {n}"} for n in range(100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = show("124m", f"dataset={tmp_path}/rows.jsonl", "epochs=2", "batch_size=10")
    train, validation, test = (int(part.split()[0]) for part in table["rows"].split(", "))
    assert train + validation + test == 100
    assert table["tokens"].startswith("about (estimated with the embedded tokenizer")
    assert table["steps"] == f"{2 * -(-train // 10)} of 10 rows"
