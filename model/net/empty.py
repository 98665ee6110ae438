"""Models without values: their names and shapes, or a place for values that are read from files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoInit(TorchFunctionMode):
    """Skips the functions of torch.nn.init, as Lightning Fabric's _EmptyInit does."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def empty_models() -> Iterator[None]:
    """Make the modules that are created within it on the meta device, where a tensor has no memory.

    Random numbers for such a tensor are drawn by torch's decompositions: their import takes a second.
    """
    with torch.device("meta"), _NoInit():
        yield
