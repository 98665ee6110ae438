"""What a helper of a sweep has done when it waits."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import torch

def touched(*arguments, **options):
    raise AssertionError("a GPU was touched")

for place, names in (
    (torch.cuda, ("_lazy_init", "is_available", "device_count", "current_device", "get_device_properties")),
    (torch._C, ("_cuda_init", "_cuda_getDeviceCount")),
):
    for name in names:
        setattr(place, name, touched)
import tasks.trial_helper
print(*sorted(sys.modules.keys() & {"prefect", "transformers", "mlflow", "sqlalchemy", "alembic", "tasks.training"}))
"""


def test_it_has_imported_what_a_trial_needs_and_touches_no_gpu() -> None:
    """A training needs no Prefect. The GPUs may be those of another run, so that they are not even counted."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.split() == ["alembic", "mlflow", "sqlalchemy", "tasks.training"]
