"""What the Hub of ``hub_server`` answers: one method per endpoint."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub_server import Blob, Commit, Fault, HubServer, PullRequest, Repo, Request

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".model", ".png")
REGULAR_LIMIT = 10_000_000
WHEN = "2026-01-01T00:00:00.000Z"


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **body: Any) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


KIND = "(?P<kind>models|datasets)"
ROUTES: list[tuple[str, str, str]] = [
    ("POST", r"/api/repos/create", "create"),
    ("DELETE", r"/api/repos/delete", "delete"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", "preupload"),
    ("GET", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/xet-write-token/(?P<rev>[^/]+)", "xet"),
    ("POST", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", "commit"),
    ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("POST", r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/verify", "verify"),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "put"),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "part"),
    ("POST", r"/storage/(?P<oid>[0-9a-f]{64})/complete", "complete"),
    ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", "storage"),
    ("GET", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/refs", "refs"),
    ("POST", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "branch"),
    ("DELETE", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", "remove_branch"),
    ("POST", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/tag/(?P<rev>[^/]+)", "tag"),
    ("GET", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/discussions", "discussions"),
    ("GET", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/(?P<path>.+))?", "tree"),
    ("GET", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)/revision/(?P<rev>[^/]+)", "info"),
    ("GET", rf"/api/{KIND}/(?P<id>[^/]+/[^/]+)", "info"),
    ("HEAD", r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    ("GET", r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
]
WRITES = {"create", "delete", "preupload", "commit", "batch", "verify", "branch", "remove_branch", "tag"}


class HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    repo: Repo
    user: str
    injected: Fault | None = None
    rest = 0  # bytes of the request's body that are not read yet
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: otherwise each answer waits 40 ms for a delayed acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_any(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        for method, pattern, endpoint in ROUTES:  # noqa: B007 - used after the break
            match = re.fullmatch(pattern, url.path)
            if match and method == self.command:
                break
        else:
            self.rest = int(self.headers.get("Content-Length") or 0)
            return self.answer(Refused(404, "EntryNotFound", f"no such endpoint: {self.command} {url.path}"))
        with hub.lock:
            hub.requests.append(Request(endpoint, self.command, self.path, "Authorization" in self.headers))
            hub.received.append(self.path.encode())
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.values = {key: unquote(value) for key, value in match.groupdict().items() if value}
        if self.values.pop("kind", "models") == "datasets":
            self.values["id"] = f"datasets/{self.values['id']}"
        self.rest = int(self.headers.get("Content-Length") or 0)
        self.injected = hub.fault(endpoint)
        if self.injected:
            self.injected.reached.set()
        if self.injected and self.injected.kind == "status":
            self.drain()
            return self.send(self.injected.status, self.injected.message.encode(), "text/plain", self.injected.headers)
        if self.injected and self.injected.kind == "reset":
            self.rfile.read(self.rest // 2)
            return self.cut()
        if self.injected and self.injected.kind == "hold":
            self.injected.release.wait(60)
        try:
            self.check(endpoint)
            made = getattr(self, endpoint)()
        except Refused as refused:
            made = refused
        if self.injected and self.injected.kind == "lost":
            return self.cut()
        self.answer(made)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any  # noqa: N815 - the names that http.server calls

    # -- reading and answering

    def drain(self) -> None:
        while self.rest:
            self.chunk()

    def chunk(self) -> bytes:
        slow = self.injected is not None and self.injected.kind == "slow"
        data = self.rfile.read(min(self.rest, 4096 if slow else 1 << 20))
        if not data:
            raise ConnectionResetError("the client went away")
        self.rest -= len(data)
        if slow:
            time.sleep(0.005)
        return data

    def body(self) -> bytes:
        data = b"".join(iter(lambda: self.chunk() if self.rest else b"", b""))
        with self.hub.lock:
            self.hub.received.append(data)
        return data

    def cut(self) -> None:
        """Reset the connection: the client sees a broken line, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def finish(self) -> None:
        if not self.wfile.closed:
            super().finish()

    def answer(self, made: Any) -> None:
        self.drain()
        if isinstance(made, Refused):
            headers = {"X-Error-Code": made.code, "X-Error-Message": made.message}
            body = {"error": made.message, **made.body}
            return self.send(
                made.status, json.dumps(body).encode(), "application/json", {k: v for k, v in headers.items() if v}
            )
        if made is not None:
            self.send(200, json.dumps(made).encode(), "application/json", {})
        return None

    def send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.start(status, kind, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            slow = self.injected is not None and self.injected.kind == "slow"
            for start in range(0, len(body), 4096 if slow else max(1, len(body))):
                self.wfile.write(body[start : start + 4096] if slow else body)
                time.sleep(0.005 if slow else 0)

    def start(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": kind, **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    # -- who may do what

    def check(self, endpoint: str) -> None:
        hub = self.hub
        if endpoint in ("put", "part", "storage"):
            if "Authorization" in self.headers:
                raise Refused(400, message="Authorization sent to storage")
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if token and token not in hub.tokens:
            raise Refused(401, message="Invalid credentials in Authorization header")
        self.user, role = hub.tokens.get(token, ("", ""))
        if "id" in self.values:
            self.repo = hub.repos.get(self.values["id"])  # type: ignore[assignment]
            if self.repo is None or (self.repo.private and self.repo.id.split("/")[-2] != self.user):
                raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
            if self.repo.gated and self.user not in self.repo.granted and endpoint == "resolve":
                raise Refused(403 if token else 401, "GatedRepo", f"Access to model {self.repo.id} is restricted")
        if endpoint in WRITES and role != "write":
            raise Refused(403 if token else 401, message="you need a write token for this")

    def at(self) -> Commit:
        commit = self.repo.find(self.values.get("rev", "main"))
        if commit is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        return commit

    # -- repositories

    def create(self) -> Any:
        hub, asked = self.hub, json.loads(self.body())
        repo_id = f"{asked['organization'] or self.user}/{asked['name']}"
        if asked["organization"] not in (None, self.user):
            raise Refused(403, message=f"you don't have the rights to create under {asked['organization']}")
        with hub.lock:
            if repo_id in hub.repos:
                raise Refused(409, message="You already created this model repo", url=f"{hub.url}/{repo_id}")
            hub.create(repo_id, private=asked.get("visibility") == "private")
        return {"url": f"{hub.url}/{repo_id}"}

    def delete(self) -> Any:
        asked = json.loads(self.body())
        if self.hub.repos.pop(f"{asked['organization'] or self.user}/{asked['name']}", None) is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return {}

    def whoami(self) -> Any:
        if not self.user:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return {"name": self.user, "type": "user"}

    def validate(self) -> Any:
        import yaml

        content = json.loads(self.body())["content"]
        parts = content.split("---\n")
        try:
            data = yaml.safe_load(parts[1]) if content.startswith("---\n") else {}
            errors = [] if isinstance(data, dict) else ["no mapping"]
        except (yaml.YAMLError, IndexError) as problem:
            errors = [str(problem)]
        if errors:
            raise Refused(400, message="invalid metadata", errors=[{"message": e} for e in errors], warnings=[])
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}

    def info(self) -> Any:
        return {"id": self.repo.id.removeprefix("datasets/"), "sha": self.at().oid, "private": self.repo.private, "gated": self.repo.gated, "tags": [],
                "siblings": [{"rfilename": name} for name in self.at().tree]}  # fmt: skip

    def refs(self) -> Any:
        def told(name: str, ref: str) -> dict[str, str]:
            return {"name": name, "ref": ref, "targetCommit": self.repo.refs[name]}

        heads = [name for name in self.repo.refs if not name.startswith(("refs/", "v"))]
        return {
            "branches": [told(name, f"refs/heads/{name}") for name in heads],
            "tags": [told(name, f"refs/tags/{name}") for name in self.repo.refs if name.startswith("v")],
            "converts": [],
            "pullRequests": [told(name, name) for name in self.repo.refs if name.startswith("refs/pr/")],
        }

    def branch(self) -> Any:
        start = self.repo.find(json.loads(self.body() or b"{}").get("startingPoint") or "main")
        if start is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        if self.values["rev"] in self.repo.refs:
            raise Refused(409, message="Reference already exists")
        self.repo.refs[self.values["rev"]] = start.oid
        return {}

    def remove_branch(self) -> Any:
        if self.repo.refs.pop(self.values["rev"], None) is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        return {}

    def tag(self) -> Any:
        commit, name = self.repo.find(self.values["rev"]), json.loads(self.body())["tag"]
        if commit is None:
            raise Refused(404, "RevisionNotFound", "Invalid rev id")
        if name in self.repo.refs:
            raise Refused(409, message="Tag reference exists already")
        self.repo.refs[name] = commit.oid
        return {}

    def tree(self) -> Any:
        """The files below a folder; with ``recursive=false`` only what lies in it, folders too."""
        within = f"{self.values['path']}/" if "path" in self.values else ""
        below = {path: blob for path, blob in sorted(self.at().tree.items()) if path.startswith(within)}
        folders: dict[str, None] = {}
        if self.query.get("recursive") == "false":
            deeper = [path for path in below if "/" in path.removeprefix(within)]
            folders = dict.fromkeys(within + path.removeprefix(within).split("/")[0] for path in deeper)
            below = {path: blob for path, blob in below.items() if path not in deeper}
        return [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders] + [
            {
                "type": "file",
                "path": path,
                "oid": blob.oid,
                "size": blob.size,
                **(
                    {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.content is None else {}
                ),
            }
            for path, blob in below.items()
        ]

    # -- uploads

    def preupload(self) -> Any:
        tree, answers = self.at().tree, []
        for file in json.loads(self.body())["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > REGULAR_LIMIT
            there = tree.get(file["path"])
            oid = None if there is None else there.sha256 if there.content is None else there.oid
            answers.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return {"files": answers}

    def batch(self) -> Any:
        hub, objects = self.hub, []
        for asked in json.loads(self.body())["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if not (hub.objects / oid).is_file():
                upload: dict[str, Any] = {"href": f"{hub.storage}/storage/{oid}"}
                if hub.chunk and size > hub.chunk:
                    count = -(-size // hub.chunk)
                    upload = {
                        "href": f"{hub.url}/storage/{oid}/complete",
                        "header": {"chunk_size": str(hub.chunk)}
                        | {f"{n:05}": f"{hub.storage}/storage/{oid}/{n}" for n in range(1, count + 1)},
                    }
                answer["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{hub.url}/{self.repo.id}.git/info/lfs/verify"},
                }
            objects.append(answer)
        return {"transfer": "multipart" if hub.chunk else "basic", "objects": objects}

    def receive(self, path: Path) -> None:
        """A body to disk, appearing whole or not at all."""
        temporary = path.with_name(f"{path.name}.{threading.get_ident()}.incoming")
        corrupt = self.injected is not None and self.injected.kind == "corrupt"
        with temporary.open("wb") as file:
            while self.rest:
                data = self.chunk()
                file.write(bytes([data[0] ^ 1]) + data[1:] if corrupt else data)
                corrupt = False
        temporary.rename(path)

    def put(self) -> None:
        self.receive(self.hub.objects / self.values["oid"])
        self.send(200, b"", "text/plain", {})

    def part(self) -> None:
        path = self.hub.objects / f"{self.values['oid']}.part{self.values['part']}"
        self.receive(path)
        self.send(200, b"", "text/plain", {"ETag": f'"{hashlib.md5(path.read_bytes()).hexdigest()}"'})

    def complete(self) -> Any:
        asked, oid = json.loads(self.body()), self.values["oid"]
        if not (self.hub.objects / f"{oid}.part1").is_file():
            raise Refused(404, message="NoSuchUpload")
        with (self.hub.objects / oid).open("wb") as whole:
            for part in asked["parts"]:
                path = self.hub.objects / f"{oid}.part{part['partNumber']}"
                data = path.read_bytes()
                if part["etag"] != f'"{hashlib.md5(data).hexdigest()}"':
                    raise Refused(400, message="InvalidPart")
                whole.write(data)
                path.unlink()
        return {}

    def verify(self) -> Any:
        asked = json.loads(self.body())
        path = self.hub.objects / asked["oid"]
        if not path.is_file() or path.stat().st_size != asked["size"]:
            raise Refused(404, message="object not found")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != asked["oid"]:
                path.unlink()
                raise Refused(422, message="checksum of the uploaded object does not match its oid")
        return {}

    def commit(self) -> Any:
        hub, lines = self.hub, [json.loads(line) for line in self.body().splitlines()]
        header = lines[0]["value"]
        with hub.lock:
            head = self.at()
            parent = header.get("parentCommit")
            if parent and parent != head.oid and "create_pr" not in self.query:
                raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            tree = dict(head.tree)
            for line in lines[1:]:
                self.apply(tree, line["key"], line["value"])
            ref, extra = self.values["rev"], {}
            if "create_pr" in self.query:
                pull = PullRequest(len(self.repo.pulls) + 1, header["summary"], self.user)
                self.repo.pulls.append(pull)
                ref = f"refs/pr/{pull.num}"
                self.repo.refs[ref] = head.oid
                extra = {"pullRequestUrl": f"{hub.url}/{self.repo.id}/discussions/{pull.num}"}
            if self.injected and self.injected.kind == "swap":
                tree |= {path: hub.blob(b"swapped") for path in list(tree)[-1:]}
            made = self.repo.commit(ref, header["summary"], tree)
        return {
            "success": True,
            "commitUrl": f"{hub.url}/{self.repo.id}/commit/{made.oid}",
            "commitOid": made.oid,
            **extra,
        }

    def apply(self, tree: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        hub, path = self.hub, value["path"]
        if key == "file":
            tree[path] = hub.blob(base64.b64decode(value["content"]))
            hub.received.append(hub.read(tree[path]))
        elif key == "lfsFile":
            if not hub.xet and not (hub.objects / value["oid"]).is_file():
                raise Refused(400, message=f"LFS object {value['oid']} was not uploaded")
            tree[path] = Blob(None, value["oid"], value["size"])
        elif key == "deletedFile" and tree.pop(path, None) is None:
            raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")

    def xet(self) -> Any:
        if not self.hub.xet:
            raise Refused(404, "EntryNotFound", "no such endpoint: this hub has no Xet storage")
        return {"casUrl": f"local://{self.hub.xet}", "accessToken": "for-xet-only", "exp": int(time.time()) + 3600}

    # -- pull requests

    def told(self, pull: PullRequest) -> dict[str, Any]:
        repo = {"name": self.repo.id, "type": "model"}
        return {"title": pull.title, "num": pull.num, "author": {"name": pull.author}, "createdAt": WHEN, "status": pull.status,
                "repo": repo, "isPullRequest": True}  # fmt: skip

    def discussions(self) -> Any:
        status = self.query.get("status")
        found = [
            self.told(p)
            for p in self.repo.pulls
            if status in (None, p.status) and self.query.get("author") in (None, p.author)
        ]
        return {"count": len(found), "start": 0, "discussions": found}

    # -- downloads

    def resolve(self) -> None:
        commit, path = self.at(), self.values["path"]
        headers = {"X-Repo-Commit": commit.oid}
        blob = commit.tree.get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        if blob.content is None:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size),
                        "Location": f"{self.hub.storage}/storage/{blob.sha256}"}  # fmt: skip
            return self.send(302, b"", "text/plain", headers)
        return self.send_part(io.BytesIO(blob.content), blob.size, headers | {"ETag": f'"{blob.oid}"'})

    def storage(self) -> None:
        path = self.hub.objects / self.values["oid"]
        if not path.is_file():
            raise Refused(404, message="no such object")
        with path.open("rb") as file:
            self.send_part(file, path.stat().st_size, {"ETag": f'"{self.values["oid"]}"'})

    def send_part(self, file: BinaryIO, size: int, headers: dict[str, str]) -> None:
        """The file from where the client wants it, a piece at a time: no body is ever whole in memory."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        end = min(size, int(wanted[2]) + 1) if wanted and wanted[2] else size
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        kind = self.injected.kind if self.injected else ""
        file.seek(start)
        pieces = iter(lambda: file.read(min(4096 if kind == "slow" else 1 << 20, end - file.tell())), b"")
        if kind == "corrupt":
            pieces = (bytes([piece[0] ^ 1]) + piece[1:] if n == 0 else piece for n, piece in enumerate(pieces))
        length = size if self.command == "HEAD" else end - start
        self.start(206 if wanted else 200, "application/octet-stream", {"Content-Length": str(length), **headers})
        for piece in pieces if self.command != "HEAD" else ():
            self.wfile.write(piece)
            time.sleep(0.005 if kind == "slow" else 0)
