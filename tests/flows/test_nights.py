"""Nights on a growing file: the right rows, each once; what is better is promoted, what is not is refused."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch
import yaml

from model.data.rows import fraction, prompt_key, row_key
from model.data.schemas import normalize_row
from model.demo import grammar
from ops.tracking import rollback
from ops.tracking.connection import client
from ops.tracking.ledger import read_ledger
from ops.tracking.registry import shared_name

ROOT = Path(__file__).resolve().parents[2]
MODEL = "gpt2-code-tiny"
NIGHT: dict[str, Any] = {
    "model_size": "tiny",
    "num_unfrozen_layers": 2,
    "validation_share": 0.1,
    "max_length": 128,
    "max_steps": 24,
    "batch_size": 8,
    "learning_rate": 0.001,
    "eval_freq": 12,
    "eval_rows": 100,
    "sample_rows": 0,
    "pass_rows": 0,
    "precision": "fp32",
    "device": "cpu",
    "subset": "next",
    "subset_count": 60,
    "start_from": "champion",
    "promote": True,
}


def _key(line: str) -> int:
    return row_key(normalize_row(json.loads(line)))


def _trains(line: str) -> bool:
    """Whether a row is not drawn into validation; test is a file of its own here."""
    return fraction(prompt_key(json.loads(line)["prompt"]), 42, "validation") >= NIGHT["validation_share"]


@dataclass
class World:
    """A data set that grows, the servers' memory of it, and what has happened so far."""

    root: Path
    pool: list[str]
    data: Path
    results: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def write(self, lines: list[str]) -> None:
        (self.data / "train.jsonl").write_text("\n".join(lines) + "\n")

    def sleep_and_run(self, name: str, due: datetime | None = None, **changes: Any) -> Any:
        """A night's flow run, due now or at another time; its final state."""
        from prefect.client.orchestration import get_client
        from prefect.flow_engine import run_flow
        from prefect.states import Scheduled

        from flows.finetune import finetune

        parameters = {**NIGHT, "dataset": str(self.data), **changes}
        with get_client(sync_client=True) as prefect:
            flow_run = prefect.create_flow_run(finetune, parameters=parameters, state=Scheduled(scheduled_time=due))
        begun = time.monotonic()
        state = run_flow(finetune, flow_run=flow_run, parameters=parameters, return_type="state")
        self.seconds[name] = time.monotonic() - begun
        self.results[name] = state
        return state

    @property
    def tracking(self) -> str:
        return f"sqlite:///{self.root}/mlflow/mlflow.db"

    def runs(self) -> list[Any]:
        """All MLflow runs, the first one first."""
        mlflow = client(self.tracking)
        experiment = mlflow.get_experiment_by_name("finetune")
        return mlflow.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])

    def alias(self, name: str) -> str:
        """The number of the version that bears an alias."""
        return str(client(self.tracking).get_registered_model(MODEL).aliases[name])

    def fresh(self, run: Any) -> list[int]:
        """The rows that a run put into the ledger, in the order of the choice."""
        import mlflow

        client(self.tracking)
        return np.load(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/nightly/used.npy")).tolist()


@pytest.fixture(scope="module")
def world(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Five nights, with a duplicate, a missed and a failed run between them. Looked at by the tests below."""
    import flows.finetune as module

    base = tmp_path_factory.mktemp("nights")
    rows = base / "rows"
    rows.mkdir()
    grammar.write_rows(rows)
    pool = (rows / "train.jsonl").read_text().splitlines()[:240]
    there = World(base / "root", pool, base / "data")
    there.data.mkdir()
    test = (rows / "test.jsonl").read_text().splitlines()
    (there.data / "test.jsonl").write_text("\n".join(test[:100]) + "\n")

    def broken(*arguments: Any) -> Any:
        raise OSError("injected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_DATA_ROOT", str(there.root))
        patch.setenv("MLFLOW_TRACKING_URI", there.tracking)
        patch.setenv("PREFECT_LOGGING_TO_API_ENABLED", "false")
        there.write(pool[:100])
        there.sleep_and_run("first")
        # Rows come in the middle of a file that is written in another order.
        there.write(pool[99:49:-1] + pool[100:130] + pool[49::-1])
        there.sleep_and_run("inserted")
        there.sleep_and_run("duplicate")
        there.sleep_and_run("missed", due=datetime.now(UTC) - timedelta(hours=20))
        there.write(pool[:170])
        # Trained anew for two steps: worse than the champion.
        worse = {"start_from": "base", "max_steps": 2}
        with patch.context() as evening:
            evening.setattr(module, "evaluate", broken)
            there.sleep_and_run("failed", **worse)
        there.sleep_and_run("repeated", **worse)
        there.write(pool[:240])
        there.sleep_and_run("last", subset_count=None, max_steps=48)
        yield there


def test_the_first_night_starts_from_the_base(world: World) -> None:
    """No champion, no ledger: the first rows of the file, and what beats the base becomes champion."""
    run = world.runs()[0]
    assert world.results["first"].is_completed()
    assert world.fresh(run) == [_key(line) for line in world.pool[:100] if _trains(line)][:60]
    assert run.data.params["data/train_rows"] == "60"
    version = client(world.tracking).get_model_version(MODEL, "1")
    assert version.tags["previous_champion"] == "none"
    assert "better" in version.tags["reason"]
    assert run.data.tags["promotion"] == "champion"


def test_rows_are_known_by_content(world: World) -> None:
    """New rows first, although they stand in the middle; then what was left, as it first came, though reversed."""
    run = world.runs()[1]
    new = [_key(line) for line in world.pool[100:130] if _trains(line)]
    backlog = [_key(line) for line in world.pool[:100] if _trains(line)][60:]
    assert world.fresh(run) == new + backlog
    replayed = round(len(new + backlog) * 0.2 / 0.8)
    assert int(run.data.tags["nightly.replay"]) == replayed
    assert int(run.data.params["data/train_rows"]) == len(new + backlog) + replayed


def test_a_night_goes_on_from_the_champion(world: World) -> None:
    """It loads the version before, and is promoted over it."""
    mlflow = client(world.tracking)
    second = mlflow.get_model_version(MODEL, "2")
    assert mlflow.get_logged_model(second.source.removeprefix("models:/")).params["base"] == f"models:/{MODEL}/1"
    first, run = world.runs()[:2]
    assert run.data.metrics["untuned/test_loss"] == pytest.approx(first.data.metrics["test/loss"], abs=1e-5)
    assert second.tags["previous_champion"] == "1"
    assert float(second.tags["interval"].split(" to ")[0]) > 0.001


@pytest.mark.parametrize(("name", "state"), [("duplicate", "NothingNew"), ("missed", "CaughtUp")])
def test_nothing_to_do_costs_seconds(world: World, name: str, state: str) -> None:
    """A second run on the same rows, and one due before a night that has succeeded since: no run, no model."""
    assert world.results[name].is_completed()
    assert world.results[name].name == state
    assert world.seconds[name] < 10
    assert [run.info.status for run in world.runs()] == ["FINISHED", "FINISHED", "FAILED", "FINISHED", "FINISHED"]
    assert len(client(world.tracking).search_model_versions(f"name = '{MODEL}'")) == 4  # one for each that ended


def test_a_failed_night_is_repeated_from_its_evaluation(world: World) -> None:
    """It leaves nothing in the ledger: the next one takes the same rows, old ones too, and trains nothing again."""
    failed, repeated = world.runs()[2:4]
    assert world.results["failed"].is_failed()
    assert failed.data.tags["subset"] == repeated.data.tags["subset"]
    assert world.fresh(failed) == world.fresh(repeated) == [_key(x) for x in world.pool[130:170] if _trains(x)]
    mlflow = client(world.tracking)
    name = "train/tokens_per_second"  # measured anew, it would differ
    first, second = (mlflow.get_metric_history(run.info.run_id, name) for run in (failed, repeated))
    assert [point.value for point in second] == [point.value for point in first]
    assert len(second) == 2
    assert all(point.timestamp < repeated.info.start_time for point in second)


def test_a_worse_model_is_refused(world: World) -> None:
    """It started from the base, so that the champion was scored for it; it is registered, with the reason."""
    mlflow = client(world.tracking)
    version = mlflow.get_model_version(MODEL, "3")
    assert version.tags["reason"].startswith("worse: the loss on 100 test rows is ")
    assert f"above that of the champion models:/{MODEL}/2" in version.tags["reason"]
    assert "promoted_at" not in version.tags
    assert world.alias("challenger") == "3"
    run = world.runs()[3]
    assert run.data.tags["promotion"] == "challenger"
    # What the champion was scored with is what its own evaluation had found.
    gain = world.runs()[1].data.metrics["test/loss"] - run.data.metrics["test/loss"]
    assert run.data.metrics["promotion/mean"] == pytest.approx(gain, abs=1e-5)


def test_no_row_is_used_twice_and_none_is_forgotten(world: World) -> None:
    """Over all nights that succeeded, each row that may train was fresh once."""
    used = [key for run in world.runs() if run.info.status == "FINISHED" for key in world.fresh(run)]
    assert sorted(used) == sorted(_key(line) for line in world.pool if _trains(line))


def test_the_ledger_is_in_mlflow_alone(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine, with nothing but the tracking server the same, the next night knows all of it."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "another"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.tracking)
    assert world.sleep_and_run("elsewhere").name == "NothingNew"
    seen = read_ledger(world.tracking, MODEL, str(world.data)).seen.tolist()
    assert seen == [_key(line) for line in world.pool if _trains(line)]  # as they came, not as they were written


@pytest.mark.slow
def test_a_night_killed_in_its_promotion_counts(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the alias and the run's own tag: its model is champion, and does not train on the same rows again."""
    there = World(tmp_path / "root", [], tmp_path / "data")
    there.data.mkdir()
    grammar.write_rows(tmp_path / "rows")
    for name, count in (("train", 80), ("test", 60)):
        lines = (tmp_path / "rows" / f"{name}.jsonl").read_text().splitlines()[:count]
        (there.data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(there.root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", there.tracking)
    monkeypatch.setenv("PREFECT_LOGGING_TO_API_ENABLED", "false")

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ops.tracking.promotion.set_tags", killed)
        with pytest.raises(KeyboardInterrupt):
            there.sleep_and_run("killed", subset_count=None)
    (run,) = there.runs()
    assert there.alias("champion") == "1"
    assert run.info.status == "KILLED"
    assert there.sleep_and_run("again", subset_count=None).name == "NothingNew"
    (run,) = there.runs()
    assert run.data.tags["promotion"] == "champion"


def test_two_nights_of_a_size_wait_for_one_another(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second chooses when the first has written what it used, and finds nothing left."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(world.root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.tracking)
    hold = "import sys, time; from pathlib import Path; from ops.machine.lock import exclusive\n"
    hold += "with exclusive(Path(sys.argv[1]), sys.argv[2], 'one', print): print('held', flush=True); time.sleep(4)"
    what = shared_name(world.tracking, "nights of tiny")
    first = subprocess.Popen(
        [sys.executable, "-c", hold, os.environ["FINETUNE_LOCKS"], what],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert world.sleep_and_run("second").name == "NothingNew"
        assert first.poll() == 0
        assert world.seconds["second"] > 3.5
    finally:
        first.kill()
        first.wait()


def test_the_trunk_of_a_champion_is_the_bases(world: World) -> None:
    """So that kept trunk outputs of the same rows are found by runs that start from either."""
    from model import GPTModel, freeze_bottom_layers
    from model.data.tokens import CodeAlpacaDataset
    from model.demo import EMBEDDED_BASE
    from model.engine.engine import Engine
    from model.engine.trunk import _key as trunk_key

    tokens = next((world.root / "tokens").iterdir())
    champions = sorted((world.root / "models").glob("*-2-*/"))
    keys = set()
    for directory in (EMBEDDED_BASE, champions[0]):
        model = GPTModel.from_pretrained(directory)
        freeze_bottom_layers(model, 2)
        keys.add(trunk_key(Engine(model, torch.float32), CodeAlpacaDataset(tokens, "test")))
    assert len(keys) == 1
    freeze_bottom_layers(model, 1)  # one block deeper, and it is no longer the base's
    assert trunk_key(Engine(model, torch.float32), CodeAlpacaDataset(tokens, "test")) not in keys


def test_rollback(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`make rollback SIZE=tiny`: from champion to champion, past the one refused, until there is none before."""
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(world.root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.tracking)
    assert world.alias("champion") == "4"
    for before, now in (("4", "2"), ("2", "1")):
        assert rollback.main(["tiny"]) == 0
        assert f"was version {before}, and is version {now} again" in capsys.readouterr().out
        assert world.alias("champion") == now
        assert "rolled_back_at" in client(world.tracking).get_model_version(MODEL, before).tags
    assert rollback.main(["tiny"]) == 2
    assert f"models:/{MODEL}/1 is the first champion" in capsys.readouterr().err
    assert world.alias("champion") == "1"


def _runs_due(timezone: str, first: datetime, days: int) -> list[datetime]:
    """What Prefect's scheduler plans, asked every quarter of an hour, as it asks itself again and again."""
    from prefect.server.schemas.schedules import CronSchedule

    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    (written,) = next(d for d in deployments if d["name"] == "nightly")["schedules"]
    schedule = CronSchedule(cron=written["cron"], timezone=timezone or written["timezone"])
    due = set()
    for quarter in range(days * 96):
        start = first.astimezone(UTC) + timedelta(minutes=15 * quarter)
        due |= {date.astimezone(UTC) for date in asyncio.run(schedule.get_dates(3, start=start))}
    end = first + timedelta(days=days)
    return sorted(date for date in due if first <= date < end)


@pytest.mark.parametrize("change", [datetime(2026, 3, 29), datetime(2026, 10, 25)])
def test_one_run_a_night_when_the_clocks_change(change: datetime) -> None:
    """Two o'clock is missing in March and comes twice in October; one run a night all the same."""
    berlin = ZoneInfo("Europe/Berlin")
    noon = (change - timedelta(days=2, hours=-12)).replace(tzinfo=berlin)
    due = _runs_due("Europe/Berlin", noon, 4)
    nights = [date.astimezone(berlin).date() - change.date() for date in due]
    assert nights == [timedelta(days=day) for day in (-1, 0, 1, 2)]
    assert all(timedelta(hours=22) < later - earlier < timedelta(hours=26) for earlier, later in pairwise(due))


def test_the_schedule_is_utc_unless_changed() -> None:
    """No clock changes there: two o'clock every night."""
    due = _runs_due("", datetime(2026, 3, 27, 12, tzinfo=UTC), 4)
    assert [(date.day, date.hour) for date in due] == [(28, 2), (29, 2), (30, 2), (31, 2)]
