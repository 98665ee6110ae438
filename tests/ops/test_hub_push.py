"""`ops.hub_push` against a fake hub, in separate processes, because the library reads HF_ENDPOINT when imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakehub import FakeHub, Fault

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_secret_of_this_test"
REPO = "someone/gpt2-code-tiny"
SCRIPT = """
import json, sys
from pathlib import Path
from ops.hub import HubError
from ops.hub_push import push_directory
directory, repo, options = json.loads(sys.argv[1])
try:
    print(json.dumps({"url": push_directory(Path(directory), repo, "A version", **options)}))
except HubError as error:
    print(json.dumps({"error": str(error)}))
"""
Push = Callable[..., dict[str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a large file, a small one, and one that stays behind."""
    folder = tmp_path / "model"
    (folder / "components").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    (folder / "README.md").write_text("---\nlicense: other\n---\nA model.\n")
    (folder / "components" / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def push(hub: FakeHub, model: Path, tmp_path: Path) -> Push:
    """push(repo=REPO, token=TOKEN, endpoint=..., **options): in a new process."""

    def run(repo: str = REPO, token: str = TOKEN, endpoint: str = hub.endpoint, **options: Any) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
        own |= {"HF_HUB_DISABLE_XET": "1"} | ({"HF_TOKEN": token} if token else {})
        job = json.dumps([str(model), repo, {"leave_out": ["components/*"], **options}])
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, job], capture_output=True, text=True, timeout=120, env=inherited | own
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        answer: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return run


def _newest(hub: FakeHub) -> dict[str, bytes]:
    return hub.commits["models", REPO, hub.branches["models", REPO, "main"]]


def test_a_directory_becomes_a_commit(hub: FakeHub, push: Push, model: Path) -> None:
    """All files but those left out, byte for byte; the large one by LFS, and only once."""
    answer = push()
    commit = hub.branches["models", REPO, "main"]
    assert answer == {"url": f"{hub.endpoint}/{REPO}/commit/{commit}"}
    assert _newest(hub) == {name: (model / name).read_bytes() for name in ("README.md", "model.safetensors")}
    assert len(hub.objects) == 1
    assert hub.messages == ["A version"]
    assert hub.visibility == {REPO: None}  # the hub's default
    (model / "README.md").write_text("Another text.\n")
    push(private=True)
    assert _newest(hub)["README.md"] == b"Another text.\n"
    assert hub.asked("/upload/") == 1
    assert hub.visibility == {REPO: None}  # an existing repository stays as it is


def test_a_new_repository_may_be_private(hub: FakeHub, push: Push) -> None:
    """Only if that was asked for."""
    push(private=True)
    assert hub.visibility == {REPO: "private"}


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (Fault("status", match="/create", status=403), r"\(HTTP 403\): log in with `hf auth login`, or set HF_TOKEN"),
        (Fault("status", match="/commit/", status=400), r"\(HTTP 400\): the hub refuses the content"),
        (Fault("status", match="/upload/", status=403), r"\(HTTP 403\)"),
        pytest.param(
            Fault("status", match="/preupload/", status=500), r"\(HTTP 500\): try again", marks=pytest.mark.slow
        ),  # it is tried for 20 s
    ],
)
def test_a_hub_that_refuses_is_one_sentence(hub: FakeHub, push: Push, fault: Fault, complaint: str) -> None:
    """It names the repository, the hub, the status and the way out; no half of a model is visible."""
    hub.faults = [fault]
    answer = push()
    assert re.search(complaint, answer["error"]), answer
    assert answer["error"].startswith(f"could not push to {REPO} at {hub.endpoint}: ")
    assert "\n" not in answer["error"]
    assert ("models", REPO, "main") not in hub.branches or _newest(hub) == {}


def test_without_a_token(hub: FakeHub, push: Push) -> None:
    """The error says how to get one."""
    assert "(HTTP 401): log in with `hf auth login`, or set HF_TOKEN" in push(token="")["error"]
    assert hub.commits == {}


@pytest.mark.parametrize(
    ("repo", "endpoint", "complaint"),
    [
        ("a/b/c", "http://127.0.0.1:9", "choose another user/name"),
        (REPO, "http://user:secret@127.0.0.1:9", f"could not push to {REPO} at http://127.0.0.1:9: ConnectError"),
    ],
)
def test_a_wrong_name_and_a_hub_that_is_away(push: Push, repo: str, endpoint: str, complaint: str) -> None:
    """Neither gives a traceback, nor the password of an address."""
    answer = push(repo, endpoint=endpoint)
    assert complaint in answer["error"]
    assert "secret" not in answer["error"]
