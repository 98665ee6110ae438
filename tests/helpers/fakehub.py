"""A fake hub on the loopback interface, with faults that tests switch on.

Tests must run where no hub can be reached, and a real hub does not send half a file on request. The fake serves the
routes that huggingface_hub 2.4 uses for `ops.hub`: a revision's info, its tree, and its files (small ones directly,
LFS ones by a redirect to another host, like the real hub with its CDN, so that the token must not be sent there); and
those for `ops.hub_push`: creating a repository, asking how files are sent, LFS uploads, and commits. The hashes of
git and LFS are real. There is no Xet, and the only access control is that writing needs a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_BODY_FAULTS = ("half", "rewind", "stall", "short", "flip")
_CDN = re.compile(r"/cdn/([0-9a-f]{64})")
_PREUPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/preupload/(.+)")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
_UPLOAD = re.compile(r"/upload/([0-9a-f]{64})")
_COMMIT = re.compile(r"/api/models/([^/]+/[^/]+)/commit/(.+)")


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".parquet"))


@dataclass
class Fault:
    """A fault of requests whose path contains ``match``.

    Attributes:
        kind: "status": answer with ``status`` and ``headers``; "headers": as always, but with these ``headers``;
            "hang": never answer. The others concern the content of files. "half": close the connection after half of
            the bytes; "rewind": the same, and ignore Range; "stall": keep the connection open after half of the
            bytes; "short": send half of the bytes as the whole file; "flip": change one bit.
        times: number of requests with the fault; None: all.
        match: part of the path.
        status: HTTP status of the answer.
        headers: headers of the answer.
    """

    kind: Literal["status", "headers", "hang", "half", "rewind", "stall", "short", "flip"]
    times: int | None = None
    match: str = ""
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)


class FakeHub:
    """``with FakeHub() as hub``: serves pushed files, applies ``hub.faults`` and records ``hub.requests``."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.ranges: list[str] = []  # the Range headers
        self.commits: dict[tuple[str, str, str], dict[str, bytes]] = {}  # (models, repo, commit) -> files
        self.branches: dict[tuple[str, str, str], str] = {}  # (models, repo, branch) -> commit
        self.visibility: dict[str, str | None] = {}  # of repositories that were created here, as asked for
        self.objects: dict[str, bytes] = {}  # LFS objects that were uploaded, by sha256
        self.messages: list[str] = []  # of commits that were made here
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; connections to the port are refused from now on."""
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def push(self, kind: Literal["models", "datasets"], repo: str, folder: Path, branch: str = "main") -> str:
        """Make the files in ``folder`` the newest commit of ``branch`` and return the commit."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        return self.commit(kind, repo, files, branch)

    def commit(self, kind: str, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make these files the newest commit of ``branch`` and return the commit."""
        names = json.dumps([repo, {name: blob_id(content) for name, content in files.items()}])
        commit = hashlib.sha1(names.encode()).hexdigest()
        self.commits[kind, repo, commit] = files
        self.branches[kind, repo, branch] = commit
        return commit

    def asked(self, part: str = "") -> int:
        """Count the requests whose path contains ``part``."""
        return sum(part in path for _, path, _ in self.requests)

    def fault(self, path: str, *kinds: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.kind in kinds and fault.match in path and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        if self.headers.get("Range"):
            self.hub.ranges.append(self.headers["Range"])
        replaced = self.hub.fault(path, "headers")
        self.replaced = replaced.headers if replaced else {}
        fault = self.hub.fault(path, "status", "hang")
        if fault and fault.kind == "hang":
            self.hub.closing.wait()
            self.close_connection = True
        elif fault:
            self.answer(fault.status, b"", fault.headers)
        elif match := _CDN.fullmatch(path):
            self.send_lfs(match[1])
        elif match := _FILE.fullmatch(path):
            self.send_file("datasets" if match[1] else "models", *match.groups()[1:])
        elif match := _API.fullmatch(path):
            self.send_info(match[1], match[2], match[3], match[4] or "main")
        else:
            self.answer(404, b"")

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.hub = self.server.hub  # type: ignore[attr-defined]
        self.replaced = {}
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.requests.append((self.command, path, token))
        body = self.body()
        fault = self.hub.fault(path, "status")
        if fault:
            self.answer(fault.status, b"", fault.headers)
        elif match := _UPLOAD.fullmatch(path):  # signed, so without a token
            if hashlib.sha256(body).hexdigest() == match[1]:
                self.hub.objects[match[1]] = body
            self.answer(200 if match[1] in self.hub.objects else 400, b"")
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif not token:
            self.answer(401, b"")
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := _PREUPLOAD.fullmatch(path):
            modes = [
                (file["path"], "lfs" if is_lfs(file["path"]) else "regular") for file in json.loads(body)["files"]
            ]
            self.reply({"files": [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in modes]})
        elif _BATCH.fullmatch(path):
            self.reply({"transfer": "basic", "objects": [self.wanted(file) for file in json.loads(body)["objects"]]})
        elif match := _COMMIT.fullmatch(path):
            self.accept(match[1], match[2], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer(404, b"")

    def body(self) -> bytes:
        """The content of a request, whole or in chunks."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def create(self, asked: dict[str, Any]) -> None:
        """Create a repository, or answer 409 where there is one."""
        repo = f"{asked['organization']}/{asked['name']}"
        known = ("models", repo, "main") in self.hub.branches
        if not known:
            self.hub.visibility[repo] = asked.get("visibility")
            self.hub.commit("models", repo, {})
        self.reply({"url": f"{self.hub.endpoint}/{repo}"}, 409 if known else 200)

    def wanted(self, file: dict[str, Any]) -> dict[str, Any]:
        """What to do with an LFS object: upload it, or nothing if it is here."""
        found = {"oid": file["oid"], "size": file["size"]}
        if file["oid"] in self.hub.objects:
            return found
        return {**found, "actions": {"upload": {"href": f"{self.hub.endpoint}/upload/{file['oid']}"}}}

    def accept(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        """Add a commit to a branch: files in its lines, and LFS objects that were uploaded before."""
        files = dict(self.hub.commits["models", repo, self.hub.branches["models", repo, branch]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.objects[value["oid"]]
        commit = self.hub.commit("models", repo, files, branch)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit}"
        self.reply({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def find(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return commit and files, or answer 404."""
        commit = self.hub.branches.get((kind, repo, revision), revision)
        if (kind, repo, commit) in self.hub.commits:
            return commit, self.hub.commits[kind, repo, commit]
        known = any(key[:2] == (kind, repo) for key in self.hub.commits)
        self.answer(404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        return None

    def send_info(self, kind: str, repo: str, what: str | None, revision: str) -> None:
        if not (found := self.find(kind, repo, revision)):
            return
        commit, files = found
        entries: list[dict[str, Any]] = []
        for name, content in files.items():
            sha256 = hashlib.sha256(content).hexdigest()
            # Git stores a pointer in place of an LFS file, and the hub gives the pointer's hash as the blob id.
            pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n"
            pointer %= sha256.encode(), len(content)
            lfs = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": len(pointer)}
            oid = blob_id(pointer if is_lfs(name) else content)
            entry = {"size": len(content), "lfs": lfs} if is_lfs(name) else {"size": len(content)}
            if what == "tree":
                entries.append({"type": "file", "path": name, "oid": oid, **entry})
            else:
                entries.append({"rfilename": name, "blobId": oid, **entry})
        answer: Any = entries if what == "tree" else {"id": repo, "sha": commit, "siblings": entries}
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def send_file(self, kind: str, repo: str, revision: str, name: str) -> None:
        if not (found := self.find(kind, repo, revision)):
            return
        commit, files = found
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            self.answer(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
        elif is_lfs(name):
            sha256 = hashlib.sha256(files[name]).hexdigest()
            headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{sha256}"
            headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(files[name]))}
            self.answer(302, b"", headers)
        else:
            self.send_content(name, files[name], {**headers, "ETag": f'"{blob_id(files[name])}"'})

    def send_lfs(self, sha256: str) -> None:
        for files in self.hub.commits.values():
            for name, content in files.items():
                if is_lfs(name) and hashlib.sha256(content).hexdigest() == sha256:
                    return self.send_content(name, content, {"ETag": f'"{sha256}"'})
        return self.answer(404, b"")

    def send_content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))  # only "bytes=N-" is ever sent
        total, status = len(content), 206 if "Range" in self.headers else 200
        fault = self.hub.fault(name, *_BODY_FAULTS) if self.command == "GET" else None
        if fault and fault.kind == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        elif fault and fault.kind == "short":
            content = content[: len(content) // 2]
        elif fault and fault.kind == "rewind":
            start, status = 0, 200
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.answer(status, content[start:], headers, fault)

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), **self.replaced, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.kind in ("half", "rewind", "stall"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault.kind == "stall":
                self.hub.closing.wait()
        else:
            self.wfile.write(body)
