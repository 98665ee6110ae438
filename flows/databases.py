"""Opens MLflow's database of `make run`: what is wrong is one sentence."""

from __future__ import annotations

from ops.databases import MLFLOW, DatabaseError, unusable
from ops.mistakes import UsageError


def open_mlflow(uri: str) -> None:
    """Create or open MLflow's database, and look for the experiment.

    Raises:
        DatabaseError: it cannot be used.
        UsageError: the experiment was deleted.
    """
    from ops.tracking.connection import client, find_experiment  # slow imports, and a wrong name needs none

    try:
        mlflow = client(uri)
        mlflow.search_experiments(max_results=1)  # creates a fresh database
        find_experiment(mlflow)
    except DatabaseError:
        raise
    except RuntimeError as error:  # deleted
        raise UsageError(str(error)) from error
    except Exception as error:  # MLflow, SQLAlchemy and alembic raise different ones
        raise unusable(uri, MLFLOW, error) from error
