"""Uploading a model's directory to a Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ops.hub import HubError
from ops.hub_answers import refuse_unsafe_answers

_WRITE = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
_REMEDIES = {400: "the hub refuses the content", 401: _WRITE, 403: _WRITE, 404: _WRITE}
_AGAIN = "try again: files that have arrived are not sent twice"


def push_directory(
    directory: Path, repo_id: str, message: str, private: bool = False, leave_out: Sequence[str] = ()
) -> str:
    """Upload a directory as one commit on the main branch; the repository is created if there is none.

    Files of the repository that the directory has not are kept, as ``huggingface_hub.upload_folder`` does.

    Args:
        repo_id: user or organization, slash, name.
        message: of the commit.
        private: whether a new repository is private. Otherwise it has the hub's default: public, unless an
            organization sets another. An existing repository stays as it is.
        leave_out: patterns of files that are not uploaded.

    Returns:
        The address of the commit.

    Raises:
        HubError: the hub does not answer or refuses; nothing is visible then but an empty new repository.
    """
    from huggingface_hub import HfApi

    refuse_unsafe_answers()
    try:
        api = HfApi()
        repository = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=directory,
            commit_message=message,
            ignore_patterns=list(leave_out),
        )
    except Exception as error:  # the library, its HTTP client and Xet raise different ones
        raise _refusal(repo_id, error) from None  # its text may hold an address with a signature
    return str(commit.commit_url)


def _refusal(repo_id: str, error: Exception) -> HubError:
    """The error in one sentence, with its status and without any address but the hub's own."""
    from huggingface_hub import constants

    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    name, status = type(cause).__name__, getattr(getattr(cause, "response", None), "status_code", 0)
    if name in ("HFValidationError", "UnsafeAnswerError"):
        reason, remedy = f"{name} ({cause})", "choose another user/name" if name == "HFValidationError" else _AGAIN
    else:
        reason, remedy = f"{name} (HTTP {status})" if status else name, _REMEDIES.get(status, _AGAIN)
    url = urlsplit(constants.ENDPOINT)
    address = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
    return HubError(f"could not push to {repo_id} at {address}: {reason}: {remedy}")
