"""References that tasks pass to one another: where files lie and what they hold, never tensors, models or rows.

Prefect hashes and may store every argument and result, so these stay small and plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.engine.checkpoint import checkpoint_path
from model.engine.config import TrainConfig
from model.engine.trainer import JOURNAL_FILE, TrainResult
from model.evaluation.comparison import Difference
from model.files import sha256_file
from model.net.freezing import FreezePlan
from ops.tracking.runs import RunRef


@dataclass(frozen=True)
class FileRef:
    """A file that was verified when the reference was made."""

    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class DatasetRef:
    """A data set as files by split.

    Attributes:
        source: hub id, path or "demo", as the user gave it.
        revision: the hub commit; None for local files.
        splits: split -> files.
        left_out: a line for each split of a card that is not used, with the reason.
    """

    source: str
    revision: str | None
    splits: dict[str, list[FileRef]]
    left_out: tuple[str, ...] = ()

    @property
    def paths(self) -> dict[str, list[Path]]:
        """The files alone, by split."""
        return {split: [Path(file.path) for file in files] for split, files in self.splits.items()}

    def check(self) -> None:
        """Compare the files with what they were when the reference was made.

        Raises:
            ValueError: one has been changed since; the message names it.
        """
        for file in (file for files in self.splits.values() for file in files):
            if sha256_file(Path(file.path)) != file.sha256:
                raise ValueError(f"{file.path} has been changed since this run began: start the run again")


@dataclass(frozen=True)
class WeightsRef:
    """A base model's directory in Hugging Face's layout.

    Attributes:
        source: hub id, path or "embedded".
        revision: the hub commit; None for a local directory.
        files: file name -> sha256 of config and weights, and of what else the hub has beside them.
        tokenizer_directory: holds the tokenizer; often the same.
        tokenizer_files: file name -> sha256 of the files that the tokenizer is made from.
    """

    source: str
    revision: str | None
    directory: str
    files: dict[str, str]
    tokenizer_directory: str
    tokenizer_files: dict[str, str]


@dataclass(frozen=True)
class Sources:
    """The result of ``download``."""

    dataset: DatasetRef
    weights: WeightsRef


@dataclass(frozen=True)
class TokensRef:
    """Token files of the three splits.

    Attributes:
        directory: as written by ``model.data.preparing.prepare``.
        key: hash of all that determines the files.
        data_sha256: over all rows used.
        counts: rows, tokens and dropped rows, as in meta.json.
        sources: for each file read its path, its split and the number of its rows.
    """

    directory: str
    key: str
    data_sha256: str
    counts: dict[str, Any]
    sources: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class SubsetRef:
    """The rows that a night chose.

    Attributes:
        folder: holds the night's part of the ledger.
        keys: file with the content keys of the rows to train on.
        sha256: over those keys.
        fresh: rows that no successful night has trained on.
        replay: rows mixed in that one has.
    """

    folder: str
    keys: str
    sha256: str
    fresh: int
    replay: int


@dataclass(frozen=True)
class ModelRef:
    """A base model whose every key and shape was checked.

    Attributes:
        model_size: the preset it has the shape of.
        sha256: over its config and weight files.
        config: the shape, as GPTConfig's fields.
        files, tokenizer_files: file name -> sha256; each loading compares them.
    """

    model_size: str
    directory: str
    tokenizer_directory: str
    source: str
    sha256: str
    config: dict[str, Any]
    files: dict[str, str]
    tokenizer_files: dict[str, str]


@dataclass(frozen=True)
class TrainingRef:
    """A training that is about to begin: all that determines it, and where it lies.

    Attributes:
        tokens, model, plan, config: the rows, the base, the parameters that train, the hyper-parameters.
        determinants: what the identity is made of, as JSON.
        identity: sha256 over the determinants; a checkpoint is resumed by a training of the same identity only.
        directory: of its checkpoints and its journal.
    """

    tokens: TokensRef
    model: ModelRef
    plan: FreezePlan
    config: TrainConfig
    determinants: dict[str, Any]
    identity: str
    directory: str


@dataclass(frozen=True)
class CheckpointRef:
    """A finished training.

    Attributes:
        directory: of the training.
        best_step: step of the checkpoint with the lowest validation loss.
        best_eval_loss, base_eval_loss: that loss, and the base's, in nats per response token.
        steps: optimizer steps done.
        resumed_from: step at which its last attempt resumed it; 0 for none.
        micro_batch_tokens: tokens that one pass of it took in the end.
    """

    directory: str
    best_step: int
    best_eval_loss: float
    base_eval_loss: float
    steps: int
    resumed_from: int
    micro_batch_tokens: int

    @classmethod
    def of(cls, directory: Path, found: TrainResult | TrialOutcome) -> CheckpointRef:
        """The reference to a training in a directory, of which it is known how it ended, validations included."""
        assert found.best_eval_loss is not None
        assert found.base_eval_loss is not None
        return cls(
            directory=str(directory),
            best_step=found.best_step,
            best_eval_loss=found.best_eval_loss,
            base_eval_loss=found.base_eval_loss,
            steps=found.steps,
            resumed_from=found.resumed_from,
            micro_batch_tokens=found.micro_batch_tokens,
        )

    @property
    def best(self) -> str:
        """The directory of the best checkpoint."""
        return str(checkpoint_path(Path(self.directory), self.best_step))

    @property
    def journal(self) -> str:
        """The file of its metrics, one JSON line a step."""
        return str(Path(self.directory) / JOURNAL_FILE)


@dataclass(frozen=True)
class TrialRef:
    """A trial of a sweep that is about to begin.

    Attributes:
        name: what differs from the other trials, such as "lr 0.0003".
        changes: the values that the grid gives it, by parameter.
        params: all parameters, as a run of this training alone would log them.
        training: it lies in the sweep's directory, not where the same training alone would lie.
    """

    name: str
    changes: dict[str, Any]
    params: dict[str, Any]
    training: TrainingRef


@dataclass(frozen=True)
class SweepRef:
    """A sweep that is about to begin.

    Attributes:
        identity: sha256 over the identities of its trainings; a sweep of the same identity goes on with this one.
        directory: of its trials.
        trials: in the order in which they are trained.
        end_early: whether the median rule ends trials.
        planned: names of the parameters that follow from a trial's, such as the number of its steps.
    """

    identity: str
    directory: str
    trials: tuple[TrialRef, ...]
    end_early: bool
    planned: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended, as it is recorded beside its checkpoints.

    Attributes:
        outcome: "finished", "ended early" (by the median rule), or "failed" (it diverged, or memory did not hold it).
        reason: why it was not trained to its end; empty if it was.
        attempt: at the sweep in which it ended, by the id of the sweep's MLflow run.
        steps: optimizer steps done.
        best_step: step of the lowest validation loss.
        best_eval_loss, base_eval_loss: lowest validation loss, and that of the base, in nats per response token; None
            where there was no validation.
        resumed_from: step at which the last attempt resumed it; 0 for none.
        micro_batch_tokens: tokens that one pass of it took in the end.
    """

    outcome: Literal["finished", "ended early", "failed"]
    reason: str
    attempt: str
    steps: int
    best_step: int
    best_eval_loss: float | None
    base_eval_loss: float | None
    resumed_from: int = 0
    micro_batch_tokens: int = 0

    def fits(self, status: str) -> bool:
        """Whether it is known to an MLflow run of this status: then nothing is left to be logged."""
        return status == ("FAILED" if self.outcome == "failed" else "FINISHED")

    def describe(self) -> str:
        """The outcome with its reason, on one line."""
        return f"{self.outcome}: {self.reason}" if self.reason else self.outcome


@dataclass(frozen=True)
class TrialResult:
    """A trial that has ended, and its MLflow run."""

    trial: TrialRef
    run: RunRef
    outcome: TrialOutcome

    @property
    def directory(self) -> Path:
        """Of its journal and its checkpoints."""
        return Path(self.trial.training.directory)

    @property
    def checkpoint(self) -> CheckpointRef:
        """The finished training; only the best trial of a sweep keeps its checkpoints."""
        return CheckpointRef.of(self.directory, self.outcome)


@dataclass(frozen=True)
class EvaluationRef:
    """Scores of base and tuned model on the test split.

    Attributes:
        metrics: name -> value, under the names MLflow shows.
        differences: of each score, tuned - base.
        rows: JSON file, one record per scored row (``model.evaluation.records``).
        samples: JSON file, the first completed rows.
        passes: JSON file, one record per task family with the passes of both models; empty without tests.
        humaneval: JSON file, one record per task of HumanEval; empty without humaneval_samples.
        failures: the commonest reasons why completions of the tuned model did not pass, with their numbers.
    """

    metrics: dict[str, float]
    differences: tuple[Difference, ...]
    rows: str
    samples: str
    passes: str
    humaneval: str = ""
    failures: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RivalRef:
    """The model that a new version is compared with: the champion, or without one the base that the run started from.

    Attributes:
        name: for messages.
        champion: its version; None if there is no champion.
        rows: JSON file with its summed loss on each row of the evaluation; None if the run started from it.
        trouble: why it cannot be compared with; None if it can.
    """

    name: str
    champion: str | None
    rows: str | None = None
    trouble: str | None = None
