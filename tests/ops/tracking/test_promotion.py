"""Who becomes champion: what is surely better, of the champion of the moment; and how one gets back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest

from ops.settings import Settings
from ops.tracking import promotion as promotion_module
from ops.tracking.connection import client
from ops.tracking.models import log_model
from ops.tracking.promotion import MIN_ROWS, Verdict, announce, complete_promotion, judge, roll_back, settle
from ops.tracking.runs import RunRef, tracked_run

_numbers = count()


def _records(gain: float, rows: int = 200) -> list[dict[str, float]]:
    """A test split on which the loss fell by about ``gain``."""
    generator = np.random.default_rng(0)
    base = generator.gamma(4, 0.3, rows)
    new = base - gain - generator.normal(0, 0.05, rows)
    tokens = generator.integers(5, 90, rows)
    return [
        {"base_loss": before * number, "loss": after * number, "tokens": number}
        for before, after, number in zip(base, new, tokens, strict=True)
    ]


def _judge(records: list[dict[str, float]], rival: list[float] | None = None, margin: float = 0.01) -> Verdict:
    return judge(records, rival, "the champion models:/m/1", "1", margin, seed=1)


@pytest.mark.parametrize(
    ("gain", "margin", "promoted", "word"),
    [
        (0.05, 0.01, True, "better: "),
        (0.05, 0.06, False, "not surely better: "),
        (0.003, 0.0, False, "not surely better: "),  # less than chance could make of it
        (-0.05, 0.0, False, "worse: "),
    ],
)
def test_the_lower_bound_decides(gain: float, margin: float, promoted: bool, word: str) -> None:
    """Better by more than the margin, and surely so; the reason says by how much, against whom and what was asked."""
    verdict = _judge(_records(gain), margin=margin)
    assert verdict.promoted is promoted
    assert verdict.reason.startswith(word)
    assert verdict.improvement is not None
    assert verdict.improvement.mean == pytest.approx(gain, abs=0.01)
    for part in (
        f"{abs(verdict.improvement.mean):.4f} nats",
        "200 test rows",
        "models:/m/1",
        f"{margin:g} was asked",
    ):
        assert part in verdict.reason
    assert ("below" if verdict.improvement.mean > 0 else "above") in verdict.reason


def test_a_tie_is_refused() -> None:
    """A training whose best step is its beginning gives the champion again: nothing was gained, and it says so."""
    records = [{**record, "loss": record["base_loss"]} for record in _records(0.0)]
    verdict = _judge(records, margin=0.0)
    assert (verdict.promoted, verdict.reason[:10]) == (False, "no better:")


def test_it_is_compared_with_the_rival() -> None:
    """Far better than what it started from is not enough where the champion is better still."""
    records = _records(0.5)
    assert _judge(records).promoted
    assert not _judge(records, rival=[record["loss"] - 0.1 * record["tokens"] for record in records]).promoted


def test_few_rows_tell_nothing() -> None:
    """Below the minimum the interval would be too narrow, and three lucky rows would do."""
    records = _records(0.5, MIN_ROWS)
    assert _judge(records).promoted
    verdict = _judge(records[1:])
    assert not verdict.promoted
    assert f"{MIN_ROWS - 1} of test were scored, {MIN_ROWS} are needed; raise score_rows" in verdict.reason


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_model_that_is_broken_is_refused(loss: float) -> None:
    """A comparison with NaN must not end in its favour, nor end the run."""
    records = _records(0.5)
    records[7]["loss"] = loss
    verdict = _judge(records)
    assert not verdict.promoted
    assert "1 of 200 rows have a loss that is not finite" in verdict.reason


# In the registry


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    root = tmp_path_factory.mktemp("promotion")
    return Settings(root, f"sqlite:///{root}/mlflow/mlflow.db")


class Registry:
    """A registered model of the test's own."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.name = f"gpt2-code-{next(_numbers)}"
        self.mlflow = client(settings.tracking_uri)
        self.directory = settings.data_root / "model"
        self.directory.mkdir(exist_ok=True)
        (self.directory / "config.json").write_text("{}")

    def register(self) -> tuple[RunRef, Any]:
        with tracked_run(self.settings, "a run", {}, {}) as run:
            return run, log_model(run, self.directory, self.name, {}, {"test/loss": 1.0}, 1)

    def settle(self, promoted: bool, previous: str | None) -> tuple[RunRef, Any, Verdict]:
        run, version = self.register()
        reached = _judge(_records(0.1 if promoted else -0.1))
        return run, version, settle(run, version, Verdict(promoted, reached.reason, reached.improvement, previous))

    def alias(self, name: str) -> str | None:
        number = self.mlflow.get_registered_model(self.name).aliases.get(name)
        return None if number is None else str(number)

    def tags(self, version: str) -> dict[str, str]:
        return dict(self.mlflow.get_model_version(self.name, version).tags)


@pytest.fixture
def registry(store: Settings) -> Registry:
    return Registry(store)


def test_a_better_version_becomes_champion(registry: Registry) -> None:
    """Alias, tags of the version, tags and metrics of the run."""
    registry.settle(True, None)
    run, _, verdict = registry.settle(True, "1")
    assert registry.alias("champion") == "2"
    assert registry.alias("challenger") is None
    tags = registry.tags("2")
    assert tags["previous_champion"] == "1"
    assert tags["reason"] == verdict.reason
    described = registry.mlflow.get_model_version(registry.name, "2").description
    assert described.startswith(f"**Champion: {verdict.reason}.**")
    assert tags["promoted_at"].startswith("20")
    assert verdict.improvement is not None
    assert tags["interval"] == f"{verdict.improvement.lower:.6f} to {verdict.improvement.upper:.6f}"
    found = registry.mlflow.get_run(run.run_id).data
    assert (found.tags["promotion"], found.tags["promotion_reason"]) == ("champion", verdict.reason)
    assert found.metrics["promotion/lower"] == verdict.improvement.lower


def test_a_worse_version_becomes_challenger(registry: Registry) -> None:
    """The champion stays, the reason is kept with the version that was refused."""
    registry.settle(True, None)
    run, _, verdict = registry.settle(False, "1")
    assert (registry.alias("champion"), registry.alias("challenger")) == ("1", "2")
    assert registry.tags("2")["reason"] == verdict.reason
    assert "promoted_at" not in registry.tags("2")
    assert registry.mlflow.get_run(run.run_id).data.tags["promotion"] == "challenger"


def test_the_champion_of_the_moment_counts(registry: Registry) -> None:
    """Better than a champion that has been replaced meanwhile is not better than the one that is."""
    registry.settle(True, None)
    registry.settle(True, "1")
    _, _, verdict = registry.settle(True, "1")
    assert not verdict.promoted
    assert "the champion became version 2 while this was compared with 1" in verdict.reason
    assert (registry.alias("champion"), registry.alias("challenger")) == ("2", "3")


def test_two_promotions_at_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both were better than version 1: one becomes champion, the other hears of it, and rollback leads back to 1."""
    registry.settle(True, None)
    both = [registry.register() for _ in range(2)]
    verdict = replace(_judge(_records(0.1)), previous="1")
    real = promotion_module.log_metrics
    # Between the look at the champion and its change.
    monkeypatch.setattr("ops.tracking.promotion.log_metrics", lambda *metrics: (time.sleep(0.5), real(*metrics)))
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda registered: settle(*registered, verdict), both))
    assert sorted(verdict.promoted for verdict in verdicts) == [False, True]
    assert roll_back(registry.settings.tracking_uri, registry.name)[1] == "1"


def test_settling_again_changes_nothing(registry: Registry) -> None:
    """A task that is tried again after half its work: the version does not become its own predecessor."""
    registry.settle(True, None)
    run, version, verdict = registry.settle(True, "1")
    tags = registry.tags("2")
    assert settle(run, version, verdict) == verdict
    assert registry.tags("2") == tags
    assert registry.alias("champion") == "2"


def test_a_repeated_run_finds_itself_champion(registry: Registry) -> None:
    """It was killed behind its promotion: compared with itself it is no better, and stays what it was made."""
    registry.settle(True, None)
    _, version, verdict = registry.settle(True, "1")
    again, _ = registry.register()
    equal = Verdict(False, "no better: on every test row it equals the champion", None, "2")
    assert settle(again, version, equal) == replace(verdict, improvement=None)
    assert registry.mlflow.get_run(again.run_id).data.tags["promotion_reason"] == verdict.reason
    assert registry.alias("champion") == "2"
    assert registry.tags("2")["previous_champion"] == "1"


def test_a_run_killed_before_its_own_tag_gets_it(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the alias and the tag of the run; the ledger reads the tag."""
    uri = registry.settings.tracking_uri
    assert complete_promotion(uri, registry.name) is None
    with monkeypatch.context() as patch:
        patch.setattr("ops.tracking.promotion.set_tags", _killed)
        with pytest.raises(KeyboardInterrupt):
            registry.settle(True, None)
    version = registry.mlflow.get_model_version(registry.name, "1")
    assert registry.alias("champion") == "1"
    assert "promotion" not in registry.mlflow.get_run(version.run_id).data.tags
    assert complete_promotion(uri, registry.name) == version.run_id
    tags = registry.mlflow.get_run(version.run_id).data.tags
    assert (tags["promotion"], tags["promotion_reason"]) == ("champion", version.tags["reason"])
    assert complete_promotion(uri, registry.name) is None


def _killed(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_what_is_no_interrupted_promotion(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A champion made by hand, and one whose run was deleted: its rows are free again."""
    uri = registry.settings.tracking_uri
    run, _ = registry.register()
    registry.mlflow.set_registered_model_alias(registry.name, "champion", "1")
    assert complete_promotion(uri, registry.name) is None
    with monkeypatch.context() as patch:
        patch.setattr("ops.tracking.promotion.set_tags", _killed)
        with pytest.raises(KeyboardInterrupt):
            registry.settle(True, "1")
    registry.mlflow.delete_run(registry.mlflow.get_model_version(registry.name, "2").run_id)
    assert complete_promotion(uri, registry.name) is None
    assert "promotion" not in registry.mlflow.get_run(run.run_id).data.tags


def test_a_champion_has_its_tags_before_it_is_one(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """When MLflow goes away in between, nothing points at a version that cannot be rolled back."""
    registry.settle(True, None)

    def away(*arguments: Any) -> None:
        raise ConnectionError("injected")

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.set_registered_model_alias", away)
        with pytest.raises(ConnectionError):
            registry.settle(True, "1")
    assert registry.alias("champion") == "1"
    assert registry.tags("2")["previous_champion"] == "1"


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    told: list[Any] = []
    monkeypatch.setattr("ops.tracking.promotion.notify", lambda *notice: told.append(notice))
    return told


@pytest.mark.parametrize("promoted", [True, False])
def test_people_are_told(registry: Registry, notices: list[Any], promoted: bool) -> None:
    """The news, the reason, the way back, and where to look."""
    run, version, verdict = registry.settle(promoted, None)
    served = RunRef("http://127.0.0.1:5000", run.experiment_id, run.run_id)
    announce(served, version, Verdict(promoted, verdict.reason, verdict.improvement, "7"))
    ((title, lines, links),) = notices
    assert title == f"models:/{registry.name}/1 is {'champion' if promoted else 'refused: the champion stays'}"
    assert lines[0] == verdict.reason
    assert ("version 7" in lines[-1]) is promoted
    assert links == {"MLflow run": served.url}


def test_roll_back_and_forward(registry: Registry) -> None:
    """Back twice, and the next promotion goes on from there."""
    for previous in (None, "1", "2"):
        registry.settle(True, previous)
    uri = registry.settings.tracking_uri
    assert roll_back(uri, registry.name) == ("3", "2")
    assert roll_back(uri, registry.name) == ("2", "1")
    assert registry.alias("champion") == "1"
    assert "rolled_back_at" in registry.tags("3")
    assert "rolled_back_at" not in registry.tags("1")
    registry.settle(True, "1")
    assert roll_back(uri, registry.name) == ("4", "1")


def test_what_cannot_be_rolled_back(registry: Registry) -> None:
    """No model, no champion, no predecessor, one that was deleted: each is a sentence, and nothing moves."""
    uri = registry.settings.tracking_uri
    with pytest.raises(LookupError, match=rf"{registry.name} has no champion at sqlite:.*MLFLOW_TRACKING_URI"):
        roll_back(uri, registry.name)
    registry.settle(False, None)
    with pytest.raises(LookupError, match="has no champion"):
        roll_back(uri, registry.name)
    registry.settle(True, None)
    with pytest.raises(
        LookupError, match=r"/2 is the first champion.*nights then stop, until a run with start_from=base"
    ):
        roll_back(uri, registry.name)
    registry.settle(True, "2")
    registry.mlflow.delete_model_version(registry.name, "2")
    with pytest.raises(LookupError, match=r"was version 2, which is no longer registered: set the alias"):
        roll_back(uri, registry.name)
    assert registry.alias("champion") == "3"
    registry.mlflow.set_registered_model_alias(registry.name, "champion", "1")
    with pytest.raises(LookupError, match="/1 was made champion by hand"):
        roll_back(uri, registry.name)
    assert registry.alias("champion") == "1"
