"""A fake hub on the loopback interface, with faults that tests switch on.

Tests must run where no hub can be reached, and a real hub does not send half a file on request. The fake serves the
routes that huggingface_hub 2.4 uses for `ops.hub`: a revision's info, its tree, and its files (small ones directly,
LFS ones by a redirect to another host, like the real hub with its CDN, so that the token must not be sent there). The
hashes of git and LFS are real. There is no Xet and no access control.
"""

from __future__ import annotations

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
