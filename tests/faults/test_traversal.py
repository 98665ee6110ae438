"""Names that lead out of their folder, wherever a file or a server gives one: FAULTS 32.

Each is refused by name, and nothing outside the folder is read or made. Cards of data sets: test_layout.py and
test_hub.py. The index of weights in shards: test_loading.py.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from datasets import Dataset, DatasetDict
from fakehub import FakeHub, Fault

from flows.__main__ import main as run_main
from model.data.formats import read_records
from model.data.layout import find_splits
from model.files import leads_outside, plain_name
from ops.servers import EXPERIMENT
from ops.settings import Settings
from ops.tracking.connection import client
from ops.tracking.ledger import read_ledger
from ops.tracking.registry import fetch_version, find_version
from ops.tracking.sample import main as sample_main

ROOT = Path(__file__).resolve().parents[2]
ROW = {"prompt": "p", "completion": "c"}
LINE = json.dumps(ROW).encode() + b"\n"
OUTSIDE = ("../escaped", "a/../../escaped", "/tmp/escaped", "..", "a\0b")
FETCH = """
import sys
from pathlib import Path
from ops import hub
try:
    print(hub.fetch_dataset("org/rows", sys.argv[2] or None, Path(sys.argv[1])))
except hub.HubError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_that_leads_outside(name: str) -> None:
    assert leads_outside(name)
    with pytest.raises(ValueError, match="the index names a file outside its directory: "):
        plain_name(name, "the index")


def test_plain_names_pass() -> None:
    """Two dots in a name are no parent folder; a path below a folder is no plain name."""
    for name in ("rows.jsonl", "rows..jsonl", "..rows", "ä b.json"):
        assert not leads_outside(name)
        assert plain_name(name, "the index") == name
    assert not leads_outside("data/train.jsonl")
    for wrong in ("data/train.jsonl", "", None, 5):
        with pytest.raises(ValueError, match="outside its directory"):
            plain_name(wrong, "the index")


# The hub


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., str]:
    """fetch(hub, revision): the error of fetching the data set; all files are below the folder ``hub``."""

    def run(hub: FakeHub, revision: str = "") -> str:
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hub" / "home"), "NO_PROXY": "*"}
        command = [sys.executable, "-c", FETCH, str(tmp_path / "hub" / "cache"), revision]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(command, cwd=ROOT, env={**inherited, **own}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done.stdout
        assert {path.name for path in tmp_path.iterdir()} <= {"hub", "rows"}
        return done.stderr.splitlines()[-1]

    return run


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_bytes(LINE)
    with FakeHub() as running:
        running.push("datasets", "org/rows", tmp_path / "rows")
        yield running


@pytest.mark.parametrize("name", ["data/../../../../../escaped.jsonl", "/escaped.png"])
def test_a_list_of_files_of_the_hub(hub: FakeHub, fetch: Callable[..., str], name: str) -> None:
    """The name is refused before anything is fetched, even if a file of that type is not wanted."""
    (files,) = hub.commits.values()
    files[name] = LINE
    assert f"the hub names the file {name!r}, which is outside the repository" in fetch(hub)
    assert not hub.asked("/resolve/")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("ETag", '"../../../../escaped"'),
        ("ETag", None),
        ("X-Linked-Etag", 'W/"../../../../escaped"'),
        ("X-Repo-Commit", "../../../../escaped"),
    ],
)
def test_a_header_of_the_hub(
    hub: FakeHub, fetch: Callable[..., str], tmp_path: Path, header: str, value: str | None
) -> None:
    """huggingface_hub names files of its cache after it: "../x" would be written outside the cache."""
    value = value or f'"{tmp_path}/escaped"'
    hub.faults = [Fault("headers", match="train.jsonl", headers={header: value})]
    said = fetch(hub)
    assert f"train.jsonl: UnsafeAnswerError (the hub answers with {header.replace('Etag', 'ETag')} " in said
    assert said.endswith("which is a path); a local copy can be given as dataset")


def test_a_revision_that_is_a_path(hub: FakeHub, fetch: Callable[..., str]) -> None:
    """The library keeps a file of that name."""
    assert "no revision of git has such a name" in fetch(hub, "../../../../escaped")
    assert not hub.requests


# Files of data sets


def _saved(folder: Path) -> Path:
    """What save_to_disk writes, and a file outside that must not become rows."""
    DatasetDict({"train": Dataset.from_list([ROW] * 3)}).save_to_disk(folder / "set")
    Dataset.from_list([ROW] * 5).save_to_disk(folder / "secret")
    return folder / "set"


@pytest.mark.parametrize("name", ["../../secret/data-00000-of-00001.arrow", "/etc/passwd", ".."])
def test_state_json_of_save_to_disk(tmp_path: Path, name: str) -> None:
    folder = _saved(tmp_path)
    state = folder / "train" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"].append({"filename": name})
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"train/state\.json names a file outside its directory: "):
        find_splits(folder)
    for path in (folder / "train").glob("*.arrow"):  # the same where no shard is left beside it
        path.unlink()
    with pytest.raises(ValueError, match=r"train/state\.json names "):
        find_splits(folder)


def test_a_shard_that_state_json_names_and_that_is_missing(tmp_path: Path) -> None:
    """Half a copy would train on half of the rows."""
    folder = _saved(tmp_path)
    state = folder / "train" / "state.json"
    state.write_text(state.read_text().replace("00000-of-00001", "00001-of-00002"))
    with pytest.raises(ValueError, match=r"names data-00001-of-00002\.arrow, which is not there: copy the whole"):
        find_splits(folder)


@pytest.mark.parametrize("name", ["dataset_dict.json", "train/dataset_info.json"])
def test_descriptions_of_data_sets_are_not_followed(tmp_path: Path, name: str) -> None:
    """``load_from_disk`` follows the splits of dataset_dict.json; here no path in a description is read."""
    folder = _saved(tmp_path)
    before = find_splits(folder)
    outside = {"splits": ["../secret", str(tmp_path / "secret")], "download_checksums": {"../secret/x": {}}}
    (folder / name).write_text(json.dumps(outside))
    assert find_splits(folder) == before


def _tar(compressed: bool) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if compressed else "w") as archive:
        member = tarfile.TarInfo("../escaped.jsonl")
        member.size = len(LINE)
        archive.addfile(member, io.BytesIO(LINE))
    return stream.getvalue()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("../escaped.jsonl", LINE)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("rows.jsonl", _tar(False), "a tar archive"),
        ("rows.jsonl.gz", _tar(True), "a tar archive"),
        ("rows.csv", _tar(True), "compressed by gzip"),
        ("rows.json", _zip(), "a zip archive"),
        ("rows.parquet", _zip(), "a zip archive"),
    ],
)
def test_members_of_archives(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    """No archive is unpacked, whatever it is called."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} cannot be read as .*: it is {kind}"):
        list(read_records(folder / name))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [name]


def test_the_name_inside_a_gzip_file_is_not_used(tmp_path: Path) -> None:
    """The header of a gzip file may hold the name of the packed file."""
    folder = tmp_path / "a"
    folder.mkdir()
    with gzip.GzipFile("../escaped.jsonl", "wb", fileobj=(folder / "rows.jsonl.gz").open("wb")) as stream:
        stream.write(LINE)
    assert list(read_records(folder / "rows.jsonl.gz")) == [ROW]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rows.jsonl.gz"]


# Names that users and MLflow give


@pytest.mark.parametrize("name", ["../tiny", "/etc/passwd", "../prefect.yaml"])
def test_a_deployment_s_name_is_no_path(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run_main(["run", name]) == 2
    assert f"prefect.yaml has no deployment {name!r}" in capsys.readouterr().err


@pytest.fixture
def empty(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(mlflow_database, tmp_path)}")
    monkeypatch.setenv("FINETUNE_DATA_ROOT", str(tmp_path / "root"))
    return Settings.load()


@pytest.mark.parametrize("name", ["../gpt2-code-tiny", "/etc", "..", "x' OR name = 'gpt2-code-tiny", 'a"b'])
def test_make_sample_with_a_path_for_a_model(empty: Settings, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert sample_main(["Write a function.", "--model", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not registered at sqlite:" in line or "MLflow at sqlite:" in line, line
    assert not (empty.data_root / "models").exists()


@pytest.mark.parametrize("uri", ["models:/../1", "models:/../../etc/1", "models:/x/../1", "models:/..@champion"])
def test_start_from_a_path(empty: Settings, uri: str) -> None:
    with pytest.raises((ValueError, LookupError), match=r"is not registered|is none of base|cannot be a version"):
        find_version(client(empty.tracking_uri), uri)


class _Hostile(BaseHTTPRequestHandler):
    """An MLflow server that answers with paths. There is no real one that does."""

    name, artifact, run_id = "gpt2-code-tiny", "model.safetensors", "a" * 32

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        version = {"name": self.name, "version": "1", "source": "mlflow-artifacts:/m", "run_id": "r"}
        run = {
            "info": {"run_id": self.run_id, "run_uuid": self.run_id, "experiment_id": "1", "status": "FINISHED"},
            "data": {"tags": [{"key": "nightly", "value": "gpt2-code-tiny"}]},
        }
        answers: dict[str, Any] = {
            "registered-models/get": {"registered_model": {"name": self.name}},
            "model-versions/get": {"model_version": version},
            "model-versions/get-download-uri": {"artifact_uri": "mlflow-artifacts:/m"},
            "experiments/get-by-name": {
                "experiment": {"experiment_id": "1", "name": EXPERIMENT, "lifecycle_stage": "active"}
            },
            "runs/search": {"runs": [run]},
            "mlflow-artifacts/artifacts": {"files": [{"path": self.artifact, "is_dir": False, "file_size": 1}]},
        }
        key = path.split("/mlflow/", 1)[-1] if "/mlflow/" in path else path.split("/2.0/", 1)[-1]
        body = b"x" if key.startswith("mlflow-artifacts/artifacts/") else json.dumps(answers.get(key, {})).encode()
        self.send_response(200 if key in answers or body == b"x" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Callable[..., Settings]]:
    """hostile(name=..., artifact=..., run_id=...): settings with such a server."""
    servers: list[ThreadingHTTPServer] = []

    def start(**answers: str) -> Settings:
        handler = type("Handler", (_Hostile,), answers)
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return Settings(tmp_path / "deep" / "root", f"http://127.0.0.1:{servers[-1].server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_hostile_server_is_understood(hostile: Callable[..., Settings], tmp_path: Path) -> None:
    """With harmless names its file arrives: the refusals below are those of the names."""
    settings = hostile()
    version = client(settings.tracking_uri).get_model_version("gpt2-code-tiny", "1")
    directory, files = fetch_version(settings, version, print)
    assert (list(files), directory.parent) == (["model.safetensors"], settings.models)


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        ({"artifact": "../../../escaped"}, "the files of models:/gpt2-code-tiny/1 cannot be had from .*Invalid path"),
        ({"artifact": "/tmp/escaped"}, "the files of models:/gpt2-code-tiny/1 cannot be had from .*Invalid path"),
        ({"name": "../../../escaped"}, "MLflow at http.* names a file outside its directory: '../../../escaped'"),
    ],
)
def test_names_of_a_version_and_its_artifacts(
    hostile: Callable[..., Settings], tmp_path: Path, answers: dict[str, str], complaint: str
) -> None:
    settings = hostile(**answers)
    version = client(settings.tracking_uri).get_model_version("gpt2-code-tiny", "1")
    with pytest.raises((RuntimeError, ValueError), match=complaint):
        fetch_version(settings, version, print)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.parts[:2] == ("deep", "root") for path in made), made


def test_the_id_of_a_night_s_run(hostile: Callable[..., Settings], tmp_path: Path) -> None:
    """The ledger keeps a copy of a night's rows under it."""
    settings = hostile(run_id="../../escaped")
    with pytest.raises(ValueError, match=r"names a file outside its directory: '../../escaped'"):
        read_ledger(settings.tracking_uri, "gpt2-code-tiny", "rows", settings.ledger)
    assert not list(tmp_path.rglob("escaped*"))
