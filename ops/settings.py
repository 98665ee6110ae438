"""Paths and addresses: the data root with everything below it, and the tracking server."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from model.files import path_of
from ops.redaction import separate_mlflow_credentials

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class DataRootError(OSError):
    """Nothing can be written in the data root."""

    @classmethod
    def of(cls, root: Path, error: OSError) -> Self:
        """What the operating system says about a file of the data root, with the remedy."""
        where = f"{error.filename}: " if error.filename and Path(str(error.filename)) != root else ""
        return cls(
            f"nothing can be written in the data root {root} ({where}{error.strerror or error}): set "
            "FINETUNE_DATA_ROOT to a folder of yours"
        )


@dataclass(frozen=True)
class Settings:
    """Settings of a process, from its environment.

    Attributes:
        data_root: FINETUNE_DATA_ROOT, by default ``.data`` in the checkout; the folder of everything that runs write.
        tracking_uri: MLFLOW_TRACKING_URI, by default a sqlite file in the data root.
    """

    data_root: Path
    tracking_uri: str

    @classmethod
    def load(cls) -> Settings:
        """Read the current environment. A password in MLFLOW_TRACKING_URI is moved to MLFLOW_TRACKING_PASSWORD.

        A process without a home, as that of a container's user may be, gets one in the data root.

        Raises:
            ValueError: FINETUNE_DATA_ROOT is not set, and the project is installed outside a checkout; or it is no
                folder, or has a character that the URI of a database cannot hold.
        """
        if not os.environ.get("FINETUNE_DATA_ROOT") and not (PROJECT_ROOT / "prefect.yaml").exists():
            raise ValueError("set FINETUNE_DATA_ROOT: outside a checkout it has no default")
        root = path_of("FINETUNE_DATA_ROOT", os.environ.get("FINETUNE_DATA_ROOT") or str(PROJECT_ROOT / ".data"))
        if root.exists() and not root.is_dir():
            raise ValueError(f"the data root {root} is a file: set FINETUNE_DATA_ROOT to a folder")
        # SQLAlchemy takes what stands behind a "?" for options and cannot quote it: the database would be made
        # elsewhere. All other printable characters were tried.
        if "?" in str(root) or not str(root).isprintable():
            raise ValueError(
                f"the data root {str(root)!r} has a character that the address of a database cannot hold (a question "
                "mark, a control character, or bytes that are not UTF-8): set FINETUNE_DATA_ROOT to another folder"
            )
        separate_mlflow_credentials()
        _provide_home(root)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"
        return cls(root, uri)

    def claim_root(self) -> None:
        """Make the data root, and see whether files can be made in it.

        Raises:
            DataRootError: they cannot.
        """
        try:
            self.data_root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.data_root):
                pass
        except OSError as error:
            raise DataRootError.of(self.data_root, OSError(error.errno, error.strerror)) from error

    def claim_caches(self) -> None:
        """Move the caches of matplotlib and Triton from the user's home to the data root; before their first use."""
        for name, folder in (("MPLCONFIGDIR", "matplotlib"), ("TRITON_CACHE_DIR", "triton")):
            os.environ.setdefault(name, str(self.data_root / folder))

    @property
    def hub_cache(self) -> Path | None:
        """Cache of hub downloads, below the data root; None, the library's own, if HF_HOME or HF_HUB_CACHE is set."""
        if os.environ.get("HF_HOME") or os.environ.get("HF_HUB_CACHE"):
            return None
        return self.data_root / "hub"

    @property
    def tokens(self) -> Path:
        """Token files, named by the hash of everything that determines their content."""
        return self.data_root / "tokens"

    @property
    def subsets(self) -> Path:
        """Content keys of the rows that nightly runs selected."""
        return self.data_root / "subsets"

    @property
    def ledger(self) -> Path:
        """Copies of the content keys that nightly runs used, by MLflow run; MLflow has the originals."""
        return self.data_root / "ledger"

    @property
    def models(self) -> Path:
        """Registered versions that were downloaded: to start from, to compare with, or for `make sample`."""
        return self.data_root / "models"

    @property
    def trainings(self) -> Path:
        """Checkpoints of unfinished trainings, by identity; removed once MLflow has the trained model."""
        return self.data_root / "trainings"

    @property
    def trunk_outputs(self) -> Path:
        """Outputs of frozen blocks, named by the hash of everything that determines them."""
        return self.data_root / "trunk-outputs"

    @property
    def flavours(self) -> Path:
        """Files of MLflow's transformers flavour, named by the hash of everything that determines them."""
        return self.data_root / "flavours"

    @property
    def base_outputs(self) -> Path:
        """Losses and completions of bases on test rows, named by the hash of everything that determines them."""
        return self.data_root / "base-outputs"

    @property
    def locks(self) -> Path:
        """Lock files of trainings."""
        return (self.data_root / "locks").resolve()

    @property
    def device_locks(self) -> Path:
        """Lock files of devices, FINETUNE_LOCKS: one folder for all users and checkouts of a machine.

        The default does not use TMPDIR, which may differ between users. Links are not resolved: another user may have
        put one there, and ``shared_directory`` has to see it.
        """
        return Path(os.environ.get("FINETUNE_LOCKS") or "/tmp/finetune-locks").expanduser().absolute()

    @property
    def trusted_hashes(self) -> Path:
        """JSON file with the sha256 of each local weight file, recorded at its first use."""
        return self.data_root / "trusted-weights.json"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts if the tracking server is the local sqlite file."""
        return self.data_root / "mlflow" / "artifacts"


def _provide_home(root: Path) -> None:
    """Set HOME where the user has no home: Prefect cannot be imported without one."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(root / "home")
