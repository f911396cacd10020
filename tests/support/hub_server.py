"""A Hub for the unmodified huggingface_hub client: standard library only, on 127.0.0.1, with faults on demand.

It answers the endpoints that huggingface_hub 2.4 really calls for create, upload, commit, pull request and
download of models, and for download of data sets (``repos["datasets/org/name"]``), in the LFS protocol (no Xet:
run clients with HF_HUB_DISABLE_XET=1). Contents of large
files lie on disk by their sha256, as in the Hub's storage; everything received is kept for inspection.

    with HubServer(tmp_path) as hub:            # hub.url goes into HF_ENDPOINT
        hub.fail("commit", status=503, times=2)   # the next two commits answer 503
        hub.repos["user/name"].log("main")        # what a reader would see
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Blob:
    """One file of a commit: its bytes, or the sha256 of an object in storage."""

    content: bytes | None
    sha256: str
    size: int

    @property
    def oid(self) -> str:
        content = self.content
        if content is None:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    tree: dict[str, Blob]


@dataclass
class PullRequest:
    num: int
    title: str
    author: str
    status: str = "open"


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)  # users who may read a gated one
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branch, tag or refs/pr/N -> commit
    pulls: list[PullRequest] = field(default_factory=list)

    def commit(self, ref: str, title: str, tree: dict[str, Blob]) -> Commit:
        parent = self.refs.get(ref)
        number = len(self.commits)
        oid = hashlib.sha1(f"{self.id} {number} {parent} {title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, tree)
        self.refs[ref] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def log(self, ref: str = "main") -> list[str]:
        """Titles of the commits of a ref, newest first."""
        titles, oid = [], self.refs.get(ref)
        while oid:
            titles.append(self.commits[oid].title)
            oid = self.commits[oid].parent
        return titles

    def files(self, ref: str = "main") -> dict[str, Blob]:
        return self.commits[self.refs[ref]].tree


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests to one endpoint, after ``skip`` good ones.

    ``kind``: "status" answers ``status`` instead; "reset" cuts the line within the request's body; "lost" does
    the work and cuts the line before the answer; "corrupt" flips a byte of the body; "swap" commits other contents for one file; "slow" reads or sends the body
    a little at a time; "hold" waits for ``release``.
    """

    endpoint: str
    kind: str
    status: int = 503
    times: int = 1
    skip: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected"
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Request:
    endpoint: str
    method: str
    path: str
    authorized: bool


class HubServer:
    """The server and its state.

    ``chunk`` turns multipart uploads on, with parts of that many bytes. ``xet`` is a directory for Xet's own client
    to store into, as it can (hf_xet, ``local://``): what lies there this server cannot read, nor give back.
    """

    def __init__(self, root: Path, *, chunk: int | None = None, xet: Path | None = None) -> None:
        self.root, self.chunk, self.xet = root, chunk, xet
        self.objects = root / "objects"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, tuple[str, str]] = {}  # token -> (user, "read" or "write")
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.received: list[bytes] = []  # every body but those of large files, and every address
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"  # another origin: a token must not go there
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for fault in self.faults:
            fault.release.set()
        self._http.shutdown()
        self._http.server_close()

    def fail(self, endpoint: str, kind: str = "status", **how: Any) -> Fault:
        fault = Fault(endpoint, kind, **how)
        self.faults.append(fault)
        return fault

    def fault(self, endpoint: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.endpoint == endpoint and fault.times > 0:
                    if fault.skip:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None

    def create(self, repo_id: str, **how: Any) -> Repo:
        repo = self.repos[repo_id] = Repo(repo_id, **how)
        repo.commit("main", "initial commit", {".gitattributes": self.blob(b"*.gguf filter=lfs\n")})
        return repo

    def blob(self, content: bytes) -> Blob:
        return Blob(content, hashlib.sha256(content).hexdigest(), len(content))

    def add(self, repo_id: str, files: dict[str, bytes], ref: str = "main", title: str = "edit") -> Commit:
        """Someone else's commit, made on the server's side."""
        repo = self.repos.get(repo_id) or self.create(repo_id)
        tree = {
            **repo.files(ref if ref in repo.refs else "main"),
            **{name: self.blob(data) for name, data in files.items()},
        }
        return repo.commit(ref, title, tree)

    def read(self, blob: Blob) -> bytes:
        return blob.content if blob.content is not None else (self.objects / blob.sha256).read_bytes()

    def count(self, endpoint: str, method: str | None = None) -> int:
        return sum(r.endpoint == endpoint and method in (None, r.method) for r in self.requests)

    def _handler(self) -> type:
        from tests.support.hub_handler import HubHandler

        return type("Handler", (HubHandler,), {"hub": self})
