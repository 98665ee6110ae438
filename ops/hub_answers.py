"""Refuses answers of a hub with which it, or a proxy before it, could choose where files are written.

``huggingface_hub`` names files of its cache after three headers (seen in 2.4.0) and joins them to a path unchecked:
with the ETag ``"../../x"`` the downloaded file is written outside the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.files import leads_outside

if TYPE_CHECKING:
    from httpx2 import Client, Response

_NAMES = ("ETag", "X-Linked-ETag", "X-Repo-Commit")


class UnsafeAnswerError(RuntimeError):
    """A header of an answer is a path that leads out of the cache."""


def refuse_unsafe_answers() -> None:
    """Check every answer that the library gets in this process from now on. May be called again."""
    from huggingface_hub import set_client_factory

    set_client_factory(_checked_client)


def _checked_client() -> Client:
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.event_hooks = {**client.event_hooks, "response": [*client.event_hooks["response"], _check]}
    return client


def _check(response: Response) -> None:
    for name in _NAMES:
        value = response.headers.get(name, "")
        if leads_outside(value.removeprefix("W/").strip('"')):
            raise UnsafeAnswerError(f"the hub answers with {name} {ascii(value)[:100]}, which is a path")
