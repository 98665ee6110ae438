"""`ops.hub` against a fake hub, in separate processes, because the library reads HF_ENDPOINT when it is imported.

The module's time limits are shortened; the library is the real one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakehub import Fault, blob_id

ROOT = Path(__file__).parents[2]
MODEL, DATASET = "org/tiny", "org/Code_Pairs"
SPLITS = {"train": "train", "held_out": "test"}  # in the card: split -> file
TOKEN = "hf_canaryCanaryCanary"
FETCHED = {"config.json", "generation_config.json", "merges.txt", "model.safetensors", "vocab.json"}
KINDS = ("model.safetensors", "config.json")  # one hashed by LFS, one by git
DEAD = "http://127.0.0.1:9"
# A call that waits for a hub that never answers, or a thread that keeps the process alive, fails by this limit.
END_SECONDS = 120
SHORT = {"ANSWER_SECONDS": 1.0, "STALL_SECONDS": 1.0}  # for tests of the time limits; the others use the defaults
SCRIPT = """
import json, sys, time, traceback
from pathlib import Path
from model.data.formats import read_records
from model.data.layout import find_layout
from ops import hub
call, arguments, settings = json.loads(sys.argv[1])
vars(hub).update(settings)
start = time.monotonic()
try:
    result = getattr(hub, call)(*arguments[:2], Path(arguments[2]))
    if call == "fetch_weights":
        answer = {"path": str(result.path), "commit": result.commit, "files": result.files}
    else:
        layout = find_layout(result[0])
        rows = {name: [row for path in paths for row in read_records(path)] for name, paths in layout.splits.items()}
        answer = {"rows": rows, "commit": result[1], "left_out": layout.left_out}
except hub.HubError as error:
    traceback.print_exc()
    answer = {"error": str(error)}
print(json.dumps({**answer, "seconds": time.monotonic() - start}))
"""
Fetch = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, tiny GPT-2 with the files of its repository, a pickle included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("weights")
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=8, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate("abcdefgh")}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        lines = [json.dumps({"prompt": f"{split} {i}", "completion": f"print({i})"}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "README.md").write_text("Rows for tests.\n")
    (folder / "pairs.pkl").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def fetch(tmp_path: Path) -> Fetch:
    """fetch(hub, function, *arguments): call `ops.hub` in a new process; all calls of a test share a cache."""

    def run(
        hub: Any, call: str, *arguments: str | None, env: dict[str, str] | None = None, **settings: Any
    ) -> dict[str, Any]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        endpoint = hub if isinstance(hub, str) else hub.endpoint
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
        job = json.dumps([call, [*arguments, str(tmp_path / "cache")], {"PAUSES": [0.05, 0.1], **settings}])
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, job], capture_output=True, text=True, timeout=END_SECONDS,
            env={**inherited, **own, "PYTHONPATH": str(ROOT), **(env or {})},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert TOKEN not in done.stdout + done.stderr
        if "error" in answer:
            assert "; a local copy can be given as" in answer["error"]
        return {**answer, "stderr": done.stderr}

    return run


@pytest.fixture
def commit(hub: Any, weights: Path) -> str:
    pushed: str = hub.push("models", MODEL, weights)
    return pushed


def blobs(tmp_path: Path, repo: str = "models--org--tiny") -> list[Path]:
    return sorted((tmp_path / "cache" / repo / "blobs").glob("*"))


def flipped(path: Path) -> bytes:
    content = path.read_bytes()
    return content[:-1] + bytes([content[-1] ^ 1])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parquet(folder: Path) -> Path:
    """A data set of tables in a sub-folder, and a card that names the splits."""
    import pyarrow
    from pyarrow.parquet import write_table

    (folder / "data").mkdir(parents=True)
    for name in ("train", "test"):
        table = pyarrow.table({"prompt": [f"{name} a", f"{name} b"], "completion": ["1", "2"]})
        write_table(table, folder / f"data/{name}-00000-of-00001.parquet")
    splits = "".join(f"  - split: {split}\n    path: data/{name}-*\n" for split, name in SPLITS.items())
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n"
    (folder / "README.md").write_text(card)
    return folder


# Weights, and the cache


def test_weights_are_fetched_and_load(hub: Any, weights: Path, commit: str, fetch: Fetch) -> None:
    from transformers import GPT2LMHeadModel

    got = fetch(hub, "fetch_weights", MODEL, commit)
    assert got["commit"] == commit
    assert got["files"] == {name: sha256(weights / name) for name in FETCHED}
    assert {path.name for path in Path(got["path"]).iterdir()} == FETCHED
    assert GPT2LMHeadModel.from_pretrained(got["path"]).config.n_embd == 32
    assert not hub.asked(".bin")
    # The token goes to the hub and nowhere else.
    assert {token for _, path, token in hub.requests if "/resolve/" in path} == {f"Bearer {TOKEN}"}
    assert {token for _, path, token in hub.requests if path.startswith("/cdn/")} == {None}

    # A pinned commit in the cache needs no hub.
    again = fetch(DEAD, "fetch_weights", MODEL, commit, env={"HF_HUB_OFFLINE": "1"}, PAUSES=[20])
    assert (again["commit"], again["files"]) == (commit, got["files"])
    assert again["seconds"] < 10


def test_a_branch_is_resolved_and_remembered(hub: Any, weights: Path, commit: str, fetch: Fetch) -> None:
    assert fetch(hub, "fetch_weights", MODEL, "main")["commit"] == commit
    assert fetch(DEAD, "fetch_weights", MODEL, "main")["commit"] == commit


def test_a_cache_filled_by_another_program(hub: Any, commit: str, fetch: Fetch, tmp_path: Path) -> None:
    fetch(hub, "fetch_weights", MODEL, commit)
    for listing in (tmp_path / "cache" / "models--org--tiny" / "trees").iterdir():
        listing.unlink()
    assert fetch(DEAD, "fetch_weights", MODEL, commit)["commit"] == commit
    (tmp_path / f"cache/models--org--tiny/snapshots/{commit}/merges.txt").unlink()
    assert "no complete copy" in fetch(DEAD, "fetch_weights", MODEL, commit)["error"]


def test_a_damaged_cache_is_refetched(hub: Any, weights: Path, commit: str, fetch: Fetch) -> None:
    folder = Path(fetch(hub, "fetch_weights", MODEL, commit)["path"])
    hub.requests.clear()
    for name in KINDS:
        (folder / name).write_bytes(flipped(folder / name))
    got = fetch(hub, "fetch_weights", MODEL, commit)
    for name in KINDS:
        assert got["files"][name] == sha256(weights / name) == sha256(folder / name)
    assert hub.asked("/cdn/") == 1
    assert hub.asked("vocab.json") == 0, "what was whole is not fetched again"

    (folder / "config.json").write_bytes(b"damaged")
    assert "no complete copy" in fetch(DEAD, "fetch_weights", MODEL, commit)["error"]
    assert not (folder / "config.json").exists()


def test_a_blob_in_xets_store(hub: Any, weights: Path, commit: str, fetch: Fetch, tmp_path: Path) -> None:
    """There a blob is a link to a file whose name has 64 digits, but is not the file's sha256."""
    link = Path(fetch(hub, "fetch_weights", MODEL, commit)["path"]) / "model.safetensors"
    blob, stored = link.resolve(), tmp_path / "cache" / "blobs" / "ab" / ("ab" * 32)
    stored.parent.mkdir(parents=True)
    blob.rename(stored)
    blob.symlink_to(os.path.relpath(stored, blob.parent))
    got = fetch(DEAD, "fetch_weights", MODEL, commit)
    assert got["files"]["model.safetensors"] == sha256(weights / "model.safetensors")

    stored.write_bytes(b"damaged")
    theirs = tmp_path / "elsewhere"
    theirs.write_bytes(b"not the cache's")
    config = link.with_name("config.json").resolve()
    config.unlink()
    config.symlink_to(theirs)
    got = fetch(hub, "fetch_weights", MODEL, commit)
    assert theirs.exists()
    assert not config.is_symlink()
    assert got["files"]["model.safetensors"] == sha256(weights / "model.safetensors") == sha256(link)
    assert not stored.exists(), "else the library would link to it again"


def test_a_cache_without_links(hub: Any, weights: Path, commit: str, fetch: Fetch) -> None:
    """As on Windows: the file names do not give the hashes, so the hub is asked for them."""
    no_links = {"HF_HUB_DISABLE_SYMLINKS": "1"}
    file = Path(fetch(hub, "fetch_weights", MODEL, commit, env=no_links)["path"]) / "model.safetensors"
    assert not file.is_symlink()
    file.write_bytes(flipped(file))
    assert "no complete copy" in fetch(DEAD, "fetch_weights", MODEL, commit, env=no_links)["error"]
    got = fetch(hub, "fetch_weights", MODEL, commit, env=no_links)
    assert got["files"]["model.safetensors"] == sha256(weights / "model.safetensors") == sha256(file)


def test_missing_files_and_repositories_are_named(hub: Any, weights: Path, fetch: Fetch, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "vocab.json", "merges.txt", "pytorch_model.bin"):
        (folder / name).write_bytes((weights / name).read_bytes())
    pickled = hub.push("models", "org/pickled", folder)
    assert "has no model.safetensors" in fetch(hub, "fetch_weights", "org/pickled", pickled)["error"]
    assert not hub.asked("/resolve/")
    missing = fetch(hub, "fetch_weights", "org/none", pickled)["error"]
    assert "RepositoryNotFoundError (HTTP 404)" in missing
    assert hub.asked("org/none") == 1, "a definite answer is not asked for again"
    assert "HFValidationError" in fetch(hub, "fetch_weights", "a/b/c", "main")["error"]


# The hub does not answer


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [
        ("http://no-such-host.invalid", "ConnectError"),
        ("http://user:secret@127.0.0.1:9", "Connection refused"),
    ],
)
def test_no_hub_and_nothing_cached(fetch: Fetch, endpoint: str, reason: str) -> None:
    got = fetch(endpoint, "fetch_weights", MODEL, "607a30d783dfa663caf39e06633721c8d4cfcd7e")
    assert reason in got["error"]
    for part in (
        MODEL,
        "607a30d7",
        endpoint.replace("user:secret@", ""),
        "as weights_dir",
        "no complete copy",
    ):
        assert part in got["error"]
    assert "secret" not in got["error"] + got["stderr"]
    assert got["seconds"] < 10


def test_the_default_limits_end_within_a_minute() -> None:
    from ops import hub

    tries = len(hub.PAUSES) + 1
    assert tries * hub.ANSWER_SECONDS + sum(hub.PAUSES) < 60
    assert hub.STALL_SECONDS < 60


def test_offline_mode_is_named(fetch: Fetch) -> None:
    got = fetch(DEAD, "fetch_dataset", DATASET, None, env={"HF_HUB_OFFLINE": "1"}, PAUSES=[20])
    assert got["seconds"] < 10, "without further attempts"
    assert "OfflineModeIsEnabled" in got["error"]
    assert "as dataset" in got["error"]


def test_a_hub_that_never_answers(hub: Any, commit: str, fetch: Fetch) -> None:
    hub.faults = [Fault("hang")]
    got = fetch(hub, "fetch_weights", MODEL, commit, ANSWER_SECONDS=0.4)
    assert "Stalled (nothing arrived" in got["error"] or "Timeout" in got["error"]
    assert got["seconds"] > 1.2, "three attempts"


@pytest.mark.parametrize(("kind", "match"), [("hang", "/resolve/"), ("stall", "config.json")])
def test_a_hub_that_dies_midway(hub: Any, commit: str, fetch: Fetch, tmp_path: Path, kind: str, match: str) -> None:
    hub.faults = [Fault(kind, match=match)]
    got = fetch(hub, "fetch_weights", MODEL, commit, **SHORT)
    assert "Stalled (nothing arrived for 1 s)" in got["error"]
    for blob in blobs(tmp_path):
        assert blob.name in {blob_id(blob.read_bytes()), sha256(blob)}, "whole files only"


def test_a_busy_hub_is_asked_again(hub: Any, commit: str, fetch: Fetch) -> None:
    hub.faults = [Fault("status", 1, "/api/models/", status) for status in (503, 429)]
    assert fetch(hub, "fetch_weights", MODEL, commit)["commit"] == commit
    assert hub.asked(f"/revision/{commit}") == 3


def test_a_busy_hub_is_given_up(hub: Any, commit: str, fetch: Fetch) -> None:
    hub.faults = [Fault("status")]
    got = fetch(hub.endpoint.replace("//", "//user:secret@"), "fetch_weights", MODEL, commit)
    assert "HTTP 503" in got["error"]
    assert "secret" not in got["error"] + got["stderr"], "the library quotes the URL"
    assert hub.asked("/api/models/") == 3
    assert got["seconds"] < 5
    # The library would sleep for as long as this header says.
    hub.faults = [Fault("status", match="/resolve/", status=429, headers={"Retry-After": "3600"})]
    got = fetch(hub, "fetch_weights", MODEL, commit, **SHORT)
    assert "Stalled" in got["error"]


# Wrong content


def test_half_a_large_file(hub: Any, fetch: Fetch, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(21 << 20))
    commit = hub.push("models", "org/large", folder)
    hub.faults = [Fault("rewind", match="model.safetensors")]
    error = fetch(hub, "fetch_weights", "org/large", commit, STALL_SECONDS=1.6)["error"]
    assert "model.safetensors: Stalled" in error, "the same half downloaded again is no progress"
    hub.ranges.clear()
    hub.faults = [Fault("half", times=1, match="model.safetensors")]
    got = fetch(hub, "fetch_weights", "org/large", commit)
    assert got["files"]["model.safetensors"] == sha256(folder / "model.safetensors")
    assert hub.ranges == [f"bytes={10 << 20}-"], "the library goes on from the last full 10 MB"


def test_half_a_file_is_not_accepted(hub: Any, commit: str, fetch: Fetch, tmp_path: Path) -> None:
    hub.faults = [Fault("short", match="model.safetensors")]
    assert "model.safetensors: OSError" in fetch(hub, "fetch_weights", MODEL, commit)["error"]
    assert all(len(blob.name) == 40 for blob in blobs(tmp_path)), "nothing of it in the cache"
    assert "no complete copy" in fetch(DEAD, "fetch_weights", MODEL, commit)["error"]


def test_a_flipped_bit_is_refetched(hub: Any, weights: Path, commit: str, fetch: Fetch) -> None:
    hub.faults = [Fault("flip", times=1, match=name) for name in KINDS]
    got = fetch(hub, "fetch_weights", MODEL, commit)
    for name in KINDS:
        assert got["files"][name] == sha256(weights / name) == sha256(Path(got["path"]) / name)


@pytest.mark.parametrize("name", KINDS)
def test_a_bit_flipped_twice_is_refused(
    hub: Any, weights: Path, commit: str, fetch: Fetch, tmp_path: Path, name: str
) -> None:
    hub.faults = [Fault("flip", match=name)]
    right, wrong = (weights / name).read_bytes(), flipped(weights / name)
    if name == "config.json":
        expected, actual = blob_id(right), blob_id(wrong)
    else:
        expected, actual = (hashlib.sha256(content).hexdigest() for content in (right, wrong))
    error = fetch(hub, "fetch_weights", MODEL, commit)["error"]
    assert f"{name} was downloaded twice with hash {actual} instead of {expected}" in error
    assert not [blob for blob in blobs(tmp_path) if blob.name.startswith(expected)]
    assert not list((tmp_path / "cache").rglob(f"snapshots/*/{name}"))
    assert sum(path.endswith((name, expected)) for method, path, _ in hub.requests if method == "GET") >= 2


# Data sets


def test_a_dataset_is_fetched_at_its_commit(hub: Any, rows: Path, fetch: Fetch, tmp_path: Path) -> None:
    first = hub.push("datasets", DATASET, rows)
    got = fetch(hub, "fetch_dataset", DATASET, None)
    assert got["commit"] == first
    assert {name: len(split) for name, split in got["rows"].items()} == {"train": 3, "test": 2}
    assert got["rows"]["test"][1] == {"prompt": "test 1", "completion": "print(1)"}
    assert not hub.asked("pairs.pkl")

    second = hub.push("datasets", DATASET, parquet(tmp_path / "parquet"))
    got = fetch(hub, "fetch_dataset", DATASET, "main")
    assert got["commit"] == second
    assert {name: [row["prompt"] for row in split] for name, split in got["rows"].items()} == {
        "train": ["train a", "train b"]
    }
    assert "held_out" in got["left_out"][0]
    # Without the hub the library itself would load the newest commit for this revision.
    got = fetch(DEAD, "fetch_dataset", DATASET, first)
    assert (got["commit"], len(got["rows"]["train"])) == (first, 3)


def test_an_incomplete_dataset_is_refused(hub: Any, rows: Path, fetch: Fetch) -> None:
    """Without the hub, an incomplete copy must not be taken for a data set that lacks the split."""
    commit = hub.push("datasets", DATASET, rows)
    hub.faults = [Fault("flip", match="train.jsonl")]
    assert "train.jsonl was downloaded twice" in fetch(hub, "fetch_dataset", DATASET, commit)["error"]
    assert "no complete copy" in fetch(DEAD, "fetch_dataset", DATASET, commit)["error"]


def test_files_with_different_columns_are_read(hub: Any, rows: Path, fetch: Fetch) -> None:
    """datasets#7169: a column that only one file of a split has does not matter; each row has its own fields."""
    more = json.dumps({"prompt": "more", "completion": "c", "source": "x"})
    (rows / "train-1.jsonl").write_text(more + "\n")
    got = fetch(hub, "fetch_dataset", DATASET, hub.push("datasets", DATASET, rows))
    assert [row["prompt"] for row in got["rows"]["train"]] == ["more", "train 0", "train 1", "train 2"]


def test_a_card_that_leads_outside_the_snapshot_is_refused(hub: Any, rows: Path, tmp_path: Path) -> None:
    """A repository cannot make the machine's own files, or those of another server, into rows."""
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps({"prompt": "secret", "completion": "c"}) + "\n")
    for pattern in (str(secret), "../../../secret.jsonl", f"{hub.endpoint}/rows.jsonl"):
        (rows / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: '{pattern}'\n---\n")
        commit = hub.push("datasets", DATASET, rows)
        code = (
            "import sys; from prefect.logging import disable_run_logger\n"
            "from tasks.download import SourceConfig, download\n"
            "with disable_run_logger(): print(download.fn(SourceConfig('tiny', sys.argv[1], sys.argv[2])))"
        )
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.endpoint, "FINETUNE_DATA_ROOT": str(tmp_path / "root"), "NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-c", code, DATASET, commit],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode != 0
        assert "outside the data set: only files of the data set are read" in done.stderr.splitlines()[-1]
        assert "secret" not in done.stdout
