"""Where things lie: one data root, and the tracking server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """Settings of a process, from its environment.

    Attributes:
        data_root: FINETUNE_DATA_ROOT; default ``.data`` in the checkout. What runs write lies below.
        tracking_uri: MLFLOW_TRACKING_URI; default a sqlite file in the data root.
    """

    data_root: Path
    tracking_uri: str

    @classmethod
    def load(cls) -> Settings:
        """Read the environment now.

        Raises:
            RuntimeError: this is no checkout, and FINETUNE_DATA_ROOT is not set.
        """
        if not os.environ.get("FINETUNE_DATA_ROOT") and not (PROJECT_ROOT / "prefect.yaml").exists():
            raise RuntimeError("set FINETUNE_DATA_ROOT: outside a checkout there is no place for data by default")
        root = Path(os.environ.get("FINETUNE_DATA_ROOT") or PROJECT_ROOT / ".data").expanduser().resolve()
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"
        return cls(root, uri)

    def claim_caches(self) -> None:
        """Let libraries keep below the root what they would keep in the user's home; before they are used."""
        for name, folder in (("MPLCONFIGDIR", "matplotlib"), ("TRITON_CACHE_DIR", "triton")):
            os.environ.setdefault(name, str(self.data_root / folder))

    @property
    def hub_cache(self) -> Path | None:
        """Cache of hub downloads: Hugging Face's own where HF_HOME or HF_HUB_CACHE is set, else below the root."""
        if os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE"):
            return None
        return self.data_root / "hub"

    @property
    def datasets(self) -> Path:
        """Data sets fetched from the hub, as JSON lines, by commit."""
        return self.data_root / "datasets"

    @property
    def tokens(self) -> Path:
        """Token files, by the hash of all that determines them."""
        return self.data_root / "tokens"

    @property
    def subsets(self) -> Path:
        """Content keys of the rows that nights chose."""
        return self.data_root / "subsets"

    @property
    def ledger(self) -> Path:
        """Copies of what nights used, by MLflow run; MLflow has the originals."""
        return self.data_root / "ledger"

    @property
    def models(self) -> Path:
        """Registered versions that trainings started from or were compared with."""
        return self.data_root / "models"

    @property
    def trainings(self) -> Path:
        """Trainings under way, by identity; a finished one is removed once MLflow has its model."""
        return self.data_root / "trainings"

    @property
    def trunk_outputs(self) -> Path:
        """Outputs of frozen blocks, by the hash of all that determines them."""
        return self.data_root / "trunk-outputs"

    @property
    def locks(self) -> Path:
        """Lock files of trainings."""
        return self.data_root / "locks"

    @property
    def device_locks(self) -> Path:
        """Lock files of devices, FINETUNE_LOCKS: one folder for all users and checkouts of a machine.

        Not below TMPDIR, which may differ between them.
        """
        return Path(os.environ.get("FINETUNE_LOCKS") or "/tmp/finetune-locks").expanduser().resolve()

    @property
    def trusted_hashes(self) -> Path:
        """sha256 of local weight files, recorded at first use."""
        return self.data_root / "trusted-weights.json"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts when tracking goes to the local sqlite file."""
        return self.data_root / "mlflow" / "artifacts"
